"""Control steps per second of each simulator: by its own interface, and through the chunk contract.

One process of the simulator on each side, random actions, no reset counted. With pictures (one camera) "every_step"
shows one after each step, as the simulator itself does, and "decisions" one after each chunk of eight.

    make bench NAME=sims [ARGS="--save"]

Goal: through the contract at least .95 of bare where both draw every step, and more than bare where we draw decisions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "egl")

import torch
import tyro

from tests.benchmarks.harness import (
    BenchmarkResult,
    PeerGroup,
    PeerUnavailableError,
    hardware,
    in_turns,
    median_ratio,
    summary,
)
from vla_rl.envs.config import without_cameras
from vla_rl.envs.install import environments_folder, simulator_python
from vla_rl.envs.libero import LiberoConfig
from vla_rl.envs.maniskill import ManiSkillConfig
from vla_rl.envs.metaworld import MetaworldConfig
from vla_rl.envs.remote import SimulatorError
from vla_rl.envs.robosuite import RobosuiteConfig
from vla_rl.vulkan import driver_environment

SIZE, CHUNK, FOREVER = 64, 8, 10**6
# What the peers' scripts run too.
SIMULATORS: dict[str, Any] = {
    "robosuite": RobosuiteConfig("Lift", ("agentview",), SIZE, max_episode_steps=FOREVER),
    "libero": LiberoConfig(cameras=("agentview",), image_size=SIZE, max_episode_steps=FOREVER),
    "metaworld": MetaworldConfig("reach-v3", image_size=SIZE, max_episode_steps=FOREVER),
    "maniskill": ManiSkillConfig("PickCube-v1", image_size=SIZE, max_episode_steps=FOREVER, reward="dense"),
}
PEERS = {
    "robosuite": "robosuite_lift.py",
    "libero": "libero_object.py",
    "metaworld": "metaworld_reach.py",
    "maniskill": "maniskill_pick_cube.py",
}


@dataclass(frozen=True)
class SimsConfig:
    """`seconds` each side runs in each of `repeats` turns. `save`: keep the result beside this file."""

    simulators: tuple[str, ...] = tuple(SIMULATORS)
    repeats: int = 5
    seconds: float = 4.0
    save: bool = False


class _Ours:
    """One environment through the contract, in chunks of `chunk` random actions."""

    def __init__(self, config: Any, chunk: int) -> None:
        self._env = config.make(1, split="train", auto_reset=True)
        self._env.reset([0])
        self._chunk = chunk
        self._low = torch.tensor(self._env.spec.action.low)
        self._range = torch.tensor(self._env.spec.action.high) - self._low
        self.run(16 / 20)

    def run(self, seconds: float) -> float:
        self._env.reset([0])
        steps, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            step = self._env.step(self._low + self._range * torch.rand(1, self._chunk, len(self._low)))
            steps += int(step.executed.sum())
        return steps / elapsed

    def close(self) -> None:
        self._env.close()


def _measure(name: str, vision: bool, config: SimsConfig) -> dict[str, list[float]]:
    made = SIMULATORS[name] if vision else without_cameras(SIMULATORS[name])
    ours = {"every_step": _Ours(made, 1), "decisions": _Ours(made, CHUNK)}  # first: LIBERO's host configures LIBERO
    environment = {"LIBERO_CONFIG_PATH": str(environments_folder() / "libero" / "config")}
    if name == "maniskill":
        environment = driver_environment()
    mode = "vision" if vision else "state"
    bare = PeerGroup(simulator_python(name), PEERS[name], mode, environment, all_cores=True)
    sides: dict[str, Callable[[], float]] = {"bare": lambda: bare.rate(config.seconds)}
    sides |= {side: lambda one=one: one.run(config.seconds) for side, one in ours.items()}
    try:
        return in_turns(sides, config.repeats)
    finally:
        bare.close()
        for one in ours.values():
            one.close()


def main(config: SimsConfig) -> None:
    torch.set_num_threads(1)
    machine, rates, ratios, skipped = hardware(), {}, {}, {}
    for name in config.simulators:
        for vision in (False, True):
            case = f"{name}_{'vision' if vision else 'state'}"
            try:
                values = _measure(name, vision, config)
            except (FileNotFoundError, PeerUnavailableError, SimulatorError) as error:
                skipped[case] = str(error)
                continue
            rates[case] = summary(values)
            ratios[case] = {
                side: round(median_ratio(values[side], values["bare"]), 3) for side in ("every_step", "decisions")
            }
            print(case, {side: round(median(v), 1) for side, v in values.items()}, ratios[case], flush=True)
    worst = min((r["every_step"] for case, r in ratios.items() if case.endswith("vision")), default=None)
    BenchmarkResult(
        name="sims",
        ours=None,
        peer=None,
        ratio=worst,
        unit="control steps/s",
        details={
            "ratio_is": "the lowest of the simulators', a picture every step, through the contract against bare",
            "rates": rates,
            "ratios": ratios,
            "skipped": skipped,
            "repeats": config.repeats,
            "seconds": config.seconds,
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(SimsConfig))
