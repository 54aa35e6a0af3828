"""Clusters in place of an order: against an independent reference, and against k-means written out on vectors."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli import load_plan, merge, open_bundle
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.clusters import spherical_kmeans, unit_gram
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.planning.make import replan
from flexmerge_cli.random import Stream, key64
from flexmerge_cli.request.merge import merge_request
from flexmerge_cli.request.plan import OrderSettings

from ..families import same_bits
from ..program import fails, succeeds

GOLDEN = Path(__file__).parents[1] / "golden"
METHODS = json.loads((GOLDEN / "methods-1.json").read_text())
CHANNELS, MODELS = METHODS["channel_merging"], METHODS["cluster"]


@pytest.fixture(scope="module")
def golden_plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "plan.json"
    succeeds("plan", "--base", GOLDEN / "family/base", "--tasks", GOLDEN / "family/tasks", "-o", path)
    return path


def labels_of(groups: Sequence[Sequence[int]]) -> list[int]:
    """Groups come by smallest task, so this is the order of first appearance."""
    return [next(label for label, group in enumerate(groups) if task in group) for task in range(sum(map(len, groups)))]


@pytest.mark.parametrize("num_clusters", CHANNELS["labels"])
def test_clusters_of_every_tensor_are_golden(num_clusters, golden_plan):
    plan = load_plan(golden_plan)
    request = merge_request(method="average", size=f"{num_clusters}x", cluster="channels", seed=CHANNELS["seed"])
    allocation = allocate(plan, request).allocation
    found = {unit.name: labels_of([group.tasks for group in unit.groups]) for unit in allocation.units}
    assert found == CHANNELS["labels"][num_clusters]


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_an_order_of_one_block_clusters_whole_models_as_golden(linkage, golden_plan):
    plan = replan(load_plan(golden_plan), OrderSettings(blocks="model", linkage=Linkage(linkage)))
    for num_clusters, expected in MODELS[f"flat/{linkage}"].items():
        allocation = allocate(plan, merge_request(method="average", size=f"{num_clusters}x")).allocation
        (unit,) = allocation.units
        assert labels_of([group.tasks for group in unit.groups]) == expected


def slow_kmeans(rows: np.ndarray, num_clusters: int, stream: Stream) -> list[int]:
    """Spherical k-means, as docs/methods.md describes it; cosines to the nearest 2^-20 as everywhere."""
    lengths = [math.sqrt(math.fsum(x * x for x in row)) for row in rows]
    units = [row / length if length > 0 else row for row, length in zip(rows, lengths)]

    def distance(row, centre):
        if not row.any() or not centre.any():
            return 0.0 if not row.any() and not centre.any() else 1.0
        cosine = math.fsum(row * centre) / math.sqrt(math.fsum(row**2) * math.fsum(centre**2))
        return 1 - round(max(-1.0, min(1.0, cosine)) * 2**20) / 2**20

    if num_clusters >= len(rows):
        return list(range(len(rows)))
    centres = [units[stream.below(len(rows))]]
    chosen = [next(task for task, unit in enumerate(units) if unit is centres[0])]
    while len(centres) < num_clusters:
        weights = [min(distance(unit, centre) for centre in centres) ** 2 for unit in units]
        x = stream.uniform()
        if sum(weights) == 0:
            chosen.append(min(task for task in range(len(rows)) if task not in chosen))
        else:
            chosen.append(min(i for i in range(len(rows)) if sum(weights[: i + 1]) > x * sum(weights)))
        centres.append(units[chosen[-1]])
    labels = None
    for _ in range(100):
        table = [[distance(unit, centre) for centre in centres] for unit in units]
        found = [row.index(min(row)) for row in table]
        for centre in range(num_clusters):
            if centre not in found:
                movable = [task for task in range(len(rows)) if found.count(found[task]) > 1]
                found[max(movable, key=lambda task: (table[task][found[task]], -task))] = centre
        if found == labels:
            break
        labels = found
        for centre in range(num_clusters):
            members = [units[task] for task in range(len(rows)) if labels[task] == centre]
            mean = np.array([math.fsum(column) for column in zip(*members)]) / len(members)
            length = math.sqrt(math.fsum(mean**2))
            centres[centre] = mean / length if length >= 1e-12 else mean * 0
    order = list(dict.fromkeys(labels))
    return [order.index(label) for label in labels]


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=8)
    ),
    num_clusters=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_kmeans_of_inner_products_is_kmeans_of_vectors(rows, num_clusters, seed):
    """Small integers: zero rows, duplicates, opposite rows and ties are drawn all the time."""
    vectors = np.array(rows, np.float64)
    lengths = np.sqrt((vectors**2).sum(axis=1))
    units = vectors / np.where(lengths > 0, lengths, 1)[:, None]
    key = key64("flexmerge/kmeans/1", seed, "w")
    found = spherical_kmeans(units @ units.T, num_clusters, Stream(key))
    assert found.tolist() == slow_kmeans(vectors, num_clusters, Stream(key))
    assert len(set(found.tolist())) == min(num_clusters, len(rows))


def test_a_zero_task_vector_is_a_row_of_zeros(odd_plan):
    plan = load_plan(odd_plan("zero_task"))
    (zero,) = [task for task, energy in enumerate(plan.task_energy()) if energy == 0]
    unit_MM = unit_gram(plan, plan.tensor("pooler.dense.weight"))
    assert not unit_MM[zero].any() and not unit_MM[:, zero].any()
    assert np.delete(unit_MM.diagonal(), zero).tolist() == [1.0] * (len(plan.tasks) - 1)


def test_a_bundle_holds_the_mean_of_every_cluster_and_copies_of_tasks_alone(family, plan, tmp_path):
    succeeds("merge", plan, "--method", "average", "--cluster", "channels", "--size", "3x", "-o", tmp_path / "b")
    bundle = open_bundle(tmp_path / "b", verify=True)
    assert bundle.manifest.allocation.fit == "channels"
    views = {task: bundle.view(task) for task in bundle.tasks}
    for unit in bundle.manifest.units:
        (name,) = unit.tensors
        assert name == unit.name and len(unit.groups) == 3
        for group in unit.groups:
            stack = torch.stack([family.models.tasks[task][name] for task in group.tasks])
            for task in group.tasks:
                if len(group.tasks) == 1:
                    assert same_bits(views[task][name], stack[0])
                else:
                    torch.testing.assert_close(views[task][name], stack.double().mean(0).float())


@pytest.mark.parametrize("method", ["ties:scope=tensor", "emr", "low_bit:centre=tsv_m", "tsv_m", "model_stock"])
def test_any_method_that_sees_one_tensor_goes_with_clusters(method, plan, tmp_path):
    merge(plan, tmp_path / "b", method=method, size="1x", cluster="channels")
    open_bundle(tmp_path / "b", verify=True)


def test_priced_bytes_of_whole_numbers_of_models(plan):
    pricer = Pricer(load_plan(plan))
    for count in (1, 2, 3, 4):
        request = merge_request(method="average", size=f"{count}x", cluster="channels")
        assert allocate(pricer.plan, request, pricer).tensor_bytes == count * pricer.plan.one_model_bytes


def test_the_seed_decides_and_the_recipe_can_say_all_of_it(golden_plan, tmp_path):
    def groups(*options):
        succeeds("merge", golden_plan, *options, "-o", tmp_path / "b", "--force")
        return open_bundle(tmp_path / "b").manifest.units

    options = ["--method", "average", "--cluster", "channels", "--size", "2x"]
    assert groups(*options) == groups(*options, "--seed", 0)
    assert groups(*options, "--seed", 1) != groups(*options, "--seed", 2)
    recipe = tmp_path / "recipe.yaml"
    tasks = {task: str(GOLDEN / "family/tasks" / task) for task in METHODS["tasks"]}
    merging = {"method": "average", "cluster": "channels", "size": "2x", "seed": 1}
    recipe.write_text(json.dumps({"version": 1, "base": str(GOLDEN / "family/base"), "tasks": tasks, "merge": merging}))
    succeeds("merge", recipe, "-o", tmp_path / "of-recipe")
    assert open_bundle(tmp_path / "of-recipe").manifest.units == groups(*options, "--seed", 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cluster", "channels", "--method", "average"], "no --size is given"),
        (["--cluster", "channels", "--method", "average", "--size", "2.5x"], "--size 2.5x is not one"),
        (["--cluster", "channels", "--method", "average", "--size", "50%"], "--size 50% is not one"),
        (["--cluster", "channels", "--method", "average", "--size", "2x", "--merges", "3"], "cuts no merge order"),
        (["--cluster", "channels", "--method", "average", "--size", "2x", "--fit", "prefix"], "cuts no merge order"),
        (
            ["--cluster", "channels", "--method", "average", "--size", "2x", "--method-for", "a=keep"],
            "cuts no merge order",
        ),
        (["--cluster", "channels", "--size", "2x"], "merges nothing unless a method is named"),
        (["--cluster", "models", "--method", "average", "--size", "2x"], "--blocks model --linkage average"),
        (["--seed", "3", "--method", "average", "--size", "2x"], "--seed has no effect here"),
        (["--cluster", "channels", "--size", "2x", "--method", "ties:K=0.3"], "ties:K=0.3,scope=tensor"),
        (["--cluster", "channels", "--size", "2x", "--method", "low_bit:centre=ties"], "needs a whole model"),
        (["--cluster", "channels", "--size", "2x", "--method", "free"], "free:mu_scope=tensor,scope=tensor"),
        (["--cluster", "channels", "--size", "2x", "--method", "model_stock:scope=block"], "needs a whole block"),
    ],
)
def test_what_clusters_cannot_do_is_refused(options, says, plan, tmp_path):
    fails(2, "merge", plan, *options, "-o", tmp_path / "b", says=says)
    assert not (tmp_path / "b").exists()
