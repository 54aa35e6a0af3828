"""Checks that a manifest is consistent in itself, beyond the types of its records."""

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.rows import are_runs, num_rows
from flexmerge_cli.checkpoint.safetensors import is_shape
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import ROWS_SUFFIX, are_task_names
from flexmerge_cli.family.split import check_splits, whole_of
from flexmerge_cli.formats.folders import (
    ADDED,
    BASE_FOLDER,
    CODED_README,
    WEIGHTS,
    stays_inside,
)
from flexmerge_cli.record import Shape

if TYPE_CHECKING:
    from flexmerge_cli.formats.manifest import Manifest
    from flexmerge_cli.formats.manifest_records import TensorEntry

FIRST = "flexmerge.bundle/1"


def check_manifest(manifest: "Manifest") -> None:
    """Raise ValueError unless the manifest is consistent. A sound id does not make it so: it may come from a
    stranger."""
    tasks = set(manifest.tasks)
    if not tasks or not are_task_names(list(manifest.tasks)):
        raise ValueError("it has no tasks, or one with an invalid name")  # names become folders
    if len({task.pooled for task in manifest.tasks.values()}) > 1:
        raise ValueError("its tasks are not all of one kind, models or adapters of one pool")
    gate = manifest.gate
    if gate is not None and (set(gate.data) & set(gate.not_scored) or set(gate.data) | set(gate.not_scored) != tasks):
        raise ValueError("its gate does not list every task exactly once")
    router = manifest.router
    if router is not None and not (
        len(set(router.tasks)) == len(router.tasks)
        and {router.features, *router.tasks} <= tasks
        and router.examples.keys() == router.data.keys() == set(router.tasks)
    ):
        raise ValueError("its router does not have two or more of its tasks, each once")
    surgery = manifest.surgery
    if surgery is not None and not (surgery.layers.keys() == surgery.examples.keys() == surgery.data.keys() <= tasks):
        raise ValueError("its surgery is not of tasks that it has")
    wemoe, units = manifest.wemoe, {unit.name: unit for unit in manifest.units}
    if wemoe is not None and not (
        wemoe.examples.keys() == wemoe.data.keys() <= tasks
        and all(name in units and first in units[name].tensors for name, first in wemoe.first.items())
    ):
        raise ValueError("its routers of experts are not of tasks and units that it has")
    for folder, added in ADDED.items():
        there = {path for path in manifest.files if path.startswith(f"{folder}/")}
        if there != (set() if getattr(manifest, folder) is None else {added}):
            raise ValueError(f"the file of its {folder} is missing, or there are others in {folder}/")
    for path, file in manifest.files.items():
        if not stays_inside(path):
            raise ValueError(f"it points outside the bundle: `{path}`")
        folder, *below = path.split("/")
        if not set(file.tasks) <= tasks:
            raise ValueError(f"`{path}` is read by an unknown task")
        if folder in ("tasks", "coded") and file.tasks != (below[0],):
            raise ValueError(f"`{path}` is not a file of its task")
        if (not file.tasks) != (folder in ADDED):
            raise ValueError(f"`{path}` is not read by any task, or it belongs to no tensor and is read by one")
    read_by: dict[str, set[str]] = {name: set() for name in tasks}
    for path, file in manifest.files.items():
        for name in file.tasks:
            read_by[name].add(path)
    if not manifest.files.keys().isdisjoint(manifest.base_links):
        raise ValueError("a file has the name of a link to the base's weights")
    of_base = manifest.base_files if manifest.kept else {}
    above_base = {str(up) for path in of_base for up in PurePosixPath(path).parents}
    if not _have_places(of_base, (), ()):
        raise ValueError("two files of the base have one place in a checkpoint, or one has none")
    for name, task in manifest.tasks.items():
        if set(task.files) != read_by[name]:
            raise ValueError(f"the files of task `{name}` are not those that it reads")
        is_coded, links = manifest.is_coded(name), manifest.links(name)
        over = (of_base, above_base) if task.is_kept else ((), ())
        if not _have_places(manifest.side_files(name), *over):
            raise ValueError(f"two files of task `{name}` have one place in a checkpoint, or one has none")
        beside = {f"coded/{name}/{CODED_README}", *manifest.side_files(name).values()}
        for path in task.files:
            if not (path.startswith((WEIGHTS, f"{BASE_FOLDER}/")) or path in beside) or path in links:
                raise ValueError(f"`{path}` is not a file of task `{name}`, or has the name of a link to its weights")
        if task.stem is not None and (is_coded or task.is_kept):
            raise ValueError(f"the weights of task `{name}` are linked, but no loader can read them")
        if manifest.format == FIRST and (is_coded or task.stem is not None or manifest.base_stem is not None):
            raise ValueError(f"task `{name}` is stored in a way that {FIRST} does not know")
    for unit in manifest.units:
        if any(group.errors is not None and len(group.errors) != 16 * len(group.tasks) for group in unit.groups):
            raise ValueError(f"a group of `{unit.name}` does not have one error per task")
    tensors = {tensor.name: tensor for tensor in manifest.stored}
    if len(tensors) < len(manifest.stored):
        raise ValueError("a tensor occurs twice")
    _check_vocabularies(manifest, tensors)
    check_splits(
        manifest.splits,
        {t.name: {task: (t.dtype_of(task), t.shape_of(task)) for task in t.digests} for t in manifest.stored},
    )
    if any(tensor.of is not None for split in manifest.splits for tensor in map(tensors.__getitem__, split.names)):
        raise ValueError("a part of a split tensor is tied to another")
    for tensor in manifest.stored:
        readers = set(tensor.digests)
        if not readers <= tasks:
            raise ValueError(f"`{tensor.name}` belongs to an unknown task")
        dtypes = {tensor.dtype_of(task) for task in readers}
        if not dtypes <= set(ITEM_BYTES) or not all(is_shape(tensor.shape_of(task)) for task in readers):
            raise ValueError(f"`{tensor.name}` has an unknown dtype, or too many axes or elements")
        target = tensors.get(tensor.of) if tensor.of is not None else None
        if (tensor.class_ is TensorClass.TIED) != (tensor.of is not None):
            raise ValueError(f"`{tensor.name}` is tied without a target, or has a target without being tied")
        if tensor.of is not None and not (
            target is not None
            and target.of is None
            and all(
                task in target.digests
                and (target.dtype_of(task), target.shape_of(task)) == (tensor.dtype_of(task), tensor.shape_of(task))
                for task in readers
            )
        ):
            raise ValueError(f"`{tensor.name}` is not tied to a tensor of its form")
    wholes: dict[str, set[str]] = {name: set() for name in tasks}
    for tensor in manifest.tensors:
        for name in tensor.digests:
            wholes[name].add(whole_of(tensor.name)[0])
    for name in tasks:
        if sorted(manifest.aligned(name).values()) != sorted(wholes[name]):
            raise ValueError(f"two tensors of task `{name}` have one name, or parts of one have several")
    own_names: dict[str, set[str]] = {name: set() for name in tasks}
    of_kept: dict[str, dict[str, tuple[str, Shape]]] = {name: {} for name in manifest.kept}
    for tensor in manifest.tensors:
        for name in tensor.digests:
            own = manifest.tasks[name].names.get(tensor.name, tensor.name)
            if own in own_names[name]:
                raise ValueError(f"two tensors of task `{name}` have one name")
            own_names[name].add(own)
            if name in of_kept:
                of_kept[name][tensor.name] = tensor.dtype_of(name), tensor.shape_of(name)
    for name, has in of_kept.items():
        manifest.tasks[name].check(name, manifest.files.get(str(manifest.own_weights(name))), has)
    in_units = [name for unit in manifest.units for name in unit.tensors]
    if len(set(in_units)) < len(in_units) or not set(in_units) <= set(tensors):
        raise ValueError("units hold unknown tensors, or one tensor twice")
    merging = {name for name, task in manifest.tasks.items() if not task.is_kept}
    for unit in manifest.units:
        members = [task for group in unit.groups for task in group.tasks]
        if len(set(members)) < len(members) or not set(members) <= merging:
            raise ValueError(f"the groups of unit `{unit.name}` hold unknown tasks, or one task twice")
        if any(group.method is not None and not 0 <= group.method < len(manifest.methods) for group in unit.groups):
            raise ValueError(f"a group of unit `{unit.name}` has an unknown method")
        if any(group.bits is not None and not set(group.bits) <= set(group.tasks) for group in unit.groups):
            raise ValueError(f"a group of unit `{unit.name}` has bits for a task that is not in it")


def _have_places(files: Collection[str], others: Collection[str], above: Collection[str]) -> bool:
    """Return whether files can lie in one checkpoint, over others that can. above: the folders of the others."""
    return all(
        path.rpartition("/")[2] not in ("", ".", "..")
        and path not in above
        and not any(str(up) in files or str(up) in others for up in PurePosixPath(path).parents)
        for path in files
    )


def _check_vocabularies(manifest: "Manifest", tensors: Mapping[str, "TensorEntry"]) -> None:
    """Raise ValueError unless every row of a task's tensor is stored, as a common row or as its own."""
    seen: set[str] = set()
    own: set[tuple[str, str, Shape]] = set()
    for vocabulary in manifest.vocabularies:
        names = set(vocabulary.tensors)
        if not set(vocabulary.tasks) <= set(manifest.tasks):
            raise ValueError("a vocabulary names an unknown task")
        if seen & names or len(names) < len(vocabulary.tensors) or not names <= set(tensors):
            raise ValueError("vocabularies hold unknown tensors, or one tensor twice")
        seen |= names
        if not are_runs(vocabulary.base.common, vocabulary.base.rows):
            raise ValueError("the base's rows of a vocabulary are not sound")
        for name in names:
            tensor = tensors[name]
            for task in tensor.digests:
                shape, rows = tensor.shape_of(task), vocabulary.tasks.get(task)
                if rows is None:
                    continue
                if not shape or not are_runs(rows.common, rows.rows) or num_rows(rows.common) != shape[0]:
                    raise ValueError(f"the rows of `{name}` of task `{task}` are not sound")
                if rows.has_own and tensor.of is None:
                    own.add((f"{name}{ROWS_SUFFIX}", task, (rows.rows - shape[0], *shape[1:])))
            if tensor.of is not None and tensor.of not in names:
                raise ValueError(f"`{name}` has other rows than what it is tied to")
    for tensor in manifest.tensors:
        if tensor.of in seen and tensor.name not in seen:
            raise ValueError(f"`{tensor.name}` has other rows than what it is tied to")
    if {(t.name, task, t.shape_of(task)) for t in manifest.rows for task in t.digests} != own or any(
        tensor.of is not None for tensor in manifest.rows
    ):
        raise ValueError("the rows of vocabularies are not those that are stored")
