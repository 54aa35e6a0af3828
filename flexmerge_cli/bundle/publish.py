"""Publishes folders, which appear complete or not at all.

A folder is written to `.{name}.partial/` beside its place, under the lock `.{name}.lock`, forced to disk and renamed. A
crash before the rename leaves the partial folder and the lock. With `--force`, a crash may also leave the old folder at
`.{name}.partial` (exchanged, not yet removed) or, on file systems without an atomic exchange, at `.{name}.old` with
nothing in its place (between two renames). Readers may then read `.{name}.old`. The next command that writes there puts
it back and removes the rest (`mend`); a merge continues with a partial folder that has its journal (engine/journal.py).
Processes that write parts of a bundle (parts.py) share the lock and the partial folder, which stays until it is joined.

If the file system has no locks, every writer has a partial folder of its own, `.{name}.{host}-{pid}-{hex}.partial`,
which the next one removes if that process of its host has ended. Writers then do not know of each other: the result of
the last one to end with `--force` stays, and one without it gets an error that something appeared.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath

from flexmerge_cli.bundle.card import is_own_card
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, is_bundle, read_manifest
from flexmerge_cli.checkpoint.license import CARD_NAME
from flexmerge_cli.checkpoint.open_files import open_one_more
from flexmerge_cli.engine.journal import LOCKED, holds_journal
from flexmerge_cli.errors import FlexmergeError, MachineError, UsageError, hint_of, machine_failure
from flexmerge_cli.writing import (
    NOT_SUPPORTED,
    cannot_write,
    check_parent,
    in_place,
    sync_folder,
    sync_tree,
    undisturbed,
)

RENAME_EXCHANGE = 2
AT_FDCWD = -100
SHARED_SECONDS = 5.0  # How long a part waits for another part that checks whether the target is free.
NO_LOCKS = (*NOT_SUPPORTED, errno.ENOLCK)  # Lustre without -o flock, NFS without its lock daemon
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
SHOWN = 5
# Kept open while a folder is written, so that it can be removed when no more files can be opened: that takes one for
# each level of folders, and a bundle has fewer.
SPARE_FILES = 8

Ours = Callable[[Path], Collection[str] | None]
"""The files that flexmerge wrote into a folder, by their relative paths; None if the folder is not one of its own."""


def bundle_files(folder: Path) -> Collection[str] | None:
    """Return what `--force` may replace: the files in a bundle's manifest, the manifest, and a card that nobody
    changed.

    Raises UsageError if it is damaged.
    """
    if not is_bundle(folder):
        return None
    try:
        manifest = read_manifest(folder)
        card = {CARD_NAME} if is_own_card(folder / CARD_NAME) else set()
        return {MANIFEST_NAME, *manifest.files, *manifest.all_links, *card}
    except FlexmergeError as error:
        raise UsageError(
            f"{folder} is not replaced: its manifest does not say any more what flexmerge wrote there: {error.message}",
            hint="move it away first",
        ) from None


def check_target(target: Path, *, force: bool, ours: Ours, resumes: bool = False) -> None:
    """Check, before any weight is read, that the folder can be made there, and that the place is free or replaceable.

    Mends what a killed run left there. resumes: a partial folder with a journal stays, as it also does if the command
    is refused: it may be the work of others. Raises UsageError, MachineError.
    """
    check_parent(target)
    mend(target, resumes=resumes or (os.path.lexists(target) and not force))
    if os.path.lexists(target):
        if not force:
            raise UsageError(f"{target} exists", hint="choose another place with -o, or replace it with --force")
        check_replaceable(target, ours)
        _check_movable(target)


def _check_movable(target: Path) -> None:
    """Raise MachineError for a folder that cannot be renamed, such as one in overlayfs's lower layer. Moves nothing.

    A folder never replaces one that is not empty, and a folder that cannot be moved at all fails before that check.
    """
    place = _partial(target.absolute(), locked=False)
    try:
        (place / "not-empty").mkdir(parents=True)
        try:
            target.rename(place)  # it is to fail
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise MachineError(
                    f"{target} cannot be replaced: it lies in a lower layer of an overlay file system, as files of a "
                    "container's image do",
                    hint="remove it first, or choose another place with -o",
                ) from None
    finally:
        for folder in (place / "not-empty", place):
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_replaceable(target: Path, ours: Ours) -> None:
    """Check that flexmerge wrote everything in a folder. Raises UsageError that names anything else."""
    if target.is_symlink() or not target.is_dir():
        raise UsageError(f"{target} is not what flexmerge wrote: it is not replaced", hint="move it away first")
    if target.is_mount():
        raise UsageError(f"{target} is a mount point, which cannot be replaced", hint=f"-o {target / 'NAME'}")
    if not any(target.iterdir()):
        return
    known = ours(target)
    if known is None:
        raise UsageError(f"{target} is not what flexmerge wrote: it is not replaced", hint="move it away first")
    found = foreign(target, known)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UsageError(
            f"{target} is not replaced, because it also holds what flexmerge did not write: "
            f"{', '.join(found[:SHOWN])}{more}",
            hint="move that away first",
        )


def foreign(folder: Path, known: Collection[str]) -> list[str]:
    """List what lies in a folder besides the known files and their folders; a foreign folder counts as one entry."""
    folders = {str(parent) for name in known for parent in PurePosixPath(name).parents}
    found = []
    for place, inner, names in os.walk(folder):
        prefix = "" if place == str(folder) else f"{Path(place).relative_to(folder).as_posix()}/"
        strange = [name for name in inner if f"{prefix}{name}" not in folders or Path(place, name).is_symlink()]
        inner[:] = [name for name in inner if name not in strange]
        found += [f"{prefix}{name}" for name in (*strange, *names) if name in strange or f"{prefix}{name}" not in known]
    return sorted(found)


@contextlib.contextmanager
def publish(
    target: Path,
    *,
    force: bool = False,
    ours: Ours = lambda _: None,
    needed_bytes: int = 0,
    resumes: Callable[[Path], bool] | None = None,
    joins: bool = False,
) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `target` if the block succeeds, and is removed if it fails.

    resumes: returns whether a partial folder with a journal, left by a killed run, can be continued. ours: called once
    more before something is replaced. needed_bytes: what will be written, for the error of a full disk. joins: the
    partial folder is what several processes wrote with `shared`, and stays if the block fails. Raises UsageError if the
    place was taken meanwhile, MachineError; errors that are raised after the new folder took its place say so.
    """
    target = target.absolute()
    partial, is_done = target, False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target) as locked, contextlib.ExitStack() as spare:
            _mend(target, locked=locked, resumes=resumes is not None)
            partial, old = _partial(target, locked=locked or joins), _beside(target, "old")
            left = None
            for _ in range(SPARE_FILES):
                spare.callback(os.close, open_one_more(os.open, target.parent, os.O_RDONLY))
            try:
                if resumes is None or not os.path.lexists(partial) or not resumes(partial):
                    _remove(partial)
                    partial.mkdir()
                yield partial
                sync_tree(partial)
                with undisturbed():
                    _take_place(partial, target, old, force=force, ours=ours)
                    is_done = True
                    sync_folder(target.parent)
            finally:
                with undisturbed():
                    spare.close()
                    _put_back(old, target)
                    if is_done or not joins:
                        left = _remove(partial) or (_remove(old) if os.path.lexists(target) else None)
            if left:
                raise in_place(target, f"the one that it replaced could not be removed: {left}")
    except OSError as error:
        if is_done:
            raise in_place(target, f"could not be forced to disk: {error.strerror}") from None
        place = str(partial) if error.filename is None else os.fsdecode(error.filename)
        if not place.startswith((str(target), str(_beside(target, "")))):  # A source failed.
            failed = MachineError(f"{place}: {error.strerror}", hint=hint_of(error))
            raise machine_failure(error) or failed from None
        raise cannot_write(error, Path(place), needed_bytes) from None


@contextlib.contextmanager
def shared(target: Path) -> Iterator[Path]:
    """Yield the partial folder of a target, into which several processes write at the same time. The folder stays.

    Raises MachineError while a run that writes the whole holds it.
    """
    target = target.absolute()
    folder = _beside(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, is_shared=True):
            folder.mkdir(exist_ok=True)
            yield folder
    except OSError as error:
        place = str(target) if error.filename is None else os.fsdecode(error.filename)
        raise cannot_write(error, Path(place)) from None


def partial_folder(target: Path) -> Path:
    """Return where the parts of a bundle lie until they are joined."""
    return _beside(target.absolute(), "partial")


def mend(target: Path, *, resumes: bool = False) -> None:
    """Put back the folder that a killed run had moved away, and remove what it left beside. Never raises.

    resumes: leave a partial folder that has a journal. Does nothing while another run is writing there, or where this
    one may not write.
    """
    target = target.absolute()
    if _left(target):
        with contextlib.suppress(OSError, MachineError), _locked(target) as locked:
            _mend(target, locked=locked, resumes=resumes)


def _mend(target: Path, *, locked: bool, resumes: bool) -> None:
    """Mend one place. locked: whether no other run is writing there."""
    old = _beside(target, "old")
    _put_back(old, target)
    for path in _left(target):
        if resumes and locked and path == _beside(target, "partial") and holds_journal(path):
            continue
        is_dead = _is_dead(path, target)
        if (locked and path == _beside(target, "partial")) or is_dead or (path == old and os.path.lexists(target)):
            _remove(path)


def _left(target: Path) -> list[Path]:
    """List what a run has beside its place while it runs, and leaves there if it is killed."""
    fixed = [_beside(target, suffix) for suffix in ("partial", "old", "lock")]
    with contextlib.suppress(OSError):
        prefix = f".{target.name}.{_host()}-"
        fixed += [target.with_name(name) for name in os.listdir(target.parent) if name.startswith(prefix)]  # noqa: PTH208
    return [path for path in fixed if os.path.lexists(path)]


def partial_bytes(target: Path) -> int:
    """Return the bytes that a partial folder takes on the disk, if a merge can resume it."""
    folder = _beside(target.absolute(), "partial")
    if not holds_journal(folder):
        return 0
    found = 0
    with contextlib.suppress(OSError):  # Another run is writing there, or removes it, which is reported later.
        for place, _, names in os.walk(folder):
            found += sum(os.lstat(Path(place, name)).st_blocks * 512 for name in names)
    return found


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _partial(target: Path, *, locked: bool) -> Path:
    return _beside(target, "partial" if locked else f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial")


def _host() -> str:
    return re.sub(r"[^\w-]", "_", os.uname().nodename)


def _is_dead(path: Path, target: Path) -> bool:
    """Return whether this is the partial folder of a process of this host that has ended."""
    own = re.fullmatch(
        rf"\.{re.escape(target.name)}\.{re.escape(_host())}-(\d{{1,9}})-[0-9a-f]{{8}}\.partial", path.name
    )
    if own is None:
        return False
    try:
        os.kill(int(own[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's
    return False


@contextlib.contextmanager
def _locked(target: Path, *, is_shared: bool = False) -> Iterator[bool]:
    """Hold the lock of a place, or yield False if the file system has no locks. Raises MachineError if it is held.

    is_shared: other runs that share the lock may hold it, too, but no others.
    """
    path = _beside(target, "lock")
    descriptor = _lock(path, target, is_shared=is_shared)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            if not is_shared:  # Others may hold a shared lock.
                with contextlib.suppress(OSError):
                    path.unlink()
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _lock(path: Path, target: Path, *, is_shared: bool) -> int | None:
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    patience = time.monotonic() + (SHARED_SECONDS if is_shared else 0)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            # The holder before us may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in LOCKED and time.monotonic() < patience:
                time.sleep(SHARED_SECONDS / 100)
                continue
            if error.errno in LOCKED:
                raise MachineError(f"{target} is being written by another process", hint="wait for it") from None
            if error.errno not in NO_LOCKS:
                raise
            with contextlib.suppress(OSError):
                path.unlink()
            return None


def _take_place(new: Path, target: Path, old: Path, *, force: bool, ours: Ours) -> None:
    appeared = UsageError(f"{target} appeared meanwhile", hint="choose another place with -o, or --force")
    if os.path.lexists(target):
        if not force:
            raise appeared
        check_replaceable(target, ours)
        _exchange(new, target, old)
        return
    try:
        new.rename(target)
    except OSError as error:
        raise appeared if error.errno in TAKEN else error from None


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Swap atomically where the kernel and the file system can; else two renames, which the next run can finish."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        renameat2 = None
    if renameat2 is not None:
        if renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in NOT_SUPPORTED:
            raise OSError(number, os.strerror(number), str(target))
    target.rename(old)
    new.rename(target)


def _put_back(old: Path, target: Path) -> None:
    """Restore the one folder that is left after an end between two renames. If it fails, the next run tries again."""
    if os.path.lexists(old) and not os.path.lexists(target):
        with contextlib.suppress(OSError):
            old.rename(target)


def _remove(folder: Path) -> str | None:
    """Remove a folder as far as possible. Returns what stays of it and why, if something does."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if os.path.lexists(folder):
            shutil.rmtree(folder)
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror or error}"
    return None
