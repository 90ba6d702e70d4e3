"""Videos of chosen episodes, collected while an evaluation or a rollout runs.

The environment renders a frame a control step only for the episodes that the recorder wants; all others cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from vla_rl.evaluation.video import VideoWriter


@dataclass(frozen=True)
class Recording:
    """Where an episode's video lies and how the episode ended."""

    seed: int
    path: Path
    instruction: str
    success: bool
    num_frames: int


class EpisodeRecorder:
    """Writes `directory/episode_<seed>.mp4` for each of `seeds`, in real time at `control_hz` times `speed`.

    Where the policy's chunks are given, they lie beside the video in `episode_<seed>.npz`: `chunks` float32 [D, H, A],
    one a decision in the environment's units, `executed` int64 [D], control steps of each that were executed, and
    `names` [A]. See `vla_rl.evaluation.action_curves`.
    """

    def __init__(self, directory: str | Path, seeds: Iterable[int], control_hz: float, *, speed: float = 1.0) -> None:
        if not control_hz > 0 or not speed > 0:
            raise ValueError(f"EpisodeRecorder: control_hz and speed must be positive, got {control_hz} and {speed}")
        self.directory = Path(directory)
        self.seeds = frozenset(int(seed) for seed in seeds)
        self._fps = control_hz * speed
        self._open: dict[int, VideoWriter] = {}
        self._chunks: dict[int, list[tuple[np.ndarray, int]]] = {}
        self._done: dict[int, Recording] = {}

    @property
    def recordings(self) -> Mapping[int, Recording]:
        """Finished videos by episode seed."""
        return dict(self._done)

    def wants(self, seed: int) -> bool:
        return seed in self.seeds and seed not in self._done

    def add(self, seed: int, frames: Tensor, chunk: Tensor | None = None) -> None:
        """Append `frames`, uint8 [T, h, w, 3], to the video of the episode with `seed`. `chunk`: the actions [H, A]
        that the policy had planned, of which the first T were executed."""
        if not self.wants(seed):
            raise ValueError(f"the recorder was not asked for episode {seed}, or it is finished; ask `wants` first")
        if seed not in self._open:
            self._open[seed] = VideoWriter(self.directory / f"episode_{seed}.mp4", self._fps)
        self._open[seed].write(frames)
        if chunk is not None:
            self._chunks.setdefault(seed, []).append((chunk.detach().float().cpu().numpy().copy(), len(frames)))

    def finish(self, seed: int, *, instruction: str, success: bool, action_names: Sequence[str] = ()) -> None:
        """Close the video of an episode that ended. An episode without a frame leaves no recording."""
        writer = self._open.pop(seed, None)
        if writer is None:
            return
        writer.close()
        plans = self._chunks.pop(seed, [])
        if plans:
            np.savez_compressed(
                writer.path.with_suffix(".npz"),
                chunks=np.stack([chunk for chunk, _ in plans]),
                executed=np.array([steps for _, steps in plans]),
                names=np.array(action_names),
            )
        self._done[seed] = Recording(seed, writer.path, instruction, success, writer.num_frames)

    def discard(self) -> None:
        """Drop the videos of episodes that did not end; an interrupted evaluation calls this."""
        for writer in self._open.values():
            writer.discard()
        self._open.clear()
        self._chunks.clear()
