"""Scores are of the bytes on disk: a damaged bundle has none, however it was scored before and however it is asked."""

import json
import shutil

import numpy as np
import pytest

import flexmerge_cli
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import IntegrityError
from flexmerge_cli.evaluation.cache import ScoreCache
from flexmerge_cli.evaluation.evaluate import evaluate
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.spec import read_spec

from ..program import fails, succeeds
from . import tiny

TASKS = ("first", "second")
N = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, two fine-tunes, their plan, `coded` and `exact` bundles, and a spec that names all of them."""
    folder = tmp_path_factory.mktemp("trusted")
    for seed, name in enumerate(TASKS, 1):
        tiny.tuned_bert(folder, name, seed)
        labels = np.random.default_rng(seed).integers(0, 2, N).tolist()
        tiny.rows(folder / f"{name}.jsonl", text=tiny.sentences(N, seed), label=labels)
    tasks = {
        name: {"kind": "text-classification", "data": f"{name}.jsonl", "checkpoint": f"tasks/{name}"} for name in TASKS
    }
    (folder / "eval.yaml").write_text(json.dumps({"version": 1, "base": "base", "tasks": tasks}))
    succeeds("plan", "--base", folder / "base", "--tasks", folder / "tasks", "-o", folder / "plan.json")
    succeeds("merge", folder / "plan.json", "-o", folder / "exact")
    succeeds("merge", folder / "plan.json", "--method", "low_bit:bits=2", "-o", folder / "coded")
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def damaged(place, kind: str, target, *, file: str = "weights/"):
    """A copy of a bundle, one byte of the last file whose path begins so flipped."""
    bundle = target / f"damaged-{kind}"
    shutil.copytree(place / kind, bundle)
    path = max(path for path in bundle.rglob("*") if str(path.relative_to(bundle)).startswith(file))
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.unlink()  # equal small files are hard links
    path.write_bytes(data)
    return bundle


def scored(place, bundle, *more: object):
    return ("eval", bundle, "--spec", place / "eval.yaml", *more)


@pytest.mark.parametrize("kind", ["coded", "exact"])
@pytest.mark.parametrize("more", [(), ("--max-drop", "100%"), ("--no-reuse",), ("--sources",)])
def test_a_damaged_bundle_has_no_scores_whatever_is_known(place, tmp_path, kind, more):
    """It had those of the sound one, and passed its gate; of exact copies its own were the fine-tuned model's, too."""
    bundle = damaged(place, kind, tmp_path)
    fails(5, *scored(place, bundle, *more), says="weights/")
    succeeds(*scored(place, place / kind))
    fails(5, *scored(place, bundle, *more), says="weights/")


def test_scores_of_a_damaged_bundle_are_never_kept_as_the_sound_ones(place, tmp_path):
    fails(5, *scored(place, damaged(place, "coded", tmp_path)))
    found = succeeds(*scored(place, place / "coded", "--json")).json
    assert found["evaluations"]["cached"] == 0


@pytest.mark.parametrize("file", ["tasks/second/config.json", "tasks/second/tokenizer.json"])
@pytest.mark.parametrize("more", [(), ("--sources",)])
def test_damaged_side_files_are_told_as_such(place, tmp_path, file, more):
    """They decide a score as the weights do; what is made of them fails in other words, or not at all."""
    fails(5, *scored(place, damaged(place, "exact", tmp_path, file=file), *more), says=file)


def test_processes_side_by_side_refuse_it(place, tmp_path, forked_workers):
    fails(5, *scored(place, damaged(place, "coded", tmp_path), "--parallel", 2), says="weights/")


def test_the_function_refuses_it(place, tmp_path):
    with pytest.raises(IntegrityError, match="weights/"):
        flexmerge_cli.evaluate(damaged(place, "exact", tmp_path), place / "eval.yaml")


def test_damage_that_no_scored_task_reads_costs_no_score(place, tmp_path):
    """The private file of the other task: what is not read is not judged."""
    bundle = damaged(place, "exact", tmp_path, file="weights/second")
    fields = json.loads((place / "eval.yaml").read_text())
    fields["tasks"].pop("second")
    spec = place / "first.yaml"
    spec.write_text(json.dumps(fields))
    succeeds("eval", bundle, "--spec", spec)


def test_files_that_are_replaced_while_they_are_scored_give_no_score(place, tmp_path):
    """Weights are held open, config and tokenizer are not: half of a model would be the new one's."""
    shutil.copytree(place / "coded", tmp_path / "bundle")
    config = tmp_path / "bundle/coded/first/config.json.aside"

    def replaced(_what: str, _done: int, _total: int) -> None:
        data = config.read_bytes()
        config.unlink()
        config.write_bytes(data + b" ")

    spec = read_spec(place / "eval.yaml", TASKS)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        evaluate(Bundle.open(tmp_path / "bundle"), spec, on_step=replaced)


def test_no_reuse_replaces_what_is_kept(place):
    """An entry that is wrong could be got rid of by removing the folder alone."""
    arguments = scored(place, place / "coded", "--json")
    first = succeeds(*arguments).json
    cache = ScoreCache()
    for path in cache.folder.rglob("*.npz"):
        cache.put(path.stem, Scored(metric="accuracy", predictions=np.zeros(N, int), labels=np.ones(N, int)))
    assert all(record["merged"] == 0 for record in succeeds(*arguments).json["tasks"].values())
    again = succeeds(*arguments, "--no-reuse").json
    assert again["evaluations"] == {"computed": 6, "repeated": 0, "cached": 0}
    assert again["tasks"] == first["tasks"] == succeeds(*arguments).json["tasks"]


def test_a_source_that_changed_since_the_plan_has_no_scores(place, tmp_path):
    """Scores of a plan's sources are found by digests; those of the plan count only where the bytes have them."""
    folder = tmp_path / "moved"
    shutil.copytree(place, folder)
    arguments = ("eval", "--sources", "--plan", folder / "plan.json", "--spec", folder / "eval.yaml")
    succeeds(*arguments)
    path = folder / "tasks" / "second" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)
    fails(3, *arguments, says="changed since the plan")
    fails(3, "eval", folder / "coded", *arguments[2:], says="changed since the plan")
    fails(3, "curve", *arguments[3:], "--method", "average", "--sizes", "1x", says="changed since the plan")
