"""Metaworld's 50 tasks on a Sawyer arm, as hosted environments: numpy and metaworld 3 only.

Options of `build`, which `vla_rl.envs.metaworld.MetaworldConfig` explains: task, cameras {name: [h, w]}, reward
("sparse" or "dense"), max_episode_steps, privileged_state, fast_pictures, render_size.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from . import mujoco_view

metaworld: Any = importlib.import_module("metaworld")
policies: Any = importlib.import_module("metaworld.policies")

_HAND = ("hand_x", "hand_y", "hand_z", "gripper_opening")
_NUM_PRESENT = 18  # of Metaworld's 39 numbers: hand, opening, two objects' positions and quaternions
_PEOPLE = "corner3"


class MetaworldEnv:
    """One task; object and goal positions come from the episode's seed, the goal is always observed."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._task: str = options["task"]
        env: Any = metaworld.ALL_V3_ENVIRONMENTS[self._task]()
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)  # cached with bounds of zero for a goal that is not observed
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env._set_task_called = True
        env.max_path_length = options["max_episode_steps"] + 1  # else it raises at its own 500th step
        self._env = env
        self._expert = policies.ENV_POLICY_MAP[self._task]()
        self._view = mujoco_view.View(fast=options["fast_pictures"], hide=())
        self._obs = np.zeros(39)

    def spec(self) -> dict[str, Any]:
        space = self._env.action_space
        objects = [f"object_{k}_{part}" for k in (1, 2) for part in ("x", "y", "z", "qx", "qy", "qz", "qw")]
        present = [*_HAND, *objects]
        names = [*present, *(f"previous_{name}" for name in present), "goal_x", "goal_y", "goal_z"]
        return {
            "name": f"metaworld/{self._task}",
            "cameras": self._options["cameras"],
            "state_names": names if self._options["privileged_state"] else list(_HAND),
            "action_low": space.low.tolist(),
            "action_high": space.high.tolist(),
            "action_names": ["dx", "dy", "dz", "gripper"],
            "max_episode_steps": self._options["max_episode_steps"],
            "control_hz": float(self._env.metadata["render_fps"]),
        }

    def reset(self, seed: int) -> None:
        self._env.seed(seed)
        self._env._prev_obs = np.zeros(_NUM_PRESENT)
        self._obs, _ = self._env.reset()

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        self._obs, reward, _, _, info = self._env.step(action.astype(np.float32))
        success = bool(info["success"])
        if self._options["reward"] == "sparse":
            reward = float(success)
        return float(reward), success, False, success

    def observe(self, images: bool) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
        state = self._obs if self._options["privileged_state"] else self._obs[: len(_HAND)]
        cameras = self._options["cameras"].items() if images else ()
        sentence = self._task.removesuffix("-v3").replace("-", " ")
        return state.astype(np.float32), {c: self._picture(c, *size) for c, size in cameras}, sentence

    def render(self) -> np.ndarray:
        return self._picture(_PEOPLE, *self._options["render_size"])

    def expert_action(self) -> np.ndarray:
        return np.asarray(self._expert.get_action(self._obs), np.float64)

    def close(self) -> None:
        self._view.close()
        self._env.close()

    def _picture(self, camera: str, height: int, width: int) -> np.ndarray:
        picture = self._view.picture(self._env.model, self._env.data, camera, height, width)
        return np.ascontiguousarray(picture[::-1, ::-1]) if camera.startswith("corner") else picture  # they hang so


def build(options: dict[str, Any]) -> MetaworldEnv:
    """Raises ValueError for an unknown task or camera."""
    known = metaworld.ALL_V3_ENVIRONMENTS
    if options["task"] not in known:
        raise ValueError(f"metaworld: task {options['task']!r} is unknown; use one of {', '.join(sorted(known))}")
    env = MetaworldEnv(options)
    there = mujoco_view.camera_names(env._env.model)
    for camera in options["cameras"]:
        if camera not in there:
            raise ValueError(f"metaworld: there is no camera {camera!r}; there are {', '.join(there)}")
    return env
