"""A frozen policy that a small agent steers: by its noise (DSRL), by edits (EXPO), by a correction (residual).

The base policy and the agent's parameters are in one folder, so it is saved, evaluated and deployed like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jax import Array
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.core import ActionChunk, ActionSpec, Observation
from vla_rl.data.flat_prefix import FlatPrefix
from vla_rl.data.normalization import Normalizer
from vla_rl.offpolicy.arrays import to_jax, to_torch
from vla_rl.offpolicy.build import SteeringConfig, build_steering
from vla_rl.offpolicy.dsrl import DSRLConfig
from vla_rl.offpolicy.networks import AgentSpec
from vla_rl.offpolicy.steering import steered_chunks
from vla_rl.policies.blocks.deployed_agent import DeployedAgent
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.policies.build import PolicyConfig
from vla_rl.policies.checkpoints.native import policy_class_of
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.protocols import LearnsFromPrefix, Prefix, TokenPolicy, chunk_shape, require


@dataclass(frozen=True)
class SteeredPolicyConfig:
    """`base`: the frozen policy's own, with its sizes. `agent`: what steers it; a `DSRLConfig` is DSRL with noise
    aliasing."""

    base: PolicyConfig = field(default_factory=FlowMLPConfig)
    agent: SteeringConfig = field(default_factory=DSRLConfig)

    @property
    def action_horizon(self) -> int:
        return self.base.action_horizon


class SteeredPolicy(DeployedAgent):
    """Implements `Policy`. `base`: the policy to freeze, on its device; without it weights and bounds are to be loaded.

    `action_normalizer` maps the bounds of `action_spec` to [-1, 1], where the agent sees all chunks.
    """

    def __init__(
        self, config: SteeredPolicyConfig, base: nn.Module | None = None, action_spec: ActionSpec | None = None
    ) -> None:
        policy: Any = policy_class_of(config.base)(config.base) if base is None else base
        spec = AgentSpec(policy.feature_dim, policy.action_horizon, policy.action_dim)
        super().__init__(build_steering(config.agent, spec))
        self.config = config
        self.base: Any = policy.requires_grad_(False)
        self._flat = FlatPrefix(policy)
        self.action_horizon, self.action_dim = spec.action_horizon, spec.action_dim
        self.action_normalizer = NormalizerBuffers(self.action_dim)
        if action_spec is not None:
            self.action_normalizer.set(Normalizer.action_box(action_spec))
        if base is not None:
            self.to(next(base.parameters()).device)

    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """The deployed chunk, [N, H, A] in the environment's units. `noise` chooses EXPO's base chunks; the others
        have no use for it."""
        return ActionChunk(self._chunk(obs, noise, explore=False))

    def explore(self, obs: Observation, noise: Tensor) -> Tensor:
        """A chunk to explore with, [N, H, A] in the environment's units."""
        return self._chunk(obs, noise, explore=True)

    def base_chunks(self, rows: Array, noise: Array) -> Array:
        """Rows [M, R] (`FlatPrefix`) and noise [M, H, A] -> chunks [M, H, A] as of `chunks_of`."""
        device = self.action_normalizer.offset.device
        return to_jax(self.chunks_of(self._flat.unflatten(to_torch(rows, device)), to_torch(noise, device)))

    @torch.no_grad()
    def chunks_of(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Prefix of M observations and noise [M, H, A] -> the base policy's chunks as they are executed, in [-1, 1].

        Padded dimensions of the base policy's chunk get the mean of their noise, zero.
        """
        padding = chunk_shape(self.base)[1] - self.action_dim
        chunks = self.base.chunks(prefix, functional.pad(noise, (0, padding)))
        return self.action_normalizer.normalize(self.base.unnormalize_actions(chunks)).clamp(-1.0, 1.0)

    @torch.no_grad()
    def _chunk(self, obs: Observation, noise: Tensor, explore: bool) -> Tensor:
        rows = to_jax(self._flat.flatten(self.base.encode(self.base.preprocess(obs))))
        chunk = steered_chunks(self.agent, self.deployed_state, rows, to_jax(noise), self.base_chunks, explore=explore)
        return self.action_normalizer.unnormalize(to_torch(chunk, self.action_normalizer.offset.device))


def require_steerable(policy: nn.Module | None, horizon: int, action_spec: ActionSpec, agent: SteeringConfig) -> None:
    """Raise TypeError for a policy that makes no chunks of noise and a prefix, and ValueError where a chunk of the
    agent, `horizon` steps, is not one of the policy, where DSRL would choose noise that a policy of tokens does not
    read, or where the bounds are not finite."""
    require(policy, LearnsFromPrefix, by="steering a frozen policy")
    own: Any = policy
    if horizon != own.action_horizon:
        raise ValueError(
            f"horizon is {horizon}, the policy predicts {own.action_horizon} steps; whole chunks are steered, so make "
            "train.horizon and policy.action_horizon equal"
        )
    greedy = isinstance(policy, TokenPolicy) and not getattr(own.config, "temperature", 0.0)
    if greedy and isinstance(agent, DSRLConfig):
        raise ValueError(
            f"DSRL chooses the noise, and {type(policy).__name__} takes the most probable tokens whatever it is; give "
            "it a temperature if it has one, or steer it by EXPO or a residual"
        )
    Normalizer.action_box(action_spec)


__all__ = ["SteeredPolicy", "SteeredPolicyConfig", "require_steerable"]
