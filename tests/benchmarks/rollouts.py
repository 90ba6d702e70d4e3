"""The comparison behind `rollout_state` and `rollout_vision`: our tabletop against robosuite and ManiSkill.

Control steps per second on all cores of one machine, random actions, a seven-joint Panda at 20 Hz on all sides. Ours is
one process with 256 environments that executes chunks of eight, ends and resets of episodes included; theirs are one
process a core with one environment each, at their defaults, resets not counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.benchmarks.harness import (
    BenchmarkResult,
    PeerGroup,
    PeerUnavailableError,
    hardware,
    in_turns,
    median_ratio,
    peer_python,
    summary,
)
from tests.benchmarks.tabletop import TabletopRollout
from vla_rl.envs.maniskill import REQUIREMENTS
from vla_rl.vulkan import driver_environment

ROBOSUITE = ("robosuite==1.5.2", "mujoco==3.9.0", "numpy==1.26.4")
MANISKILL = REQUIREMENTS[0]


@dataclass(frozen=True)
class RolloutBenchmarkConfig:
    """`seconds` each side runs in each of `repeats` turns. `save`: keep the result beside this file. `maniskill`:
    measure it too where it runs; it needs a Vulkan device."""

    repeats: int = 5
    seconds: float = 4.0
    num_envs: int = 256
    chunk: int = 8
    maniskill: bool = True
    save: bool = False


def compare(name: str, config: RolloutBenchmarkConfig, cameras: dict[str, int], peer_modes: dict[str, str]) -> None:
    """Measure and print; `peer_modes`: side -> mode of robosuite's script, the first being the one of the ratio."""
    torch.set_num_threads(1)
    machine = hardware()
    ours = TabletopRollout(num_envs=config.num_envs, chunk=config.chunk, cameras=cameras)
    sides: dict[str, Callable[[], float]] = {"ours": lambda: ours.run(seconds=config.seconds)}
    groups: list[PeerGroup] = []
    skipped: dict[str, str] = {}
    wanted = [(side, "robosuite", ROBOSUITE, "robosuite_lift.py", mode) for side, mode in peer_modes.items()]
    if config.maniskill:
        wanted.append(("maniskill", "maniskill", MANISKILL, "maniskill_pick_cube.py", "vision" if cameras else "state"))
    try:
        for side, peer, requirements, script, mode in wanted:
            try:
                group = PeerGroup(peer_python(peer, requirements), script, mode, _environment(peer))
            except PeerUnavailableError as error:
                skipped[side] = str(error)
                continue
            groups.append(group)
            sides[side] = lambda group=group: group.rate(config.seconds)
        values = in_turns(sides, config.repeats)
    finally:
        for group in groups:
            group.close()
        ours.env.close()
    _finish(name, config, values, next(iter(peer_modes)), skipped, machine)


def _finish(
    name: str,
    config: RolloutBenchmarkConfig,
    values: dict[str, list[float]],
    peer: str,
    skipped: dict[str, str],
    machine: dict[str, Any],
) -> None:
    ratios = {side: round(median_ratio(values["ours"], v), 1) for side, v in values.items() if side != "ours"}
    BenchmarkResult(
        name=name,
        ours=round(median(values["ours"]), 1),
        peer=round(median(values[peer]), 1) if peer in values else None,
        ratio=ratios.get(peer),
        unit="control steps/s",
        details={
            "rates": summary(values),
            "ratios": ratios,
            "skipped": skipped,
            "repeats": config.repeats,
            "seconds": config.seconds,
            "num_envs": config.num_envs,
            "chunk": config.chunk,
            "hardware": machine,
        },
    ).finish(config.save)


def _environment(peer: str) -> dict[str, str]:
    """ManiSkill wants a Vulkan driver, newer than Debian 12's (`make vulkan`)."""
    return driver_environment() if peer == "maniskill" else {}
