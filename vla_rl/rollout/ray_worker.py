"""What runs in a Ray worker: a collector with a slice of the environments and a copy of the policy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.core import EnvSpec
from vla_rl.flow.sampler import ChunkSampler
from vla_rl.protocols import trainable_parameters
from vla_rl.rollout.collector import RolloutBatch, RolloutCollector
from vla_rl.rollout.ray_batches import map_tensors
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.rollout.ray_simulators import MakeEnv, RaySimulators
from vla_rl.train.sharding import whole_state

Weights = list[np.ndarray]


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker's `RolloutCollector` is built with. `on_gpu`: the policy runs on the GPU that Ray gave it.
    `simulators`: the environments are in actors of their own, and the policy here is what they share."""

    num_envs: int
    first_env: int
    execution_horizon: int
    seed: int
    env_seeds: Sequence[int]
    policy_batch_size: int | None
    prefix_cache_gib: float
    num_threads: int
    on_gpu: bool
    simulators: RolloutConfig | None = None


@dataclass(frozen=True)
class Request:
    """One call of a collector. `num_decisions` for `collect`, or `seeds` (of this slice) for `collect_episodes`."""

    num_decisions: int = 0
    seeds: Sequence[int] | None = None


def _changing(sampler: ChunkSampler) -> list[Tensor]:
    head: nn.Module | None = getattr(sampler, "noise_head", None)
    learned = trainable_parameters(sampler.policy) + ([] if head is None else list(head.parameters()))
    return [p.detach() for p in learned]


def weights_of(sampler: ChunkSampler) -> Weights:
    """The bytes of everything that an update changes: a frozen encoder is not sent again and again.

    Layers that learners divide are made whole, one tensor after the other; then all learners call it together.
    """
    return [to_bytes(whole_state(p)) for p in _changing(sampler)]


@torch.no_grad()
def load_weights(sampler: ChunkSampler, weights: Weights) -> None:
    """What `weights_of` read from another sampler of the same build."""
    parameters = _changing(sampler)
    for parameter, values in zip(parameters, from_bytes(weights, parameters), strict=True):
        parameter.copy_(values)


def to_bytes(tensor: Tensor) -> np.ndarray:
    """A copy that Ray need not pickle, of any type."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().copy()


def from_bytes(weights: Weights, like: Sequence[Tensor]) -> list[Tensor]:
    """What `to_bytes` was given, on the CPU: of the types and shapes of `like`."""
    return [
        torch.from_numpy(stored.copy()).view(tensor.dtype).view(tensor.shape)  # Ray's memory is read-only
        for stored, tensor in zip(weights, like, strict=True)
    ]


class RolloutWorker:
    """A Ray actor. Its state between two calls is known to the driver too, which can restore it in another process."""

    def __init__(self, make_env: MakeEnv, sampler: ChunkSampler, options: WorkerOptions) -> None:
        torch.set_num_threads(options.num_threads)
        device = torch.device("cuda" if options.on_gpu else "cpu")
        sampler.policy.to(device)
        head: nn.Module | None = getattr(sampler, "noise_head", None)
        if head is not None:
            head.to(device)
        self._sampler, self._version = sampler, -1
        n, simulators = options.num_envs, options.simulators
        self._simulators = RaySimulators(make_env, n, simulators) if simulators is not None else None
        self._collector = RolloutCollector(
            self._simulators or make_env(n),
            sampler,
            execution_horizon=options.execution_horizon,
            seed=options.seed,
            env_seeds=options.env_seeds,
            first_env=options.first_env,
            policy_batch_size=options.policy_batch_size,
            prefix_cache_gib=options.prefix_cache_gib,
            device=device,
        )

    def pid(self) -> int:
        """Process id, once the worker is ready."""
        return os.getpid()

    def spec(self) -> EnvSpec:
        return self._collector.spec

    def collect(
        self, weights: Weights, version: int, request: Request, restore: Mapping[str, Any] | None
    ) -> tuple[RolloutBatch, dict[str, Any], int]:
        """A rollout on the CPU, the state after it, and how many simulators were started again meanwhile. `restore`: a
        state to begin from."""
        restarts = self._num_restarts()
        if version != self._version:
            load_weights(self._sampler, weights)
            self._version = version
        collector = self._collector
        if restore is not None:
            collector.load_state_dict(restore)
        collector.policy_version = version
        if request.seeds is None:
            batch = collector.collect(request.num_decisions)
        else:
            batch = collector.collect_episodes(request.seeds)
        state = collector.state_dict()
        return map_tensors(batch, lambda x: x.cpu()), state, self._num_restarts() - restarts

    def _num_restarts(self) -> int:
        return 0 if self._simulators is None else self._simulators.num_restarts


__all__ = [
    "MakeEnv",
    "Request",
    "RolloutWorker",
    "Weights",
    "WorkerOptions",
    "from_bytes",
    "load_weights",
    "to_bytes",
    "weights_of",
]
