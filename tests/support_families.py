"""Tiny models of many architectures of transformers, for the support table of docs/checkpoints.md."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers as hf

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 64, "max_position_embeddings": 32} | SIZES
LANGUAGE = TEXT | {"num_key_value_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 16} | SIZES
CLIP = {"model_type": "clip_vision_model"} | IMAGE
SIGLIP = {"model_type": "siglip_vision_model"} | IMAGE
LLAMA = {"model_type": "llama"} | LANGUAGE
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}}
SPEECH = {
    "vocab_size": 32, "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
} | SIZES  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model and, where that is another, the base that it was fine-tuned from."""

    model: type
    config: Callable[[], Any]
    base: type | None = None
    """The class of the base, whose config holds the model's."""
    lora: Any = "all-linear"
    """The modules that a LoRA changes."""


def both(kind: type, **more: Any) -> Callable[[], Any]:
    """Two towers of one size."""
    text = SIZES | {"vocab_size": 64, "max_position_embeddings": 16}
    return lambda: kind(text_config=text, vision_config=IMAGE, **more)


def of(kind: type, **sizes: Any) -> Callable[[], Any]:
    return partial(kind, **sizes)


def seeing(model: type, config: type, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Architecture:
    """A language model with a vision tower."""
    return Architecture(model, of(config, text_config=text, vision_config=vision, **more))


IMAGE_TOKEN = {"image_token_index": 63}
ATTENTION = ["q_proj", "v_proj"]
ARCHITECTURES = {
    "BERT": Architecture(hf.BertForSequenceClassification, of(hf.BertConfig, **TEXT)),
    "RoBERTa": Architecture(hf.RobertaForMaskedLM, of(hf.RobertaConfig, **TEXT)),
    "ESM": Architecture(hf.EsmForMaskedLM, of(hf.EsmConfig, pad_token_id=1, mask_token_id=2, **TEXT)),
    "GPT-2": Architecture(
        hf.GPT2LMHeadModel, of(hf.GPT2Config, vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ),
    "GPT-NeoX": Architecture(hf.GPTNeoXForCausalLM, of(hf.GPTNeoXConfig, **TEXT)),
    "Llama": Architecture(hf.LlamaForCausalLM, of(hf.LlamaConfig, **LANGUAGE)),
    "T5": Architecture(
        hf.T5ForConditionalGeneration,
        of(hf.T5Config, vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
    ),
    "Wav2Vec2": Architecture(hf.Wav2Vec2ForCTC, of(hf.Wav2Vec2Config, **SPEECH)),
    "AST": Architecture(
        hf.ASTForAudioClassification, of(hf.ASTConfig, max_length=32, num_mel_bins=16, **(SIZES | {"patch_size": 8}))
    ),
    "ViT": Architecture(hf.ViTForImageClassification, of(hf.ViTConfig, **IMAGE)),
    "BEiT": Architecture(hf.BeitForImageClassification, of(hf.BeitConfig, **IMAGE)),
    "DINOv2": Architecture(hf.Dinov2ForImageClassification, of(hf.Dinov2Config, **IMAGE)),
    "Swin": Architecture(
        hf.SwinForImageClassification,
        of(hf.SwinConfig, image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4),
    ),
    "ConvNeXt": Architecture(
        hf.ConvNextForImageClassification, of(hf.ConvNextConfig, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    ),
    "CLIP": Architecture(hf.CLIPModel, both(hf.CLIPConfig, projection_dim=8)),
    "CLIP, vision tower": Architecture(hf.CLIPVisionModel, both(hf.CLIPConfig, projection_dim=8), hf.CLIPModel),
    "SigLIP, vision tower": Architecture(hf.SiglipVisionModel, both(hf.SiglipConfig), hf.SiglipModel, ATTENTION),
    "LLaVA": seeing(hf.LlavaForConditionalGeneration, hf.LlavaConfig, LLAMA, CLIP, **IMAGE_TOKEN),
    "LLaVA-NeXT": seeing(hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig, LLAMA, CLIP, **IMAGE_TOKEN),
    "PaliGemma": seeing(
        hf.PaliGemmaForConditionalGeneration,
        hf.PaliGemmaConfig,
        {"model_type": "gemma", "head_dim": 8} | LANGUAGE,
        SIGLIP,
        projection_dim=16,
        **IMAGE_TOKEN,
    ),
    "Gemma 3": seeing(
        hf.Gemma3ForConditionalGeneration,
        hf.Gemma3Config,
        {"model_type": "gemma3_text", "head_dim": 8} | LANGUAGE,
        SIGLIP,
        mm_tokens_per_image=4,
    ),
    "Qwen2-VL": seeing(
        hf.Qwen2VLForConditionalGeneration,
        hf.Qwen2VLConfig,
        LANGUAGE | MROPE,
        {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2},
    ),
    "Qwen2.5-VL": seeing(
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLConfig,
        LANGUAGE | MROPE,
        {"depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16},
    ),
    "InternVL": seeing(
        hf.InternVLForConditionalGeneration,
        hf.InternVLConfig,
        {"model_type": "qwen2"} | LANGUAGE,
        SIZES | {"image_size": [32, 32], "patch_size": [16, 16]},
    ),
    "Mixtral": Architecture(
        hf.MixtralForCausalLM, of(hf.MixtralConfig, num_local_experts=4, **LANGUAGE), lora=ATTENTION
    ),
    "Qwen3-MoE": Architecture(
        hf.Qwen3MoeForCausalLM,
        of(hf.Qwen3MoeConfig, num_experts=4, moe_intermediate_size=8, head_dim=8, **LANGUAGE),
        lora=ATTENTION,
    ),
    "DeepSeek-V3": Architecture(
        hf.DeepseekV3ForCausalLM,
        of(
            hf.DeepseekV3Config,
            n_routed_experts=4,
            moe_intermediate_size=8,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            **LANGUAGE,
        ),
        lora=["q_b_proj", "kv_b_proj", "o_proj"],
    ),
    "Qwen3-VL-MoE": Architecture(
        hf.Qwen3VLMoeForConditionalGeneration,
        of(
            hf.Qwen3VLMoeConfig,
            text_config=LANGUAGE
            | {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, "num_experts_per_tok": 2}
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        ),
        lora=ATTENTION,
    ),
    "Nomic BERT": Architecture(hf.NomicBertForMaskedLM, of(hf.NomicBertConfig, **TEXT)),
    "GTE": Architecture(hf.GteForMaskedLM, of(hf.GteConfig, **TEXT)),
    "gpt-oss": Architecture(
        hf.GptOssForCausalLM, of(hf.GptOssConfig, num_local_experts=4, head_dim=8, **LANGUAGE), lora=ATTENTION
    ),
}
