"""A folder that appears whole or not at all: crashes, full disks, interruptions, and runs that meet."""

import contextlib
import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from flexmerge_cli import verify
from flexmerge_cli.bundle.publish import bundle_files, check_target, publish
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.engine import output
from flexmerge_cli.errors import MachineError, UsageError

from ..families import Models, encoder, normal, plain, tuned, write_family
from ..program import Child, fails, flexmerge, succeeds, tree


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Large enough that a merge takes a while after it began to write."""
    base = encoder() | {f"encoder.layer.{n}.mlp.weight": normal(n, 500, 400) for n in range(5)}
    models = Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(4)})
    folders = write_family(tmp_path_factory.mktemp("large"), models)
    succeeds("plan", "-q", *folders.arguments, "-o", folders.root / "plan.json")
    return folders


def merge_arguments(folders, target, *options):
    return ("merge", folders.root / "plan.json", "--method", "emr", "-o", target, "--threads", 1, *options)


def test_killed_at_any_moment_a_merge_leaves_no_bundle_or_a_whole_one(large, tmp_path):
    """The next run succeeds with the same bytes, and leaves nothing beside the bundle."""
    started = time.perf_counter()
    succeeds(*merge_arguments(large, tmp_path / "expected"))
    took = time.perf_counter() - started
    expected = tree(tmp_path / "expected")
    draw = random.Random(1)
    seen = set()
    for number in range(10):
        place = tmp_path / str(number)
        place.mkdir(exist_ok=True)
        child = Child(*merge_arguments(large, place / "b"))
        child.wait_for(place / ".b.lock")
        time.sleep(draw.uniform(0, took))
        child.send(signal.SIGKILL)
        seen.add(child.wait()[0])
        if (place / "b").exists():
            assert tree(place / "b") == expected
            assert flexmerge(*merge_arguments(large, place / "b")).code == 2
        else:
            succeeds(*merge_arguments(large, place / "b"))
        assert tree(place / "b") == expected
        if (
            place / ".b.lock"
        ).exists():  # it was killed after the bundle had appeared: the next to write here cleans up
            succeeds(*merge_arguments(large, place / "b", "--force"))
        assert [path.name for path in place.iterdir()] == ["b"]
    assert -signal.SIGKILL in seen


def test_killed_while_it_replaces_a_bundle_the_old_or_the_new_one_is_there(large, tmp_path):
    started = time.perf_counter()
    succeeds(*merge_arguments(large, tmp_path / "b"))
    took = time.perf_counter() - started
    new = tree(tmp_path / "b")
    succeeds("merge", large.root / "plan.json", "-o", tmp_path / "b", "--force")
    old = tree(tmp_path / "b")
    draw = random.Random(2)
    for _ in range(5):
        child = Child(*merge_arguments(large, tmp_path / "b", "--force"))
        child.wait_for(tmp_path / ".b.lock")
        time.sleep(draw.uniform(0, took))
        child.send(signal.SIGKILL)
        child.wait()
        assert tree(tmp_path / "b") in (old, new)
        succeeds("merge", large.root / "plan.json", "-o", tmp_path / "b", "--force")
        assert tree(tmp_path / "b") == old
        assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_interrupted_merge_exits_with_130_and_leaves_nothing(large, tmp_path):
    child = Child(*merge_arguments(large, tmp_path / "b"))
    child.wait_for(tmp_path / ".b.partial")
    child.send(signal.SIGINT)
    code, printed = child.wait()
    assert code == 130 and "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_is_interrupted_exits_with_130_and_leaves_nothing(large, tmp_path):
    def interrupted() -> None:
        """Interrupt as a person does, while weights are read."""
        read = Reader.read

        def first(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            return read(*arguments)

        Reader.read = first

    child = Child("plan", *large.arguments, "--threads", 1, "-o", tmp_path / "plan.json", before=interrupted)
    code, printed = child.wait()
    assert code == 130 and "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


# Full disks.


@contextlib.contextmanager
def small_disk(place, size):
    """A file system of `size` bytes at `place`; skips where it cannot be made."""
    place.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(large, tmp_path):
    needed = succeeds(*merge_arguments(large, tmp_path / "b", "--dry-run", "--json")).json["total_bytes"]
    with small_disk(tmp_path / "disk", "2m") as disk:
        fails(
            1, *merge_arguments(large, disk / "b"), says=(f"no space at {disk / 'b'}", f"{needed:,} bytes are needed")
        )
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("free_pages", [0, 1, 3, 5, 6])
def test_a_disk_that_fills_up_meanwhile_is_told_and_nothing_is_left(free_pages, tmp_path):
    """The bytes would fit; their blocks do not, be it in the weights, a side file or the manifest."""
    folders = write_family(tmp_path / "family", plain(num_tasks=3))
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    needed = succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "b", "--dry-run", "--json").json["total_bytes"]
    pages = -(-needed // 4096) + free_pages
    with small_disk(tmp_path / "disk", f"{4 * pages}k") as disk:
        result = fails(
            1,
            "merge",
            tmp_path / "plan.json",
            "-o",
            disk / "b",
            says=(f"no space at {disk}", f"{needed:,} bytes are needed"),
        )
        assert "b" in result.err and list(disk.iterdir()) == []


@pytest.mark.parametrize("pages", [1, 2, 5, 9])
def test_every_output_on_a_disk_that_fills_up_is_told_and_nothing_is_left(pages, merged, tmp_path):
    family = write_family(tmp_path / "family", plain(num_tasks=3))
    succeeds("plan", "-q", *family.arguments, "-o", tmp_path / "plan.json")
    for command in (
        ("plan", *family.arguments, "-o"),
        ("export", merged, "--task", "task0", "-o"),
        ("export", merged, "--all", "-o"),
        ("inspect", merged, "--html"),
    ):
        with small_disk(tmp_path / "disk", f"{4 * pages}k") as disk:
            if flexmerge(*command, disk / "out").code:
                fails(1, *command, disk / "out", says="no space at")
                assert list(disk.iterdir()) == []


def test_a_disk_that_is_just_large_enough_is_enough(tmp_path):
    folders = write_family(tmp_path / "family", plain(num_tasks=3))
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    with small_disk(tmp_path / "disk", "160k") as disk:
        succeeds("merge", tmp_path / "plan.json", "-o", disk / "b")
        assert verify(disk / "b").bad == {}


def test_a_file_that_may_not_grow_is_told_with_the_bytes_needed(large, tmp_path):
    needed = succeeds(*merge_arguments(large, tmp_path / "b", "--dry-run", "--json")).json["total_bytes"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code, printed = Child(*merge_arguments(large, tmp_path / "b"), before=limit).wait()
    assert code == 1
    assert "no space at" in printed and f"{needed:,} bytes are needed" in printed and "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_an_export_and_leaves_nothing(merged, tmp_path):
    with small_disk(tmp_path / "disk", "8k") as disk:
        fails(1, "export", merged, "--task", "task0", "-o", disk / "out", says="no space at")
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("flush_bytes", [1, 100_000, output.FLUSH_BYTES])
def test_what_a_disk_took_and_could_not_keep_is_told(flush_bytes, large, tmp_path, monkeypatch):
    """While others write on, or at the end; a kernel tells it once."""
    told = []

    def fsync(descriptor):
        if not told:
            told.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(output, "FLUSH_BYTES", flush_bytes)
    monkeypatch.setattr(os, "fsync", fsync)
    result = fails(1, *merge_arguments(large, tmp_path / "b"), says="cannot be written: Input/output error")
    assert "safetensors" in result.err and told and list(tmp_path.iterdir()) == []


# Places.


def test_what_exists_is_not_written_over(plan, tmp_path):
    (tmp_path / "b").mkdir()
    fails(2, "merge", plan, "-o", tmp_path / "b", says="exists")
    (tmp_path / "b/mine").write_text("mine")
    fails(2, "merge", plan, "-o", tmp_path / "b", "--force", says="is not what flexmerge wrote")
    (tmp_path / "file").write_text("mine")
    fails(2, "merge", plan, "-o", tmp_path / "file", "--force", says="is not what flexmerge wrote")
    (tmp_path / "link").symlink_to("nowhere")
    fails(2, "merge", plan, "-o", tmp_path / "link", says="exists")
    fails(2, "merge", plan, "-o", tmp_path / "link", "--force", says="is not what flexmerge wrote")
    assert sorted(tree(tmp_path)) == ["b/mine", "file"]
    (tmp_path / "file").touch()
    fails(2, "merge", plan, "-o", tmp_path / "file/bundle", says="is a file")
    fails(2, "merge", plan, "--method", "nothing", "-o", tmp_path / "out/bundle")
    assert not (tmp_path / "out").exists(), "what is refused leaves nothing behind"
    succeeds("merge", plan, "-o", tmp_path / "out/of/bundle")


def test_a_place_is_refused_before_anything_is_read(plan, tmp_path, monkeypatch):
    def never(*_arguments):
        raise AssertionError("a source was opened")

    monkeypatch.setattr("flexmerge_cli.planning.sources.open_checkpoint", never)
    (tmp_path / "b").mkdir()
    fails(2, "merge", plan, "-o", tmp_path / "b")


@pytest.mark.parametrize("place", ["base", "base/inside", "tasks", "tasks/task1", "tasks/task1/deep", "."])
def test_a_bundle_never_lies_over_in_or_around_an_input(place, tmp_path):
    folders = write_family(tmp_path / "family", plain(num_tasks=2))
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    before = tree(tmp_path)
    target = folders.root / place
    target.parent.mkdir(exist_ok=True)
    for force in ((), ("--force",)):
        result = flexmerge("merge", tmp_path / "plan.json", "--method", "average", "-o", target, *force)
        assert result.code == 2, result.err
    assert tree(tmp_path) == before


def test_an_input_inside_the_bundle_that_would_be_replaced_is_safe(tmp_path):
    """Someone keeps a checkpoint in an old bundle's folder."""
    folders = write_family(tmp_path / "family", plain(num_tasks=2))
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "b")
    folders.tasks["task1"].rename(tmp_path / "b/kept")
    relocate = f"{folders.tasks['task1']}={tmp_path / 'b/kept'}"
    fails(
        2,
        "merge",
        tmp_path / "plan.json",
        "-o",
        tmp_path / "b",
        "--force",
        "--relocate",
        relocate,
        says="what flexmerge did not write: kept",
    )
    assert (tmp_path / "b/kept/model.safetensors").exists()


def as_nobody():
    """Root may write anywhere."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def test_an_unwritable_place_is_told_before_anything_is_read():
    root = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        root.chmod(0o755)
        folders = write_family(root / "family", plain(num_tasks=2))
        succeeds("plan", "-q", *folders.arguments, "-o", root / "plan.json")
        succeeds("merge", root / "plan.json", "-o", root / "b")
        (root / "closed").mkdir(mode=0o555)
        for arguments in (
            ("merge", root / "plan.json", "-o", root / "closed/b"),
            ("plan", *folders.arguments, "-o", root / "closed/plan.json"),
            ("export", root / "b", "--task", "task0", "-o", root / "closed/task0"),
        ):
            code, printed = Child(*arguments, before=as_nobody).wait()
            assert code == 1 and "closed is not writable\nhint: " in printed, printed
        assert list((root / "closed").iterdir()) == []
    finally:
        shutil.rmtree(root)


# Runs that meet.


def test_of_two_merges_to_one_place_one_is_told_and_the_other_succeeds(large, tmp_path):
    children = [Child(*merge_arguments(large, tmp_path / "b")) for _ in range(2)]
    results = [child.wait() for child in children]
    assert sorted(code for code, _ in results) in ([0, 1], [0, 2])
    (printed,) = [printed for code, printed in results if code]
    assert any(words in printed for words in ("is being written by another process", "b exists", "appeared meanwhile"))
    assert "Traceback" not in printed
    assert verify(tmp_path / "b").bad == {}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_place_that_is_locked_is_told(plan, tmp_path):
    with (tmp_path / ".b.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fails(1, "merge", plan, "-o", tmp_path / "b", says="is being written by another process")
    succeeds("merge", plan, "-o", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(UsageError, match="appeared meanwhile"), publish(tmp_path / "b") as folder:
        (folder / "new").write_text("new")
        (tmp_path / "b").mkdir()
        (tmp_path / "b/other").write_text("other")
    assert sorted(tree(tmp_path)) == ["b/other"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), publish(tmp_path / "b") as folder:
        (folder / "deep/er").mkdir(parents=True)
        (folder / "deep/er/x").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_modes_follow_the_umask(plan, tmp_path):
    before = os.umask(0o027)
    try:
        succeeds("merge", plan, "-o", tmp_path / "b")
    finally:
        os.umask(before)
    for path in [tmp_path / "b", *(tmp_path / "b").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_places_are_checked(tmp_path):
    check_target(tmp_path / "free", force=False, ours=lambda _: None)
    check_target(tmp_path / "a/b", force=False, ours=lambda _: None)
    assert not list(tmp_path.iterdir()), "a check makes nothing"
    with pytest.raises((MachineError, UsageError)):
        check_target(tmp_path / "x" / ".." / "..", force=False, ours=lambda _: None)


def test_where_few_files_can_be_open_it_is_said_so_and_nothing_is_left(tmp_path):
    """Removing a folder opens files, too: what had been written stayed, and was in the way of the next run."""
    folders = write_family(tmp_path / "family", plain(num_tasks=3))
    outputs = tmp_path / "out"
    outputs.mkdir()
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    bundle = tmp_path / "bundle"
    merge = ("merge", tmp_path / "plan.json", "--method", "average", "--size", "2x", "-q", "--threads", 1, "-o")
    succeeds(*merge, bundle)

    def limited(more):
        used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
        most = [number for number in range(1000) if number not in used][more]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    codes = set()
    for most in range(4, 36, 2):  # so many more can be opened
        for command in ((*merge, outputs / "b"), ("export", bundle, "--all", "-o", outputs / "e")):
            code, printed = Child(*command, before=lambda most=most: limited(most)).wait()
            assert code == 0 or ("open" in printed and "ulimit -n" in printed), (most, printed)
            assert code in (0, 1), (most, printed)
            shutil.rmtree(command[-1], ignore_errors=code == 1)
            assert not list(outputs.iterdir()), (most, printed)
            codes.add(code)
    assert codes == {0, 1}


def test_a_folder_of_an_overlays_lower_layer_is_refused_before_the_work(tmp_path):
    """Such a folder can be removed, and not be renamed: EXDEV."""
    lower = tmp_path / "lower"
    (lower / "bundle").mkdir(parents=True)
    layers = {name: tmp_path / name for name in ("upper", "work", "merged")}
    for place in layers.values():
        place.mkdir(exist_ok=True)
    options = f"lowerdir={lower},upperdir={layers['upper']},workdir={layers['work']}"
    mounted = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, layers["merged"]], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("overlay file systems cannot be mounted here")
    try:
        target = layers["merged"] / "bundle"
        with pytest.raises(MachineError, match="overlay"):
            check_target(target, force=True, ours=bundle_files)
        assert target.is_dir() and [path.name for path in layers["merged"].iterdir()] == ["bundle"]
        new = layers["merged"] / "new"
        new.mkdir()
        check_target(new, force=True, ours=bundle_files)
    finally:
        subprocess.run(["umount", layers["merged"]], check=True)
