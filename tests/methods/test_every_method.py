"""What must hold of every method and step of the registry, at its defaults and at each word it takes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods import places
from flexmerge_cli.methods.registry import (
    all_calibrations,
    all_methods,
    all_steps,
    format_call,
    make_calibration,
    parse_call,
    parse_step,
)

from .drawn import few, rows
from .driver import Family, family_of, merge
from .variants import CALLS, STEPS

# The merge of the tasks depends on their order, which is alphabetical.
ORDERED = {"opcm"}

BLOCKS = {
    "layer": ("layer.bias", "layer.conv", "layer.empty", "layer.weight"),
    "rest": ("embed.weight", "norm", "scale"),
}
SHAPES = {
    "embed.weight": (9, 4),
    "layer.bias": (7,),
    "layer.conv": (3, 2, 2, 2),
    "layer.empty": (0, 3),
    "layer.weight": (7, 5),
    "norm": (1,),
    "scale": (),
}


def small_family(tasks="abcde"):
    """Ties of magnitude, exact cancellations, a zero row, a constant row and a zero task (the last)."""
    generator = np.random.default_rng(0)
    deltas = {}
    for name, shape in SHAPES.items():
        value = (generator.integers(-8, 9, (5, *shape)) / 64).astype(np.float32)
        value[-1] = 0
        deltas[name] = torch.from_numpy(value)
    deltas["layer.weight"][:, 0] = 0
    deltas["layer.weight"][:, 1] = torch.tensor([0.25, -0.25, 0.25, 0.5, 0]).view(5, 1)
    deltas["layer.weight"][1, 2] = -deltas["layer.weight"][0, 2]
    rows_of = ["abcde".index(task) for task in tasks]
    return Family(tasks=tuple(tasks), deltas={name: value[rows_of] for name, value in deltas.items()}, blocks=BLOCKS)


def flat(merged, tasks):
    """Unified and what the tasks get, in one vector."""
    values = [
        *(value.unified for value in merged.values()),
        *(of.tasks[task] for of in merged.values() for task in tasks),
    ]
    return torch.cat([value.flatten() for value in values])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", CALLS)
def test_chunks_do_not_show(name, chunk):
    family = small_family()
    whole = flat(merge(family, CALLS[name], bypass=False), family.tasks)
    assert torch.equal(whole, flat(merge(family, CALLS[name], chunk=chunk, bypass=False), family.tasks))


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.statistics is not None])
def test_counting_digits_gives_what_gathering_gives(name, monkeypatch):
    family = small_family()
    gathered = flat(merge(family, CALLS[name], bypass=False), family.tasks)
    monkeypatch.setattr(places, "GATHERED", 0)
    assert torch.equal(gathered, flat(merge(family, CALLS[name], chunk=23, bypass=False), family.tasks))


@pytest.mark.parametrize("name", CALLS)
def test_shapes_are_kept_and_nothing_is_changed_in_place(name):
    family = small_family()
    before = {tensor: value.clone() for tensor, value in family.deltas.items()}
    merged = merge(family, CALLS[name], bypass=False)
    assert {tensor: tuple(value.unified.shape) for tensor, value in merged.items()} == SHAPES
    assert torch.isfinite(flat(merged, family.tasks)).all()
    assert all(torch.equal(before[tensor], value) for tensor, value in family.deltas.items())
    assert torch.equal(flat(merged, family.tasks), flat(merge(family, CALLS[name], bypass=False), family.tasks))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "pcb-scope=model"])  # all set its thresholds
def test_tasks_outside_the_group_do_not_show(name):
    of_all = merge(small_family(), CALLS[name], group="ace", bypass=False)
    alone = merge(small_family("ace"), CALLS[name], bypass=False)
    assert torch.equal(flat(of_all, "ace"), flat(alone, "ace"))


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.method.name not in ORDERED])
def test_order_of_tasks_does_not_show(name):
    in_order = flat(merge(small_family(), CALLS[name], bypass=False), "abcde")
    shuffled = flat(merge(small_family("dbeca"), CALLS[name], bypass=False), "abcde")
    assert (in_order - shuffled).abs().max() <= 2e-6 * in_order.abs().max()


@pytest.mark.parametrize("name", CALLS)
def test_zeros_merge_to_zero(name):
    family = family_of({tensor: torch.zeros(3, *shape) for tensor, shape in SHAPES.items()}, blocks=BLOCKS)
    assert not flat(merge(family, CALLS[name], bypass=False), family.tasks).any()


@pytest.mark.parametrize("name", CALLS)
def test_group_of_one_and_identical_tensors_keep_every_bit(name):
    family = small_family()
    same = family.deltas["layer.weight"]
    same[:] = same[0].clone()
    alone = merge(family, CALLS[name], group="b")
    assert all(torch.equal(value.tasks["b"], family.deltas[tensor][1]) for tensor, value in alone.items())
    together = merge(family, CALLS[name])["layer.weight"]
    assert all(torch.equal(value, same[0]) for value in together.tasks.values())


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.method.gives_masks])
def test_masked_pairs_are_copies(name):
    family = small_family()
    merged = merge(family, CALLS[name], group="ab")
    assert all(value.unified is None for value in merged.values())
    assert all(torch.equal(value.tasks["b"], family.deltas[tensor][1]) for tensor, value in merged.items())


sides = st.sampled_from([0, 1, 2, 99])
shapes = st.one_of(st.just(()), st.tuples(sides), st.tuples(sides, st.sampled_from([0, 1, 2, 9])), st.just((2, 1, 3)))
kinds = st.sampled_from(["any", "zero task", "duplicate", "constant", "tiny"])
elements = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-8, 8, width=32))


@st.composite
def families(draw):
    """One tensor of two to four tasks."""
    deltas = draw(rows(draw(st.integers(2, 4)), draw(shapes), elements)).clone()
    kind = draw(kinds)
    if kind == "zero task":
        deltas[0] = 0
    elif kind == "duplicate":
        deltas[1] = deltas[0]
    elif kind == "constant":
        deltas[:] = torch.arange(len(deltas)).view(-1, *[1] * (deltas.ndim - 1)) - 1.0
    elif kind == "tiny":
        deltas *= 1e-30
    return family_of({"layer.weight": deltas})


@pytest.mark.parametrize("name", CALLS)
@few
@given(family=families())
def test_result_is_finite_and_of_the_right_shape(name, family):
    merged = merge(family, CALLS[name], bypass=False)["layer.weight"]
    assert merged.unified.shape == family.deltas["layer.weight"].shape[1:]
    assert torch.isfinite(merged.unified).all()
    assert all(torch.isfinite(value).all() for value in merged.tasks.values())


@pytest.mark.parametrize("name", CALLS)
def test_calibration_follows_or_says_why_not(name):
    family, call = small_family(), CALLS[name]
    calibrate = make_calibration(all_calibrations()["svc"], {})
    if call.method.gives_masks or call.method.name in ("iso_c", "iso_cts"):
        with pytest.raises(UsageError, match="cannot follow"):
            calibrate.require_after(call)
        return
    calibrate.require_after(call)
    merged = merge(family, call, calibrate=calibrate, bypass=False)
    plain = merge(family, call, bypass=False)
    assert torch.isfinite(flat(merged, family.tasks)).all()
    assert all(
        torch.equal(merged[name].unified, plain[name].unified) for name in ("embed.weight", "layer.bias", "scale")
    )


def stepped(family, step, chunk=1 << 30):
    """The stepped task vectors by tensor and task: groups of one that are merged all the same."""
    return {
        (tensor, task): value.unified
        for task in family.tasks
        for tensor, value in merge(
            family, parse_call("average"), group=task, steps=[step], chunk=chunk, bypass=False
        ).items()
    }


@pytest.mark.parametrize(
    ("name", "chunk"), [(name, chunk) for number, name in enumerate(STEPS) for chunk in (7, (1, 1000)[number % 2])]
)
def test_chunks_do_not_show_in_steps(name, chunk):
    whole, cut = stepped(small_family(), STEPS[name]), stepped(small_family(), STEPS[name], chunk)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_of_a_task_alone(name):
    of_all, of_some = stepped(small_family(), STEPS[name]), stepped(small_family("eca"), STEPS[name])
    assert all(torch.equal(of_all[key], of_some[key]) for key in of_some)
    assert not any(value.any() for (_, task), value in of_all.items() if task == "e")  # the zero task


@pytest.mark.parametrize("name", STEPS)
@few
@given(family=families())
def test_a_stepped_delta_is_finite(name, family):
    assert all(torch.isfinite(value).all() for value in stepped(family, STEPS[name]).values())


@pytest.mark.parametrize("name", all_methods())
def test_declarations_are_complete(name):
    method = all_methods()[name]
    assert method.origin is None
    assert method.summary.endswith(".")
    assert method.paper
    assert method.when
    for parameter in method.parameters.values():
        if parameter.default is not None:
            assert parameter.check(parameter.default, name) == parameter.default


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_is_read_as_it_is_written(call):
    given = {key: value for key, value in call.args.items() if value is not None}
    assert parse_call(format_call(call.method.name, given)) == call


@pytest.mark.parametrize("call", STEPS.values(), ids=STEPS)
def test_a_step_is_read_as_it_is_written(call):
    given = {key: value for key, value in call.args.items() if value is not None}
    assert parse_step(format_call(call.step.name, given)) == call
    assert all_steps()[call.step.name].summary.endswith(".")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CALLS)
def test_cuda_gives_what_the_cpu_gives(name):
    family = small_family()
    on_device = Family(
        tasks=family.tasks, deltas={tensor: value.cuda() for tensor, value in family.deltas.items()}, blocks=BLOCKS
    )
    expected = flat(merge(family, CALLS[name], bypass=False), family.tasks)
    found = flat(merge(on_device, CALLS[name], bypass=False), family.tasks)
    assert found.is_cuda
    assert (found.cpu() - expected).abs().max() <= 2e-6 * expected.abs().max()
