"""The scripted expert of a simulator's host module (`HostedEnv.expert_action`), with noise that its episode decides.

Nothing of the simulator is here: what robosuite, LIBERO, Metaworld and ManiSkill demonstrate is in `hosts/`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_rl.envs.expert_noise import add_noise
from vla_rl.envs.perturbed import simulator_of
from vla_rl.envs.remote import RemoteStepEnv
from vla_rl.envs.vector import ChunkedEnv


@dataclass(frozen=True)
class RemoteExpertConfig:
    """`action_noise`: see `add_noise`."""

    action_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.action_noise < 0:
            raise ValueError(f"RemoteExpertConfig: action_noise must not be negative, got {self.action_noise}")


class RemoteExpert:
    """Acts in `env` as the simulator's own expert, with the noise of `add_noise`.

    Raises TypeError for an environment that is not a simulator of `envs/remote.py`.
    """

    def __init__(self, env: ChunkedEnv, config: RemoteExpertConfig) -> None:
        inner = simulator_of(env.step_env)
        if not isinstance(inner, RemoteStepEnv):
            raise TypeError(
                f"{env.spec.name} has no host process to ask for an expert's action; "
                "recipes of other environments want their own: --demos.expert"
            )
        self._env, self._remote, self._config = env, inner, config

    def __call__(self) -> Tensor:
        """Actions [N, 1, A], zero where an episode has ended."""
        running = (~self._env.ended).nonzero().flatten()
        actions = torch.zeros(self._env.num_envs, 1, self._env.spec.action.dim)
        if len(running):
            actions[running, 0] = self._remote.expert_actions(running)
        return add_noise(actions, self._env, self._config.action_noise)
