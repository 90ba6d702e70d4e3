"""PPO on chunks (arXiv 1707.06347): flow policies through their denoising chains (arXiv 2510.25889), and Gaussians.

metrics = ppo.iterate(collector)         # which is
batch = collector.collect(config.num_decisions)
metrics = ppo.update(batch)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vla_rl.core import chunk_discount, chunk_reward
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.noise_head import NoiseHead
from vla_rl.flow.sampler import ChunkSampler, FlowSampler
from vla_rl.onpolicy.actor import ActorConfig, ActorData, ActorUpdate, DemoSource, StepWeighting
from vla_rl.onpolicy.advantages import explained_variance, gae, normalize_advantages
from vla_rl.onpolicy.critic import CriticConfig, CriticUpdate
from vla_rl.onpolicy.process_reward import ProcessReward, ProcessRewardConfig, ProgressLabels
from vla_rl.protocols import FlowPolicy, HasFeatures, chunk_shape, require
from vla_rl.rollout.collector import Collector, RolloutBatch


@dataclass(frozen=True)
class PPOConfig:
    """`num_decisions`: T, decisions of every environment between two updates.
    `gamma`: per control step; a chunk of k executed steps discounts by gamma^k. `gae_lambda`: per chunk.
    `critic_warmup_iterations`: updates that fit the critic and leave the policy alone. `shuffle_advantages`: the
    negative control, which must not learn: advantages are dealt out to decisions at random. `process_reward`: learn
    how far episodes come, and reward it; see `process_reward.py`."""

    num_decisions: int = 16
    gamma: float = 0.99
    gae_lambda: float = 0.95
    normalize_advantages: bool = True
    critic_warmup_iterations: int = 2
    shuffle_advantages: bool = False
    seed: int = 0
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    process_reward: ProcessRewardConfig | None = None

    def __post_init__(self) -> None:
        if self.num_decisions < 1:
            raise ValueError(f"num_decisions is {self.num_decisions}, expected at least 1")
        if not (0.0 < self.gamma <= 1.0 and 0.0 <= self.gae_lambda <= 1.0):
            raise ValueError(f"expected 0 < gamma <= 1 and 0 <= gae_lambda <= 1, got {self.gamma}, {self.gae_lambda}")


def flow_sampler(policy: FlowPolicy, config: FlowSamplerConfig, *, seed: int = 0) -> FlowSampler:
    """A sampler of `policy`, with a new noise head where the kernel has one. `seed`: of the head's first weights."""
    require(policy, FlowPolicy, by=f"the sampler {config.kernel}")
    if config.kernel != "flow_noise":
        return FlowSampler(policy, config)
    device = next(iter(policy.parameters())).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = NoiseHead(policy.hidden_dim, chunk_shape(policy)[1], *config.std_range).to(device)
    return FlowSampler(policy, config, head)


class PPO:
    """Owns the critic and both optimisers; the policy inside `sampler` is changed in place.

    `demos`: source of demonstrations, with `config.actor.bc_coef`. `step_weighting`: see `dppo.py`. `progress_demos`:
    demonstrations for the process reward to learn from, besides rollouts.
    """

    def __init__(
        self,
        sampler: ChunkSampler,
        config: PPOConfig,
        *,
        demos: DemoSource | None = None,
        step_weighting: StepWeighting | None = None,
        progress_demos: ProgressLabels | None = None,
    ) -> None:
        require(sampler.policy, HasFeatures, by="PPO")
        self.sampler, self.config = sampler, config
        device = next(iter(sampler.policy.parameters())).device
        self._generator = torch.Generator(device=device).manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._critic = CriticUpdate(sampler.policy.feature_dim, config.critic, device)
            self.process_reward = self._make_process_reward(device, progress_demos)
        self._actor = ActorUpdate(sampler, config.actor, demos=demos, step_weighting=step_weighting)
        self.num_updates = 0

    @property
    def critic(self) -> torch.nn.Module:
        """V on features `[M, F]` -> `[M]`."""
        return self._critic.critic

    def _make_process_reward(self, device: torch.device, demos: ProgressLabels | None) -> ProcessReward | None:
        config = self.config.process_reward
        if config is None:
            if demos is not None:
                raise ValueError("progress_demos have no effect without process_reward: give both or neither")
            return None
        if not self.sampler.policy.encoder_is_frozen:
            raise ValueError(
                "process_reward keeps features, and this policy's encoder changes them; set freeze_encoder"
            )
        return ProcessReward(self.sampler.policy.feature_dim, config, device, demos)

    @torch.no_grad()
    def advantages(self, batch: RolloutBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages (neither normalised nor shuffled), value targets and old values, each [T, N]."""
        gamma, (t, n) = self.config.gamma, batch.valid.shape
        both = self.critic(torch.cat([batch.features, batch.bootstrap_features]))
        values, bootstrap_values = both[: t * n].unflatten(0, (t, n)), both[t * n :]
        k = batch.rewards.shape[2]
        executed = batch.executed.reshape(t * n, k)
        rewards = chunk_reward(batch.rewards.reshape(t * n, k), executed, gamma).unflatten(0, (t, n))
        discounts = chunk_discount(executed, batch.terminated.flatten(), gamma).unflatten(0, (t, n))
        if self.process_reward is not None:
            rewards = rewards + self.process_reward.shaping(batch, discounts)
        following = batch.next_values(values, bootstrap_values)
        advantages, targets = gae(rewards, discounts, values, following, batch.ended, self.config.gae_lambda)
        return advantages, targets, values

    def iterate(self, collector: Collector) -> dict[str, float]:
        """Collect and update once. Metrics are named `rollout/...`, of the behaviour policy, and `update/...`."""
        batch = collector.collect(self.config.num_decisions)
        metrics = {f"rollout/{name}": value for name, value in batch.episodes.metrics().items()}
        metrics |= {f"update/{name}": value for name, value in self.update(batch).items()}
        collector.policy_version = self.num_updates
        return metrics

    def update(self, batch: RolloutBatch) -> dict[str, float]:
        """One update of policy and critic. Raises DivergenceError before a step that would spoil them."""
        config = self.config
        if not bool(batch.valid.any()):
            raise ValueError("the rollout holds no decision that the policy executed")
        progress = {} if self.process_reward is None else self.process_reward.update(batch, self._generator)
        advantages, targets, values = self.advantages(batch)
        flat_valid = batch.valid.flatten()
        features, old, target = batch.features[flat_valid], values[batch.valid], targets[batch.valid]
        metrics = progress | {
            "explained_variance": explained_variance(old, target),
            "advantage_std": float(advantages[batch.valid].std(correction=0)),
            "value_mean": float(old.mean()),
            "num_samples": float(len(target)),
        }
        if config.normalize_advantages:
            advantages = normalize_advantages(advantages, batch.valid)
        if config.shuffle_advantages:
            advantages = self._shuffled(advantages, batch.valid)
        if self.num_updates >= config.critic_warmup_iterations:
            metrics |= self._actor.update(ActorData.from_rollout(batch, advantages), self._generator)
        metrics |= self._critic.update(features, old, target, self._generator)
        self.num_updates += 1
        return metrics

    def _shuffled(self, advantages: Tensor, valid: Tensor) -> Tensor:
        chosen = advantages[valid]
        order = torch.randperm(len(chosen), generator=self._generator, device=chosen.device)
        shuffled = advantages.clone()
        shuffled[valid] = chosen[order]
        return shuffled

    def state_dict(self) -> dict[str, Any]:
        """Policy, noise head, critic, optimisers, generator and counters: all that the next update depends on."""
        return {
            "actor": self._actor.state_dict(),
            "critic": self._critic.state_dict(),
            "generator": self._generator.get_state(),
            "num_updates": self.num_updates,
            "process_reward": None if self.process_reward is None else self.process_reward.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._actor.load_state_dict(state["actor"])
        self._critic.load_state_dict(state["critic"])
        self._generator.set_state(state["generator"])
        self.num_updates = state["num_updates"]
        if self.process_reward is not None:
            self.process_reward.load_state_dict(state["process_reward"])
