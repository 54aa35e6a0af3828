"""The orders of an independent reference implementation, for a family of eight small CLIP vision models.

golden/order.json holds the orders, with sizes in elements after every step; golden/family the models.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import Strategy, count_near_ties, groups_after, merge_order
from flexmerge_cli.order.similarity import Similarity, similarity

from .measures import measure_of

GOLDEN = Path(__file__).parents[1] / "golden"
ORDER = json.loads((GOLDEN / "order.json").read_text())
EDGE = ORDER["edge"]

# Similarities of the file have 9 digits, and are compared in steps of this.
STEP = 2.0**-20


@pytest.fixture(scope="module")
def blocks():
    base = load_file(GOLDEN / "family/base/model.safetensors")
    tasks = [load_file(GOLDEN / f"family/tasks/{task}/model.safetensors") for task in ORDER["tasks"]]
    measures = []
    for block in ORDER["blocks"]:
        names = sorted(name for name in base if name == block or name.startswith(f"{block}."))
        deltas = [np.concatenate([(task[name] - base[name]).ravel() for name in names]) for task in tasks]
        measures.append(measure_of(np.stack(deltas), name=block))
    return measures


def idealised_size(groups, num_elements, *, masked):
    """Elements that one block stores; masked groups of three and more: centre, one-bit masks and, once, the base."""
    if not masked:
        return num_elements * len(groups)
    sizes = [len(group) for group in groups]
    large = [k for k in sizes if k >= 3]
    dense = sum(k for k in sizes if k < 3)
    return num_elements * (dense + sum(1 + k / 32 for k in large) + bool(large))


def sizes_of(measures, merges, *, masked):
    groups = groups_after(len(measures), measures[0].num_tasks, merges)
    return sum(idealised_size(of, measure.num_elements, masked=masked) for of, measure in zip(groups, measures))


def assert_is_golden(merges, measures, steps):
    names = [measure.name for measure in measures]
    assert len(merges) == len(steps)
    for number, (merge, step) in enumerate(zip(merges, steps), 1):
        assert (names[merge.block], list(merge.left), list(merge.right)) == (step["block"], step["left"], step["right"])
        assert merge.similarity == pytest.approx(step["similarity"], rel=0, abs=STEP)
        assert sizes_of(measures, merges[:number], masked=False) == step["plain"]
        assert sizes_of(measures, merges[:number], masked=True) == step["masked"]


def test_family_is_that_of_the_golden_file(blocks):
    assert {measure.name: measure.num_elements for measure in blocks} == ORDER["elements"]
    assert sum(measure.num_elements for measure in blocks) == ORDER["total_elements_one_model"]


def test_cosines_are_golden(blocks):
    for measure in blocks:
        cosine = similarity(measure, Similarity.COSINE)
        assert np.allclose(cosine, ORDER["cosine"][measure.name], rtol=0, atol=1e-9)


# `order_trimmed` compares trimmed vectors, as the released code does; ours are always the task vectors.
@pytest.mark.parametrize("name", [name for name, order in ORDER["orders"].items() if order["vectors"] == "deltas"])
def test_order_is_golden(blocks, name):
    order = ORDER["orders"][name]
    merges = merge_order(
        blocks,
        linkage=Linkage(order["linkage"]),
        strategy=Strategy(order["strategy"].replace("_", "-")),
        similarity=Similarity(order["metric"]),
        seed=order.get("seed", 0),
    )
    assert_is_golden(merges, blocks, order["steps"])


@pytest.mark.parametrize("linkage", EDGE["steps"])
def test_ties_and_zero_vectors_are_golden(linkage):
    measures = [measure_of(np.array(EDGE["deltas"][block]), name=block) for block in EDGE["blocks"]]
    assert_is_golden(merge_order(measures, linkage=Linkage(linkage)), measures, EDGE["steps"][linkage])


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_targets_are_reached_after_the_golden_number_of_merges(blocks, kind):
    merges = merge_order(blocks)
    one_model = sum(measure.num_elements for measure in blocks)
    sizes = [sizes_of(blocks, merges[:number], masked=kind == "masked") for number in range(len(merges) + 1)]
    for target, expected in ORDER["targets"][kind].items():
        fits = [number for number, size in enumerate(sizes) if size <= float(target) * one_model]
        assert (fits[0] if fits else None) == expected


def test_no_merge_of_the_family_is_nearly_tied(blocks):
    assert count_near_ties(merge_order(blocks)) == 0
