"""`auto` is never predicted to be worse than merging by `average` in the same bytes, and merges where that is right."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flexmerge_cli import load_plan, merge, open_bundle
from flexmerge_cli.allocation import auto_allocation
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.auto_allocation import auto
from flexmerge_cli.allocation.auto_merged import merged
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.methods.use import parse_use
from flexmerge_cli.request.auto_options import Limits
from flexmerge_cli.request.merge import merge_request
from flexmerge_cli.request.size import parse_size

from .families import Models, encoder, heads, plain, same_bits, tuned
from .test_auto_bundle import measured_distance, planned

AVERAGE = parse_use("average")


def alike(noise: float, *, num_tasks: int = 3, width: int = 8) -> Models:
    """Fine-tunes of one fine-tune, each a little off it."""
    base = encoder(width=width)
    common = tuned(base, 100)
    return Models(base=base, tasks={f"task{n}": tuned(common, n + 1, size=noise) for n in range(num_tasks)})


def searched(plan: Path, size: str, **limits):
    """What `auto` finds in a size, its predicted damage, and that of merging by `average`; None if it does not fit."""
    found, loaded = auto(Pricer(load_plan(plan)).asked(merge_request(method="auto")), Limits(**limits)), load_plan(plan)
    target = parse_size(size).target(num_tasks=len(loaded.tasks), one_model_bytes=loaded.one_model_bytes)
    other = merged(Cutter(found.pricer, AVERAGE), found.search, target)
    chosen = found.cut(target)
    return chosen, chosen.solution.cost, other and other[0].cost


@pytest.mark.parametrize("noise", [1e-6, 1e-3])
def test_tasks_that_differ_by_noise_are_merged_if_coding_would_cost_more(noise, tmp_path):
    plan = planned(alike(noise), tmp_path)
    found, own, other = searched(plan, "1x")
    assert own <= other
    assert (found.layout.allocation.methods == (AVERAGE,)) == (noise < 1e-5)


def test_a_bundle_of_noisy_copies_is_that_of_average(tmp_path):
    models = alike(1e-6)
    plan = planned(models, tmp_path)
    for method in ("auto", "average"):
        merge(plan, tmp_path / method, method=method, size="1x", device="cpu")
    of_auto, of_average = (open_bundle(tmp_path / method) for method in ("auto", "average"))
    assert of_auto.manifest.stored_bytes == of_average.manifest.stored_bytes
    for task, state in models.tasks.items():
        assert all(same_bits(of_auto.view(task)[name], of_average.view(task)[name]) for name in state)


def test_equal_tasks_are_stored_once_and_exactly(tmp_path):
    found, own, _ = searched(planned(alike(0.0), tmp_path), "1x")
    assert own == 0 and found.layout.tensor_bytes == found.layout.plan.one_model_bytes


@pytest.mark.parametrize("models", [plain(), alike(1e-4), heads()], ids=["plain", "near", "heads"])
def test_it_is_never_predicted_to_be_worse_than_merging(models, tmp_path):
    plan, fits = planned(models, tmp_path), 0
    for size in ("1x", "1.3x", "60%", "40kB"):
        _, own, other = searched(plan, size)
        fits += other is not None
        assert other is None or own <= other
    assert fits


def test_the_predicted_error_of_a_merge_is_the_measured_one(tmp_path):
    models = plain()
    plan = planned(models, tmp_path)
    loaded = load_plan(plan)
    found = auto(Pricer(loaded).asked(merge_request(method="auto")), Limits())
    size = parse_size("2x").target(num_tasks=4, one_model_bytes=loaded.one_model_bytes)
    solution, layout = merged(Cutter(found.pricer, AVERAGE), found.search, size)
    merge(plan, tmp_path / "bundle", method="average", size="2x", device="cpu")
    assert layout.allocation == allocate(loaded, merge_request(method="average", size="2x")).allocation
    measured = [measured_distance(tmp_path / "bundle", models, task) for task in models.tasks]
    assert found.search.distances(solution) == pytest.approx(np.array(measured), rel=1e-4)
    assert solution.num_bytes == layout.tensor_bytes


@pytest.mark.parametrize("limits", [{"min_bits": 1}, {"centres": ("base",)}])
def test_limits_that_exclude_merging_are_kept(limits, tmp_path):
    found, own, other = searched(planned(alike(1e-6), tmp_path), "1x", **limits)
    assert AVERAGE not in found.layout.allocation.methods and own > other


def test_tasks_that_have_little_in_common_are_coded_where_squared_error_would_merge_them(tmp_path):
    """Residuals of less than one bit lose most of their energy, but a merge loses all of it."""
    base = encoder(layers=1, width=64, dtype=torch.bfloat16)
    models = Models(base=base, tasks={f"task{n:02}": tuned(base, n + 1) for n in range(32)})
    loaded = load_plan(planned(models, tmp_path))
    search = auto(Pricer(loaded).asked(merge_request(method="auto")), Limits())
    size = parse_size("1x").target(num_tasks=32, one_model_bytes=loaded.one_model_bytes)
    solution, _ = merged(Cutter(search.pricer, AVERAGE), search.search, size)
    found = search.cut(size)
    assert found.layout.allocation.methods != (AVERAGE,)
    assert found.solution.cost < solution.cost
    squared = [
        sum(np.dot(t.weight_M, c.errors) for t, c in zip(search.search.tables, s.choices))
        for s in (found.solution, solution)
    ]
    assert squared[0] > squared[1]


def test_a_merge_that_moves_a_task_off_the_base_is_within_no_distance(tmp_path, monkeypatch):
    """Such a task has no distance: a merge is not taken, however little damage is predicted."""
    models = alike(1e-2, width=48)
    models.tasks["task0"] = models.base
    loaded = load_plan(planned(models, tmp_path))
    found = auto(Pricer(loaded).asked(merge_request(method="auto")), Limits())
    size = parse_size("1x").target(num_tasks=3, one_model_bytes=loaded.one_model_bytes)
    solution, layout = merged(Cutter(found.pricer, AVERAGE), found.search, size)
    assert np.isnan(found.search.distances(solution)).tolist() == [True, False, False]
    monkeypatch.setattr(auto_allocation, "merged", lambda *_: (replace(solution, cost=-1.0), layout))
    assert (found.search.distances(found.within(0.9).solution) <= 0.9).all()


def test_without_a_size_a_merge_must_keep_the_distance_too(tmp_path):
    loaded = load_plan(planned(alike(1e-6, width=48), tmp_path))
    search = auto(Pricer(loaded).asked(merge_request(method="auto")), Limits())
    near, far = search.within(1e-3), search.within(0.2)
    assert near.layout.allocation.methods == (AVERAGE,) and (search.search.distances(near.solution) <= 1e-3).all()
    assert far.layout.total_bytes < near.layout.total_bytes
