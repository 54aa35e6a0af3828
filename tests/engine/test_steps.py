"""Steps, calibration and methods by block, through the engine: who sees which task vectors, and that no cut shows."""

import numpy as np
import pytest
import torch

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.methods.registry import format_call, parse_call, parse_step

from ..families import Models, encoder, normal, same_bits, tuned
from ..methods.variants import STEPS
from ..program import fails, succeeds, tree
from .merges import WHOLE, billed, fine_tunes, mixed, plan_of, planned, write
from .reference import given_back

STEP_TEXTS = [format_call(call.step.name, call.args) for call in STEPS.values()]
AFTER = (
    "average",
    "emr",
    "tall_masks",
    "consensus:K=0.5",
    "consensus_original",
    "low_bit:bits=4",
    "sparse:density=0.2",
)
SEVERAL = (
    (("dare:p=0.5", "trim:K=0.5"), "ties:K=0.5"),
    (("trim:K=0.5,scope=tensor", "breadcrumbs:beta=0.5,scope=block"), "pcb:K=0.5,scope=whole"),
    (("trim:K=0.5,scope=block", "dare:p=0.3"), "consensus:K=0.4,scope=model"),
    (("fr:cutoff=0.3", "magprune"), "emr"),
    (("fr:variant=code", "trim:K=0.7,scope=tensor"), "opcm"),
    (("trim:K=0.7,scope=tensor",), "model_stock:scope=block"),
    (("trim:K=0.7,scope=tensor",), "emr:gamma=tensor_mean"),
    (("dare:p=0.5", "magprune:scope=tensor"), "sce:scope=block"),
)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return planned(tmp_path_factory.mktemp("eight"), fine_tunes())


@pytest.fixture(scope="module")
def eight_mixed(tmp_path_factory):
    return planned(tmp_path_factory.mktemp("mixed"), mixed())


def assert_as_in_memory(folders, layout, target):
    bundle = open_bundle(write(folders, layout, target))
    assert verify(target, decode=True).bad == {}
    for task, state in given_back(folders.models, layout).items():
        view = bundle.view(task)
        assert [name for name, value in state.items() if not same_bits(view[name], value)] == [], task
    return bundle


@pytest.mark.parametrize("step", STEP_TEXTS)
def test_a_step_before_any_kind_of_method_gives_what_it_gives_in_memory(step, eight_mixed, tmp_path):
    """Kinds take turns by block: plain, masked, voted, with residuals."""
    assert_as_in_memory(eight_mixed, billed(plan_of(eight_mixed), *AFTER, steps=(step,)), tmp_path / "bundle")


@pytest.mark.parametrize("method", AFTER)
def test_a_dropping_step_before_a_method_gives_what_it_gives_in_memory(method, eight, tmp_path):
    assert_as_in_memory(eight, billed(plan_of(eight), method, steps=("dare:p=0.5",)), tmp_path / "bundle")


@pytest.mark.parametrize(("steps", "method"), SEVERAL, ids=lambda value: value if isinstance(value, str) else None)
def test_statistics_are_of_what_the_steps_before_have_left(steps, method, eight, tmp_path):
    """Also of tensors that the method itself does not merge: one block here has no group."""
    assert_as_in_memory(eight, billed(plan_of(eight), method, steps=steps), tmp_path / "bundle")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Tensors that a chunk of 1024 elements cuts, in rows that it does not divide."""
    shapes = {
        "encoder.layer.0.attention.self.query.weight": (45, 47),
        "encoder.layer.0.attention.self.query.bias": (2111,),
        "encoder.layer.1.intermediate.dense.weight": (130, 515),
    }
    base = {name: normal(number, *shape) for number, (name, shape) in enumerate(shapes.items())}
    models = Models(base=base, tasks={name: tuned(base, n + 1) for n, name in enumerate("abcd")})
    return planned(tmp_path_factory.mktemp("long"), models)


@pytest.mark.parametrize("step", STEP_TEXTS)
def test_steps_do_not_show_how_tensors_were_cut(step, long, tmp_path):
    groups = [[(0, 1, 2, 3)], [(0, 2, 3), (1,)]]
    plan = plan_of(long)
    layout = billed(plan, "emr", "low_bit:bits=3", groups=groups[: len(plan.blocks)], steps=(step,))
    one = write(long, layout, tmp_path / "one", threads=1, chunk_elements=1024)
    other = write(long, layout, tmp_path / "other", threads=3, chunk_elements=WHOLE)
    assert tree(one) == tree(other)


def test_what_dare_drops_does_not_hang_on_other_tasks(long, tmp_path):
    """Two tasks among four, whose names end up at other places, and the two alone."""
    models = long.models
    alone = planned(tmp_path / "alone", Models(base=models.base, tasks={name: models.tasks[name] for name in "db"}))
    request = {"steps": ("dare:p=0.5,seed=3",)}
    four = [[(0, 2), (1, 3)]] * len(plan_of(long).blocks)
    among = write(long, billed(plan_of(long), "average", groups=four, **request), tmp_path / "among")
    two = [[(0, 1)]] * len(plan_of(alone).blocks)
    apart = write(alone, billed(plan_of(alone), "average", groups=two, **request), tmp_path / "apart", threads=2)
    for name in models.base:
        found = open_bundle(apart).view("b")[name]
        assert same_bits(found, open_bundle(among).view("d")[name])
        kept = found != models.base[name]
        assert 0.6 < kept.double().mean() < 0.9  # an element stays unless both tasks drop it


def bundle_with_plan(folders, tmp_path, *arguments):
    succeeds("merge", folders.root / "plan.json", *arguments, "-o", tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


def test_residuals_are_of_the_whole_task_whatever_the_centre_lost(eight, tmp_path):
    """dare leaves a centre of noise; eight bits of what is missing to it bring every task back."""
    plain, noise = (
        open_bundle(write(eight, billed(plan_of(eight), "low_bit:bits=8", steps=steps), tmp_path / str(len(steps))))
        for steps in ((), ("dare:p=0.9",))
    )
    distances = [[task.distance for task in bundle.manifest.tasks.values()] for bundle in (plain, noise)]
    assert max(distances[0]) < 0.02 < 10 * max(distances[1]) < 1


@pytest.mark.parametrize("method", ["task_arithmetic", "consensus", "low_bit"])
def test_distances_are_to_the_task_as_it_is(method, eight, tmp_path):
    bundle = open_bundle(write(eight, billed(plan_of(eight), method, steps=("dare:p=0.3",)), tmp_path / "bundle"))
    base = eight.models.base
    for task, state in eight.models.tasks.items():
        view, names = bundle.view(task), [name for unit in bundle.manifest.units for name in unit.tensors]
        lost = sum(float((view[name].double() - state[name].double()).square().sum()) for name in names)
        moved = sum(float((state[name] - base[name]).double().square().sum()) for name in names)
        assert bundle.manifest.tasks[task].distance == pytest.approx((lost / moved) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("steps", [(), ("dare:p=0.5",), ("fr",)])
@pytest.mark.parametrize("method", ["average", "ties", "tsv_m", "opcm", "magmax", "low_bit:centre=tsv_m"])
def test_calibration_sees_the_unstepped_task_vectors(method, steps, eight, tmp_path):
    layout = billed(plan_of(eight), method, steps=steps, calibrate="svc:alpha=0.3")
    bundle = assert_as_in_memory(eight, layout, tmp_path / "bundle")
    assert bundle.manifest.methods[0].calibrate.startswith("svc:alpha=0.3")
    assert bundle.manifest.methods[0].steps == tuple(format_call(s.step.name, s.args) for s in map(parse_step, steps))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("iso_c", "all singular values are equal"),
        ("iso_cts", "all singular values are equal"),
        ("low_bit:centre=iso_c", "all singular values are equal"),
        ("emr", "gives each task its own"),
        ("bitdelta", "merges nothing"),
        ("low_bit:centre=none", "merges nothing"),
    ],
)
def test_calibration_of_what_cannot_be_calibrated_is_refused(method, says, eight, tmp_path):
    plan = eight.root / "plan.json"
    fails(
        2, "merge", plan, "--method", method, "--calibrate", "svc", "-o", tmp_path / "b", says=("cannot follow", says)
    )
    assert not (tmp_path / "b").exists()


def test_methods_by_block_and_blocks_that_are_kept(eight, tmp_path):
    """The first pattern that fits holds; what is kept has no merges and comes back bit by bit."""
    bundle = bundle_with_plan(
        eight, tmp_path, "--method", "ties:K=0.3", "--method-for", "*.mlp=low_bit:bits=3",
        "--method-for", "embeddings.*=keep", "--method-for", "*LayerNorm=keep", "--method-for", "embeddings.*=emr",
    )  # fmt: skip
    methods = [method.name for method in bundle.manifest.methods]
    found = {}
    for unit in bundle.manifest.units:
        for group in unit.groups:
            found.setdefault(unit.name, set()).add("copy" if group.method is None else methods[group.method])
            for task in group.tasks if "embeddings" in unit.name or "LayerNorm" in unit.name else ():
                assert group.tasks == (task,) and group.distance[task] == 0
                for name in unit.tensors:
                    assert same_bits(bundle.view(task)[name], eight.models.tasks[task][name])
    assert found["encoder.layer.0.mlp"] == {"low_bit"}
    assert found["encoder.layer.0.attention"] == found["pooler.dense"] == {"ties"}
    assert "emr" not in set().union(*found.values())
    assert verify(tmp_path / "bundle", decode=True).bad == {}


def test_a_pattern_that_no_block_matches_is_refused(eight, tmp_path):
    plan = eight.root / "plan.json"
    arguments = ("merge", plan, "--method", "ties", "--method-for", "decoder.*=keep", "-o", tmp_path / "b")
    fails(2, *arguments, says="decoder.*")


def test_a_step_goes_before_every_method_of_a_bundle(tmp_path):
    """The step does not come before the copies: dare by p = 0.9 would be seen."""
    base = encoder(layers=1)
    folders = planned(tmp_path, Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(3)}))
    layout = billed(plan_of(folders), "average", "tsv_m", groups=[[(0, 1), (2,)]] * 7, steps=("dare:p=0.9",))
    bundle = assert_as_in_memory(folders, layout, tmp_path / "bundle")
    assert [len(method.steps) for method in bundle.manifest.methods] == [1, 1]
    for name, value in folders.models.tasks["task2"].items():
        assert same_bits(bundle.view("task2")[name], value)
    word = "embeddings.word_embeddings.weight"
    moved = bundle.view("task0")[word] != base[word]
    assert 0 < moved.double().mean() < 0.4


def test_votes_and_masks_are_of_the_unstepped_task_vectors(tmp_path):
    """Written out: u is made of what dare left, |τ| > λ |u - τ| is asked of τ as it was."""
    base = encoder(layers=1)
    models = Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(3)})
    folders, step = planned(tmp_path, models), parse_step("dare:p=0.5")
    blocks = plan_of(folders).blocks
    layout = billed(plan_of(folders), "tall_masks", groups=[[(0, 1, 2)]] * len(blocks), steps=("dare:p=0.5",))
    bundle = open_bundle(write(folders, layout, tmp_path / "bundle"))
    name = "encoder.layer.0.intermediate.dense.weight"
    deltas = torch.stack([models.tasks[task][name] - base[name] for task in sorted(models.tasks)])
    where = bundle_where(name, deltas.shape[1:])
    stepped = step(deltas.flatten(1), where).view(deltas.shape)
    unified = stepped.double().sum(0).float()
    lam = parse_call("tall_masks").args["lam"]
    for row, task in enumerate(sorted(models.tasks)):
        takes = deltas[row].double().abs() > lam * (unified.double() - deltas[row].double()).abs()
        assert same_bits(bundle.view(task)[name], torch.where(takes, base[name] + unified, base[name]))
    assert np.isfinite([task.distance for task in bundle.manifest.tasks.values()]).all()


def bundle_where(name, shape):
    from flexmerge_cli.methods.method import Where

    return Where(tasks=("task0", "task1", "task2"), tensor=name, start=0, shape=tuple(shape))
