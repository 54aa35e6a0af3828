"""A layout and its sources in, a bundle on disk out. What was written is opened and checked before it is published."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.bundle.links import linker
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, MAX_MANIFEST_BYTES, sha256_of
from flexmerge_cli.bundle.publish import bundle_files, check_target, publish
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.digest import digest_file
from flexmerge_cli.engine.materialise import CHUNK_ELEMENTS, Sources, materialise
from flexmerge_cli.engine.output import Output
from flexmerge_cli.errors import DataError, IntegrityError, UsageError
from flexmerge_cli.writing import folder_above, no_space

COPY_BYTES = 4 << 20


def check_output(target: Path, layout: BundleLayout, *, force: bool) -> None:
    """What can be refused before a weight is read: a taken or unwritable place, a full disk."""
    check_target(target, force=force, ours=bundle_files)
    if layout.num_manifest_bytes > MAX_MANIFEST_BYTES:
        raise UsageError(
            f"the manifest would have {layout.num_manifest_bytes:,} bytes; readers take {MAX_MANIFEST_BYTES:,} at most",
            hint="make several bundles of fewer tasks",
        )
    free = shutil.disk_usage(folder_above(target)).free
    if free < layout.total_bytes:
        raise no_space(target, layout.total_bytes)


def write_bundle(
    layout: BundleLayout,
    sources: Sources,
    side_files: Mapping[tuple[str, str], Path],
    target: Path,
    *,
    force: bool,
    device: torch.device,
    threads: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    accept: Callable[[Measured], None] = lambda _measured: None,
    examine: Callable[[Path], None] = lambda _folder: None,
    on_bytes: Callable[[int], None] = lambda _count: None,
    on_stage: Callable[[str], None] = lambda _name: None,
) -> Measured:
    """side_files: (task, or "" for the base, name) -> source. accept may raise, after measuring and before publishing;
    so may examine, which gets the folder of the whole bundle where it is not published yet.
    """
    with publish(target, force=force, ours=bundle_files, needed_bytes=layout.total_bytes) as folder:
        link = linker(folder) if layout.links else None
        measured = materialise(
            layout,
            sources,
            Output(folder, layout.files, layout.total_bytes),
            device=device,
            threads=threads,
            chunk_elements=chunk_elements,
            on_bytes=on_bytes,
            on_stage=on_stage,
        )
        on_stage("files of the tasks")
        _write_small(layout, side_files, folder, measured)
        for path, weights in layout.links.items():
            assert link is not None
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            link(folder / weights, folder / path)
        accept(measured)
        (folder / MANIFEST_NAME).write_bytes(layout.manifest(measured))
        _check_written(layout, folder)
        examine(folder)
    return measured


def _write_small(
    layout: BundleLayout, side_files: Mapping[tuple[str, str], Path], folder: Path, measured: Measured
) -> None:
    """Side files, and what is written beside them; equal ones are hard links where that works."""
    written: dict[str, Path] = {}
    records = {reader.name: reader.files for reader in layout.plan.readers} | {"": layout.plan.base.files}
    for small in layout.small:
        path = folder / small.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            if small.origin is None:
                file.write(small.content)
            else:
                with side_files[small.origin].open("rb") as read:  # an adapter's weights may be large
                    shutil.copyfileobj(read, file, COPY_BYTES)
        if small.origin is not None and digest_file(path) != records[small.origin[0]][small.origin[1]].digest:
            raise DataError(f"{side_files[small.origin]} has changed since the plan", hint="make the plan again")
        measured.sha256[small.path] = sha256_of(path)
        first = written.setdefault(measured.sha256[small.path], path)
        if first is not path:
            link = path.with_name(f".{path.name}.link")
            try:
                os.link(first, link)
                link.replace(path)
            except OSError:  # no hard links here: the copy stays
                link.unlink(missing_ok=True)


def _check_written(layout: BundleLayout, folder: Path) -> None:
    """Every tensor of every task is on its route, with its dtype and shape, and the bytes are those of the layout."""
    small, weights = ([folder / file.path for file in files] for files in (layout.small, layout.files))
    total = sum(path.stat().st_size for path in (*small, *weights, folder / MANIFEST_NAME))
    links = [folder / path for path in layout.links]
    if sorted(path for path in folder.rglob("*") if not path.is_dir()) != sorted(
        [*small, *weights, *links, folder / MANIFEST_NAME]
    ) or any(not link.samefile(folder / layout.links[link.relative_to(folder).as_posix()]) for link in links):
        raise IntegrityError("the files that were written are not those that were planned", hint="report this")
    if total != layout.total_bytes:
        raise IntegrityError(f"{total:,} bytes were written, {layout.total_bytes:,} were planned", hint="report this")
    bundle = Bundle.open(folder)
    for number, task in enumerate(layout.plan.readers):
        expected = layout.plan.shapes_of(number)
        found = {name: shape for name, (_, shape) in bundle.tensors_of(task.name).items()}
        if found != expected:
            missing = sorted(set(expected) ^ set(found))[:5]
            raise IntegrityError(f"the bundle's task `{task.name}` is not as planned: {missing}", hint="report this")
