"""Two-way reach: a point goes around an obstacle, left or right, to a goal. The smallest task with multimodal demos.

The point starts below, the goal lies above, a disc in between. A step of action a moves it by 0.12 a. Success is being
within 0.08 of the goal; touching the disc or leaving the box fails. Demonstrations go around either side, so a policy
that averages them runs into the disc. Vectorised in torch, no simulator: thousands of decisions a second on one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import ActionSpec, EnvSpec, Observation
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.protocols import StepOutcome

STEP_LENGTH = 0.12
DISC_RADIUS = 0.4
GOAL_RADIUS = 0.08
MAX_EPISODE_STEPS = 32
CHUNK = 4
_INSTRUCTION = "go around the disc to the goal"
_PICTURE = 64


class TwoWayReachEnv:
    """A `StepEnv`. State [N, 5]: position x, y, goal x, y, and the used share of the episode's time.

    The deadline is a part of the task, and the state shows it: reaching it terminates as a failure. (A limit that the
    policy could not see would be a truncation.)
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.spec = EnvSpec(
            name="two_way_reach",
            cameras={},
            state_names=("x", "y", "goal_x", "goal_y", "time"),
            action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0), names=("dx", "dy")),
            max_episode_steps=MAX_EPISODE_STEPS,
            control_hz=20.0,
        )
        self._position = torch.zeros(num_envs, 2)
        self._goal = torch.zeros(num_envs, 2)
        self._steps = torch.zeros(num_envs, dtype=torch.int64)

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        """Start x in +-0.25 at y = -0.9, goal x in +-0.6 at y = 0.85."""
        draws = np.array([np.random.default_rng(int(s)).uniform(-1.0, 1.0, 2) for s in seeds], dtype=np.float32)
        draws = torch.from_numpy(draws.reshape(-1, 2))
        self._position[env_ids] = torch.stack([0.25 * draws[:, 0], torch.full_like(draws[:, 0], -0.9)], dim=1)
        self._goal[env_ids] = torch.stack([0.6 * draws[:, 1], torch.full_like(draws[:, 1], 0.85)], dim=1)
        self._steps[env_ids] = 0

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        move = STEP_LENGTH * self.spec.action.clamp(actions)
        self._position = torch.where(active[:, None], self._position + move, self._position)
        self._steps = self._steps + active
        at_goal = (self._position - self._goal).norm(dim=1) < GOAL_RADIUS
        hit = (self._position.norm(dim=1) < DISC_RADIUS) | (self._position.abs() > 1.0).any(dim=1)
        success = at_goal & ~hit
        late = self._steps >= MAX_EPISODE_STEPS
        return StepOutcome(
            reward=success.float(),
            terminated=success | hit | late,
            truncated=torch.zeros_like(success),
            success=success,
        )

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        """`images` makes no difference: the task has no camera."""
        del images
        time = self._steps[env_ids, None].float() / MAX_EPISODE_STEPS
        state = torch.cat([self._position[env_ids], self._goal[env_ids], time], dim=1)
        return Observation({}, state, (_INSTRUCTION,) * len(env_ids))

    def render(self, env_ids: Tensor) -> Tensor:
        """uint8 [M, 64, 64, 3]: disc grey, goal green, point red; y points up."""
        axis = torch.linspace(-1.0, 1.0, _PICTURE)
        pixel = torch.stack(torch.meshgrid(-axis, axis, indexing="ij")[::-1], dim=-1)
        picture = torch.full((len(env_ids), _PICTURE, _PICTURE, 3), 255, dtype=torch.uint8)
        disc = torch.zeros(len(env_ids), 2)
        for centre, radius, colour in (
            (disc, DISC_RADIUS, (150, 150, 150)),
            (self._goal[env_ids], GOAL_RADIUS, (40, 160, 60)),
            (self._position[env_ids], 0.05, (200, 40, 40)),
        ):
            inside = (pixel - centre[:, None, None]).norm(dim=-1) < radius
            picture[inside] = torch.tensor(colour, dtype=torch.uint8)
        return picture

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position.clone(), "goal": self._goal.clone(), "steps": self._steps.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._position, self._goal = state["position"].clone(), state["goal"].clone()
        self._steps = state["steps"].clone()

    def close(self) -> None:
        """Nothing to close."""


def make_two_way_reach(num_envs: int, *, auto_reset: bool = True) -> ChunkedEnv:
    return ChunkedEnv(TwoWayReachEnv(num_envs), auto_reset=auto_reset)


def _expert(state: Tensor, side: Tensor, passed: Tensor) -> Tensor:
    """Full speed to the waypoint beside the disc, then to the goal. `side`: +-1 [N]. `passed`: bool [N]."""
    waypoint = torch.stack([0.62 * side, torch.zeros_like(side)], dim=1)
    target = torch.where(passed[:, None], state[:, 2:4], waypoint)
    delta = (target - state[:, :2]) / STEP_LENGTH
    return delta / delta.norm(dim=1, keepdim=True).clamp(min=1.0)


def scripted_demos(num_demos: int, seed: int, action_noise: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy demonstrations around either side with equal chance; attempts that fail are dropped.

    Returns `state` [D, 5], `actions` [D, 4, 2] and `mask` bool [D, 4] (False at padded steps), one row a decision.
    Raises RuntimeError where fewer than `num_demos` of the attempts succeed.
    """
    num_attempts = 4 * num_demos + 8
    rng = torch.Generator().manual_seed(seed)
    env = TwoWayReachEnv(num_attempts)
    ids = torch.arange(num_attempts)
    env.reset(ids, torch.randint(2**62, (num_attempts,), generator=rng))
    side = torch.randint(2, (num_attempts,), generator=rng).float() * 2.0 - 1.0
    passed = torch.zeros(num_attempts, dtype=torch.bool)
    active = torch.ones(num_attempts, dtype=torch.bool)
    succeeded = torch.zeros(num_attempts, dtype=torch.bool)
    states, actions, executed = [], [], []
    for _ in range(MAX_EPISODE_STEPS):
        state = env.observe(ids, False).state
        passed = passed | (state[:, 1] > -STEP_LENGTH)
        noise = action_noise * torch.randn(num_attempts, 2, generator=rng)
        action = env.spec.action.clamp(_expert(state, side, passed) + noise)
        outcome = env.step(action, active)
        states.append(state)
        actions.append(action)
        executed.append(active)
        succeeded = succeeded | (active & outcome.success)
        active = active & ~outcome.terminated
    succeeded = succeeded.nonzero().flatten()[:num_demos]
    if len(succeeded) < num_demos:
        raise RuntimeError(
            f"{len(succeeded)} of {num_attempts} attempts succeeded, needed {num_demos}; lower the noise"
        )
    chunks = torch.stack(actions, dim=1)[succeeded].unflatten(1, (-1, CHUNK)).flatten(0, 1)
    mask = torch.stack(executed, dim=1)[succeeded].unflatten(1, (-1, CHUNK)).flatten(0, 1)
    starts = torch.stack(states[::CHUNK], dim=1)[succeeded].flatten(0, 1)
    real = mask[:, 0]
    return starts[real], chunks[real], mask[real]
