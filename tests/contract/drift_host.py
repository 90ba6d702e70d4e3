"""A host module without a simulator: a point on a line that goes where its actions and its seed send it.

`options`: `camera` (pixels, 0 for none), `max_episode_steps`, `fail` (in `build`). In step `at` of an episode whose
seed is in `bad_seeds` the process kills itself, or hangs with `hang`; with `marker`, a file, only the first time.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np


class DriftHost:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.pixels = options.get("camera", 8)
        self.t = 0

    def spec(self) -> dict[str, Any]:
        return {
            "name": "drift",
            "cameras": {"agent": [self.pixels, self.pixels]} if self.pixels else {},
            "state_names": ["x", "drift", "t"],
            "action_low": [-1.0, -1.0],
            "action_high": [1.0, 1.0],
            "action_names": ["dx", "nothing"],
            "max_episode_steps": self.options.get("max_episode_steps", 9),
            "control_hz": 10.0,
        }

    def reset(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.seed, self.t = seed, 0
        self.x, self.drift = rng.uniform(-0.5, 0.5), rng.uniform(-0.2, 0.2)

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        self.t += 1
        self._accident()
        self.x += 0.3 * action[0] + self.drift
        success = self.x > 0.8
        return float(self.x), success or self.x < -1.5, False, success

    def _accident(self) -> None:
        marker = self.options.get("marker")
        if self.seed not in self.options.get("bad_seeds", []) or self.t != self.options.get("at", 3):
            return
        if marker and Path(marker).exists():
            return
        if marker:
            Path(marker).touch()
        print("the simulator broke", flush=True)
        if self.options.get("hang"):
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)

    def observe(self, images: bool) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
        state = np.array([self.x, self.drift, self.t], np.float32)
        pictures = {"agent": self._picture()} if images and self.pixels else {}
        return state, pictures, f"go right against {self.drift:.2f}"

    def _picture(self) -> np.ndarray:
        level = int(np.clip(128 + 60 * self.x, 0, 255))
        return np.full((self.pixels, self.pixels, 3), level, np.uint8)

    def render(self) -> np.ndarray:
        return self._picture()

    def expert_action(self) -> np.ndarray:
        return np.array([1.0, 0.0])

    def close(self) -> None:
        pass


def build(options: dict[str, Any]) -> DriftHost:
    if options.get("fail"):
        raise ValueError("no such task")
    return DriftHost(options)
