"""The same of families whose tensors are not simply there: vocabularies that differ, and adapters."""

from pathlib import Path

import torch

from flexmerge_cli import load_plan
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.view import View
from flexmerge_cli.evaluation.in_memory import MemoryBundles
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.evaluation.planned import planned_models
from flexmerge_cli.planning.sources import open_sources
from flexmerge_cli.request.merge import merge_request

from .. import adapters
from ..engine.merges import write_bundle
from ..families import assert_same_state
from ..program import succeeds
from ..test_adapters import CONFIGS
from ..test_vocabulary import WORDS, family
from .test_in_memory import assert_same_bundle


def assert_as_written(path: Path) -> None:
    plan = load_plan(path)
    pricer = Pricer(plan)
    sources = open_sources(plan, path.parent)
    run = {"device": torch.device("cpu"), "threads": 1}
    made = MemoryBundles(sources=sources.located, **run)
    for method in ("average", "emr", "low_bit:bits=2,centre_bits=8", None):
        layout = allocate(plan, merge_request(method=method), pricer)
        target = path.with_name(f"{path.stem}-{(method or 'copies').partition(':')[0]}")
        write_bundle(layout, sources.located, sources.side_files, target, **run)
        assert_same_bundle(made.bundle(layout, plan.all_tasks), Bundle.open(target), list(plan.task_names))


def test_references_of_adapters_are_the_models_that_they_make(tmp_path):
    made = adapters.make(tmp_path, "llama", CONFIGS["llama"])
    plan_path = tmp_path / "plan.json"
    succeeds("plan", "--base", made.base, "--tasks", made.tasks, "--adapters", "merge", "-o", plan_path)
    plan = load_plan(plan_path)
    sources = open_sources(plan, tmp_path)
    folders = dict.fromkeys(plan.task_names, tmp_path)
    fine_tuned, _ = planned_models(plan, sources.located, folders, plan.task_names)
    bundle = MemoryBundles(sources=sources.located, device=torch.device("cpu"), threads=1).bundle(
        allocate(plan, merge_request()), plan.all_tasks
    )
    for task in plan.task_names:
        assert_same_state(dict(fine_tuned[task].weights), dict(View(bundle, task)))
        assert fine_tuned[task].digest == bundle_model(bundle, task).digest


def test_rows_of_vocabularies_are_those_of_the_bundle(tmp_path):
    words = {"base": list(WORDS), "a": [*WORDS, "x1"], "b": [*WORDS, "y1", "x1"], "c": list(WORDS)}
    family(tmp_path, words)
    succeeds("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    assert_as_written(tmp_path / "plan.json")


def test_tasks_beside_adapters_and_of_adapters_are_those_of_the_bundle(tmp_path):
    made = adapters.make(tmp_path, "llama", CONFIGS["llama"])
    for seed, name in enumerate(("full1", "full2")):
        made.full(name, seed)
    for mode in ("merge", "keep"):
        plan = tmp_path / f"{mode}.json"
        succeeds("plan", "--base", made.base, "--tasks", made.tasks, "--adapters", mode, "-o", plan)
        assert_as_written(plan)
