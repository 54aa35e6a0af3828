"""A folder that appears whole or not at all: crashes, full disks, interruptions, and runs that meet."""

import contextlib
import fcntl
import os
import random
import resource
import signal
import subprocess
import time

import pytest

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.bundle.publish import check_target, publish
from flexmerge_cli.errors import MachineError, UsageError

from ..families import Models, encoder, normal, plain, tuned, write_family
from ..program import fails, flexmerge, start, succeeds, tree


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Large enough that a merge takes a while after it began to write."""
    base = encoder() | {f"encoder.layer.{n}.mlp.weight": normal(n, 600, 500) for n in range(6)}
    models = Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(4)})
    folders = write_family(tmp_path_factory.mktemp("large"), models)
    succeeds("plan", *folders.arguments, "-o", folders.root / "plan.json")
    return folders


def merge_arguments(folders, target, *options):
    return ("merge", folders.root / "plan.json", "--method", "emr", "-o", target, "--threads", 1, *options)


def wait_for(path, process):
    """Until something is there, or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_any_moment_a_merge_leaves_no_bundle_or_a_whole_one(large, tmp_path):
    """The next run succeeds with the same bytes, and leaves nothing beside the bundle."""
    succeeds(*merge_arguments(large, tmp_path / "expected"))
    expected = tree(tmp_path / "expected")
    draw = random.Random(1)
    seen = set()
    for number in range(10):
        place = tmp_path / str(number)
        place.mkdir()
        process = start(*merge_arguments(large, place / "b"))
        wait_for(place / ".b.lock", process)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.communicate()
        seen.add(process.returncode)
        if (place / "b").exists():
            assert tree(place / "b") == expected
            assert flexmerge(*merge_arguments(large, place / "b")).code == 2
        else:
            succeeds(*merge_arguments(large, place / "b"))
        assert tree(place / "b") == expected
        succeeds(*merge_arguments(large, place / "b", "--force"))
        assert [path.name for path in place.iterdir()] == ["b"]
    assert -signal.SIGKILL in seen


@pytest.mark.slow
def test_killed_while_it_replaces_a_bundle_the_old_or_the_new_one_is_there(large, tmp_path):
    succeeds(*merge_arguments(large, tmp_path / "b"))
    new = tree(tmp_path / "b")
    succeeds("merge", large.root / "plan.json", "-o", tmp_path / "b", "--force")
    old = tree(tmp_path / "b")
    draw = random.Random(2)
    for _ in range(5):
        process = start(*merge_arguments(large, tmp_path / "b", "--force"))
        wait_for(tmp_path / ".b.lock", process)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert tree(tmp_path / "b") in (old, new)
        succeeds("merge", large.root / "plan.json", "-o", tmp_path / "b", "--force")
        assert tree(tmp_path / "b") == old
        assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_interrupted_merge_exits_with_130_and_leaves_nothing(large, tmp_path):
    process = start(*merge_arguments(large, tmp_path / "b"))
    wait_for(tmp_path / ".b.partial", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_plan_exits_with_130_and_leaves_nothing(large, tmp_path):
    process = start("plan", *large.arguments, "-o", tmp_path / "plan.json")
    time.sleep(0.8)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.returncode in (130, 0, -signal.SIGINT)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["plan.json"])


# Full disks.


@contextlib.contextmanager
def small_disk(place, size):
    """A file system of `size` bytes at `place`; skips where it cannot be made."""
    place.mkdir()
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


@pytest.mark.parametrize("free_pages", [0, 1, 2, 5, 10, 15])
def test_a_disk_that_fills_up_meanwhile_is_told_and_nothing_is_left(free_pages, tmp_path):
    """The bytes would fit; their blocks do not, be it in the weights, a side file or the manifest."""
    folders = write_family(tmp_path / "family", plain(num_tasks=3))
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
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


def test_a_disk_that_is_just_large_enough_is_enough(tmp_path):
    folders = write_family(tmp_path / "family", plain(num_tasks=3))
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    with small_disk(tmp_path / "disk", "160k") as disk:
        succeeds("merge", tmp_path / "plan.json", "-o", disk / "b")
        assert verify(disk / "b").bad == {}


def test_a_file_that_may_not_grow_is_told_with_the_bytes_needed(large, tmp_path):
    needed = succeeds(*merge_arguments(large, tmp_path / "b", "--dry-run", "--json")).json["total_bytes"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start(*merge_arguments(large, tmp_path / "b"), preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "no space at" in err and f"{needed:,} bytes are needed" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_an_export_and_leaves_nothing(merged, tmp_path):
    with small_disk(tmp_path / "disk", "8k") as disk:
        fails(1, "export", merged, "--task", "task0", "-o", disk / "out", says="no space at")
        assert list(disk.iterdir()) == []


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
    fails(2, "merge", plan, "-o", tmp_path / "no/where", says="no folder")


def test_a_place_is_refused_before_anything_is_read(plan, tmp_path, monkeypatch):
    def never(*_arguments):
        raise AssertionError("a source was opened")

    monkeypatch.setattr("flexmerge_cli.merging.open_checkpoint", never)
    (tmp_path / "b").mkdir()
    fails(2, "merge", plan, "-o", tmp_path / "b")


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


@pytest.mark.parametrize("place", ["base", "base/inside", "tasks", "tasks/task1", "tasks/task1/deep", "."])
def test_a_bundle_never_lies_over_in_or_around_an_input(place, tmp_path):
    folders = write_family(tmp_path / "family", plain(num_tasks=2))
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
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
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
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
        says="lie in each other",
    )
    assert (tmp_path / "b/kept/model.safetensors").exists()


def as_nobody():
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


@pytest.mark.skipif(os.getuid() == 0 and not os.access("/proc/self", os.R_OK), reason="no other user here")
def test_an_unwritable_place_is_told_before_anything_is_read(tmp_path):
    """As a user who is not root, since root may write anywhere."""
    import shutil
    import tempfile
    from pathlib import Path

    root = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        root.chmod(0o755)
        folders = write_family(root / "family", plain(num_tasks=2))
        succeeds("plan", *folders.arguments, "-o", root / "plan.json")
        (root / "closed").mkdir(mode=0o555)
        for arguments in (
            ("merge", root / "plan.json", "-o", root / "closed/b"),
            ("plan", *folders.arguments, "-o", root / "closed/plan.json"),
        ):
            process = start(*arguments, preexec_fn=as_nobody, env={"HOME": "/nonexistent"})
            _, err = process.communicate()
            if "No module named" in err or ("Permission denied" in err and "closed" not in err):
                pytest.skip("another user cannot run the program here")
            assert process.returncode == 1, err
            assert "is not writable" in err and "hint: " in err and "Traceback" not in err
        assert list((root / "closed").iterdir()) == []
    finally:
        shutil.rmtree(root)


# Runs that meet.


def test_of_two_merges_to_one_place_one_is_told_and_the_other_succeeds(large, tmp_path):
    processes = [start(*merge_arguments(large, tmp_path / "b")) for _ in range(2)]
    results = sorted((process.communicate()[1], process.returncode) for process in processes)
    codes = sorted(code for _, code in results)
    assert codes in ([0, 1], [0, 2])
    (message,) = [err for err, code in results if code]
    assert "is being written by another process" in message or "exists" in message or "appeared meanwhile" in message
    assert "Traceback" not in message
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


def test_what_a_crash_left_is_removed_and_an_old_folder_is_put_back(tmp_path):
    """Between two renames, on a file system that cannot exchange, the old folder has only this name."""
    (tmp_path / ".b.partial/deep").mkdir(parents=True)
    (tmp_path / ".b.old").mkdir()
    (tmp_path / ".b.old/kept").write_text("kept")
    with pytest.raises(ZeroDivisionError), publish(tmp_path / "b", force=True):
        raise ZeroDivisionError
    assert tree(tmp_path) == {"b/kept": b"kept"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_without_an_exchange_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda *_arguments, **_options: object())
    (tmp_path / "b").mkdir()
    (tmp_path / "b/old").write_text("old")
    with publish(tmp_path / "b", force=True) as folder:
        (folder / "new").write_text("new")
    assert tree(tmp_path) == {"b/new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_modes_follow_the_umask(plan, tmp_path):
    before = os.umask(0o027)
    try:
        succeeds("merge", plan, "-o", tmp_path / "b")
    finally:
        os.umask(before)
    for path in [tmp_path / "b", *(tmp_path / "b").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_places_are_checked(tmp_path):
    check_target(tmp_path / "free", force=False, replaceable=lambda _: False)
    with pytest.raises(UsageError, match="no folder"):
        check_target(tmp_path / "a/b", force=False, replaceable=lambda _: True)
    with pytest.raises((MachineError, UsageError)):
        check_target(tmp_path / "x" / ".." / "..", force=False, replaceable=lambda _: True)
