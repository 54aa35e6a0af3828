"""One folder in the place of another: what may be, what a machine cannot do, what an end in between leaves."""

import errno
import fcntl
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.bundle.publish import bundle_files, publish
from flexmerge_cli.errors import UsageError

from ..program import Child, fails, flexmerge, succeeds, tree


def test_force_replaces_an_empty_folder_and_a_bundle(plan, tmp_path):
    (tmp_path / "b").mkdir()
    succeeds("merge", plan, "-o", tmp_path / "b", "--force")
    before = open_bundle(tmp_path / "b").manifest.id
    succeeds("merge", plan, "--method", "average", "-o", tmp_path / "b", "--force")
    assert open_bundle(tmp_path / "b").manifest.id != before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_bundle_that_is_open_stays_readable_while_it_is_replaced(plan, tmp_path):
    succeeds("merge", plan, "-o", tmp_path / "b")
    view = open_bundle(tmp_path / "b").view("task1")
    tensor = view["pooler.dense.weight"]
    expected = tensor.clone()
    succeeds("merge", plan, "--method", "average", "-o", tmp_path / "b", "--force")
    assert tensor.equal(expected)


def test_what_a_crash_left_is_removed_and_an_old_folder_is_put_back(tmp_path):
    """Between two renames, on a file system that cannot exchange, the old folder has only this name."""
    (tmp_path / ".b.partial/deep").mkdir(parents=True)
    (tmp_path / ".b.old").mkdir()
    (tmp_path / ".b.old/kept").write_text("kept")
    with pytest.raises(ZeroDivisionError), publish(tmp_path / "b", force=True):
        raise ZeroDivisionError
    assert tree(tmp_path) == {"b/kept": b"kept"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_refused_command_removes_what_a_killed_one_left_after_its_end(plan, tmp_path):
    """A kill between the rename and the removal of the lock left a lock that stayed: the command is refused from then
    on, and `merge --sizes` skips what is there."""
    several = ("merge", plan, "--method", "average", "--sizes", "1x,2x", "-o", tmp_path / "sizes")
    succeeds(*several)
    succeeds("merge", plan, "-o", tmp_path / "b")
    left = tmp_path / ".b.lock", tmp_path / "sizes/.1x.lock"
    for lock in left:
        lock.touch()
    fails(2, "merge", plan, "-o", tmp_path / "b", says="exists")
    succeeds(*several)
    assert not any(lock.exists() for lock in left)


def no_exchange(monkeypatch):
    """It is so on macOS; a kernel or a file system without it answers in another way, and comes to the same."""
    monkeypatch.setattr("ctypes.CDLL", lambda *_arguments, **_options: object())


def test_without_an_exchange_two_renames_do(tmp_path, monkeypatch):
    no_exchange(monkeypatch)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/old").write_text("old")
    with publish(tmp_path / "b", force=True, ours=lambda _: {"old"}) as folder:
        (folder / "new").write_text("new")
    assert tree(tmp_path) == {"b/new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_interrupted_between_two_renames_the_old_folder_is_put_back(tmp_path, monkeypatch):
    """It was removed with what else was left, so that neither the old bundle nor the new one was there."""
    no_exchange(monkeypatch)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/old").write_text("old")
    rename = Path.rename

    def interrupted(path, target):
        if path.name == ".b.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "b", force=True, ours=lambda _: {"old"}) as folder:
        (folder / "new").write_text("new")
        monkeypatch.setattr(Path, "rename", interrupted)
    assert tree(tmp_path) == {"b/old": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_killed_between_two_renames_the_next_command_puts_the_old_bundle_back(force, plan, tmp_path, monkeypatch):
    """Without --force it says, before it works, that a bundle is there."""
    succeeds("merge", plan, "-o", tmp_path / "b")
    before = tree(tmp_path / "b")

    def killed_between() -> None:
        no_exchange(monkeypatch)
        rename = Path.rename

        def second(path, target):
            if path.name == ".b.partial":
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", second)

    arguments = ("merge", plan, "--method", "average", "-o", tmp_path / "b")
    assert Child(*arguments, "--force", before=killed_between).wait()[0] == -signal.SIGKILL
    assert tree(tmp_path / ".b.old") == before and not (tmp_path / "b").exists()
    assert flexmerge(*arguments, *force).code == (0 if force else 2)
    assert (tree(tmp_path / "b") == before) is not bool(force)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("refused", ["flock", "fsync", "link", "posix_fallocate"])
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_what_a_file_system_cannot_do_is_done_without(refused, number, plan, tmp_path, monkeypatch):
    """Lustre without locks, CIFS whose folders cannot be forced to disk, FAT without links, musl and NFS."""

    def cannot(*arguments):
        if refused == "fsync" and not stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
            return
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl if refused == "flock" else os, refused, cannot)
    for options in ((), ("--force",)):
        succeeds("merge", plan, "-o", tmp_path / "b", *options)
        succeeds("export", tmp_path / "b", "--all", "-o", tmp_path / "out", *options)
    assert verify(tmp_path / "b").bad == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "out"]


def test_without_locks_what_dead_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path, monkeypatch):
    def cannot(*_arguments):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", cannot)
    child = os.fork()
    if child == 0:
        with publish(tmp_path / "b") as folder:
            (folder / "half").write_text("half")
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with publish(tmp_path / "b") as first:
        (first / "mine").write_text("first")
        with publish(tmp_path / "b") as second:
            (second / "mine").write_text("second")
            assert sorted(tmp_path.iterdir()) == sorted([first, second])
        assert tree(tmp_path / "b") == {"mine": b"second"} and tree(first) == {"mine": b"first"}
        (tmp_path / "b").rename(tmp_path / "c")
    assert tree(tmp_path) == {"b/mine": b"first", "c/mine": b"second"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("lies", [".git/HEAD", "notes.txt", "mine/model.safetensors", "weights/mine", "tasks/task9"])
def test_force_replaces_what_the_manifest_lists_and_nothing_else(lies, plan, tmp_path):
    succeeds("merge", plan, "-o", tmp_path / "b")
    (tmp_path / "b" / lies).parent.mkdir(exist_ok=True)
    (tmp_path / "b" / lies).write_text("mine")
    before = tree(tmp_path)
    named = lies.partition("/")[0] if lies.startswith((".git", "mine")) else lies
    fails(2, "merge", plan, "--method", "average", "-o", tmp_path / "b", "--force", says=f"did not write: {named}\n")
    assert tree(tmp_path) == before
    (tmp_path / "b" / lies).unlink()
    if lies.startswith((".git", "mine")):
        (tmp_path / "b" / lies).parent.rmdir()
    succeeds("merge", plan, "--method", "average", "-o", tmp_path / "b", "--force")


def test_what_appears_in_the_old_bundle_meanwhile_is_not_removed(plan, tmp_path):
    succeeds("merge", plan, "-o", tmp_path / "b")
    before = tree(tmp_path / "b")
    with (
        pytest.raises(UsageError, match=r"did not write: notes\.md"),
        publish(tmp_path / "b", force=True, ours=bundle_files) as folder,
    ):
        (folder / "new").write_text("new")
        (tmp_path / "b/notes.md").write_text("notes")
    assert tree(tmp_path) == {f"b/{name}": data for name, data in before.items()} | {"b/notes.md": b"notes"}


def test_a_bundle_whose_manifest_is_damaged_is_not_replaced(plan, tmp_path):
    """Nothing says any more what flexmerge wrote."""
    succeeds("merge", plan, "-o", tmp_path / "b")
    text = (tmp_path / "b/manifest.json").read_text()
    (tmp_path / "b/manifest.json").write_text(text.replace('"plan":"', '"plan":"f', 1))
    fails(2, "merge", plan, "-o", tmp_path / "b", "--force", says="its manifest does not say")


@pytest.mark.parametrize("fails_at", ["fsync", "rmtree"])
def test_an_error_after_the_exchange_says_that_the_new_bundle_is_in_place(fails_at, plan, tmp_path, monkeypatch):
    succeeds("merge", plan, "-o", tmp_path / "b")
    before = open_bundle(tmp_path / "b").manifest.id
    fsync, rmtree = os.fsync, shutil.rmtree

    def bad_fsync(descriptor):
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    def bad_rmtree(path, **options):
        if not options:
            raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(os, "fsync", bad_fsync if fails_at == "fsync" else fsync)
    monkeypatch.setattr(shutil, "rmtree", bad_rmtree if fails_at == "rmtree" else rmtree)
    fails(
        1, "merge", plan, "--method", "average", "-o", tmp_path / "b", "--force",
        says=(f"the new {tmp_path / 'b'} is complete and in its place", "Input/output error"),
    )  # fmt: skip
    assert verify(tmp_path / "b").bad == {} and open_bundle(tmp_path / "b").manifest.id != before
    monkeypatch.undo()
    succeeds("merge", plan, "-o", tmp_path / "b", "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_error_of_the_clean_up_does_not_hide_the_first(tmp_path, monkeypatch):
    def bad(*_arguments, **_options):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ZeroDivisionError), publish(tmp_path / "b"):
        monkeypatch.setattr(Path, "unlink", bad)
        monkeypatch.setattr(os, "rmdir", bad)
        raise ZeroDivisionError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_the_clean_up_waits_for_its_end(number, tmp_path, monkeypatch):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    before = signal.signal(number, interrupted)
    rmtree = shutil.rmtree

    def signalled(*arguments, **options):
        signal.raise_signal(number)
        rmtree(*arguments, **options)

    try:
        with pytest.raises(KeyboardInterrupt), publish(tmp_path / "b"):
            monkeypatch.setattr(shutil, "rmtree", signalled)
            raise ZeroDivisionError
        assert signal.getsignal(number) is interrupted
    finally:
        signal.signal(number, before)
    assert list(tmp_path.iterdir()) == []
