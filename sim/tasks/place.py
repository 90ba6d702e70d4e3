"""Pick the named block and place it into the named bin: two blocks near the robot, two coloured bins beyond them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vla_rl.sim.language import BIN_NOUNS, BLOCK_NOUNS, OOD_BIN_NOUNS, OOD_BLOCK_NOUNS
from vla_rl.sim.scene import Asset, Bin, Block
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Plan, Region, TaskStatus, falling, register_task
from vla_rl.sim.tasks.waypoints import LIFTED, grasp, gripped, make_plan, release
from vla_rl.sim.view import SceneView, pick

BLOCKS: tuple[str, ...] = ("block0", "block1")
BINS: tuple[str, ...] = ("bin0", "bin1")
DISTRACTORS: tuple[str, ...] = ("distractor0",)
HALF = 0.022  # m, of a block's side
BIN_HALF = 0.05  # m, inner

BLOCK_REGION = Region(x=(0.37, 0.45), y=(-0.15, 0.15))
OOD_BLOCK_REGION = Region(x=(0.35, 0.46), y=(-0.19, 0.19), hole=BLOCK_REGION)
BIN_REGION = Region(x=(0.57, 0.60), y=(-0.14, 0.14))
OOD_BIN_REGION = Region(x=(0.555, 0.625), y=(-0.18, 0.18), hole=BIN_REGION)

TEMPLATES = (
    "put the {block_color} {block} into the {bin_color} {bin}",
    "place the {block_color} {block} in the {bin_color} {bin}",
    "drop the {block_color} {block} into the {bin_color} {bin}",
    "pick up the {block_color} {block} and put it in the {bin_color} {bin}",
)
OOD_TEMPLATES = (
    "the {block_color} {block} belongs in the {bin_color} {bin}",
    "into the {bin_color} {bin} goes the {block_color} {block}",
    "please store the {block_color} {block} inside the {bin_color} {bin}",
)


@register_task
class Place:
    """Success: the named block lies in the named bin. Failure: a block lies in a bin in any other pair, or one is off
    the table."""

    name = "place"
    max_episode_steps = 100
    stage_names = ("reached", "grasped", "lifted", "over the bin", "placed")
    goal_names = ("block_x", "block_y", "block_z", "bin_x", "bin_y", "bin_z")

    def assets(self) -> Sequence[Asset]:
        assets: list[Asset] = [Block(name, half=HALF) for name in BLOCKS]
        assets += [Bin(name, half=BIN_HALF) for name in BINS]
        return [*assets, *(Block(name, half=HALF, movable=False, shape="cylinder") for name in DISTRACTORS)]

    def sample(self, draw: Draw) -> EpisodeStart:
        block, bin_ = draw.choice(len(BLOCKS)), draw.choice(len(BINS))
        names = list(colors := draw.colors(len(BLOCKS) + len(BINS)))
        sentence = draw.sentence(
            TEMPLATES,
            OOD_TEMPLATES,
            block_color=names[block],
            bin_color=names[len(BLOCKS) + bin_],
            block=draw.select("sentences", BLOCK_NOUNS, OOD_BLOCK_NOUNS),
            bin=draw.select("sentences", BIN_NOUNS, OOD_BIN_NOUNS),
        )
        near = draw.select("positions", BLOCK_REGION, OOD_BLOCK_REGION)
        far = draw.select("positions", BIN_REGION, OOD_BIN_REGION)
        return EpisodeStart(
            poses=draw.place([*BLOCKS, *DISTRACTORS], min_distance=0.10, yaw=0.25, region=near)
            | draw.place(BINS, min_distance=0.135, region=far),
            instruction=sentence,
            variables={"block": block, "bin": bin_},
            colors=dict(zip((*BLOCKS, *BINS), colors.values(), strict=True))
            | dict(zip(DISTRACTORS, draw.distractor_colors(len(DISTRACTORS)).values(), strict=True)),
        )

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        blocks, bins = view.object_positions(BLOCKS), view.object_positions(BINS)
        offset = blocks[:, :, None] - bins[:, None]  # [N, blocks, bins, 3]
        inside = (offset[..., :2].abs().amax(dim=3) < BIN_HALF) & (offset[..., 2] < HALF + 0.015)
        success = pick(pick(inside, variables["block"]), variables["bin"])
        failure = (inside.flatten(1).sum(dim=1) - success.long() > 0) | (blocks[..., 2] < -0.03).any(dim=1)
        block, goal = pick(blocks, variables["block"]), pick(bins, variables["bin"])
        reach = torch.linalg.vector_norm(view.tip_pos - block, dim=1)
        near = falling(reach, 0.2)
        gap, up = torch.linalg.vector_norm((block - goal)[:, :2], dim=1), block[:, 2] - HALF
        there, lifted = falling(gap, 0.2), (up / 0.08).clamp(0.0, 1.0)
        progress = torch.where(success, 1.0, 0.2 * near + 0.2 * lifted + 0.5 * there)
        won = success & ~failure
        high = up > LIFTED
        stages = torch.stack([*gripped(view, reach, HALF), high, high & (gap < BIN_HALF), won], dim=1)
        return TaskStatus(won, failure, progress, stages=stages)

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        block = pick(view.object_positions(BLOCKS), variables["block"])
        return torch.cat([block, pick(view.object_positions(BINS), variables["bin"])], dim=1)

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        goal = self.goal(view, variables)
        block, bin_ = goal[:, :3], goal[:, 3:]
        return make_plan(view, [*grasp(view, block), *release(view, block, bin_, drop=0.065)])
