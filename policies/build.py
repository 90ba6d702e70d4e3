"""A new policy from its config, for an environment."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from vla_rl.core import EnvSpec
from vla_rl.policies.checkpoints.native import policy_class_of
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.policies.gaussian import GaussianMLPConfig
from vla_rl.policies.hf_vlm import HFFlowConfig, HFTokenConfig
from vla_rl.policies.openvla import OpenVLAConfig
from vla_rl.policies.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTTokensConfig
from vla_rl.policies.pi0 import Pi0Config
from vla_rl.policies.smolvla import SmolVLAConfig
from vla_rl.policies.tiny import TinyVLAConfig

PolicyConfig = (
    TinyVLAConfig
    | FlowMLPConfig
    | GaussianMLPConfig
    | Pi0Config
    | SmolVLAConfig
    | OpenVLAConfig
    | OpenVLAOFTConfig
    | OpenVLAOFTTokensConfig
    | HFFlowConfig
    | HFTokenConfig
    | Any  # of a policy from outside, whose module has called register_policy
)


def build_policy(config: Any, spec: EnvSpec, *, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """A policy of `config` for the environment of `spec`; `seed` decides its first weights and no other generator.

    Sizes of state and action, and the cameras, are the environment's. Raises ValueError where the config names others,
    and TypeError for a config that no registered policy has.
    """
    wanted: dict[str, Any] = {"state_dim": spec.state_dim, "action_dim": spec.action.dim}
    for name, value in wanted.items():
        own = getattr(config, name)
        if own not in (0, value):
            raise ValueError(f"{type(config).__name__}.{name} is {own}, {spec.name} has {value}; leave it at 0")
    cameras = next((f for f in fields(config) if f.name == "cameras"), None)
    if cameras is not None:
        if config.cameras not in (cameras.default, tuple(spec.cameras)):
            raise ValueError(f"the policy's cameras are {config.cameras}, {spec.name} has {tuple(spec.cameras)}")
        wanted["cameras"] = tuple(spec.cameras)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return policy_class_of(config)(replace(config, **wanted)).to(device)
