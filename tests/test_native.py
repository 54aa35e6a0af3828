"""The loops in C give what the plain ways give. Skipped where there was no compiler."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flexmerge_cli import make_plan, merge, native
from flexmerge_cli.engine.runs import RUN_ELEMENTS, sizes, squares
from flexmerge_cli.engine.survey import gram_sums
from flexmerge_cli.engine.survey_codes import sampled_rows
from flexmerge_cli.engine.survey_item import PRODUCT_ELEMENTS
from flexmerge_cli.errors import DataError
from flexmerge_cli.methods import places
from flexmerge_cli.methods.method import Where
from flexmerge_cli.methods.places import AtPlaces, value_keys
from flexmerge_cli.methods.reductions import largest_agreeing, merge_agreeing, sum_tasks
from flexmerge_cli.methods.selection import Kept, keep_largest
from flexmerge_cli.residuals.coding_error import residual_tasks
from flexmerge_cli.residuals.row_errors import row_errors

from .families import Folders, Models, write_family

pytestmark = pytest.mark.skipif(native.lib is None, reason="not built: no compiler")

SIZES = [0, 1, 2, 31, 32, 33, 99, 1023, 1024, 1025, 5000]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_sums_have_the_same_bits(size, tasks, monkeypatch):
    for deltas in (normal(tasks, size), normal(tasks, size + 7)[:, :size], normal(size, tasks).T):
        found = sum_tasks(deltas)
        with monkeypatch.context() as plain:
            plain.setattr(native, "lib", None)
            expected = sum_tasks(deltas)
        assert found.dtype is torch.float64 and torch.equal(found, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 3e38, 1e-45])
def test_sums_of_odd_numbers_have_the_same_bits(value, monkeypatch):
    deltas = normal(3, 40)
    deltas[:, 5] = value
    found = sum_tasks(deltas)
    monkeypatch.setattr(native, "lib", None)
    assert found.numpy().tobytes() == sum_tasks(deltas).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tasks", [1, 3, 13])
def test_sampled_rows_have_the_same_bits(size, tasks, dtype, monkeypatch):
    base = normal(5, size)
    weights = [(base + 0.01 * normal(5, size, seed=seed)).to(dtype) for seed in range(1, tasks + 1)]
    mixed = [*weights[1:], weights[0].double()]  # which take the plain path
    for given, rows in ((weights, [0, 2, 3]), (weights, []), (mixed, [1, 4])):
        measured = residual_tasks(slice(4, 4 + len(rows)), tasks)

        def sampled(given=given, rows=rows, measured=measured):
            buffer = lambda _name, *shape: torch.full(shape, torch.nan)  # noqa: E731
            return sampled_rows(base, given, np.array(rows, np.int64), measured, buffer)

        found = sampled()
        with monkeypatch.context() as plain:
            plain.setattr(native, "lib", None)
            assert all(map(torch.equal, found, sampled()))


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 8, 13, 32])
def test_products_are_those_of_float64(tasks, monkeypatch):
    elements, more = 2 * PRODUCT_ELEMENTS, 17
    base, rows = normal(elements), normal(tasks, elements + more, seed=1)[:, :elements]
    rows += base  # neither aligned nor one after another
    found = gram_sums(rows, base, elements)
    deltas = (rows - base).double().reshape(tasks, 2, -1).transpose(0, 1)
    exact = (deltas @ deltas.transpose(1, 2)).numpy()
    assert found.shape == (2, tasks, tasks) and np.abs(found - exact).max() <= 2e-7 * exact.max()
    assert np.array_equal(found, found.transpose(0, 2, 1))
    assert np.array_equal(found, gram_sums(rows - base, None, elements)), "whoever subtracts: the same bits"
    assert np.array_equal(found[:1], gram_sums(rows[:, : elements // 2], base, elements // 2))
    narrow = rows.bfloat16()
    assert np.array_equal(gram_sums(narrow, base, elements), gram_sums(narrow.float(), base, elements))
    monkeypatch.setattr(native, "lib", None)
    assert np.abs(found - gram_sums(rows - base, None, elements)).max() <= 5e-7 * exact.max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_products_that_are_not_finite_show(value):
    rows, base = normal(3, PRODUCT_ELEMENTS), torch.zeros(PRODUCT_ELEMENTS)
    rows[1, 70] = value
    found = gram_sums(rows, base, PRODUCT_ELEMENTS)[0]
    assert np.isfinite(found[np.ix_([0, 2], [0, 2])]).all() and not np.isfinite(found[1, 1])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [8, 9, 31, 64, 1023, 1500])
def test_errors_of_rows_are_the_plain_ones(rows, columns, monkeypatch):
    matrix = normal(rows, columns) * torch.logspace(-3, 3, rows)[:, None]
    matrix[0, 3] = 40 * matrix[0].abs().max()  # an outlier
    found = row_errors(matrix, (1, 2, 3, 4, 8))
    monkeypatch.setattr(native, "lib", None)
    np.testing.assert_allclose(found, row_errors(matrix, (1, 2, 3, 4, 8)), rtol=2e-5)


@pytest.mark.parametrize("bits", [(2, 4), (4, 8)])
def test_a_matrix_that_lies_otherwise_in_memory_is_measured_too(bits, monkeypatch):
    matrix = normal(50, 20).T
    found = row_errors(matrix, bits)
    monkeypatch.setattr(native, "lib", None)
    np.testing.assert_allclose(found, row_errors(matrix, bits), rtol=2e-5)


@pytest.mark.parametrize("count", [0, 5, 1023, 1024, 1025, 4096, 70_000])
def test_squares_of_runs_have_the_same_bits(count, monkeypatch):
    values = normal(3, count + 9)[:, :count]
    found = squares(values, RUN_ELEMENTS)
    monkeypatch.setattr(native, "lib", None)
    assert np.array_equal(found, squares(values, RUN_ELEMENTS))


@pytest.mark.parametrize("count", [0, 5, 127, 129, 1023, 1024, 1025, 5000])
def test_sizes_of_runs_have_the_same_bits(count, monkeypatch):
    values, counts = normal(3, count + 9)[:, :count], normal(3, count, seed=1) > 0
    unified = normal(count, seed=2).expand(3, count)
    found = sizes(values, RUN_ELEMENTS), sizes(unified, RUN_ELEMENTS, counts)
    monkeypatch.setattr(native, "lib", None)
    plain = sizes(values, RUN_ELEMENTS), sizes(unified, RUN_ELEMENTS, counts)
    assert all(one.tobytes() == other.tobytes() for one, other in zip(found, plain))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_agreeing_deltas_have_the_same_bits(size, tasks, monkeypatch):
    deltas = normal(tasks, size + 7)[:, :size]
    deltas[-1, ::3] = -deltas[0, ::3]  # of two tasks these cancel
    deltas[:, ::5] = 0
    deltas[0, 1::7] = -0.0
    deltas[0, 2::31] = float("inf")
    found = [merge_agreeing(deltas, merge) for merge in ("mean", "sum", "max")] + [*largest_agreeing(deltas)]
    monkeypatch.setattr(native, "lib", None)
    plain = [merge_agreeing(deltas, merge) for merge in ("mean", "sum", "max")] + [*largest_agreeing(deltas)]
    assert all(one.numpy().tobytes() == other.numpy().tobytes() for one, other in zip(found, plain))


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_same_deltas_are_kept(size, drop, monkeypatch):
    """Some of those that tie, all of them, or none at all; -0 and values that are not finite stay what they are."""
    deltas = (normal(4, size + 7)[:, :size] * 2).round()
    deltas[2, 1::11] = float("nan")
    deltas[3, ::4] = -0.0
    magnitude = torch.tensor([1.0, 2.0, 3.0]).view(torch.int32).numpy()
    kept = Kept(
        key_RT=np.array([[magnitude[0]], [magnitude[1]], [magnitude[2]], [np.iinfo(np.int64).max]], np.int64),
        last_RT=np.array([[0.3], [1.0], [0.7], [1.0]]),
    )
    where = Where(tasks=("a", "b", "c", "d"), tensor="x", start=123, shape=(size + 500,))
    found = kept.largest(deltas, where, drop=drop)
    monkeypatch.setattr(native, "lib", None)
    assert found.numpy().tobytes() == kept.largest(deltas, where, drop=drop).numpy().tobytes()


@pytest.mark.parametrize("gathered", [20, 1500, 1 << 18])
@pytest.mark.parametrize("wide", [False, True])
def test_keys_at_places_are_found_alike(wide, gathered, monkeypatch):
    """Keys of 32 and 64 bits that are gathered, counted and then gathered, or counted to the last bit."""
    deltas, more = (normal(2, 3000) * 8).round() / 8, normal(2, 999, seed=1)
    where = Where(tasks=("a", "b"), tensor="x", start=0, shape=(3000,))
    monkeypatch.setattr(places, "GATHERED", gathered)

    def found() -> list[np.ndarray]:
        if wide:
            keys = lambda deltas, _where: value_keys(deltas.double())  # noqa: E731
            statistic = AtPlaces(scope="model", keys=keys, places=lambda *_: (5, 2000), then=lambda found: found)
        else:
            statistic = keep_largest(scope="model", counts=lambda n, positive: (5, positive - 7))
        while hasattr(statistic, "measure"):
            first = statistic.measure(deltas, where)
            second = statistic.measure(more, Where(tasks=("a", "b"), tensor="y", start=0, shape=(999,)))
            statistic = statistic.finish(statistic.combine(first, second))
        return [statistic.key_RT, statistic.quota_RT if wide else statistic.last_RT]

    in_c = found()
    monkeypatch.setattr(native, "lib", None)
    assert all(np.array_equal(one, other) for one, other in zip(in_c, found()))


def odd_family(root: Path) -> Folders:
    """Equal tensors, all dtypes, tails of runs, ties of coarse values, one without elements, and unchanged ones."""
    base = {"a.weight": normal(70, 1100), "b.weight": normal(33), "c.weight": normal(64, 64).bfloat16()}
    base |= {"d.weight": normal(5, 1000).bfloat16(), "e.weight": normal(3, 704).half(), "f.weight": normal(0, 4)}
    base |= {"g.weight": normal(1, 1040), "h.weight": torch.zeros(96).bfloat16()}
    tasks: dict[str, dict[str, torch.Tensor]] = {f"t{k}": {} for k in range(1, 5)}
    for k, state in enumerate(tasks.values()):
        for name, value in base.items():
            state[name] = (value.float() + 0.01 * normal(*value.shape, seed=k + 1)).to(value.dtype)
        state["g.weight"] = base["g.weight"] + (3 * normal(1, 1040, seed=k + 9)).round() / 64
        state["h.weight"] = (3 * normal(96, seed=k + 9)).round().bfloat16()
    tasks["t4"]["a.weight"] = tasks["t2"]["a.weight"].clone()
    tasks["t1"]["g.weight"] = base["g.weight"].clone()
    return write_family(root, Models(base=base, tasks=tasks))


@pytest.mark.parametrize(
    "method",
    [
        "average",
        "task_arithmetic",
        "task_arithmetic:form=sum",
        "task_arithmetic:scale=0.7",
        "ties:K=0.3",
        "ties:K=1,merge=sum",
        "ties:merge=max,scope=tensor,scale=0.7",
        "emr",
        "randes",
    ],
)
def test_bundles_are_the_same_with_and_without(method, tmp_path, monkeypatch):
    """Groups of a cut, and weights cast to another dtype: the manifest, digests and distances, too."""
    folders = odd_family(tmp_path)
    make_plan(folders.base, folders.tasks, output=tmp_path / "plan.json", statistics="gram")
    ways = (
        [(None, None), (None, "bf16")] if method in ("emr", "randes") else [("1x", None), ("2x", None), ("1x", "bf16")]
    )
    made = {}
    for way in ("c", "torch"):
        if way == "torch":
            monkeypatch.setattr(native, "lib", None)
        for size, dtype in ways:
            folder = tmp_path / f"{way}-{size}-{dtype}"
            merge(tmp_path / "plan.json", folder, method=method, size=size, dtype=dtype, device="cpu")
            files = [path for path in folder.rglob("*") if path.is_file()]
            made[way, size, dtype] = {path.relative_to(folder): path.read_bytes() for path in files}
    assert all(made["c", *key] == made["torch", *key] for key in ways)


@pytest.mark.parametrize("method", ["task_arithmetic:scale=1e39", "ties:scale=1e39"])
def test_values_out_of_range_are_refused_alike(method, tmp_path, monkeypatch):
    folders = odd_family(tmp_path)
    make_plan(folders.base, folders.tasks, output=tmp_path / "plan.json", statistics="gram")
    said = []
    for way in ("c", "torch"):
        if way == "torch":
            monkeypatch.setattr(native, "lib", None)
        with pytest.raises(DataError, match="not finite as") as raised:
            merge(tmp_path / "plan.json", tmp_path / way, method=method, size="1x", device="cpu")
        said.append(str(raised.value))
    assert said[0] == said[1]
