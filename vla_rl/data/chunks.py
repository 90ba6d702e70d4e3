"""Action chunks out of demonstrations, for supervised fine-tuning and for critics.

A sample is a start frame: the observation there and the H actions from there on. A chunk never crosses the end of its
episode: it is padded with the last action, and `mask` is False on the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vla_rl.core import Observation
from vla_rl.data.lerobot_format import DatasetError
from vla_rl.data.lerobot_reader import LeRobotDataset


@dataclass(frozen=True)
class ChunkBatch:
    """B samples: `obs` at the start frames, `actions` float32 [B, H, A] in the dataset's units, `mask` bool [B, H] True
    where an action is real, `samples` int64 [B] which samples of the `ChunkDataset` these are."""

    obs: Observation
    actions: Tensor
    mask: Tensor
    samples: Tensor

    def __len__(self) -> int:
        return self.actions.shape[0]


class ChunkDataset:
    """All start frames of a dataset, in memory. Sample i is frame i of the chosen episodes laid end to end.

    `episodes`: which (None: all). `cameras`: which (None: all, (): none). `action_horizon`: H.
    Pictures are decoded once and kept as uint8 where they need at most `image_memory_mb` MiB (64x64 RGB: 12 KiB a frame
    and camera); otherwise each batch decodes its own, which is slower (`images_in_memory` tells). States and actions
    always stay in memory. Raises DatasetError for a dataset without frames or without the wanted cameras.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        action_horizon: int,
        *,
        episodes: Sequence[int] | None = None,
        cameras: Sequence[str] | None = None,
        image_memory_mb: float = 2048.0,
    ) -> None:
        if action_horizon < 1:
            raise ValueError(f"action_horizon must be at least 1, got {action_horizon}")
        self.dataset, self.action_horizon = dataset, action_horizon
        self.episodes = tuple(range(dataset.num_episodes) if episodes is None else episodes)
        self.cameras = tuple(dataset.cameras if cameras is None else cameras)
        unknown = sorted(set(self.cameras) - set(dataset.cameras))
        if unknown:
            raise DatasetError(f"{dataset.path} has no camera {unknown}; it has {sorted(dataset.cameras)}")
        if not self.episodes:
            raise DatasetError(f"{dataset.path}: no episode to sample from; record demonstrations first")
        parts = [dataset.episode(i, cameras=()) for i in self.episodes]
        self.state = torch.cat([p.state for p in parts])
        self.action = torch.cat([p.action for p in parts])
        lengths = torch.tensor([len(p) for p in parts])
        ends = lengths.cumsum(0)
        self._episode = torch.repeat_interleave(torch.arange(len(parts)), lengths)  # position in self.episodes
        self._start, self._end = (ends - lengths)[self._episode], ends[self._episode]
        self._instructions = tuple(p.instruction for p in parts)
        self.images_in_memory = self.image_bytes <= image_memory_mb * 2**20
        self._images = self._load_images() if self.images_in_memory else {}

    def __len__(self) -> int:
        return self.action.shape[0]

    @property
    def image_bytes(self) -> int:
        """Memory that all pictures need, decoded."""
        sizes = [self.dataset.cameras[c] for c in self.cameras]
        return len(self) * sum(3 * size.height * size.width for size in sizes)

    def batch(self, samples: Tensor) -> ChunkBatch:
        """The chunks that start at `samples`, int64 [B]. Raises IndexError out of range."""
        if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) < len(self):
            raise IndexError(f"samples must lie in [0, {len(self)}), got {int(samples.min())} to {int(samples.max())}")
        frames = samples[:, None] + torch.arange(self.action_horizon)
        end = self._end[samples][:, None]
        obs = Observation(
            images={camera: self._pictures(camera, samples) for camera in self.cameras},
            state=self.state[samples],
            instruction=tuple(self._instructions[i] for i in self._episode[samples].tolist()),
        )
        return ChunkBatch(obs, self.action[torch.minimum(frames, end - 1)], frames < end, samples)

    def _load_images(self) -> dict[str, Tensor]:
        images = {}
        for camera in self.cameras:
            size = self.dataset.cameras[camera]
            images[camera] = torch.empty(len(self), size.height, size.width, 3, dtype=torch.uint8)
        for position, episode in enumerate(self.episodes):
            rows = (self._episode == position).nonzero().flatten()
            for camera in self.cameras:
                images[camera][rows[0] : rows[-1] + 1] = self.dataset.images(episode, camera)
        return images

    def _pictures(self, camera: str, samples: Tensor) -> Tensor:
        if self.images_in_memory:
            return self._images[camera][samples]
        size = self.dataset.cameras[camera]
        out = torch.empty(len(samples), size.height, size.width, 3, dtype=torch.uint8)
        of_sample = self._episode[samples]
        for position in of_sample.unique().tolist():
            where = (of_sample == position).nonzero().flatten()
            rows, inverse = (samples[where] - self._start[samples[where]]).unique(return_inverse=True)
            out[where] = self.dataset.images(self.episodes[position], camera, rows)[inverse]
        return out


class EpochSampler:
    """Endless batches of sample numbers: every sample once an epoch, shuffled anew each epoch.

    A batch that reaches the end of an epoch goes on with the next one, so every batch has `batch_size` samples and none
    is dropped. The order depends on `seed` alone; `state_dict` continues it exactly.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples and batch_size must be at least 1, got {num_samples} and {batch_size}")
        self.num_samples, self.batch_size = num_samples, batch_size
        self.epoch = 0
        self._position = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_start = self._generator.get_state()
        self._order = torch.randperm(num_samples, generator=self._generator)

    def next(self) -> Tensor:
        """int64 [batch_size]."""
        parts, missing = [], self.batch_size
        while missing:
            if self._position == self.num_samples:
                self.epoch, self._position = self.epoch + 1, 0
                self._epoch_start = self._generator.get_state()
                self._order = torch.randperm(self.num_samples, generator=self._generator)
            part = self._order[self._position : self._position + missing]
            parts.append(part)
            self._position += len(part)
            missing -= len(part)
        return torch.cat(parts)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.next()

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_samples": self.num_samples,
            "epoch": self.epoch,
            "position": self._position,
            "generator": self._epoch_start.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError where that sampler had another number of samples."""
        if state["num_samples"] != self.num_samples:
            raise ValueError(
                f"this sampler state is of {state['num_samples']} samples, the dataset has {self.num_samples}; "
                "resume with the dataset that the run began with"
            )
        self.epoch, self._position = int(state["epoch"]), int(state["position"])
        self._epoch_start = state["generator"].clone()
        self._generator.set_state(self._epoch_start)
        self._order = torch.randperm(self.num_samples, generator=self._generator)
