"""Stack the named block on the other named block; a third block is there to be mistaken for either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vla_rl.sim.language import BLOCK_NOUNS, OOD_BLOCK_NOUNS
from vla_rl.sim.scene import Asset, Block
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Plan, TaskStatus, falling, register_task
from vla_rl.sim.tasks.waypoints import LIFTED, grasp, gripped, make_plan, release
from vla_rl.sim.view import SceneView, pick

BLOCKS: tuple[str, ...] = ("block0", "block1", "block2")
DISTRACTORS: tuple[str, ...] = ("distractor0",)
HALF = 0.022  # m, of a block's side

TEMPLATES = (
    "stack the {top} {noun} on the {base} {noun}",
    "put the {top} {noun} on top of the {base} {noun}",
    "place the {top} {noun} on the {base} {noun}",
    "set the {top} {noun} onto the {base} {noun}",
)
OOD_TEMPLATES = (
    "build a tower with the {top} {noun} above the {base} {noun}",
    "the {base} {noun} should carry the {top} {noun}",
    "leave the {top} {noun} resting on the {base} {noun}",
)


@register_task
class Stack:
    """Success: the named upper block rests on the named lower one and the gripper has let go of it. Failure: any other
    block rests on another, or one is off the table."""

    name = "stack"
    max_episode_steps = 120
    stage_names = ("reached", "grasped", "lifted", "over the base", "stacked")
    goal_names = ("top_x", "top_y", "top_z", "base_x", "base_y", "base_z")
    let_go = 0.035  # m from the fingertip to the upper block
    still = 0.05  # m/s

    def assets(self) -> Sequence[Asset]:
        blocks = [Block(name, half=HALF) for name in BLOCKS]
        return [*blocks, *(Block(name, half=HALF, movable=False, shape="cylinder") for name in DISTRACTORS)]

    def sample(self, draw: Draw) -> EpisodeStart:
        top, base = draw.distinct(2, of=len(BLOCKS))
        names = list(colors := draw.colors(len(BLOCKS)))
        noun = draw.select("sentences", BLOCK_NOUNS, OOD_BLOCK_NOUNS)
        return EpisodeStart(
            poses=draw.place([*BLOCKS, *DISTRACTORS], min_distance=0.105, yaw=0.25),
            instruction=draw.sentence(TEMPLATES, OOD_TEMPLATES, top=names[top], base=names[base], noun=noun),
            variables={"top": top, "base": base},
            colors=dict(zip(BLOCKS, colors.values(), strict=True))
            | dict(zip(DISTRACTORS, draw.distractor_colors(len(DISTRACTORS)).values(), strict=True)),
        )

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        blocks, top = view.object_positions(BLOCKS), variables["top"]
        offset = blocks[:, :, None] - blocks[:, None]  # [N, upper, lower, 3]
        speeds = torch.stack([view.object_speed(name) for name in BLOCKS], dim=1)
        released = torch.linalg.vector_norm(view.tip_pos[:, None] - blocks, dim=2) > self.let_go
        on = (offset[..., :2].norm(dim=3) < 1.4 * HALF) & ((offset[..., 2] - 2 * HALF).abs() < 0.008)
        on = on & (released & (speeds < self.still))[:, :, None]
        success = pick(pick(on, top), variables["base"])
        failure = (on.flatten(1).sum(dim=1) - success.long() > 0) | (blocks[..., 2] < -0.03).any(dim=1)
        goal = pick(blocks, variables["base"]) + blocks.new_tensor([0.0, 0.0, 2 * HALF])
        block = pick(blocks, top)
        reach = torch.linalg.vector_norm(view.tip_pos - block, dim=1)
        near = falling(reach, 0.2)
        there = falling(torch.linalg.vector_norm(block - goal, dim=1), 0.2)
        up = block[:, 2] - HALF
        lifted = (up / (2 * HALF)).clamp(0.0, 1.0)
        progress = torch.where(success, 1.0, 0.2 * near + 0.2 * lifted + 0.5 * there)
        high = up > LIFTED
        over = high & (torch.linalg.vector_norm((block - goal)[:, :2], dim=1) < HALF)
        won = success & ~failure
        stages = torch.stack([*gripped(view, reach, HALF), high, over, won], dim=1)
        return TaskStatus(won, failure, progress, stages=stages)

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        blocks = view.object_positions(BLOCKS)
        return torch.cat([pick(blocks, variables["top"]), pick(blocks, variables["base"])], dim=1)

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        goal = self.goal(view, variables)
        top, base = goal[:, :3], goal[:, 3:]
        return make_plan(view, [*grasp(view, top), *release(view, top, base, drop=2 * HALF + 0.004)])
