"""What a reader does when files are damaged, lost or replaced: nothing wrong is handed out, and others still read."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.bundle import files
from flexmerge_cli.bundle.export import export_task
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.view import View
from flexmerge_cli.checkpoint.digest import digest_file
from flexmerge_cli.errors import FlexmergeError, IntegrityError, MachineError, UsageError
from flexmerge_cli.report.inspect_bundle import weights_words

from ..families import assert_same_state
from ..program import fails, succeeds, tree
from .bundles import changed, copy, flip, manifest_of

KINDS = ["merged", "masked", "tied", "coded"]


def state(bundle, task):
    return {name: tensor.clone() for name, tensor in open_bundle(bundle).view(task).items()}


@pytest.fixture(params=KINDS)
def original(request):
    return request.getfixturevalue(request.param)


def weights_of(bundle):
    return [name for name in manifest_of(bundle)["files"] if name.startswith("weights/")]


@pytest.mark.parametrize("verify", ["sha256", "xxh3"])
def test_a_flipped_byte_of_any_weight_file_is_found_by_every_reader_and_disturbs_no_other_task(
    original, tmp_path, verify
):
    expected = {task: state(original, task) for task in manifest_of(original)["tasks"]}
    for name in weights_of(original):
        size = (original / name).stat().st_size
        for place in (12, size // 2, size - 1):  # the header, and data
            bundle = copy(original, tmp_path / "b")
            flip(bundle / name, place)
            opened = Bundle.look(bundle, verify=verify)
            for task, tensors in expected.items():
                if task not in manifest_of(original)["files"][name]["tasks"]:
                    assert_same_state(View(opened, task), tensors)
                    opened.check_files(task)
                    continue
                for read in (lambda: dict(View(opened, task)), lambda: opened.check_files(task)):  # noqa: B023
                    with pytest.raises(IntegrityError, match="sha256 differs") as raised:
                        read()
                    entry = manifest_of(original)["files"][name]
                    for said in (name, entry["sha256"], *entry["tasks"]):
                        assert said in raised.value.message


def test_a_flipped_byte_of_a_side_file_is_found_before_a_model_is_built(merged, tmp_path):
    for name in [name for name in manifest_of(merged)["files"] if name.startswith("tasks/task0/")]:
        bundle = copy(merged, tmp_path / "b")
        flip(bundle / name)
        with pytest.raises(IntegrityError, match="sha256 differs"):
            open_bundle(bundle).model("task0")
        opened = Bundle.open(bundle)
        with pytest.raises(IntegrityError, match=name):
            opened.check_files("task0", weights=False)
        opened.check_files("task1")


@pytest.mark.parametrize("given", [{}, {"xxh3": "0" * 32}])
def test_where_the_manifest_has_no_fast_digest_or_a_wrong_one_the_sha256_decides(merged, tmp_path, given):
    def change(fields):
        for entry in fields["files"].values():
            del entry["xxh3"]
            entry.update(given)

    bundle = changed(merged, tmp_path / "b", change)
    assert_same_state(open_bundle(bundle).view("task1"), state(merged, "task1"))
    flip(bundle / weights_of(bundle)[0])
    with pytest.raises(IntegrityError, match="sha256 differs"):
        for task in manifest_of(bundle)["tasks"]:
            dict(open_bundle(bundle).view(task))


def test_a_view_computes_no_sha256_of_sound_files(merged, monkeypatch):
    opened = open_bundle(merged)
    monkeypatch.setattr(files.hashlib, "sha256", None)  # which reading the manifest needs
    assert len(dict(opened.view("task1")))


def test_the_three_words_of_verify(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    name = weights_of(bundle)[0]
    flip(bundle / name)
    reader = manifest_of(bundle)["files"][name]["tasks"][0]
    with pytest.raises(IntegrityError, match=name):
        open_bundle(bundle, verify="all")
    with pytest.raises(IntegrityError, match=name):
        open_bundle(bundle, verify=True)
    for off in ("off", False):
        assert len(dict(open_bundle(bundle, verify=off).view(reader)))
    with pytest.raises(IntegrityError, match=name):
        dict(open_bundle(bundle).view(reader))
    with pytest.raises(UsageError, match="first-use"):
        open_bundle(bundle, verify="never")


def test_a_file_is_digested_once_and_only_when_it_is_read(merged, monkeypatch):
    read = []
    chunks = files.BundleFiles.chunks
    monkeypatch.setattr(files.BundleFiles, "chunks", lambda self, name: read.append(name) or chunks(self, name))
    bundle = Bundle.open(merged)
    view = View(bundle, "task1")
    assert read == []
    for _ in range(2):
        dict(view), dict(View(bundle, "task2")), bundle.check_files("task1")
    assert sorted(read) == sorted(set(read))
    assert set(read) >= set(manifest_of(merged)["tasks"]["task1"]["files"])
    read.clear()
    dict(View(Bundle.open(merged, verify="off"), "task1"))
    assert read == []


def test_from_the_second_tensor_on_a_views_other_files_are_digested_meanwhile(merged, monkeypatch):
    read, all_read = [], threading.Event()
    chunks = files.BundleFiles.chunks

    def noted(self, name):
        yield from chunks(self, name)
        read.append(name)
        if set(read) >= set(Bundle.open(merged).route("task1")):
            all_read.set()

    monkeypatch.setattr(files.BundleFiles, "chunks", noted)
    view = View(Bundle.open(merged), "task1")
    assert len(view.bundle.route("task1")) > 1
    name = next(iter(view))
    view[name]
    assert len(read) == 1
    view[name]
    assert all_read.wait(20) and len(read) == len(set(read))


def replaced(bundle, other):
    """Replace it as `merge --force` does: the new folder is exchanged for the old one, which is removed."""
    fresh = copy(other, bundle.with_name("fresh"))
    bundle.rename(bundle.with_name("old"))
    fresh.rename(bundle)
    shutil.rmtree(bundle.with_name("old"))


def test_a_view_goes_on_with_the_bundle_that_was_opened(original, tied, masked, tmp_path):
    bundle = copy(original, tmp_path / "b")
    expected = state(bundle, "task1")
    for verify_word in ("first-use", "off"):
        bundle = copy(original, tmp_path / "b")
        opened = open_bundle(bundle, verify=verify_word)
        view = opened.view("task1")
        replaced(bundle, tied if original != tied else masked)
        assert_same_state(view, expected)
        with pytest.raises(IntegrityError, match="was replaced or changed since the bundle was opened"):
            dict(opened.view("task3"))
        with pytest.raises(IntegrityError):
            opened._bundle.check_files("task1")  # side files were not held
        assert open_bundle(bundle).manifest.id != opened.manifest.id


def test_a_removed_bundle_is_read_on_and_a_changed_file_is_not(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    opened = Bundle.open(bundle)
    view, late = View(opened, "task1"), manifest_of(bundle)["tasks"]["task0"]["files"]
    os.utime(bundle / next(name for name in late if name.endswith("config.json")), ns=(1, 1))
    with pytest.raises(IntegrityError, match=r"config\.json was replaced or changed"):
        opened.check_files("task0", weights=False)
    shutil.rmtree(bundle)
    assert_same_state(view, state(merged, "task1"))
    with pytest.raises(IntegrityError, match="was replaced or changed"):
        View(opened, "task3")


def test_files_are_closed_with_the_bundle(merged):
    def open_files():
        links = [link.readlink() for link in files.Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(link.is_relative_to(merged) for link in links)

    before = open_files()
    for _ in range(3):
        bundle = Bundle.open(merged)
        dict(View(bundle, "task1")), bundle.check_files("task1")
        assert open_files() > before
        del bundle
    assert open_files() == before


def test_a_lost_file_costs_the_tasks_that_read_it_and_no_other(merged, tmp_path):
    name = next(n for n in weights_of(merged) if len(manifest_of(merged)["files"][n]["tasks"]) == 1)
    (lost,) = manifest_of(merged)["files"][name]["tasks"]
    for damage in ("missing", "cut", "a folder"):
        bundle = copy(merged, tmp_path / "b")
        file = bundle / name
        if damage == "cut":
            os.truncate(file, 10)
        else:
            file.unlink()
            if damage == "a folder":
                file.mkdir()
        opened = open_bundle(bundle)
        for task in opened.tasks:
            if task == lost:
                with pytest.raises(IntegrityError, match=name):
                    opened.view(task)
                fails(5, "export", bundle, "--task", task, "-o", tmp_path / f"{damage}-{task}", says=name)
                assert not (tmp_path / f"{damage}-{task}").exists()
            else:
                assert_same_state(opened.view(task), state(merged, task))
                succeeds("export", bundle, "--task", task, "-o", tmp_path / f"{damage}-{task}")
        found = verify(bundle, decode=True)
        assert list(found.bad) == [name] and found.broken_tasks == (lost,)


class Disk:
    """A disk that fails to read, or to open, some files: the calls of the operating system, and nothing of ours."""

    def __init__(self, monkeypatch, *, reads=(), opens=()):
        self.bad = {path.stat().st_ino for path in reads}
        opened, pread, preadv, path_open = os.open, os.pread, os.preadv, files.Path.open

        def fail(path):
            raise OSError(5, "Input/output error", str(path))

        def check(descriptor):
            if os.fstat(descriptor).st_ino in self.bad:
                fail(None)

        monkeypatch.setattr(os, "open", lambda path, *a, **k: fail(path) if path in opens else opened(path, *a, **k))
        monkeypatch.setattr(files.Path, "open", lambda p, *a, **k: fail(p) if p in opens else path_open(p, *a, **k))
        monkeypatch.setattr(os, "pread", lambda d, *a: check(d) or pread(d, *a))
        monkeypatch.setattr(os, "preadv", lambda d, *a: check(d) or preadv(d, *a))


@pytest.mark.parametrize("fault", ["reads", "opens"])
def test_a_file_that_cannot_be_read_is_named_with_its_tasks_and_the_rest_goes_on(fault, merged, tmp_path, monkeypatch):
    bundle = copy(merged, tmp_path / "b")
    name, lost, side = "weights/task2.safetensors", "task2", "tasks/task0/config.json"
    expected = {task: state(merged, task) for task in manifest_of(merged)["tasks"]}
    opened = Bundle.open(bundle)
    Disk(monkeypatch, **{fault: (bundle / name, bundle / side)})
    found = verify(bundle, decode=True)
    assert set(found.bad) == {name, side}
    assert all("Input/output error; read by" in text for text in found.bad.values())
    assert set(found.broken_tasks) == {lost, "task0"}
    with pytest.raises(MachineError, match="Input/output error; read by task2") as raised:
        dict(View(opened, lost))
    assert name in raised.value.message
    for task in set(expected) - {lost, "task0"}:
        assert_same_state(View(opened, task), expected[task])
        succeeds("export", bundle, "--task", task, "-o", tmp_path / task)
    fails(1, "export", bundle, "--task", lost, "-o", tmp_path / lost, says=name)
    assert not (tmp_path / lost).exists() and not list(tmp_path.glob(".*"))
    assert succeeds("inspect", merged, "--verify")
    fails(5, "inspect", bundle, "--verify", says=(lost, "task0"))


def test_what_opens_is_what_verify_calls_sound(masked, tmp_path):
    """A header that is no header, with the right digest: no file differs from the manifest, and it cannot be read."""
    from .bundles import seal_file

    for data in (b"", b"\0" * 40, (masked / "weights/task1.safetensors").read_bytes().replace(b'"U8"', b'"U9"')):
        bundle = copy(masked, tmp_path / "b")
        (bundle / "weights/task1.safetensors").write_bytes(data)
        seal_file(bundle, "weights/task1.safetensors")
        found = verify(bundle)
        assert list(found.bad) == ["weights/task1.safetensors"]
        assert found.sound_tasks == ("task0", "task2", "task3") == Bundle.open(bundle).sound_tasks


@pytest.mark.parametrize(("make", "code", "says"), [(os.mkfifo, 3, "a FIFO"), (os.mkdir, 4, "no manifest.json")])
def test_a_manifest_that_is_no_file_is_told_as_what_it_is(make, code, says, merged, tmp_path):
    """It was taken for a bundle that another job replaces again and again."""
    bundle = copy(merged, tmp_path / "b")
    (bundle / "manifest.json").unlink()
    make(bundle / "manifest.json")
    fails(code, "export", bundle, "--all", "-o", tmp_path / "out", says=says)
    fails(code, "inspect", bundle, "--verify", says=says if code == 3 else ())


def test_parts_that_do_not_make_a_tensor_break_their_task_alone(masked, tmp_path):
    from safetensors.numpy import load_file, save_file

    from .bundles import seal_file

    bundle = copy(masked, tmp_path / "b")
    file = bundle / "weights/task1.safetensors"
    parts = load_file(file)
    del parts[next(name for name in parts if "@mask" in name)]
    save_file(parts, file)
    seal_file(bundle, "weights/task1.safetensors")
    found = verify(bundle)
    assert list(found.bad) == ["task task1"] and found.broken_tasks == ("task1",)
    with pytest.raises(FlexmergeError):
        open_bundle(bundle).view("task1")
    assert len(open_bundle(bundle).view("task2"))


def test_between_two_renames_the_old_bundle_is_read(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    bundle.rename(tmp_path / ".b.old")
    expected = state(merged, "task1")
    assert_same_state(open_bundle(bundle).view("task1"), expected)
    assert verify(bundle).bad == {}
    succeeds("inspect", bundle)
    assert succeeds("inspect", bundle, "--verify", "--json").json["verification"]["sound"]
    succeeds("export", bundle, "--task", "task1", "-o", tmp_path / "out")
    (tmp_path / ".b.old").rename(bundle)
    assert_same_state(open_bundle(bundle).view("task1"), expected)
    copy(merged, tmp_path / ".b.old")
    assert Bundle.open(bundle).path == bundle
    shutil.rmtree(bundle)
    (tmp_path / ".b.old/manifest.json").unlink()
    fails(4, "export", bundle, "--task", "task1", "-o", tmp_path / "out2", says="does not exist")


def test_copies_of_a_view_are_not_on_the_map(original):
    bundle = Bundle.open(original)
    copied = dict(View(bundle, "task1", copy=True))
    assert not bundle.files._maps
    assert_same_state(copied, View(bundle, "task1"))
    for tensor in copied.values():
        tensor.zero_() if tensor.dtype is not torch.bool else None
    assert_same_state(View(bundle, "task1"), state(original, "task1"))


@pytest.mark.parametrize("kind", ["merged", "coded"])
def test_export_of_a_task_that_reads_a_flipped_byte_leaves_nothing_and_others_are_exported(kind, request, tmp_path):
    original = request.getfixturevalue(kind)
    for name, entry in manifest_of(original)["files"].items():
        if name.endswith(".index.json") or (name.startswith("coded/") and name.endswith("/README.md")):
            continue  # what `export` does not copy
        bundle = copy(original, tmp_path / "b")
        size = (bundle / name).stat().st_size
        flip(bundle / name, min(size - 1, size // 2 + 100))
        opened = Bundle.look(bundle)
        for task in opened.tasks:
            target = tmp_path / f"{name.replace('/', '-')}-{task}"
            if task in entry["tasks"]:
                with pytest.raises(IntegrityError, match="sha256 differs") as raised:
                    export_task(opened, task, target)
                assert name in raised.value.message
                assert not target.exists() and not list(tmp_path.glob(".*"))
            elif task == "task3":
                export_task(opened, task, target)


def test_an_export_during_which_the_bundle_is_replaced_is_wholly_the_old_one(merged, tied, tmp_path, monkeypatch):
    bundle = copy(merged, tmp_path / "b")
    array, seen = Bundle.array, []

    def replacing(self, task, name, **options):
        seen.append(name)
        if len(seen) == 3:
            replaced(bundle, tied)
        return array(self, task, name, **options)

    monkeypatch.setattr(Bundle, "array", replacing)
    export_task(Bundle.open(bundle, tasks=["task1"]), "task1", tmp_path / "out")
    monkeypatch.undo()
    export_task(Bundle.open(merged, tasks=["task1"]), "task1", tmp_path / "expected")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


@pytest.mark.parametrize("kind", ["merged", "masked"])
def test_nothing_is_said_of_a_task_that_was_not_checked(kind, request):
    """`in place` is what the folder tells; without a config.json nobody knows which library loads it."""
    merged = request.getfixturevalue(kind)
    value = succeeds("inspect", merged, "--json").json
    for name, task in value["tasks"].items():
        assert task["in_place"] == (kind == "merged") == (merged / "tasks" / name).is_dir()
        assert task["config"] == any("/config.json" in name for name in task["files"])
    assert weights_words({"in_place": True, "config": False}) == "in place, no config"
    assert weights_words({"in_place": False, "config": True}) == "after export"
    assert "transformers" not in succeeds("inspect", merged).out


def test_a_program_does_not_wait_for_what_is_digested_in_the_background(tmp_path):
    """Files of zeros with the right digests, so that one is followed by the next."""
    size = 64 << 20
    entries = {}
    for number in range(6):
        with (tmp_path / f"{number}").open("wb") as file:
            file.truncate(size)
        entries[f"{number}"] = {"bytes": size, "sha256": "0" * 64, "xxh3": digest_file(tmp_path / "0"), "tasks": []}
    script = f"""
import pathlib
from flexmerge_cli.bundle.files import BundleFiles
from flexmerge_cli.formats.manifest_records import FileEntry
entries = {{name: FileEntry.model_validate(entry) for name, entry in {entries}.items()}}
BundleFiles(pathlib.Path({str(tmp_path)!r}), entries, verify="xxh3").ahead(entries)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
