"""Samplers bind a policy to a way of exploring: what a collector draws from and a learner scores with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.likelihood import ENTROPY, LOG_DENSITY, Family, LogProb, log_prob, require_family
from vla_rl.flow.noise import NoiseSource, draw_normal
from vla_rl.flow.sampling import sample_chain
from vla_rl.protocols import FlowPolicy, GaussianPolicy, Prefix, chunk_shape


class ScoredTrace(Protocol):
    """A trace that ratios can be formed with. `values` [N, E]: log-probabilities; `log_prob` [N]: their joint."""

    values: Tensor
    log_prob: Tensor

    def __len__(self) -> int: ...

    def select(self, rows: Tensor) -> Any: ...


class ChunkSampler(Protocol):
    """Draws normalised chunks with a trace, and scores traces under the current parameters."""

    policy: Any
    has_transitions: bool
    """Scores hold whole distributions: a KL to a reference can be formed."""
    has_entropy: bool
    """How widely it explores is learned."""

    def sample(self, prefix: Prefix, generator: NoiseSource) -> tuple[Tensor, Any]:
        """Normalised actions [N, H, A] and their trace."""
        ...

    def score(self, prefix: Prefix, trace: Any) -> LogProb:
        """Differentiable scores of a trace."""
        ...

    def joint_clip(self, clip: float) -> float:
        """The bound on the joint log-ratio that a ratio clip amounts to."""
        ...


class FlowSampler:
    """Stochastic denoising chains of a flow policy."""

    def __init__(self, policy: FlowPolicy, config: FlowSamplerConfig, noise_head: nn.Module | None = None) -> None:
        if config.scored_dims is None and chunk_shape(policy)[1] != policy.action_dim:
            config = replace(config, scored_dims=policy.action_dim)  # padding reaches no environment
        config.scored_shape(*chunk_shape(policy))  # fail before anything runs
        if (noise_head is not None) != (config.kernel == "flow_noise"):
            raise ValueError(
                f"kernel {config.kernel} with noise_head={type(noise_head).__name__}: flow_noise alone has one"
            )
        self.policy = policy
        self.config = config
        self.noise_head = noise_head
        self.has_transitions, self.has_entropy = True, noise_head is not None

    def sample(self, prefix: Prefix, generator: NoiseSource) -> tuple[Tensor, Any]:
        x_1 = draw_normal((len(prefix), *chunk_shape(self.policy)), generator, prefix.tokens.device)
        return sample_chain(self.policy, prefix, x_1, self.config, generator, self.noise_head)

    def score(self, prefix: Prefix, trace: Any) -> LogProb:
        return log_prob(self.policy, prefix, trace, self.config, self.noise_head)

    def joint_clip(self, clip: float) -> float:
        return self.config.joint_clip(clip, *chunk_shape(self.policy))


@dataclass(frozen=True)
class GaussianTrace:
    """`actions`: normalised, not clamped, [N, H, A]. `values` [N, 1] and `log_prob` [N]: of the scored part."""

    actions: Tensor
    values: Tensor
    log_prob: Tensor

    def __len__(self) -> int:
        return self.actions.shape[0]

    def select(self, rows: Tensor) -> GaussianTrace:
        return GaussianTrace(self.actions[rows], self.values[rows], self.log_prob[rows])

    def to(self, device: torch.device | str) -> GaussianTrace:
        return GaussianTrace(self.actions.to(device), self.values.to(device), self.log_prob.to(device))

    @staticmethod
    def concatenate(parts: list[GaussianTrace]) -> GaussianTrace:
        return GaussianTrace(
            torch.cat([p.actions for p in parts]),
            torch.cat([p.values for p in parts]),
            torch.cat([p.log_prob for p in parts]),
        )


class GaussianSampler:
    """Chunks of a `GaussianPolicy`, in the family of its noise. `scored_horizon`: the action steps that count (None:
    all)."""

    has_transitions = has_entropy = True

    def __init__(self, policy: GaussianPolicy, scored_horizon: int | None = None) -> None:
        horizon = policy.action_horizon if scored_horizon is None else scored_horizon
        if not 1 <= horizon <= policy.action_horizon:
            raise ValueError(f"scored_horizon is {horizon}, expected 1..{policy.action_horizon}")
        self.policy = policy
        self.family: Family = getattr(policy, "noise_family", "gaussian")
        require_family(self.family)
        self.scored_horizon = horizon

    def _score(self, prefix: Prefix, actions: Tensor) -> LogProb:
        h, d = self.scored_horizon, self.policy.action_dim  # padding reaches no environment
        mean, std = self.policy.distribution(prefix)
        mean, std = mean.float()[:, :h, :d], std.float().expand_as(mean)[:, :h, :d]
        joint = LOG_DENSITY[self.family](actions[:, :h, :d], mean, std).sum(dim=(1, 2))
        no_step = torch.full((len(actions), 1), -1, dtype=torch.int64, device=actions.device)
        entropy = ENTROPY[self.family](std).mean(dim=(1, 2))
        return LogProb(joint[:, None], no_step, joint, entropy, mean[:, None], std[:, None], self.family)

    @torch.no_grad()
    def sample(self, prefix: Prefix, generator: NoiseSource) -> tuple[Tensor, GaussianTrace]:
        mean, std = self.policy.distribution(prefix)
        noise = draw_normal(mean.shape, generator, mean.device)
        if self.family == "laplace":
            noise = laplace_of_normal(noise)
        actions = mean.float() + std.float() * noise
        score = self._score(prefix, actions)
        return actions, GaussianTrace(actions, score.values, score.joint)

    def score(self, prefix: Prefix, trace: GaussianTrace) -> LogProb:
        return self._score(prefix, trace.actions)

    def joint_clip(self, clip: float) -> float:
        return clip


def laplace_of_normal(noise: Tensor) -> Tensor:
    """Standard normal numbers to Laplace ones of unit variance with the same quantiles (exact far into the tails)."""
    tail = torch.special.erfc(noise.double().abs() * math.sqrt(0.5))  # 2 (1 - Phi(|z|))
    return (-torch.log(tail) * math.sqrt(0.5)).copysign(noise.double()).to(noise.dtype)
