"""Prices that follow groups as they come and go, against the parts that are made for them."""

import random
from collections.abc import Sequence

import pytest

from flexmerge_cli.allocation.allocation import Bits, Group, Unit
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.allocation.storage import store_tensor, unit_parts
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.methods.use import parse_use

from ..report.plans import synthetic_plan

METHODS = ("average", "emr", "low_bit:bits=2", "low_bit:centre=base", "low_rank:centre=base,rank=2")


def groups_of(partition: list[list[int]], bits: Sequence[Bits] | None) -> tuple[Group, ...]:
    """bits: per task, of all tasks."""
    tasks = sorted(tuple(sorted(group)) for group in partition)
    if bits is not None:
        return tuple(Group(tasks=group, method=0, bits=tuple(bits[task] for task in group)) for group in tasks)
    return tuple(Group(tasks=group, method=0 if len(group) > 1 else None) for group in tasks)


def obvious(plan: Plan, groups: tuple[Group, ...], method: str, cast: str | None) -> int:
    block, calls = plan.blocks[0], (parse_use(method).call,)
    storages = [store_tensor(plan, plan.tensor(name), groups, calls, cast) for name in block.tensors]
    unit = Unit(name=block.name, tensors=block.tensors, groups=groups)
    return sum(s.num_bytes for s in storages) + sum(p.num_bytes for p in unit_parts(plan, unit, storages, calls))


def near_the_base(seed: int) -> Plan:
    """Tasks of several dtypes; in every tensor the base has the bits of one of them, and of those equal to it."""
    plan, rng = synthetic_plan(5, 1, mixed=True, seed=seed), random.Random(seed)
    tensors = []
    for tensor in plan.tensors:
        representative = rng.choice(tensor.same)
        tensors.append(tensor.model_copy(update={"is_base": tuple(one == representative for one in tensor.same)}))
    return plan.model_copy(update={"tensors": tuple(tensors)})


@pytest.mark.parametrize("kept", [False, True], ids=["", "beside a kept adapter"])
@pytest.mark.parametrize("cast", [None, "BF16", "F32"])
@pytest.mark.parametrize("method", METHODS)
def test_a_price_is_that_of_the_parts_whatever_came_and_went_before(method, cast, kept, monkeypatch):
    """A kept adapter reads the base, which is stored for it unless a group's base or a copy has the same bits."""
    monkeypatch.setattr(Plan, "base_readers", lambda self, _tensor: (len(self.tasks),) if kept else ())
    for seed in range(8):
        plan, rng = near_the_base(seed), random.Random(seed)
        groups: tuple[Group, ...] = ()
        price = Pricer(plan).price(plan.blocks[0].tensors, (parse_use(method),), cast)
        for number in range(6):
            partition: list[list[int]] = [[] for _ in range(rng.randint(1, 5))]
            for task in range(5):
                rng.choice(partition).append(task)
            bits = rng.choices((0, 2, 4, "exact"), k=5) if method.startswith("low_bit") and number % 2 else None
            after = groups_of([group for group in partition if group], bits)
            for gone in set(groups) - set(after):
                price.take(gone)
            for new in set(after) - set(groups):
                price.put(new)
            groups = after
            assert price.num_bytes == obvious(plan, groups, method, cast), (seed, groups)
