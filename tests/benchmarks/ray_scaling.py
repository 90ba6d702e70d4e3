"""Transitions per second of 1, 2 and 4 Ray workers against bare processes that deliver to nobody.

Ours ends with the joined batch on the driver, weights published for every window; a bare process collects and throws
away. All have 64 environments a process. With 4 workers on two cores nothing can become faster: it shows what is lost.

    make bench NAME=ray_scaling ARGS="--save"
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
import tyro

from tests.benchmarks.collecting import ENVS_PER_PROCESS, EXECUTION_HORIZON, NUM_DECISIONS, make_env, make_sampler
from tests.benchmarks.harness import ROOT, BenchmarkResult, PeerGroup, hardware, in_turns, median_ratio, summary
from vla_rl.rollout.ray_collector import RayRolloutCollector
from vla_rl.rollout.ray_config import RolloutConfig


@dataclass(frozen=True)
class RayScalingConfig:
    """`seconds` each side runs in each of `repeats` turns. `max_staleness`: windows under way while one is delivered.
    `save`: keep the result beside this file."""

    workers: tuple[int, ...] = (1, 2, 4)
    repeats: int = 5
    seconds: float = 4.0
    max_staleness: int = 1
    save: bool = False


class RaySide:
    """`num_workers` workers, each with as many environments as a bare process has."""

    def __init__(self, num_workers: int, max_staleness: int) -> None:
        config = RolloutConfig(workers=num_workers, max_staleness=max_staleness, cpus_per_worker=0.1)
        self._collector = RayRolloutCollector(
            make_env,
            make_sampler(),
            num_envs=num_workers * ENVS_PER_PROCESS,
            execution_horizon=EXECUTION_HORIZON,
            seed=0,
            config=config,
        )

    def rate(self, seconds: float) -> float:
        """Transitions a second. What was under way before is delivered before the clock starts, and nothing is left
        under way when another side has its turn."""
        collector, decisions = self._collector, 0
        collector.collect(NUM_DECISIONS)
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            collector.policy_version += 1
            decisions += collector.collect(NUM_DECISIONS).valid.numel()
        collector.state_dict()
        return decisions / elapsed


def main(config: RayScalingConfig) -> None:
    torch.set_num_threads(1)
    machine = hardware()
    ray.init(
        "local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    environment = {"PYTHONPATH": str(ROOT)}
    groups = {
        "bare_1": PeerGroup(Path(sys.executable), "bare_collector.py", "one", environment, all_cores=True),
        "bare_all_cores": PeerGroup(Path(sys.executable), "bare_collector.py", "each", environment),
    }
    try:
        sides: dict[str, Callable[[], float]] = {
            name: lambda group=group: group.rate(config.seconds) for name, group in groups.items()
        }
        for n in config.workers:
            side = RaySide(n, config.max_staleness)
            sides[f"ray_{n}"] = lambda side=side: side.rate(config.seconds)
        values = in_turns(sides, config.repeats)
    finally:
        for group in groups.values():
            group.close()
        ray.shutdown()
    cores = len(os.sched_getaffinity(0))
    ours = f"ray_{cores}" if f"ray_{cores}" in values else f"ray_{config.workers[-1]}"
    ratios = {f"{name}/{peer}": round(median_ratio(values[name], values[peer]), 3)
              for name in sides if name.startswith("ray") for peer in groups}  # fmt: skip
    BenchmarkResult(
        name="ray_scaling",
        ours=round(median(values[ours]), 1),
        peer=round(median(values["bare_all_cores"]), 1),
        ratio=ratios[f"{ours}/bare_all_cores"],
        unit="transitions/s",
        details={
            "rates": summary(values),
            "ratios": ratios,
            "repeats": config.repeats,
            "seconds": config.seconds,
            "max_staleness": config.max_staleness,
            "envs_per_process": ENVS_PER_PROCESS,
            "num_decisions": NUM_DECISIONS,
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(RayScalingConfig))
