"""Blocks of the real parameter names of the usual families, of unknown models, and of one's own rules.

Names come from the models' own code, built on the meta device, or are written out where a library is not installed or
where files on disk have other names than modules in memory.
"""

import json
import random
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import flexmerge_cli
from flexmerge_cli.errors import FlexmergeError, SourceError, UsageError
from flexmerge_cli.family.blocks import Block, partition
from flexmerge_cli.family.blocks import _shipped_rules as shipped_rules
from flexmerge_cli.family.rules import MAX_BYTES, parse_rules, read_rules

GOLDEN = Path(__file__).parents[1] / "golden"

# One line a block, in order. Consecutive lines with `#` are repeated for each layer. `<-`: the block's modules, from
# the `#` on (from the start, without one); otherwise they are all that is below the block's name.

CLIP_VISION = """
vision_model.embeddings.class_embedding
vision_model.embeddings.patch_embedding
vision_model.embeddings.position_embedding
vision_model.pre_layrnorm
vision_model.encoder.layers.#.layer_norm1
vision_model.encoder.layers.#.self_attn <- self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj
vision_model.encoder.layers.#.layer_norm2
vision_model.encoder.layers.#.mlp <- mlp.fc1 mlp.fc2
vision_model.post_layernorm
"""

CLIP = f"""
{CLIP_VISION}
text_model.embeddings.token_embedding
text_model.embeddings.position_embedding
text_model.encoder.layers.#.layer_norm1
text_model.encoder.layers.#.self_attn
text_model.encoder.layers.#.layer_norm2
text_model.encoder.layers.#.mlp
text_model.final_layer_norm
visual_projection
text_projection
logit_scale
"""

BERT = """
bert.embeddings.word_embeddings
bert.embeddings.position_embeddings
bert.embeddings.token_type_embeddings
bert.embeddings.LayerNorm
bert.encoder.layer.#.attention <- attention.self.query attention.self.key attention.self.value attention.output.dense
bert.encoder.layer.#.attention.output.LayerNorm
bert.encoder.layer.#.mlp <- intermediate.dense output.dense
bert.encoder.layer.#.output.LayerNorm
bert.pooler.dense
"""

ROBERTA = BERT.replace("bert.", "roberta.").replace(
    "roberta.pooler.dense\n", "lm_head\nlm_head.dense\nlm_head.layer_norm"
)

BERT_DECODER = BERT.replace("bert.", "").replace(
    "encoder.layer.#.mlp",
    "encoder.layer.#.crossattention\nencoder.layer.#.crossattention.output.LayerNorm\nencoder.layer.#.mlp",
)

DEBERTA = """
embeddings.word_embeddings
embeddings.LayerNorm
encoder.rel_embeddings
encoder.conv.conv
encoder.conv.LayerNorm
encoder.LayerNorm
encoder.layer.#.attention <- attention.self.query_proj attention.self.key_proj attention.self.value_proj
    attention.self.pos_key_proj attention.self.pos_query_proj attention.output.dense
encoder.layer.#.attention.output.LayerNorm
encoder.layer.#.mlp <- intermediate.dense output.dense
encoder.layer.#.output.LayerNorm
"""

DISTILBERT = """
distilbert.embeddings.word_embeddings
distilbert.embeddings.position_embeddings
distilbert.embeddings.LayerNorm
distilbert.transformer.layer.#.attention <- attention.q_lin attention.k_lin attention.v_lin attention.out_lin
distilbert.transformer.layer.#.sa_layer_norm
distilbert.transformer.layer.#.ffn <- ffn.lin1 ffn.lin2
distilbert.transformer.layer.#.output_layer_norm
vocab_transform
vocab_layer_norm
vocab_projector
"""

GPT2 = """
transformer.wte
transformer.wpe
transformer.h.#.ln_1
transformer.h.#.attn <- attn.c_attn attn.c_proj
transformer.h.#.ln_2
transformer.h.#.mlp <- mlp.c_fc mlp.c_proj
transformer.ln_f
"""

LLAMA = """
model.embed_tokens
model.layers.#.input_layernorm
model.layers.#.self_attn <- self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj
model.layers.#.post_attention_layernorm
model.layers.#.mlp <- mlp.gate_proj mlp.up_proj mlp.down_proj
model.norm
lm_head
"""

QWEN3 = LLAMA.replace("self_attn.o_proj", "self_attn.o_proj self_attn.q_norm self_attn.k_norm")

QWEN3_MOE = """
model.embed_tokens
model.layers.#.input_layernorm
model.layers.#.self_attn
model.layers.#.post_attention_layernorm
model.layers.#.mlp
model.norm
lm_head
"""

GEMMA2 = """
model.embed_tokens
model.layers.#.input_layernorm
model.layers.#.self_attn
model.layers.#.post_attention_layernorm
model.layers.#.pre_feedforward_layernorm
model.layers.#.mlp
model.layers.#.post_feedforward_layernorm
model.norm
"""

PHI = """
model.embed_tokens
model.layers.#.input_layernorm
model.layers.#.self_attn <- self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense
model.layers.#.mlp <- mlp.fc1 mlp.fc2
model.final_layernorm
lm_head
"""

PHI3 = """
model.embed_tokens
model.layers.#.input_layernorm
model.layers.#.self_attn <- self_attn.qkv_proj self_attn.o_proj
model.layers.#.post_attention_layernorm
model.layers.#.mlp <- mlp.gate_up_proj mlp.down_proj
model.norm
lm_head
"""

T5 = """
shared
encoder.block.#.layer.0.layer_norm
encoder.block.#.layer.0.SelfAttention
encoder.block.#.layer.1.layer_norm
encoder.block.#.layer.1.DenseReluDense
encoder.final_layer_norm
decoder.block.#.layer.0.layer_norm
decoder.block.#.layer.0.SelfAttention
decoder.block.#.layer.1.layer_norm
decoder.block.#.layer.1.EncDecAttention
decoder.block.#.layer.2.layer_norm
decoder.block.#.layer.2.DenseReluDense
decoder.final_layer_norm
"""

WHISPER = """
model.encoder.conv1
model.encoder.conv2
model.encoder.embed_positions
model.encoder.layers.#.self_attn_layer_norm
model.encoder.layers.#.self_attn <- self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj
model.encoder.layers.#.final_layer_norm
model.encoder.layers.#.mlp <- fc1 fc2
model.encoder.layer_norm
model.decoder.embed_tokens
model.decoder.embed_positions
model.decoder.layers.#.self_attn_layer_norm
model.decoder.layers.#.self_attn
model.decoder.layers.#.encoder_attn_layer_norm
model.decoder.layers.#.encoder_attn
model.decoder.layers.#.final_layer_norm
model.decoder.layers.#.mlp <- fc1 fc2
model.decoder.layer_norm
"""

RESNET = """
resnet.embedder.embedder.convolution
resnet.embedder.embedder.normalization
resnet.encoder.stages.0.layers.#.convs <- layer.0.convolution layer.1.convolution layer.2.convolution
resnet.encoder.stages.0.layers.#.layer.0.normalization
resnet.encoder.stages.0.layers.#.layer.1.normalization
resnet.encoder.stages.0.layers.#.layer.2.normalization
resnet.encoder.stages.1.layers.0.convs <- resnet.encoder.stages.1.layers.0.layer.0.convolution
    resnet.encoder.stages.1.layers.0.layer.1.convolution resnet.encoder.stages.1.layers.0.layer.2.convolution
resnet.encoder.stages.1.layers.0.layer.0.normalization
resnet.encoder.stages.1.layers.0.layer.1.normalization
resnet.encoder.stages.1.layers.0.layer.2.normalization
resnet.encoder.stages.1.layers.0.shortcut <- resnet.encoder.stages.1.layers.0.shortcut.convolution
resnet.encoder.stages.1.layers.0.shortcut.normalization
classifier.1
"""

CONVNEXT = """
convnext.embeddings.patch_embeddings
convnext.embeddings.layernorm
convnext.encoder.stages.0.layers.#.dwconv
convnext.encoder.stages.0.layers.#.layernorm
convnext.encoder.stages.0.layers.#.mlp <- pwconv1 pwconv2
convnext.encoder.stages.0.layers.#.layer_scale_parameter
convnext.encoder.stages.1.downsampling_layer.0
convnext.encoder.stages.1.downsampling_layer.1
convnext.encoder.stages.1.layers.#.dwconv
convnext.encoder.stages.1.layers.#.layernorm
convnext.encoder.stages.1.layers.#.mlp <- pwconv1 pwconv2
convnext.encoder.stages.1.layers.#.layer_scale_parameter
convnext.layernorm
classifier
"""

LAYERS = 12
SIZE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
LLM = {**SIZE, "num_hidden_layers": LAYERS, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
BERTS = {**SIZE, "num_hidden_layers": LAYERS, "vocab_size": 64}
DEBERTA_V3 = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False, "position_buckets": 8,
              "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
              "conv_kernel_size": 3}  # fmt: skip

FAMILIES = {
    "clip": (
        tf.CLIPModel,
        lambda: tf.CLIPConfig(text_config=BERTS, vision_config={**SIZE, "num_hidden_layers": LAYERS}),
        CLIP,
    ),
    "bert": (tf.BertModel, lambda: tf.BertConfig(**BERTS), BERT.replace("bert.", "")),
    "bert decoder": (
        tf.BertModel,
        lambda: tf.BertConfig(**BERTS, is_decoder=True, add_cross_attention=True),
        BERT_DECODER,
    ),
    "bert classifier": (tf.BertForSequenceClassification, lambda: tf.BertConfig(**BERTS), BERT + "classifier"),
    "roberta": (tf.RobertaForMaskedLM, lambda: tf.RobertaConfig(**BERTS), ROBERTA),
    "deberta-v3": (tf.DebertaV2Model, lambda: tf.DebertaV2Config(**BERTS, **DEBERTA_V3), DEBERTA),
    "distilbert": (
        tf.DistilBertForMaskedLM,
        lambda: tf.DistilBertConfig(dim=16, hidden_dim=16, n_heads=2, n_layers=LAYERS, vocab_size=64),
        DISTILBERT,
    ),
    "gpt-2": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(n_embd=16, n_head=2, n_layer=LAYERS, vocab_size=64), GPT2),
    "llama": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**LLM), LLAMA),
    "mistral": (tf.MistralForCausalLM, lambda: tf.MistralConfig(**LLM), LLAMA),
    "qwen2": (tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**LLM), LLAMA),
    "qwen3": (tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(**LLM), QWEN3),
    "qwen3-moe": (tf.Qwen3MoeForCausalLM, lambda: tf.Qwen3MoeConfig(**LLM, num_experts=4), QWEN3_MOE),
    "gemma": (tf.GemmaForCausalLM, lambda: tf.GemmaConfig(**LLM), LLAMA.replace("lm_head\n", "")),
    "gemma2": (tf.Gemma2ForCausalLM, lambda: tf.Gemma2Config(**LLM), GEMMA2),
    "gemma3": (tf.Gemma3ForCausalLM, lambda: tf.Gemma3TextConfig(**LLM), GEMMA2),
    "phi": (tf.PhiForCausalLM, lambda: tf.PhiConfig(**BERTS), PHI),
    "phi3": (tf.Phi3ForCausalLM, lambda: tf.Phi3Config(**BERTS, pad_token_id=0), PHI3),
    "t5": (
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=LAYERS, vocab_size=64),
        T5,
    ),
    "whisper": (
        tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(
            d_model=16, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=2, vocab_size=64,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0,
        ),
        WHISPER,
    ),
    "resnet": (
        tf.ResNetForImageClassification,
        lambda: tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[LAYERS, 1]),
        RESNET,
    ),
    "convnext": (
        tf.ConvNextForImageClassification,
        lambda: tf.ConvNextConfig(hidden_sizes=[8, 8], depths=[LAYERS, LAYERS], num_stages=2),
        CONVNEXT,
    ),
}  # fmt: skip

# Written out: names on disk that are not those in memory, and libraries that are not installed here. `{a b}`: each.

ON_DISK = {
    "vit": (
        """
        vit.embeddings.cls_token
        vit.embeddings.patch_embeddings.projection.{weight bias}
        vit.embeddings.position_embeddings
        vit.encoder.layer.#.attention.attention.{query key value}.{weight bias}
        vit.encoder.layer.#.attention.output.dense.{weight bias}
        vit.encoder.layer.#.{intermediate output}.dense.{weight bias}
        vit.encoder.layer.#.{layernorm_before layernorm_after}.{weight bias}
        vit.layernorm.{weight bias}
        """,
        """
        vit.embeddings.cls_token
        vit.embeddings.patch_embeddings
        vit.embeddings.position_embeddings
        vit.encoder.layer.#.layernorm_before
        vit.encoder.layer.#.attention <- attention.attention.query attention.attention.key attention.attention.value
            attention.output.dense
        vit.encoder.layer.#.layernorm_after
        vit.encoder.layer.#.mlp <- intermediate.dense output.dense
        vit.layernorm
        """,
    ),
    "open_clip": (
        """
        positional_embedding
        text_projection
        logit_scale
        visual.class_embedding
        visual.positional_embedding
        visual.proj
        visual.conv1.weight
        visual.{ln_pre ln_post}.{weight bias}
        {visual.transformer transformer}.resblocks.#.{ln_1 ln_2 attn.out_proj mlp.c_fc mlp.c_proj}.{weight bias}
        {visual.transformer transformer}.resblocks.#.attn.{in_proj_weight in_proj_bias}
        token_embedding.weight
        ln_final.{weight bias}
        """,
        """
        visual.class_embedding
        visual.conv1
        visual.positional_embedding
        visual.ln_pre
        visual.transformer.resblocks.#.ln_1
        visual.transformer.resblocks.#.attn <- attn.in_proj_weight attn.in_proj_bias attn.out_proj
        visual.transformer.resblocks.#.ln_2
        visual.transformer.resblocks.#.mlp
        visual.ln_post
        visual.proj
        token_embedding
        positional_embedding
        transformer.resblocks.#.ln_1
        transformer.resblocks.#.attn
        transformer.resblocks.#.ln_2
        transformer.resblocks.#.mlp
        ln_final
        text_projection
        logit_scale
        """,
    ),
    "mixtral": (
        """
        model.embed_tokens.weight
        model.layers.#.{input_layernorm post_attention_layernorm self_attn.q_proj self_attn.o_proj}.weight
        model.layers.#.block_sparse_moe.{gate experts.0.w1 experts.0.w2 experts.11.w1 experts.11.w2}.weight
        model.norm.weight
        lm_head.weight
        """,
        """
        model.embed_tokens
        model.layers.#.input_layernorm
        model.layers.#.self_attn
        model.layers.#.post_attention_layernorm
        model.layers.#.block_sparse_moe <- block_sparse_moe.gate block_sparse_moe.experts.0.w1
            block_sparse_moe.experts.0.w2 block_sparse_moe.experts.11.w1 block_sparse_moe.experts.11.w2
        model.norm
        lm_head
        """,
    ),
    "timm vit": (
        """
        cls_token
        pos_embed
        patch_embed.proj.{weight bias}
        blocks.#.{norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2}.{weight bias}
        norm.{weight bias}
        head.{weight bias}
        """,
        """
        cls_token
        patch_embed
        pos_embed
        blocks.#.norm1
        blocks.#.attn
        blocks.#.norm2
        blocks.#.mlp
        norm
        head
        """,
    ),
    "torchvision vit": (
        """
        class_token
        conv_proj.weight
        encoder.pos_embedding
        encoder.layers.encoder_layer_#.{ln_1 self_attention.out_proj ln_2 mlp.0 mlp.3}.{weight bias}
        encoder.layers.encoder_layer_#.self_attention.{in_proj_weight in_proj_bias}
        encoder.ln.{weight bias}
        heads.head.{weight bias}
        """,
        """
        class_token
        conv_proj
        encoder.pos_embedding
        encoder.layers.encoder_layer_#.ln_1
        encoder.layers.encoder_layer_#.self_attention
        encoder.layers.encoder_layer_#.ln_2
        encoder.layers.encoder_layer_#.mlp <- mlp.0 mlp.3
        encoder.ln
        heads.head
        """,
    ),
    "resnet of torchvision and timm": (
        """
        {conv1 bn1}.weight
        layer1.#.{conv1 bn1 conv2 bn2}.weight
        layer2.0.{conv1 bn1 conv2 bn2 downsample.0 downsample.1}.weight
        fc.{weight bias}
        """,
        """
        conv1
        bn1
        layer1.#.convs <- conv1 conv2
        layer1.#.bn1
        layer1.#.bn2
        layer2.0.convs <- layer2.0.conv1 layer2.0.conv2
        layer2.0.bn1
        layer2.0.bn2
        layer2.0.downsample.0
        layer2.0.downsample.1
        fc
        """,
    ),
    "timm convnext": (
        """
        {stem.0 stem.1}.weight
        stages.0.blocks.#.gamma
        stages.0.blocks.#.{conv_dw norm mlp.fc1 mlp.fc2}.{weight bias}
        stages.1.{downsample.0 downsample.1}.weight
        stages.1.blocks.0.conv_dw.weight
        head.{norm fc}.weight
        """,
        """
        stem.0
        stem.1
        stages.0.blocks.#.conv_dw
        stages.0.blocks.#.norm
        stages.0.blocks.#.mlp
        stages.0.blocks.#.gamma
        stages.1.downsample.0
        stages.1.downsample.1
        stages.1.blocks.0.conv_dw
        head.norm
        head.fc
        """,
    ),
    "torchvision convnext": (
        """
        features.0.{0 1}.weight
        features.1.#.layer_scale
        features.1.#.block.{0 2 3 5}.{weight bias}
        features.2.{0 1}.weight
        """,
        """
        features.0.0
        features.0.1
        features.1.#.block.0
        features.1.#.block.2
        features.1.#.mlp <- block.3 block.5
        features.1.#.layer_scale
        features.2.0
        features.2.1
        """,
    ),
    "mlp of plain torch": ("{0 2 10}.{weight bias}\nnet.{0 2}.{weight bias}", "0\n2\n10\nnet.0\nnet.2"),
}


@cache
def names_of(family: str) -> tuple[str, ...]:
    if family in ON_DISK:
        return tuple(name for line in lines(ON_DISK[family][0]) for name in spelled_out(line))
    model, config, _ = FAMILIES[family]
    with torch.device("meta"):
        return tuple(name for name, _ in model(config()).named_parameters())


def spelled_out(line: str) -> list[str]:
    """`a.#.{b c}` as `a.0.b`, `a.0.c`, `a.1.b`, …"""
    if "{" in line:
        head, choices, tail = line.partition("{")[0], *line.partition("{")[2].split("}", 1)
        return [name for choice in choices.split() for name in spelled_out(head + choice + tail)]
    return [line.replace("#", str(i)) for i in range(LAYERS)] if "#" in line else [line]


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def expected_blocks(text: str) -> list[tuple[str, list[str] | None]]:
    """(block, its modules), in order."""
    joined = [line for line in textwrap.dedent(text).replace("\n    ", " ").splitlines() if line]
    blocks: list[tuple[str, list[str] | None]] = []
    repeated: list[tuple[str, list[str] | None]] = []
    for line in [*joined, ""]:
        block, _, modules = (part.strip() for part in line.partition("<-"))
        stem = block[: block.index("#") + 1] + "." if "#" in block else ""
        entry = block, [stem + module for module in modules.split()] or None
        if "#" in block:
            repeated.append(entry)
            continue
        for i in map(str, range(LAYERS) if repeated else ()):
            blocks += [(b.replace("#", i), ms and [m.replace("#", i) for m in ms]) for b, ms in repeated]
        repeated = []
        blocks += [entry] if block else []
    return blocks


def module_of(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def path_names(blocks: tuple[Block, ...]) -> list[str]:
    return [block.name for block in blocks]


@pytest.mark.parametrize("family", [*FAMILIES, *ON_DISK])
def test_attention_mlp_and_norms_of_each_layer_are_apart_and_in_order(family):
    text = FAMILIES[family][2] if family in FAMILIES else ON_DISK[family][1]
    expected = expected_blocks(text)
    blocks = partition(names_of(family))
    assert path_names(blocks) == [name for name, _ in expected]
    for block, (name, modules) in zip(blocks, expected, strict=True):
        if modules is None:
            assert all(tensor == name or tensor.startswith(name + ".") for tensor in block.tensors)
        else:
            assert {module_of(tensor) for tensor in block.tensors} == set(modules)


@pytest.mark.parametrize("family", [*FAMILIES, *ON_DISK])
@pytest.mark.parametrize("blocks", ["component", "layer", "tensor", "model"])
def test_each_tensor_is_in_exactly_one_block(family, blocks):
    assert_partitions(names_of(family), partition(names_of(family), blocks))


@pytest.mark.parametrize("family", [*FAMILIES, *ON_DISK])
def test_blocks_and_their_order_do_not_depend_on_the_order_of_names(family):
    names = names_of(family)
    shuffled = random.Random(0).sample(names, len(names))
    for blocks in ("component", "layer", "tensor"):
        assert path_names(partition(shuffled, blocks)) == path_names(partition(names, blocks))


@pytest.mark.parametrize("family", ["bert", "open_clip", "t5", "resnet", "resnet of torchvision and timm", "timm vit"])
@pytest.mark.parametrize("prefix", ["model.", "0.", "0.auto_model.", "module.net.1.net.", "visual.", "text_model."])
def test_a_prefix_of_whole_segments_changes_nothing_but_the_names(family, prefix):
    names = names_of(family)
    prefixed = partition([prefix + name for name in names])
    assert path_names(prefixed) == [prefix + name for name in path_names(partition(names))]


def test_golden_family_has_the_paper_s_blocks():
    golden = json.loads((GOLDEN / "order.json").read_text())
    with safe_open(GOLDEN / "family" / "base" / "model.safetensors", "np") as file:
        names = list(file.keys())
        blocks = partition(names)
        assert path_names(blocks) == golden["blocks"]
        for block in blocks:
            elements = sum(file.get_tensor(tensor).size for tensor in block.tensors)
            assert elements == golden["elements"][block.name]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", ["embeddings.LayerNorm", *(f"encoder.layer.{i}" for i in range(LAYERS)), "pooler.dense"]),
        ("llama", ["model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS)), "model.norm", "lm_head"]),
        ("open_clip", [*(f"visual.transformer.resblocks.{i}" for i in range(LAYERS)), "visual.ln_post"]),
        ("t5", ["shared", *(f"encoder.block.{i}" for i in range(LAYERS)), "encoder.final_layer_norm"]),
        (
            "resnet",
            [*(f"resnet.encoder.stages.0.layers.{i}" for i in range(LAYERS)), "resnet.encoder.stages.1.layers.0"],
        ),
        ("timm convnext", ["stem.1", *(f"stages.0.blocks.{i}" for i in range(LAYERS)), "stages.1"]),
        ("torchvision vit", [*(f"encoder.layers.encoder_layer_{i}" for i in range(LAYERS)), "encoder.ln"]),
        ("mixtral", ["model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS)), "model.norm"]),
    ],
)
def test_layer_takes_all_of_a_layer_and_leaves_the_rest_as_it_is(family, expected):
    found = path_names(partition(names_of(family), "layer"))
    start = found.index(expected[0])
    assert found[start : start + len(expected)] == expected


def test_tensor_goes_through_the_components_in_order():
    names = ["layers.10.mlp.w", "layers.9.mlp.w10", "layers.9.mlp.w9", "layers.9.ln_1.weight", "wte.weight"]
    assert path_names(partition(names, "tensor")) == names[::-1]


def test_model_is_one_block_in_the_order_given():
    assert partition(["b", "a.x"], "model") == (Block(name="model", tensors=("b", "a.x")),)


@pytest.mark.parametrize("blocks", ["component", "layer", "tensor", "model"])
def test_no_names_no_blocks(blocks):
    assert partition([], blocks) == ()


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        partition(["a", "b", "a"])


def test_layer_1_is_not_in_layer_11():
    names = [f"layers.{i}.{part}.weight" for i in (11, 1, 111) for part in ("mlp", "mlp_norm", "smlp", "mlp2")]
    blocks = partition(names)
    assert path_names(blocks) == [
        f"layers.{i}.{part}" for i in (1, 11, 111) for part in ("mlp_norm", "mlp", "mlp2", "smlp")
    ]
    assert all(len(block.tensors) == 1 for block in blocks)


class Mixer(torch.nn.Module):
    """A layer of a model that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.mixer = torch.nn.ModuleDict({"w": torch.nn.Linear(2, 2), "v": torch.nn.Linear(2, 2)})
        self.gates = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))


def test_a_model_no_rule_knows_is_split_by_number_and_module():
    model = torch.nn.ModuleDict(
        {
            "trunk": torch.nn.ModuleList(
                torch.nn.ModuleDict({"units": mixers}) for mixers in map(make_mixers, (12, 1))
            ),
            "readout": torch.nn.Linear(2, 2),
            "entry": torch.nn.ModuleDict({"left": torch.nn.Linear(2, 2), "right": torch.nn.Linear(2, 2)}),
        }
    )
    units = [f"trunk.{i}.units.{j}" for i, count in ((0, 12), (1, 1)) for j in range(count)]
    names = [name for name, _ in model.named_parameters()]
    rest = ["entry.left", "entry.right", "readout"]
    assert path_names(partition(names)) == rest + [f"{u}.{part}" for u in units for part in ("gates", "mixer", "scale")]
    assert path_names(partition(names, "layer")) == rest + units


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (
            ["trunk.3.router.experts.0.w", "trunk.3.router.experts.10.w.weight", "trunk.3.router.gate"],
            ["trunk.3.router"],
        ),
        (["trunk.3.a.0.weight", "trunk.3.a.2.weight", "trunk.3.b"], ["trunk.3.a", "trunk.3.b"]),
        (["b.3.layer.0.Local.q.weight", "b.3.layer.1.Dense.w.weight"], ["b.3.layer.0.Local", "b.3.layer.1.Dense"]),
        (["0.vit.trunk.3.a.w", "0.vit.top.x.weight", "1.weight"], ["0.vit.top.x", "0.vit.trunk.3.a", "1"]),
        (["0.trunk.3.a.w", "0.top.x.weight", "1.weight"], ["0.top.x", "0.trunk.3.a", "1"]),
        (["top.x.weight", "top.x.bias", "top.y", ".weight"], [".weight", "top.x", "top.y"]),
        (["a.01.x.w", "a.1.x.w", "a.9.x.w", "a.10.x.w"], ["a.01.x", "a.1.x", "a.9.x", "a.10.x"]),
    ],
)
def test_numbers_that_are_no_layer_do_not_split_one(names, blocks):
    assert path_names(partition(names)) == blocks


def make_mixers(count: int) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(Mixer() for _ in range(count))


segments = st.sampled_from(
    ["layers", "layer", "0", "1", "01", "11", "block", "encoder", "decoder", "attn", "mlp", "fc1", "output", "dense",
     "LayerNorm", "norm", "weight", "bias", "features", "x", "x_1", "patch_embed", "N", "experts", "",
     " ", "²", "é", "9" * 5000]
) | st.text(max_size=3)  # fmt: skip
unique_names = st.lists(st.lists(segments, min_size=1, max_size=7).map(".".join), unique=True, max_size=40)


@given(names=unique_names, blocks=st.sampled_from(["component", "layer", "tensor", "model"]))
def test_any_names_are_partitioned(names, blocks):
    result = partition(names, blocks)
    assert_partitions(names, result)
    assert path_names(partition(names[::-1], blocks)) == path_names(result)


def assert_partitions(names, blocks):
    position = {name: i for i, name in enumerate(names)}
    assert sorted(tensor for block in blocks for tensor in block.tensors) == sorted(names)
    assert len(set(path_names(blocks))) == len(blocks)
    for block in blocks:
        assert block.tensors
        assert list(block.tensors) == sorted(block.tensors, key=position.__getitem__)


OWN_RULES = """words:
  ends: [norm, lm_head]
rules:
  - embed_tokens
  - match: layers.N.self_attn.q_proj|k_proj
    as: qk
  - layers.N.*.v_proj
  - layers.N.mlp
  - <ends>
"""


def test_own_rules_come_first_and_what_they_leave_is_split_by_number_and_module(tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text(OWN_RULES)
    blocks = partition(names_of("llama"), rules)
    assert blocks == partition(names_of("llama"), str(rules))
    layer = "model.layers.11"
    assert {b.name: [module_of(t) for t in b.tensors] for b in blocks if b.name.startswith(layer)} == {
        f"{layer}.qk": [f"{layer}.self_attn.q_proj", f"{layer}.self_attn.k_proj"],
        f"{layer}.self_attn.v_proj": [f"{layer}.self_attn.v_proj"],
        f"{layer}.mlp": [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj", f"{layer}.mlp.down_proj"],
        f"{layer}.self_attn": [f"{layer}.self_attn.o_proj"],
        f"{layer}.input_layernorm": [f"{layer}.input_layernorm"],
        f"{layer}.post_attention_layernorm": [f"{layer}.post_attention_layernorm"],
    }


def test_blocks_of_own_rules_stand_in_the_order_of_the_rules(tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [lm_head, layers.N.mlp, layers.N.self_attn, embed_tokens]")
    found = path_names(partition(names_of("llama"), rules))
    assert found[0] == "lm_head"
    parts = ["mlp", "self_attn", "input_layernorm", "post_attention_layernorm"]
    assert found[1:-2] == [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in parts]
    assert found[-2:] == ["model.embed_tokens", "model.norm"]


@pytest.mark.parametrize(
    ("pattern", "rename", "name", "block"),
    [
        ("mlp", None, "a.mlp.w", "a.mlp"),
        ("mlp", None, "a.mlp2.w", None),
        ("N.mlp", None, "a.1.mlp.w", "a.1.mlp"),
        ("N.mlp", None, "a.block_1.mlp.w", "a.block_1.mlp"),
        ("N.mlp", None, "a.block1.mlp.w", None),
        ("1.mlp", None, "a.11.mlp.w", None),
        ("a.*.w", None, "a.b.w", "a.b.w"),
        ("a.*.w", None, "a.b.b.w", None),
        ("a|b.c", None, "x.b.c.w", "x.b.c"),
        ("a", "z", "a.w", "z"),
        ("a", "z", "x.a.w", "x.z"),
        ("l.N.a|b", "z", "x.l.3.b.w", "x.l.3.z"),
        ("l.N.k.N.a", "z", "l.3.k.4.a.w", "l.3.k.4.z"),
        ("l.N", "z", "l.3.w", "l.3.z"),
        ("no", None, "no.w", "no"),
    ],
)
def test_what_a_pattern_matches_and_how_the_block_is_called(pattern, rename, name, block):
    rule = f"{{match: {pattern!r}, as: {rename}}}" if rename else pattern
    assert parse_rules(f"rules:\n  - {rule}\n", "rules.yaml").block_of(name) == block


@pytest.mark.skipif(not hasattr(yaml, "CSafeLoader"), reason="PyYAML without libyaml")
def test_libyaml_reads_the_shipped_rules_as_the_plain_loader_does():
    path = Path(flexmerge_cli.__file__).parent / "family" / "rules.yaml"
    assert read_rules(path, yaml.CSafeLoader) == read_rules(path, yaml.SafeLoader)


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ("", 1, "rules"),
        ("words: {a: [b]}", 1, "rules"),
        ("- a", 1, None),
        ("rules:\n  - a\nwrods: {}", 3, "`words`"),
        ("rules:\n  - {match: a,\n     sa: b}", 3, "`as`"),
        ("rules:\n  - as: b", 2, "match"),
        ("rules: a", 1, None),
        ("rules: []", 1, None),
        ("rules:\n  - [a]", 2, None),
        ("rules:\n  - match: {a: b}", 2, None),
        ("rules:\n  - a\n  - a..b", 3, "segment"),
        ("rules:\n  - a\n  - a*", 3, "segment"),
        ("rules:\n  - a.<nrom>\nwords: {norm: [a]}", 2, "`norm`"),
        ("rules:\n  - {match: a, as: b.c}", 2, "segment"),
        ("rules:\n  - {match: a, as: ''}", 2, "segment"),
        ('rules:\n  - {match: a, as: "\\uD800"}', 2, "segment"),
        ("words:\n  a: [<b>]\nrules: [c]", 2, "segment"),
        ("words:\n  a: b\nrules: [c]", 2, None),
        ("rules:\n  - a\nrules:\n  - b", 3, None),
        ("rules:\n  - &a b\n  - *a", 3, "quote"),
        ("rules:\n  - *.b", 2, "quote"),
        ("rules:\n  - a: b: c", 2, None),
        ("rules:\n  - a\n---\nrules: [b]", 3, None),
        ('rules:\n  - "\\UFFFFFFFF"', 2, None),
        ("rules: " + "[" * 5000, 1, None),
        ("words: {a: [" + "b, " * 5000 + "]}\nrules: [\n<a>, <a>, <a>, <a>, <a>]", 3, "set"),
        ("split: [{parts: 2, match: [a,\n" + "a, " * 1000 + "]}]", 2, "set"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]", 2, None),
        ("? [a]\n: b", 1, None),
        ("rules: [!!binary x]\nx: !!python/object/apply:os.abort []", 2, None),
    ],
)
def test_a_bad_rules_file_is_refused_with_file_line_and_nearest_key(tmp_path, text, line, hint):
    rules = tmp_path / "own.yaml"
    rules.write_text(text)
    with pytest.raises(UsageError) as caught:
        partition(["a.weight"], rules)
    assert caught.value.message.endswith(f"\n  {rules}, line {line}")
    assert hint is None or hint in caught.value.hint


def test_terminal_codes_of_a_rules_file_are_not_printed():
    with pytest.raises(UsageError) as caught:
        parse_rules('"\\e[2J' + "x" * 9999 + '": 1', "rules.yaml")
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 500


def test_what_is_no_rules_file_is_refused_unread(tmp_path):
    (tmp_path / "huge.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "latin1.yaml").write_bytes(b"rules:\n  - caf\xe9\n")
    for path in (tmp_path / "huge.yaml", tmp_path / "latin1.yaml", tmp_path, "a\0.yaml"):
        with pytest.raises(UsageError):
            partition(["a"], path)
    with pytest.raises(UsageError, match="line 2"):
        partition(["a"], tmp_path / "latin1.yaml")


@pytest.mark.parametrize("blocks", ["missing.yaml", "missing.YML", "some/file", Path("missing")])
def test_a_missing_rules_file_is_a_missing_source(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"missing|some/file"):
        partition(["a"], blocks)


def test_an_unknown_word_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        partition(["a"], "layers")
    assert "`layers`" in caught.value.message
    assert "`tensor`" in caught.value.message
    assert caught.value.hint == "did you mean `layer`?"


@given(text=st.text(alphabet="rules:wordmatchN<>|*&!{}[]-,.?%'\"\\ \n\t#0a\x00\ufeff\U0001f600", max_size=60))
def test_any_text_is_rules_or_a_usage_error(text):
    for attempt in (text, f"rules:\n- {text}", f"words: {{a: [b]}}\nrules: [{text}]"):
        try:
            rules = parse_rules(attempt, "rules.yaml")
        except FlexmergeError as error:
            assert isinstance(error, UsageError)
        else:
            rules.block_of("a.0.rules.word")


WORDS = st.sampled_from(["layers", "3", "attn", "mlp", "fc1", "norm", "LayerNorm", "block_1", "weight", "x", "output"])


@given(st.lists(WORDS, min_size=1, max_size=7).map(".".join))
def test_one_search_tells_whether_any_rule_matches(name):
    """Each rule was tried on each name: 24 searches a name, however long."""
    rules = shipped_rules()
    assert bool(rules.any_rule.search(name)) == any(rule.pattern.search(name) for rule in rules.rules)


def test_a_rules_file_is_read_once_for_all_tensors_that_it_may_split(tmp_path, monkeypatch):
    """It was read for each tensor: 26 kB of patterns took minutes for a small model."""
    from flexmerge_cli.family import blocks, splitting

    path, read = tmp_path / "own.yaml", []
    path.write_text("split:\n- {match: [x, N.q_proj], parts: 2, dim: 1}\n- {match: q_proj, parts: 3}\n")
    monkeypatch.setattr(blocks, "read_rules", lambda path, reads=blocks.read_rules: read.append(path) or reads(path))
    found = splitting.find_splits({f"layers.{number}.q_proj.weight": (3, 2) for number in range(50)}, path)
    assert {(split.dim, split.parts) for split in found} == {(1, 2)}
    assert splitting.find_splits({"layers.0.q_proj.bias": (3,)}, path)[0].parts == 3
    assert len(read) == 2


def test_equal_segments_are_compared_once(monkeypatch):
    """Names of a stranger's header of 32 MiB took 14 minutes."""
    from flexmerge_cli.family import blocks

    seen = []
    monkeypatch.setattr(blocks, "_natural", lambda text, natural=blocks._natural: seen.append(text) or natural(text))
    partition([f"{number % 5}.{'a1.' * 50}{number}" for number in range(200)])
    assert len(seen) == len(set(seen)) < 300
