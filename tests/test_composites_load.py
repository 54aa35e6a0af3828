"""What an export of a model of several parts gives, loaded by the library that the model is of; skipped without it.

Each library saves a base and a fine-tune of it; these go through plan, merge and export.
"""

import json

import pytest
import torch

from flexmerge_cli import open_bundle

from .program import succeeds

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def moved(model, seed):
    """Every weight a little."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=draw).to(weight.dtype)
    return model.eval()


def exported(root, *more):
    """Make a bundle of `root/a`, a fine-tune of `root/base`, merged beside `root/b` without a loss."""
    tasks = [word for name in ("a", "b") for word in ("--task", f"{name}={root / name}")]
    succeeds("plan", "--base", root / "base", *tasks, *more, "-o", root / "plan.json")
    succeeds("merge", root / "plan.json", "-o", root / "bundle")
    succeeds("export", root / "bundle", "--task", "a", "-o", root / "out")
    return root / "out"


def test_sentence_transformers_encodes_the_same(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformers = pytest.importorskip("transformers")
    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "same", "word"]))
    transformers.BertTokenizer(str(words / "vocab.txt")).save_pretrained(words)
    transformers.BertModel(transformers.BertConfig(vocab_size=8, **SMALL)).save_pretrained(words)
    modules = [parts.Transformer(str(words)), parts.Pooling(16), parts.Dense(16, 4), parts.Normalize()]
    model = library.SentenceTransformer(modules=modules, device="cpu")
    for seed, name in enumerate(("base", "b", "a")):
        moved(model, seed).save(str(tmp_path / name))
    found = library.SentenceTransformer(str(exported(tmp_path)), device="cpu")
    given = library.SentenceTransformer(str(tmp_path / "a"), device="cpu")
    assert [type(module).__name__ for module in found] == [type(module).__name__ for module in given]
    assert (found.encode(["the same", "word"]) == given.encode(["the same", "word"])).all()


def test_the_transformers_model_beside_parts_is_the_tasks(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    model = transformers.BertModel(transformers.BertConfig(vocab_size=8, **SMALL))
    for seed, name in enumerate(("base", "b", "a")):
        moved(model, seed).save_pretrained(tmp_path / name)
        (tmp_path / name / "2_Dense").mkdir()
        save_file({"linear.weight": torch.randn(4, 16)}, tmp_path / name / "2_Dense/model.safetensors")
    exported(tmp_path)
    bundle = open_bundle(tmp_path / "bundle")
    for found in (bundle.model("a"), bundle.runtime().model("a")):
        own, given = found.state_dict(), model.state_dict()
        assert set(own) == set(given) and all(own[key].equal(given[key]) for key in given)


def test_a_pipeline_of_diffusers_holds_the_same_components(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8, cross_attention_dim=16, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=20, projection_dim=16, **SMALL))
    (tmp_path / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    words = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=words, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for seed, name in enumerate(("base", "b", "a")):
        moved(unet, seed)
        moved(text, seed)
        pipeline.save_pretrained(tmp_path / name)
    found = diffusers.StableDiffusionPipeline.from_pretrained(exported(tmp_path))
    for name in ("unet", "vae", "text_encoder"):
        own, given = getattr(found, name).state_dict(), getattr(pipeline, name).state_dict()
        assert set(own) == set(given) and all(own[key].equal(given[key]) for key in given)
    assert found.tokenizer("a").input_ids == words("a").input_ids


def test_timm_gives_the_same_logits(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3)
    for seed, name in enumerate(("base", "b", "a")):
        timm.models.save_for_hf(moved(model, seed), tmp_path / name, safe_serialization=True)
    found = timm.create_model(f"local-dir:{exported(tmp_path)}", pretrained=True).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert found(image).equal(model(image))


def test_open_clip_gives_the_same_features(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_model

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**config)
    for seed, name in enumerate(("base", "b", "a")):
        (tmp_path / name).mkdir()
        save_model(moved(model, seed), tmp_path / name / "open_clip_model.safetensors")
        text = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
        (tmp_path / name / "open_clip_config.json").write_text(text)
    found, _ = open_clip.create_model_from_pretrained(f"local-dir:{exported(tmp_path)}")
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert found.eval().encode_image(image).equal(model.encode_image(image))


MODEL = """
import torch
from transformers import PreTrainedModel
from .configuration_own import OwnConfig

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, x):
        return self.layer(x)
"""
CONFIG = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, width=4, **more):
        super().__init__(**more)
        self.width = width
"""


def test_a_model_with_code_of_its_own_loads(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    named = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    for seed, name in enumerate(("base", "b", "a")):
        (tmp_path / name).mkdir()
        layer = moved(torch.nn.Linear(4, 4), seed)
        state = {f"layer.{key}": value.detach().clone() for key, value in layer.state_dict().items()}
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "own", "width": 4, "auto_map": named}))
        (tmp_path / name / "configuration_own.py").write_text(CONFIG)
        (tmp_path / name / "modeling_own.py").write_text(MODEL)
    out = exported(tmp_path, "--with-code")
    found = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    state = load_file(tmp_path / "a/model.safetensors")
    assert all(value.equal(state[key]) for key, value in found.state_dict().items()) and len(state) == 2
