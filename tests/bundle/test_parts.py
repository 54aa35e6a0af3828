"""`merge --part` and `--join`: the bundle of one process, from several that write at once and may be killed."""

import os
import random

import pytest

from flexmerge_cli.bundle import publish
from flexmerge_cli.bundle.parts import share_of
from flexmerge_cli.engine import journal
from flexmerge_cli.request.part import Share

from ..families import ODD, plain, write_family
from ..program import Child, fails, flexmerge, succeeds, tree
from .test_resume import METHODS, counted, kill


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    folders = write_family(root, plain(num_tasks=3, layers=6, width=16))
    succeeds("plan", *folders.arguments, "-o", root / "plan.json")
    return root


def merging(family, name="average"):
    return ("merge", family / "plan.json", *METHODS[name], "--threads", "1")


def write_parts(words, count, out):
    for number in range(1, count + 1):
        succeeds(*words, "--part", f"{number}/{count}", "-o", out)


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("name", list(METHODS))
def test_parts_written_at_the_same_time_one_killed_and_run_again_are_the_bundle_of_one_process(name, family, tmp_path):
    words, out = merging(family, name), tmp_path / "b"
    _, all_bytes = counted(*words, "-o", tmp_path / "whole")
    kill(all_bytes // 5, *words, "--part", "2/3", "-o", out)
    children = [Child(*words, "--part", f"{number}/3", "-o", out) for number in (1, 2, 3)]
    said = [child.wait() for child in children]
    assert [code for code, _ in said] == [0, 0, 0], said
    assert not out.exists()
    result, read = counted(*words, "--join", "-o", out)
    assert tree(out) == tree(tmp_path / "whole"), result.err
    assert hidden(tmp_path) == [] and read == 0


@pytest.mark.parametrize("name", ["mixed_dtypes", "tied", "private_only", "resized_vocabulary"])
def test_odd_families_and_more_parts_than_tensors(name, tmp_path):
    folders = write_family(tmp_path, ODD[name]())
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    words = ("merge", tmp_path / "plan.json", "--method", "average", "--merges", "2")
    if name == "private_only":
        words = words[:2]
    write_parts(words, 9, tmp_path / "b")
    succeeds(*words, "--join", "-o", tmp_path / "b")
    succeeds(*words, "-o", tmp_path / "whole")
    assert tree(tmp_path / "b") == tree(tmp_path / "whole")


def test_a_part_reads_its_share_alone_and_goes_on_where_it_was(family, tmp_path):
    words = merging(family)
    all_bytes = counted(*words, "-o", tmp_path / "whole")[1]
    read = [counted(*words, "--part", f"{number}/3", "-o", tmp_path / "b")[1] for number in (1, 2, 3)]
    assert sum(read) == all_bytes and max(read) < 0.5 * all_bytes
    assert counted(*words, "--part", "2/3", "-o", tmp_path / "b")[1] == 0


def test_what_lacks_is_named_and_a_merge_of_the_whole_does_it(family, tmp_path):
    words, out = merging(family), tmp_path / "b"
    fails(2, *words, "--join", "-o", out, says="holds no parts")
    succeeds(*words, "--part", "2/4", "-o", out)
    fails(2, *words, "--join", "-o", out, says=("lacks --part 1/4, --part 3/4, --part 4/4", "run --part 1/4 again"))
    assert "going on with a merge that was killed" in succeeds(*words, "-o", out).err
    succeeds(*words, "-o", tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole") and hidden(tmp_path) == []


def test_parts_of_other_merges_are_refused_and_stay(family, tmp_path):
    out = tmp_path / "b"
    succeeds(*merging(family), "--part", "1/2", "-o", out)
    before = tree(tmp_path / ".b.partial")
    for more in (("--part", "2/2"), ("--join",)):
        fails(2, *merging(family, "low_bit"), *more, "-o", out, says="it was of another plan, request")
    assert tree(tmp_path / ".b.partial") == before
    (tmp_path / "recipe.yaml").write_text(f"version: 1\nbase: {family}/base\ntasks: {family}/tasks\n")
    fails(2, "merge", tmp_path / "recipe.yaml", "--part", "1/2", "-o", out, says="would make the recipe's plan")
    fails(2, *merging(family), "--part", "1/2", "--join", "-o", out, says="--join has no effect beside --part")
    out.mkdir()
    fails(2, *merging(family), "--part", "2/2", "-o", out, says="exists")


def test_damaged_bytes_are_found_by_the_join_and_written_again_by_their_part(family, tmp_path):
    words, out = merging(family), tmp_path / "b"
    write_parts(words, 2, out)
    file = max((tmp_path / ".b.partial" / "weights").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said = fails(5, *words, "--join", "-o", out, says="is not what its part wrote")
    number = next(number for number in (1, 2) if f"--part {number}/2" in said.err)
    succeeds(*words, "--part", f"{number}/2", "-o", out)
    succeeds(*words, "--join", "-o", out)
    succeeds(*words, "-o", tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_parts_stay_when_a_join_fails(family, tmp_path):
    words, out = (*merging(family), "--max-distance", "0.0001"), tmp_path / "b"
    write_parts(words, 2, out)
    fails(6, *words, "--join", "-o", out, says="distance over")
    assert len(journal.shares_of(tmp_path / ".b.partial")) == 2
    fails(6, *words, "--join", "-o", out, says="distance over")


def test_a_part_waits_for_no_part_but_for_a_merge_of_the_whole(family, tmp_path, monkeypatch):
    words, out = merging(family), tmp_path / "b"
    with publish.shared(out):
        succeeds(*words, "--part", "1/2", "-o", out)
        fails(1, *words, "-o", out, says="is being written by another process")
    with journal.Journal(tmp_path / ".b.partial", "another", Share(2, 2)):
        fails(2, *words, "--part", "2/2", "-o", out, says="cannot be joined with these")
    (tmp_path / ".b.partial" / ".journal-2-of-2").unlink()
    monkeypatch.setattr(publish, "SHARED_SECONDS", 0.1)
    with publish._locked(out):
        fails(1, *words, "--part", "2/2", "-o", out, says="is being written by another process")


def test_one_part_is_written_by_one_process(family, tmp_path, monkeypatch):
    words, out = merging(family), tmp_path / "b"
    succeeds(*words, "--part", "1/2", "-o", out)
    descriptor = os.open(tmp_path / ".b.partial" / ".journal-1-of-2", os.O_RDWR)
    journal.fcntl.flock(descriptor, journal.fcntl.LOCK_EX)
    fails(1, *words, "--part", "1/2", "-o", out, says="part 1/2 is being written by another process")
    os.close(descriptor)
    succeeds(*words, "--part", "1/2", "-o", out)


def test_where_there_are_no_locks_parts_are_joined_all_the_same(family, tmp_path, monkeypatch):
    def no_locks(_descriptor, _kind):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    words, out = merging(family), tmp_path / "b"
    write_parts(words, 2, out)
    succeeds(*words, "--join", "-o", out)
    assert hidden(tmp_path) == [] and flexmerge("inspect", out, "--verify").code == 0


def test_every_tensor_is_of_one_part_and_units_are_whole(family):
    from flexmerge_cli.allocation.allocate import allocate
    from flexmerge_cli.planning.make import load_plan
    from flexmerge_cli.request.merge import merge_request

    layout = allocate(load_plan(family / "plan.json"), merge_request(method="ties", size="2x"))
    count = random.Random(0).randrange(2, 9)
    shares = [share_of(layout, Share(number, count)) for number in range(1, count + 1)]
    assert sorted(name for share in shares for name in share) == sorted(
        n for n, s in layout.storages.items() if s.parts
    )
    for unit in layout.allocation.units:
        assert sum(not share.isdisjoint(unit.tensors) for share in shares) <= 1


def test_a_command_that_is_refused_keeps_the_parts(family, tmp_path):
    """Without --force, over a bundle, the parts were removed before the place was refused."""
    words, out = merging(family), tmp_path / "b"
    succeeds("merge", family / "plan.json", "-o", out)
    for number in (1, 2):
        succeeds(*words, "--force", "--part", f"{number}/2", "-o", out)
    refused = ("--join",), ("--part", "1/2"), ("--dry-run",), ()
    for more in refused:
        fails(2, *words, *more, "-o", out, says="exists")
    fails(2, "export", out, "--task", "task0", "-o", out, says="")
    succeeds(*words, "--join", "--force", "-o", out)
    succeeds(*words, "-o", tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole") and hidden(tmp_path) == []
