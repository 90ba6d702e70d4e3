"""The contract, written as slowly and as plainly as possible: one environment, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vla_rl.core import Observation
from vla_rl.envs.vector import episode_seed
from vla_rl.protocols import StepEnv


@dataclass
class ReferenceStep:
    obs: Observation = field(init=False)
    next_obs: Observation = field(init=False)
    rewards: list[float] = field(default_factory=list)
    executed: list[bool] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    success: bool = False
    success_at_end: bool = False
    end_step: int = -1


class Reference:
    """Plays chunks on a `StepEnv` of a single environment."""

    def __init__(self, env: StepEnv, seed: int, *, images: bool, auto_reset: bool) -> None:
        assert env.num_envs == 1
        self.env, self.seed, self.images, self.auto_reset = env, seed, images, auto_reset
        self.episode = 0
        self._begin()

    def _begin(self) -> None:
        self.env.reset(torch.tensor([0]), torch.tensor([episode_seed(self.seed, self.episode)]))
        self.time = 0
        self.over = False

    def observe(self) -> Observation:
        return self.env.observe(torch.tensor([0]), self.images)

    def step(self, actions: torch.Tensor) -> ReferenceStep:
        """`actions [K, A]`."""
        result = ReferenceStep()
        ended_here = False
        for i in range(len(actions)):
            if self.over:
                result.rewards.append(0.0)
                result.executed.append(False)
                continue
            outcome = self.env.step(actions[i : i + 1], torch.tensor([True]))
            self.time += 1
            result.rewards.append(float(outcome.reward[0]))
            result.executed.append(True)
            result.success |= bool(outcome.success[0])
            result.success_at_end = bool(outcome.success[0])
            limit = self.env.spec.max_episode_steps
            truncated = bool(outcome.truncated[0]) or (limit is not None and self.time >= limit)
            if bool(outcome.terminated[0]) or truncated:
                result.terminated, result.truncated = bool(outcome.terminated[0]), truncated
                result.end_step = i
                self.over = ended_here = True
        result.obs = result.next_obs = self.observe()
        if ended_here and self.auto_reset:
            self.episode += 1
            self._begin()
            result.obs = self.observe()
        return result

    def discounted(self, result: ReferenceStep, gamma: float) -> tuple[float, float]:
        """Reward and discount of the chunk, by walking it."""
        reward, power = 0.0, 1.0
        for r, executed in zip(result.rewards, result.executed, strict=True):
            if executed:
                reward += power * r
                power *= gamma
        return reward, 0.0 if result.terminated else power
