"""Methods out of core against the same computed in memory, in the plainest way, to the last bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.methods.reductions import count_tasks, only, sum_tasks
from flexmerge_cli.methods.registry import parse_call

from .conftest import break_ties_by_index
from .drawn import few, quick, rows
from .driver import family_of, merge

elements = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-8, 8, width=32))
vectors = st.tuples(st.integers(2, 4), st.sampled_from([1, 2, 9, 99])).flatmap(lambda s: rows(s[0], (s[1],), elements))


@pytest.mark.parametrize("method", ["breadcrumbs:gamma=0.1", "sce:density=0.4", "sce:density=1.0", "model_stock"])
@few
@given(deltas=vectors, chunk=st.sampled_from([1, 7, 1000]))
def test_a_vector_is_one_row(method, deltas, chunk):
    """scope=row computes in memory, scope=tensor by statistics."""
    family = family_of({"w": deltas})
    both = [
        merge(family, parse_call(f"{method}{',' if ':' in method else ':'}scope={scope}"), chunk=chunk, bypass=False)
        for scope in ("row", "tensor")
    ]
    assert torch.equal(both[0]["w"].unified, both[1]["w"].unified)


def pcb(deltas, kept):
    """Compute it from the definition, one sort for each order statistic. [k, n] float32 -> [n] float32."""
    k, n = deltas.shape
    ordered = deltas.abs().sort(1).values.double()
    low, high = ordered[:, int(0.0001 * n)][:, None], ordered[:, max(0, int(0.9999 * n - 1))][:, None]
    sizes = deltas.abs().double().maximum(low).minimum(high)
    own = torch.where(high > low, (sizes - low) / (high - low), 0.0) ** 2
    score = torch.exp(k * (own - 1)) * torch.tanh(deltas * sum_tasks(deltas))
    threshold = score.sort(1).values[:, min(n - 1, int(n * (1 - kept)))][:, None]
    best = score.amax(1, keepdim=True)
    weight = torch.where(best > threshold, (score.maximum(threshold) - threshold) / (best - threshold), 1.0)
    weight = torch.where((best == threshold) & (threshold <= 0), 0.0, weight)
    total = sum_tasks(weight)
    merged = torch.where(total > 0, sum_tasks(deltas.sign() * sizes * weight) / total, 0.0)
    return merged.float() + 0.0


@quick
@given(deltas=vectors, chunk=st.sampled_from([1, 7, 1000]), kept=st.sampled_from([0.05, 0.1, 0.5, 1.0]))
def test_competition_of_a_model_is_that_of_one_long_vector(deltas, chunk, kept):
    cut = deltas.shape[1] // 3
    family = family_of(
        {"a": deltas[:, :cut], "b": deltas[:, cut:]}, blocks={"one": ("a",), "other": ("b",)}
    )  # an empty tensor where the vector is short
    merged = merge(family, parse_call(f"pcb:K={kept},scope=whole"), chunk=chunk, bypass=False)
    assert torch.equal(torch.cat([merged["a"].unified, merged["b"].unified]), pcb(deltas, kept))


@quick
@given(deltas=vectors, chunk=st.sampled_from([1, 7, 1000]))
def test_model_scope_sees_one_long_vector(deltas, chunk):
    cut = deltas.shape[1] // 3
    parts = family_of({"a": deltas[:, :cut], "b": deltas[:, cut:]}, blocks={"one": ("a",), "other": ("b",)})
    for method in ("ties:K=0.2,scope=model", "breadcrumbs:gamma=0.1,scope=model", "fr:scope=model"):
        with pytest.MonkeyPatch.context() as patch:
            break_ties_by_index(patch, {"b": cut})
            merged = merge(parts, parse_call(method), chunk=chunk, bypass=False)
            whole = merge(family_of({"w": deltas}), parse_call(method), bypass=False)["w"].unified
        assert torch.equal(torch.cat([merged["a"].unified, merged["b"].unified]), whole)


def released_pcb(model, group, block, dropped):
    """FlexMerge's release in float64: model [M, N] of all tasks, the group's rows and the block's columns."""

    def clamped(rows):
        ordered, n = np.sort(np.abs(rows), 1), rows.shape[1]
        return np.clip(np.abs(rows), ordered[:, [int(n * 0.0001)]], ordered[:, [int(n * (1 - 0.0001) - 1)]])

    def scores(rows):
        sizes = clamped(rows)
        least, most = sizes.min(1, keepdims=True), sizes.max(1, keepdims=True)
        return np.exp(len(rows) * ((sizes - least) / (most - least)) ** 2) * np.tanh(rows * rows.sum(0))

    everyone = np.sort(scores(model), 1)
    low, high = everyone[:, [int(model.shape[1] * dropped)]], everyone[:, [-1]]
    rows = model[group][:, block]
    inside = np.clip(scores(rows), low[group], high[group])
    least, most = inside.min(1, keepdims=True), inside.max(1, keepdims=True)
    weight = (inside - least) / (most - least)
    return (np.sign(rows) * clamped(rows) * weight).sum(0) / np.maximum(weight.sum(0), 1e-12)


@pytest.mark.parametrize("group", ["abcde", "bd", "ace"])
@pytest.mark.parametrize("kept", [0.1, 0.75])
def test_pcb_of_the_release_has_thresholds_of_all_tasks_and_the_model(group, kept):
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (40, 30), "b": (25,), "c": (30, 20)}
    deltas = {name: torch.randn(5, *shape, generator=draw) for name, shape in shapes.items()}
    family = family_of(deltas, blocks={"one": ("a", "b"), "other": ("c",)})
    merged = merge(family, parse_call(f"pcb:K={kept},scope=model,scale=1.5"), group=group, chunk=101)
    model = np.concatenate([rows.flatten(1).double().numpy() for rows in deltas.values()], 1)
    rows = ["abcde".index(task) for task in group]
    for block, columns in ((("a", "b"), slice(0, 1225)), (("c",), slice(1225, None))):
        expected = 1.5 * released_pcb(model, rows, columns, 1 - kept)
        found = torch.cat([merged[name].unified.flatten() for name in block])
        assert np.abs(found.numpy() - expected).max() < 1e-6


def test_pcb_of_the_release_gives_nothing_where_no_score_is_above_the_threshold():
    """The release divides 0 by 0 there."""
    draw = torch.Generator().manual_seed(0)
    deltas = {"a": torch.randn(3, 50, generator=draw), "b": 1e-4 * torch.randn(3, 50, generator=draw)}
    family = family_of(deltas, blocks={"one": ("a",), "other": ("b",)})
    merged = merge(family, parse_call("pcb:K=0.1,scope=model"))
    assert not merged["b"].unified.any() and merged["a"].unified.any()


def test_what_a_mask_leaves_has_the_bits_of_where():
    values = torch.tensor(
        [[1.5, -0.0, float("nan"), float("inf"), -2.0, 1e-45], [-float("inf"), 3.0, -1e-45, 0.0, -1, 2]]
    )
    kept = torch.tensor([[1, 1, 0, 0, 0, 1], [1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    assert only(kept, values).numpy().tobytes() == torch.where(kept, values, 0.0).numpy().tobytes()


@pytest.mark.parametrize("tasks", [1, 255, 256, 300])
def test_tasks_are_counted_however_many_there_are(tasks):
    assert count_tasks(torch.ones(tasks, 2, 3, dtype=torch.bool)).tolist() == [[tasks] * 3] * 2
