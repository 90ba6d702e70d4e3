"""Suites and policies that the tests of the harness name as `tests.unit.harness_suites:...`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vla_rl.cli import main
from vla_rl.core import EnvSpec
from vla_rl.envs.config import PointMazeConfig
from vla_rl.envs.gym import GymConfig
from vla_rl.evaluation.conditions import apply_condition
from vla_rl.evaluation.suite import Suite, SuiteCase

Act = Callable[[Mapping[str, Any]], np.ndarray]


def cars() -> Suite:
    """Gymnasium's mountain car as it is and with noisy sensors: every action shows in the return."""
    env = GymConfig("MountainCarContinuous-v0", success="end", max_episode_steps=40)
    cases = tuple(
        SuiteCase(env.task, apply_condition(env, condition), condition, num_episodes=24)
        for condition in ("", "sensor_noise@2")
    )
    return Suite("cars", version=1, cases=cases)


def mazes() -> Suite:
    """Two point mazes. Nothing is simulated but a point, and who goes straight sometimes meets a wall."""
    cases = tuple(
        SuiteCase(f"point_maze/{layout}", PointMazeConfig(layout, start="broad", max_episode_steps=30), num_episodes=60)
        for layout in ("wall_gap", "umaze")
    )
    return Suite("mazes", version=1, cases=cases)


def straight(spec: EnvSpec) -> Act:
    """Straight to the goal of a maze."""
    assert spec.action.names == ("dx", "dy")

    def act(observation: Mapping[str, Any]) -> np.ndarray:
        x, y, goal_x, goal_y = observation["state"]
        way = np.array([goal_x - x, goal_y - y])
        return np.tile(way / max(1e-9, np.abs(way).max()), (4, 1))

    return act


def fails_after_20(spec: EnvSpec) -> Act:
    """The same, but sees no more than twenty observations."""
    go, count = straight(spec), [0]

    def act(observation: Mapping[str, Any]) -> np.ndarray:
        count[0] += 1
        if count[0] > 20:
            raise ValueError("seen enough")
        return go(observation)

    return act


def evaluate(*argv: str) -> None:
    """`vla-rl eval`, for a process that is killed."""
    assert main(["eval", *argv]) == 0
