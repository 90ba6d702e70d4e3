"""The policy of every recipe of `vla_rl.configs.vla`, and both heads on a model of transformers, at the size of a test.

All have features of the same width, 32 and the state, so that what is compiled for one serves the others.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.unit.tiny_vlms import vlm_json
from vla_rl.configs import get_recipe
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.onpolicy.build import SamplerConfig
from vla_rl.onpolicy.tokens import TokenSamplerConfig
from vla_rl.policies.blocks.decoder import DecoderConfig
from vla_rl.policies.blocks.expert import ActionExpertConfig
from vla_rl.policies.blocks.prismatic import PrismaticConfig
from vla_rl.policies.blocks.vision_transformer import VisionTransformerConfig
from vla_rl.policies.build import PolicyConfig
from vla_rl.policies.hf_backbone import HFBackboneConfig
from vla_rl.policies.hf_vlm import HFFlowConfig, HFTokenConfig, TokenHeadConfig
from vla_rl.policies.openvla import OpenVLAConfig
from vla_rl.policies.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTTokensConfig
from vla_rl.policies.pi0 import Pi0Config
from vla_rl.policies.smolvla import SmolVLAConfig
from vla_rl.train.loop import TrainConfig

FLOW = ("pi0", "pi05", "smolvla", "hf_flow")
TOKENS = ("openvla", "openvla_oft_tokens", "hf_token")
FAMILIES = (*FLOW, "openvla_oft", *TOKENS)
WIDTH = 32


def tiny_policy(name: str, action_horizon: int, chunk_dim: int) -> PolicyConfig:
    """`chunk_dim`: padded action dimensions of the families that have such."""
    if name.startswith("hf"):
        return _on_transformers(name, action_horizon)
    config = get_recipe(name).policy
    if isinstance(config, Pi0Config | SmolVLAConfig):
        return replace(
            config,
            action_horizon=action_horizon,
            max_action_dim=chunk_dim,
            num_steps=2,
            vision=_tower(config.vision),
            language=_decoder(config.language),
            expert=_decoder(config.expert),
        )
    if isinstance(config, OpenVLAConfig):
        return replace(config, action_horizon=action_horizon, chunk_dim=chunk_dim, vlm=_prismatic(config.vlm))
    assert isinstance(config, OpenVLAOFTConfig | OpenVLAOFTTokensConfig)
    body = replace(config.body, vlm=_prismatic(config.body.vlm))
    return replace(config, action_horizon=action_horizon, chunk_dim=chunk_dim, body=body)


def tiny_sampler(name: str, scored_horizon: int) -> SamplerConfig:
    """The recipe's, for so many executed steps."""
    if name == "hf_flow":
        return FlowSamplerConfig(num_steps=2, scored_horizon=scored_horizon)
    if name == "hf_token":
        return TokenSamplerConfig(scored_horizon=scored_horizon)
    train = get_recipe(name).train
    assert isinstance(train, TrainConfig)
    sampler: Any = replace(train.sampler, scored_horizon=scored_horizon)
    return replace(sampler, num_steps=2) if isinstance(sampler, FlowSamplerConfig) else sampler


def open_zeros(policy: nn.Module) -> None:
    """Matrices that begin as zeros (of gates, of the last layer) hide what is before them."""
    g = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=g)


def _on_transformers(name: str, action_horizon: int) -> PolicyConfig:
    backbone = HFBackboneConfig(vlm_json("smolvlm"), image_size=56, prefix_width=WIDTH)
    if name == "hf_flow":
        expert = ActionExpertConfig(WIDTH, num_layers=2)
        return HFFlowConfig(action_horizon=action_horizon, num_steps=2, backbone=backbone, expert=expert)
    head = TokenHeadConfig(num_bins=16, decoding="autoregressive", width=WIDTH, num_layers=1)
    return HFTokenConfig(action_horizon=action_horizon, backbone=backbone, head=head)


def _tower(config: VisionTransformerConfig) -> VisionTransformerConfig:
    patch = 8 if config.patch_size == 8 else 16  # SmolVLA makes one token of two by two
    return replace(config, width=16, depth=1, mlp_width=16, num_heads=2, image_size=32, patch_size=patch)


def _decoder(config: DecoderConfig) -> DecoderConfig:
    scale = 1.0 if config.embedding_scale == 1.0 else WIDTH**0.5
    sizes = replace(config, width=WIDTH, depth=2, mlp_width=WIDTH, num_heads=2, num_kv_heads=1, head_dim=16)
    return replace(sizes, embedding_scale=scale)


def _prismatic(config: PrismaticConfig) -> PrismaticConfig:
    dino, siglip = (
        replace(tower, width=16, depth=2, mlp_width=16, image_size=28) for tower in (config.dino, config.siglip)
    )
    return replace(config, dino=dino, siglip=siglip, decoder=_decoder(config.decoder))


__all__ = ["FAMILIES", "FLOW", "TOKENS", "WIDTH", "open_zeros", "tiny_policy", "tiny_sampler"]
