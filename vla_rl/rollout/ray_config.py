"""Where rollouts are collected: in this process, or by Ray workers on one machine or many."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

MAY_CHANGE = ("ray_address", "cpus_per_worker", "gpus_per_worker", "worker_resource", "timeout_s")  # across a resume


@dataclass(frozen=True)
class RolloutConfig:
    """`workers`: Ray actors, each with a slice of the environments (0: this process collects). `ray_address`: of a
    cluster, as "host:6379" or "auto" (None: Ray is started on this machine). A worker takes `cpus_per_worker`,
    `gpus_per_worker` (with more than 0 it runs the policy on a GPU) and one of the custom Ray resource
    `worker_resource`, if named; that is how workers are placed on the machines that are meant for them.

    `policy_batch_size`: see `RolloutCollector`; with it the transitions are the same bit for bit whatever `workers` is,
    without it to rounding. `max_staleness`: how many updates the policy that collects may be behind the one that
    learns. With 0 collection and update take turns; with more, so many rollouts are collected during the update (PPO).

    `timeout_s`: seconds, from when the learner waits for a worker's part of a rollout, after which the worker is taken
    to hang: it is killed and started again. Its start is not counted.
    """

    workers: int = 0
    ray_address: str | None = None
    policy_batch_size: int | None = None
    max_staleness: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    worker_resource: str | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.workers < 0 or self.max_staleness < 0:
            raise ValueError(f"rollout.workers and rollout.max_staleness must be at least 0, got {self}")
        if self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise ValueError(f"rollout.cpus_per_worker and rollout.gpus_per_worker must be at least 0, got {self}")
        if self.timeout_s <= 0:
            raise ValueError(f"rollout.timeout_s is {self.timeout_s}, expected seconds, more than 0")
        default = RolloutConfig.__dataclass_fields__
        useless = [
            name
            for name in ("max_staleness", *MAY_CHANGE)
            if self.workers == 0 and getattr(self, name) != default[name].default
        ]
        if useless:
            raise ValueError(
                f"rollout.{', rollout.'.join(useless)}: no effect without workers; set rollout.workers to 1 or more"
            )

    def slices(self, num_envs: int) -> list[range]:
        """The environments of each worker, as even as `policy_batch_size` allows. Raises ValueError where a worker
        would have none."""
        size = self.policy_batch_size or 1
        blocks = num_envs // size
        if num_envs % size or blocks < self.workers:
            raise ValueError(
                f"{num_envs} environments do not divide into slices of {size} (rollout.policy_batch_size) for "
                f"{self.workers} workers (rollout.workers); change one of the three"
            )
        edges = [size * (blocks * i // self.workers) for i in range(self.workers + 1)]
        return [range(a, b) for a, b in itertools.pairwise(edges)]


__all__ = ["MAY_CHANGE", "RolloutConfig"]
