"""A task given back as an ordinary folder."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flexmerge_cli import export, open_bundle
from flexmerge_cli.bundle import export as export_module
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.errors import UsageError

from ..families import assert_same_state
from ..program import Child, fails, succeeds, tree
from .bundles import copy, make, manifest_of


@pytest.mark.parametrize("kind", ["merged", "masked", "tied", "coded"])
def test_an_export_is_a_checkpoint_of_the_task_and_its_files(kind, request, tmp_path):
    bundle = request.getfixturevalue(kind)
    source = bundle.parent / "tasks"
    succeeds("export", bundle, "--all", "-o", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == list(open_bundle(bundle).tasks)  # noqa: PTH208
    for task in open_bundle(bundle).tasks:
        folder = tmp_path / "out" / task
        assert {path.name for path in folder.iterdir()} == {
            "model.safetensors",
            "config.json",
            "vocab.txt",
            "README.md",
        }
        for name in ("config.json", "vocab.txt", "README.md"):
            assert (folder / name).read_bytes() == (source / task / name).read_bytes()
        state = load_file(folder / "model.safetensors")
        assert_same_state(state, dict(open_bundle(bundle).view(task)))
        assert list(open_checkpoint(str(folder)).tensors) and set(state) == set(
            load_file(source / task / "model.safetensors")
        )


def test_an_export_carries_the_bundles_id(merged, tmp_path):
    from safetensors import safe_open

    export(merged, "task1", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"bundle": manifest_of(merged)["id"], "flexmerge": "0.1.0", "format": "pt"}


def test_a_large_export_is_sharded_and_read_back(merged, tmp_path, monkeypatch):
    monkeypatch.setattr("flexmerge_cli.bundle.export.SHARD_BYTES", 2000)
    succeeds("export", merged, "--task", "task2", "-o", tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    found = open_checkpoint(str(tmp_path / "out"))
    view = open_bundle(merged).view("task2")
    assert set(found.tensors) == set(view)
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / "out" / file)[name].equal(view[name])
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in view.values())


def test_a_linked_export_takes_no_space_and_loads(merged, tmp_path):
    succeeds("export", merged, "--task", "task1", "-o", tmp_path / "out", "--link")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    inodes = {path.stat().st_ino for path in (merged / "weights").iterdir()}
    files = [path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors"]
    assert files and all(path.stat().st_ino in inodes for path in files)
    assert all(path.name.startswith("model-0000") for path in files)
    view = open_bundle(merged).view("task1")
    found = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
    assert_same_state(found, dict(view))


@pytest.mark.parametrize("kind", ["masked", "coded"])
def test_what_must_be_decoded_is_not_linked_and_nothing_is_left(kind, request, tmp_path):
    bundle = request.getfixturevalue(kind)
    fails(2, "export", bundle, "--task", "task1", "-o", tmp_path / "out", "--link", says="cannot be linked")
    fails(2, "export", bundle, "--all", "-o", tmp_path / "out", "--link", says="cannot be linked")
    assert list(tmp_path.iterdir()) == []


def test_what_must_be_renamed_or_cast_is_not_linked(tmp_path):
    for name in ("wrapped_tasks", "mixed_dtypes"):
        bundle = make(tmp_path / name, "--method", "average", name=name)
        linked = {task for task in open_bundle(bundle).tasks if (bundle / "tasks" / task).exists()}
        for task in open_bundle(bundle).tasks:
            arguments = ("export", bundle, "--task", task, "-o", tmp_path / f"{name}-{task}", "--link")
            if task in linked:
                succeeds(*arguments)
            else:
                fails(2, *arguments, says="cannot be linked")
        assert len(linked) < len(open_bundle(bundle).tasks)


def test_links_of_the_hubs_cache_are_resolved(merged, tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = copy(merged, repository / "snapshots/abc")
    for number, path in enumerate(sorted((snapshot / "weights").iterdir())):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(f"../../../blobs/{number}")
    succeeds("export", snapshot, "--task", "task0", "-o", tmp_path / "out", "--link")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert set(open_checkpoint(str(tmp_path / "out")).tensors) == set(open_bundle(merged).view("task0"))


def test_links_to_a_bundle_are_replaced_by_links_to_another(plan, tmp_path):
    """Nothing said any more that the linked files were flexmerge's, once the old bundle was gone."""
    for size in ("2x", "1x"):
        succeeds("merge", plan, "--method", "average", "--size", size, "-o", tmp_path / "b", "--force")
        succeeds("export", tmp_path / "b", "--task", "task0", "--link", "-o", tmp_path / "out", "--force")
        weights = tmp_path / "b" / "weights"
        linked = [path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors"]
        assert linked and all(any(path.samefile(own) for own in weights.iterdir()) for path in linked)


def test_an_export_replaces_an_export_and_no_other_checkpoint(merged, tmp_path):
    succeeds("export", merged, "--task", "task0", "-o", tmp_path / "out")
    fails(2, "export", merged, "--task", "task1", "-o", tmp_path / "out", says="exists")
    succeeds("export", merged, "--task", "task1", "-o", tmp_path / "out", "--force")
    assert_same_state(load_file(tmp_path / "out/model.safetensors"), dict(open_bundle(merged).view("task1")))
    succeeds("export", merged, "--task", "task1", "-o", tmp_path / "out", "--link", "--force")
    succeeds("export", merged, "--task", "task1", "-o", tmp_path / "out", "--force")
    trained = tmp_path / "trained"
    shutil.copytree(merged.parent / "tasks/task0", trained)
    before = tree(trained)
    fails(2, "export", merged, "--task", "task0", "-o", trained, "--force", says="is not what flexmerge wrote")
    assert tree(trained) == before


@pytest.mark.parametrize("lies", [".git/HEAD", "notes.txt", "mine/model.safetensors", "optimizer.bin"])
def test_force_replaces_an_export_and_nothing_else(lies, merged, tmp_path):
    """One that holds what no export does is refused, and what it is named; for several tasks as for one."""
    for tasks, folder in ((("--task", "task0"), tmp_path / "one"), (("--all",), tmp_path / "all")):
        succeeds("export", merged, *tasks, "-o", folder)
        inside = folder if folder.name == "one" else folder / "task0"
        (inside / lies).parent.mkdir(exist_ok=True)
        (inside / lies).write_text("mine")
        before = tree(folder)
        named = str((inside / lies).relative_to(folder)).removesuffix("/HEAD").removesuffix("/model.safetensors")
        fails(2, "export", merged, *tasks, "-o", folder, "--force", says=f"did not write: {named}\n")
        assert tree(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "one"]


def test_the_weights_of_another_bundle_are_not_an_export(merged, tmp_path):
    weights = (copy(merged, tmp_path / "b") / "weights").rename(tmp_path / "weights")
    fails(2, "export", merged, "--task", "task0", "-o", weights, "--force", says="not what flexmerge wrote")


def test_several_tasks_appear_together_or_not_at_all(merged, tmp_path, monkeypatch):
    """Broken off it leaves nothing, so the same command succeeds."""
    arguments = ("export", merged, "--all", "-o", tmp_path / "out")
    written = export_module._write

    def full_disk(bundle, task, folder):
        if task == "task2":
            raise OSError(errno.ENOSPC, "No space left on device")
        written(bundle, task, folder)

    monkeypatch.setattr(export_module, "_write", full_disk)
    fails(1, *arguments, says="no space at")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export_module, "_write", lambda *_arguments: os.kill(os.getpid(), signal.SIGKILL))
    assert Child(*arguments).wait()[0] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    succeeds(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(open_bundle(merged).tasks)


def test_several_tasks_by_name_are_exported_each_into_its_folder(merged, tmp_path):
    succeeds("export", merged, "--task", "task3", "--task", "task1", "-o", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["task1", "task3"]
    succeeds("export", merged, "--task", "task1", "-o", tmp_path / "one")
    assert tree(tmp_path / "one") == tree(tmp_path / "out/task1")
    export(merged, ["task1"], tmp_path / "api")
    assert tree(tmp_path / "api") == {f"task1/{name}": data for name, data in tree(tmp_path / "one").items()}
    fails(2, "export", merged, "--task", "task1", "--task", "task1", "-o", tmp_path / "two", says="named twice")
    fails(4, "export", merged, "--task", "task1", "--task", "nobody", "-o", tmp_path / "two", says="no task `nobody`")
    # What another command exported there is not this one's to replace.
    fails(
        2, "export", merged, "--task", "task0", "--task", "task1", "-o", tmp_path / "out", "--force", says=": task3\n"
    )


def test_the_place_of_several_tasks_is_free_or_empty_or_all_theirs(merged, tmp_path):
    (tmp_path / "out").mkdir()
    succeeds("export", merged, "--all", "-o", tmp_path / "out")
    fails(2, "export", merged, "--all", "-o", tmp_path / "out", says="out exists")
    succeeds("export", merged, "--all", "-o", tmp_path / "out", "--force")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine").write_text("mine")
    fails(2, "export", merged, "--all", "-o", tmp_path / "other", "--force", says="is not what flexmerge wrote")
    (tmp_path / "file").write_text("")
    fails(2, "export", merged, "--all", "-o", tmp_path / "file")
    (tmp_path / "file").touch()
    fails(2, "export", merged, "--all", "-o", tmp_path / "file/all", says="is a file")
    succeeds("export", merged, "--all", "-o", tmp_path / "new/folders/all")
    assert (tmp_path / "other/mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "other", "out"]


@pytest.mark.parametrize("options", [(), ("--link",)])
def test_all_that_an_export_publishes_is_on_disk_first(options, merged, tmp_path, monkeypatch):
    synced, published = set(), []
    fsync, rename = os.fsync, Path.rename

    def seen(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def renamed(path, target):
        published.extend(inside.stat().st_ino in synced for inside in [path, *path.rglob("*")])
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(Path, "rename", renamed)
    succeeds("export", merged, "--task", "task0", "-o", tmp_path / "out", *options)
    assert len(published) > 4 and all(published) and tmp_path.stat().st_ino in synced


@pytest.mark.parametrize("options", [(), ("--link",)])
def test_a_damaged_side_file_is_not_exported(options, merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    path = bundle / "tasks/task1/vocab.txt"
    damaged = path.read_bytes().replace(b"s", b"z", 1)
    path.unlink()
    path.write_bytes(damaged)
    fails(5, "export", bundle, "--task", "task1", "-o", tmp_path / "out", *options, says="vocab.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_export_says_which_task(merged, tmp_path):
    fails(2, "export", merged, "-o", tmp_path / "out", says="give either --task or --all")
    fails(2, "export", merged, "--all", "--task", "task0", "-o", tmp_path / "out", says="give either --task or --all")
    fails(4, "export", merged, "--task", "nobody", "-o", tmp_path / "out", says=("no task `nobody`", "task0, task1"))
    fails(4, "export", tmp_path, "--all", "-o", tmp_path / "out", says="no bundle at")


@pytest.mark.parametrize("place", [".", "weights", "weights/x", "..", "x"])
def test_an_export_never_lies_in_or_around_its_bundle(place, merged, tmp_path):
    bundle = copy(merged, tmp_path / "d/b")
    before = tree(tmp_path)
    for force in ((), ("--force",)):
        fails(2, "export", bundle, "--task", "task0", "-o", bundle / place, *force)
        fails(2, "export", bundle, "--all", "-o", bundle / place, *force)
    assert tree(tmp_path) == before


def test_the_api_refuses_as_the_program_does(masked, tmp_path):
    with pytest.raises(UsageError):
        export(masked, "task0", tmp_path / "out", link=True)
    export(masked, "task0", tmp_path / "out")
