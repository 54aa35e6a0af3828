"""Statistics of a whole model, taken out of core, against the plain thing: all elements side by side in memory.

bfloat16 weights whose changes take few values, so that most thresholds fall among many equal magnitudes.
"""

import math

import numpy as np
import pytest
import torch

from flexmerge_cli import open_bundle
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.methods import places
from flexmerge_cli.random import tie_numbers

from ..families import Models, normal, tuned
from .merges import WHOLE, billed, plan_of, planned, write

SHAPES = {
    "embeddings.word_embeddings.weight": (211, 11),
    "encoder.layer.0.attention.self.query.weight": (37, 33),
    "encoder.layer.0.attention.self.query.bias": (37,),
    "encoder.layer.0.intermediate.dense.weight": (83, 67),
    "pooler.dense.bias": (5,),
    "scale": (),
}
NAMES = sorted(SHAPES)
GROUPS = ([(0, 1, 2, 3, 4)], [(0, 2, 4), (1, 3)], [(0,), (1, 2), (3, 4)])


@pytest.fixture(scope="module")
def ties_everywhere(tmp_path_factory):
    base = {name: (normal(n, *shape) * 4).round().bfloat16() for n, (name, shape) in enumerate(SHAPES.items())}
    tasks = {
        f"task{k}": {
            name: (base[name].float() + (2 * normal(100 * k + n, *shape)).round() / 32).bfloat16()
            for n, (name, shape) in enumerate(SHAPES.items())
        }
        for k in range(5)
    }
    return planned(tmp_path_factory.mktemp("ties"), Models(base=base, tasks=tasks))


@pytest.fixture(params=["gathered", "counted"])
def as_counted(request, monkeypatch):
    """Few candidates are gathered and sorted; with none allowed, thresholds come from counting digits alone."""
    if request.param == "counted":
        monkeypatch.setattr(places, "GATHERED", 0)


def side_by_side(models):
    """[M, n]: the task vectors, tensors by name."""
    return np.stack(
        [
            np.concatenate([(state[name].float() - models.base[name].float()).flatten().numpy() for name in NAMES])
            for state in models.tasks.values()
        ]
    )


def assert_merged(folders, bundle, expected_of):
    """expected_of(tasks) -> [n] float64: what a group's merged task vector must be."""
    models, start = folders.models, {}
    for name in NAMES:
        start[name] = sum(models.base[other].numel() for other in NAMES[: NAMES.index(name)])
    opened, merged = open_bundle(bundle), 0
    for unit in opened.manifest.units:
        for group in unit.groups:
            if len(group.tasks) == 1:
                continue
            value = expected_of(np.array([list(models.tasks).index(task) for task in group.tasks]))
            for name in unit.tensors:
                base = models.base[name]
                delta = torch.from_numpy(value[start[name] : start[name] + base.numel()]).float() + 0.0
                expected = ((base.float().flatten() + delta).bfloat16() + 0.0).view(base.shape)
                for task in group.tasks:
                    if torch.equal(opened.view(task)[name], models.tasks[task][name]):
                        continue  # tensors that are equal in a group are copies
                    assert torch.equal(opened.view(task)[name], expected), (name, task)
                    merged += 1
    assert merged


@pytest.mark.parametrize("chunk_elements", [1024, WHOLE])
@pytest.mark.parametrize("K", [0.1, 0.37, 0.9])
def test_ties_keeps_exactly_the_largest_of_the_whole_model(K, chunk_elements, as_counted, ties_everywhere, tmp_path):
    plan = plan_of(ties_everywhere)
    layout = billed(plan, f"ties:K={K}", groups=[GROUPS[index % 3] for index in range(len(plan.blocks))])
    bundle = write(ties_everywhere, layout, tmp_path / "bundle", threads=3, chunk_elements=chunk_elements)
    deltas = side_by_side(ties_everywhere.models)
    n = deltas.shape[1]
    numbers = np.concatenate([tie_numbers(name, np.arange(math.prod(SHAPES[name]), dtype=np.uint64)) for name in NAMES])
    trimmed = np.zeros_like(deltas)
    for row, delta in zip(trimmed, deltas):
        kept = np.lexsort((numbers, -np.abs(delta)))[: min(n, int(K * n) + 1)]
        threshold = np.abs(delta[kept[-1]])
        assert (
            (np.abs(delta) == threshold).sum() > (np.abs(delta[kept]) == threshold).sum() > 1
        )  # some ties are cut off
        row[kept] = delta[kept]

    def expected(tasks):
        rows = trimmed[tasks].astype(np.float64)
        agree = rows * np.where(rows.sum(0) >= 0, 1.0, -1.0) > 0
        return (rows * agree).sum(0) / np.maximum(agree.sum(0), 1)

    assert_merged(ties_everywhere, bundle, expected)


@pytest.mark.parametrize("chunk_elements", [1024, WHOLE])
def test_pcb_competes_over_the_whole_model(chunk_elements, as_counted, ties_everywhere, tmp_path):
    plan, K = plan_of(ties_everywhere), 0.3
    layout = billed(plan, f"pcb:K={K},scope=whole", groups=[GROUPS[index % 3] for index in range(len(plan.blocks))])
    bundle = write(ties_everywhere, layout, tmp_path / "bundle", threads=3, chunk_elements=chunk_elements)
    deltas = side_by_side(ties_everywhere.models).astype(np.float64)
    n = deltas.shape[1]

    def expected(tasks):
        rows, sizes = deltas[tasks], np.sort(np.abs(deltas[tasks]), axis=1)
        low, high = sizes[:, [int(0.0001 * n)]], sizes[:, [max(0, int(0.9999 * n - 1))]]
        size = np.clip(np.abs(rows), low, high)
        own = ((size - low) / (high - low)) ** 2
        # The exponential and tanh of torch, whose last bits are not numpy's.
        between = torch.from_numpy(rows * rows.sum(0)).tanh().numpy()
        score = torch.from_numpy(len(rows) * (own - 1)).exp().numpy() * between
        threshold = np.sort(score, axis=1)[:, [min(n - 1, int(n * (1 - K)))]]
        weight = (np.maximum(score, threshold) - threshold) / (score.max(1, keepdims=True) - threshold)
        total = weight.sum(0)
        mean = (np.sign(rows) * size * weight).sum(0)
        return np.divide(mean, total, out=np.zeros(n), where=total > 0)

    assert_merged(ties_everywhere, bundle, expected)


@pytest.mark.parametrize("chunk_elements", [1024, WHOLE])
def test_experts_of_free_are_scaled_by_means_over_the_whole_model(chunk_elements, tmp_path):
    """μ = -log10(density) · K / mean |τ|, nothing being filtered out; sums that are exactly rounded."""
    base = {name: normal(n, *shape) for n, (name, shape) in enumerate(SHAPES.items())}
    models = Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(3)})
    folders = planned(tmp_path, models)
    layout = billed(plan_of(folders), "free:density=0.1,mu_scope=model,variant=paper,cutoff=0")
    bundle = Bundle.open(write(folders, layout, tmp_path / "bundle", chunk_elements=chunk_elements))
    parts = {name: part for file in bundle.parts.values() for name, part in file.items()}
    for task, state in models.tasks.items():
        deltas = {name: (state[name] - base[name]).flatten().numpy() for name in NAMES}
        top = {
            name: np.argsort(-np.abs(delta), kind="stable")[: max(1, len(delta) // 10)]
            for name, delta in deltas.items()
        }
        kept = np.concatenate([np.abs(deltas[name][top[name]]) for name in NAMES]).astype(np.float64)
        sizes = np.concatenate([np.abs(delta) for delta in deltas.values()]).astype(np.float64)
        mu = (math.fsum(kept) / len(kept)) / (math.fsum(sizes) / len(sizes))
        found = 0
        for name in NAMES:
            if f"{name}@values.{task}" in parts:
                values = bundle.bits(parts[f"{name}@values.{task}"])
                assert values == pytest.approx(mu * deltas[name][np.sort(top[name])], rel=1e-6)
                found += 1
        assert found >= 4


@pytest.mark.parametrize("gamma", ["weighted", "tensor_mean"])
@pytest.mark.parametrize("chunk_elements", [1024, WHOLE])
def test_factors_of_emr_count_all_of_a_block(gamma, chunk_elements, tmp_path):
    """A tensor that is bit-identical in the group is a copy without a mask, and part of the sums all the same."""
    base = {name: normal(n, *shape) for n, (name, shape) in enumerate(SHAPES.items())}
    models = Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(3)})
    same = "encoder.layer.0.attention.self.query.bias"
    for state in models.tasks.values():
        state[same] = models.tasks["task0"][same].clone()
    models.tasks["task3"] = tuned(base, 9)  # else the tensor would be constant, and in no block
    folders = planned(tmp_path, models)
    plan = plan_of(folders)
    layout = billed(plan, f"emr:gamma={gamma}", groups=[[(0, 1, 2), (3,)]] * len(plan.blocks))
    bundle = Bundle.open(write(folders, layout, tmp_path / "bundle", chunk_elements=chunk_elements))
    parts = {name: part for file in bundle.parts.values() for name, part in file.items()}
    unit = next(unit for unit in bundle.manifest.units if same in unit.tensors)
    assert len(unit.tensors) == 2 and f"{same}@unified" not in parts
    above, below = np.zeros(3), np.zeros(3)
    for name in unit.tensors:
        deltas = np.stack([(models.tasks[f"task{n}"][name] - base[name]).flatten().double().numpy() for n in range(3)])
        agree = deltas * np.where(deltas.sum(0) >= 0, 1.0, -1.0) > 0
        taken = agree * (np.abs(deltas) * agree).max(0)
        weight = 1 / deltas.shape[1] if gamma == "tensor_mean" else 1.0
        above += [weight * math.fsum(row) for row in np.abs(deltas)]
        below += [weight * math.fsum(row) for row in taken]
    for n in range(3):
        assert bundle.bits(parts[f"{unit.name}@gamma.task{n}"])[0] == np.float32(above[n] / below[n])
