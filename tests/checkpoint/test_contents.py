"""Files of a source are told apart by name alone, the same for a disk, the Hub and a URL."""

import os
import random
import time

import pytest
from safetensors.torch import save_file

from flexmerge_cli.checkpoint import folder as folder_module
from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.checkpoint import find_weights, open_checkpoint
from flexmerge_cli.checkpoint.contents import MAX_DEPTH, contents_of, is_ignored
from flexmerge_cli.checkpoint.parts import part_of, stem_of
from flexmerge_cli.errors import DataError, SourceError

from ..families import encoder, normal, write_checkpoint

STATE = encoder()
DENSE = {"linear.weight": normal(3, 4, 8), "linear.bias": normal(4, 4)}


def kind_of(name, *others):
    found = contents_of(["model.safetensors", *others, name])
    if name in found.weights.values():
        return "weights"
    return next(kind for kind in ("side", "indices", *found.left()) if name in getattr(found, kind))


@pytest.mark.parametrize(("name", "kind"), [
    *((name, "side") for name in (
        "config.json", "1_Pooling/config.json", "tokenizer/merges.txt", "bpe.codes", "spiece.model", "LICENSE",
        "sentencepiece.bpe.model", "prophetnet.tokenizer", "source.spm", "qwen.tiktoken", "chat_template.jinja",
        "scheduler/scheduler_config.json", "0_Transformer/vocab.txt", "language_model/5gram.bin",
        "additional_chat_templates/rag.jinja",
    )),
    *((name, "weights") for name in (
        "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
        "a/b/c/weights.pt",
    )),
    *((name, "code") for name in ("modeling_own.py", "unet/my_unet.py", "pipeline.py")),
    *((name, "training") for name in (
        "optimizer.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin", "events.out.tfevents.17.host",
        "run.log", ".gitattributes", "zero_to_fp32.py", "scaler.pt", "2_Dense/optimizer.bin",
    )),
    *((name, "copies") for name in (
        "model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "q4.gguf",
        "onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.bin", "original/consolidated.00.pth",
        "consolidated.safetensors", "epoch=3.ckpt", "pytorch_model-00001-of-00002.bin",
    )),
    *((name, "unclear") for name in (
        "2_Dense/weights.npz", "model_head.pkl", "colbert_linear.pt", "best/adapter_model.safetensors", "head.h5",
        "3_Custom/model.h5", "voices/af.npy",
    )),
    *((name, "other") for name in ("notes.csv", "picture.png", "a:b.json", "b\udcff.txt", "back\\slash.json")),
    ("n" * 245 + ".txt", "side"), ("n" * 246 + ".txt", "other"),  # a bundle may add `.aside` to 255 bytes in all
    *((name, "indices") for name in ("model.safetensors.index.json", "unet/x.safetensors.index.fp16.json")),
])  # fmt: skip
def test_what_a_file_is(name, kind):
    assert kind_of(name) == kind


def test_every_file_is_in_one_place_whatever_their_order():
    names = [
        "model.safetensors", "config.json", "x.py", "x.csv", "checkpoint-500/model.safetensors", "2_D/config.json",
        "checkpoint-500/optimizer.pt", "runs/a/events.1", ".git/", "onnx/model.onnx", "x.npz", "2_D/model.safetensors",
    ]  # fmt: skip
    found = contents_of(names, ignore=["x.c*"])
    assert found.weights == {"": "model.safetensors", "2_D": "2_D/model.safetensors"}
    assert found.side == ("2_D/config.json", "config.json")
    assert found.left() == {
        "code": ("x.py",), "training": (".git/", "checkpoint-500/", "runs/"), "copies": ("onnx/model.onnx",),
        "unclear": ("x.npz",), "ignored": ("x.csv",),
    }  # fmt: skip
    random.Random(0).shuffle(names)
    assert contents_of(names, ignore=["x.c*"]) == found


@pytest.mark.parametrize("name", ["{}/model.safetensors", ".{}", "{}.csv", "checkpoint-{}/x", "{}/{}.npz"])
def test_sorting_many_files_takes_time_linear_in_their_number(name):
    names = ["modules.json", *(name.replace("{}", str(number)) for number in range(60_000))]
    begun = time.process_time()
    contents_of(names)
    assert time.process_time() - begun < 10  # one second; a minute or more by the square of their number


def test_subfolders_are_parts_of_a_model_and_models_in_a_folder_are_none():
    inside = ["a/model.safetensors", "b/model.safetensors"]
    assert contents_of(inside).weights == {}
    assert set(contents_of([*inside, "model_index.json"]).weights) == {"a", "b"}
    assert set(contents_of([*inside, "modules.json"]).weights) == {"a", "b"}
    assert set(contents_of([*inside, "model.safetensors"]).weights) == {"", "a", "b"}
    whole = contents_of([*inside, "model_index.json", "v1-5-pruned.safetensors"])
    assert set(whole.weights) == {"a", "b"} and whole.copies == ("v1-5-pruned.safetensors",)


def test_an_adapter_has_no_parts():
    found = contents_of(["adapter_model.safetensors", "adapter_config.json", "2_Dense/model.safetensors"])
    assert found.weights == {"": "adapter_model.safetensors"} and found.unclear == ("2_Dense/model.safetensors",)


@pytest.mark.parametrize(("pattern", "names"), [
    ("*.npz", {"a.npz", "a/b/c.npz"}), ("a", {"a.d/a", "a/b/c.npz", "a/x.json"}), ("a/*", {"a/b/c.npz", "a/x.json"}),
    ("a/b/", {"a/b/c.npz"}), ("x.json", {"a/x.json"}), ("A", set()),
])  # fmt: skip
def test_what_a_pattern_names(pattern, names):
    every = ("a.npz", "a/b/c.npz", "a/x.json", "a.d/a")
    assert {name for name in every if is_ignored(name, pattern)} == names


@pytest.mark.parametrize(("weights", "stem"), [
    ("unet/diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model"), ("a/odd.name.pt", "odd.name"),
    ("unet/diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model"),
    ("2_Dense/pytorch_model.bin", "model"),
    ("t/model.safetensors.index.fp16.json", "model"), ("c/open_clip_pytorch_model.bin", "open_clip_model"),
])  # fmt: skip
def test_the_stem_is_what_the_library_looks_for(weights, stem):
    assert stem_of(weights) == stem


def test_a_tensor_is_of_the_deepest_part():
    parts = {"a": "model", "a/b": "model"}
    assert part_of("a/b/x.y", parts) == ("a/b", "x.y")
    assert part_of("a/x/y", parts) == ("a", "x/y")
    assert part_of("ab/x", parts) == ("", "ab/x")
    assert part_of("x." * 100_000, parts)[0] == ""


# On the disk.


@pytest.fixture
def source(tmp_path):
    write_checkpoint(tmp_path / "m", STATE)
    (tmp_path / "m/2_Dense").mkdir()
    save_file(DENSE, tmp_path / "m/2_Dense/model.safetensors")
    (tmp_path / "m/2_Dense/config.json").write_text("{}")
    return tmp_path / "m"


def test_a_part_has_its_tensors_under_its_path(source):
    found = open_checkpoint(str(source))
    assert set(found.tensors) == {*STATE, "2_Dense/linear.weight", "2_Dense/linear.bias"}
    assert found.tensors["2_Dense/linear.bias"].path == source / "2_Dense/model.safetensors"
    assert (found.parts, list(found.side_files)) == ({"2_Dense": "model"}, ["2_Dense/config.json"])
    assert found.num_bytes == sum(value.numel() * 4 for value in [*STATE.values(), *DENSE.values()])


def test_a_second_checkpoint_in_a_subfolder_is_no_part(source):
    write_checkpoint(source / "best", STATE)
    with pytest.raises(DataError, match="another checkpoint of the model") as raised:
        open_checkpoint(str(source))
    assert raised.value.hint.endswith("--ignore best")
    found = open_checkpoint(str(source), access=Access(ignore=("best",)))
    assert found.parts == {"2_Dense": "model"} and found.left["ignored"] == ("best/",)


def test_a_tensor_that_is_called_like_one_of_a_subfolder_is_refused(source):
    save_file(STATE | {"2_Dense/x": normal(0, 2)}, source / "model.safetensors")
    with pytest.raises(DataError, match="called like one of a subfolder"):
        open_checkpoint(str(source))


def test_a_composite_without_weights_of_its_own_is_a_model(tmp_path):
    write_checkpoint(tmp_path / "m/0_Transformer", STATE)
    assert find_weights(tmp_path / "m") is None
    (tmp_path / "m/modules.json").write_text("[]")
    assert find_weights(tmp_path / "m") == tmp_path / "m/0_Transformer/model.safetensors"
    assert set(open_checkpoint(str(tmp_path / "m")).tensors) == {f"0_Transformer/{name}" for name in STATE}


def test_links_do_not_leave_the_folder(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").write_text("{}")
    (source / "3_Linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"3_Linked is a link to .*elsewhere, outside"):
        open_checkpoint(str(source))
    assert "3_Linked/" in open_checkpoint(str(source), access=Access(ignore=("3_Linked",))).left["ignored"]
    (source / "3_Linked").unlink()
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").symlink_to(tmp_path / "elsewhere/config.json")
    with pytest.raises(DataError, match="outside its folder"):
        open_checkpoint(str(source))


def test_a_link_inside_is_followed_and_one_that_leads_back_is_not(source):
    (source / "3_Again").symlink_to("2_Dense")
    (source / "2_Dense/up").symlink_to("..")
    found = open_checkpoint(str(source))
    assert set(found.parts) == {"2_Dense", "3_Again"}
    assert found.left == {"other": ("2_Dense/up/", "3_Again/up/")}


def test_a_walk_has_an_end(source, monkeypatch):
    deep = source / "/".join("d" * (MAX_DEPTH + 2))
    deep.mkdir(parents=True)
    (deep / "config.json").write_text("{}")
    assert open_checkpoint(str(source)).left == {"other": ("/".join("d" * (MAX_DEPTH + 1)) + "/",)}
    monkeypatch.setattr(folder_module, "MAX_ENTRIES", 3)
    with pytest.raises(SourceError, match="more than 3 files"):
        open_checkpoint(str(source))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(source):
    (source / "lost+found").mkdir(mode=0)
    assert open_checkpoint(str(source)).left == {"other": ("lost+found/",)}


def test_what_is_no_file_is_named(source):
    os.mkfifo(source / "1.json")
    (source / "gone.json").symlink_to("nowhere")
    assert set(open_checkpoint(str(source)).left["other"]) == {"1.json", "gone.json"}
