"""The arrays of a replay buffer: one row a control step, and one more an episode for its final observation.

An episode of T steps is T + 1 rows on end, so the successor of k steps is always row + k, and `end` is the last row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class ReplayRows:
    """Columns over R rows. O = F + S: features of a frozen policy, then the state.

    `obs` float32 [R, O]; zeros where nobody looked. `images[camera]` uint8 [R, h, w, 3]. `actions` float32 [R, A] as
    executed, `proposals` what the policy had proposed. `reward` float32 [R], raw. `mc_return` float32 [R].
    `terminated`, `truncated` bool [R], set on an episode's last step. `success` bool [R], of the whole episode.
    `source` int8, `episode` int64, `step` int32, `instruction` int32 [R]. `observed`, `featured` bool [R]: the row has
    an observation, its features. `policy_version` int32 [R]: updates that the policy which acted had seen, -1 where
    none did. `end` int64 [R]: row of the episode's final observation; its own where it is free.
    """

    obs: np.ndarray
    actions: np.ndarray
    proposals: np.ndarray
    reward: np.ndarray
    mc_return: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    source: np.ndarray
    episode: np.ndarray
    step: np.ndarray
    instruction: np.ndarray
    observed: np.ndarray
    featured: np.ndarray
    policy_version: np.ndarray
    end: np.ndarray
    images: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def allocate(
        num_rows: int, obs_dim: int, action_dim: int, cameras: Mapping[str, tuple[int, int]], memory_map: str | None
    ) -> ReplayRows:
        """Zeros. With `memory_map`, pictures lie in files of that folder instead of in memory."""

        def flags() -> np.ndarray:
            return np.zeros(num_rows, np.bool_)

        return ReplayRows(
            obs=np.zeros((num_rows, obs_dim), np.float32),
            actions=np.zeros((num_rows, action_dim), np.float32),
            proposals=np.zeros((num_rows, action_dim), np.float32),
            reward=np.zeros(num_rows, np.float32),
            mc_return=np.full(num_rows, -np.inf, np.float32),
            terminated=flags(),
            truncated=flags(),
            success=flags(),
            source=np.zeros(num_rows, np.int8),
            episode=np.full(num_rows, -1, np.int64),
            step=np.zeros(num_rows, np.int32),
            instruction=np.zeros(num_rows, np.int32),
            observed=flags(),
            featured=flags(),
            policy_version=np.full(num_rows, -1, np.int32),
            end=np.arange(num_rows),
            images={
                camera: _pictures((num_rows, *size, 3), memory_map, camera) for camera, size in sorted(cameras.items())
            },
        )

    def columns(self) -> dict[str, np.ndarray]:
        """All arrays by name; pictures are "images/<camera>"."""
        named = {name: value for name, value in vars(self).items() if name != "images"}
        return named | {f"images/{camera}": pictures for camera, pictures in self.images.items()}

    def move(self, first: int, to: int, count: int) -> None:
        """Copy an episode's `count` rows from `first` to `to`, and free those. The caller sets `end`."""
        for array in self.columns().values():
            array[to : to + count] = array[first : first + count]
        self.free(first, count)

    def free(self, first: int, count: int) -> None:
        """No row of these is a start or a successor any more."""
        rows = slice(first, first + count)
        self.observed[rows] = self.featured[rows] = False
        self.episode[rows] = -1
        self.end[rows] = np.arange(first, first + count)


def _pictures(shape: tuple[int, ...], memory_map: str | None, camera: str) -> np.ndarray:
    if memory_map is None:
        return np.zeros(shape, np.uint8)
    folder = Path(memory_map)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{camera.replace('/', '_')}.npy"
    path.unlink(missing_ok=True)  # a buffer that still has the former file mapped keeps it; cutting it short would not
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


__all__ = ["ReplayRows"]
