"""One model's files, found and guarded: what is taken, what is left, what is refused."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flexmerge_cli.checkpoint.checkpoint import find_weights, open_checkpoint
from flexmerge_cli.errors import DataError, FlexmergeError, SourceError

from ..families import LAYOUTS, encoder, normal, write_checkpoint
from ..hostile import SLOW_FILES, json_values, mutations

STATE = encoder()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_tensors(layout, tmp_path):
    write_checkpoint(tmp_path, STATE, layout=layout)
    found = open_checkpoint(str(tmp_path))
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tuple(value.shape) for name, value in STATE.items()
    }
    assert found.num_bytes == 4 * sum(value.numel() for value in STATE.values())


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth"])
def test_one_file_is_a_checkpoint(name, tmp_path):
    (save_file if name.endswith("safetensors") else torch.save)(STATE, tmp_path / name)
    found = open_checkpoint(str(tmp_path / name))
    assert set(found.tensors) == set(STATE)
    assert (found.config, found.side_files) == ({}, {})


def test_safetensors_win_where_both_lie(tmp_path):
    write_checkpoint(tmp_path, {"old": normal(0, 2)}, layout="bin")
    write_checkpoint(tmp_path, {"new": normal(0, 2)}, layout="file")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["new"]


def test_a_lone_file_of_any_name_is_found_and_an_adapter_by_its_own(tmp_path):
    assert find_weights(tmp_path) is None
    torch.save({}, tmp_path / "training_args.bin")
    assert find_weights(tmp_path) is None
    save_file(STATE, tmp_path / "epoch3.safetensors")
    assert find_weights(tmp_path) == tmp_path / "epoch3.safetensors"
    save_file(STATE, tmp_path / "epoch4.safetensors")
    assert find_weights(tmp_path) is None
    (tmp_path / "adapter").mkdir()
    save_file(STATE, tmp_path / "adapter" / "adapter_model.safetensors")
    assert find_weights(tmp_path / "adapter") == tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(STATE, tmp_path / "adapter" / "model.safetensors")
    assert find_weights(tmp_path / "adapter") == tmp_path / "adapter" / "model.safetensors"
    (tmp_path / "other").mkdir()
    save_file(STATE, tmp_path / "other" / "my_adapter.safetensors")
    assert find_weights(tmp_path / "other") is None


def test_side_files_are_what_makes_the_weights_usable(tmp_path):
    write_checkpoint(tmp_path, STATE)
    for name in (
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
    ):
        (tmp_path / name).write_text("{}")
    for name in ("trainer_state.json", "optimizer.pt", "modeling_own.py", ".hidden.json", "run.log"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.json").mkdir()
    found = open_checkpoint(str(tmp_path))
    assert list(found.side_files) == [
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "tokenizer.json", "tokenizer.model", "vocab.txt",
    ]  # fmt: skip
    assert found.left == {
        "code": ("modeling_own.py",),
        "training": (".hidden.json", "optimizer.pt", "run.log", "trainer_state.json"),
    }


def test_a_side_file_whose_name_is_no_text_is_left(tmp_path):
    write_checkpoint(tmp_path, STATE)
    (tmp_path / os.fsdecode(b"b\xff.txt")).write_text("?")
    found = open_checkpoint(str(tmp_path))
    assert (found.side_files, found.ignored) == ({}, ("b\ufffd.txt",))


# Where nothing can be had: exit 4.


def test_a_missing_path_is_told_and_one_that_looks_like_the_hub_hints_at_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, hint in (
        ("org/name", "hf://org/name"),
        ("name", "check"),
        ("./a/b", "check"),
        ("/a/b", "check"),
        ("~x/b", "check"),
    ):
        with pytest.raises(SourceError, match="does not exist") as raised:
            open_checkpoint(source)
        assert hint in raised.value.hint


@pytest.mark.parametrize("source", ["x" * 300, "a\0b", os.fsdecode(b"\xff"), "~nobody-of-this-name/x", "x/" * 3000])
def test_paths_that_no_file_can_have_are_missing_and_nothing_else(source, tmp_path):
    with pytest.raises(SourceError):
        open_checkpoint(source, relative_to=tmp_path)


def test_a_folder_without_weights_and_a_file_that_holds_none_are_told(tmp_path):
    with pytest.raises(SourceError, match="no checkpoint in"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(SourceError, match="is not a weight file"):
        open_checkpoint(str(tmp_path / "x.txt"))


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="holds no tensors"):
        open_checkpoint(str(tmp_path))


# Indices.


def sharded(tmp_path, change=lambda index: None):
    write_checkpoint(tmp_path, STATE, layout="shards")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return path


def test_every_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    for number in (1, 3):
        (tmp_path / f"model-0000{number}-of-00003.safetensors").unlink()
    with pytest.raises(DataError) as raised:
        open_checkpoint(str(tmp_path))
    for number in (1, 3):
        assert f"shard model-0000{number}-of-00003.safetensors is missing" in raised.value.message
    assert "download the checkpoint again" in raised.value.hint


@pytest.mark.parametrize("shard", [
    "../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", ".", "", "a\\b", "x\0y", "\ud800",
    "x" * 300, "C:/x",
])  # fmt: skip
def test_an_index_that_points_outside_its_folder_is_refused(shard, tmp_path):
    save_file({"pooler.dense.weight": normal(0, 8, 8)}, tmp_path / "x.safetensors")
    sharded(
        tmp_path / "inside" if shard.startswith("..") else tmp_path,
        lambda index: index["weight_map"].update(pooler=shard),
    )
    with pytest.raises(DataError, match="points outside its folder"):
        open_checkpoint(str(tmp_path / "inside" if shard.startswith("..") else tmp_path))


def test_shards_in_a_subfolder_of_the_folder_are_read_and_links_out_of_it_are_not(tmp_path):
    index = sharded(tmp_path / "model")
    shards = tmp_path / "model/shards"
    shards.mkdir()
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.rename(shards / shard.name)
    written = json.loads(index.read_text())
    written["weight_map"] = {name: f"./shards/{shard}" for name, shard in written["weight_map"].items()}
    written["metadata"] = {"total_size": 1}
    index.write_text(json.dumps(written))
    found = open_checkpoint(str(tmp_path / "model"))
    assert set(found.tensors) == set(STATE) and set(found.weight_bytes) == set(shards.iterdir())
    assert not found.ignored
    shards.rename(tmp_path / "outside")
    shards.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="outside its folder"):
        open_checkpoint(str(tmp_path / "model"))


def test_an_index_is_read_as_transformers_reads_it_and_what_is_odd_is_named(tmp_path):
    """Listed and nowhere, not listed, listed for another shard, and in two shards, of which the index names one."""
    first, last = tmp_path / "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"

    def change(index):
        places = index["weight_map"]
        places["not.there"] = first.name
        places.pop("pooler.dense.weight")
        moved = next(name for name, shard in places.items() if shard == last and name != "not.there")
        places[moved] = first.name

    index = sharded(tmp_path, change)
    places = json.loads(index.read_text())["weight_map"]
    twice = next(name for name, shard in places.items() if shard == "model-00002-of-00003.safetensors")
    save_file(load_file(first) | {twice: normal(7, *STATE[twice].shape)}, first)
    found = open_checkpoint(str(tmp_path))
    assert set(found.tensors) == set(STATE)
    assert found.tensors[twice].path.name == places[twice]
    assert found.ignored == ("`not.there`, which no shard holds", f"another copy of `{twice}` in {first.name}")


def test_an_index_of_which_much_is_nowhere_is_refused(tmp_path):
    gone = {f"gone.{n}": "model-00001-of-00003.safetensors" for n in range(99)}
    sharded(tmp_path, lambda index: index["weight_map"].update(gone))
    with pytest.raises(DataError, match=r"`gone\.0` is in none of them"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"weight_map": {}}', '{"weight_map": []}', "{}", "\ufeff{}", "[" * 99999]
)
def test_an_index_that_is_none_is_refused(text, tmp_path):
    sharded(tmp_path).write_text(text)
    with pytest.raises(DataError, match=r"index\.json"):
        open_checkpoint(str(tmp_path))


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW_FILES)
@given(st.data())
def test_a_damaged_index_or_config_gives_a_clean_error_or_none(tmp_path, data):
    index = sharded(tmp_path)
    config = {"model_type": "bert", "tie_word_embeddings": True, "text_config": {"vocab_size": 3}, "_name_or_path": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = data.draw(st.sampled_from([index, tmp_path / "config.json"]))
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(mutations(path.read_bytes())))
    else:
        path.write_text(json.dumps(data.draw(json_values(json.loads(path.read_text())))))
    try:
        open_checkpoint(str(tmp_path))
    except FlexmergeError as error:
        assert error.exit_code in (3, 4)


# Links.


def test_links_within_the_folder_are_followed_and_links_out_of_it_are_not(tmp_path):
    write_checkpoint(tmp_path / "real", STATE)
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "real/model.safetensors").rename(inside / "weights")
    (inside / "model.safetensors").symlink_to("weights")
    assert set(open_checkpoint(str(inside)).tensors) == set(STATE)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.safetensors").symlink_to("../inside/weights")
    with pytest.raises(DataError, match="outside its folder"):
        open_checkpoint(str(outside))


@pytest.mark.parametrize(
    "name", ["config.json", "vocab.txt", "model-00002-of-00003.safetensors", "model.safetensors.index.json"]
)
def test_no_file_of_a_checkpoint_is_a_link_out_of_it(name, tmp_path):
    sharded(tmp_path / "c")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    if (tmp_path / "c" / name).exists():
        (tmp_path / "c" / name).rename(secret)
    (tmp_path / "c" / name).symlink_to(secret)
    with pytest.raises(DataError, match="outside its folder"):
        open_checkpoint(str(tmp_path / "c"))


def test_the_hubs_cache_is_one_repository(tmp_path):
    """snapshots/REVISION holds links into blobs."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    save_file(STATE, repository / "blobs/1234")
    (repository / "blobs/5678").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    (snapshot / "config.json").symlink_to("../../blobs/5678")
    assert set(open_checkpoint(str(snapshot)).tensors) == set(STATE)
    (snapshot / "vocab.txt").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("")
    with pytest.raises(DataError, match="outside its folder"):
        open_checkpoint(str(snapshot))


def test_links_that_lead_to_themselves_are_no_files(tmp_path):
    write_checkpoint(tmp_path, STATE)
    (tmp_path / "vocab.txt").symlink_to("vocab.txt")
    assert open_checkpoint(str(tmp_path)).ignored == ("vocab.txt",)
