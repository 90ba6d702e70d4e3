"""From the configs of a recipe to a sampler and a learner, with every mismatch an error before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.sampler import ChunkSampler, GaussianSampler
from vla_rl.onpolicy.actor import DemoSource
from vla_rl.onpolicy.dppo import DenoisingDiscount
from vla_rl.onpolicy.fpo import FPOConfig, FPOSampler
from vla_rl.onpolicy.grpo import GRPO, GRPOConfig
from vla_rl.onpolicy.ppo import PPO, PPOConfig, flow_sampler
from vla_rl.onpolicy.process_reward import ProgressLabels
from vla_rl.onpolicy.tokens import TokenSampler, TokenSamplerConfig
from vla_rl.protocols import FlowPolicy, GaussianPolicy, TokenPolicy, require


@dataclass(frozen=True)
class GaussianSamplerConfig:
    """`scored_horizon`: the action steps that count, those executed (None: all). The family of the density is that of
    the policy's noise."""

    scored_horizon: int | None = None


SamplerConfig = FlowSamplerConfig | FPOConfig | GaussianSamplerConfig | TokenSamplerConfig
AlgorithmConfig = PPOConfig | GRPOConfig


def build_sampler(policy: Any, config: SamplerConfig, *, seed: int) -> ChunkSampler:
    """`seed`: of the first weights of a noise head. Raises TypeError where the policy lacks what the sampler needs."""
    if isinstance(config, FlowSamplerConfig):
        return flow_sampler(policy, config, seed=seed)
    if isinstance(config, FPOConfig):
        require(policy, FlowPolicy, by="FPO")
        return FPOSampler(policy, config)
    if isinstance(config, TokenSamplerConfig):
        require(policy, TokenPolicy, by="the token sampler")
        return TokenSampler(policy, config)
    require(policy, GaussianPolicy, by="the Gaussian sampler")
    return GaussianSampler(policy, config.scored_horizon)


def build_learner(
    sampler: ChunkSampler,
    config: AlgorithmConfig,
    *,
    step_weighting: DenoisingDiscount | None = None,
    demos: DemoSource | None = None,
    progress_demos: ProgressLabels | None = None,
) -> PPO | GRPO:
    """The algorithm of `config` on the policy inside `sampler`. Raises ValueError where an option has no effect."""
    steps = getattr(getattr(sampler, "config", None), "num_steps", None)
    if step_weighting is not None and step_weighting.num_steps != steps:
        raise ValueError(
            f"step_weighting.num_steps is {step_weighting.num_steps}, the sampler has {steps}; make them equal"
        )
    if isinstance(config, PPOConfig):
        return PPO(sampler, config, demos=demos, step_weighting=step_weighting, progress_demos=progress_demos)
    if progress_demos is not None:
        raise ValueError("progress_demos are for PPO with a process reward: GRPO judges whole episodes")
    return GRPO(sampler, config, demos=demos, step_weighting=step_weighting)
