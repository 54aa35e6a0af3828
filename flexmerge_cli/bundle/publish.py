"""A folder that appears whole or not at all.

Written to `.{name}.partial/` beside the target, under the lock `.{name}.lock`, and renamed when it is complete. What a
crash leaves: before the rename, partial and lock, which the next run under the lock removes; with `--force` the old
folder may lie at `.{name}.partial` (exchanged, not yet removed) or at `.{name}.old` (between two renames, on file
systems without an atomic exchange), from where the next run puts it back.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from flexmerge_cli.engine.output import NO_SPACE, no_space
from flexmerge_cli.errors import MachineError, UsageError

RENAME_EXCHANGE = 2
AT_FDCWD = -100


def check_target(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Before any weight is read: the parent exists and is writable, the target is free, or may be replaced."""
    parent = target.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"no folder {parent}", hint=f"mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(f"{parent} is not writable", hint="choose another place with -o")
    if not (target.exists() or target.is_symlink()):
        return
    if not force:
        raise UsageError(f"{target} exists", hint="choose another place with -o, or replace it with --force")
    if target.is_symlink() or not target.is_dir() or not (replaceable(target) or not any(target.iterdir())):
        raise UsageError(f"{target} is not what flexmerge wrote: it is not replaced", hint="move it away first")


@contextlib.contextmanager
def publish(target: Path, *, force: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """The folder to write into; it becomes `target` when the block ends well, and is gone when it does not.

    needed_bytes: what will be written, for the error of a full disk.
    """
    target = target.absolute()
    partial, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "old"))
    with _locked(target.with_name(f".{target.name}.lock"), target):
        _put_back(old, target)
        for stale in (partial, old):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            sync_folder(partial)
            if not force and target.exists():
                raise UsageError(f"{target} appeared meanwhile", hint="choose another place with -o, or --force")
            if target.exists():
                _exchange(partial, target, old)
            else:
                partial.rename(target)
            sync_folder(target.parent, deep=False)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise no_space(Path(error.filename or partial), needed_bytes) from None
            raise MachineError(f"{error.filename or partial}: {error.strerror}", hint="check the disk") from None
        finally:
            _put_back(old, target)  # interrupted between two renames: the one bundle that there is
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path, *, deep: bool = True) -> None:
    """Force a folder's entries to disk; with `deep` those of every folder below it, too."""
    below = [path for path in folder.rglob("*") if path.is_dir()] if deep else []
    for place in [folder, *below]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise MachineError(f"{target} is being written by another process", hint="wait for it") from None
        # The holder before us may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _put_back(old: Path, target: Path) -> None:
    if old.exists() and not target.exists():
        old.rename(target)


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Swap atomically where the kernel can; else two renames, which the next run can finish."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        renameat2 = None
    names = (os.fsencode(new), os.fsencode(target))
    if renameat2 is not None and renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    target.rename(old)
    new.rename(target)
