"""Sizes of a model from the shapes of its tensors; what shapes do not say, from published sizes or `vlm_config.json`.

A matrix of queries is heads times head_dim wide, so shapes do not tell the two apart. The published backbones are known
by their width. For another one, its Hugging Face config.json lies beside the weights under the name `vlm_config.json`;
our writers put it there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vla_rl.policies.blocks.decoder import DecoderConfig
from vla_rl.policies.blocks.vision_transformer import VisionTransformerConfig
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.tensors import read_json

BACKBONE_FILE = "vlm_config.json"
_SIGLIP_HEADS = {1152: 16, 768: 12}  # So400m, Base
_SMOLLM_HEAD_DIM = {960: 64, 576: 64, 2048: 64}

Shape = Callable[[str], tuple[int, ...]]


def backbone_config(folder: Path) -> dict[str, Any]:
    """`vlm_config.json`, or nothing where there is none."""
    return read_json(folder / BACKBONE_FILE) if (folder / BACKBONE_FILE).is_file() else {}


def write_backbone_config(folder: Path, model_type: str, vision: VisionTransformerConfig, text: DecoderConfig) -> None:
    """The entries of a Hugging Face config.json that `vision_sizes` and `head_dim` read, and the sizes beside them."""
    values = {
        "model_type": model_type,
        "text_config": {
            "hidden_size": text.width,
            "num_hidden_layers": text.depth,
            "intermediate_size": text.mlp_width,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "rms_norm_eps": text.norm_eps,
            "vocab_size": text.vocab_size,
        },
        "vision_config": {
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "intermediate_size": vision.mlp_width,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
    }
    (folder / BACKBONE_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def vision_sizes(shape: Shape, depth: int, backbone: dict[str, Any], where: Path) -> VisionTransformerConfig:
    """SigLIP. `shape`: of our keys below `vision`."""
    width, _, patch, _ = shape("vision.patch_embedding.weight")
    heads = backbone.get("vision_config", {}).get("num_attention_heads") or _SIGLIP_HEADS.get(width)
    if heads is None:
        raise _unknown("vision tower", width, where)
    return VisionTransformerConfig(
        width,
        depth,
        mlp_width=shape("vision.layers.0.mlp.fc1.weight")[0],
        num_heads=heads,
        image_size=math.isqrt(shape("vision.position_embedding")[-2]) * patch,
        patch_size=patch,
    )


def gemma_sizes(shape: Shape, tower: str, depth: int, *, vocab: bool) -> DecoderConfig:
    """Gemma 1, which has one head of keys and values in every size: its width is head_dim."""
    head_dim, width = shape(f"{tower}.layers.0.self_attn.k_proj.weight")
    return DecoderConfig(
        width,
        depth,
        mlp_width=shape(f"{tower}.layers.0.mlp.gate_proj.weight")[0],
        num_heads=shape(f"{tower}.layers.0.self_attn.q_proj.weight")[0] // head_dim,
        num_kv_heads=1,
        head_dim=head_dim,
        vocab_size=shape(f"{tower}.embed_tokens.weight")[0] if vocab else 0,
        embedding_scale=width**0.5 if vocab else 1.0,
    )


def smollm_sizes(
    shape: Shape, tower: str, depth: int, backbone: dict[str, Any], where: Path, *, vocab: bool, cross_every: int = 0
) -> DecoderConfig:
    """SmolLM2 (a Llama), or an expert with its heads."""
    text = backbone.get("text_config", {})
    language_width = shape("language_model.layers.0.self_attn.q_proj.weight")[1]
    head_dim = text.get("head_dim") or _SMOLLM_HEAD_DIM.get(language_width)
    if head_dim is None:
        raise _unknown("language model", language_width, where)
    rows, width = shape(f"{tower}.layers.0.self_attn.q_proj.weight")
    return DecoderConfig(
        width,
        depth,
        mlp_width=shape(f"{tower}.layers.0.mlp.gate_proj.weight")[0],
        num_heads=rows // head_dim,
        num_kv_heads=shape(f"{tower}.layers.0.self_attn.k_proj.weight")[0] // head_dim,
        head_dim=head_dim,
        vocab_size=shape(f"{tower}.embed_tokens.weight")[0] if vocab else 0,
        norm_offset=False,
        norm_eps=text.get("rms_norm_eps", 1e-5),
        activation="silu",
        embedding_scale=width**0.5 if vocab else 1.0,
        cross_attention_every=cross_every,
    )


def _unknown(what: str, width: int, where: Path) -> PolicyCheckpointError:
    return PolicyCheckpointError(
        f"{where}: a {what} of width {width} is none of the published ones, and shapes do not say how many heads it "
        f"has; copy the config.json of its backbone (Hugging Face format) beside the weights as {BACKBONE_FILE}"
    )


__all__ = [
    "BACKBONE_FILE",
    "backbone_config",
    "gemma_sizes",
    "smollm_sizes",
    "vision_sizes",
    "write_backbone_config",
]
