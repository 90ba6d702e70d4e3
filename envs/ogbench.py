"""OGBench's manipulation tasks (cube, scene, puzzle), single-task variants with state observations, as chunked ones.

    make_ogbench("cube-double-singletask-task2-v0", num_envs=4)

The reward is minus the number of parts that are out of place. Reward, success and termination speak of the state in
which the action was taken, as OGBench's own relabelling of data does: the step after the one that solved the task ends
the episode. OGBench is optional: pip install 'vla-rl[ogbench]'.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from vla_rl.data.ogbench_play import require_ogbench
from vla_rl.envs.gym import GymStepEnv
from vla_rl.envs.vector import ChunkedEnv, split_stream

_FAMILIES = ("cube", "scene", "puzzle")


def _adapted(env_class: Any) -> type[gym.Env]:
    """`env_class` with one action space for good (OGBench makes one at each question, with a warning, and draws from it
    at every reset) that is seeded with the episode, and pictures where there is no display."""

    class Adapted(env_class):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._actions = gym.spaces.Box(-1.0, 1.0, (5,), np.float32)

        @property
        def action_space(self) -> gym.spaces.Box:
            return self._actions

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            if seed is not None:
                self._actions.seed(seed)
            return super().reset(seed=seed, options=options)

        def render(self) -> np.ndarray:
            if self._renderer is None:
                _choose_opengl()
            return super().render()

        def close(self) -> None:
            if self._renderer is not None:
                self._renderer.close()
                self._renderer = None

    return Adapted


def _choose_opengl() -> None:
    """MuJoCo chose its OpenGL when somebody first imported it, and without MUJOCO_GL one that needs a display."""
    backend = os.environ.setdefault("MUJOCO_GL", "egl")
    gl_context: Any = importlib.import_module("mujoco.rendering.classic.gl_context")
    gl_context.GLContext = importlib.import_module(f"mujoco.{backend}").GLContext


def make_ogbench(
    name: str,
    num_envs: int = 1,
    *,
    max_episode_steps: int | None = None,
    auto_reset: bool = True,
    stream: Sequence[int] = (),
) -> ChunkedEnv:
    """Chunked environments of OGBench's id `name`, one after another in this process; actions [-1, 1]^5 (gripper's
    motion x, y, z, yaw, opening) at 20 Hz.

    `max_episode_steps`: None takes OGBench's (cube: 200, 500 and 1000 steps for one, two and three cubes). `stream`:
    numbers that are mixed into every seed, so that splits do not share an episode. Raises RuntimeError where OGBench is
    missing, ValueError for a name that is not a manipulation task with its own reward.
    """
    require_ogbench()
    import ogbench  # pyright: ignore[reportMissingImports]  # noqa: F401 (registers the environments)

    family = name.split("-", 1)[0]
    if family not in _FAMILIES or "-singletask" not in name or name not in gym.registry:
        raise ValueError(
            f"make_ogbench: {name!r} is not one of OGBench's single tasks with state observations; "
            f"'<cube|scene|puzzle>-<variant>-singletask-task<1..5>-v0' is, e.g. 'cube-double-singletask-task2-v0'"
        )
    spec = copy.deepcopy(gym.spec(name))
    spec.entry_point = _adapted(load_env_creator(str(spec.entry_point)))
    spec.disable_env_checker = True
    spec.max_episode_steps = max_episode_steps or spec.max_episode_steps
    vector = SyncVectorEnv([lambda: gym.make(spec)] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    vector.spec = spec
    instruction = f"solve {name.removesuffix('-v0')}"
    step_env = GymStepEnv(vector, instruction=instruction, success_key="success", control_hz=20.0, stream=stream)
    return ChunkedEnv(step_env, auto_reset=auto_reset)


@dataclass(frozen=True)
class OGBenchConfig:
    """One of OGBench's single tasks by its id, see `make_ogbench`. `max_episode_steps`: None takes OGBench's;
    `demo_episode_steps`: of the episodes that are recorded, which a player goes on with where no task is solved."""

    task: str = "cube-single-singletask-task1-v0"
    max_episode_steps: int | None = None
    demo_episode_steps: int | None = 1000

    @property
    def cameras(self) -> tuple[str, ...]:
        """States alone."""
        return ()

    @property
    def control_hz(self) -> float:
        """Control steps a second of simulated time."""
        return 20.0

    @property
    def for_demos(self) -> OGBenchConfig:
        """Where demonstrations are recorded: in longer episodes."""
        return replace(self, max_episode_steps=self.demo_episode_steps or self.max_episode_steps)

    def make(
        self,
        num_envs: int,
        *,
        split: str,
        auto_reset: bool = False,
        final_images: bool = False,
        task: str | None = None,
    ) -> ChunkedEnv:
        """`num_envs` environments of `split` ("train" or "test": no seed gives the same episode in both)."""
        del final_images
        steps, stream = self.max_episode_steps, split_stream(split, "OGBench")
        return make_ogbench(task or self.task, num_envs, max_episode_steps=steps, auto_reset=auto_reset, stream=stream)
