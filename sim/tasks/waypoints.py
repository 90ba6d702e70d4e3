"""Building blocks of the experts' plans: waypoints, a grasp, and a release over a goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_rl.sim.tasks.base import Plan
from vla_rl.sim.view import SceneView

OPEN, CLOSED = 1.0, -1.0
CARRY = 0.6  # speed with a block between the jaws: a jerk makes it slip
BETWEEN = 0.03  # m from the fingertip to the centre of a block that is between the jaws
LIFTED = 0.02  # m that a block is above where it lay, for it to count as lifted
JAW_STEPS = 5  # control steps that the jaws need to close on a block, or to let go of it


@dataclass(frozen=True)
class Waypoint:
    """One phase of a plan. `target [N, 3]` m: where the fingertip goes, with the jaws at `opening`.

    `done`: bool [N]; None: the fingertip is within `tolerance` m of the target. `dwell`: least control steps.
    `lost`: bool [N], start over; None: never. `speed`: the largest action, in (0, 1].
    """

    target: Tensor
    opening: float
    done: Tensor | None = None
    tolerance: float = 0.01
    dwell: int = 0
    lost: Tensor | None = None
    speed: float = 1.0


def make_plan(view: SceneView, waypoints: Sequence[Waypoint]) -> Plan:
    """The plan that follows `waypoints` in order."""
    tip, never = view.tip_pos, torch.zeros(view.num_envs, dtype=torch.bool, device=view.device)
    targets = torch.stack([w.target for w in waypoints], dim=1)
    openings = targets.new_tensor([w.opening for w in waypoints]).expand(view.num_envs, -1)
    done = [
        torch.linalg.vector_norm(tip - w.target, dim=1) < w.tolerance if w.done is None else w.done for w in waypoints
    ]
    lost = torch.stack([never if w.lost is None else w.lost for w in waypoints], dim=1)
    return Plan(
        targets,
        openings,
        torch.stack(done, dim=1),
        dwell=[w.dwell for w in waypoints],
        lost=lost,
        speeds=[w.speed for w in waypoints],
    )


def shifted(position: Tensor, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Tensor:
    """`position [N, 3]` moved by (x, y, z) m."""
    return position + position.new_tensor([x, y, z])


def at_height(position: Tensor, z: float) -> Tensor:
    """`position [N, 3]` with its height replaced by `z` m."""
    return torch.cat([position[:, :2], torch.full_like(position[:, :1], z)], dim=1)


def over(view: SceneView, position: Tensor, tolerance: float = 0.01) -> Tensor:
    """bool [N]: the fingertip is within `tolerance` m of `position [N, 3]`, seen from above."""
    return torch.linalg.vector_norm((view.tip_pos - position)[:, :2], dim=1) < tolerance


def grasped(view: SceneView, block: Tensor) -> Tensor:
    """bool [N]: the centre of a block, `block [N, 3]`, is between the fingertips."""
    return torch.linalg.vector_norm(view.tip_pos - block, dim=1) < BETWEEN


def gripped(view: SceneView, reach: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """Two stages of a task, bool [N] each: the centre of a block of side `2 * half` m is between the fingertips, and
    the jaws are closed on it, turned as it may be. `reach [N]` m: from the fingertip to that centre."""
    between = reach < BETWEEN
    return between, between & (view.gripper_opening < 2.8 * half)


def grasp(view: SceneView, block: Tensor, *, hover: float = 0.09, lift: float = 0.14) -> list[Waypoint]:
    """Go above a block (`block [N, 3]` its centre), down around it, close the jaws, and lift the fingertip to z =
    `lift` m. Four phases."""
    above, tip = shifted(block, z=hover), view.tip_pos
    raised = at_height(tip, lift)
    gone = ~grasped(view, block)
    return [
        Waypoint(above, OPEN, done=over(view, above)),
        Waypoint(block, OPEN, tolerance=0.008),
        Waypoint(tip, CLOSED, done=~gone, dwell=JAW_STEPS, lost=gone),
        Waypoint(raised, CLOSED, done=tip[:, 2] > lift - 0.01, lost=gone, speed=CARRY),
    ]


def release(view: SceneView, block: Tensor, goal: Tensor, *, drop: float, travel: float = 0.14) -> list[Waypoint]:
    """Carry a grasped block over `goal [N, 3]` at fingertip height `travel` m, lower its centre to `drop` m above the
    goal, open the jaws and go up. Four phases. The block's place between the jaws is taken into account."""
    carried = goal + (view.tip_pos - block)
    above, low = at_height(carried, travel), shifted(carried, z=drop)
    gone = ~grasped(view, block)
    return [
        Waypoint(above, CLOSED, done=over(view, above, 0.006), lost=gone, speed=CARRY),
        Waypoint(low, CLOSED, tolerance=0.006, lost=gone, speed=CARRY),
        Waypoint(view.tip_pos, OPEN, done=torch.ones_like(gone), dwell=JAW_STEPS),
        Waypoint(at_height(view.tip_pos, travel), OPEN, done=view.tip_pos[:, 2] > travel - 0.02),
    ]


__all__ = [
    "BETWEEN", "CARRY", "CLOSED", "JAW_STEPS", "LIFTED", "OPEN", "Waypoint", "at_height", "grasp", "grasped", "gripped",
    "make_plan", "over", "release", "shifted",
]  # fmt: skip
