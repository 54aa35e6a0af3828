"""Rows of a task are matched to the base's by token, and by place where there is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.family.vocabulary import is_vocabulary_name, leading_rows, match_rows


def matched(base, task, base_rows=None, task_rows=None):
    """Words by row; None is a row without one."""
    ids = [{word: row for row, word in enumerate(words) if word is not None} for words in (base, task)]
    return match_rows(*ids, base_rows or len(base), task_rows or len(task)).tolist()


def test_tokens_are_found_wherever_they_are():
    assert matched("abcd", "dcba") == [3, 2, 1, 0]
    assert matched("abcd", "bcd") == [-1, 0, 1, 2]
    assert matched("abc", "xayb") == [1, 3, -1]


def test_a_row_without_a_token_goes_by_its_place():
    assert matched(["a", "b", None, None], ["a", "b", None]) == [0, 1, 2, -1]
    assert matched(["a", "b", None], ["b", "a", None, None]) == [1, 0, 2]


def test_a_token_that_a_task_dropped_keeps_its_row():
    assert matched("abc", ["a", None, "c"]) == [0, 1, 2]


def test_a_new_token_in_the_padding_is_not_the_bases_row():
    assert matched(["a", None, None], ["a", "new", None]) == [0, -1, 2]
    assert matched("abc", ["a", "new", "c"]) == [0, -1, 2]


def test_tokens_beyond_the_rows_are_left_out():
    assert matched("abcdef", "abcdef", base_rows=3, task_rows=4) == [0, 1, 2]
    assert matched("abcdef", "fedcba", base_rows=3, task_rows=4) == [-1, -1, 3]


def test_two_tokens_of_one_row_take_it_once():
    assert match_rows({"a": 0, "b": 1}, {"a": 0, "b": 0}, 2, 1).tolist() == [0, -1]
    assert match_rows({"a": 0, "b": 0}, {"a": 0, "b": 1}, 1, 2).tolist() == [0]


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.lists(st.sampled_from("abcdefgh"), unique=True))
def test_rows_are_matched_one_to_one_and_to_their_token(base, task):
    found = matched(base, task) if base else []
    assert len({row for row in found if row >= 0}) == sum(row >= 0 for row in found)
    assert {base[at]: task[row] for at, row in enumerate(found) if row >= 0} == {
        word: word for word in base if word in task
    }


@pytest.mark.parametrize(("task_rows", "expected"), [(5, [0, 1, 2]), (3, [0, 1, 2]), (2, [0, 1, -1]), (0, [-1] * 3)])
def test_leading_rows(task_rows, expected):
    assert leading_rows(3, task_rows).tolist() == expected


@pytest.mark.parametrize(
    "name",
    [
        "shared.weight", "model.embed_tokens.weight", "transformer.wte.weight", "embeddings.word_embeddings.weight",
        "text_model.embeddings.token_embedding.weight", "model.decoder.embed_tokens.weight", "lm_head.weight",
        "cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias", "lm_head.bias",
        "lm_head.decoder.bias", "proj_out.weight", "gpt_neox.embed_in.weight", "embed_out.weight",
        "vocab_projector.bias",
    ],
)  # fmt: skip
def test_names_of_vocabularies(name):
    assert is_vocabulary_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.position_embeddings.weight", "model.encoder.embed_positions.weight", "transformer.wpe.weight",
        "vit.embeddings.patch_embeddings.projection.weight", "embeddings.token_type_embeddings.weight",
        "classifier.weight", "model.decoder.weight", "decoder.bias", "layers.0.self_attn.q_proj.weight", "weight",
        "pos_embed.embeddings.weight", "encoder.layer.0.output.dense.bias",
    ],
)  # fmt: skip
def test_names_of_other_tensors(name):
    assert not is_vocabulary_name(name)
