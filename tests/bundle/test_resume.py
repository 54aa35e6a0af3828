"""A merge that was killed goes on where it was, and makes the same bytes."""

import json
import os
import random
import shutil
import signal

import pytest

from flexmerge_cli.bundle import publish
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.engine import journal

from ..families import plain, write_family
from ..faults import COMMANDS, ERRORS, Bench
from ..program import Child, fails, succeeds, tree


@pytest.fixture(autouse=True)
def journaled(monkeypatch):
    """A merge of any size has a journal."""
    monkeypatch.setattr(journal, "JOURNALED_BYTES", 0)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Three tasks with heads, in twelve layers: no tensor is a large part of the whole."""
    root = tmp_path_factory.mktemp("resumed")
    models = plain(num_tasks=3, layers=12, width=16)
    folders = write_family(root, models)
    succeeds("plan", *folders.arguments, "-o", root / "plan.json")
    return root


METHODS = {
    "exact": (),
    "average": ("--method", "average", "--size", "2x"),
    "auto": ("--method", "auto", "--size", "1.5x"),
    "low_bit": ("--method", "low_bit:bits=2"),
    "masks": ("--method", "emr"),
    "block": ("--method", "ties", "--method-for", "*attention*=model_stock", "--dtype", "bf16"),
}


class Counted:
    """Bytes that are read of weights; a process that has read `limit` of them is killed."""

    def __init__(self, limit=None):
        self.limit, self.count, self.read = limit, 0, Reader._pread

    def __call__(self, reader, path, descriptor, view, position):
        if self.limit is not None and self.count >= self.limit:
            os.kill(os.getpid(), signal.SIGKILL)
        found = self.read(reader, path, descriptor, view, position)
        self.count += found
        return found

    def install(self, patch=None):
        def pread(reader, *arguments):
            return self(reader, *arguments)

        patch.setattr(Reader, "_pread", pread) if patch else setattr(Reader, "_pread", pread)


def counted(*arguments):
    """The result of a command, and the bytes that it read of weights."""
    counter = Counted()
    with pytest.MonkeyPatch.context() as patch:
        counter.install(patch)
        return succeeds(*arguments), counter.count


def kill(limit, *arguments):
    code, said = Child(*arguments, before=lambda: Counted(limit).install()).wait()
    assert code == -signal.SIGKILL, said


@pytest.mark.parametrize("name", ["exact", "auto", "low_bit", "masks", "block"])
def test_a_killed_merge_goes_on_and_makes_the_same_bytes(name, family, tmp_path):
    words = ("merge", family / "plan.json", *METHODS[name], "--threads", "1")
    _, all_bytes = counted(*words, "-o", tmp_path / "whole")
    out = tmp_path / "b"
    for part in (0.4, 0.48):  # of the bytes of the whole, the second time of those that were left
        kill(int(part * all_bytes), *words, "-o", out)
        assert not out.exists() and (tmp_path / ".b.partial" / ".journal").exists()
    result, again = counted(*words, "-o", out)
    assert "going on with a merge that was killed" in result.err
    assert tree(out) == tree(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert name in ("masks", "block") or again < 0.25 * all_bytes  # of those two, statistics are taken again


def test_killed_at_90_percent_the_second_run_reads_at_most_15_percent(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=2, layers=40))
    succeeds("plan", *folders.arguments, "--statistics", "gram", "-o", tmp_path / "plan.json")
    words = ("merge", tmp_path / "plan.json", *METHODS["average"])
    whole = counted(*words, "-o", tmp_path / "whole")[1]
    for threads in (1, 2):
        out = tmp_path / str(threads)
        kill(int(0.9 * whole), *words, "--threads", threads, "-o", out)
        assert 0 < counted(*words, "--threads", threads, "-o", out)[1] <= 0.15 * whole
        assert tree(out) == tree(tmp_path / "whole")


@pytest.fixture
def killed(family, tmp_path):
    """A place where a merge was killed, and what it would have made."""
    words = ("merge", family / "plan.json", *METHODS["average"], "-o", tmp_path / "b")
    succeeds(*words[:-1], tmp_path / "whole")
    kill(8000, *words, "--threads", "1")
    return words


def said_of(words, tmp_path):
    result = succeeds(*words)
    assert tree(tmp_path / "b") == tree(tmp_path / "whole")
    assert not (tmp_path / ".b.partial").exists()
    return result.err


def test_what_was_damaged_since_is_computed_again(killed, tmp_path):
    for file in (tmp_path / ".b.partial" / "weights").iterdir():
        data = bytearray(file.read_bytes())
        for place in range(len(data) // 3, len(data), 97):
            data[place] ^= 1
        file.write_bytes(data)
    assert "going on" in said_of(killed, tmp_path)


def test_a_file_that_is_gone_too_long_or_not_ours_is_no_matter(killed, tmp_path):
    first, *_, last = sorted((tmp_path / ".b.partial" / "weights").iterdir())
    first.unlink()
    last.write_bytes(last.read_bytes() + b"more")
    (tmp_path / ".b.partial" / "weights" / "strange").write_text("")
    (tmp_path / ".b.partial" / "tasks" / "task0").mkdir(parents=True)
    (tmp_path / ".b.partial" / "tasks" / "task0" / "config.json").write_text("")
    assert "going on" in said_of(killed, tmp_path)


@pytest.mark.parametrize("cut", [1, 30, 400])
def test_a_line_that_was_not_written_whole_counts_for_nothing(cut, killed, tmp_path):
    path = tmp_path / ".b.partial" / ".journal"
    path.write_bytes(path.read_bytes()[:-cut])
    assert "going on" in said_of(killed, tmp_path)


@pytest.mark.parametrize("word", [b'"digests": {"0": "', b'"errors": {"0": '])
def test_a_line_that_is_damaged_counts_for_nothing(word, killed, tmp_path):
    path = tmp_path / ".b.partial" / ".journal"
    data = bytearray(path.read_bytes())
    place = data.index(word) + len(word)
    data[place] = ord("2") if data[place] == ord("1") else ord("1")
    path.write_bytes(data)
    finished = data[:place].count(b"\n") - 1
    assert f"it has finished {finished} tensors" in said_of(killed, tmp_path)


def test_a_journal_of_another_version_or_request_is_discarded_and_that_is_said(killed, family, tmp_path):
    place = tmp_path / ".b.partial"
    shutil.copytree(place, tmp_path / "copy")
    path = place / ".journal"
    head, *lines = path.read_bytes().splitlines(keepends=True)
    later = json.loads(head.partition(b" ")[2]) | {"format": "flexmerge.journal/9"}
    path.write_bytes(b"".join([journal.sealed(later), *lines]))
    assert "is discarded: its journal is of another version" in said_of(killed, tmp_path)
    shutil.rmtree(tmp_path / "b")
    for data in (b"{", journal.sealed([])):
        shutil.copytree(tmp_path / "copy", place)
        path.write_bytes(data)
        assert "is discarded: its journal" in said_of(killed, tmp_path)
        shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "copy", place)
    other = ("merge", family / "plan.json", *METHODS["low_bit"])
    result = succeeds(*other, "-o", tmp_path / "b")
    assert "is discarded: it was of another plan, request, device or version" in result.err
    succeeds(*other, "-o", tmp_path / "other")
    assert tree(tmp_path / "b") == tree(tmp_path / "other")


def test_what_else_is_written_there_removes_it(killed, family, tmp_path):
    succeeds("export", tmp_path / "whole", "--task", "task0", "-o", tmp_path / "b")
    assert not (tmp_path / ".b.partial").exists()


def test_where_something_else_lies_by_now_a_refusal_removes_nothing(killed, tmp_path):
    """It may be the work of others, such as the parts of a merge that runs on several machines."""
    (tmp_path / "b").mkdir()
    fails(2, *killed, says="exists")
    assert (tmp_path / ".b.partial").exists()
    assert "going on" in succeeds(*killed, "--force").err
    assert tree(tmp_path / "b") == tree(tmp_path / "whole") and not (tmp_path / ".b.partial").exists()


def test_what_lies_there_is_no_room_that_is_missing(killed, tmp_path, monkeypatch):
    taken = sum(path.stat().st_blocks * 512 for path in (tmp_path / ".b.partial").rglob("*") if path.is_file())
    assert publish.partial_bytes(tmp_path / "b") == taken > 0
    whole = sum(map(len, tree(tmp_path / "whole").values()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage._replace(free=whole - taken))
    assert "going on" in said_of(killed, tmp_path)
    assert publish.partial_bytes(tmp_path / "b") == 0


def test_a_file_that_another_run_removes_meanwhile_is_no_error(killed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "walk", lambda folder: iter([(str(folder), [], ["gone"])]))
    assert publish.partial_bytes(tmp_path / "b") == 0


def test_an_error_still_leaves_nothing(killed, family, tmp_path):
    source = family / "tasks" / "task2" / "model.safetensors"
    sound = source.read_bytes()
    try:
        source.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        fails(3, *killed, says="changed since the plan")
    finally:
        source.write_bytes(sound)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


@pytest.mark.parametrize("name", ["merge", "merge --force"])
def test_whatever_fails_with_a_journal_the_old_or_the_new_one_is_there(name, tmp_path):
    bench = Bench(tmp_path)
    calls = bench.calls(name)
    draw = random.Random(name)
    for kind in (*ERRORS, "SIGKILL"):
        for number in draw.sample(range(1, len(calls) + 1), 2):
            assert bench.problems(name, number, kind) == [], f"{kind} at call {number}, {calls[number - 1]}"
    assert name in COMMANDS
