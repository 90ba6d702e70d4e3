"""Open, or close, the named drawer of three cabinets of different colours; grey objects stand on two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vla_rl.sim.language import DRAWER_NOUNS, OOD_DRAWER_NOUNS
from vla_rl.sim.scene import Asset, Block, Drawer
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Plan, Pose, Region, TaskStatus, falling, register_task
from vla_rl.sim.tasks.waypoints import CLOSED, JAW_STEPS, OPEN, Waypoint, make_plan, over, shifted
from vla_rl.sim.view import SceneView, pick

DRAWERS: tuple[str, ...] = ("drawer0", "drawer1", "drawer2")
DISTRACTORS: tuple[str, ...] = ("distractor0", "distractor1")
HALF_WIDTH = 0.06  # m
_TOP = 0.108  # m, z of a distractor that stands on a cabinet
OPENED, SHUT = 0.09, 0.012  # m: a drawer counts as open beyond the one, as closed within the other
AT_HANDLE = 0.05  # m from the fingertip to a handle that it is about to move
_SLOTS = (-0.17, 0.0, 0.17)  # m, y of the cabinets
# Where more objects than the task's may stand: nearer to the robot than an open drawer's tray, and below its handle.
CLUTTER_REGIONS = (Region(x=(0.335, 0.38), y=(-0.22, 0.0)), Region(x=(0.335, 0.38), y=(0.0, 0.22)))
_REGION = Region(x=(0.60, 0.63), y=(-0.015, 0.015))
_OOD_REGION = Region(x=(0.575, 0.65), y=(-0.024, 0.024), hole=_REGION)

OPEN_TEMPLATES = (
    "open the {color} {noun}",
    "pull the {color} {noun} open",
    "pull out the {color} {noun}",
    "slide the {color} {noun} open",
)
OOD_OPEN_TEMPLATES = (
    "the {color} {noun} should be open",
    "i need something out of the {color} {noun}",
    "get the {color} {noun} opened",
)
CLOSE_TEMPLATES = (
    "close the {color} {noun}",
    "push the {color} {noun} shut",
    "shut the {color} {noun}",
    "slide the {color} {noun} closed",
)
OOD_CLOSE_TEMPLATES = (
    "the {color} {noun} should not stay open",
    "please leave the {color} {noun} shut",
    "make sure that the {color} {noun} is closed",
)


@register_task
class OpenDrawer:
    """Success: the named drawer open by `OPENED` m. Failure: another drawer open by half of that."""

    name = "open_drawer"
    max_episode_steps = 80
    stage_names = ("handle reached", "pulled", "open")
    clutter_regions = CLUTTER_REGIONS
    goal_names = ("handle_x", "handle_y", "handle_z", "opening")

    def assets(self) -> Sequence[Asset]:
        return cabinets(DRAWERS, DISTRACTORS)

    def sample(self, draw: Draw) -> EpisodeStart:
        return _sample(draw, OPEN_TEMPLATES, OOD_OPEN_TEMPLATES, opening=(0.0, 0.01))

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        openings = _openings(view)
        opening = pick(openings, variables["target"])
        failure = (openings > OPENED / 2).sum(dim=1) > (opening > OPENED / 2).long()
        gap = torch.linalg.vector_norm(view.tip_pos - _handle(view, variables), dim=1)
        near = falling(gap, 0.2)
        progress = 0.4 * near + 0.6 * (opening / OPENED).clamp(0.0, 1.0)
        success = (opening > OPENED) & ~failure
        stages = torch.stack([gap < AT_HANDLE, opening > OPENED / 3, success], dim=1)
        return TaskStatus(success, failure, progress, stages=stages)

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        return _goal(view, variables)

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        return make_plan(view, pull_open(view, _handle(view, variables)))


@register_task
class CloseDrawer:
    """All drawers begin open. Success: the named one within `SHUT` m of closed. Failure: another one closed by more
    than half."""

    name = "close_drawer"
    max_episode_steps = 80
    stage_names = ("handle reached", "pushed", "closed")
    clutter_regions = CLUTTER_REGIONS
    goal_names = ("handle_x", "handle_y", "handle_z", "opening")
    began = 0.10  # m, about how far drawers are open at the start

    def assets(self) -> Sequence[Asset]:
        return cabinets(DRAWERS, DISTRACTORS)

    def sample(self, draw: Draw) -> EpisodeStart:
        return _sample(draw, CLOSE_TEMPLATES, OOD_CLOSE_TEMPLATES, opening=(0.09, 0.11))

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        openings = _openings(view)
        opening = pick(openings, variables["target"])
        failure = (openings < self.began / 2).sum(dim=1) > (opening < self.began / 2).long()
        gap = torch.linalg.vector_norm(view.tip_pos - _handle(view, variables), dim=1)
        near = falling(gap, 0.2)
        progress = 0.3 * near + 0.7 * (1.0 - opening / self.began).clamp(0.0, 1.0)
        success = (opening < SHUT) & ~failure
        stages = torch.stack([gap < AT_HANDLE, opening < 2 * self.began / 3, success], dim=1)
        return TaskStatus(success, failure, progress, stages=stages)

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        return _goal(view, variables)

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        return make_plan(view, push_shut(view, _handle(view, variables)))


def pull_open(view: SceneView, handle: Tensor) -> list[Waypoint]:
    """Close the jaws on a handle (`handle [N, 3]`) and pull towards the robot, without end. Four phases."""
    above, grip, tip = shifted(handle, z=0.07), shifted(handle, z=-0.01), view.tip_pos
    gone = torch.linalg.vector_norm((tip - handle)[:, :2], dim=1) > 0.03
    return [
        Waypoint(above, OPEN, done=over(view, above)),
        Waypoint(grip, OPEN),
        Waypoint(tip, CLOSED, done=~gone, dwell=JAW_STEPS, lost=gone),
        Waypoint(shifted(tip, x=-0.05), CLOSED, done=torch.zeros_like(gone), lost=gone, speed=0.6),
    ]


def push_shut(view: SceneView, handle: Tensor) -> list[Waypoint]:
    """Come down on the robot's side of a handle (`handle [N, 3]`) and push it away, without end. Three phases."""
    start = shifted(handle, x=-0.04, z=-0.01)
    above = shifted(start, z=0.08)
    gone = (view.tip_pos - handle)[:, 1].abs() > 0.03
    push = torch.cat([view.tip_pos[:, :1] + 0.05, start[:, 1:]], dim=1)
    return [
        Waypoint(above, CLOSED, done=over(view, above)),
        Waypoint(start, CLOSED),
        Waypoint(push, CLOSED, done=torch.zeros_like(gone), lost=gone, speed=0.6),
    ]


def cabinets(drawers: Sequence[str], distractors: Sequence[str]) -> list[Asset]:
    """Cabinets, and things that stand on them."""
    small = [Block(name, half=0.018, movable=False, shape="cylinder") for name in distractors]
    return [*(Drawer(name, half_width=HALF_WIDTH) for name in drawers), *small]


def cabinet_poses(
    draw: Draw, drawers: Sequence[str], slots: Sequence[float], distractors: Sequence[str]
) -> dict[str, Pose]:
    """Cabinets in a row along y at `slots` (m), each a little off its slot, and distractors on top of some of them."""
    region = draw.select("positions", _REGION, _OOD_REGION)
    offsets = {name: draw.place([name], min_distance=0.0, region=region)[name] for name in drawers}
    poses = {name: Pose(offsets[name].x, y + offsets[name].y) for name, y in zip(drawers, slots, strict=True)}
    for name, i in zip(distractors, draw.rng.permutation(len(drawers)).tolist(), strict=False):
        below = poses[drawers[int(i)]]
        x, y = draw.rng.uniform((-0.01, -0.035), (0.045, 0.035)).tolist()
        poses[name] = Pose(below.x + x, below.y + y, z=_TOP)
    return poses


def _sample(
    draw: Draw, templates: Sequence[str], ood_templates: Sequence[str], opening: tuple[float, float]
) -> EpisodeStart:
    target = draw.choice(len(DRAWERS))
    names = list(colors := draw.colors(len(DRAWERS)))
    noun = draw.select("sentences", DRAWER_NOUNS, OOD_DRAWER_NOUNS)
    return EpisodeStart(
        poses=cabinet_poses(draw, DRAWERS, _SLOTS, DISTRACTORS),
        instruction=draw.sentence(templates, ood_templates, color=names[target], noun=noun),
        variables={"target": target},
        colors=dict(zip(DRAWERS, colors.values(), strict=True))
        | dict(zip(DISTRACTORS, draw.distractor_colors(len(DISTRACTORS)).values(), strict=True)),
        joints={name: float(draw.rng.uniform(*opening)) for name in DRAWERS},
    )


def _openings(view: SceneView) -> Tensor:
    return torch.stack([view.joint_position(name) for name in DRAWERS], dim=1)


def _handle(view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
    return pick(torch.stack([view.site_pos(f"{name}/handle") for name in DRAWERS], dim=1), variables["target"])


def _goal(view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([_handle(view, variables), pick(_openings(view), variables["target"])[:, None]], dim=1)
