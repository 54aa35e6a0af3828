"""Places, selections and sums out of core against the plain computation in memory, for any cut into ranges."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.methods import places as places_module
from flexmerge_cli.methods import selection
from flexmerge_cli.methods.method import Where
from flexmerge_cli.methods.places import AtPlaces, magnitude_keys, magnitudes, value_keys, values
from flexmerge_cli.methods.selection import keep_largest, places_of
from flexmerge_cli.methods.sums import PIECE_ELEMENTS, Sums, fold
from flexmerge_cli.random import tie_numbers

from .drawn import anything, quick, rows, scopes
from .driver import measure

# Small sizes are gathered at once; 0 makes every pass count digits, as large scopes do.
LIMITS = [0, 3, 1 << 18]


def measured(statistic, scope, chunk):
    return measure(statistic, scope, scope, "abc", chunk)


def joined(scope):
    return torch.cat([scope[name] for name in sorted(scope)], 1)


def numbers_of(scope):
    return np.concatenate([tie_numbers(name, np.arange(scope[name].shape[1]).astype("u8")) for name in sorted(scope)])


def places_in(scope):
    """The rank of each element over the scope, by sorting."""
    plain, numbers = joined(scope).abs().numpy(), numbers_of(scope)
    order = np.stack([np.lexsort((numbers, -row)) for row in plain])
    return torch.from_numpy(order.argsort(1))


@pytest.mark.parametrize("limit", LIMITS)
@quick
@given(scope=scopes(), chunk=st.sampled_from([1, 7, 1000]), data=st.data())
def test_keys_at_places_are_those_of_the_sorted_scope(limit, scope, chunk, data):
    scope_values, kind = joined(scope), data.draw(st.sampled_from(["magnitudes", "values"]))
    n = scope_values.shape[1]
    wanted = tuple(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=3)))
    keys = magnitude_keys if kind == "magnitudes" else lambda deltas: value_keys(deltas.double())
    statistic = AtPlaces(
        scope="model", keys=lambda deltas, _where: keys(deltas), places=lambda *_: wanted, then=lambda found: found
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places_module, "GATHERED", limit)
        found = measured(statistic, scope, chunk)
    expected = scope_values.abs() if kind == "magnitudes" else scope_values.double() + 0.0
    in_order = expected.sort(dim=1, descending=True).values
    for row, column in np.ndindex(found.key_RT.shape):
        place = wanted[column]
        if place == 0:
            assert n == 0 or int(found.key_RT[row, column]) > keys(scope_values)[row].max().item()
            assert found.quota_RT[row, column] == 0
            continue
        value = (magnitudes if kind == "magnitudes" else values)(found.key_RT[row, column : column + 1])[0]
        assert value == in_order[row, place - 1].item()
        assert found.equal_RT[row, column] == (expected[row] == value).sum().item()
        assert found.quota_RT[row, column] == place - (expected[row] > value).sum().item()


@pytest.mark.parametrize("limit", LIMITS)
@quick
@given(scope=scopes(), chunk=st.sampled_from([1, 7, 1000]), other=st.sampled_from([1, 3, 1000]), data=st.data())
def test_exactly_the_c_largest_are_kept_ties_by_number(limit, scope, chunk, other, data):
    plain = joined(scope)
    n = plain.shape[1]
    counts = tuple(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=2)))
    rows = data.draw(st.permutations(range(len(plain))))[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places_module, "GATHERED", limit)
        kept = measured(keep_largest(scope="model", counts=lambda *_: counts), scope, chunk).take(list(rows))
    for place, count in enumerate(counts):
        expected = (places_in(scope) < count)[list(rows)] & (plain[list(rows)] != 0)
        parts = []
        for name in sorted(scope):  # applied to other ranges than it was measured on
            deltas = scope[name][list(rows)]
            for start in range(0, deltas.shape[1], other):
                where = Where(tasks=("a", "b"), tensor=name, start=start, shape=(deltas.shape[1],))
                parts.append(kept.mask(magnitude_keys(deltas[:, start : start + other]), where, place))
        found = torch.cat([*parts, torch.zeros(len(rows), 0, dtype=torch.bool)], 1)
        assert torch.equal(found & (plain[list(rows)] != 0), expected)  # whether a zero is kept does not matter


@quick
@given(values=rows(3, (4, 5), anything), start=st.sampled_from([0, 20]))
def test_places_are_those_of_the_sorted_rows(values, start):
    where = Where(tasks=("a", "b", "c"), tensor="t", start=start, shape=(9, 5))
    places = places_of(magnitude_keys(values), where)
    numbers = tie_numbers("t", np.arange(start, start + 20).astype("u8")).reshape(4, 5)
    for task, row in np.ndindex(3, 4):
        in_order = np.lexsort((numbers[row], -values[task, row].abs().numpy()))
        assert places[task, row].tolist() == in_order.argsort().tolist()


@pytest.mark.parametrize("width", [0.0, 0.01, 8.0])
@pytest.mark.parametrize("chunk", [1_000, 100_000])
def test_a_window_that_misses_the_last_tie_is_tried_wider(monkeypatch, width, chunk):
    signs = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)).sign()
    scope = {"a": signs[:, :30_000], "b": signs[:, 30_000:]}
    monkeypatch.setattr(selection, "WIDTH", width)
    statistic = keep_largest(scope="model", counts=lambda n, _: (20_000, 1))
    kept = measured(statistic, scope, chunk)
    assert (kept.last_RT == np.sort(numbers_of(scope))[[19_999, 0]]).all()


def squares(deltas, _where):
    yield deltas.double().square()
    yield deltas[:1].double()


@quick
@given(scope=scopes(st.floats(-1024, 1024, width=32)), chunk=st.sampled_from([1, 7, 1000]))
def test_sums_do_not_show_the_chunks(scope, chunk):
    whole = measured(Sums(scope="model", terms=squares, then=lambda sums: sums), scope, 1 << 30)
    cut = measured(Sums(scope="model", terms=squares, then=lambda sums: sums), scope, chunk)
    assert whole.tobytes() == cut.tobytes()
    plain = joined(scope).double()
    assert np.allclose(whole, [*plain.square().sum(1), plain[0].sum()], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("chunk", [1000, 5000, PIECE_ELEMENTS, 3 * PIECE_ELEMENTS, 70_001])
def test_sums_of_many_pieces_do_not_show_the_chunks(chunk):
    scope = {
        "a": torch.randn(2, 2 * PIECE_ELEMENTS + 17, generator=torch.Generator().manual_seed(0)),
        "b": torch.randn(2, 40_000, generator=torch.Generator().manual_seed(1)),
    }
    statistic = Sums(scope="model", terms=squares, then=lambda sums: sums)
    assert measured(statistic, scope, chunk).tobytes() == measured(statistic, scope, 1 << 30).tobytes()


def test_large_scopes_count_digits_and_keep_the_same(monkeypatch):
    values = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # many ties
    scope = {"a": values[:, :30_000], "b": values[:, 30_000:]}
    statistic = keep_largest(scope="model", counts=lambda n, _: (5_003,))
    gathered = measured(statistic, scope, 7_000)
    monkeypatch.setattr(places_module, "GATHERED", 100)
    counted = measured(statistic, scope, 1_000)
    assert (gathered.key_RT == counted.key_RT).all()
    assert (gathered.last_RT == counted.last_RT).all()
    assert (counted.last_RT < 1).all()


@quick
@given(numbers=st.lists(st.floats(-1e30, 1e30), max_size=99))
def test_folding_does_not_depend_on_padding(numbers):
    terms = torch.tensor(numbers, dtype=torch.float64)
    padded = torch.cat([terms, torch.zeros(300 - len(numbers), dtype=torch.float64)])
    assert fold(terms).item() == fold(padded).item()


def test_gathered_keys_are_few_arrays():
    """Many small ones would keep the allocator from reusing the memory between them."""
    tile = places_module.TILE_ELEMENTS
    statistic = AtPlaces(
        scope="model",
        keys=lambda deltas, _where: magnitude_keys(deltas),
        places=lambda *_: (1,),
        then=lambda found: found,
    )
    where = Where(tasks=("a", "b"), tensor="x", start=0, shape=(2 * tile,))
    part = statistic.measure(torch.ones(2, 2 * tile), where)
    assert [len(loose) for loose in part.tally.loose_X] == [1, 1]
    part = total = statistic.measure(torch.ones(2, 8), where)
    for _ in range(3 * places_module.MANY):
        total = statistic.combine(total, statistic.measure(torch.ones(2, 8), where))
    assert total.tally.size_X.tolist() == [8 * (3 * places_module.MANY + 1)] * 2
    assert all(len(loose) <= places_module.MANY for loose in total.tally.loose_X)
