"""What lies in a bundle's folder, and that each part lies there once."""

import hashlib
import json
import os

import pytest
from safetensors import safe_open

from flexmerge_cli import open_bundle
from flexmerge_cli.checkpoint.digest import digest_bytes

from ..families import Models, encoder, plain, tuned, write_family
from ..program import fails, succeeds, tree
from .bundles import make, manifest_of


def test_the_manifest_tells_of_every_file_and_its_id_is_right(merged):
    fields = manifest_of(merged)
    files = {name: data for name, data in tree(merged).items() if not (merged / name).is_symlink()}
    data = files.pop("manifest.json")
    assert files.pop("README.md")  # which people may rewrite
    assert {name: (entry["bytes"], entry["sha256"], entry["xxh3"]) for name, entry in fields["files"].items()} == {
        name: (len(content), hashlib.sha256(content).hexdigest(), digest_bytes(content))
        for name, content in files.items()
    }
    zeroed = data.replace(fields["id"].encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == fields["id"]
    assert fields["plan"] == json.loads((merged.parent / "plan.json").read_text())["sha256"]
    assert fields["format"] == "flexmerge.bundle/2"


@pytest.mark.parametrize("kind", ["merged", "masked", "coded"])
def test_no_task_reads_a_byte_of_another(kind, request):
    """Every file is read by exactly the tasks of its name, and every part of it by all of them."""
    bundle = request.getfixturevalue(kind)
    fields = manifest_of(bundle)
    seen = {}
    for name, entry in fields["files"].items():
        if name.startswith("weights/"):
            stem = name.removeprefix("weights/").removesuffix(".safetensors")
            assert entry["tasks"] == (list(fields["tasks"]) if stem == "all" else stem.split("+"))
            with safe_open(bundle / name, "np") as file:
                for part in file.keys():  # noqa: SIM118  not a dict
                    seen.setdefault(part, []).append(name)
    for task, entry in fields["tasks"].items():
        assert entry["files"] == sorted(name for name, file in fields["files"].items() if task in file["tasks"])


def test_equal_side_files_are_hard_links_and_count_in_full(merged):
    paths = [merged / f"tasks/task{n}/vocab.txt" for n in range(4)]
    assert len({path.stat().st_ino for path in paths}) == 1
    assert len({(merged / f"tasks/task{n}/README.md").stat().st_ino for n in range(4)}) == 4
    fields = manifest_of(merged)
    assert all(fields["files"][str(path.relative_to(merged))]["bytes"] == path.stat().st_size for path in paths)


def test_where_links_are_not_had_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(1, "not here")

    expected = tree(make(tmp_path / "linked"))
    monkeypatch.setattr(os, "link", refuse)
    bundle = make(tmp_path / "copied")
    assert tree(bundle) == expected
    assert len({(bundle / f"tasks/task{n}/vocab.txt").stat().st_ino for n in range(4)}) == 4


def test_sets_of_readers_with_long_names_are_hashed(tmp_path):
    """30 tasks: names of files stay under 255 bytes, whatever tasks read them."""
    base = encoder(layers=1, width=4)
    tasks = {f"fine-tuned-on-data-set-number-{n:02d}": tuned(base, n % 7, size=0.05 + 0.001 * n) for n in range(30)}
    folders = write_family(tmp_path, Models(base=base, tasks=tasks))
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "--method", "average", "--size", "6x", "-o", tmp_path / "b")
    fields = manifest_of(tmp_path / "b")
    hashed = 0
    for name, entry in fields["files"].items():
        assert len(name.split("/")[-1].encode()) < 120
        joined = "+".join(entry["tasks"])
        if name.startswith("weights/") and len(joined) > 100 and len(entry["tasks"]) < 30:
            stem = f"{len(entry['tasks'])}-{hashlib.sha256(joined.encode()).hexdigest()[:16]}"
            assert name == f"weights/{stem}.safetensors"
            hashed += 1
    assert hashed > 3
    bundle = open_bundle(tmp_path / "b")
    for task, state in tasks.items():
        assert set(bundle.view(task)) == set(state)


def test_links_and_an_index_are_there_where_ordinary_loaders_get_everything(merged, masked, coded):
    for task in open_bundle(merged).tasks:
        index = json.loads((merged / f"tasks/{task}/model.safetensors.index.json").read_text())
        view = open_bundle(merged).view(task)
        assert set(index["weight_map"]) == set(view)
        for name, file in index["weight_map"].items():
            with safe_open(merged / "tasks" / task / file, "pt") as opened:
                assert opened.get_tensor(name).equal(view[name])
    for bundle in (masked, coded):
        assert not list(bundle.glob("tasks/*"))


def test_a_side_file_that_changed_since_the_plan_is_an_error(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=2))
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    vocab = folders.tasks["task1"] / "vocab.txt"
    for text in ("the\nsame\nin\nal1\n", "longer than before, by far\n"):
        vocab.write_text(text)
        fails(3, "merge", tmp_path / "plan.json", "-o", tmp_path / "b", says="vocab.txt has changed since the plan")
    vocab.unlink()
    fails(3, "merge", tmp_path / "plan.json", "-o", tmp_path / "b", says="vocab.txt has changed since the plan")
    assert not (tmp_path / "b").exists()


def test_a_bundle_is_one_models_size_and_a_byte_count_is_exact(merged):
    fields = manifest_of(merged)
    data = 0
    for name in fields["files"]:
        if name.startswith("weights/"):
            with safe_open(merged / name, "pt") as file:
                data += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118  not a dict
    assert fields["stored_bytes"] == data
