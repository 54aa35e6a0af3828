"""Steps: what they keep, and what still sees the task vectors as they were."""

import math

import numpy as np
import pytest
import torch

from flexmerge_cli.methods.method import Where
from flexmerge_cli.methods.registry import parse_call, parse_step
from flexmerge_cli.random import key64, uniform

from .driver import family_of, merge

NAME = "vision_model.encoder.layers.0.self_attn.q_proj.weight"


def where(start=0, tasks=("cars",), shape=(8,)):
    return Where(tasks=tasks, tensor=NAME, start=start, shape=shape)


def test_an_element_is_dropped_by_seed_task_tensor_and_index_alone():
    deltas = torch.ones(2, 1000)
    numbers = [uniform(key64("flexmerge/drop/1", 7, task, NAME), 5, 1000) for task in ("cars", "dtd")]
    found = parse_step("dare:p=0.5,seed=7")(deltas, where(start=5, tasks=("cars", "dtd"), shape=(1005,)))
    assert torch.equal(found, torch.from_numpy(np.where(np.stack(numbers) < 0.5, 0.0, 2.0).astype(np.float32)))


def test_dare_keeps_the_mean():
    found = parse_step("dare:p=0.9")(torch.ones(1, 100_000), where(shape=(100_000,)))
    assert found.mean().item() == pytest.approx(1, abs=0.05)  # five standard deviations
    assert set(found.unique().tolist()) == {0.0, 10.0}


def test_magprune_drops_the_small_more_often():
    deltas = torch.linspace(1, 2, 100_000).view(1, 1, -1)
    found = parse_step("magprune:p=0.3,window=0.5,rescale=false")(deltas, where(shape=(1, 100_000)))
    dropped = (found == 0).view(10, -1).double().mean(1)
    assert dropped[0].item() == pytest.approx(0.525, abs=0.02)
    assert dropped[-1].item() == pytest.approx(0.075, abs=0.02)
    kept = found != 0
    assert torch.equal(found[kept], deltas[kept])


@pytest.mark.parametrize("step", ["trim:K=0.5,scope=tensor", "breadcrumbs:gamma=0.2,beta=0.5"])
def test_a_step_before_the_plain_merge_is_the_method(step):
    family = family_of({"w": torch.randn(3, 40, generator=torch.Generator().manual_seed(0))})
    method = {"trim": "ties:K=0.5,scope=tensor", "breadcrumbs": "breadcrumbs:gamma=0.2,beta=0.5"}[step.split(":")[0]]
    plain = {"trim": "ties:K=1.0", "breadcrumbs": "task_arithmetic:form=sum"}[step.split(":")[0]]
    stepped = merge(family, parse_call(plain), steps=[parse_step(step)])["w"].unified
    assert torch.equal(stepped, merge(family, parse_call(method))["w"].unified)


def test_steps_apply_in_order():
    family = family_of({"w": torch.randn(3, 40, generator=torch.Generator().manual_seed(0))})
    dare, trim = parse_step("dare:p=0.5"), parse_step("trim:K=0.2,scope=tensor")
    one, other = (
        merge(family, parse_call("average"), steps=steps)["w"].unified for steps in ([dare, trim], [trim, dare])
    )
    assert (one != 0).sum() != (other != 0).sum()  # trimming what was dropped keeps more of what is left


@pytest.mark.parametrize("method", ["tall_masks", "consensus", "consensus:on=task_arithmetic"])
def test_masks_compare_the_unstepped_deltas_with_the_stepped_merge(method):
    generator = torch.Generator().manual_seed(0)
    family, dare, call = (
        family_of({"w": torch.randn(4, 50, generator=generator)}),
        parse_step("dare:p=0.5"),
        parse_call(method),
    )
    merged = merge(family, call, steps=[dare])["w"]
    tau, u = family.deltas["w"].double(), merged.unified.double()
    masks = tau.abs() > call.args["lam"] * (u - tau).abs()
    for task, mask in zip(family.tasks, masks):
        assert torch.equal(merged.tasks[task], (mask * u).float())


def test_votes_are_of_the_unstepped_deltas():
    family = family_of({"w": torch.randn(4, 50, generator=torch.Generator().manual_seed(0))})
    merged = merge(family, parse_call("consensus_original"), steps=[parse_step("dare:p=0.5")])["w"].unified
    stepped = parse_step("dare:p=0.5")(
        family.deltas["w"], Where(tasks=family.tasks, tensor="w", start=0, shape=(50,))
    ).double()
    total, tau = stepped.sum(0), family.deltas["w"].double()
    votes = (tau.abs() > 0.4 * (total.float() - tau).abs()).sum(0)
    assert torch.allclose(merged.double(), 0.3 * total * (votes >= 2), atol=1e-6)


def test_masks_and_factors_of_emr_see_the_stepped_deltas():
    family = family_of({"w": torch.randn(4, 50, generator=torch.Generator().manual_seed(0))})
    merged = merge(family, parse_call("emr"), steps=[parse_step("dare:p=0.5")])["w"]
    stepped = parse_step("dare:p=0.5")(family.deltas["w"], Where(tasks=family.tasks, tensor="w", start=0, shape=(50,)))
    for task, delta in zip(family.tasks, stepped):
        assert not merged.tasks[task][delta == 0].any()
        assert merged.tasks[task].abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-5)


def test_a_group_of_one_is_not_stepped():
    family = family_of({"w": torch.ones(3, 50)})
    merged = merge(family, parse_call("average"), group="b", steps=[parse_step("dare")])["w"]
    assert torch.equal(merged.tasks["b"], torch.ones(50))


@pytest.mark.parametrize("step", ["dare:p=0.6", "magprune:p=0.6", "magprune:p=0.6,scope=tensor"])
@pytest.mark.parametrize("shape", [(40, 30), (50,), (6, 5, 4), (1, 1), (0, 3)])
def test_l1_scales_each_tensor_to_the_norm_that_it_had(step, shape):
    """As in mergekit, what is kept is that of rescale=false, times one factor a task."""
    deltas = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    deltas[1] *= 1e-6
    family = family_of({"w": deltas})
    places = Where(tasks=family.tasks, tensor="w", start=0, shape=shape)
    l1, plain = (parse_step(f"{step},rescale={rescale}") for rescale in ("l1", "false"))
    found = l1(deltas, places)
    row = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    kept = plain(deltas.view(2, math.prod(shape) // row, row) if plain.scope == "row" else deltas, places)
    kept = kept.view(deltas.shape)
    for task in range(2):
        norm = kept[task].abs().double().sum()
        factor = deltas[task].abs().double().sum() / norm if norm > 0 else 1.0
        assert torch.equal(found[task], (kept[task].double() * factor).float()) or torch.allclose(
            found[task].double(), kept[task].double() * factor, rtol=1e-6
        )


def test_della_of_mergekit_has_the_norms_of_the_tasks():
    deltas = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0))
    family = family_of({"w": deltas})
    by_rate, by_norm = (merge(family, parse_call(f"della:p=0.5,merge=sum,rescale={r}"))["w"] for r in ("true", "l1"))
    step = parse_step("magprune:p=0.5,rescale=l1")
    stepped = merge(family, parse_call("ties:K=1.0,merge=sum"), steps=[step])["w"]
    assert torch.equal(by_norm.unified, stepped.unified) and not torch.equal(by_norm.unified, by_rate.unified)
