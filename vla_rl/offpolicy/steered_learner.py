"""DSRL, EXPO and the residual on a frozen torch policy, from replay: features once, base chunks for every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from torch import Tensor

from vla_rl.data.feature_cache import FeatureCache
from vla_rl.data.replay import ReplayBatch, ReplayBuffer
from vla_rl.offpolicy.expo import ExpoConfig
from vla_rl.offpolicy.learner import AgentLearner
from vla_rl.offpolicy.steering import steered_update
from vla_rl.offpolicy.update import Metrics
from vla_rl.policies.steered import SteeredPolicy
from vla_rl.protocols import Prefix
from vla_rl.train.checkpoint import CheckpointError


class SteeredLearner(AgentLearner):
    """An `AgentLearner` whose agent sees the base policy's features and its chunks. The base policy never changes."""

    def __init__(self, policy: SteeredPolicy, seed: int) -> None:
        super().__init__(policy, seed)
        num_stored = policy.config.agent.num_stored if isinstance(policy.config.agent, ExpoConfig) else 0
        stored = _FeaturesAndChunks(policy, num_stored, self._generator) if num_stored else None
        self._cache = FeatureCache(self.policy.base, flat=stored)
        self.feature_dim: int = self._cache.flat.width

    def prepare(self, buffer: ReplayBuffer) -> None:
        """Encode the observations that came in."""
        self._cache.refresh(buffer)

    def update(self, batches: ReplayBatch) -> Metrics:
        """One call of the agent's update with minibatches [U, B, ...]. Metrics stay on the device."""
        self.state, metrics = steered_update(
            self.agent, self.state, self.normalized(batches), self.policy.base_chunks, self._normal
        )
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"base_policy": self._cache.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the state is of another agent, or was learned on another base policy."""
        if state["base_policy"] != self._cache.fingerprint():
            raise CheckpointError(
                "the stored run steers another base policy; resume with the one that it began with (--policy)"
            )
        super().load_state_dict(state)

    def _seen(self, obs: np.ndarray) -> np.ndarray:
        """Rows of the cache alone: they hold the state."""
        return obs[..., : self.feature_dim]

    def _normal(self, shape: tuple[int, ...]) -> Array:
        return jnp.asarray(torch.randn(shape, generator=self._generator).numpy())


class _FeaturesAndChunks:
    """Rows [M, F + S * H * A]: what the agent sees, and S base chunks in [-1, 1], drawn when it was encoded."""

    def __init__(self, policy: SteeredPolicy, num_chunks: int, generator: torch.Generator) -> None:
        self._policy, self._num_chunks, self._generator = policy, num_chunks, generator
        self.width: int = policy.base.feature_dim + num_chunks * policy.action_horizon * policy.action_dim

    def flatten(self, prefix: Prefix) -> Tensor:
        """float32 [M, width]."""
        features = prefix.pooled.float()
        shape = (self._num_chunks, len(features), self._policy.action_horizon, self._policy.action_dim)
        noise = torch.randn(shape, generator=self._generator).to(features.device)
        return torch.cat([features, *(self._policy.chunks_of(prefix, z).flatten(1) for z in noise)], dim=1)


__all__ = ["SteeredLearner"]
