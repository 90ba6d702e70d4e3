"""Demonstrations, and other stored episodes, as what a process reward learns from."""

from __future__ import annotations

from typing import Any

import torch

from vla_rl.core import Observation
from vla_rl.data.lerobot_format import ACTION, DatasetError
from vla_rl.data.lerobot_reader import Episode, LeRobotDataset
from vla_rl.onpolicy.process_reward import ProgressLabels, gripper_milestones, segment_progress


@torch.no_grad()
def label_demos(dataset: LeRobotDataset, policy: Any, *, stride: int, batch_size: int = 64) -> ProgressLabels:
    """Features of `policy` at every `stride`-th frame, and the progress there.

    The gripper's changes divide an episode into segments where an action's name has "gripper" in it; else the way is
    even. An episode whose dataset says that it failed has progress 0. Raises DatasetError where there is no episode.
    """
    if not dataset.num_episodes:
        raise DatasetError(f"{dataset.path}: no episode to learn progress from; record demonstrations first")
    names = dataset.features[ACTION].get("names") or []
    grippers = [i for i, name in enumerate(names) if "gripper" in str(name)]
    cameras = tuple(getattr(policy.config, "cameras", ()))
    parts = []
    for index in range(dataset.num_episodes):
        episode = dataset.episode(index, cameras=cameras)
        failed = episode.success is not None and not bool(episode.success.any())
        milestones = sorted({t for i in grippers for t in gripper_milestones(episode.action[:, i])})
        progress = segment_progress(len(episode), milestones) * float(not failed)
        for frames in torch.arange(0, len(episode), stride).split(batch_size):
            features = policy.encode(policy.preprocess(_observation(episode, frames))).pooled
            parts.append(ProgressLabels(features, progress[frames].to(features)))
    return ProgressLabels.concatenate(parts)


def _observation(episode: Episode, frames: torch.Tensor) -> Observation:
    images = {camera: pictures[frames] for camera, pictures in episode.images.items()}
    return Observation(images, episode.state[frames], (episode.instruction,) * len(frames))


__all__ = ["label_demos"]
