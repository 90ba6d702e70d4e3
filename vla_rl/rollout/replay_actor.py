"""Acts with an off-policy learner, round by round: what comes of it goes into replay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vla_rl.core import ChunkStep, EnvSpec, Observation, Source
from vla_rl.rollout.collector import CollectorEnv


class Explorer(Protocol):
    """The part of a learner that acts."""

    horizon: int
    policy: nn.Module

    def explore(self, obs: Observation) -> Tensor:
        """Chunks [N, H, A] in the environment's units."""
        ...

    def random(self, num_envs: int) -> Tensor: ...


@dataclass(frozen=True)
class Round:
    """A control step, or a chunk, of N environments: `actions` [N, K, A] after `obs`, and what came of it.

    `policy_version`: how many updates the policy had seen. `lost`: bool [N], environments whose running episode was
    taken along by a worker that died before this round; None: of no one.
    """

    obs: Observation
    actions: Tensor
    step: ChunkStep
    policy_version: int
    lost: Tensor | None = None


@dataclass(frozen=True)
class ReplayWindow:
    """Rounds on end: `obs` before the first; `actions` and `steps` of each. The rest is as in `Round`."""

    obs: Observation
    actions: tuple[Tensor, ...]
    steps: tuple[ChunkStep, ...]
    policy_version: int
    lost: Tensor

    def rounds(self) -> Iterator[Round]:
        obs, lost = self.obs, self.lost if bool(self.lost.any()) else None
        for actions, step in zip(self.actions, self.steps, strict=True):
            yield Round(obs, actions, step, self.policy_version, lost)
            obs, lost = step.obs, None


@dataclass(frozen=True)
class Pace:
    """How an actor acts. `execution_horizon` steps of a chunk are executed, `steps_per_round` of them in a round.
    The first `random_env_steps` control steps of the run, which has `num_envs` environments, are uniform."""

    execution_horizon: int
    steps_per_round: int
    random_env_steps: int
    num_envs: int


class ReplayActor:
    """`env` (with auto-reset) and what is being executed in it. `env_seeds`: one an environment."""

    def __init__(self, env: CollectorEnv, learner: Explorer, pace: Pace, env_seeds: Sequence[int]) -> None:
        self.env, self.learner, self.pace, self._env_seeds = env, learner, pace, env_seeds
        self.num_env_steps = 0  # of the whole run
        self._obs: Observation | None = None
        self._plan: Tensor | None = None
        self._phase = torch.full((env.num_envs,), learner.horizon)  # executed steps of the plan; all: decide anew

    @property
    def has_begun(self) -> bool:
        return self._obs is not None

    def act(self, policy_version: int) -> Round:
        """One round."""
        pace = self.pace
        obs = self.env.reset(self._env_seeds) if self._obs is None else self._obs
        decides = self._phase >= pace.execution_horizon
        if bool(decides.any()):
            is_random = self.num_env_steps < pace.random_env_steps
            chunks = self.learner.random(len(decides)) if is_random else self.learner.explore(obs)
            self._plan = chunks if self._plan is None else torch.where(decides[:, None, None], chunks, self._plan)
            self._phase = torch.where(decides, 0, self._phase)
        k = pace.steps_per_round
        steps = self._phase[:, None] + torch.arange(k)
        assert self._plan is not None
        actions = self._plan[torch.arange(len(steps))[:, None], steps]
        step = self.env.step(actions)
        self._obs = step.obs
        anew = step.ended
        if step.taken is not None:  # what was planned before a person took over is void
            anew = anew | (step.taken.source == Source.HUMAN).any(dim=1)
        self._phase = torch.where(anew, self.learner.horizon, self._phase + k)
        self.num_env_steps += pace.num_envs * k  # an episode's end inside a chunk costs the rest of the chunk
        return Round(obs, actions, step, policy_version)

    def state_dict(self) -> dict[str, Any]:
        seen = None
        if (obs := self._obs) is not None:
            seen = {"images": dict(obs.images), "state": obs.state, "instruction": list(obs.instruction)}
        return {
            "env": self.env.state_dict(),
            "obs": seen,
            "plan": self._plan,
            "phase": self._phase,
            "num_env_steps": self.num_env_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.env.load_state_dict(state["env"])
        obs = state["obs"]
        self._obs = None if obs is None else Observation(obs["images"], obs["state"], tuple(obs["instruction"]))
        self._plan, self._phase, self.num_env_steps = state["plan"], state["phase"], state["num_env_steps"]


@runtime_checkable
class ReplayCollector(Protocol):
    """Who acts for a learner from replay: `LocalReplayCollector` in this process, `RayReplayCollector` in others."""

    @property
    def policy_version(self) -> int: ...

    @property
    def num_envs(self) -> int: ...

    @property
    def spec(self) -> EnvSpec: ...

    def rounds(self, num_rounds: int) -> Iterator[Round]:
        """The next `num_rounds`. The learner may learn between two of them."""
        ...

    def learned(self) -> None:
        """The policy has changed."""
        ...

    def metrics(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class LocalReplayCollector:
    """Acts in this process, always with the policy as it is."""

    def __init__(self, actor: ReplayActor) -> None:
        self._actor = actor
        self.policy_version = 0

    @property
    def num_envs(self) -> int:
        return self._actor.env.num_envs

    @property
    def spec(self) -> EnvSpec:
        return self._actor.env.spec

    def rounds(self, num_rounds: int) -> Iterator[Round]:
        for _ in range(num_rounds):
            yield self._actor.act(self.policy_version)

    def learned(self) -> None:
        self.policy_version += 1

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return self._actor.state_dict() | {"policy_version": self.policy_version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._actor.load_state_dict(state)
        self.policy_version = state.get("policy_version", 0)


__all__ = ["Explorer", "LocalReplayCollector", "Pace", "ReplayActor", "ReplayCollector", "ReplayWindow", "Round"]
