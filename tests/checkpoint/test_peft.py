"""Adapter folders as strangers have them: a kind that is not read is refused by name, a malformed one is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.checkpoint.peft import read_adapter
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.family.adapted import adapted
from tests.program import fails, succeeds

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": None}
MODULE = "base_model.model.layers.0.q"


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(module: str = MODULE, rank: int = 2, rows: int = 6, columns: int = 4) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": drawn(1, rank, columns), f"{module}.lora_B.weight": drawn(2, rows, rank)}


def write(root: Path, config: Any = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A base of one layer, and an adapter of it."""
    (root / "base").mkdir(exist_ok=True)
    save_file({"layers.0.q.weight": drawn(3, 6, 4), "layers.0.q.bias": drawn(4, 6)}, root / "base/model.safetensors")
    folder = root / "tasks" / "a"
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(CONFIG | (config or {}))
    (folder / "adapter_config.json").write_text(text)
    save_file(pair() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("mode", ["keep", "merge"])
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "ADALORA"}, "AdaLoRA"), ({"peft_type": "LOHA"}, "LoHa"), ({"peft_type": "VERA"}, "VeRA"),
        ({"peft_type": "SOMETHING_NEW"}, "SOMETHING_NEW"), ({"peft_type": None}, "no `peft_type`"),
        ({"use_dora": True}, "DoRA"), ({"layer_replication": [[0, 1]]}, "layer replication"),
        ({"trainable_token_indices": [1]}, "trainable tokens"), ({"lora_bias": True}, "bias"),
        ({"target_parameters": ["experts"]}, "target_parameters"), ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(tmp_path: Path, config: dict[str, Any], says: str, mode: str) -> None:
    write(tmp_path, config)
    arguments = ["plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "--adapters", mode, "--dry-run"]
    fails(3, *arguments, says=(says, "`a`", "merge_and_unload"))


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ("{", None, "not valid JSON"), ("[]", None, "not a JSON object"), ({"lora_alpha": "8"}, None, "lora_alpha"),
        ({"lora_alpha": 1e400}, None, "lora_alpha"), ({"r": True}, None, "`r`"), ({"r": 3}, None, "rank of"),
        ({"peft_type": 7}, None, "peft_type"), ({"rank_pattern": {"q": []}}, None, "rank_pattern"),
        ({"alpha_pattern": {"(a+)+b": 1}}, None, "too costly"),
        ({"alpha_pattern": {"a.*b.*c.*": 1}}, None, "too costly"),
        ({"alpha_pattern": {"(": 1}}, None, "alpha_pattern"), ({"alpha_pattern": [1]}, None, "alpha_pattern"),
        ({"modules_to_save": [3]}, None, "modules_to_save"), ({}, {"x": drawn(0, 2)}, "changes nothing"),
        ({}, {f"{MODULE}.lora_A.weight": drawn(0, 2, 4)}, "only one of its two factors"),
        ({}, pair() | {f"{MODULE}.lora_magnitude_vector": drawn(0, 6)}, "lora_magnitude_vector"),
        ({}, pair() | {f"{MODULE}.lora_B.weight": drawn(0, 6, 3)}, "not a pair"),
        ({}, {key: value.int() for key, value in pair().items()}, "not a pair"),
        ({}, pair(rows=7), "[7, 2]"),
        ({}, pair(module="base_model.model.layers.9.q"), "`layers.9.q.weight` is missing"),
    ],
)  # fmt: skip
def test_malformed_adapters_are_told(
    tmp_path: Path, config: Any, tensors: dict[str, torch.Tensor] | None, says: str
) -> None:
    write(tmp_path, config, tensors)
    fails(3, "plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "--dry-run", says=says)


@pytest.mark.parametrize("head", ["lm_head", "lm_head.decoder", "cls.predictions.decoder", "embed_out"])
def test_an_adapter_of_a_head_that_the_base_does_not_store_is_refused_with_the_reason(
    head: str, tmp_path: Path
) -> None:
    """Heads of BERT and RoBERTa were said to be missing, and not why."""
    write(tmp_path, tensors=pair(f"base_model.model.{head}"))
    arguments = ("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "--dry-run")
    fails(3, *arguments, says=f"`{head}.weight` is missing: it is tied to the embedding")
    (tmp_path / "base/config.json").write_text('{"tie_word_embeddings": false}')
    fails(3, *arguments, says=f"`{head}.weight` is missing\n")


def test_all_adapters_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    first = write(tmp_path, {"use_dora": True})
    second = tmp_path / "tasks" / "b"
    second.mkdir()
    (second / "adapter_config.json").write_text(json.dumps(CONFIG | {"peft_type": "LOHA"}))
    (second / "adapter_model.safetensors").write_bytes((first / "adapter_model.safetensors").read_bytes())
    fails(3, "plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "--dry-run", says=("DoRA", "LoHa"))


def test_weights_of_an_adapter_without_its_config_are_told(tmp_path: Path) -> None:
    (write(tmp_path) / "adapter_config.json").unlink()
    arguments = ["plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "--dry-run"]
    fails(3, *arguments, says=("`a`", "adapter_config.json"))


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    folder = write(tmp_path)
    fails(3, "plan", "--base", folder, "--task", f"it={folder}", "--dry-run", says="is an adapter")


def test_values_that_overflow_are_told_where(tmp_path: Path) -> None:
    write(tmp_path, tensors={key: value * 1e30 for key, value in pair().items()})
    for mode in ("keep", "merge"):
        arguments = ["--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "--adapters", mode]
        fails(3, "plan", *arguments, "-o", tmp_path / "p.json", says=("NaN or Inf", "`a`", "layers.0.q.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(6, 4, 2), (1, 9, 1), (300, 257, 5), (3, 70_000, 2)])
def test_any_range_of_a_changed_tensor_has_the_same_bits(
    tmp_path: Path, dtype: torch.dtype, rows: int, columns: int, rank: int
) -> None:
    config = {"r": rank, "lora_alpha": 3}
    write(tmp_path, config, pair(rank=rank, rows=rows, columns=columns))
    base = drawn(3, rows, columns).to(dtype)
    save_file({"layers.0.q.weight": base}, tmp_path / "base/model.safetensors")
    model = adapted(read_adapter(open_checkpoint(str(tmp_path / "tasks/a"))), open_checkpoint(str(tmp_path / "base")))
    tensor = model.tensors["layers.0.q.weight"]
    size, item = rows * columns, tensor.item_bytes
    with Reader() as reader:
        whole = reader.read(tensor, 0, size, torch.empty(size * item, dtype=torch.uint8).numpy()).tobytes()
        for start, stop in (
            (0, 0),
            (0, 1),
            (size - 1, size),
            (size // 3, size // 2),
            (columns - 1, min(size, columns + 2)),
        ):
            part = reader.read(tensor, start, stop, torch.empty(size * item, dtype=torch.uint8).numpy())
            assert part.tobytes() == whole[start * item : stop * item]
    factors = pair(rank=rank, rows=rows, columns=columns)
    exact = factors[f"{MODULE}.lora_B.weight"].double() @ factors[f"{MODULE}.lora_A.weight"].double() * (3 / rank)
    expected = (base.to(torch.promote_types(dtype, torch.float32)) + exact.float()).to(dtype)
    found = torch.frombuffer(bytearray(whole), dtype=dtype).view(rows, columns)
    # A float64 product is summed in another order: where it lies between two floats, it may fall to the other.
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert (found != expected).float().mean() < 1e-3


def test_inspect_tells_what_an_adapter_is(tmp_path: Path) -> None:
    folder = write(tmp_path, {"base_model_name_or_path": "org/model"})
    value = succeeds("inspect", folder, "--json").json
    assert value["adapter"] == {"kind": "lora", "base": "org/model", "modules": 1, "ranks": [2]}
    assert "LoHa" in succeeds("inspect", write(tmp_path, {"peft_type": "LOHA"})).out
