"""What is no checkpoint is named for what it is, with what to do; parts of a model are never taken for the whole."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from flexmerge_cli.checkpoint import foreign
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.errors import DataError, FlexmergeError, SourceError, UsageError

from ..families import Models, normal, write_family
from ..program import fails, succeeds

BASE = {f"layers.{n}.weight": normal(n, 4, 4) for n in range(3)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 14483464192\n"


def refused(path, *says, error=FlexmergeError):
    with pytest.raises(error) as raised:
        open_checkpoint(str(path))
    assert all(word in raised.value.message for word in says) and raised.value.hint, raised.value
    return raised.value


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.ckpt"])
@pytest.mark.parametrize(("head", "says"), [
    (LFS, "Git LFS pointer"), (b"/annex/objects/SHA256E-s1", "git-annex pointer"), (b"", "truncated"),
    (b"\0" * 999, "broke off"), (b"<!DOCTYPE html><html>", "HTML page"), (b"GGUF\3\0\0\0" + b"\1" * 99, "GGUF"),
    (b"\x89HDF\r\n\x1a\n" + b"\1" * 99, "HDF5"), (b"\x1f\x8b\x08\0" + b"\1" * 99, "gzip"),
])  # fmt: skip
def test_files_are_known_by_their_first_bytes(head, says, name, tmp_path):
    (tmp_path / name).write_bytes(head)
    refused(tmp_path / name, says, error=DataError)


def test_a_file_under_the_other_formats_name_is_told(tmp_path):
    torch.save(BASE, tmp_path / "x.safetensors")
    assert ".bin" in refused(tmp_path / "x.safetensors", "zip archive").hint
    save_file(BASE, tmp_path / "x.bin")
    assert ".safetensors" in refused(tmp_path / "x.bin", "safetensors file").hint


def test_a_config_or_index_that_is_a_pointer_is_named(tmp_path):
    save_file(BASE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(LFS)
    assert "git lfs pull" in refused(tmp_path, "config.json", "Git LFS pointer").hint


def test_a_tokenizer_that_is_a_pointer_is_named(tmp_path):
    save_file(BASE, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.model").write_bytes(LFS)
    assert "git lfs pull" in refused(tmp_path, "tokenizer.model", "Git LFS pointer").hint
    (tmp_path / "tokenizer.model").write_bytes(b"")
    open_checkpoint(str(tmp_path))


def test_torchscript_is_named_and_its_hint_works(tmp_path):
    torch.jit.trace(torch.nn.Linear(4, 4), torch.ones(1, 4)).save(tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "TorchScript")
    torch.save(torch.jit.load(tmp_path / "script.pt").state_dict(), tmp_path / "new.pt")
    assert set(open_checkpoint(str(tmp_path / "new.pt")).tensors) == {"weight", "bias"}


@pytest.mark.parametrize(("files", "says"), [
    ([".metadata", "__0_0.distcp"], "DCP"), (["latest", "zero_to_fp32.py"], "DeepSpeed"),
    (["pytorch_model_fsdp_0/__0_0.distcp"], "DCP"),
    (["global_step500/mp_rank_00_model_states.pt"], "DeepSpeed"), (["flax_model.msgpack"], "Flax"),
    (["tf_model.h5"], "TensorFlow"), (["weights.npz"], "MLX"), (["adapters.safetensors"], "mlx-lm"),
    (["model-Q4_K_M.gguf"], "GGUF"), (["model.onnx"], "ONNX"), (["openvino_model.bin"], "OpenVINO"),
    (["model.ckpt.index", "model.ckpt.data-00000-of-00001"], "TensorFlow"), (["model.safetensors.dvc"], "DVC"),
])  # fmt: skip
def test_folders_of_other_frameworks_are_named(files, says, tmp_path):
    for name in (*files, "config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    refused(tmp_path, says, error=SourceError)


@pytest.mark.parametrize(("name", "says"), [
    ("lora_unet_down_blocks_0.lora_down.weight", "kohya"), ("unet.a.lora.down.weight", "diffusers"),
    ("model.layers.0.self_attn.q_proj.lora_a", "mlx-lm"), ("_fsdp_wrapped_module._flat_param", "FSDP"),
])  # fmt: skip
def test_files_whose_tensors_are_no_models_are_named(name, says, tmp_path):
    save_file({name: normal(0, 2, 2)}, tmp_path / "x.safetensors")
    refused(tmp_path, says, f"`{name}`")


def test_a_lora_that_is_not_merged_is_no_model(tmp_path):
    state = {"q.base_layer.weight": normal(0, 4, 4), "q.lora_A.default.weight": normal(1, 2, 4)}
    save_file(state, tmp_path / "model.safetensors")
    assert "merge_and_unload" in refused(tmp_path, "not merged").hint


# Parts of a model


@pytest.mark.parametrize("stem", ["model", "pytorch_model", "consolidated"])
def test_shards_without_an_index_are_no_model_nor_is_one_of_them(stem, tmp_path):
    for number in (1, 2):
        save_file(
            {f"layers.{number}.weight": normal(number, 4)}, tmp_path / f"{stem}-0000{number}-of-00003.safetensors"
        )
    found = refused(tmp_path, "2 of the 3 shards", error=SourceError)
    assert f"{stem}.safetensors.index.json" in found.hint
    refused(tmp_path / f"{stem}-00001-of-00003.safetensors", "one of the 3 shards", error=UsageError)
    (tmp_path / f"{stem}-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "1 of the 3 shards", error=SourceError)


def test_one_shard_of_one_is_a_model(tmp_path):
    save_file(BASE, tmp_path / "model-00001-of-00001.safetensors")
    assert set(open_checkpoint(str(tmp_path)).tensors) == set(BASE)


def test_unfinished_tasks_say_what_they_are(tmp_path):
    folders = write_family(tmp_path, Models(base=BASE, tasks={"a": BASE}))
    other = tmp_path / "tasks/b"
    other.mkdir()
    (other / "__0_0.distcp").write_text("")
    fails(4, "plan", *folders.arguments, "-o", tmp_path / "plan.json", says="DCP")
    (other / "__0_0.distcp").rename(other / "model-00001-of-00002.safetensors")
    fails(4, "plan", *folders.arguments, "-o", tmp_path / "plan.json", says="1 of 2 shards")


@pytest.mark.parametrize("who", ["task", "base"])
def test_a_tensor_that_zero_3_saved_empty_is_refused(who, tmp_path):
    empty = BASE | {"layers.1.weight": torch.empty(0)}
    models = Models(base=empty, tasks={"a": BASE}) if who == "base" else Models(base=BASE, tasks={"a": empty})
    folders = write_family(tmp_path, models)
    result = fails(
        3, "plan", *folders.arguments, "-o", tmp_path / "plan.json", says=("ZeRO-3", "`layers.1.weight` [0]")
    )
    assert ("the base" if who == "base" else "task `a`") in result.err and "zero_to_fp32.py" in result.err


def test_a_lora_that_zero_3_saved_empty_is_refused(tmp_path):
    folders = write_family(tmp_path, Models(base=BASE, tasks={"a": BASE}))
    adapter(tmp_path / "lora", rank=0)
    fails(
        3, "plan", "--base", folders.base, "--task", f"b={tmp_path / 'lora'}", "-o", tmp_path / "p.json", says="ZeRO-3"
    )


def adapter(folder, rank=2):
    folder.mkdir()
    module = "base_model.model.layers.0"
    factors = {f"{module}.lora_A.weight": normal(0, rank, 4), f"{module}.lora_B.weight": normal(1, 4, rank)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4}))
    return folder


def test_a_value_head_beside_an_adapter_is_not_its_model_and_is_told(tmp_path):
    folders = write_family(tmp_path, Models(base=BASE, tasks={"a": BASE}))
    torch.save({"v_head.summary.weight": normal(2, 1, 4)}, adapter(tmp_path / "ppo") / "pytorch_model.bin")
    arguments = ("plan", "--base", folders.base, "--task", f"ppo={tmp_path / 'ppo'}", "-o", tmp_path / "plan.json")
    assert "value heads beside an adapter: 1 of `ppo` (pytorch_model.bin)" in succeeds(*arguments).err
    torch.save(BASE, tmp_path / "ppo/pytorch_model.bin")
    fails(2, *arguments, "--force", says=("adapter_model.safetensors", "pytorch_model.bin"))


# State dicts with more than tensors


def test_extra_states_that_are_nothing_are_left_out_and_others_are_named(tmp_path):
    torch.save(BASE | {"layers.0._extra_state": None}, tmp_path / "x.bin")
    assert set(open_checkpoint(str(tmp_path / "x.bin")).tensors) == set(BASE)
    torch.save(BASE | {"layers.0._extra_state": b"fp8"}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "`layers.0._extra_state` is not a tensor")
    torch.save(BASE | {"step": 3}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "`step` is not a tensor")


def test_a_checkpoint_of_lightning_is_a_model(tmp_path):
    state = {f"model.{name}": value + 1 for name, value in BASE.items()}
    folders = write_family(tmp_path, Models(base=BASE, tasks={"a": BASE}))
    optimizer = {"state": {0: {"exp_avg": normal(0, 4, 4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    (tmp_path / "run").mkdir()
    torch.save(
        {"epoch": 3, "state_dict": state, "optimizer_states": [optimizer], "lr_schedulers": [], "hparams_name": None},
        tmp_path / "run/epoch=3-step=9.ckpt",
    )
    arguments = ("plan", "--base", folders.base, "--task", f"a={tmp_path / 'run'}", "-o", tmp_path / "plan.json")
    assert succeeds(*arguments, "--json").json["classes"]["mergeable"]["tensors"] == 3


@pytest.mark.parametrize(
    "name",
    ["bpe.codes", "vocab.bpe", "tokenizer.model", "prophetnet.tokenizer", "target.spm", "qwen.tiktoken", "a.vocab"],
)
def test_files_of_tokenizers_are_carried(name, tmp_path):
    folders = write_family(tmp_path, Models(base=BASE, tasks={"a": BASE}))
    (folders.tasks["a"] / name).write_bytes(b"\0\1")
    assert "not carried" not in succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json").err
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    succeeds("export", tmp_path / "bundle", "--task", "a", "-o", tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"\0\1"


def test_an_archive_is_read_no_further_than_its_names(tmp_path):
    """A zip with a `constants.pkl` is TorchScript whatever else is in it."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", b"")
    refused(tmp_path / "x.pt", "TorchScript")


def test_no_beginning_hides_another():
    starts = [start for start, _ in foreign.BEGINNINGS]
    assert all(not a.startswith(b) for a in starts for b in starts if a != b)
    assert max(map(len, starts)) <= foreign.HEAD_BYTES
