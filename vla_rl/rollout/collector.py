"""Collects decisions of a policy in a chunked environment, ready for an on-policy update.

Every observation is encoded once: what is computed for the next decision serves as the bootstrap's features too, and
where the encoder is frozen the result is kept for all epochs of the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import ChunkStep, EnvSpec, Observation
from vla_rl.envs.task_mix import TaskMixEnv
from vla_rl.flow.noise import RowNoise
from vla_rl.flow.sampler import ChunkSampler
from vla_rl.protocols import HasVisionTokens, PolicyInputs, Prefix
from vla_rl.train.distributed import any_learner
from vla_rl.train.sharding import whole_layers

DEFAULT_PREFIX_CACHE_GIB = 8.0


@dataclass(frozen=True)
class EpisodeStats:
    """Episodes that ended while collecting. `success_once`, `success_at_end`: bool [E]; `length`: int64 [E], control
    steps; `returns`: float32 [E], undiscounted. `num_lost`: episodes whose simulator died, in none of these.

    The first windows of a run are biased towards short episodes: those that end soon end first.
    """

    success_once: Tensor
    success_at_end: Tensor
    length: Tensor
    returns: Tensor
    num_lost: int = 0

    def __len__(self) -> int:
        return self.length.shape[0]

    def metrics(self) -> dict[str, float]:
        """Means; only counts where no episode ended."""
        counts = {"episodes_finished": float(len(self))}
        if self.num_lost:
            counts["episodes_lost"] = float(self.num_lost)
        if len(self) == 0:
            return counts
        return counts | {
            "success_rate": self.success_once.float().mean().item(),
            "success_at_end_rate": self.success_at_end.float().mean().item(),
            "episode_length": self.length.float().mean().item(),
            "episode_return": self.returns.double().mean().item(),  # a sum that is exact has no order
        }


@dataclass(frozen=True)
class RolloutBatch:
    """T decisions of N environments. "Rows" are decisions flattened in time order: row = t * N + n.

    `prefix`: rows, where the encoder is frozen and they fit into memory; else None and `inputs` holds what to encode
    again, with the image tokens of a frozen vision tower in the place of pictures.
    `features`: float32 rows [T*N, F], what the critic sees. `trace`: rows.
    `rewards` float32, `executed` bool: [T, N, K]. `terminated`, `truncated`, `success`: bool [T, N].
    `valid`: bool [T, N], at least one step of the chunk was executed by the policy.
    `bootstrap_features`: [B, F], true successors that are no later row: ends by truncation, and the last decisions.
    `bootstrap_index`: int64 [T, N] into them, -1 where the successor is the next row or needs no value.
    `policy_version`: int64 [T, N], how many updates the policy of each decision had seen.
    """

    prefix: Prefix | None
    inputs: PolicyInputs | None
    features: Tensor
    trace: Any
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    valid: Tensor
    bootstrap_features: Tensor
    bootstrap_index: Tensor
    episodes: EpisodeStats
    policy_version: Tensor

    @property
    def ended(self) -> Tensor:
        """bool [T, N]."""
        return self.terminated | self.truncated

    @property
    def num_decisions(self) -> int:
        """T."""
        return self.rewards.shape[0]

    def next_values(self, values: Tensor, bootstrap_values: Tensor) -> Tensor:
        """V of each decision's true successor, [T, N], from `values [T, N]` and `bootstrap_values [B]`; 0 after a
        termination."""
        following = torch.cat([values[1:], torch.zeros_like(values[:1])])
        if len(bootstrap_values):
            chosen = bootstrap_values[self.bootstrap_index.clamp(min=0)]
            following = torch.where(self.bootstrap_index >= 0, chosen, following)
        return torch.where(self.terminated, torch.zeros_like(following), following)


class CollectorEnv(Protocol):
    """The part of `ChunkedEnv` that a collector needs: one in this process, or `RaySimulators` in others."""

    auto_reset: bool
    spec: EnvSpec
    num_envs: int

    def reset(self, seeds: Sequence[int]) -> Observation: ...

    def step(self, actions: Tensor) -> ChunkStep: ...

    def observe(self) -> Observation: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Collector(Protocol):
    """Who gathers decisions for a learner: `RolloutCollector` in this process, `RayRolloutCollector` in others."""

    @property
    def policy_version(self) -> int:
        """Set by the learner after every update."""
        ...

    @policy_version.setter
    def policy_version(self, version: int) -> None: ...

    @property
    def num_envs(self) -> int: ...

    @property
    def spec(self) -> EnvSpec: ...

    def collect(self, num_decisions: int) -> RolloutBatch: ...

    def collect_episodes(self, seeds: Sequence[int]) -> RolloutBatch: ...

    def metrics(self) -> dict[str, float]:
        """What the last collection is to be watched by."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class _Window:
    """What one call of `collect` gathers."""

    def __init__(self, num_decisions: int) -> None:
        self.num_decisions = num_decisions  # at most
        self.keeps_prefix = False
        self.features: list[Tensor] = []
        self.prefixes: list[Prefix] = []
        self.inputs: list[PolicyInputs] = []
        self.traces: list[Any] = []
        self.steps: list[ChunkStep] = []
        self.executed: list[Tensor] = []
        self.bootstrap_features: list[Tensor] = []
        self.bootstrap_index: list[Tensor] = []
        self.finished: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []


class RolloutCollector:
    """Runs a sampler's policy in a chunked environment.

    `execution_horizon`: steps of each chunk that are executed. `seed` decides the policy's noise, and the episodes
    unless `env_seeds` (one an environment) does. Actions reach the environment unclamped; clamping is its business.

    `first_env`: the number of environment 0 in the whole run, where other collectors have other slices of it. Noise is
    addressed by (seed, environment, call, decision), so a slice sees the noise that it would see in the whole.
    `policy_batch_size`: the policy always gets that many rows, and an environment always sits in the same one of them;
    None gives it all environments at once. The same row of a matrix product can round differently in a batch of another
    shape: with a size, a slice has the same transitions bit for bit; without, to rounding.
    `prefix_cache_gib`: prefixes of a frozen encoder are kept for the update's epochs if a whole window of them takes no
    more; else the update encodes the inputs again. The result is the same to rounding.
    """

    def __init__(
        self,
        env: CollectorEnv,
        sampler: ChunkSampler,
        *,
        execution_horizon: int,
        seed: int,
        env_seeds: Sequence[int] | None = None,
        first_env: int = 0,
        policy_batch_size: int | None = None,
        prefix_cache_gib: float = DEFAULT_PREFIX_CACHE_GIB,
        device: torch.device | str = "cpu",
    ) -> None:
        policy = sampler.policy
        check_policy_batch_size(policy_batch_size, env.num_envs)
        if not 1 <= execution_horizon <= policy.action_horizon:
            raise ValueError(f"execution_horizon is {execution_horizon}, expected 1..{policy.action_horizon} (H)")
        if policy.action_dim != env.spec.action.dim:
            raise ValueError(
                f"the policy has {policy.action_dim} action dimensions, {env.spec.name} {env.spec.action.dim}"
            )
        self.env = env
        self.sampler = sampler
        self.execution_horizon = execution_horizon
        self.policy_version = 0
        self._cache_bytes = int(prefix_cache_gib * 2**30)
        self._last_cached_bytes = 0
        self.policy_batch_size, self._fixed_rows = policy_batch_size or env.num_envs, policy_batch_size is not None
        self._env_seeds = list(env_seeds) if env_seeds is not None else make_env_seeds(seed, env.num_envs, first_env)
        self._noise_seed, self._num_windows = seed, 0
        self._streams = torch.arange(first_env, first_env + env.num_envs, device=device)
        self._obs: Observation | None = None
        self._inputs: PolicyInputs | None = None
        self._prefix: Prefix | None = None
        n = env.num_envs
        self._return = torch.zeros(n)
        self._length = torch.zeros(n, dtype=torch.int64)
        self._success = torch.zeros(n, dtype=torch.bool)

    @property
    def num_envs(self) -> int:
        return self.env.num_envs

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    def metrics(self) -> dict[str, float]:
        """GiB that the last window's prefixes, or inputs, take; with several tasks, how each fares."""
        env = getattr(self.env, "step_env", None)
        tasks = env.curriculum.metrics() if isinstance(env, TaskMixEnv) else {}
        found = {"prefix_cache_gib": self._last_cached_bytes / 2**30} | tasks
        return {f"rollout/{name}": value for name, value in found.items()}

    def close(self) -> None:
        self.env.close()

    def collect(self, num_decisions: int) -> RolloutBatch:
        """`num_decisions` decisions of every environment, going on where the last call stopped."""
        if num_decisions < 1:
            raise ValueError(f"num_decisions is {num_decisions}, expected at least 1")
        if not self.env.auto_reset:
            raise ValueError("collect needs an environment with auto_reset=True; collect_episodes does not")
        if self._obs is None:
            self._reset(self._env_seeds)
        window = _Window(num_decisions)
        with whole_layers(self.sampler.policy):
            for t in range(num_decisions):
                step = self._decide(window)
                window.executed.append(step.executed)
                self._count(window, step, step.ended)
                self._successors(window, step, last=t == num_decisions - 1)
        return self._batch(window)

    def collect_episodes(self, seeds: Sequence[int]) -> RolloutBatch:
        """One episode of every environment, from its start to its end; decisions after it are not `valid`.

        A later `collect` starts new episodes. The environment must end its episodes by `spec.max_episode_steps`.
        """
        if self.env.spec.max_episode_steps is None:
            raise ValueError(f"{self.env.spec.name} has no max_episode_steps; collect_episodes would not end")
        self._reset(seeds)
        window = _Window(-(-self.env.spec.max_episode_steps // self.execution_horizon))
        alive = torch.ones(self.env.num_envs, dtype=torch.bool, device=self._observed().state.device)
        while bool(alive.any()):
            step = self._decide(window)
            window.executed.append(step.executed & alive[:, None])
            self._count(window, step, step.ended & alive)
            alive = alive & ~step.ended
            self._successors(window, step, last=not bool(alive.any()))
        self._obs = self._inputs = self._prefix = None
        return self._batch(window)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future rollouts. The current observation is not in it: it is read again."""
        return {
            "env": self.env.state_dict() if self._obs is not None else None,
            "noise_seed": self._noise_seed,
            "num_windows": self._num_windows,
            "policy_version": self.policy_version,
            "return": self._return.clone(),
            "length": self._length.clone(),
            "success": self._success.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._noise_seed, self._num_windows = state["noise_seed"], state["num_windows"]
        self.policy_version = state["policy_version"]
        self._return, self._length = state["return"].clone(), state["length"].clone()
        self._success = state["success"].clone()
        self._obs = self._inputs = self._prefix = None
        if state["env"] is not None:
            self.env.load_state_dict(state["env"])
            self._obs = self.env.observe()

    # ------------------------------------------------------------------------------------------------------- one step
    def _reset(self, seeds: Sequence[int]) -> None:
        self._obs = self.env.reset(seeds)
        self._inputs = self._prefix = None
        self._return.zero_()
        self._length.zero_()
        self._success.zero_()

    def _observed(self) -> Observation:
        if self._obs is None:
            raise RuntimeError("no observation yet")
        return self._obs

    @torch.no_grad()
    def _decide(self, window: _Window) -> ChunkStep:
        policy = self.sampler.policy
        policy.eval()  # dropout would make the update's ratios noisy
        fresh = not window.traces
        inputs, prefix = self._inputs, self._prefix
        if inputs is None:
            inputs = policy.preprocess(self._observed())
        if prefix is None or (fresh and not policy.encoder_is_frozen):
            inputs = self._looked_at(inputs)
            prefix = self._encode(inputs)
        if fresh:
            needed = window.num_decisions * prefix.num_bytes
            window.keeps_prefix = policy.encoder_is_frozen and not any_learner(needed > self._cache_bytes)
        normalized, trace = self._sample(prefix, decision=len(window.traces))
        actions = policy.unnormalize_actions(normalized)[:, : self.execution_horizon]
        step = self.env.step(actions.to(self._observed().state.device))
        if step.taken is not None:
            raise ValueError(
                f"a person can take over in {self.env.spec.name}, and what they do has no likelihood under the policy: "
                "learn from replay (OffPolicyConfig), or leave the teleoperation out"
            )
        window.traces.append(trace)
        window.features.append(prefix.pooled)
        if window.keeps_prefix:
            window.prefixes.append(prefix)
        else:
            window.inputs.append(inputs)
        window.steps.append(step)
        self._obs = step.obs
        self._inputs = inputs = self._looked_at(policy.preprocess(step.obs))
        self._prefix = self._encode(inputs)
        return step

    def _sample(self, prefix: Prefix, decision: int) -> tuple[Tensor, Any]:
        size = self.policy_batch_size
        draws = []
        for rows in torch.arange(len(prefix), device=self._streams.device).split(size):
            noise = RowNoise(self._noise_seed, self._streams[rows], self._num_windows, decision)
            draws.append(self.sampler.sample(prefix if len(prefix) == size else prefix.select(rows), noise))
        if len(draws) == 1:
            return draws[0]
        return torch.cat([d[0] for d in draws]), type(draws[0][1]).concatenate([d[1] for d in draws])

    def _looked_at(self, inputs: PolicyInputs) -> PolicyInputs:
        """With image tokens in the place of pictures, where a frozen vision tower makes them, a batch of the policy's
        at a time."""
        policy = self.sampler.policy
        if inputs.image_tokens is not None or not (isinstance(policy, HasVisionTokens) and policy.vision_is_frozen):
            return inputs
        batches = torch.arange(len(inputs), device=inputs.state.device).split(self.policy_batch_size)
        if len(batches) == 1:
            return policy.with_image_tokens(inputs)
        return PolicyInputs.concatenate([policy.with_image_tokens(inputs.select(rows)) for rows in batches])

    def _encode(self, inputs: PolicyInputs, env_ids: Tensor | None = None) -> Prefix:
        """`inputs` of all environments, or of `env_ids` (ascending), each in the row of the policy's batch that is its
        own; rows without an environment are filled with another's."""
        policy, size = self.sampler.policy, self.policy_batch_size
        if size == self.num_envs and (env_ids is None or not self._fixed_rows):
            return policy.encode(inputs)
        ids = torch.arange(self.num_envs) if env_ids is None else env_ids.cpu()
        parts = []
        for block in (ids // size).unique():
            mine = (ids // size == block).nonzero().flatten()
            row = ids[mine] % size
            source = mine[:1].repeat(size)
            source[row] = mine
            parts.append(policy.encode(inputs.select(source.to(inputs.state.device))).select(row))
        return Prefix.concatenate(parts)

    @torch.no_grad()
    def _successors(self, window: _Window, step: ChunkStep, *, last: bool) -> None:
        """Features of the true successors that will not be a later row."""
        policy = self.sampler.policy
        index = torch.full((self.env.num_envs,), -1, dtype=torch.int64)
        used = sum(len(features) for features in window.bootstrap_features)
        needed = (step.truncated & ~step.terminated)[step.final_ids].nonzero().flatten()
        if step.final_obs is not None and len(needed):
            final = self._encode(policy.preprocess(step.final_obs.select(needed)), step.final_ids[needed])
            index[step.final_ids[needed].cpu()] = torch.arange(used, used + len(needed))
            window.bootstrap_features.append(final.pooled)
            used += len(needed)
        if last and self._prefix is not None:
            going_on = ~step.ended.cpu()
            index[going_on] = torch.arange(self.env.num_envs)[going_on] + used
            window.bootstrap_features.append(self._prefix.pooled)
        window.bootstrap_index.append(index)

    def _count(self, window: _Window, step: ChunkStep, ended: Tensor) -> None:
        self._return += step.rewards.sum(dim=1).cpu()
        self._length += step.executed.sum(dim=1).cpu()
        self._success |= step.success.cpu()
        ids = (ended & ~step.lost).nonzero().flatten().cpu()
        if len(ids):
            at_end = step.success_at_end.cpu()[ids]
            window.finished.append((self._success[ids], at_end, self._length[ids], self._return[ids]))
        over = step.ended.cpu()
        self._return[over], self._length[over], self._success[over] = 0.0, 0, False

    def _batch(self, window: _Window) -> RolloutBatch:
        self._num_windows += 1
        kept = [*window.prefixes, *window.inputs]
        self._last_cached_bytes = sum(x.num_bytes for x in kept)
        features = torch.cat(window.features)
        device = features.device
        executed = torch.stack(window.executed).to(device)
        empty = torch.zeros(0)
        columns = [torch.cat(c) for c in zip(*window.finished, strict=True)] or [
            empty.bool(),
            empty.bool(),
            empty.long(),
            empty,
        ]
        bootstrap = window.bootstrap_features
        trace_type = type(window.traces[0])
        return RolloutBatch(
            prefix=Prefix.concatenate(window.prefixes) if window.keeps_prefix else None,
            inputs=None if window.keeps_prefix else PolicyInputs.concatenate(window.inputs),
            features=features,
            trace=trace_type.concatenate(window.traces),
            rewards=torch.stack([s.rewards for s in window.steps]).to(device),
            executed=executed,
            terminated=torch.stack([s.terminated for s in window.steps]).to(device),
            truncated=torch.stack([s.truncated for s in window.steps]).to(device),
            success=torch.stack([s.success for s in window.steps]).to(device),
            valid=executed.any(dim=2),
            bootstrap_features=torch.cat(bootstrap) if bootstrap else features[:0],
            bootstrap_index=torch.stack(window.bootstrap_index).to(device),
            episodes=EpisodeStats(*columns, num_lost=sum(int(s.lost.sum()) for s in window.steps)),
            policy_version=torch.full_like(executed[..., 0], self.policy_version, dtype=torch.int64),
        )


def make_env_seeds(seed: int, num_envs: int, first_env: int = 0) -> list[int]:
    """One seed for each of the environments `first_env`, ...; an environment's own does not depend on their number."""
    return [
        int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        for i in range(first_env, first_env + num_envs)
    ]


def check_policy_batch_size(policy_batch_size: int | None, num_envs: int) -> None:
    """Raise ValueError where the rows of the policy's batch do not divide the environments."""
    if policy_batch_size is not None and (policy_batch_size < 1 or num_envs % policy_batch_size):
        raise ValueError(
            f"policy_batch_size is {policy_batch_size}, expected a divisor of the {num_envs} environments (or None)"
        )


__all__ = ["Collector", "CollectorEnv", "EpisodeStats", "RolloutBatch", "RolloutCollector"]
