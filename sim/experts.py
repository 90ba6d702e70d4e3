"""Scripted experts: follow a task's waypoints in closed loop, all environments at once, with optional clumsiness.

env = make_tabletop("reach", num_envs=16)
expert = ScriptedExpert(env, ExpertConfig(action_noise=0.2))
env.step(expert())                  # chunks of one step: the expert sees every step
env.step(expert.chunk(8))           # or eight actions planned from one look and executed blindly
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_rl.envs.perturbed import simulator_of
from vla_rl.envs.tabletop import TabletopEnv
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.sim.control import EeDeltaController
from vla_rl.sim.tasks.base import Plan
from vla_rl.sim.view import pick

_NOISE_STREAM = 0x0E
_ARRIVED = 0.01  # m


@dataclass(frozen=True)
class ExpertConfig:
    """Clumsiness of demonstrations; 0 is the expert at its best.

    `action_noise`: standard deviation added to every motion action of every step, in action units (1 is full speed).
    `target_bias`: standard deviation of an offset, m, drawn once an episode and added to all waypoints in x and y.
    `max_action`: largest action, in (0, 1]: how fast it moves.
    """

    action_noise: float = 0.0
    target_bias: float = 0.0
    max_action: float = 1.0

    def __post_init__(self) -> None:
        if self.action_noise < 0 or self.target_bias < 0 or not 0 < self.max_action <= 1:
            raise ValueError(f"ExpertConfig: noise and bias must be >= 0 and max_action in (0, 1], got {self}")


class ScriptedExpert:
    """Acts in `env` by its task's `plan`. The noise of an episode is drawn from the episode's seed, so a demonstration
    does not depend on the number of environments. Raises ValueError under joint control, which it does not speak."""

    def __init__(self, env: ChunkedEnv | TabletopEnv, config: ExpertConfig | None = None) -> None:
        inner = simulator_of(env.step_env) if isinstance(env, ChunkedEnv) else env
        if not isinstance(inner, TabletopEnv):
            raise TypeError(f"ScriptedExpert acts in tabletop environments, not in {type(inner).__name__}")
        env = inner
        if not isinstance(env.controller, EeDeltaController):
            raise ValueError(
                "ScriptedExpert: experts act in Cartesian deltas; make the environment with control='ee_delta'"
            )
        self.config = config or ExpertConfig()
        self._env = env
        self._control = env.controller.config
        self._motion = 4 if self._control.yaw else 3
        like = env.engine.qpos
        self._phase = torch.zeros(env.num_envs, dtype=torch.int64, device=env.engine.device)
        self._dwell = torch.zeros_like(self._phase)
        self._bias = like.new_zeros(env.num_envs, 3)
        self._noise = like.new_zeros(env.num_envs, env.max_episode_steps, self._motion)

    def __call__(self) -> Tensor:
        """A chunk of one action, float32 [N, 1, A] on the CPU: what the collector of demonstrations asks for."""
        return self.chunk(1)

    def act(self) -> Tensor:
        """Actions for the next control step, float32 [N, A] on the CPU."""
        return self._plan_chunk(1)[:, 0].float().cpu()

    def chunk(self, num_steps: int) -> Tensor:
        """Actions for the next `num_steps` control steps, float32 [N, K, A]: each is planned as if the fingertip had
        followed those before it exactly, towards the waypoint of the present phase. Phases only change between chunks,
        so tasks whose phases are short want short chunks."""
        return self._plan_chunk(num_steps).float().cpu()

    def _plan_chunk(self, num_steps: int) -> Tensor:
        env, control = self._env, self._control
        self._begin_new_episodes()
        plan = env.task.plan(env.view, env.variables)
        self._advance(pick(plan.done, self._phase) | self._arrived_beside(plan), plan)
        target = pick(plan.targets, self._phase) + self._bias
        opening = pick(plan.openings, self._phase)
        yaw = pick(plan.yaws, self._phase) if plan.yaws is not None else torch.zeros_like(opening)
        limit = self._speed_limit(plan)
        tip, tip_yaw = env.view.tip_pos.clone(), env.view.tip_yaw
        actions = []
        for i in range(num_steps):
            motion = (target - tip) / control.max_step
            motion = motion * (limit / torch.maximum(motion.abs().amax(dim=1, keepdim=True), limit))
            tip = tip + control.max_step * motion
            if control.yaw:
                turn = torch.remainder(yaw - tip_yaw + torch.pi, 2 * torch.pi) - torch.pi
                turn = torch.clamp(turn / control.max_turn, -1.0, 1.0)
                tip_yaw = tip_yaw + control.max_turn * turn
                motion = torch.cat([motion, turn[:, None]], dim=1)
            step = (env.episode_steps.to(tip.device) + i).clamp(max=self._noise.shape[1] - 1)
            motion = motion + pick(self._noise, step)
            actions.append(torch.cat([motion, opening[:, None]], dim=1).clamp(-1.0, 1.0))
        self._dwell += num_steps
        return torch.stack(actions, dim=1)

    def _speed_limit(self, plan: Plan) -> Tensor:
        """Largest motion action now, [N, 1]."""
        like = self._env.engine.qpos
        if plan.speeds is None:
            return like.new_full((len(self._phase), 1), self.config.max_action)
        return like.new_tensor(plan.speeds)[self._phase, None].clamp(max=self.config.max_action)

    def _arrived_beside(self, plan: Plan) -> Tensor:
        """bool [N]: a clumsy expert takes its own, shifted waypoint for the right one when it is there."""
        gap = pick(plan.targets, self._phase) + self._bias - self._env.view.tip_pos
        return (torch.linalg.vector_norm(gap, dim=1) < _ARRIVED) & (self._bias != 0).any(dim=1)

    def _advance(self, finished: Tensor, plan: Plan) -> None:
        """Go to the next phase where the present one is finished and has lasted long enough; to the first if lost."""
        if plan.dwell is not None:
            finished = finished & (self._dwell >= torch.tensor(plan.dwell, device=self._dwell.device)[self._phase])
        finished = finished & (self._phase < plan.done.shape[1] - 1)
        lost = pick(plan.lost, self._phase) if plan.lost is not None else torch.zeros_like(finished)
        self._phase = torch.where(lost, 0, self._phase + (finished & ~lost))
        self._dwell = torch.where(finished | lost, 0, self._dwell)

    def _begin_new_episodes(self) -> None:
        fresh = (self._env.episode_steps == 0).nonzero().flatten()
        self._phase[fresh] = 0
        self._dwell[fresh] = 0
        if self.config.action_noise == 0.0 and self.config.target_bias == 0.0:
            return
        for i in fresh.tolist():
            rng = np.random.default_rng([_NOISE_STREAM, int(self._env.seeds[i])])
            bias = self.config.target_bias * rng.standard_normal(2)
            self._bias[i, :2] = torch.from_numpy(bias).to(self._bias)
            noise = self.config.action_noise * rng.standard_normal(self._noise.shape[1:])
            self._noise[i] = torch.from_numpy(noise).to(self._noise)
