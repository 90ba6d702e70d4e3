"""Experts for ManiSkill's tasks: its own motion-planning solutions, recorded, and closed-loop scripts of waypoints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_OPEN, _CLOSED = 1.0, -1.0
_STEP_M = 0.1  # what an action of 1 moves with pd_ee_delta_pos


# ------------------------------------------------------------------------------------------------------------- planner
class _Recorder:
    """What a solution takes for its environment. It is reset by whoever made it, and its actions are kept."""

    def __init__(self, env: Any) -> None:
        self.unwrapped = env
        self.actions: list[np.ndarray] = []

    def reset(self, seed: Any = None) -> None:
        """Nothing: the episode has begun."""

    def step(self, action: np.ndarray) -> Any:
        self.actions.append(np.asarray(action, np.float32).astype(np.float64))
        return self.unwrapped.step(action)


def solution_of(task: str) -> Callable[..., Any] | None:
    """ManiSkill's motion-planning solution of `task`, a function (env, seed); None where it has none."""
    from mani_skill.examples.motionplanning.panda import solutions  # pyright: ignore[reportMissingImports]

    return getattr(solutions, f"solve{task.rsplit('-v', 1)[0]}", None)


def plan(env: Any, solve: Callable[..., Any]) -> np.ndarray:
    """The actions [T, A] of `solve` in the episode that has begun in `env`, T >= 1; the control is "pd_joint_pos".

    A plan that fails half-way is what there is of it: the episode is a failure of the expert, not of the program.
    """
    rest = env.agent.robot.get_qpos()[0].numpy()[: env.single_action_space.shape[0] - 1]
    recorder = _Recorder(env)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            solve(recorder)
        except Exception as error:  # planners raise whatever they like
            print(f"the planner failed: {type(error).__name__}: {error}")
    return np.stack(recorder.actions or [np.append(rest, _OPEN).astype(np.float64)])


# ------------------------------------------------------------------------------------------------------------- scripts
class PickCubeScript:
    """Over the cube, down, close, to the goal. It goes by what it sees, so it recovers from noise and slips."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def act(self) -> np.ndarray:
        env = self._env
        tip, cube, goal = (_position(thing) for thing in (env.agent.tcp, env.cube, env.goal_site))
        off = float(np.linalg.norm((cube - tip)[:2]))
        if bool(env.agent.is_grasping(env.cube)[0]):
            return _towards(tip, goal, _CLOSED)
        if off > (0.012 if tip[2] > cube[2] + 0.04 else 0.03):
            return _towards(tip, [cube[0], cube[1], max(cube[2] + 0.07, tip[2] if off > 0.05 else 0.0)], _OPEN)
        reached = tip[2] < cube[2] + 0.012
        return _towards(tip, cube, _CLOSED if reached else _OPEN)


class PushCubeScript:
    """Behind the cube at a height, down, forward with closed fingers."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def act(self) -> np.ndarray:
        env = self._env
        tip, cube, goal = (_position(thing) for thing in (env.agent.tcp, env.obj, env.goal_region))
        behind, aside = cube[0] - tip[0], abs(cube[1] - tip[1])
        if not (0.02 < behind < 0.12 and aside < 0.025):
            over = tip[2] > 0.06 or not (-0.05 < behind < 0.05 and aside < 0.05)
            return _towards(tip, [cube[0] - 0.07, cube[1], 0.1] if over else [tip[0], tip[1], 0.12], _CLOSED)
        if tip[2] > 0.035:
            return _towards(tip, [cube[0] - 0.07, cube[1], 0.02], _CLOSED)
        return _towards(tip, [max(goal[0], tip[0]), cube[1], 0.02], _CLOSED)


SCRIPTS: dict[str, Callable[[Any], Any]] = {"PickCube-v1": PickCubeScript, "PushCube-v1": PushCubeScript}


def _position(thing: Any) -> np.ndarray:
    return thing.pose.p[0].numpy().astype(np.float64)


def _towards(tip: np.ndarray, target: Any, gripper: float, largest: float = 0.6) -> np.ndarray:
    """The action [4] that moves the tool's tip to `target` m, no more than `largest` in each direction."""
    return np.append(np.clip((np.asarray(target) - tip) / _STEP_M, -largest, largest), gripper)
