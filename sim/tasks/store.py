"""A long task of three sub-goals: open the named drawer, put the named block in it, close it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vla_rl.sim.language import BLOCK_NOUNS, DRAWER_NOUNS, OOD_BLOCK_NOUNS, OOD_DRAWER_NOUNS
from vla_rl.sim.scene import Asset, Block
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Plan, Region, TaskStatus, falling, register_task
from vla_rl.sim.tasks.drawer import (
    AT_HANDLE,
    CLUTTER_REGIONS,
    HALF_WIDTH,
    OPENED,
    SHUT,
    cabinet_poses,
    cabinets,
    pull_open,
    push_shut,
)
from vla_rl.sim.tasks.waypoints import JAW_STEPS, OPEN, Waypoint, at_height, grasp, gripped, make_plan, release, shifted
from vla_rl.sim.view import SceneView, pick

DRAWERS: tuple[str, ...] = ("drawer0", "drawer1")
BLOCKS: tuple[str, ...] = ("block0", "block1")
DISTRACTORS: tuple[str, ...] = ("distractor0",)
HALF = 0.02  # m, of a block's side
NUM_SUB_GOALS = 3

_SLOTS = (-0.17, 0.17)  # m, y of the cabinets: what opens leaves the middle free for blocks
_BLOCK_REGION = Region(x=(0.38, 0.54), y=(-0.015, 0.015))
_OOD_BLOCK_REGION = Region(x=(0.345, 0.545), y=(-0.028, 0.028), hole=_BLOCK_REGION)

TEMPLATES = (
    "open the {drawer_color} {drawer}, put the {block_color} {block} in it and close it",
    "put the {block_color} {block} away in the {drawer_color} {drawer} and close it",
    "store the {block_color} {block} in the {drawer_color} {drawer} and shut it",
    "open the {drawer_color} {drawer}, place the {block_color} {block} inside, then shut it",
)
OOD_TEMPLATES = (
    "the {block_color} {block} has to end up in the {drawer_color} {drawer}, shut",
    "tidy up: the {block_color} {block} goes into the {drawer_color} {drawer}",
    "hide the {block_color} {block} in the {drawer_color} {drawer}",
)


@register_task
class Store:
    """Success: the named block in the named drawer, and that closed. Failure: the other drawer open by half of
    `OPENED`, the other block in a drawer, or a block off the table. `sub_goal` counts what was reached: the drawer
    open, the block in it."""

    name = "store"
    max_episode_steps = 200
    stage_names = ("handle reached", "drawer open", "block grasped", "block in the drawer", "shut")
    clutter_regions = CLUTTER_REGIONS
    goal_names = ("handle_x", "handle_y", "handle_z", "opening", "block_x", "block_y", "block_z", "sub_goal")

    def assets(self) -> Sequence[Asset]:
        return [*cabinets(DRAWERS, DISTRACTORS), *(Block(name, half=HALF) for name in BLOCKS)]

    def sample(self, draw: Draw) -> EpisodeStart:
        drawer, block = draw.choice(len(DRAWERS)), draw.choice(len(BLOCKS))
        names = list(colors := draw.colors(len(DRAWERS) + len(BLOCKS)))
        sentence = draw.sentence(
            TEMPLATES,
            OOD_TEMPLATES,
            drawer_color=names[drawer],
            block_color=names[len(DRAWERS) + block],
            drawer=draw.select("sentences", DRAWER_NOUNS, OOD_DRAWER_NOUNS),
            block=draw.select("sentences", BLOCK_NOUNS, OOD_BLOCK_NOUNS),
        )
        region = draw.select("positions", _BLOCK_REGION, _OOD_BLOCK_REGION)
        return EpisodeStart(
            poses=cabinet_poses(draw, DRAWERS, _SLOTS, DISTRACTORS)
            | draw.place(BLOCKS, min_distance=0.09, yaw=0.2, region=region),
            instruction=sentence,
            variables={"drawer": drawer, "block": block, "sub_goal": 0},
            colors=dict(zip((*DRAWERS, *BLOCKS), colors.values(), strict=True))
            | dict(zip(DISTRACTORS, draw.distractor_colors(len(DISTRACTORS)).values(), strict=True)),
        )

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        openings, inside = _openings(view), _inside(view)
        opening = pick(openings, variables["drawer"])
        stored = pick(pick(inside, variables["block"]), variables["drawer"])
        success = stored & (opening < SHUT)
        misplaced = inside.flatten(1).sum(dim=1) > stored.long()
        wrong_drawer = (openings > OPENED / 2).sum(dim=1) > (opening > OPENED / 2).long()
        fallen = (view.object_positions(BLOCKS)[..., 2] < -0.03).any(dim=1)
        failure = misplaced | wrong_drawer | fallen
        sub_goal = torch.where(opening > OPENED, variables["sub_goal"].clamp(min=1), variables["sub_goal"])
        sub_goal = torch.where(stored & (sub_goal > 0), 2, sub_goal)
        sub_goal = torch.where(success, NUM_SUB_GOALS, sub_goal)
        handle, block = _handle(view, variables), pick(view.object_positions(BLOCKS), variables["block"])
        reach, grip = (torch.linalg.vector_norm(view.tip_pos - goal, dim=1) for goal in (handle, block))
        away = torch.linalg.vector_norm(block - _middle(view, variables), dim=1)
        progress = (sub_goal + _next_progress(sub_goal, reach, grip, away, opening)) / NUM_SUB_GOALS
        opened, won = sub_goal > 0, success & ~failure
        stages = [reach < AT_HANDLE, opened, opened & gripped(view, grip, HALF)[1], sub_goal > 1, won]
        return TaskStatus(won, failure, progress, {"sub_goal": sub_goal}, torch.stack(stages, dim=1))

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        block = pick(view.object_positions(BLOCKS), variables["block"])
        opening = pick(_openings(view), variables["drawer"])[:, None]
        return torch.cat([_handle(view, variables), opening, block, variables["sub_goal"][:, None]], dim=1)

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        handle, tip = _handle(view, variables), view.tip_pos
        block = pick(view.object_positions(BLOCKS), variables["block"])
        opening = pick(_openings(view), variables["drawer"])
        *approach, pull = pull_open(view, handle)
        opened = Waypoint(pull.target, pull.opening, done=opening > OPENED + 0.012, lost=pull.lost, speed=pull.speed)
        let_go = Waypoint(tip, OPEN, done=torch.ones_like(opening, dtype=torch.bool), dwell=JAW_STEPS)
        leave = Waypoint(at_height(tip, 0.15), OPEN, done=tip[:, 2] > 0.13)
        store = [*grasp(view, shifted(block, z=0.009)), *release(view, block, _middle(view, variables), drop=0.05)]
        return make_plan(view, [*approach, opened, let_go, leave, *store, *push_shut(view, handle)])


def _next_progress(sub_goal: Tensor, reach: Tensor, grip: Tensor, away: Tensor, opening: Tensor) -> Tensor:
    """How far the environments are on the way to their next sub-goal, [N], from 0 to below 1: fingertip to handle
    (`reach`), fingertip to block (`grip`), block to its place in the drawer (`away`), m."""
    share = (opening / OPENED).clamp(0.0, 1.0)
    ways = [
        0.4 * falling(reach, 0.2) + 0.6 * share,
        0.4 * falling(grip, 0.2) + 0.6 * falling(away, 0.2),
        0.3 * falling(reach, 0.2) + 0.7 * (1.0 - share),
        torch.zeros_like(opening),
    ]
    return 0.95 * pick(torch.stack(ways, dim=1), sub_goal.long())


def _openings(view: SceneView) -> Tensor:
    return torch.stack([view.joint_position(name) for name in DRAWERS], dim=1)


def _handle(view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
    return pick(torch.stack([view.site_pos(f"{name}/handle") for name in DRAWERS], dim=1), variables["drawer"])


def _middle(view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
    """The middle, [N, 3] m, of the part of the named drawer's tray that lies open before its cabinet."""
    cabinet = pick(view.object_positions(DRAWERS), variables["drawer"])
    opening = pick(_openings(view), variables["drawer"])
    return torch.stack([cabinet[:, 0] - 0.0655 - opening / 2, cabinet[:, 1], cabinet[:, 2]], dim=1)


def _inside(view: SceneView) -> Tensor:
    """bool [N, blocks, drawers]: the block lies on the drawer's tray."""
    offset = view.object_positions(BLOCKS)[:, :, None] - view.object_positions(DRAWERS)[:, None]
    along = offset[..., 0] + _openings(view)[:, None]
    on_tray = (along.abs() < 0.061) & (offset[..., 1].abs() < HALF_WIDTH - 0.013)
    return on_tray & (offset[..., 2] < 0.015 + HALF + 0.012)
