"""Tiny networks of Hugging Face transformers with example inputs: random weights, float64, eval.

Attention is ``eager`` unless said otherwise. Every weight is drawn anew, so that no head starts at
zero and no norm is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.vit import modeling_vit

# Older transformers keep the layers of a ViT in an encoder, under other names.
OLD_VIT = hasattr(modeling_vit, "ViTEncoder")
VIT_LAYERS = "vit.encoder.layer" if OLD_VIT else "vit.layers"

Built = tuple[nn.Module, dict[str, Tensor]]

TEXT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = TEXT | {"num_key_value_heads": 2}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "image_size": 16, "patch_size": 4, "num_labels": 5,
}  # fmt: skip
BART = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3,
}  # fmt: skip


def _tokens(length: int = 7) -> Tensor:
    return torch.randint(3, 50, (2, length))


def _text(**more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": _tokens(), **more}


def _masked() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return _text(attention_mask=mask)


def _pair() -> dict[str, Tensor]:
    return _text(decoder_input_ids=_tokens(5))


def _image(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


# name -> class, configuration, inputs
Recipe = tuple[str, Callable[[dict[str, Any]], Any], Callable[[], dict[str, Tensor]]]


def _of(config: str, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda more: getattr(hf, config)(**(fields | more))


def _detr(more: dict[str, Any]) -> Any:
    backbone = hf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    fields = {k: v for k, v in BART.items() if not k.endswith("_id") and k != "vocab_size"}
    return hf.DetrConfig(
        **fields, **more, num_queries=3, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, backbone_config=backbone,
    )  # fmt: skip


def _clip(more: dict[str, Any]) -> Any:
    vision = VISION | {"image_size": 32, "patch_size": 8}
    return hf.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8, **more)


CORE: dict[str, Recipe] = {
    "bert": ("BertModel", _of("BertConfig", **TEXT), _masked),
    "gpt2": (
        "GPT2LMHeadModel",
        _of("GPT2Config", vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32,
            bos_token_id=1, eos_token_id=2),
        _text,
    ),
    "llama": ("LlamaForCausalLM", _of("LlamaConfig", **GROUPED), _text),
    "mistral": (
        "MistralForCausalLM",
        _of("MistralConfig", **GROUPED, head_dim=4, sliding_window=4),
        _text,
    ),
    "vit": ("ViTForImageClassification", _of("ViTConfig", **VISION), lambda: _image(16)),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        _of("ConvNextV2Config", hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, num_labels=5),
        _image,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        _of("T5Config", vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0),
        _pair,
    ),
}  # fmt: skip
EXTRAS: dict[str, Recipe] = {
    "qwen2": ("Qwen2ForCausalLM", _of("Qwen2Config", **GROUPED), _text),
    "qwen3": ("Qwen3ForCausalLM", _of("Qwen3Config", **GROUPED, head_dim=4), _text),
    "gemma": ("GemmaForCausalLM", _of("GemmaConfig", **GROUPED, head_dim=4), _text),
    "gemma2": ("Gemma2ForCausalLM", _of("Gemma2Config", **GROUPED, head_dim=4), _text),
    "phi": ("PhiForCausalLM", _of("PhiConfig", **TEXT), _text),
    "phi3": ("Phi3ForCausalLM", _of("Phi3Config", **GROUPED), _text),
    "gpt_neox": ("GPTNeoXForCausalLM", _of("GPTNeoXConfig", **TEXT, rotary_pct=0.5), _text),
    "distilbert": (
        "DistilBertModel",
        _of("DistilBertConfig", vocab_size=50, dim=16, n_layers=2, n_heads=4, hidden_dim=24),
        _masked,
    ),
    "roberta": ("RobertaModel", _of("RobertaConfig", **TEXT), _masked),
    "electra": ("ElectraModel", _of("ElectraConfig", **TEXT, embedding_size=12), _masked),
    "albert": ("AlbertModel", _of("AlbertConfig", **TEXT, embedding_size=12), _masked),
    "opt": (
        "OPTForCausalLM",
        _of("OPTConfig", vocab_size=50, hidden_size=16, num_hidden_layers=2, ffn_dim=24,
            num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=16),
        _masked,
    ),
    "bloom": (
        "BloomForCausalLM",
        _of("BloomConfig", vocab_size=50, hidden_size=16, n_layer=2, n_head=4),
        _text,
    ),
    "falcon": (
        "FalconForCausalLM",
        _of("FalconConfig", vocab_size=50, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=4, alibi=True, multi_query=False, parallel_attn=False),
        _text,
    ),
    "bart": (
        "BartForConditionalGeneration", _of("BartConfig", **BART, max_position_embeddings=32), _pair
    ),
    "deberta_v2": (
        "DebertaV2Model",
        _of("DebertaV2Config", **TEXT, relative_attention=True, position_buckets=8,
            pos_att_type=["p2c", "c2p"], max_relative_positions=16),
        _masked,
    ),
    "swin": (
        "SwinForImageClassification",
        _of("SwinConfig", image_size=32, patch_size=4, embed_dim=8, depths=[2, 2],
            num_heads=[2, 4], window_size=4, num_labels=5),
        _image,
    ),
    "segformer": (
        "SegformerForImageClassification",
        _of("SegformerConfig", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
            hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4],
            mlp_ratios=[2, 2], num_labels=5),
        _image,
    ),
    "detr": ("DetrForObjectDetection", _detr, _image),
    "clip": ("CLIPModel", _clip, lambda: _masked() | _image()),
    "whisper": (
        "WhisperForConditionalGeneration",
        _of("WhisperConfig", **BART, num_mel_bins=8, max_source_positions=10,
            max_target_positions=12),
        lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _tokens(5)},
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        _of("Wav2Vec2Config", **TEXT, apply_spec_augment=False, conv_dim=[8, 8],
            conv_stride=[4, 2], conv_kernel=[8, 4], num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2),
        lambda: {"input_values": torch.randn(2, 200)},
    ),
    "mamba": (
        "MambaForCausalLM",
        _of("MambaConfig", vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2),
        _text,
    ),
    "mixtral": (
        "MixtralForCausalLM",
        _of("MixtralConfig", **GROUPED, num_local_experts=3, num_experts_per_tok=2,
            experts_implementation="eager"),
        _text,
    ),
    "deit": ("DeiTForImageClassification", _of("DeiTConfig", **VISION), lambda: _image(16)),
    "beit": (
        "BeitForImageClassification",
        _of("BeitConfig", **VISION, use_relative_position_bias=True),
        lambda: _image(16),
    ),
    "resnet": (
        "ResNetForImageClassification",
        _of("ResNetConfig", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5),
        _image,
    ),
}  # fmt: skip


def build(name: str, attention: str = "eager") -> Built:
    """Return a network by name, in float64 and eval mode, and keyword inputs for it."""
    recipe, config, inputs = (CORE | EXTRAS)[name]
    torch.manual_seed(0)
    model = getattr(hf, recipe)(config({"attn_implementation": attention}))
    for module in model.modules():
        for local, parameter in module.named_parameters(recurse=False):
            is_norm = parameter.ndim == 1 and local == "weight"
            nn.init.uniform_(parameter, 0.5, 1.5) if is_norm else nn.init.normal_(parameter, 0, 0.3)
    given = {k: t.double() if t.is_floating_point() else t for k, t in inputs().items()}
    return model.double().eval(), given


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the floating-point tensors among what a network gives for keyword inputs.

    Without what is handed on to its next call, which grows with the stream.
    """
    with torch.no_grad():
        found = dict(model(**inputs))
    found.pop("encoder_last_hidden_state", None)
    tensors = torch.utils._pytree.tree_leaves(found)
    return [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
