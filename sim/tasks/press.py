"""Press the named button: three coloured buttons, a grey object in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vla_rl.sim.language import BUTTON_NOUNS, OOD_BUTTON_NOUNS
from vla_rl.sim.scene import Asset, Block, Button
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Plan, TaskStatus, falling, register_task
from vla_rl.sim.tasks.waypoints import CLOSED, Waypoint, at_height, make_plan, over
from vla_rl.sim.view import SceneView, pick

BUTTONS: tuple[str, ...] = ("button0", "button1", "button2")
DISTRACTORS: tuple[str, ...] = ("distractor0",)

TEMPLATES = (
    "press the {color} {noun}",
    "push the {color} {noun}",
    "push down on the {color} {noun}",
    "hit the {color} {noun}",
)
OOD_TEMPLATES = (
    "the {color} {noun} needs to be pressed",
    "activate the {color} {noun}",
    "please give the {color} {noun} a push",
)


@register_task
class Press:
    """Success: the named button pressed by `pressed` m. Failure: another button pressed as far."""

    name = "press"
    max_episode_steps = 50
    stage_names = ("reached", "touched", "pressed")
    goal_names = ("button_x", "button_y", "button_pressed")
    pressed = 0.012
    top = 0.047  # m, of a button that nobody presses

    def assets(self) -> Sequence[Asset]:
        buttons = [Button(name) for name in BUTTONS]
        return [*buttons, *(Block(name, half=0.022, movable=False, shape="cylinder") for name in DISTRACTORS)]

    def sample(self, draw: Draw) -> EpisodeStart:
        target = draw.choice(len(BUTTONS))
        names = list(colors := draw.colors(len(BUTTONS)))
        noun = draw.select("sentences", BUTTON_NOUNS, OOD_BUTTON_NOUNS)
        return EpisodeStart(
            poses=draw.place([*BUTTONS, *DISTRACTORS], min_distance=0.105, yaw=0.5),
            instruction=draw.sentence(TEMPLATES, OOD_TEMPLATES, color=names[target], noun=noun),
            variables={"target": target},
            colors=dict(zip(BUTTONS, colors.values(), strict=True))
            | dict(zip(DISTRACTORS, draw.distractor_colors(len(DISTRACTORS)).values(), strict=True)),
        )

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus:
        depths = torch.stack([view.joint_position(name) for name in BUTTONS], dim=1)
        depth = pick(depths, variables["target"])
        success = depth > self.pressed
        failure = (depths > self.pressed).sum(dim=1) > success.long()
        button = at_height(pick(view.object_positions(BUTTONS), variables["target"]), self.top)
        gap = torch.linalg.vector_norm(view.tip_pos - button, dim=1)
        near = falling(gap, 0.2)
        progress = 0.6 * near + 0.4 * (depth / self.pressed).clamp(0.0, 1.0)
        won = success & ~failure
        stages = torch.stack([gap < 0.03, depth > 0.25 * self.pressed, won], dim=1)
        return TaskStatus(won, failure, progress, stages=stages)

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        position = pick(view.object_positions(BUTTONS), variables["target"])
        depths = torch.stack([view.joint_position(name) for name in BUTTONS], dim=1)
        return torch.cat([position[:, :2], pick(depths, variables["target"])[:, None]], dim=1)

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        button = pick(view.object_positions(BUTTONS), variables["target"])
        above, down = at_height(button, self.top + 0.06), at_height(button, self.top - 0.02)
        return make_plan(view, [Waypoint(above, CLOSED, done=over(view, above)), Waypoint(down, CLOSED)])
