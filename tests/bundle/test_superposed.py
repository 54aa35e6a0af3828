"""Bundles of superposed task vectors, beside a plain loop that draws the signs one by one."""

import numpy as np
import pytest
import torch

from flexmerge_cli import export, open_bundle, verify
from flexmerge_cli.bundle.packed_on import packed_on
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.evaluation.models import StoredWeights
from flexmerge_cli.random import key64, mix64

from ..program import fails, succeeds
from .bundles import changed, make, manifest_of

SEED = 3
TASKS = ("task0", "task1", "task2", "task3")


@pytest.fixture(scope="module")
def superposed(tmp_path_factory):
    """Read only."""
    return make(tmp_path_factory.mktemp("superposed"), "--method", f"randes:seed={SEED}")


def weights(path):
    return StoredWeights(open_checkpoint(str(path)).tensors)


def signs(task, tensor, count):
    """+1 where a bit of the stream is set: 64 bits in each output of splitmix64, the lowest first."""
    key = key64("flexmerge/superposed/1", SEED, task, tensor)
    return [1 if mix64(key, place // 64) >> place % 64 & 1 else -1 for place in range(count)]


def test_tasks_are_base_and_superposition_under_their_own_signs(superposed):
    root = superposed.parent
    base, tasks = weights(root / "base"), [weights(root / "tasks" / task) for task in TASKS]
    bundle, checked = open_bundle(superposed), 0
    units = [unit for unit in bundle.manifest.units if unit.groups[0].kind == "superposed"]
    for name in [name for unit in units for name in unit.tensors]:
        shape, start = base[name].shape, base[name].flatten().double().numpy()
        if not start.size:
            continue
        sign_kn = np.array([signs(task, name, start.size) for task in TASKS])
        total = sum(s * (own[name].flatten().double().numpy() - start) for s, own in zip(sign_kn, tasks))
        for task, s in zip(TASKS, sign_kn):
            found = bundle.view(task)[name]
            expected = torch.from_numpy((start + s * total).reshape(shape))
            torch.testing.assert_close(found.double(), expected, rtol=1e-2 if found.dtype != torch.float32 else 1e-5,
                                       atol=1e-6)  # fmt: skip
            checked += 1
    assert checked > 8
    assert not verify(superposed, decode=True).bad


def test_base_and_superposition_are_all_that_is_stored_of_a_group(superposed):
    unit = next(unit for unit in manifest_of(superposed)["units"] if unit["groups"][0]["kind"] == "superposed")
    sizes = {name: part.num_bytes for file in Bundle.open(superposed).parts.values() for name, part in file.items()}
    for name in unit["tensors"]:
        assert {part for part in sizes if part.startswith(name)} == {f"{name}@base", f"{name}@unified"}
        assert sizes[f"{name}@base"] == sizes[f"{name}@unified"]


def test_rows_decode_alone_and_on_a_device_of_torch(superposed):
    bundle, view = Bundle.open(superposed), open_bundle(superposed).view("task1")
    (stored, name) = next(
        (found, name) for name in view if (found := bundle.packed("task1", name)) is not None and view[name].ndim == 2
    )
    packed, whole = stored.packed(bundle.parts_of("task1"), bundle.bits), view[name]
    rows = np.array([1, 0])
    assert np.array_equal(packed.rows(rows).view(np.uint8), whole[rows].numpy().view(np.uint8))
    there = packed_on(packed, torch.device("cpu"), lambda array: torch.from_numpy(array.copy()))
    assert torch.equal(there.decode(torch.tensor([1, 0])), whole[[1, 0]])


def test_what_stays_packed_is_counted_with_the_mask_that_each_task_draws(superposed):
    bundle, counted, held = Bundle.open(superposed), {}, {}
    for task in TASKS:
        for name in bundle.manifest.aligned(task).values():
            stored = bundle.packed(task, name)
            if stored is None:
                continue
            pieces = stored.pieces(bundle.parts_of(task))
            counted |= {(part.path, part.offset): size for part, size in pieces.values() if size}
            packed = stored.packed(bundle.parts_of(task), bundle.bits)
            arrays = {"base": packed.dense.bits, "unified": packed.masked.unified.bits, task: packed.masked.packed}
            held |= {(name, key): array.nbytes for key, array in arrays.items()}
    assert sum(counted.values()) == sum(held.values()) > 0


def test_a_task_is_exported_as_it_is_read(superposed, tmp_path):
    export(superposed, "task2", tmp_path / "out")
    view, found = open_bundle(superposed).view("task2"), weights(tmp_path / "out")
    assert all(torch.equal(view[name], found[name]) for name in view)


@pytest.mark.parametrize("seed", [None, -1, "3", True, 1.5])
def test_a_method_without_a_seed_is_unsound(superposed, tmp_path, seed):
    def change(fields):
        fields["methods"][0]["args"]["seed"] = seed

    bundle = changed(superposed, tmp_path / "b", change)
    fails(3, "export", bundle, "--task", "task1", "-o", tmp_path / "out", says="seed")


def test_pairs_are_copies(superposed, tmp_path):
    plan = superposed.parent / "plan.json"
    found = succeeds("merge", plan, "--method", "randes", "--size", "3.5x", "-o", tmp_path / "b", "--json").json
    assert found["methods"] in (["randes:seed=0"], [])
    kinds = {
        group["kind"] for unit in manifest_of(tmp_path / "b")["units"] for group in unit["groups"]
        if len(group["tasks"]) == 2
    }  # fmt: skip
    assert kinds <= {"copy"}
