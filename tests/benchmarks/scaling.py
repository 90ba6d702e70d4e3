"""Workers and a learner on this machine: the rates that `scaling_simulation` predicts against those that are measured.

What it is told: processor seconds a decision of collection, join and update in the setting at hand, and how many jobs
of others share the cores, from how long those of one worker, synchronous, stood ready without running (schedstat). What
it predicts: how all that overlaps and contends, so decisions a second by the wall clock, with 1 and 2 workers,
synchronous and with a staleness of 1.

    make bench NAME=scaling ARGS="--save"
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
import tyro

from tests.benchmarks.harness import BenchmarkResult, hardware, num_cores
from tests.experiments.scaling_simulation import Costs, predict
from vla_rl.configs import get_recipe
from vla_rl.policies.build import build_policy
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.train.loop import Trainer

SETTINGS = ((1, 0), (2, 0), (1, 1), (2, 1))  # workers, max_staleness


@dataclass(frozen=True)
class ScalingConfig:
    """`repeats`: turns of each setting, of `iterations` each. `save`: keep the result beside this file."""

    num_envs: int = 64
    num_decisions: int = 8
    repeats: int = 6
    iterations: int = 2
    save: bool = False


class Measured:
    """The demo's PPO with workers, in which the driver's time in collections and updates is told apart."""

    def __init__(self, config: ScalingConfig, num_workers: int, max_staleness: int) -> None:
        recipe = get_recipe("demo")
        env_config = replace(recipe.env, num_threads=1)
        algorithm: Any = replace(recipe.train.algorithm, num_decisions=config.num_decisions, critic_warmup_iterations=0)
        train: Any = replace(recipe.train, num_envs=config.num_envs, algorithm=algorithm)
        env = env_config.make(1, split="train")
        self.trainer = Trainer(
            build_policy(recipe.policy, env.spec, seed=0),
            lambda n: env_config.make(n, split="train", auto_reset=True, final_images=True),
            train,
            rollout=RolloutConfig(workers=num_workers, max_staleness=max_staleness, cpus_per_worker=0.1),
        )
        env.close()
        self.decisions = config.num_envs * config.num_decisions
        collector: Any = self.trainer._collector
        self.pids = collector.worker_pids()
        self._collect, collector.collect = collector.collect, self._watched
        self.collect_cpu = 0.0
        self.trainer.iterate()

    def _watched(self, num_decisions: int) -> Any:
        cpu = time.process_time()
        batch = self._collect(num_decisions)
        self.collect_cpu += time.process_time() - cpu
        return batch

    def run(self, iterations: int) -> dict[str, float]:
        """Decisions a second by the wall clock, and processor seconds a decision of each part."""
        collector: Any = self.trainer._collector
        self.collect_cpu = 0.0
        before = [_schedule(pid) for pid in (os.getpid(), *self.pids)]
        workers, wall, cpu = sum(map(_cpu_of, self.pids)), time.perf_counter(), time.process_time()
        for _ in range(iterations):
            self.trainer.iterate()
        collector.state_dict()  # what is under way is waited for: as many windows are collected as updated with
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        after = [_schedule(pid) for pid in (os.getpid(), *self.pids)]
        ran, waited = (sum(b[k] - a[k] for a, b in zip(before, after, strict=True)) for k in range(2))
        n = self.decisions * iterations
        return {
            "rate": n / wall,
            "share": ran / (ran + waited),
            "collect_s": (sum(map(_cpu_of, self.pids)) - workers) / n,
            "join_s": self.collect_cpu / n,
            "update_s": (cpu - self.collect_cpu) / n,
        }


def _schedule(pid: int) -> tuple[int, int]:
    """Nanoseconds that the main thread of a process ran, and that it stood ready without running."""
    ran, waited, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(ran), int(waited)


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def background_jobs(share: float) -> float:
    """How many jobs of others there are on the cores where one of ours gets `share` of a core."""
    return max(0.0, num_cores() / share - 1.0)


def main(config: ScalingConfig) -> None:
    torch.set_num_threads(1)
    machine = hardware()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    runs = {setting: Measured(config, *setting) for setting in SETTINGS}
    turns: dict[tuple[int, int], list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    for _ in range(config.repeats):
        for setting, run in runs.items():
            turns[setting].append(run.run(config.iterations))
    ray.shutdown()
    others = background_jobs(median(turn["share"] for turn in turns[SETTINGS[0]]))
    details: dict[str, Any] = {}
    for (workers, staleness), taken in turns.items():
        middle = {name: median(turn[name] for turn in taken) for name in taken[0]}
        rate, share = middle.pop("rate"), middle.pop("share")
        costs = Costs(**middle, background=others)
        predicted = predict(costs, workers, staleness, config.num_envs * config.num_decisions, num_cores())
        details[f"workers_{workers}_staleness_{staleness}"] = {
            "measured": round(rate, 1),
            "predicted": round(predicted, 1),
            "ratio": round(predicted / rate, 3),
            "share_of_a_core": round(share, 3),
            "rates": [round(turn["rate"], 1) for turn in taken],
            "costs": {name: round(value, 6) for name, value in asdict(costs).items()},
        }
    two = details["workers_2_staleness_0"]
    BenchmarkResult(
        name="scaling",
        ours=two["predicted"],
        peer=two["measured"],
        ratio=two["ratio"],
        unit="decisions/s, predicted and measured",
        details=details | {"repeats": config.repeats, "hardware": machine},
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(ScalingConfig))
