"""Transitions per second of 1, 2 and 4 Ray workers against bare processes that deliver to nobody.

Ours ends with the joined batch on the driver, weights published for every window; a bare process collects and throws
away. All have 64 environments a process. With 4 workers on two cores nothing can become faster: it shows what is lost.
`cpu_ms` in the details is processor time a transition, Ray's own processes included; a busy machine changes it little.

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

        self.run(0.0)

    def run(self, seconds: float) -> tuple[float, int]:
        """Transitions a second, and how many were collected at all. What was under way before is delivered before the
        clock starts, and nothing is left under way when another side has its turn."""
        collector, decisions = self._collector, 0
        first = collector.collect(NUM_DECISIONS).valid.numel()
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            collector.policy_version += 1
            decisions += collector.collect(NUM_DECISIONS).valid.numel()
        collector.state_dict()
        return decisions / elapsed, first + decisions


def run_bare(group: PeerGroup, seconds: float) -> tuple[float, int]:
    """Transitions a second of all processes of the group, and how many they collected."""
    answers = group.measure(seconds)
    return sum(a["steps"] / a["seconds"] for a in answers), int(sum(a["steps"] for a in answers))


def cpu_seconds() -> float:
    """Processor time so far of this process and of all that descend from it."""
    parents, ticks = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        pid = int(file.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return sum(t for pid, t in ticks.items() if is_ours(pid)) / os.sysconf("SC_CLK_TCK")


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
        runs: dict[str, Callable[[], tuple[float, int]]] = {
            name: lambda group=group: run_bare(group, config.seconds) for name, group in groups.items()
        }
        for n in config.workers:
            side = RaySide(n, config.max_staleness)
            runs[f"ray_{n}"] = lambda side=side: side.run(config.seconds)
        cpu_ms: dict[str, list[float]] = {name: [] for name in runs}

        def rate(name: str) -> float:
            before = cpu_seconds()
            per_second, transitions = runs[name]()
            cpu_ms[name].append(1000 * (cpu_seconds() - before) / transitions)
            return per_second

        values = in_turns({name: lambda name=name: rate(name) for name in runs}, config.repeats)
    finally:
        for group in groups.values():
            group.close()
        ray.shutdown()
    cores = len(os.sched_getaffinity(0))
    ours = f"ray_{cores}" if f"ray_{cores}" in values else f"ray_{config.workers[-1]}"
    ratios = {f"{name}/{peer}": round(median_ratio(values[name], values[peer]), 3)
              for name in values if name.startswith("ray") for peer in groups}  # fmt: skip
    BenchmarkResult(
        name="ray_scaling",
        ours=round(median(values[ours]), 1),
        peer=round(median(values["bare_all_cores"]), 1),
        ratio=ratios[f"{ours}/bare_all_cores"],
        unit="transitions/s",
        details={
            "rates": summary(values),
            "ratios": ratios,
            "cpu_ms": summary(cpu_ms),
            "cpu_ratio": round(median_ratio(cpu_ms["bare_all_cores"], cpu_ms[ours]), 3),
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
