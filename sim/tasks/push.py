"""Push the named block onto the named zone: two flat round blocks near the robot, two coloured discs beyond them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vla_rl.sim.language import OOD_PUCK_NOUNS, OOD_ZONE_NOUNS, PUCK_NOUNS, ZONE_NOUNS
from vla_rl.sim.scene import Asset, Block, Puck, Zone
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Plan, Pose, Region, TaskStatus, falling, register_task
from vla_rl.sim.tasks.waypoints import CLOSED, Waypoint, at_height, make_plan, over, shifted
from vla_rl.sim.view import SceneView, pick

BLOCKS: tuple[str, ...] = ("block0", "block1")
ZONES: tuple[str, ...] = ("zone0", "zone1")
DISTRACTORS: tuple[str, ...] = ("distractor0", "distractor1")

# A block starts nearer to the robot than every zone, by more than it must go sideways: one push gets it there.
BLOCK_REGION = Region(x=(0.40, 0.44), y=(-0.10, 0.10))
OOD_BLOCK_REGION = Region(x=(0.385, 0.455), y=(-0.12, 0.12), hole=BLOCK_REGION)
ZONE_REGION = Region(x=(0.56, 0.60), y=(-0.10, 0.10))
OOD_ZONE_REGION = Region(x=(0.545, 0.62), y=(-0.13, 0.13), hole=ZONE_REGION)
SIDES = (Region(x=(0.40, 0.58), y=(-0.24, -0.20)), Region(x=(0.40, 0.58), y=(0.20, 0.24)))

TEMPLATES = (
    "push the {block_color} {block} onto the {zone_color} {zone}",
    "slide the {block_color} {block} to the {zone_color} {zone}",
    "move the {block_color} {block} onto the {zone_color} {zone}",
    "shove the {block_color} {block} over to the {zone_color} {zone}",
)
OOD_TEMPLATES = (
    "the {block_color} {block} belongs on the {zone_color} {zone}",
    "onto the {zone_color} {zone} goes the {block_color} {block}",
    "please get the {block_color} {block} to rest on the {zone_color} {zone}",
)


@register_task
class Push:
    """Success: the centre of the named block within `tolerance` m of the named zone's, slower than `still` m/s.
    Failure: a block as close to a zone in any other pair, or off the table."""

    name = "push"
    max_episode_steps = 100
    stage_names = ("reached", "moved", "near the zone", "on the zone")
    clutter_regions = (Region(x=(0.36, 0.62), y=(-0.225, -0.16)), Region(x=(0.36, 0.62), y=(0.16, 0.225)))
    goal_names = ("block_x", "block_y", "zone_x", "zone_y")
    tolerance = 0.03
    still = 0.15
    # The expert, m from the block's centre: where the fingertip comes down, where it touches; how far its waypoint is
    # ahead of contact, which sets its speed; how far off the line it stops pushing, and starts over.
    behind, contact, lead, aside, off_line = 0.058, 0.050, 0.018, 0.006, 0.015

    def assets(self) -> Sequence[Asset]:
        assets: list[Asset] = [Puck(name) for name in BLOCKS]
        assets += [Zone(name, radius=0.05) for name in ZONES]
        return [*assets, *(Block(name, half=0.022, movable=False) for name in DISTRACTORS)]

    def sample(self, draw: Draw) -> EpisodeStart:
        block, zone = draw.choice(len(BLOCKS)), draw.choice(len(ZONES))
        names = list(colors := draw.colors(len(BLOCKS) + len(ZONES)))
        sentence = draw.sentence(
            TEMPLATES,
            OOD_TEMPLATES,
            block_color=names[block],
            zone_color=names[len(BLOCKS) + zone],
            block=draw.select("sentences", PUCK_NOUNS, OOD_PUCK_NOUNS),
            zone=draw.select("sentences", ZONE_NOUNS, OOD_ZONE_NOUNS),
        )
        return EpisodeStart(
            poses=_layout(draw),
            instruction=sentence,
            variables={"block": block, "zone": zone},
            colors=dict(zip((*BLOCKS, *ZONES), colors.values(), strict=True))
            | dict(zip(DISTRACTORS, draw.distractor_colors(len(DISTRACTORS)).values(), strict=True)),
        )

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        blocks, zones = view.object_positions(BLOCKS), view.object_positions(ZONES)
        gaps = torch.linalg.vector_norm((blocks[:, :, None] - zones[:, None])[..., :2], dim=3)  # [N, blocks, zones]
        gap = pick(pick(gaps, variables["block"]), variables["zone"])
        speeds = torch.stack([view.object_speed(name) for name in BLOCKS], dim=1)
        success = (gap < self.tolerance) & (pick(speeds, variables["block"]) < self.still)
        arrived = (gaps < self.tolerance).flatten(1).sum(dim=1) - (gap < self.tolerance).long()
        failure = (arrived > 0) | (blocks[..., 2] < -0.03).any(dim=1)
        block = pick(blocks, variables["block"])
        reach = torch.linalg.vector_norm(view.tip_pos - block, dim=1)
        near = falling(reach, 0.2)
        progress = torch.where(success, 1.0, 0.3 * near + 0.7 * falling(gap, 0.2))
        moving = pick(speeds, variables["block"]) > 0.02
        won = success & ~failure
        stages = torch.stack([reach < 0.07, moving, gap < 2 * self.tolerance, won], dim=1)
        return TaskStatus(won, failure, progress, stages=stages)

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        block = pick(view.object_positions(BLOCKS), variables["block"])
        return torch.cat([block[:, :2], pick(view.object_positions(ZONES), variables["zone"])[:, :2]], dim=1)

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        """Come down behind the block, seen from the zone, and push; the farther the fingertip is off the line through
        block and zone, the less it pushes and the more it goes back onto the line."""
        block = at_height(pick(view.object_positions(BLOCKS), variables["block"]), 0.015)
        way = at_height(pick(view.object_positions(ZONES), variables["zone"]), 0.015) - block
        way = way / torch.linalg.vector_norm(way, dim=1, keepdim=True).clamp(min=1e-6)
        start = (block - self.behind * way).clamp(
            block.new_tensor([0.33, -0.25, 0.0]), block.new_tensor([0.65, 0.25, 1.0])
        )
        above = shifted(start, z=0.08)
        offset = at_height(view.tip_pos, 0.015) - block
        aside = torch.linalg.vector_norm(torch.linalg.cross(way, offset), dim=1, keepdim=True)
        push = block + (self.lead * (1.0 - aside / self.aside).clamp(min=-1.0) - self.contact) * way
        missed = (torch.linalg.vector_norm(offset, dim=1) > 0.08) | (aside[:, 0] > self.off_line)
        return make_plan(
            view,
            [
                Waypoint(above, CLOSED, done=over(view, above)),
                Waypoint(start, CLOSED),
                Waypoint(push, CLOSED, done=torch.zeros_like(missed), lost=missed),
            ],
        )


def _layout(draw: Draw) -> dict[str, Pose]:
    """Poses such that each block could be pushed onto each zone in a line less than 45 degrees off x."""
    block_region = draw.select("positions", BLOCK_REGION, OOD_BLOCK_REGION)
    zone_region = draw.select("positions", ZONE_REGION, OOD_ZONE_REGION)
    sides = {d: draw.place([d], min_distance=0.0, region=side)[d] for d, side in zip(DISTRACTORS, SIDES, strict=True)}
    for _ in range(200):
        blocks = draw.place(BLOCKS, min_distance=0.115, region=block_region)
        zones = draw.place(ZONES, min_distance=0.115, region=zone_region)
        if all(abs(z.y - b.y) < z.x - b.x for b in blocks.values() for z in zones.values()):
            return blocks | zones | sides
    raise ValueError("push: no layout found in which every zone can be reached by one push")
