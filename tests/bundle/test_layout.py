"""The folders of tasks: links that loaders follow, and nothing that they take for a checkpoint."""

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.errors import UsageError
from flexmerge_cli.formats.manifest import Manifest

from ..families import ODD, assert_same_state, write_family
from ..program import fails, flexmerge, stored_sizes, succeeds, tree
from .bundles import changed, copy, make, manifest_of, seal


def links_of(bundle: Path) -> dict[str, str]:
    return Manifest.model_validate(manifest_of(bundle)).all_links


@pytest.mark.parametrize("name", ["heads", "mixed_dtypes", "wrapped_tasks", "tied", "resized_vocabulary", "one_task"])
@pytest.mark.parametrize("options", [(), ("--method", "average"), ("--method", "emr")])
def test_what_lies_below_tasks_is_the_model_and_what_lies_below_coded_is_no_checkpoint(name, options, tmp_path):
    bundle = make(tmp_path, *options, name=name)
    opened = open_bundle(bundle)
    for task in opened.tasks:
        folder = bundle / "tasks" / task
        assert folder.exists() != (bundle / "coded" / task).exists()
        if folder.exists():
            found = open_checkpoint(str(folder))
            tensors = {}
            for path in found.weight_paths():
                tensors |= load_file(path)
            assert_same_state({key: tensors[key] for key in found.tensors}, tensors)
            view = dict(opened.view(task))
            tied = {key for key in view if key not in tensors}  # left to the loader
            assert_same_state(tensors, {key: value for key, value in view.items() if key not in tied})
            assert tied <= {"lm_head.weight"}
        else:
            assert {p.suffix for p in (bundle / "coded" / task).rglob("*") if p.is_file()} <= {".aside", ".md"}
            text = (bundle / "coded" / task / "README.md").read_text()
            assert f"--task {task} " in text and "no checkpoint" in text
            fails(2, "inspect", bundle / "coded" / task, says=f"--task {task} ")
    assert any((bundle / "tasks").glob("*")) or any((bundle / "coded").glob("*"))


def test_a_route_of_one_file_has_no_index_and_others_have_base_names(merged, tmp_path):
    exact = make(tmp_path, name="heads")
    counts = set()
    for bundle in (merged, exact):
        for task in open_bundle(bundle).tasks:
            folder, route = bundle / "tasks" / task, open_bundle(bundle)._bundle.route(task)
            weights, indices = sorted(folder.glob("*.safetensors")), list(folder.glob("*.index.json"))
            counts.add(len(route))
            assert [path.resolve() for path in weights] == [(bundle / name).resolve() for name in sorted(route)]
            assert all(path.readlink().parts[:3] == ("..", "..", "weights") for path in weights)
            if len(route) == 1:
                assert [path.name for path in weights] == ["model.safetensors"] and indices == []
            else:
                total = f"{len(route):05d}"
                assert weights[0].name == f"model-00001-of-{total}.safetensors"
                assert [path.name for path in indices] == ["model.safetensors.index.json"]
    assert 1 in counts and len(counts) > 1


def test_equal_parts_of_a_bundle_count_once(merged):
    """They agree on disk, in the manifest and in a byte target; `--dry-run` says what they are without links."""
    plan = merged.parent / "plan.json"
    value = succeeds("merge", plan, "--method", "average", "--size", "2x", "--dry-run", "-o", "never", "--json").json
    assert value["total_bytes"] == sum(stored_sizes(merged).values())
    followed = sum(len(data) for name, data in tree(merged).items() if name != "README.md")
    assert value["unlinked_bytes"] == followed > value["total_bytes"]
    said = succeeds("merge", plan, "--method", "average", "--size", "2x", "--dry-run", "-o", "never").out
    assert f"{followed:,} bytes for an upload that sends each link as a copy" in said
    target = ("--size", f"{value['total_bytes']}B")
    fitted = succeeds("merge", plan, "--method", "average", *target, "--dry-run", "-o", "never", "--json").json
    assert fitted["total_bytes"] <= value["total_bytes"]


COPIES = {
    "cp -r": "cp -r {bundle} {copy}",
    "cp -rL": "cp -rL {bundle} {copy}",
    "tar": "mkdir {copy} && tar -C {bundle} -cf - . | tar -C {copy} -xf -",
    "rsync -a": "rsync -a {bundle}/ {copy}/",
    "git clone": "cp -r {bundle} {copy}.git && cd {copy}.git && git init -q && git add -A && "
    "git -c user.name=a -c user.email=b commit -qm c && git clone -q {copy}.git {copy} && rm -rf {copy}/.git",
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_bundle_are_sound_and_load(how, merged, tmp_path):
    if how == "rsync -a" and shutil.which("rsync") is None:
        pytest.skip("no rsync here")
    target = tmp_path / "copy"
    subprocess.run(COPIES[how].format(bundle=merged, copy=target), shell=True, check=True)
    found = verify(target, decode=True)
    assert (found.bad, found.unknown) == ({}, ())
    assert tree(target) == tree(merged)
    for task in open_bundle(merged).tasks:
        assert set(open_checkpoint(str(target / "tasks" / task)).tensors) == set(open_bundle(merged).view(task))
    succeeds("export", target, "--task", "task1", "--link", "-o", tmp_path / "out")
    succeeds("merge", merged.parent / "plan.json", "-o", target, "--force")


@pytest.mark.parametrize("refused", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_no_symbolic_links_can_be_made_hard_ones_are(refused, merged, tmp_path, monkeypatch):
    def symlink(*_arguments, **_options):
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "symlink", symlink)
    bundle = make(tmp_path, "--method", "average", "--size", "2x")
    assert tree(bundle) == tree(merged)
    for link, file in links_of(bundle).items():
        assert (bundle / link).samefile(bundle / file) and not (bundle / link).is_symlink()
    assert verify(bundle, decode=True).bad == {}
    assert_same_state(open_bundle(bundle).view("task1"), open_bundle(merged).view("task1"))


def test_where_no_link_can_be_made_that_is_told_before_a_weight_is_read(plan, tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("flexmerge_cli.engine.work.Worker.read", lambda *_, **__: pytest.fail("weights are read"))
    fails(1, "merge", plan, "-o", tmp_path / "b", says=("neither symbolic nor hard links", "hint: --layout pointer"))
    assert list(tmp_path.iterdir()) == []


def test_a_pointer_is_the_index_of_the_first_format(merged, plan, tmp_path):
    options = ("--method", "average", "--size", "2x")
    bundle = make(tmp_path, *options, "--layout", "pointer")
    assert not [path for path in bundle.rglob("*") if path.is_symlink()]
    weights = {name: data for name, data in tree(merged).items() if name.startswith("weights/")}
    assert {name: data for name, data in tree(bundle).items() if name.startswith("weights/")} == weights
    for task in open_bundle(bundle).tasks:
        folder = bundle / "tasks" / task
        index = json_of(folder / "model.safetensors.index.json")
        view = open_bundle(bundle).view(task)
        assert set(index["weight_map"]) == set(view)
        for name, file in index["weight_map"].items():
            with safe_open(folder / file, "pt") as opened:
                assert opened.get_tensor(name).equal(view[name])
    shown = succeeds("inspect", bundle, "--json").json
    assert shown["request"]["layout"] == "pointer" and "--layout pointer" in shown["request"]["command"]
    assert all(task["in_place"] for task in shown["tasks"].values())
    summary = ("--dry-run", "-o", "never", "--json")
    value = succeeds("merge", plan, "--layout", "pointer", *summary).json
    assert value["unlinked_bytes"] == value["total_bytes"]
    fails(2, "merge", plan, "--layout", "copies", "-o", tmp_path / "c", says="--layout copies is not known")


def json_of(path: Path):
    import json

    return json.loads(path.read_text())


# What goes wrong with links.


def a_link(bundle: Path) -> tuple[str, str]:
    """Return a link of task1 to a file that is its own."""
    return next((link, file) for link, file in links_of(bundle).items() if file == "weights/task1.safetensors")


def test_a_missing_link_is_damage_of_its_task_and_flexmerge_reads_it_still(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    link, _ = a_link(bundle)
    (bundle / link).unlink()
    found = verify(bundle)
    assert found.bad == {link: "missing"} and found.broken_tasks == ("task1",)
    assert link in fails(5, "inspect", bundle, "--verify").out
    assert_same_state(open_bundle(bundle).view("task1"), open_bundle(merged).view("task1"))
    succeeds("export", bundle, "--task", "task1", "-o", tmp_path / "out")


@pytest.mark.parametrize("where", ["outside", "absolute", "itself"])
def test_a_link_out_of_the_bundle_is_refused_by_every_reader(where, merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    link, file = a_link(bundle)
    (tmp_path / "secret").write_bytes((bundle / file).read_bytes())
    (bundle / link).unlink()
    target = {"outside": "../../../secret", "absolute": tmp_path / "secret", "itself": Path(link).name}[where]
    (bundle / link).symlink_to(target)
    for command in (["inspect", bundle], ["inspect", bundle, "--verify"], ["export", bundle, "--all", "-o", "never"]):
        fails(3, *command, says=f"`{link}` is a link out of the bundle")
    assert flexmerge("inspect", bundle / "tasks/task1").code == 3
    fails(2, "merge", merged.parent / "plan.json", "-o", bundle, "--force", says="is a link out of the bundle")


@pytest.mark.parametrize("kind", ["other link", "other bytes", "shorter", "folder", "fifo"])
def test_what_is_no_link_to_its_file_and_no_copy_of_it_is_damage(kind, merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    link, file = a_link(bundle)
    data = (bundle / file).read_bytes()
    (bundle / link).unlink()
    match kind:
        case "other link":
            (bundle / link).symlink_to("../../weights/task2.safetensors")
        case "other bytes":
            (bundle / link).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "shorter":
            (bundle / link).write_bytes(data[:-1])
        case "folder":
            (bundle / link).mkdir()
        case "fifo":
            os.mkfifo(bundle / link)
    found = verify(bundle)
    assert list(found.bad) == [link] and found.broken_tasks == ("task1",)
    assert link in fails(5, "inspect", bundle, "--verify").out


def test_a_lost_weight_file_is_told_once(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    _, file = a_link(bundle)
    (bundle / file).unlink()
    assert verify(bundle).bad == {file: "missing"}


STRANGE = {
    "a stem of a path": lambda fields: fields["tasks"]["task1"].update(stem="../../x"),
    "an unknown stem": lambda fields: fields["tasks"]["task1"].update(stem="weights"),
    "a stem that is no text": lambda fields: fields["tasks"]["task1"].update(stem=1),
    "links of the first format": lambda fields: fields.update(format="flexmerge.bundle/1"),
    "another format": lambda fields: fields.update(format="flexmerge.bundle/3"),
}


@pytest.mark.parametrize("change", STRANGE)
def test_manifests_of_strangers_with_odd_links_are_refused(change, merged, tmp_path):
    bundle = changed(merged, tmp_path / "b", STRANGE[change])
    fails(3, "export", bundle, "--all", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path",
    ["coded/task1/x", "coded/task1/files/x", "coded/task1/config.json/x.aside", "coded/task1/.aside",
     "coded/task1/..aside", "coded/task1/...aside", "coded/task1/a/..aside", "coded/task1/a/...aside",
     "tasks/task1/config.json", "coded/x/README.md"],
)  # fmt: skip
def test_files_of_a_coded_task_lie_in_its_folder(path, masked, tmp_path):
    bundle = copy(masked, tmp_path / "b")
    fields = manifest_of(bundle)
    old = "coded/task1/vocab.txt.aside"
    fields["files"][path] = fields["files"].pop(old)
    files = fields["tasks"]["task1"]["files"]
    fields["tasks"]["task1"]["files"] = sorted(path if name == old else name for name in files)
    seal(bundle, fields)
    fails(3, "export", bundle, "--task", "task1", "-o", tmp_path / "out")


def test_the_files_of_a_coded_task_have_their_own_names_for_us_and_none_for_loaders(masked, tmp_path):
    """Its folder with a config alone was a model to llama.cpp's converter, which made a file of no tensors of it."""
    folder = masked / "coded/task1"
    with pytest.raises((OSError, ValueError), match=r"model_type|config"):
        AutoConfig.from_pretrained(folder)
    opened = Bundle.open(masked)
    own = opened.config_folder("task1")
    assert own == opened.config_folder("task1")
    assert sorted(path.name for path in own.iterdir()) == ["README.md", "config.json", "vocab.txt"]
    assert (own / "config.json").samefile(folder / "config.json.aside")
    succeeds("export", masked, "--task", "task1", "-o", tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    assert tree(own) == tree(tmp_path / "out")


def test_errors_name_their_folder_in_the_bundle(masked):
    """They named the folder of links, which is gone when the program has ended."""
    with pytest.raises(UsageError) as error:
        open_bundle(masked).model("task1")
    assert f"{masked}/coded/task1/config.json" in str(error.value)


def test_a_bundle_that_has_them_in_a_subfolder_under_their_own_names_is_read(masked, tmp_path):
    """As `flexmerge.bundle/2` had them at first."""
    text = json.dumps(manifest_of(masked))
    old = copy(masked, tmp_path / "old")
    for task in (old / "coded").iterdir():
        (task / "files").mkdir()
        for path in task.glob("*.aside"):
            path.rename(task / "files" / path.name.removesuffix(".aside"))
    seal(old, json.loads(re.sub(r"coded/(\w+)/([\w.]+)\.aside", r"coded/\1/files/\2", text)))
    assert verify(old, decode=True).bad == {}
    succeeds("export", old, "--task", "task1", "-o", tmp_path / "out")
    assert_same_state(load_file(tmp_path / "out/model.safetensors"), open_bundle(masked).view("task1"))
    (tmp_path / "out/model.safetensors").unlink()
    assert tree(Bundle.open(old).config_folder("task1")) == tree(tmp_path / "out")
    fails(2, "inspect", old / "coded/task1/files", says="--task task1 ")
    succeeds("merge", masked.parent / "plan.json", "--method", "emr", "-o", old, "--force")


def test_a_source_may_be_a_task_of_a_bundle(tmp_path):
    """A plan of what a bundle restores is that of the models."""
    family = write_family(tmp_path / "family", ODD["heads"]())
    succeeds("plan", *family.arguments, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    again = ("--base", family.base, "--tasks", tmp_path / "bundle/tasks", "-o", tmp_path / "again.json")
    succeeds("plan", *again)
    first, second = json_of(tmp_path / "plan.json"), json_of(tmp_path / "again.json")
    assert first["tensors"] == second["tensors"] and first["order"] == second["order"]
