"""A bill and its sources in, a bundle on disk out. What was written is opened and checked before it is published."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from flexmerge_cli.allocation.bill import Bill
from flexmerge_cli.allocation.manifest import Measured
from flexmerge_cli.bundle.publish import check_target, publish
from flexmerge_cli.bundle.read import MANIFEST_NAME, Bundle, is_bundle, sha256_of
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.engine.materialise import CHUNK_ELEMENTS, Sources, materialise
from flexmerge_cli.engine.output import Output, no_space
from flexmerge_cli.errors import DataError, IntegrityError


def check_output(target: Path, bill: Bill, *, force: bool) -> None:
    """What can be refused before a weight is read: a taken or unwritable place, a full disk."""
    check_target(target, force=force, replaceable=is_bundle)
    free = shutil.disk_usage(target.absolute().parent).free
    if free < bill.total_bytes:
        raise no_space(target, bill.total_bytes)


def write_bundle(
    bill: Bill,
    sources: Sources,
    side_files: dict[str, Path],
    target: Path,
    *,
    force: bool,
    device: torch.device,
    threads: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    accept: Callable[[Measured], None] = lambda _measured: None,
    on_bytes: Callable[[int], None] = lambda _count: None,
    on_stage: Callable[[str], None] = lambda _name: None,
) -> Measured:
    """side_files: path in the bundle -> source. accept may raise, after measuring and before publishing."""
    with publish(target, force=force, needed_bytes=bill.total_bytes) as folder:
        measured = materialise(
            bill,
            sources,
            Output(folder, bill.files, bill.total_bytes),
            device=device,
            threads=threads,
            chunk_elements=chunk_elements,
            on_bytes=on_bytes,
            on_stage=on_stage,
        )
        on_stage("files of the tasks")
        _write_small(bill, side_files, folder, measured)
        accept(measured)
        manifest = bill.manifest(measured)
        with (folder / MANIFEST_NAME).open("xb") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        _check_written(bill, folder)
    return measured


def _write_small(bill: Bill, side_files: dict[str, Path], folder: Path, measured: Measured) -> None:
    """Side and index files; equal ones are hard links where that works."""
    written: dict[bytes, Path] = {}
    indices = {f"tasks/{bill.plan.tasks[task].name}/": data for task, data in bill.indices.items()}
    for small in bill.small:
        source = side_files.get(small.path)
        data = source.read_bytes() if source is not None else indices[small.path.rpartition("/")[0] + "/"]
        if source is not None:
            task = bill.plan.tasks[small.task]
            if digest_bytes(data) != task.files[source.name].digest:
                raise DataError(f"{source} has changed since the plan", hint="make the plan again")
        path = folder / small.path
        path.parent.mkdir(parents=True, exist_ok=True)
        first = written.setdefault(data, path)
        if first is not path:
            try:
                os.link(first, path)
            except OSError:
                first = path
        if first is path:
            with path.open("xb") as file:
                file.write(data)
                os.fsync(file.fileno())
        measured.sha256[small.path] = sha256_of(path)


def _check_written(bill: Bill, folder: Path) -> None:
    """Every tensor of every task is on its route, with its dtype and shape, and the bytes are those of the bill."""
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if total != bill.total_bytes:
        raise IntegrityError(f"{total:,} bytes were written, {bill.total_bytes:,} were planned", hint="report this")
    bundle = Bundle.open(folder)
    for number, task in enumerate(bill.plan.tasks):
        expected = {
            bill.plan.own_name(number, tensor.name): list(bill.plan.whole_shape(tensor, number))
            for tensor in bill.plan.tensors
            if number in tensor.present
        }
        found = {name: list(shape) for name, (_, shape) in bundle.tensors_of(task.name).items()}
        if found != expected:
            missing = sorted(set(expected) ^ set(found))[:5]
            raise IntegrityError(f"the bundle's task `{task.name}` is not as planned: {missing}", hint="report this")
