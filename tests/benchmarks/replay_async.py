"""WSRL's online stage on the tabletop with a worker that acts: in turns with the learner, and while it learns.

Both learn from as many control steps with as many updates; a turn ends when what is under way is here. The process that
does both itself, as by default, is told beside them.

    make bench NAME=replay_async ARGS="--save"
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
import tyro

from tests.benchmarks.harness import BenchmarkResult, hardware
from vla_rl.configs import get_recipe
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.networks import ActorNetConfig
from vla_rl.offpolicy.sac import SACConfig
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.train.offpolicy import OffPolicyConfig, OnlineConfig, OnlineTrainer, online_buffer
from vla_rl.train.offpolicy_stages import build_learner, ray_collector

AGENT = SACConfig(actor=ActorNetConfig((64, 64)), critic=MLPCriticConfig(10, (64, 64)))  # WSRL's, smaller
SETTINGS = {"one_process": None, "turns": 0, "asynchronous": 1}  # max_staleness of a worker


@dataclass(frozen=True)
class ReplayAsyncConfig:
    """`repeats`: turns of each setting, of `iterations` each. `save`: keep the result beside this file."""

    num_envs: int = 8
    env_steps_per_iteration: int = 800
    utd_ratio: float = 0.25
    repeats: int = 7
    iterations: int = 2
    save: bool = False


class Measured:
    """One setting. Its first two iterations are the warm-up, compilations included."""

    def __init__(self, config: ReplayAsyncConfig, max_staleness: int | None) -> None:
        recipe = get_recipe("wsrl")
        assert isinstance(recipe.train, OffPolicyConfig)
        online = OnlineConfig(
            num_envs=config.num_envs,
            num_env_steps=100 * config.env_steps_per_iteration,
            env_steps_per_iteration=config.env_steps_per_iteration,
            warmup_env_steps=config.env_steps_per_iteration,
            utd_ratio=config.utd_ratio,
        )
        env_config: Any = replace(recipe.env, num_threads=1)

        def make_env(num_envs: int) -> Any:
            return env_config.make(num_envs, split="train", auto_reset=True, final_images=True)

        env = make_env(config.num_envs)
        learner = build_learner(AGENT, env.spec, 1, policy=None, dataset=None, seed=0)
        acts: Any = env
        if max_staleness is not None:
            rollout = RolloutConfig(workers=1, max_staleness=max_staleness, cpus_per_worker=0.1)
            acts = ray_collector(make_env, learner, online, rollout)
        buffer = online_buffer(replace(recipe.train.replay, capacity=100_000), env.spec, config.num_envs)
        self.trainer = OnlineTrainer(learner, acts, buffer, online)
        self._steps, self._acts = config.env_steps_per_iteration, acts
        for _ in range(2):
            self.trainer.iterate()
        self.staleness: list[float] = []

    def rate(self, iterations: int) -> float:
        """Transitions a second by the wall clock, acted, stored and learned from."""
        start = time.perf_counter()
        for _ in range(iterations):
            self.staleness.append(self.trainer.iterate().get("rollout/staleness", 0.0))
        self._acts.state_dict()  # what is under way is waited for: as much is acted as learned from
        return iterations * self._steps / (time.perf_counter() - start)


def main(config: ReplayAsyncConfig) -> None:
    torch.set_num_threads(1)
    machine = hardware()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    runs = {name: Measured(config, staleness) for name, staleness in SETTINGS.items()}
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(config.repeats):
        for name, run in runs.items():
            rates[name].append(run.rate(config.iterations))
    ray.shutdown()
    pairs = [a / b for a, b in zip(rates["asynchronous"], rates["turns"], strict=True)]
    details = {name: [round(rate, 1) for rate in found] for name, found in rates.items()}
    BenchmarkResult(
        name="replay_async",
        ours=round(median(rates["asynchronous"]), 1),
        peer=round(median(rates["turns"]), 1),
        ratio=round(median(pairs), 3),
        unit="transitions/s, asynchronous and in turns",
        details={
            "rates": details,
            "ratios": [round(ratio, 3) for ratio in pairs],
            "one_process": round(median(rates["one_process"]), 1),
            "staleness": max(runs["asynchronous"].staleness),
            "repeats": config.repeats,
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(ReplayAsyncConfig))
