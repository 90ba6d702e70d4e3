"""Noise on the actions of experts that see an environment's state, so that demonstrations cover more than one path."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vla_rl.envs.vector import ChunkedEnv


def add_noise(actions: Tensor, env: ChunkedEnv, share: float) -> Tensor:
    """`actions` float32 [N, 1, A], changed in place: normal noise on those of running episodes.

    Its standard deviation is `share` of half an action's range, and 0 where the action's name has "gripper" in it. The
    noise of a step follows from the episode's seed and the step.
    """
    if not share:
        return actions
    action = env.spec.action
    half = (np.array(action.high) - np.array(action.low)) / 2
    scale = share * np.where(["gripper" in name for name in action.names], 0.0, half)
    steps, seeds = env.episode_steps.tolist(), env.episode_seeds
    for i in (~env.ended).nonzero().flatten().tolist():
        draw = np.random.default_rng([seeds[i], steps[i]]).standard_normal(action.dim)
        actions[i, 0] += torch.from_numpy(scale * draw).float()
    return actions
