"""Pick the named block and hold it up: three coloured blocks to choose from, a grey object in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vla_rl.sim.language import BLOCK_NOUNS, OOD_BLOCK_NOUNS
from vla_rl.sim.scene import Asset, Block
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Plan, TaskStatus, falling, register_task
from vla_rl.sim.tasks.waypoints import LIFTED, grasp, gripped, make_plan
from vla_rl.sim.view import SceneView, pick

BLOCKS: tuple[str, ...] = ("block0", "block1", "block2")
DISTRACTORS: tuple[str, ...] = ("distractor0",)
HALF = 0.022  # m, of a block's side: the jaws open to 8 cm

TEMPLATES = (
    "pick up the {color} {noun}",
    "lift the {color} {noun}",
    "take the {color} {noun} and hold it up",
    "grasp the {color} {noun} and raise it",
)
OOD_TEMPLATES = (
    "get the {color} {noun} off the table",
    "the {color} {noun} should be in the air",
    "could you hold up the {color} {noun}",
)


@register_task
class Pick:
    """Success: the named block `raised` m above where it lay for `hold_steps` control steps. Failure: another block
    `wrong` m up, or one off the table."""

    name = "pick"
    max_episode_steps = 80
    stage_names = ("reached", "grasped", "lifted", "held up")
    goal_names = ("target_x", "target_y", "target_z")
    raised = 0.10
    wrong = 0.04
    hold_steps = 5

    def assets(self) -> Sequence[Asset]:
        blocks = [Block(name, half=HALF) for name in BLOCKS]
        return [*blocks, *(Block(name, half=HALF, movable=False, shape="cylinder") for name in DISTRACTORS)]

    def sample(self, draw: Draw) -> EpisodeStart:
        target = draw.choice(len(BLOCKS))
        colors = draw.colors(len(BLOCKS))
        noun = draw.select("sentences", BLOCK_NOUNS, OOD_BLOCK_NOUNS)
        return EpisodeStart(
            poses=draw.place([*BLOCKS, *DISTRACTORS], min_distance=0.10, yaw=0.25),
            instruction=draw.sentence(TEMPLATES, OOD_TEMPLATES, color=list(colors)[target], noun=noun),
            variables={"target": target, "steps_up": 0},
            colors=dict(zip(BLOCKS, colors.values(), strict=True))
            | dict(zip(DISTRACTORS, draw.distractor_colors(len(DISTRACTORS)).values(), strict=True)),
        )

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        blocks, target = view.object_positions(BLOCKS), variables["target"]
        height = blocks[..., 2] - HALF
        up, block = pick(height, target), pick(blocks, target)
        named = torch.arange(len(BLOCKS), device=view.device) == target[:, None]
        steps_up = torch.where(up > self.raised, variables["steps_up"] + 1, 0)
        failure = ((height > self.wrong) & ~named).any(dim=1) | (height < -0.05).any(dim=1)
        reach = torch.linalg.vector_norm(view.tip_pos - block, dim=1)
        near = falling(reach, 0.2)
        progress = 0.4 * near + 0.6 * (up / self.raised).clamp(0.0, 1.0)
        success = (steps_up >= self.hold_steps) & ~failure
        stages = torch.stack([*gripped(view, reach, HALF), up > LIFTED, success], dim=1)
        return TaskStatus(success, failure, progress, {"steps_up": steps_up}, stages)

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        return pick(view.object_positions(BLOCKS), variables["target"])

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        return make_plan(view, grasp(view, self.goal(view, variables), lift=HALF + self.raised + 0.04))
