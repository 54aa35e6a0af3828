"""Writes a bundle from a layout and its sources. What was written is opened and checked before it is published."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.bundle.links import linker
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, MAX_MANIFEST_BYTES
from flexmerge_cli.bundle.parts import damaged, merge_key, require_parts
from flexmerge_cli.bundle.publish import bundle_files, check_target, partial_bytes, publish
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.unchanged import Unchanged
from flexmerge_cli.checkpoint.digest import digest_file, file_digests
from flexmerge_cli.engine import journal
from flexmerge_cli.engine.journal import Journal, holds_journal, journals_of, read_journals
from flexmerge_cli.engine.output import Output
from flexmerge_cli.engine.product import Product
from flexmerge_cli.errors import DataError, IntegrityError, UsageError
from flexmerge_cli.formats.folders import WEIGHTS
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.json_file import require_memory
from flexmerge_cli.writing import NO_LINK, folder_above, no_space

COPY_BYTES = 4 << 20


def check_output(bundles: Mapping[Path, BundleLayout], *, force: bool) -> None:
    """Refuse what can be refused before a weight is read: a taken or unwritable place, a full disk."""
    for target, layout in bundles.items():
        check_target(target, force=force, ours=bundle_files, resumes=True)
        _check_manifest(layout)
    needed = sum(layout.total_bytes for layout in bundles.values())
    free = shutil.disk_usage(folder_above(target)).free + sum(map(partial_bytes, bundles))
    if free < needed:
        raise no_space(target, needed)


def _check_manifest(layout: BundleLayout) -> None:
    if layout.num_manifest_bytes > MAX_MANIFEST_BYTES:
        raise UsageError(
            f"the manifest would have {layout.num_manifest_bytes:,} bytes; readers take {MAX_MANIFEST_BYTES:,} at most",
            hint="make several bundles of fewer tasks",
        )
    manifest = layout.blank_manifest
    try:
        require_memory(manifest, manifest.decode())
    except ValueError as error:
        raise UsageError(f"no reader would take the manifest: {error}", hint="make several bundles") from None


@contextmanager
def writing(
    layout: BundleLayout,
    side_files: Mapping[tuple[str, str], Path],
    target: Path,
    *,
    force: bool,
    device: torch.device,
    accept: Callable[[Measured], None] = lambda _measured: None,
    examine: Callable[[Path, Manifest], None] = lambda _folder, _manifest: None,
    on_stage: Callable[[str], None] = lambda _name: None,
    on_message: Callable[[str], None] = lambda _message: None,
    old: Unchanged | None = None,
    joins: bool = False,
) -> Iterator[Product]:
    """Give what the engine makes inside the block of a bundle, which is completed and published at its end.

    side_files: maps (task, or "" for the base, name) to its source. accept may raise, after measuring and before
    publishing; so may examine, which gets the folder and the manifest of the complete bundle before it is published.
    on_message: gets a message if a killed run of the same merge is continued. old: what another bundle has of the
    layout, which is taken over. Raises IntegrityError if that is damaged. Such a run keeps no journal, since what it
    takes over costs little. joins: everything is in the partial folder already, as parts.py writes it.
    """
    key = merge_key(layout, device)
    if joins:
        require_parts(layout, target, device)

    def resumes(folder: Path) -> bool:
        found = read_journals(folder, key)
        if found.useless and not joins:
            on_message(f"what a killed merge left at {folder} is discarded: {found.useless}")
            return False
        if not joins:
            finished = sum(name in layout.storages for name in found.found)
            on_message(f"going on with a merge that was killed; it has finished {finished:,} tensors")
        _leave_weights(layout, folder)
        return True

    publishing = publish(
        target,
        force=force,
        ours=bundle_files,
        needed_bytes=layout.total_bytes,
        joins=joins,
        resumes=resumes if old is None else None,  # Its files may be those of the old bundle.
    )
    with publishing as folder, ExitStack() as stack:

        def on_rest(names: Sequence[str]) -> None:
            if joins and names:
                raise damaged(layout, folder, names)

        link = linker(folder) if layout.links else None
        is_long = layout.total_bytes >= journal.JOURNALED_BYTES and old is None
        if old is not None:
            on_stage("files that stay")
            _link_old(old, folder)
        output = Output(
            folder,
            [file for file in layout.files if old is None or file.path not in old.files],
            layout.total_bytes,
            resumes=holds_journal(folder),
            known={part: partial(old.pieces, place) for part, place in old.copied.items()} if old is not None else {},
        )
        product = Product(
            layout=layout if old is None else old.left,
            output=output,
            journal=stack.enter_context(Journal(folder, key)) if is_long or joins else None,
            on_rest=on_rest,
        )
        yield product
        measured = product.measured
        if old is not None:
            old.complete(measured)
        on_stage("files of the tasks")
        _write_small(layout, side_files, folder, measured, old.bundle.path if old is not None else None)
        for path, weights in layout.links.items():
            assert link is not None
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            link(folder / weights, folder / path)
        accept(measured)
        (folder / MANIFEST_NAME).write_bytes(layout.manifest(measured))
        examine(folder, _check_written(layout, folder))
        for written in journals_of(folder):
            written.unlink()


def _leave_weights(layout: BundleLayout, folder: Path) -> None:
    """Empty a partial folder, except for the journal and the weight files, which may hold what is finished."""
    weights = {folder / file.path for file in layout.files}
    for path in folder.iterdir():
        if path.name == WEIGHTS.rstrip("/") and path.is_dir() and not path.is_symlink():
            for file in set(path.iterdir()) - weights:
                file.unlink()
        elif path not in journals_of(folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _link_old(old: Unchanged, folder: Path) -> None:
    """Take whole files of an old bundle: as hard links, or as copies where these cannot be made."""
    assert old.bundle.files is not None
    old.bundle.files.check(set(old.files.values()))
    for path, name in old.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(old.bundle.path / name, folder / path)


def _link_or_copy(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(source, path)


def _write_small(
    layout: BundleLayout,
    side_files: Mapping[tuple[str, str], Path],
    folder: Path,
    measured: Measured,
    old: Path | None = None,
) -> None:
    """Write side files, and what belongs beside them; equal ones, also of an old bundle, are hard links if possible."""
    written: dict[str, Path] = {}
    records = {reader.name: reader.files for reader in layout.plan.readers} | {"": layout.plan.base.files}
    for small in layout.small:
        path = folder / small.path
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = None if small.origin is None else records[small.origin[0]][small.origin[1]].digest
        kept = None if old is None or digest is None else old / small.path
        if kept is not None and kept.is_file() and not kept.is_symlink() and digest_file(kept) == digest:
            _link_or_copy(kept, path)
        else:
            with path.open("xb") as file:
                if small.origin is None:
                    file.write(small.content)
                else:
                    with side_files[small.origin].open("rb") as read:  # an adapter's weights may be large
                        shutil.copyfileobj(read, file, COPY_BYTES)
        if digest is not None and digest_file(path) != digest:
            assert small.origin is not None
            raise DataError(f"{side_files[small.origin]} has changed since the plan", hint="make the plan again")
        measured.files[small.path] = file_digests(path)
        first = written.setdefault(measured.files[small.path].sha256, path)
        if not first.samefile(path):
            link = path.with_name(f".{path.name}.link")
            try:
                os.link(first, link)
                link.replace(path)
            except OSError:  # no hard links here: the copy stays
                link.unlink(missing_ok=True)


def _check_written(layout: BundleLayout, folder: Path) -> Manifest:
    """Check that every task's tensors are on its route with dtype and shape, and that the bytes are the layout's.

    Returns the manifest, as readers read it.
    """
    small, weights = ([folder / file.path for file in files] for files in (layout.small, layout.files))
    total = sum(path.stat().st_size for path in (*small, *weights, folder / MANIFEST_NAME))
    links = [folder / path for path in layout.links]
    journals = journals_of(folder)
    there = [path for path in folder.rglob("*") if not path.is_dir() and path not in journals]
    if sorted(there) != sorted([*small, *weights, *links, folder / MANIFEST_NAME]) or any(
        not link.samefile(folder / layout.links[link.relative_to(folder).as_posix()]) for link in links
    ):
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
    return bundle.manifest
