"""transformers' PI0 with the sizes and the weights of a pi0 of ours: the reference of its test and benchmark."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PI0Config, PI0ForConditionalGeneration

from vla_rl.policies.blocks.decoder import DecoderConfig
from vla_rl.policies.blocks.images import to_unit_range
from vla_rl.policies.pi0 import Pi0, Pi0Config
from vla_rl.protocols import PolicyInputs

_RENAMES = (
    ("model.vlm.vision_tower.embeddings.patch_embedding", "vision.patch_embedding"),
    ("model.vlm.vision_tower.embeddings.position_embedding.weight", "vision.position_embedding"),
    ("model.vlm.vision_tower.encoder.layers", "vision.layers"),
    ("model.vlm.vision_tower.post_layernorm", "vision.post_layernorm"),
    ("model.vlm.multi_modal_projector.linear", "projector"),
    ("model.vlm.language_model", "language_model"),
    ("model.dit", "expert"),
    ("embed_action_time.", ""),
)


def transformers_pi0(config: Pi0Config) -> PI0ForConditionalGeneration:
    """A new model of the sizes of `config`. Its picture token is the last of the vocabulary."""

    def gemma(size: DecoderConfig) -> dict[str, Any]:
        names = {"hidden_size": size.width, "intermediate_size": size.mlp_width, "num_hidden_layers": size.depth}
        heads = {"num_attention_heads": size.num_heads, "num_key_value_heads": size.num_kv_heads}
        return {"model_type": "gemma", **names, **heads, "head_dim": size.head_dim}

    seen = config.vision
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": seen.width,
        "intermediate_size": seen.mlp_width,
        "num_hidden_layers": seen.depth,
        "num_attention_heads": seen.num_heads,
        "image_size": seen.image_size,
        "patch_size": seen.patch_size,
        "vision_use_head": False,
    }
    vocabulary = config.language.vocab_size
    vlm = {
        "model_type": "paligemma",
        "text_config": gemma(config.language) | {"vocab_size": vocabulary},
        "vision_config": vision,
        "projection_dim": config.language.width,
        "image_token_id": vocabulary - 1,
    }
    horizon = {"chunk_size": config.action_horizon}
    widths = {"max_state_dim": config.max_state_dim, "max_action_dim": config.max_action_dim}
    return PI0ForConditionalGeneration(PI0Config(vlm_config=vlm, dit_config=gemma(config.expert), **horizon, **widths))


def names_of_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors (or gradients) under our names."""
    ours = {}
    for name, value in state.items():
        for theirs, own in _RENAMES:
            name = name.replace(theirs, own) if name.startswith(theirs) else name
        ours[name] = value
    return ours


def same_weights(theirs: PI0ForConditionalGeneration, config: Pi0Config) -> Pi0:
    """Ours with the weights of `theirs`. Raises ValueError where either has one that the other has not."""
    ours = Pi0(replace(config, state_dim=config.state_dim or 1, action_dim=config.action_dim or 1))
    weights = {k: v for k, v in names_of_ours(theirs.state_dict()).items() if k != "expert.embed_tokens.weight"}
    missing, unknown = ours.load_state_dict(weights, strict=False)
    if unknown or not all(name.startswith("inputs.") for name in missing):
        raise ValueError(f"not the same model: missing {missing}, unknown {unknown}")
    return ours


def their_inputs(ours: Pi0, inputs: PolicyInputs) -> dict[str, Tensor]:
    """`inputs` of ours as theirs: pictures of missing cameras are black and masked."""
    config, n = ours.config, len(inputs)
    cameras, slots, size = config.cameras, config.num_image_slots, config.vision.image_size
    pictures = torch.full((n, slots, 3, size, size), -1.0)
    for i, camera in enumerate(cameras):
        pictures[:, i] = to_unit_range(inputs.images[camera])
    image_ids = torch.full((n, config.vision.num_patches * len(cameras)), config.language.vocab_size - 1)
    return {
        "input_ids": torch.cat([image_ids, inputs.tokens], dim=1),
        "attention_mask": torch.cat([torch.ones_like(image_ids), (inputs.tokens != 0).long()], dim=1),
        "pixel_values": pictures,
        "pixel_attention_mask": (torch.arange(slots) < len(cameras)).expand(n, slots),
        "state": functional.pad(inputs.state, (0, config.max_state_dim - inputs.state.shape[1])),
    }


__all__ = ["names_of_ours", "same_weights", "their_inputs", "transformers_pi0"]
