"""Cuts of one plan: what fits, what is kept, what is undone, and that no cut is wasteful."""

import itertools
import random

import pytest

from flexmerge_cli import load_plan, make_plan
from flexmerge_cli.allocation.allocation import from_groups
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.methods.use import parse_use
from flexmerge_cli.order.order import groups_after
from flexmerge_cli.request.choices import Fit
from flexmerge_cli.request.size import parse_size

from ..families import Models, encoder, normal, tuned, write_family

METHODS = ("average", "ties", "emr", "consensus")


@pytest.fixture(scope="module")
def pricer(tmp_path_factory):
    """Four tasks, a head of each task's own; wide enough for masks to weigh less than copies."""
    base = encoder(width=16)
    tasks = {f"task{n}": tuned(base, n + 1) | {"classifier.bias": normal(n, n + 2)} for n in range(4)}
    folders = write_family(tmp_path_factory.mktemp("wide"), Models(base=base, tasks=tasks))
    return Pricer(make_plan(folders.base, folders.tasks))


def cutter(pricer, method):
    return Cutter(pricer, parse_use(method))


def cut(pricer, method, text, fit=Fit.TIGHT):
    size = parse_size(text).target(num_tasks=len(pricer.plan.tasks), one_model_bytes=pricer.plan.one_model_bytes)
    return cutter(pricer, method).cut(size, fit), size


def cost(pricer, allocation, size):
    layout = pricer.layout(allocation)
    return layout.total_bytes if size.on_disk else layout.tensor_bytes


def undos(pricer, allocation):
    """Every allocation with one merge fewer: a group of a unit goes back to the two that its last merge joined."""
    joined = {(merge.block, tuple(sorted(merge.left + merge.right))): merge for merge in pricer.plan.order}
    groups = [[group.tasks for group in unit.groups] for unit in allocation.units]
    for place, unit in enumerate(allocation.units):
        for group in groups[place]:
            if len(group) > 1:
                merge = joined[unit.name, group]
                changed = sorted([g for g in groups[place] if g != group] + [merge.left, merge.right])
                yield from_groups(
                    pricer.plan,
                    [*groups[:place], changed, *groups[place + 1 :]],
                    methods=allocation.methods,
                    dtype=allocation.dtype,
                    merges=allocation.merges - 1,
                    undone=allocation.undone + 1,
                    fit=allocation.fit,
                )


def merges_of(allocation, num_tasks):
    return sum(num_tasks - len(unit.groups) for unit in allocation.units)


def targets(pricer, method, kind, count, seed):
    """Between the smallest and all apart, and a little beyond."""
    made = cutter(pricer, method)
    least, most = pricer.layout(made.smallest()), pricer.layout(made.prefix(0))
    draw = random.Random(seed)
    if kind == "bytes":
        return [f"{draw.randint(least.total_bytes, most.total_bytes + 500)}B" for _ in range(count)]
    one = pricer.plan.one_model_bytes
    low = least.tensor_bytes / one
    return [f"{draw.uniform(low + 1e-3, len(pricer.plan.tasks)):.3f}x" for _ in range(count)]


@pytest.mark.parametrize("kind", ["bytes", "factor"])
@pytest.mark.parametrize("method", METHODS)
def test_a_tight_cut_fits_and_no_undo_of_it_does(method, kind, pricer):
    for text in targets(pricer, method, kind, 12, seed=method + kind):
        allocation, size = cut(pricer, method, text)
        assert cost(pricer, allocation, size) <= size.max_bytes, text
        assert allocation.merges == merges_of(allocation, 4)
        for fewer in undos(pricer, allocation):
            assert cost(pricer, fewer, size) > size.max_bytes, text


@pytest.mark.parametrize("method", METHODS)
def test_a_prefix_is_the_shortest_that_fits(method, pricer):
    made = cutter(pricer, method)
    for text in targets(pricer, method, "bytes", 8, seed=7) + targets(pricer, method, "factor", 8, seed=8):
        allocation, size = cut(pricer, method, text, Fit.PREFIX)
        assert (allocation.undone, allocation.fit) == (0, "prefix")
        groups = groups_after(len(pricer.plan.blocks), 4, pricer.plan.merges()[: allocation.merges])
        assert [[group.tasks for group in unit.groups] for unit in allocation.units] == groups
        fits = [
            number
            for number in range(len(pricer.plan.order) + 1)
            if cost(pricer, made.prefix(number), size) <= size.max_bytes
        ]
        assert allocation.merges == fits[0], text


@pytest.mark.parametrize("method", METHODS)
def test_a_larger_target_never_loses_more_merges_of_the_prefix(method, pricer):
    found = [cut(pricer, method, f"{factor}x", Fit.PREFIX)[0].merges for factor in (2.6, 3, 3.4, 3.8, 4)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_1x_is_the_whole_order_and_4x_none_of_it(pricer):
    for method in ("average", "ties"):
        for fit in Fit:
            assert cut(pricer, method, "1x", fit)[0].merges == len(pricer.plan.order)
            assert cut(pricer, method, "4x", fit)[0].merges == 0
            assert cut(pricer, method, "100%", fit)[0].merges == 0
            assert cut(pricer, method, "900GB", fit)[0].merges == 0


def test_an_unreachable_size_names_the_smallest_and_that_is_reached(pricer):
    """The smallest in tensor data. Where masks are stored the manifest may yet shrink by undoing a merge."""
    for method, fit in itertools.product(METHODS, Fit):
        made = cutter(pricer, method)
        with pytest.raises(GateError, match="its smallest is") as raised:
            cut(pricer, method, "1B", fit)
        least = int(raised.value.message.split(", ")[1].split("B on disk")[0])
        allocation, size = cut(pricer, method, f"{least}B", fit)
        assert cost(pricer, allocation, size) <= least
        if method in ("average", "ties"):
            assert cost(pricer, allocation, size) == least
            with pytest.raises(GateError):
                cut(pricer, method, f"{least - 1}B", fit)
        factor = raised.value.hint.split()[1].removesuffix(",")
        allocation, size = cut(pricer, method, factor, fit)
        assert cost(pricer, allocation, size) == pricer.layout(made.smallest()).tensor_bytes


def test_merges_are_counted_from_none_to_all(pricer):
    made = cutter(pricer, "average")
    assert made.prefix(0).merges == 0
    assert made.prefix(len(pricer.plan.order)).merges == len(pricer.plan.order)
    for number in (-1, len(pricer.plan.order) + 1):
        with pytest.raises(UsageError, match="is outside 0 to"):
            made.prefix(number)


def test_sizes_are_those_of_the_layouts(pricer):
    for method in METHODS:
        made = cutter(pricer, method)
        assert made.sizes() == [pricer.layout(made.prefix(n)).tensor_bytes for n in range(len(pricer.plan.order) + 1)]


def test_the_smallest_has_the_fewest_merges_among_equals(odd_plan):
    """Merges of equal tensors save nothing: deduplication was there before."""
    for name in ("all_zero", "one_task", "private_only"):
        assert Cutter(Pricer(load_plan(odd_plan(name))), parse_use("average")).smallest().merges == 0
    pricer = Pricer(load_plan(odd_plan("duplicates")))
    made = Cutter(pricer, parse_use("average"))
    sizes = made.sizes()
    assert made.smallest().merges == sizes.index(min(sizes)) > 0


def test_merges_that_save_nothing_are_undone(odd_plan):
    """task0 and task2 are one model: to merge them is free, and so it is not done."""
    pricer = Pricer(load_plan(odd_plan("duplicates")))
    allocation, _ = cut(pricer, "average", "1.8x")
    unit_groups = {unit.name: [group.tasks for group in unit.groups] for unit in allocation.units}
    assert all((0, 2) not in groups for groups in unit_groups.values())
    assert any(len(group) > 1 for groups in unit_groups.values() for group in groups)


@pytest.mark.parametrize("method", ["emr", "consensus"])
def test_masked_pairs_are_copies(method, pricer):
    for number in range(len(pricer.plan.order) + 1):
        layout = pricer.layout(cutter(pricer, method).prefix(number))
        for storage in layout.storages.values():
            for group in storage.groups:
                assert group.method is None or len(group.tasks) > 2
