"""How a tabletop scene of a test differs from what a policy was trained on: one axis a field, each at four strengths.

An episode's task stays the nominal episode's (named object, colours, arm's start), whatever the shift: only what an
axis changes differs, so that a policy's episodes pair with its nominal ones. Looks and physics take the two ends of
their ranges and nothing between, so that a level is a strength and not a mixture.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from vla_rl.sim.language import CLUTTER_COLORS, contradicted
from vla_rl.sim.randomization import CameraJitter, LooksConfig, PhysicsConfig, RandomizationConfig
from vla_rl.sim.scene import Asset, Block
from vla_rl.sim.tasks.base import Draw, EpisodeStart, Region, Task, free_points

MAX_LEVEL = 3
_CLUTTER = (0, 2, 4, 6)  # objects more than in training, by level
_CLUTTER_SHAPES = ("sphere", "cylinder", "box")
_CLUTTER_HALF = 0.018  # m
_CLUTTER_CLEARANCE = 0.085  # m from every object of the task: room for open jaws
_CLUTTER_SPACING = 0.045  # m between each other
_CLUTTER_REGIONS = (Region(x=(0.34, 0.66), y=(-0.23, 0.23)),)
_STREAM = 3  # of `RandomizationConfig`: other numbers than the levels "train" and "test"
_UNSEEN_TEXTURES = ("grid", "tiles", "gravel")


@dataclass(frozen=True)
class SceneShift:
    """Each field is a level, 0 (as in training) to `MAX_LEVEL`.

    `position`: objects lie in a ring outside of the training region, the farther out the higher the level.
    `distractors`: 2, 4 or 6 objects more, of unseen colours. `color`: of objects, arm, table and floor; from level 2 on
    with unseen textures. `light`: brightness and direction. `camera`: pose and field of view. `physics`: masses,
    friction, gains, damping. `paraphrase`: sentences that training never says. `wrong_instruction`: the sentence names
    another object of the scene, while success stays the nominal goal's; see `language.contradicted`.
    """

    position: int = 0
    distractors: int = 0
    color: int = 0
    light: int = 0
    camera: int = 0
    physics: int = 0
    paraphrase: int = 0
    wrong_instruction: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            level = getattr(self, field.name)
            if not 0 <= level <= MAX_LEVEL:
                raise ValueError(f"SceneShift: {field.name} is a level from 0 to {MAX_LEVEL}, got {level}")
        if self.paraphrase and self.wrong_instruction:
            raise ValueError("SceneShift: paraphrase and wrong_instruction both change the sentence; take one of them")

    @property
    def randomization(self) -> RandomizationConfig | None:
        """Looks and physics of the shift; None where it changes neither."""
        if not (self.color or self.light or self.camera or self.physics):
            return None
        looks = LooksConfig()
        if self.color:
            looks = replace(
                looks,
                object_color=(0.04, 0.06, 0.10)[self.color - 1],
                arm_color=(0.08, 0.15, 0.25)[self.color - 1],
                surface_color=(0.08, 0.12, 0.20)[self.color - 1],
                textures=() if self.color == 1 else _UNSEEN_TEXTURES,
            )
        if self.light:
            looks = replace(
                looks,
                light_level=((0.6, 1.5), (0.3, 2.0), (0.0, 2.5))[self.light - 1],
                light_tilt=(0.2, 0.4, 0.6)[self.light - 1],
            )
        if self.camera:
            looks = replace(looks, cameras=_CAMERAS[self.camera - 1])
        physics = _PHYSICS[self.physics - 1] if self.physics else PhysicsConfig()
        return RandomizationConfig(looks, physics, stream=_STREAM, at_limits=True)

    def clutter(self) -> list[Asset]:
        """The objects that the scene has beside its task's."""
        return [
            Block(f"clutter{i}", half=_CLUTTER_HALF, movable=False, shape=_CLUTTER_SHAPES[i % len(_CLUTTER_SHAPES)])
            for i in range(_CLUTTER[self.distractors])
        ]


_CAMERAS: tuple[dict[str, CameraJitter], ...] = (
    {"agent": CameraJitter(0.01, 0.01, 1.0), "wrist": CameraJitter(0.003, 0.02, 1.5)},
    {"agent": CameraJitter(0.02, 0.02, 2.0), "wrist": CameraJitter(0.006, 0.04, 3.0)},
    {"agent": CameraJitter(0.03, 0.03, 3.0), "wrist": CameraJitter(0.01, 0.06, 5.0)},
)
_PHYSICS: tuple[PhysicsConfig, ...] = (
    PhysicsConfig(mass=(0.8, 1.25), friction=(0.85, 1.2), gain=(0.9, 1.1), damping=(0.7, 1.4)),
    PhysicsConfig(mass=(0.65, 1.5), friction=(0.7, 1.4), gain=(0.85, 1.2), damping=(0.5, 2.0)),
    PhysicsConfig(mass=(0.5, 2.0), friction=(0.6, 1.6), gain=(0.75, 1.3), damping=(0.35, 3.0)),
)


def sample_episode(task: Task, split: str, seed: int, shift: SceneShift) -> tuple[EpisodeStart, np.random.Generator]:
    """The start of episode `seed` under `shift`, and the generator of the nominal episode, for what comes after.

    What an axis changes is taken from a second drawing of the same episode in which only that axis is shifted. Raises
    ValueError for a task whose named object would not be the same in both, or whose sentence names nothing.
    """
    draw = Draw(task.name, split, seed)
    start = task.sample(draw)
    if shift.position:
        moved = task.sample(Draw(task.name, split, seed, position=shift.position))
        if any(not np.array_equal(moved.variables[name], value) for name, value in start.variables.items()):
            raise ValueError(f"task {task.name!r}: sample() must draw what is named before it draws where things stand")
        start = replace(start, poses=moved.poses)
    if shift.paraphrase:
        other = task.sample(Draw(task.name, split, seed, paraphrase=shift.paraphrase))
        start = replace(start, instruction=other.instruction)
    if shift.wrong_instruction:
        wrong = task.sample(Draw(task.name, split, seed, wrong_object=True)).instruction
        if wrong == start.instruction:
            raise ValueError(f"task {task.name!r} names nothing by Draw.choice, so its sentence cannot be wrong")
        start = replace(start, instruction=contradicted(start.instruction, wrong, shift.wrong_instruction))
    if shift.distractors:
        start = _with_clutter(task, start, seed, shift.clutter())
    return start, draw.rng


def _with_clutter(task: Task, start: EpisodeStart, seed: int, clutter: Sequence[Asset]) -> EpisodeStart:
    """`start` with `clutter` where the task leaves room: in its `clutter_regions` in turn, where it has any."""
    rng = np.random.default_rng([zlib.crc32(b"clutter"), zlib.crc32(task.name.encode()), seed])
    regions: Sequence[Region] = getattr(task, "clutter_regions", _CLUTTER_REGIONS)
    kept = [(pose.x, pose.y) for pose in start.poses.values()]
    poses = free_points(
        rng,
        {asset.name: regions[i % len(regions)] for i, asset in enumerate(clutter)},
        kept,
        _CLUTTER_CLEARANCE,
        _CLUTTER_SPACING,
    )
    names = list(CLUTTER_COLORS)
    order = rng.permutation(len(names))[: len(clutter)].tolist()
    colors = {asset.name: CLUTTER_COLORS[names[i]] for asset, i in zip(clutter, order, strict=True)}
    return replace(start, poses={**start.poses, **poses}, colors={**start.colors, **colors})
