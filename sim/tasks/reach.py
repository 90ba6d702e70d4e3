"""Reach the named block: the fingertip to the top of one of three coloured blocks; two grey objects are in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vla_rl.sim.language import BLOCK_NOUNS, OOD_BLOCK_NOUNS
from vla_rl.sim.scene import Asset, Block
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Plan, TaskStatus, falling, register_task
from vla_rl.sim.view import SceneView, pick

BLOCKS: tuple[str, ...] = ("block0", "block1", "block2")
DISTRACTORS: tuple[str, ...] = ("distractor0", "distractor1")

TEMPLATES = (
    "touch the {color} {noun}",
    "reach the {color} {noun}",
    "move the gripper to the {color} {noun}",
    "go to the {color} {noun}",
    "put your fingertip on the {color} {noun}",
)
OOD_TEMPLATES = (
    "the {color} {noun} is what you should touch",
    "please bring the hand over to the {color} {noun}",
    "find the {color} {noun} and tap it",
)


@register_task
class Reach:
    """Success: the fingertip within `tolerance` m of the point 1 cm above the named block's top. Failure: as close to
    any other object, so a policy that ignores the sentence fails at two of three episodes or more."""

    name = "reach"
    max_episode_steps = 24
    stage_names: tuple[str, ...] = ("approached", "touched")
    goal_names: tuple[str, ...] = ("target_x", "target_y", "target_z")
    tolerance = 0.02
    hover = 0.10  # m above the goal, where the expert travels
    tip_height = 0.035  # m of the goal above a block's centre

    def assets(self) -> Sequence[Asset]:
        blocks = [Block(name, movable=False) for name in BLOCKS]
        return [*blocks, *(Block(name, movable=False, half=0.022, shape="cylinder") for name in DISTRACTORS)]

    def sample(self, draw: Draw) -> EpisodeStart:
        target = draw.choice(len(BLOCKS))
        colors = draw.colors(len(BLOCKS))
        nouns = draw.select("sentences", BLOCK_NOUNS, OOD_BLOCK_NOUNS)
        said = draw.sentence(TEMPLATES, OOD_TEMPLATES, color=list(colors)[target], noun=nouns)
        return EpisodeStart(
            poses=draw.place([*BLOCKS, *DISTRACTORS], min_distance=0.085, yaw=0.6),
            instruction=said,
            variables={"target": target},
            colors=dict(zip(BLOCKS, colors.values(), strict=True))
            | dict(zip(DISTRACTORS, draw.distractor_colors(len(DISTRACTORS)).values(), strict=True)),
        )

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        offset = view.object_positions([*BLOCKS, *DISTRACTORS]) - view.tip_pos[:, None]
        offset[..., 2] += self.tip_height
        distance = torch.linalg.vector_norm(offset, dim=2)
        near = distance < self.tolerance
        success = pick(near, variables["target"])
        gap = pick(distance, variables["target"])
        stages = torch.stack([gap < 3 * self.tolerance, success], dim=1)
        return TaskStatus(success, near.any(dim=1) & ~success, falling(gap, 0.2), stages=stages)

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        position = pick(view.object_positions(BLOCKS), variables["target"]).clone()
        position[:, 2] += self.tip_height
        return position

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        goal = self.goal(view, variables)
        above = goal + goal.new_tensor([0.0, 0.0, self.hover])
        targets = torch.stack([above, goal], dim=1)
        over = torch.linalg.vector_norm((view.tip_pos - goal)[:, :2], dim=1) < 0.02
        done = torch.stack([over, torch.zeros_like(over)], dim=1)
        return Plan(targets, targets.new_full(targets.shape[:2], -1.0), done)
