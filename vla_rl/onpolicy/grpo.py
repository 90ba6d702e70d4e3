"""GRPO (arXiv 2402.03300) on chunks: no critic; an episode is judged against others from the same initial state.

metrics = grpo.iterate(collector)         # which is
data, metrics = grpo.collect(collector)
metrics |= grpo.update(data)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vla_rl.core import chunk_reward
from vla_rl.envs.vector import episode_seed
from vla_rl.flow.sampler import ChunkSampler
from vla_rl.onpolicy.actor import ActorConfig, ActorData, ActorUpdate, DemoSource, StepWeighting
from vla_rl.rollout.collector import Collector, RolloutBatch


@dataclass(frozen=True)
class GRPOConfig:
    """`group_size`: episodes from one initial state; divides the number of environments. `groups_per_update`: groups
    with information that an update waits for, and `max_rounds`: how often all environments run for them at most.
    `gamma`: per control step, of an episode's return. `normalize_std`: divide by the group's standard deviation (as
    published); without it groups near certainty weigh less. `shuffle_advantages`: the negative control."""

    group_size: int = 8
    groups_per_update: int = 16
    max_rounds: int = 4
    gamma: float = 1.0
    normalize_std: bool = True
    shuffle_advantages: bool = False
    seed: int = 0
    actor: ActorConfig = field(default_factory=ActorConfig)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}, expected at least 2: one episode has nothing to compare"
            )
        if self.groups_per_update < 1 or self.max_rounds < 1:
            raise ValueError("groups_per_update and max_rounds must be at least 1")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"gamma is {self.gamma}, expected 0 < gamma <= 1")


def group_advantages(returns: Tensor, *, normalize_std: bool) -> tuple[Tensor, Tensor]:
    """Advantages [G, M] of the episodes' `returns` [G, M], and which groups hold information, bool [G].

    A group whose episodes all returned the same says nothing about which was better; its advantages are zero.
    """
    centred = returns - returns.mean(dim=1, keepdim=True)
    spread = returns.std(dim=1, keepdim=True)
    informative = (returns.amax(dim=1) - returns.amin(dim=1)) > 1e-6
    if normalize_std:
        centred = centred / (spread + 1e-6)
    return torch.where(informative[:, None], centred, torch.zeros_like(centred)), informative


def episode_returns(batch: RolloutBatch, gamma: float) -> Tensor:
    """Discounted return [N] of the one episode of each environment, from `RolloutCollector.collect_episodes`."""
    rewards = batch.rewards.transpose(0, 1).flatten(1)
    executed = batch.executed.transpose(0, 1).flatten(1)
    return chunk_reward(rewards, executed, gamma)


class GRPO:
    """Owns the policy's optimiser; the policy inside `sampler` is changed in place."""

    def __init__(
        self,
        sampler: ChunkSampler,
        config: GRPOConfig,
        *,
        demos: DemoSource | None = None,
        step_weighting: StepWeighting | None = None,
    ) -> None:
        self.sampler, self.config = sampler, config
        device = next(iter(sampler.policy.parameters())).device
        self._generator = torch.Generator(device=device).manual_seed(config.seed)
        self._actor = ActorUpdate(sampler, config.actor, demos=demos, step_weighting=step_weighting)
        self.num_updates = 0
        self._num_groups = 0

    def iterate(self, collector: Collector) -> dict[str, float]:
        """Collect and update once. Metrics are named `rollout/...`, of the behaviour policy, and `update/...`."""
        data, found = self.collect(collector)
        metrics = {f"rollout/{name}": value for name, value in found.items()}
        if data is not None:
            metrics |= {f"update/{name}": value for name, value in self.update(data).items()}
        collector.policy_version = self.num_updates
        return metrics

    def collect(self, collector: Collector) -> tuple[ActorData | None, dict[str, float]]:
        """Rounds of groups until `groups_per_update` of them hold information, or `max_rounds` are over.

        Every group starts from an initial state of its own, which never comes again. None where no group of any round
        held information.
        """
        config, n = self.config, collector.num_envs
        if n % config.group_size:
            raise ValueError(f"{n} environments do not divide into groups of {config.group_size}")
        parts, found, groups, successes, episodes, rounds = [], 0, 0, 0.0, 0, 0
        while found < config.groups_per_update and rounds < config.max_rounds:
            seeds = [self._next_initial_seed() for _ in range(n // config.group_size)]
            batch = collector.collect_episodes([s for s in seeds for _ in range(config.group_size)])
            returns = episode_returns(batch, config.gamma).unflatten(0, (-1, config.group_size))
            advantages, informative = group_advantages(returns, normalize_std=config.normalize_std)
            used = informative & (informative.cumsum(0) <= config.groups_per_update - found)
            rows = batch.valid & used.repeat_interleave(config.group_size)[None]
            if bool(rows.any()):
                parts.append(ActorData.from_rollout(batch, advantages.flatten().expand_as(batch.valid), rows))
            rounds, found, groups = rounds + 1, found + int(used.sum()), groups + len(informative)
            successes += float(batch.episodes.success_once.sum())
            episodes += len(batch.episodes)
        metrics = {
            "success_rate": successes / max(episodes, 1),
            "episodes_finished": float(episodes),
            "groups_used": float(found),
            "groups_sampled": float(groups),
        }
        return (ActorData.concatenate(parts) if parts else None), metrics

    def update(self, data: ActorData) -> dict[str, float]:
        """One update from what `collect` returned. Raises DivergenceError before a step that would spoil the policy."""
        if self.config.shuffle_advantages:
            order = torch.randperm(len(data), generator=self._generator, device=data.advantages.device)
            data = ActorData(data.prefix, data.inputs, data.trace, data.advantages[order])
        self.num_updates += 1
        return {"num_samples": float(len(data))} | self._actor.update(data, self._generator)

    def _next_initial_seed(self) -> int:
        self._num_groups += 1
        return episode_seed(self.config.seed, self._num_groups)

    def state_dict(self) -> dict[str, Any]:
        return {
            "actor": self._actor.state_dict(),
            "generator": self._generator.get_state(),
            "num_updates": self.num_updates,
            "num_groups": self._num_groups,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._actor.load_state_dict(state["actor"])
        self._generator.set_state(state["generator"])
        self.num_updates = state["num_updates"]
        self._num_groups = state["num_groups"]
