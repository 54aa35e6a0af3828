"""One file written: the old or the new one is there, whole, and nothing beside."""

import errno
import os
import signal
import stat

import pytest

from flexmerge_cli import writing
from flexmerge_cli.cli.eval_outputs import check_outputs
from flexmerge_cli.errors import MachineError, UsageError
from flexmerge_cli.evaluation.tidy import COLUMNS
from flexmerge_cli.writing import check_file, write_file

from .program import fails, flexmerge, succeeds, tree


def test_a_file_is_written_with_the_modes_of_the_umask_and_flushed(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", "text ü")
        write_file(tmp_path / "a", b"bytes")
    finally:
        os.umask(before)
    assert tree(tmp_path) == {"a": b"bytes"}
    status = (tmp_path / "a").stat()
    assert stat.S_IMODE(status.st_mode) == 0o640 and {status.st_ino, tmp_path.stat().st_ino} <= synced


@pytest.mark.parametrize("fails_at", ["open", "write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_says_which(fails_at, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def bad(*_arguments):
        raise OSError(errno.EDQUOT if fails_at == "write" else errno.EIO, "it failed")

    monkeypatch.setattr(os, "rename" if fails_at == "replace" else fails_at, bad)
    monkeypatch.setattr(writing.Path, "replace", bad if fails_at == "replace" else writing.Path.replace)
    says = "no space at .*a: 3 bytes" if fails_at == "write" else "a cannot be written: it failed"
    with pytest.raises(MachineError, match=says):
        write_file(tmp_path / "a", "new")
    monkeypatch.undo()
    assert tree(tmp_path) == {"a": b"old"}


def test_where_the_folder_cannot_be_flushed_the_error_says_that_the_file_is_in_place(tmp_path, monkeypatch):
    fsync = os.fsync

    def bad(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", bad)
    with pytest.raises(MachineError, match=r"the new \S*a is complete and in its place"):
        write_file(tmp_path / "a", "new")
    assert tree(tmp_path) == {"a": b"new"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EPERM, errno.ENOTSUP])
def test_a_folder_that_cannot_be_flushed_at_all_is_no_error(number, tmp_path, monkeypatch):
    def cannot(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", cannot)
    write_file(tmp_path / "a", "new")
    assert tree(tmp_path) == {"a": b"new"}


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path, monkeypatch):
    replace = writing.Path.replace

    def killed(*_arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(writing.Path, "replace", killed)
        write_file(tmp_path / "a", "half")
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1

    def meanwhile(partial, target):
        """Another writer, from its begin to its end."""
        monkeypatch.setattr(writing.Path, "replace", replace)
        write_file(tmp_path / "a", "other")
        return replace(partial, target)

    monkeypatch.setattr(writing.Path, "replace", meanwhile)
    write_file(tmp_path / "a", "mine")
    assert tree(tmp_path) == {"a": b"mine"}


def test_a_place_is_checked_before_any_work(tmp_path):
    def is_old(path):
        return path.read_text() == "old"

    def check(name, *, force):
        check_file(tmp_path / name, force=force, replaceable=is_old, what="a table")

    check("new", force=False)
    for name, text in (("old", "old"), ("other", "other"), ("empty", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match="exists"):
            check(name, force=False)
    check("old", force=True)
    check("empty", force=True)
    (tmp_path / "folder").mkdir()
    for name in ("other", "folder"):
        with pytest.raises(UsageError, match="is not a table"):
            check(name, force=True)
    check("new/folder", force=False)
    with pytest.raises(UsageError, match="is a file"):
        check("other/file", force=False)
    with pytest.raises(MachineError, match="cannot be written: File name too long"):
        check("n" * 250, force=False)
    assert sorted(tree(tmp_path)) == ["empty", "old", "other"]


def outputs(family, plan, bundle, place):
    """A command for each kind of file that is written, with what the file has to hold to be replaced."""
    return {
        "plan": ("plan", *family.arguments, "-o", place),
        "kept plan": ("merge", family.root / "recipe.yaml", "--dry-run", "--plan", place, "-o", place.parent / "no"),
        "page": ("inspect", plan, "--html", place),
        "page of a bundle": ("inspect", bundle, "--html", place),
        "spec": ("eval", "--init", bundle, "-o", place),
    }


KINDS = ["plan", "kept plan", "page", "page of a bundle", "spec"]


@pytest.fixture(scope="module")
def bundle(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "b"
    succeeds("merge", plan, "-o", path)
    return path


@pytest.fixture(autouse=True)
def recipe(family):
    tasks = ", ".join(f"{name}: {path}" for name, path in family.sources.items())
    (family.root / "recipe.yaml").write_text(f"version: 1\nbase: {family.base}\ntasks: {{{tasks}}}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_force_replaces_only_what_an_output_of_its_kind_can_be(kind, family, plan, bundle, tmp_path):
    """Not a checkpoint, a plan, a manifest, a table of somebody's data, or text."""
    place = tmp_path / "out"
    arguments = outputs(family, plan, bundle, place)[kind]
    succeeds(*arguments)
    written = place.read_bytes()
    succeeds(*arguments, "--force")
    assert place.read_bytes() == written
    others = [
        family.base / "model.safetensors", plan, bundle / "manifest.json", family.root / "recipe.yaml",
        family.root / "tasks/task0/config.json", family.root / "tasks/task0/vocab.txt",
    ]  # fmt: skip
    for other in others:
        place.write_bytes(other.read_bytes())
        before = place.read_bytes()
        if not ("plan" in kind and other == plan):
            fails(2, *arguments, "--force", says="does not replace it")
        assert place.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("kind", "ours"), [
    ("csv", f"{','.join(COLUMNS)}\n1,2\n".encode()), ("png", b"\x89PNG\r\n\x1a\nrest"),
    ("html", b'<!doctype html>\n<html lang="en"'),
])  # fmt: skip
def test_force_replaces_tables_and_pictures_by_their_kind(kind, ours, family, plan, tmp_path):
    place = tmp_path / "out"
    others = [plan.read_bytes(), (family.base / "model.safetensors").read_bytes(), b"id,score\n1,2\n", ours[1:]]
    for data in (b"", *others, ours):
        place.write_bytes(data)
        with pytest.raises(UsageError, match="exists"):
            check_outputs({kind: place}, [], force=False)
        if data in others:
            with pytest.raises(UsageError, match="does not replace it"):
                check_outputs({kind: place}, [], force=True)
        else:
            check_outputs({kind: place}, [], force=True)
        assert place.read_bytes() == data and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fails_costs_no_file(kind, family, plan, bundle, tmp_path, monkeypatch):
    place = tmp_path / "out"
    arguments = outputs(family, plan, bundle, place)[kind]
    succeeds(*arguments)
    before = tree(tmp_path)
    write = os.write

    def full(descriptor, data):
        if descriptor > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    if kind == "kept plan":
        (family.root / "recipe.yaml").write_text((family.root / "recipe.yaml").read_text() + "merge_heads: true\n")
    result = flexmerge(*arguments, "--force")
    assert result.code == 1 and "no space at" in result.err
    assert tree(tmp_path) == before
