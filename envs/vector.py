"""The chunk contract: everything that can go wrong between a chunk and an episode's end is settled in this file.

`ChunkedEnv` makes a chunked environment out of any `StepEnv`. Within a chunk it

* stops each environment at the step at which its episode ends (it stays frozen there to the end of the chunk),
* counts time and truncates at `spec.max_episode_steps`,
* keeps rewards and `executed` per step,
* drops the chunk of an episode whose simulator died (`ChunkStep.lost`),

and at the end of the chunk it reads the frozen ends (`final_obs`), resets them if asked to, and observes once. So
pictures are rendered at decision points only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import ChunkStep, Observation, Source, Taken
from vla_rl.protocols import RunsAhead, StepEnv

_SEED_LIMIT = 2**63 - 1
_SPLIT_STREAMS = {"train": (0,), "test": (1,)}


def episode_seed(base_seed: int, episode: int) -> int:
    """Seed of an environment's `episode`-th episode since it was seeded with `base_seed`; episode 0 has `base_seed`."""
    if episode == 0:
        return int(base_seed)
    return int(
        np.random.SeedSequence([int(base_seed), episode]).generate_state(1, np.uint64)[0] & np.uint64(_SEED_LIMIT)
    )


def stream_seed(stream: Sequence[int], seed: int) -> int:
    """`seed`, in a stream of its own where `stream` has numbers."""
    if not stream:
        return int(seed)
    return int(np.random.SeedSequence([*stream, int(seed)]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def split_stream(split: str, simulator: str) -> tuple[int, ...]:
    """Stream of the episodes of `split`, "train" or "test": no seed gives the same episode in both. Raises ValueError,
    in the name of `simulator`, for another."""
    if split not in _SPLIT_STREAMS:
        raise ValueError(f"{simulator}: split {split!r} is unknown; use one of {', '.join(_SPLIT_STREAMS)}")
    return _SPLIT_STREAMS[split]


class ChunkedEnv:
    """A `ChunkedVectorEnv` over a batch of step environments.

    `images`: render cameras at decision points. `final_images`: render them also where an episode ended, which replay
    and a bootstrap at a truncation need. `auto_reset`: start the next episode at the end of the chunk in which one
    ended; without it an ended environment stays frozen (`executed` all False) until `reset`.
    """

    def __init__(
        self, env: StepEnv, *, images: bool = True, final_images: bool = True, auto_reset: bool = True
    ) -> None:
        self._env = env
        self.spec = env.spec
        self.num_envs = env.num_envs
        self.images = images and bool(env.spec.cameras)
        self.final_images = self.images and final_images
        self.auto_reset = auto_reset
        self._episode_steps = torch.zeros(self.num_envs, dtype=torch.int64)
        self._ended = torch.ones(self.num_envs, dtype=torch.bool)
        self._base_seeds = [0] * self.num_envs
        self._episodes = [0] * self.num_envs

    @property
    def step_env(self) -> StepEnv:
        """The environment inside, for whoever knows more of it than the contract (a scripted expert)."""
        return self._env

    @property
    def episode_seeds(self) -> tuple[int, ...]:
        """The seed of each environment's running episode."""
        return tuple(episode_seed(s, e) for s, e in zip(self._base_seeds, self._episodes, strict=True))

    @property
    def episode_steps(self) -> Tensor:
        """Control steps of each environment's running episode, int64 [N]."""
        return self._episode_steps.clone()

    @property
    def ended(self) -> Tensor:
        """bool [N], the episode is over and none was started since."""
        return self._ended.clone()

    def reset(self, seeds: Sequence[int], env_ids: Sequence[int] | None = None) -> Observation:
        """Seed and start `env_ids` (default: all). Episodes that follow are seeded from the same number, so what an
        environment lives through depends on its own seed alone, not on `num_envs` or on its neighbours."""
        ids = list(range(self.num_envs)) if env_ids is None else [int(i) for i in env_ids]
        if len(seeds) != len(ids):
            raise ValueError(f"reset: {len(seeds)} seeds for {len(ids)} environments; give one seed an environment")
        if any(i < 0 or i >= self.num_envs for i in ids):
            raise ValueError(f"reset: env_ids {ids} out of range for {self.num_envs} environments")
        if any(not 0 <= int(seed) <= _SEED_LIMIT for seed in seeds):
            raise ValueError(f"reset: seeds must lie in [0, 2^63), got {list(seeds)}")
        for i, seed in zip(ids, seeds, strict=True):
            self._base_seeds[i] = int(seed)
            self._episodes[i] = 0
        self._start(torch.tensor(ids, dtype=torch.int64))
        return self._env.observe(torch.arange(self.num_envs), self.images)

    def step(self, actions: Tensor, *, record: Sequence[int] = ()) -> ChunkStep:
        """Execute `actions [N, K, A]` in the environment's units.

        Raises ValueError, before anything moves, for a wrong shape, an id in `record` that is not there, and on a CPU
        for an action that is not finite (with the environment's index; on a GPU asking would cost a synchronisation).
        """
        self._check_actions(actions)
        if any(not 0 <= int(i) < self.num_envs for i in record):
            raise ValueError(f"step: record {list(record)} out of range for {self.num_envs} environments")
        n, k = actions.shape[:2]
        device = actions.device
        ended_before = self._ended.to(device)
        active = ~ended_before
        rewards = torch.zeros(n, k, device=device)
        executed = torch.zeros(n, k, dtype=torch.bool, device=device)
        terminated = torch.zeros(n, dtype=torch.bool, device=device)
        truncated = terminated.clone()
        success = terminated.clone()
        success_at_end = terminated.clone()
        lost = terminated.clone()
        end_step = torch.full((n,), -1, dtype=torch.int64, device=device)
        episode_steps = self._episode_steps.to(device)
        frames: dict[int, list[Tensor]] = {int(i): [] for i in record}
        taken: Taken | None = None

        if isinstance(self._env, RunsAhead):
            self._env.begin_chunk(actions, self._certain_steps(active, k, record), self.images)
        for i in range(k):
            if device.type == "cpu" and not bool(active.any()):
                break  # on a GPU this question would be a synchronisation; frozen environments do not move anyway
            outcome = self._env.step(actions[:, i], active)
            episode_steps = episode_steps + active
            rewards[:, i] = torch.where(active, outcome.reward, 0.0)
            executed[:, i] = active
            now_terminated = active & outcome.terminated
            now_truncated = active & outcome.truncated
            if self.spec.max_episode_steps is not None:
                now_truncated = now_truncated | (active & (episode_steps >= self.spec.max_episode_steps))
            now_success = active & outcome.success
            success = success | now_success
            success_at_end = torch.where(active, now_success, success_at_end)
            if outcome.lost is not None:
                lost = lost | (active & outcome.lost)
            if outcome.taken is not None:
                if taken is None:
                    taken = Taken(actions.clone(), torch.full((n, k), int(Source.POLICY), dtype=torch.int8))
                taken.actions[active, i] = outcome.taken.actions[active]
                taken.source[active, i] = outcome.taken.source[active]
            now_ended = now_terminated | now_truncated | lost
            end_step = torch.where(active & now_ended, i, end_step)
            terminated = terminated | now_terminated
            truncated = truncated | now_truncated
            self._record(frames, active)
            active = active & ~now_ended

        rewards = torch.where(lost[:, None], 0.0, rewards)
        executed = executed & ~lost[:, None]
        terminated, truncated = terminated & ~lost, truncated | lost
        success, success_at_end = success & ~lost, success_at_end & ~lost

        self._episode_steps = episode_steps.cpu()
        ended_now = terminated | truncated
        self._ended = (ended_before | ended_now).cpu()
        final_ids = ended_now.nonzero().flatten()
        final_obs = self._env.observe(final_ids.cpu(), self.final_images) if len(final_ids) else None
        if self.auto_reset and len(final_ids):
            for i in final_ids.tolist():
                self._episodes[i] += 1
            self._start(final_ids.cpu())
        return ChunkStep(
            obs=self._env.observe(torch.arange(n), self.images),
            final_obs=final_obs,
            final_ids=final_ids,
            rewards=rewards,
            executed=executed,
            terminated=terminated,
            truncated=truncated,
            success=success,
            success_at_end=success_at_end,
            end_step=end_step,
            lost=lost,
            frames={i: torch.stack(f) for i, f in frames.items() if f},
            taken=taken,
        )

    def render(self, env_ids: Sequence[int]) -> Tensor:
        """A picture for people of each environment in `env_ids`, uint8 [M, h, w, 3]."""
        return self._env.render(torch.tensor(list(env_ids), dtype=torch.int64))

    def state_dict(self) -> dict[str, Any]:
        return {
            "env": self._env.state_dict(),
            "episode_steps": self._episode_steps.clone(),
            "ended": self._ended.clone(),
            "base_seeds": list(self._base_seeds),
            "episodes": list(self._episodes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["base_seeds"]) != self.num_envs:
            raise ValueError(f"this state is of {len(state['base_seeds'])} environments, here are {self.num_envs}")
        self._env.load_state_dict(state["env"])
        self._episode_steps = state["episode_steps"].clone()
        self._ended = state["ended"].clone()
        self._base_seeds = list(state["base_seeds"])
        self._episodes = list(state["episodes"])

    def observe(self) -> Observation:
        """The current observation of every environment, for whoever resumes in the middle of an episode."""
        return self._env.observe(torch.arange(self.num_envs), self.images)

    def close(self) -> None:
        self._env.close()

    def _start(self, ids: Tensor) -> None:
        seeds = [episode_seed(self._base_seeds[i], self._episodes[i]) for i in ids.tolist()]
        self._env.reset(ids, torch.tensor(seeds, dtype=torch.int64))
        self._episode_steps[ids] = 0
        self._ended[ids] = False

    def _certain_steps(self, active: Tensor, k: int, record: Sequence[int]) -> Tensor:
        """How many steps of a chunk of `k` each environment takes unless its episode ends, int64 [N]; none where frames
        are recorded, which are rendered between the steps."""
        steps = torch.full_like(self._episode_steps, k)
        if self.spec.max_episode_steps is not None:
            steps = steps.minimum(self.spec.max_episode_steps - self._episode_steps)
        steps = torch.where(active.cpu(), steps, 0)
        steps[list(record)] = 0
        return steps

    def _record(self, frames: dict[int, list[Tensor]], active: Tensor) -> None:
        ids = [i for i in frames if bool(active[i])]
        if ids:
            pictures = self._env.render(torch.tensor(ids, dtype=torch.int64))
            for j, i in enumerate(ids):
                frames[i].append(pictures[j])

    def _check_actions(self, actions: Tensor) -> None:
        a = self.spec.action.dim
        if actions.ndim != 3 or actions.shape[0] != self.num_envs or actions.shape[2] != a or actions.shape[1] < 1:
            raise ValueError(
                f"step: actions must be [N={self.num_envs}, K>=1, A={a}] for {self.spec.name}, "
                f"got {tuple(actions.shape)}"
            )
        if actions.device.type == "cpu":
            bad = ~torch.isfinite(actions).all(dim=2).all(dim=1)
            if bool(bad.any()):
                raise ValueError(
                    f"step: the actions of environments {bad.nonzero().flatten().tolist()} are not finite; "
                    "look for a diverged policy or a bad normalisation"
                )
