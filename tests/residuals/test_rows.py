import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.checkpoint.rows import are_runs, num_rows, other_rows, runs_of
from flexmerge_cli.stored import joined as rows


@given(st.integers(0, 40).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.integers(0, n))))
def test_any_rows_in_any_order_are_joined_again(drawn):
    order, count = drawn
    whole = np.arange(4 * len(order), dtype=np.uint16).reshape(len(order), 4)
    common = runs_of(order[:count])
    assert are_runs(common, len(order)) and num_rows(common) == count
    others = [row for first, many in other_rows(common, len(order)) for row in range(first, first + many)]
    assert others == sorted(order[count:])
    own = whole[others] if others else None
    assert (rows.join(whole[list(order[:count])], own, common, len(order)) == whole).all()


def test_added_rows_are_one_run():
    assert runs_of(range(12)) == ((0, 12),)
    assert other_rows(((0, 12),), 14) == ((12, 2),)
    assert runs_of([3, 4, 2, 7, 8]) == ((3, 2), (2, 1), (7, 2))


@pytest.mark.parametrize("runs", [((0, 0),), ((0, 3), (2, 1)), ((9, 2),), ((-1, 2),), ((0, -1),), ((4, 1), (4, 1))])
def test_runs_that_are_none(runs):
    assert not are_runs(runs, 10)


def test_vectors_are_joined_as_matrices_are():
    assert rows.join(np.array([1, 2]), np.array([9]), ((1, 2),), 3).tolist() == [9, 1, 2]
