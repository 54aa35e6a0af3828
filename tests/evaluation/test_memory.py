"""--max-memory of `eval` and `curve`: what is counted is what is held, and too little is refused before the work."""

import re

import pytest

from flexmerge_cli import merge
from flexmerge_cli.evaluation.drawing import Drawing
from flexmerge_cli.evaluation.in_memory import MemoryBundles
from flexmerge_cli.evaluation.memory import largest_model, model_bytes
from flexmerge_cli.evaluation.models import Bundle, bundle_model
from flexmerge_cli.evaluation.scoring import Scorer

from ..program import fails, succeeds
from .curves import SCORED, Digits
from .test_curve import asked
from .test_gate import recipe


def needed(result) -> int:
    return int(re.search(r"--max-memory (\d+)B", result.err).group(1))


@pytest.fixture
def unread(monkeypatch):
    def read(*_arguments, **_more):
        raise AssertionError("a model is scored")

    monkeypatch.setattr(Scorer, "score", read)


@pytest.mark.parametrize("dtype, factor", [(None, 1), ("bfloat16", 1), ("float16", 2), ("float32", 3)])
def test_a_model_is_counted_as_stored_and_as_it_computes(sample: Digits, tmp_path, dtype, factor):
    merge(sample.plan_path, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    spec = sample.spec.model_copy(update={"dtype": dtype})
    held = max(
        sum(tensor.numel() * tensor.element_size() for tensor in bundle_model(bundle, task).weights.values())
        for task in SCORED
    )
    assert largest_model(spec, bundle) == largest_model(spec, sample.plan) == held * factor


def test_a_model_of_several_dtypes_computes_in_that_of_most_elements():
    assert model_bytes([("BF16", 100), ("F32", 3)], None) == 200 + 12 + 2 * 3
    assert model_bytes([("BF16", 100), ("F32", 3)], "float32") == 200 + 12 + 4 * 100
    assert model_bytes([], None) == 0


@pytest.mark.parametrize("parallel", [1, 2])
def test_an_evaluation_is_refused_with_the_figure_that_will_do(sample: Digits, tmp_path, unread, parallel):
    merge(sample.plan_path, tmp_path / "b")
    one = largest_model(sample.spec, Bundle.open(tmp_path / "b"))
    for words in ([tmp_path / "b"], ["--sources", "--plan", sample.plan_path]):
        words = ["eval", *words, "--spec", sample.spec_path, "--parallel", parallel]
        result = fails(2, *words, "--max-memory", f"{one * parallel - 1}B", says="the weights of")
        assert needed(result) == one * parallel and ("--parallel 1" in result.err) == (parallel > 1)


def test_a_recipe_whose_gate_needs_more_than_merging_is_refused_before_it_merges(sample, tmp_path, monkeypatch):
    monkeypatch.setattr("flexmerge_cli.cli.packing.merge", lambda *_, **__: pytest.fail("it merges"))
    monkeypatch.setattr("flexmerge_cli.cli.packing.largest_model", lambda *_: 5 << 30)
    path = recipe(sample, tmp_path, size="3x", limit="1%")
    result = fails(2, "merge", path, "-o", tmp_path / "b", "--max-memory", "4GiB", says="the weights of 1 model ")
    assert needed(result) == 5 << 30


def test_a_curve_is_refused_before_a_model_is_scored_and_runs_with_the_figure_that_will_do(sample, monkeypatch):
    words = sample.drawn(sizes="1.5x,3x", method="ties")
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", lambda *_: pytest.fail("a model is scored"))
        least = needed(fails(2, *words, "--threads", 1, "--max-memory", "1MB", says="needed"))
    bounded = succeeds(*words, "--threads", 1, "--max-memory", f"{least}B", "--no-reuse", "--json").json
    assert bounded["points"] == succeeds(*words, "--threads", 1, "--no-reuse", "--json").json["points"]


def test_the_parts_of_a_curve_take_what_was_counted(sample: Digits, monkeypatch):
    request = asked("average", "low_bit:bits=2", sizes="1.2x,2x,2.8x")
    drawing = Drawing(plan=sample.plan, plan_path=sample.plan_path, spec=sample.spec, request=request)
    memory, held = drawing.scorer.memory, []
    plain = MemoryBundles.bundle

    def watched(self, layout, tasks):
        found = plain(self, layout, tasks)
        held.append(self.num_bytes)
        return found

    monkeypatch.setattr(MemoryBundles, "bundle", watched)
    numbers = [sample.plan.task_names.index(task) for task in SCORED]
    for job in (*request.methods, None):
        cuts = sorted(drawing.cuts(job)[0], key=lambda cut: -cut.layout.tensor_bytes)
        counted = memory.most_bytes([cut.layout for cut in cuts], numbers)
        held.clear()
        drawing.run(job)
        assert held and counted * 0.99 <= max(held) <= counted
