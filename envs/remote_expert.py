"""The scripted expert of a simulator's host module (`HostedEnv.expert_action`), with noise that its episode decides.

Nothing of the simulator is here: what robosuite, LIBERO, Metaworld and ManiSkill demonstrate is in `hosts/`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_rl.envs.remote import RemoteStepEnv
from vla_rl.envs.vector import ChunkedEnv


@dataclass(frozen=True)
class RemoteExpertConfig:
    """`action_noise`: standard deviation added to every action of every step, as a share of half the action's range;
    none is added to actions whose name has "gripper" in it."""

    action_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.action_noise < 0:
            raise ValueError(f"RemoteExpertConfig: action_noise must not be negative, got {self.action_noise}")


class RemoteExpert:
    """Acts in `env` as the simulator's own expert; the noise of a step follows from the episode's seed and the step.

    Raises TypeError for an environment that is not a simulator of `envs/remote.py`.
    """

    def __init__(self, env: ChunkedEnv, config: RemoteExpertConfig) -> None:
        if not isinstance(env.step_env, RemoteStepEnv):
            raise TypeError(
                f"{env.spec.name} has no host process to ask for an expert's action; "
                "recipes of other environments want their own: --demos.expert"
            )
        self._env, self._remote, self._config = env, env.step_env, config
        action = env.spec.action
        half = (np.array(action.high) - np.array(action.low)) / 2
        is_gripper = np.array(["gripper" in name for name in action.names])
        self._scale = config.action_noise * np.where(is_gripper, 0.0, half)

    def __call__(self) -> Tensor:
        """Actions [N, 1, A], zero where an episode has ended."""
        running = (~self._env.ended).nonzero().flatten()
        actions = torch.zeros(self._env.num_envs, 1, self._env.spec.action.dim)
        if len(running):
            actions[running, 0] = self._remote.expert_actions(running)
        if self._config.action_noise:
            steps, seeds = self._env.episode_steps.tolist(), self._env.episode_seeds
            for i in running.tolist():
                noise = np.random.default_rng([seeds[i], steps[i]]).standard_normal(len(self._scale))
                actions[i, 0] += torch.from_numpy(self._scale * noise).float()
        return actions
