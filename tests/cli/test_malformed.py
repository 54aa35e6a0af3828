"""What a user gets wrong, or is given wrong, ends in one message with both sides, a hint and its exit code."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families import Folders, plain, tuned, write_checkpoint, write_family
from tests.program import fails, flexmerge, succeeds


@pytest.fixture
def own(tmp_path: Path) -> Folders:
    """A family that a test may damage."""
    return write_family(tmp_path / "family", plain(num_tasks=2))


def plan_of(folders: Folders) -> list[str]:
    return ["plan", *folders.arguments, "-o", str(folders.root / "plan.json")]


def weights(folders: Folders) -> Path:
    return next(iter(folders.tasks.values())) / "model.safetensors"


def header_of(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(path: Path, header: dict[str, dict[str, object]], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_truncated_file(own: Folders) -> None:
    weights(own).write_bytes(weights(own).read_bytes()[:-7])
    fails(3, *plan_of(own), says=(str(weights(own)), "truncated"))


def test_a_header_longer_than_its_file(own: Folders) -> None:
    weights(own).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    fails(3, *plan_of(own), says=(str(weights(own)), "1,099,511,627,776"))


@pytest.mark.parametrize(("shift", "says"), [(-4, "overlaps"), (4, "hole")])
def test_overlaps_and_holes(shift: int, says: str, own: Folders) -> None:
    header, data = header_of(weights(own))
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [offset + shift for offset in header[last]["data_offsets"]]
    write_header(weights(own), header, data[:shift] if shift < 0 else data + bytes(shift))
    fails(3, *plan_of(own), says=(last, says))


def test_not_a_number_is_named_with_task_tensor_and_place(tmp_path: Path) -> None:
    models = plain(num_tasks=2)
    task = sorted(models.tasks)[1]
    name = next(name for name, value in models.tasks[task].items() if value.dim() == 2)
    models.tasks[task][name][1, 2] = float("nan")
    folders = write_family(tmp_path, models)
    fails(3, *plan_of(folders), says=(f"task `{task}`", f"`{name}`", "[1, 2]"))


def test_a_fine_tune_of_another_architecture(own: Folders) -> None:
    other = own.root / "tasks" / "other"
    write_checkpoint(other, {f"blocks.{i}.w": torch.zeros(3, 3) for i in range(9)})
    fails(3, *plan_of(own), says=("`other`", "not of one architecture"))
    assert not (own.root / "plan.json").exists()


def test_all_misfits_are_told_at_once(own: Folders) -> None:
    for name in ("other", "another"):
        write_checkpoint(own.root / "tasks" / name, {f"{name}.{i}": torch.zeros(2) for i in range(9)})
    fails(3, *plan_of(own), says=("`other`", "`another`"))


def test_a_missing_shard(tmp_path: Path) -> None:
    folders = write_family(tmp_path, plain(num_tasks=2), layout="shards")
    shard = sorted(next(iter(folders.tasks.values())).glob("*-of-*.safetensors"))[1]
    shard.unlink()
    fails(3, *plan_of(folders), says=(shard.name, "missing"))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("1",))


def test_a_pickle_that_needs_code(own: Folders) -> None:
    folder = next(iter(own.tasks.values()))
    (folder / "model.safetensors").unlink()
    torch.save({"w": Harmful()}, folder / "pytorch_model.bin", pickle_module=pickle)
    fails(3, *plan_of(own), says=("pytorch_model.bin", "code"))


@pytest.mark.parametrize("name", ["../x", "all", "a/b", "", "-x", "x" * 65])
def test_names_that_no_task_can_have(name: str, own: Folders) -> None:
    source = next(iter(own.tasks.values()))
    fails(2, "plan", "--base", own.base, "--task", f"{name}={source}", "-o", own.root / "plan.json")


def test_two_tasks_of_one_name(own: Folders) -> None:
    source = next(iter(own.tasks.values()))
    tasks = ["--task", f"cola={source}", "--task", f"COLA={source}"]
    fails(2, "plan", "--base", own.base, *tasks, "-o", own.root / "plan.json", says="two tasks have the same name")


@pytest.mark.parametrize("size", ["0x", "-1x", "900x", "abc", "0%", "101%", "-5MB", "nanx", "infx", "2,5x"])
def test_sizes_that_are_none(size: str, plan: Path, tmp_path: Path) -> None:
    result = flexmerge("merge", plan, "--method", "average", f"--size={size}", "-o", tmp_path / "b")
    assert result.code == 2 and "error: " in result.err and "hint: " in result.err


def test_a_size_that_a_method_does_not_reach(plan: Path, tmp_path: Path) -> None:
    fails(6, "merge", plan, "--method", "emr", "--size", "1.1x", "-o", tmp_path / "b", says="its smallest is")
    assert not (tmp_path / "b").exists()


def test_a_size_without_a_method_lists_what_each_reaches(plan: Path, tmp_path: Path) -> None:
    fails(2, "merge", plan, "--size", "2x", "-o", tmp_path / "b", says=("average", "emr", "down to"))


def test_an_edited_plan(plan: Path, tmp_path: Path) -> None:
    text = plan.read_text()
    (tmp_path / "plan.json").write_text(text.replace('"seed":0', '"seed":1'))
    fails(2, "merge", tmp_path / "plan.json", "-o", tmp_path / "b", says="edited")


def test_a_source_that_changed_since_the_plan(own: Folders, tmp_path: Path) -> None:
    succeeds(*plan_of(own))
    data = bytearray(weights(own).read_bytes())
    data[-3] ^= 1
    weights(own).write_bytes(data)
    fails(3, "merge", own.root / "plan.json", "-o", tmp_path / "b", says="changed since the plan")
    assert not (tmp_path / "b").exists() and list(tmp_path.glob(".b*")) == []


def test_a_source_that_is_gone(own: Folders, tmp_path: Path) -> None:
    succeeds(*plan_of(own))
    shutil.rmtree(next(iter(own.tasks.values())))
    fails(4, "merge", own.root / "plan.json", "-o", tmp_path / "b", says="does not exist")


def test_a_flipped_bit_names_file_and_tasks(plan: Path, tmp_path: Path) -> None:
    succeeds("merge", plan, "--method", "average", "--size", "2x", "-o", tmp_path / "b")
    victim = sorted((tmp_path / "b" / "weights").iterdir())[-1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 4
    victim.write_bytes(data)
    result = fails(5, "inspect", tmp_path / "b", "--verify", says="task3")
    assert victim.name in result.out + result.err


def test_a_manifest_that_points_outside(plan: Path, tmp_path: Path) -> None:
    succeeds("merge", plan, "-o", tmp_path / "b")
    path = tmp_path / "b" / "manifest.json"
    path.write_text(path.read_text().replace("weights/", "weights/../../", 1))
    assert flexmerge("inspect", tmp_path / "b").code in (3, 5)
    assert flexmerge("export", tmp_path / "b", "--all", "-o", tmp_path / "e").code in (3, 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version: 1\nbase: b\ntaks: {a: x}\n", ("line 3", "taks", "did you mean `tasks`?")),
        ("version: 1\nbase: b\ntasks: {a: x}\nmerge: {methd: ties}\n", ("line 4", "methd", "did you mean `method`?")),
        ("version: 1\nbase: b\ntasks: {a: x}\nmerge: {method: tie}\n", ("tie", "did you mean `ties`?")),
        ("version: 1\nbase: b\nbase: c\ntasks: {a: x}\n", ("line 3", "twice")),
        ("version: 2\nbase: b\ntasks: {a: x}\n", ("line 1", "version")),
        ("a: &x [1]\nb: *x\n", ("line 2", "alias")),
        ("version: [\n", ("line",)),
    ],
)
def test_recipes(text: str, says: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    fails(2, "merge", tmp_path / "recipe.yaml", "-o", tmp_path / "b", says=says)


def test_too_little_memory_is_told_with_the_figure_before_the_first_read(plan: Path, tmp_path: Path) -> None:
    fails(2, "merge", plan, "--max-memory", "1MB", "-o", tmp_path / "b", says=("needed", "--max-memory"))


def test_a_distance_over_the_limit_is_not_published(plan: Path, tmp_path: Path) -> None:
    limited = ["--method", "average", "--max-distance", "0.01", "-o", tmp_path / "b"]
    fails(6, "merge", plan, *limited, says="not published")
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_json_document_too(plan: Path, tmp_path: Path) -> None:
    result = flexmerge("merge", plan, "--method", "tie", "-o", tmp_path / "b", "--json")
    assert result.json["error"]["exit_code"] == result.code == 2
    assert np.isfinite(len(result.err))


def test_a_task_far_from_its_base_is_warned_of(tmp_path: Path) -> None:
    models = plain(num_tasks=2)
    models.tasks["stranger"] = tuned(models.base, 9, size=3.0)
    folders = write_family(tmp_path, models)
    assert "`stranger` is probably not a fine-tune of this base" in succeeds(*plan_of(folders)).err
