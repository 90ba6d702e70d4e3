"""A small Gymnasium environment with a camera, ends of both sorts and an `info["success"]`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class DriftEnv(gym.Env):
    """A point that drifts at random; success is reaching x > 1 (ends), failure x < -1 (ends)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self) -> None:
        self.render_mode = "rgb_array"
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Box(0, 255, (4, 4, 3), np.uint8),
                "position": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
                "speed": gym.spaces.Box(-np.inf, np.inf, (1,), np.float64),
            }
        )

    def _obs(self) -> dict[str, Any]:
        return {"pixels": self.render(), "position": self._x.copy(), "speed": np.array([self._drift[0]])}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict]:
        super().reset(seed=seed)
        self._x = self.np_random.normal(0, 0.3, 2)
        self._drift = self.np_random.normal(0, 0.1, 2)
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict]:
        self._x = self._x + 0.2 * action + self._drift + self.np_random.normal(0, 0.05, 2)
        success = bool(self._x[0] > 1)
        return self._obs(), float(self._x[1]), success or bool(self._x[0] < -1), False, {"success": success}

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), int(np.clip(128 + 100 * self._x[0], 0, 255)), np.uint8)


def make_drift() -> gym.Env:
    """Of 13 steps at most; at the top of a light module, since every worker process imports it."""
    return gym.wrappers.TimeLimit(DriftEnv(), 13)
