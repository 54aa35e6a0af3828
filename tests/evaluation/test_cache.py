"""Scores on disk: found again by what they depend on, whole or not there, and never a reason to fail."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flexmerge_cli.evaluation.cache import ScoreCache, cache_folder, key_of
from flexmerge_cli.evaluation.scored import Given, Scored
from flexmerge_cli.evaluation.scoring import Scorer

from . import tiny

SCORED = Scored(
    metric="accuracy",
    predictions=np.array([0, 1, 2]),
    labels=np.array([0, 2, 2]),
    notes=("one",),
    others=(Scored(metric="exact_match", predictions=np.array(["a", "bö"]), labels=np.array(["a", "c"])),),
)
KEY = key_of({"a": 1})


def same(left: Scored, right: Scored) -> bool:
    arrays = np.array_equal(left.predictions, right.predictions) and np.array_equal(left.labels, right.labels)
    rest = (left.metric, left.notes, left.given) == (right.metric, right.notes, right.given)
    return arrays and rest and all(map(same, left.others, right.others)) and len(left.others) == len(right.others)


@pytest.mark.parametrize("scored", [SCORED, Scored(metric="bleu", given=Given(value=0.5, n=None, interval=(0.1, 0.9)))])
def test_what_is_kept_is_found(tmp_path, scored):
    cache = ScoreCache(folder=tmp_path)
    assert cache.get(KEY) is None
    cache.put(KEY, scored)
    assert same(cache.get(KEY), scored)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_entry_is_none_and_is_written_anew(tmp_path):
    cache = ScoreCache(folder=tmp_path)
    cache.put(KEY, SCORED)
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    flipped = bytes([whole[0] ^ 255])
    for bad in (b"", b"PK", whole[:-1], whole[: len(whole) // 2], flipped + whole[1:], b"\0" * 1000):
        path.write_bytes(bad)
        assert cache.get(KEY) is None
    cache.put(KEY, SCORED)
    assert same(cache.get(KEY), SCORED)


def test_any_flipped_byte_gives_the_entry_or_none(tmp_path):
    """Never another score: the archive's checksums are of every array, and the header holds the key."""
    cache = ScoreCache(folder=tmp_path)
    cache.put(KEY, SCORED)
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        found = cache.get(KEY)
        assert found is None or same(found, SCORED), place


def test_an_entry_under_another_name_is_none(tmp_path):
    cache, other = ScoreCache(folder=tmp_path), key_of({"a": 2})
    cache.put(KEY, SCORED)
    (path,) = tmp_path.rglob("*.npz")
    target = tmp_path / other[:2] / f"{other}.npz"
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    assert cache.get(other) is None


def test_a_place_that_takes_nothing_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cache = ScoreCache(folder=tmp_path / "file")
    cache.put(KEY, SCORED)
    assert cache.get(KEY) is None


def test_the_folder_is_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "flexmerge" / "scores"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "flexmerge" / "scores"


@pytest.fixture
def task(tmp_path):
    """A model, and what makes a scorer of a changed spec with the cache of this test."""
    model = tiny.source_model("it", str(tiny.bert(tmp_path / "model", 2)))
    data = tiny.rows(tmp_path / "d.jsonl", text=tiny.sentences(12), label=[0, 1] * 6)
    cache = ScoreCache(folder=tmp_path / "cache")

    def scorer(**changed) -> Scorer:
        spec = tiny.spec_of(tmp_path, {"kind": "text-classification", "data": data, **changed})
        return Scorer(spec=spec, device="cpu", cache=cache)

    return model, scorer


def is_known(model, scorer: Scorer) -> bool:
    scorer.score(model)
    return scorer.num_cached == 1 and scorer.num_computed == 0


def test_equal_weights_data_and_settings_are_scored_once(task):
    model, scorer = task
    assert not is_known(model, scorer())
    assert is_known(model, scorer())
    assert same(scorer().score(model), replace(scorer(), cache=None).score(model))


@pytest.mark.parametrize(
    "changed", [{"limit": 6}, {"batch_size": 3}, {"dtype": "bfloat16"}, {"metric": "f1"}, {"max_length": 4}]
)
def test_other_settings_are_another_score(task, changed):
    model, scorer = task
    scorer().score(model)
    assert not is_known(model, scorer(**changed))


def test_other_weights_data_or_side_files_are_another_score(task, tmp_path):
    model, scorer = task
    scorer().score(model)
    assert not is_known(replace(model, digest="0" * 32), scorer())
    path = tmp_path / "d.jsonl"
    path.write_text(path.read_text().replace("red", "blue"))
    assert not is_known(model, scorer())
    config = model.folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("24", "23"))
    assert not is_known(model, scorer())


def test_where_the_data_lie_does_not_matter(task, tmp_path):
    model, scorer = task
    scorer().score(model)
    (tmp_path / "d.jsonl").rename(tmp_path / "other.jsonl")
    assert is_known(model, scorer(data="other.jsonl"))
