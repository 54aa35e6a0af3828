"""Methods out of core against the same computed in memory, in the plainest way, to the last bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.methods.reductions import sum_tasks
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
    """From the definition, one sort for each order statistic. [k, n] float32 -> [n] float32."""
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
    merged = merge(family, parse_call(f"pcb:K={kept},scope=model"), chunk=chunk, bypass=False)
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
