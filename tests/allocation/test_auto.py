import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.allocation.auto import Search, search
from flexmerge_cli.allocation.auto_centres import CODED, AutoCentre, factors
from flexmerge_cli.allocation.auto_hull import frontier, hull
from flexmerge_cli.allocation.auto_statistics import LOST, TensorStatistics, partitions, weights
from flexmerge_cli.allocation.auto_table import AutoTable
from flexmerge_cli.errors import GateError
from flexmerge_cli.request.auto_options import Limits
from flexmerge_cli.residuals.coding_error import NORMAL_RATIOS, CodingError

from ..calls import num_calls
from . import auto_reference as reference

SHAPES = [(), (1,), (9,), (3, 4), (16, 7), (1, 5, 3), (64, 64), (2000, 64)]


def tensor_of(name, shape, num_tasks, rng, *, dtypes="F32", same=None, is_base=(), still=(), base_is_stored=False):
    """Statistics as of random weights; tasks that are said to be equal have equal task vectors.

    is_base: tasks with the base's bits, cast to their dtype; still: those whose task vectors are zero besides.
    base_is_stored: as beside kept adapters of a base in float32.
    """
    same = tuple(same or range(num_tasks))
    dtypes = (dtypes,) * num_tasks if isinstance(dtypes, str) else tuple(dtypes)
    vectors = rng.standard_normal((num_tasks, 5)) * 10 ** rng.uniform(-2, 0, (num_tasks, 1))
    vectors += rng.standard_normal(5) / 10
    vectors = np.stack([vectors[first] for first in same])
    for task in (*is_base, *still):
        vectors[task] = 0
    energy = float(np.prod(shape)) * 10 ** rng.uniform(-3, -1)

    def drawn(scale):
        return {bits: scale * ratio * rng.uniform(0.7, 1.3) for bits, ratio in NORMAL_RATIOS.items()}

    def weight_errors():
        return {bits: error for bits, error in drawn(energy).items() if bits > 1}

    return TensorStatistics(
        name=name,
        shape=shape,
        base_dtype="F32",
        dtypes=dtypes,
        gram=vectors @ vectors.T,
        same=same,
        is_base=tuple(task in is_base for task in range(num_tasks)),
        errors=CodingError(base=weight_errors(), average=weight_errors(), ratio=drawn(1.0)),
        base_is_stored=base_is_stored,
        copy_is_stored=tuple(base_is_stored and k in is_base and dtype == "F32" for k, dtype in enumerate(dtypes)),
    )


def random_levels(num_tasks, rng):
    groups, merges = [(task,) for task in range(num_tasks)], []
    while len(groups) > 1:
        left, right = sorted(rng.choice(len(groups), 2, replace=False))
        merges.append((groups[left], groups[right]))
        groups[left] = tuple(sorted(groups[left] + groups.pop(right)))
    return partitions(num_tasks, merges)


@st.composite
def families(draw, max_tasks=4, max_tensors=3):
    """Tensors by block, and levels of the blocks; some tasks equal, some or all as the base, some in bfloat16."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_tasks = draw(st.integers(1, max_tasks))
    tensors, block_of = [], {}
    for number in range(draw(st.integers(1, max_tensors))):
        representatives = [draw(st.integers(0, task)) for task in range(num_tasks)]
        same = [first if representatives[first] == first else task for task, first in enumerate(representatives)]
        unmoved = draw(st.sets(st.sampled_from(sorted(set(same)))))
        is_base = draw(st.sets(st.sampled_from(sorted(unmoved)))) if unmoved else set()
        name = draw(st.sampled_from([f"layer.{number}", f"tok_embeddings.{number}", f"wte.{number}"]))
        kinds = draw(st.lists(st.sampled_from(["F32", "BF16"]), min_size=num_tasks, max_size=num_tasks))
        tensors.append(
            tensor_of(
                name,
                draw(st.sampled_from(SHAPES)),
                num_tasks,
                rng,
                dtypes=[kinds[first] for first in same],
                same=same,
                is_base=[task for task in range(num_tasks) if same[task] in is_base],
                still=[task for task in range(num_tasks) if same[task] in unmoved],
                base_is_stored=draw(st.booleans()),
            )
        )
        block_of[name] = f"block.{draw(st.integers(0, 1))}"
    levels = {block: random_levels(num_tasks, rng) for block in sorted(set(block_of.values()))}
    return tensors, block_of, levels


def reference_tables(tensors, block_of, levels):
    weight = weights(tensors, block_of)
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    return [reference.table(tensor, levels[block_of[tensor.name]], weight[tensor.name]) for tensor in ordered]


@settings(deadline=None, max_examples=40)
@given(families(), st.floats(0, 1.1))
def test_it_equals_the_plain_reference(family, place):
    found, tables = search(*family), reference_tables(*family)
    most = sum(max(point[0] for row in rows for point in reference.curve(row)) for rows in tables)
    budget = int(found.smallest_bytes + place * (most - found.smallest_bytes))
    expected = reference.solve(tables, budget)
    solution = found.solve(budget)
    assert solution.num_bytes == sum(state[0] for state in expected)
    assert solution.cost == pytest.approx(sum(state[1] for state in expected), rel=1e-9, abs=1e-12)
    assert reference.solve(tables, found.smallest_bytes - 1) is None


@settings(deadline=None, max_examples=40)
@given(families(), st.sampled_from(["none", "base", "average"]))
def test_the_curves_of_every_kind_of_centre_equal_the_plain_ones(family, kind):
    found, tables = search(*family, Limits(centres=(kind,))), reference_tables(*family)
    for table, rows in zip(found.tables, tables):
        allowed = [row for row in rows if row[0][0] == kind or table.tensor.is_unchanged] or rows[:1]
        points = [point for row in allowed for point in reference.curve(row)]
        kept = frontier_states(points)
        assert table.num_bytes.tolist() == [point[0] for point in kept]
        assert table.cost == pytest.approx(np.array([point[1] for point in kept]), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(families(max_tasks=3, max_tensors=2))
def test_no_combination_of_options_lies_below_the_hull(family):
    found, tables = search(*family), reference_tables(*family)
    for table, rows in zip(found.tables, tables):
        num_bytes, cost = table.num_bytes[table.vertices], table.cost[table.vertices]
        for state in reference.every_state(rows):
            assert state[0] >= num_bytes[0]
            below = np.interp(state[0], num_bytes, cost)
            assert state[1] >= below * (1 - 1e-9) - 1e-12


@settings(deadline=None, max_examples=10)
@given(families(max_tasks=2, max_tensors=2))
def test_what_no_fill_has_touched_is_optimal_for_its_bytes(family):
    found, tables = search(*family), reference_tables(*family)
    states = [frontier_states(reference.every_state(rows)) for rows in tables]
    together = np.array([[sum(s[0] for s in c), sum(s[1] for s in c)] for c in itertools.product(*states)])
    prefixes = np.cumsum(np.concatenate([[found.smallest_bytes], found._segments[1]]))
    for budget in prefixes.astype(int).tolist():
        solution = found.solve(budget)
        assert solution.num_bytes == budget
        within = together[together[:, 0] <= budget]
        assert solution.cost == pytest.approx(within[:, 1].min(), rel=1e-9, abs=1e-12)


def frontier_states(states):
    num_bytes, cost = np.array([state[0] for state in states]), np.array([state[1] for state in states])
    return [states[index] for index in frontier(num_bytes, cost)]


@settings(deadline=None, max_examples=40)
@given(families(), st.floats(0, 1))
def test_what_is_left_buys_nothing_more(family, place):
    found = search(*family)
    most = sum(int(table.num_bytes[-1]) for table in found.tables)
    budget = int(found.smallest_bytes + place * (most - found.smallest_bytes))
    solution = found.solve(budget)
    assert solution.num_bytes <= budget
    left = budget - solution.num_bytes
    for choice, rows in zip(solution.choices, reference_tables(*family)):
        cost = next(table for table in found.tables if table.tensor.name == choice.tensor)
        now = cost.cost[np.flatnonzero(cost.num_bytes == choice.num_bytes)[0]]
        better = [p for row in rows for p in reference.curve(row) if p[1] < now * (1 - 1e-9) - 1e-15]
        assert all(point[0] - choice.num_bytes > left for point in better)


@settings(deadline=None, max_examples=40)
@given(families(), st.lists(st.floats(0, 1), min_size=2, max_size=6), st.sampled_from([0, 3]))
def test_choices_add_up_and_more_bytes_never_cost_more_at_the_vertices(family, places, min_bits):
    found = search(*family, Limits(min_bits=min_bits))
    bought = np.concatenate([[found.smallest_bytes], found._segments[1]]).cumsum()
    budgets = sorted({int(bought[int(place * (len(bought) - 1))]) for place in places})
    solutions = [found.solve(budget) for budget in budgets]
    weight = weights(family[0], family[1])
    tables = {tensor.name for tensor in family[0] if tensor.may_drop}  # priced by what is lost, not by longer rows
    for solution in solutions:
        assert solution.num_bytes == sum(choice.num_bytes for choice in solution.choices)
        predicted = sum(weight[choice.tensor] * sum(choice.errors) for choice in solution.choices)
        assert solution.cost == pytest.approx(sum(choice.cost for choice in solution.choices))
        assert solution.cost <= predicted * (LOST + 1e-9) + 1e-12
        for choice in solution.choices:
            least = weight[choice.tensor] * sum(choice.errors)
            assert choice.tensor in tables or least * (1 - 1e-9) - 1e-12 <= choice.cost
        near = solution.cost <= 1.1 * predicted + 1e-12
        assert near or min_bits < 3  # little is lost in 3 bits or more
    costs = [solution.cost for solution in solutions]
    assert costs == sorted(costs, reverse=True)


@settings(deadline=None, max_examples=40)
@given(families(), st.sampled_from([Limits(min_bits=2), Limits(max_bits=3), Limits(min_bits=4, max_bits=4)]))
def test_limits_on_bits_are_kept(family, limits):
    found = search(*family, limits)
    for place in (0.0, 0.3, 1.0):
        most = sum(int(table.num_bytes[-1]) for table in found.tables)
        solution = found.solve(int(found.smallest_bytes + place * (most - found.smallest_bytes)))
        for tensor, choice in zip(found.tables, solution.choices):
            free = choice.centre.kind == "base" and choice.centre.bits == "dense"
            for task, bits in enumerate(choice.bits):
                is_centre = free and tensor.tensor.is_base[task]
                assert bits == "exact" or limits.min_bits <= bits <= limits.max_bits or (is_centre and bits == 0)


@pytest.mark.parametrize("kind", ["none", "base", "average"])
def test_limits_on_centres_are_kept(kind):
    rng = np.random.default_rng(0)
    tensor = tensor_of("w", (64, 64), 4, rng)
    found = search([tensor], {"w": "w"}, {"w": random_levels(4, rng)}, Limits(centres=(kind,)))
    assert {found.solve(int(share * found.smallest_bytes)).choices[0].centre.kind for share in (1, 1.5, 4)} == {kind}


def test_a_lost_part_costs_more_the_more_is_lost_up_to_a_bound():
    layer, table = (tensor_of(name, (2000, 64), 2, np.random.default_rng(0)) for name in ("layer", "embed_tokens"))
    losses = np.linspace(0, 1, 1001)
    prices = np.array([layer.price(loss) for loss in losses])
    assert prices[0] == 0 and prices[-1] == LOST and (np.diff(prices) > 0).all()
    assert layer.price(0.5) == 1 and layer.price(0.2) == pytest.approx(0.25)
    assert np.diff(prices).max() < 4  # it has no leap
    assert [table.price(loss) for loss in losses] == losses.tolist()


def test_residuals_are_dropped_in_large_embedding_tables_alone():
    rng = np.random.default_rng(0)
    cases = {
        "model.embed_tokens.weight": (1000, 500),
        "transformer.wte.weight": (2000, 64),
        "Shared.weight": (2000, 64),
        "embed.small": (999, 64),
        "embed.wide": (1000, 501),
        "wtele.weight": (2000, 64),
        "model.layers.0.weight": (2000, 64),
    }
    dropped = {name for name, shape in cases.items() if tensor_of(name, shape, 2, rng).may_drop}
    assert dropped == {"model.embed_tokens.weight", "transformer.wte.weight", "Shared.weight"}


def test_a_task_that_is_the_base_costs_nothing_on_a_dense_base():
    tensor = tensor_of("w", (64, 64), 2, np.random.default_rng(0), is_base=(1,))
    found = search([tensor], {"w": "w"}, {"w": partitions(2, [((0,), (1,))])}, Limits(centres=("base",)))
    (choice,) = found.solve(10**6).choices
    assert choice.bits[1] == 0
    assert choice.errors == (0.0, 0.0)
    assert choice.num_bytes == 2 * 4 * 64 * 64


def test_a_distance_that_rounding_makes_negative_is_the_least_that_counts():
    """Nearly equal tasks of large task vectors: the Gram matrix tells their distance no more, and a copy is exact."""
    tensor = tensor_of("w", (64, 64), 2, np.random.default_rng(0))
    tensor = replace(tensor, gram=np.array([[1.0, 1.0 + 1e-12], [1.0 + 1e-12, 1.0]]))
    kinds, factors_CK = factors(tensor, [AutoCentre(kind="average", groups=((0, 1),))])
    assert kinds.tolist() == [[CODED, CODED]]
    assert factors_CK.tolist() == [[1e-12, 1e-12]]
    found = search([tensor], {"w": "w"}, {"w": partitions(2, [((0,), (1,))])})
    assert found.solve(2 * 4 * 64 * 64).choices[0].bits == ("exact", "exact")


def test_equal_tasks_are_paid_once():
    tensor = tensor_of("w", (64, 64), 3, np.random.default_rng(0), same=(0, 1, 0))
    found = search([tensor], {"w": "w"}, {"w": random_levels(3, np.random.default_rng(0))}, Limits(centres=("none",)))
    (choice,) = found.solve(10**6).choices
    assert choice.bits == ("exact",) * 3
    assert choice.num_bytes == 2 * 4 * 64 * 64


@settings(deadline=None, max_examples=60)
@given(families(), st.floats(0, 1), st.sampled_from([Limits(), Limits(max_bits=2), Limits(centres=("average",))]))
def test_what_no_task_has_moved_is_exact_and_stored_once_at_every_size(family, place, limits):
    found = search(*family, limits)
    solution = found.solve(int(found.smallest_bytes + place * sum(int(t.num_bytes[-1]) for t in found.tables)))
    for table, choice in zip(found.tables, solution.choices):
        tensor = table.tensor
        if not np.diag(tensor.gram).any():
            assert choice.errors == (0.0,) * len(tensor.same)
            assert all(bits == "exact" or (bits == 0 and tensor.is_base[k]) for k, bits in enumerate(choice.bits))
            distinct = sum(reference.exact_bytes(tensor, task) for task in set(tensor.same))
            assert choice.num_bytes <= distinct
            if all(tensor.is_base):
                assert choice.num_bytes <= reference.base_bytes(tensor)


def test_rounding_to_another_dtype_is_no_fine_tuning():
    """A task in bfloat16 of a base in float32: its task vector is not zero, and still it is the base."""
    tensor = tensor_of("w", (64, 64), 2, np.random.default_rng(0), dtypes=["F32", "BF16"], is_base=(0, 1))
    tensor = replace(tensor, gram=np.diag([0.0, 1e-3]))
    (choice,) = search([tensor], {"w": "w"}, {"w": partitions(2, [((0,), (1,))])}).solve(4 * 64 * 64).choices
    assert (choice.centre, choice.bits, choice.errors) == (AutoCentre(kind="base"), (0, 0), (0.0, 0.0))


def test_float64_is_no_copy_of_a_dense_base_which_readers_cast_to_float32():
    tensor = tensor_of("w", (64, 64), 2, np.random.default_rng(0), dtypes=["F64", "F32"], is_base=(0, 1))
    tensor = replace(tensor, base_dtype="F64")
    (choice,) = search([tensor], {"w": "w"}, {"w": partitions(2, [((0,), (1,))])}).solve(10**6).choices
    assert choice.bits == ("exact", "exact")


@settings(deadline=None, max_examples=60)
@given(families(), st.floats(1, 1.5))
def test_where_exact_copies_fit_nothing_is_lost(family, times):
    found = search(*family)
    exact = sum(reference.exact_bytes(tensor, task) for tensor in family[0] for task in set(tensor.same))
    solution = found.solve(int(times * exact))
    assert found.distances(solution).tolist() == [0.0] * len(family[0][0].same)
    for table, choice in zip(found.tables, solution.choices):
        assert all(bits == "exact" or (bits == 0 and table.tensor.is_base[k]) for k, bits in enumerate(choice.bits))


def test_energies_too_small_for_their_product_have_a_weight():
    tensor = replace(tensor_of("w", (64, 64), 2, np.random.default_rng(0)), gram=np.diag([1e-200, 1e-200]))
    assert 0 < weights([tensor], {"w": "w"})["w"] < np.inf


def test_a_budget_below_the_smallest_size_names_it():
    tensor = tensor_of("w", (64, 64), 2, np.random.default_rng(0))
    found = search([tensor], {"w": "w"}, {"w": partitions(2, [((0,), (1,))])})
    with pytest.raises(GateError, match=f"{found.smallest_bytes:,}"):
        found.solve(found.smallest_bytes - 1)


def test_no_tensors_cost_nothing():
    solution = Search([]).solve(0)
    assert (solution.choices, solution.num_bytes, solution.cost) == ((), 0, 0)


@settings(deadline=None, max_examples=40)
@given(families(), st.floats(0, 1), st.integers(0, 999))
def test_a_price_above_the_choices_is_never_exceeded(family, place, overhead):
    found = search(*family)

    def price(solution):
        """Headers, say: something for every part, and a name that has one digit more or less."""
        return solution.num_bytes + overhead + sum(len(str(choice.bits)) for choice in solution.choices)

    smallest = price(found.solve(found.smallest_bytes))
    limit = smallest + place * sum(int(table.num_bytes[-1]) for table in found.tables)
    solution = found.solve_priced(limit, price)
    assert price(solution) <= limit
    least = price(found.smallest_priced(price))
    assert least <= smallest and price(found.solve_priced(least, price)) <= least
    with pytest.raises(GateError, match=f"{least:,}"):
        found.solve_priced(least - 1, price)


@settings(deadline=None, max_examples=60)
@given(families(), st.floats(0, 1), st.integers(0, 400))
def test_no_better_choice_of_one_tensor_fits_a_price_with_headers(family, place, header):
    found = search(*family)

    def price(solution):
        """A header for every array, so that exact copies and fewer centres save some."""
        codes = sum(bits not in ("exact", 0) for choice in solution.choices for bits in choice.bits)
        centres = sum(len(choice.centre.groups) for choice in solution.choices)
        return solution.num_bytes + header * (codes + centres)

    smallest = price(found.solve(found.smallest_bytes))
    limit = smallest + place * sum(int(table.num_bytes[-1]) for table in found.tables)
    solution = found.solve_priced(limit, price)
    assert price(solution) <= limit
    assert all(price(better) > limit for better in single_improvements(found, solution))


def single_improvements(found, solution):
    """Solutions that store one tensor better, by any point of its frontier."""
    for number, (table, choice) in enumerate(zip(found.tables, solution.choices)):
        now = table.num_bytes.tolist().index(choice.num_bytes)
        for point in range(now + 1, len(table.num_bytes)):
            choices = (*solution.choices[:number], table.choice(point), *solution.choices[number + 1 :])
            yield replace(solution, choices=choices, num_bytes=sum(choice.num_bytes for choice in choices))


def test_trials_are_bounded_however_many_tensors_there_are():
    rng = np.random.default_rng(0)
    tensors = [tensor_of(f"t{number:03}", (64, 64), 2, rng) for number in range(200)]
    found = search(tensors, dict.fromkeys((t.name for t in tensors), "b"), {"b": random_levels(2, rng)})
    calls = []

    def price(solution):
        calls.append(solution)
        return solution.num_bytes + 500 * sum(bits != "exact" for choice in solution.choices for bits in choice.bits)

    found.solve_priced(1.2 * price(found.solve(found.smallest_bytes)), price)
    assert len(calls) < 80  # a dozen rounds of growth price twice, and 20 trials


def test_what_better_choices_save_in_headers_is_spent():
    rng = np.random.default_rng(0)
    tensors = [tensor_of(f"t{number}", (64, 64), 2, rng) for number in range(6)]
    found = search(tensors, dict.fromkeys((t.name for t in tensors), "b"), {"b": partitions(2, [((0,), (1,))])})

    def price(solution):
        return solution.num_bytes + 500 * sum(bits != "exact" for choice in solution.choices for bits in choice.bits)

    smallest, exact = found.solve(found.smallest_bytes), found.solve(10**9)
    for share in (0.6, 0.8, 1.0):
        limit = share * price(exact)
        solution, plain = (
            found.solve_priced(limit, price),
            found.solve(int(limit - price(smallest)) + smallest.num_bytes),
        )
        assert price(solution) <= limit
        assert solution.cost < plain.cost
    assert solution == exact


@settings(deadline=None, max_examples=40)
@given(families(), st.sampled_from([0.0, 0.01, 0.1, 0.35, 2.0]))
def test_predicted_distances_stay_under_a_limit_and_one_step_less_does_not(family, limit):
    found = search(*family)

    def holds(solution):
        distances = found.distances(solution)
        return bool((distances**2 <= limit**2 * (1 + 1e-12)).all())  # nan, of a task that is the base and is not exact

    solution = found.solve_distance(limit)
    reached = np.concatenate([[found.smallest_bytes], found._segments[1]]).cumsum().tolist()
    assert holds(solution) or solution.num_bytes == reached[-1]
    if solution.num_bytes > found.smallest_bytes:
        before = max(num_bytes for num_bytes in reached if num_bytes < solution.num_bytes)
        assert not holds(found.solve(before))


def test_a_uniform_plan_is_priced_from_the_same_table():
    rng = np.random.default_rng(0)
    matrix, vector = tensor_of("m", (64, 64), 3, rng), tensor_of("v", (64,), 3, rng)
    levels = {"b": partitions(3, [((0,), (1,)), ((0, 1), (2,))])}
    family = [matrix, vector], {"m": "b", "v": "b"}, levels
    num_bytes, cost = search(*family).uniform(centre_bits=4, bits=1)
    matrix_bytes = (2 * 64 + 64 * 32) + 3 * (2 * 64 + 64 * 8)
    assert num_bytes == matrix_bytes + 4 * (2 + 64)
    rows = {row[0]: row[2] for row in reference_tables(*family)[0]}
    vector_rows = {row[0]: row[2] for row in reference_tables(*family)[1]}
    expected = [cost for options in rows["average", 1, 4] for _, cost, bits in options if bits == 1]
    expected += [cost for options in vector_rows["average", 1, 8] for _, cost, bits in options if bits == 8]
    assert cost == pytest.approx(sum(expected))


POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6).map(float)), max_size=12)  # many equal, many in line


@settings(deadline=None, max_examples=300)
@given(POINTS)
def test_hull_and_frontier_equal_the_plain_ones(points):
    num_bytes, cost = np.array([p[0] for p in points], np.int64), np.array([p[1] for p in points], np.float64)
    assert [points[index] for index in hull(num_bytes, cost)] == [tuple(p) for p in reference.hull(points)]
    kept = [points[index] for index in frontier(num_bytes, cost)]
    assert kept == sorted({p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)})


def test_of_equal_points_the_first_is_taken():
    assert frontier(np.array([3, 3, 1, 1]), np.array([1.0, 1.0, 2.0, 2.0])).tolist() == [2, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("num_tensors", "num_tasks"), [(50, 8), (100, 8), (200, 8), (50, 30)])
def test_work_grows_with_tensors_and_tasks_and_no_faster(num_tensors, num_tasks):
    """About 300 calls for each: a fifth of a second for a hundred tensors of eight tasks."""
    rng = np.random.default_rng(0)
    tensors = [tensor_of(f"t{number:03}", (768, 768), num_tasks, rng) for number in range(num_tensors)]
    levels = random_levels(num_tasks, rng)

    def run():
        found = Search([AutoTable(tensor, levels, 1.0) for tensor in tensors])
        for share in (1.0, 1.3, 2.0):
            found.solve(int(share * found.smallest_bytes))

    assert num_calls(run) < 600 * num_tensors * num_tasks


def test_thirty_tasks_of_16_bits_fit_into_one_model():
    rng = np.random.default_rng(0)
    tensor = tensor_of("w", (768, 768), 30, rng, dtypes=["BF16"] * 30)
    family = [tensor], {"w": "w"}, {"w": random_levels(30, rng)}
    one = 2 * 768 * 768
    assert search(*family).smallest_bytes < 0.55 * one
    (choice,) = search(*family).solve(one).choices
    assert 0 not in choice.bits  # every task keeps something of its own
    assert search(*family, Limits(min_bits=1)).smallest_bytes > 2 * one


@settings(deadline=None, max_examples=20)
@given(families(), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_with_importances_a_cost_is_the_part_of_the_bases_loss_that_tasks_have(family, seed, place):
    tensors, block_of, levels = family
    rng = np.random.default_rng(seed)
    some = [replace(tensor, importance=rng.uniform(0.1, 9, len(tensor.same))) for tensor in tensors]
    weight, plain = weights(some, block_of), weights(tensors, block_of)
    energies = {tensor.name: np.maximum(np.diag(tensor.gram), 0) for tensor in some}
    counted = [tensor for tensor in some if plain[tensor.name] > 0]
    assert all(np.all(weight[tensor.name] == 0) for tensor in some if plain[tensor.name] == 0)
    if not counted:
        return
    of_base = sum(tensor.importance * energies[tensor.name] for tensor in counted)
    parts = sum(weight[tensor.name] * energies[tensor.name] for tensor in counted)
    assert parts[of_base > 0] == pytest.approx(1)
    found = search(some, block_of, levels)
    most = sum(int(table.num_bytes[-1]) for table in found.tables)
    solution = found.solve(int(found.smallest_bytes + place * (most - found.smallest_bytes)))
    tables = {tensor.name for tensor in some if tensor.may_drop}  # priced by what is lost, not by longer rows
    predicted = 0.0
    for choice in solution.choices:
        least = float(np.dot(np.broadcast_to(weight[choice.tensor], len(choice.errors)), choice.errors))
        assert choice.tensor in tables or least * (1 - 1e-9) - 1e-12 <= choice.cost
        assert choice.cost <= least * (LOST + 1e-9) + 1e-12
        predicted += least
    assert solution.cost == pytest.approx(sum(choice.cost for choice in solution.choices))
    few = any(bits != "exact" and 0 <= bits < 3 for choice in solution.choices for bits in choice.bits)
    near = solution.cost <= 1.1 * predicted + 1e-12
    assert near or few  # little is lost in 3 bits or more
    # Tensors that were not measured weigh as without, times what the others have in the middle.
    half = [some[0], *tensors[1:]]
    if plain[some[0].name] > 0:
        factor = float(np.mean(weights(half, block_of)[some[0].name])) / plain[some[0].name]
        expected = {tensor.name: factor * plain[tensor.name] for tensor in tensors[1:]}
        assert {name: weights(half, block_of)[name] for name in expected} == pytest.approx(expected)
