"""The types that everything in vla-rl speaks. Read this file first.

Shape legend, used across the project:

    N  environments, or samples of a batch
    H  action_horizon: steps that a policy predicts
    K  execution_horizon: steps that an environment executes (K <= H)
    A  action dimension
    S  state dimension
    h, w  image height and width in pixels

The chunk is the unit: a policy returns an action chunk, an environment executes a chunk, a transition is a chunk.
All arrays are torch tensors on the device of whoever made them; on a CPU they share memory with numpy at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


def _rows(name: str, tensor: Tensor, n: int) -> None:
    if tensor.shape[0] != n:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, expected {n} (one a row of the batch)")


# ---------------------------------------------------------------------------------------------------- specifications
@dataclass(frozen=True)
class CameraSpec:
    """Size of one camera's picture, in pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class ActionSpec:
    """Bounds and names of one control step's action, in the environment's units.

    `low` and `high` have length A. The environment clamps to them; nobody else does.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.low) == len(self.high) == len(self.names):
            raise ValueError(
                f"ActionSpec: low, high and names must have one length, got "
                f"{len(self.low)}, {len(self.high)}, {len(self.names)}"
            )
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not low < high:
                raise ValueError(f"ActionSpec: {name} has low {low} >= high {high}")

    @property
    def dim(self) -> int:
        return len(self.names)

    def clamp(self, actions: Tensor) -> Tensor:
        """Clamp `actions [..., A]` to the bounds."""
        low = torch.as_tensor(self.low, dtype=actions.dtype, device=actions.device)
        high = torch.as_tensor(self.high, dtype=actions.dtype, device=actions.device)
        return torch.minimum(torch.maximum(actions, low), high)


@dataclass(frozen=True)
class EnvSpec:
    """What a policy and a report must know about an environment.

    `max_episode_steps` counts control steps; reaching it truncates the episode. None: the environment never truncates
    by time on its own. `control_hz` is the rate of control steps in simulated (or real) time.
    """

    name: str
    cameras: Mapping[str, CameraSpec]
    state_names: tuple[str, ...]
    action: ActionSpec
    max_episode_steps: int | None
    control_hz: float

    @property
    def state_dim(self) -> int:
        return len(self.state_names)


# ------------------------------------------------------------------------------------------------------ observations
@dataclass(frozen=True)
class Observation:
    """A batch of observations at a decision point. Tokenising, resizing and normalising belong to the policy.

    `images`: camera name -> uint8 [N, h, w, 3]; empty where nobody asked for pictures.
    `state`: float32 [N, S], SI units.
    `instruction`: N sentences.
    """

    images: Mapping[str, Tensor]
    state: Tensor
    instruction: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.state.ndim != 2 or self.state.dtype != torch.float32:
            raise ValueError(
                f"Observation.state must be float32 [N, S], got {self.state.dtype} {tuple(self.state.shape)}"
            )
        n = self.state.shape[0]
        if len(self.instruction) != n:
            raise ValueError(f"Observation.instruction has {len(self.instruction)} sentences, expected {n}")
        for camera, image in self.images.items():
            if image.ndim != 4 or image.shape[-1] != 3 or image.dtype != torch.uint8:
                raise ValueError(
                    f"Observation.images[{camera!r}] must be uint8 [N, h, w, 3], got {image.dtype} {tuple(image.shape)}"
                )
            _rows(f"Observation.images[{camera!r}]", image, n)

    def __len__(self) -> int:
        return self.state.shape[0]

    def select(self, rows: Tensor) -> Observation:
        """The observations at `rows`: int64 [M] indices or a bool [N] mask."""
        indices = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return Observation(
            images={camera: image[indices] for camera, image in self.images.items()},
            state=self.state[indices],
            instruction=tuple(self.instruction[i] for i in indices.tolist()),
        )

    def with_rows(self, rows: Tensor, other: Observation) -> Observation:
        """A copy in which row `rows[j]` (int64 [M]) is `other`'s row j. Cameras that `other` lacks become black."""
        images = {}
        for camera, image in self.images.items():
            images[camera] = image.clone()
            images[camera][rows] = other.images.get(camera, 0)
        state = self.state.clone()
        state[rows] = other.state
        instruction = list(self.instruction)
        for j, i in enumerate(rows.tolist()):
            instruction[i] = other.instruction[j]
        return Observation(images, state, tuple(instruction))

    @staticmethod
    def concatenate(parts: Sequence[Observation]) -> Observation:
        """Rows of all `parts`, in order. Raises ValueError where the cameras differ."""
        cameras = list(parts[0].images)
        for part in parts:
            if list(part.images) != cameras:
                raise ValueError(f"cannot concatenate observations with cameras {cameras} and {list(part.images)}")
        return Observation(
            images={c: torch.cat([p.images[c] for p in parts]) for c in cameras},
            state=torch.cat([p.state for p in parts]),
            instruction=tuple(sentence for p in parts for sentence in p.instruction),
        )


# ------------------------------------------------------------------------------------------------------------ actions
class ChunkTrace(Protocol):
    """What an algorithm needs to score an action chunk again: for a flow policy the denoising chain."""

    log_prob: Tensor

    def select(self, rows: Tensor) -> ChunkTrace: ...


@dataclass(frozen=True)
class ActionChunk:
    """A policy's answer at a decision point.

    `actions`: float32 [N, H, A] in the environment's units, not clamped: the environment clamps, so that a trace's
    log-probability stays that of the sample.
    `policy_version`: how many updates the policy had seen.
    """

    actions: Tensor
    policy_version: int = 0
    trace: ChunkTrace | None = None

    def __post_init__(self) -> None:
        if self.actions.ndim != 3:
            raise ValueError(f"ActionChunk.actions must be [N, H, A], got {tuple(self.actions.shape)}")

    def __len__(self) -> int:
        return self.actions.shape[0]


# -------------------------------------------------------------------------------------------------- what comes back
class Source(IntEnum):
    """Who chose the executed action."""

    DEMO = 0
    POLICY = 1
    HUMAN = 2


class Taken(NamedTuple):
    """What was executed where a person can take over, and by whom.

    `actions`: float32 [N, A] of a control step, [N, K, A] of a chunk, in the environment's units. `source`: int8 [N],
    [N, K], a `Source`."""

    actions: Tensor
    source: Tensor


@dataclass(frozen=True)
class ChunkStep:
    """What an environment returns for one executed chunk of K control steps.

    `obs`: for the next decision. With auto-reset, an environment whose episode ended shows its new episode here.
    `final_obs`: observations at the very step of the end, one row for each of `final_ids`; None where no episode ended.
    `final_ids`: int64 [M], the environments whose episode ended in this chunk.
    `rewards`: float32 [N, K], zero where not executed.
    `executed`: bool [N, K]; False after the end of an episode. A person's steps are executed: see `taken`.
    `terminated`, `truncated`: bool [N]; both can be set at once, and then the episode counts as terminated.
    `success`: bool [N], the task's predicate held at an executed step of this chunk.
    `success_at_end`: bool [N], it held at the last executed step.
    `end_step`: int64 [N], the step inside the chunk at which the episode ended, -1 where it goes on.
    `lost`: bool [N], the episode ended because its simulator died in this chunk. The chunk counts as not executed, and
    `final_obs` is what the decision saw: `truncated`, with nothing to learn from. Such an episode counts apart.
    `frames`: environment id -> uint8 [k, h, w, 3], one frame an executed step, for the environments that were recorded.
    `taken`: what was executed in place of the actions that were asked for; None where no person can take over.
    """

    obs: Observation
    final_obs: Observation | None
    final_ids: Tensor
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    success_at_end: Tensor
    end_step: Tensor
    lost: Tensor
    frames: Mapping[int, Tensor] = field(default_factory=dict)
    taken: Taken | None = None

    @property
    def ended(self) -> Tensor:
        """bool [N]."""
        return self.terminated | self.truncated

    @property
    def next_obs(self) -> Observation:
        """The true successor of the decision: the frame at the end of an episode, never the frame after a reset."""
        if self.final_obs is None:
            return self.obs
        return self.obs.with_rows(self.final_ids, self.final_obs)


@dataclass(frozen=True)
class ChunkTransition:
    """One decision and what came of it. Raw per-step rewards are stored; discounting happens when it is used.

    Every target in the project is `reward(gamma) + discount(gamma) * V(next_obs)`.

    `actions`: float32 [N, K, A] as executed. `executed`: bool [N, K]. `rewards`: float32 [N, K].
    `terminated`, `truncated`: bool [N]. `source`: int64 [N], values of `Source`.
    """

    obs: Observation
    actions: Tensor
    executed: Tensor
    rewards: Tensor
    next_obs: Observation
    terminated: Tensor
    truncated: Tensor
    source: Tensor

    def reward(self, gamma: float) -> Tensor:
        """[N]: see `chunk_reward`."""
        return chunk_reward(self.rewards, self.executed, gamma)

    def discount(self, gamma: float) -> Tensor:
        """[N]: see `chunk_discount`."""
        return chunk_discount(self.executed, self.terminated, gamma)


def chunk_reward(rewards: Tensor, executed: Tensor, gamma: float) -> Tensor:
    """Discounted sum over executed steps: `sum_i gamma^i r_i`, float32 [N] from `rewards [N, K]`, `executed [N, K]`.

    The power counts executed steps only, so that a gap (a human's takeover) costs no time of the policy's clock.
    """
    steps = executed.to(torch.int64)
    exponent = steps.cumsum(dim=1) - steps
    weight = torch.where(executed, torch.pow(gamma, exponent.double()).to(rewards), 0.0)
    return (rewards * weight).sum(dim=1)


def chunk_discount(executed: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """`gamma^k * (1 - terminated)` with k the executed steps, float32 [N]. A truncation does not stop the bootstrap."""
    k = executed.sum(dim=1)
    gamma_k = torch.pow(gamma, k.double()).to(torch.float32)
    return torch.where(terminated, torch.zeros_like(gamma_k), gamma_k)


__all__ = [
    "ActionChunk",
    "ActionSpec",
    "CameraSpec",
    "ChunkStep",
    "ChunkTrace",
    "ChunkTransition",
    "EnvSpec",
    "Observation",
    "Source",
    "Taken",
    "chunk_discount",
    "chunk_reward",
]
