"""Where rollouts are collected: in this process, or by Ray workers on one machine or many."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

_FOR_INFERENCE = ("cpus_for_inference", "gpus_for_inference")
MAY_CHANGE = (  # across a resume
    *("ray_address", "cpus_per_worker", "gpus_per_worker", "worker_resource", "timeout_s"),
    *_FOR_INFERENCE,
)


@dataclass(frozen=True)
class RolloutConfig:
    """`workers`: Ray actors, each with a slice of the environments (0: this process collects). `ray_address`: of a
    cluster, as "host:6379" or "auto" (None: Ray is started on this machine). A worker takes `cpus_per_worker`,
    `gpus_per_worker` (with more than 0 it runs the policy on a GPU) and one of the custom Ray resource
    `worker_resource`, if named; that is how workers are placed on the machines that are meant for them.

    `policy_batch_size`: see `RolloutCollector`; with it the transitions are the same bit for bit whatever `workers` is,
    without it to rounding. `max_staleness`: how many updates the policy that collects may be behind the one that
    learns. With 0 collection and update take turns; with more, so many rollouts are collected during the update (PPO,
    and learning from replay, where a rollout is an iteration and the actors' policy is renewed with the next).

    `inference`: "worker" runs a copy of the policy in every worker; with "shared" the workers only simulate, and one
    actor more (`cpus_for_inference`, `gpus_for_inference`) runs the policy on the observations of all of them.

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
    inference: Literal["worker", "shared"] = "worker"
    cpus_for_inference: float = 1.0
    gpus_for_inference: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 0 or self.max_staleness < 0:
            raise ValueError(f"rollout.workers and rollout.max_staleness must be at least 0, got {self}")
        for name in ("cpus_per_worker", "gpus_per_worker", *_FOR_INFERENCE):
            if getattr(self, name) < 0:
                raise ValueError(f"rollout.{name} is {getattr(self, name)}, expected at least 0")
        if self.inference not in ("worker", "shared"):
            raise ValueError(f'rollout.inference is {self.inference!r}, expected "worker" or "shared"')
        if self.timeout_s <= 0:
            raise ValueError(f"rollout.timeout_s is {self.timeout_s}, expected seconds, more than 0")
        default = RolloutConfig.__dataclass_fields__
        changed = [n for n in ("max_staleness", "inference", *MAY_CHANGE) if getattr(self, n) != default[n].default]
        useless = changed if self.workers == 0 else []
        if useless:
            raise ValueError(
                f"rollout.{', rollout.'.join(useless)}: no effect without workers; set rollout.workers to 1 or more"
            )

        if self.inference == "worker" and any(name in changed for name in _FOR_INFERENCE):
            raise ValueError(f'rollout.{", rollout.".join(_FOR_INFERENCE)}: only with rollout.inference "shared"')

    @property
    def is_shared(self) -> bool:
        return self.inference == "shared"

    def needs(self) -> dict[str, float]:
        """Ray resources that the workers take together, and the shared inference."""
        needed = {"CPU": self.workers * self.cpus_per_worker, "GPU": self.workers * self.gpus_per_worker}
        if self.is_shared:
            needed = {"CPU": needed["CPU"] + self.cpus_for_inference, "GPU": needed["GPU"] + self.gpus_for_inference}
        return needed | ({self.worker_resource: float(self.workers)} if self.worker_resource else {})

    def slices(self, num_envs: int) -> list[range]:
        """The environments of each worker, as even as its `policy_batch_size` allows. Raises ValueError where a worker
        would have none."""
        size = 1 if self.is_shared else self.policy_batch_size or 1
        blocks = num_envs // size
        if num_envs % size or blocks < self.workers:
            raise ValueError(
                f"{num_envs} environments do not divide into slices of {size} (rollout.policy_batch_size) for "
                f"{self.workers} workers (rollout.workers); change one of the three"
            )
        edges = [size * (blocks * i // self.workers) for i in range(self.workers + 1)]
        return [range(a, b) for a, b in itertools.pairwise(edges)]


__all__ = ["MAY_CHANGE", "RolloutConfig"]
