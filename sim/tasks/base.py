"""What a task is, and what it draws an episode from.

A task is one class in one file: the assets it puts on the table, `sample` (where things stand and what is said, from
one generator an episode), `evaluate` (success, failure and progress of all environments at once) and `plan`
(waypoints for the scripted expert). Decorate it with `@register_task`, or pass an instance to `make_tabletop`.

Splits. "train" and "test" draw from one distribution in disjoint random streams. "ood" shifts all of `OOD_AXES`;
"ood_colors", "ood_positions", "ood_distractors" and "ood_sentences" shift one each.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vla_rl.sim.language import COLORS, DISTRACTOR_COLORS, OOD_COLORS, Rgba, framed, sentence
from vla_rl.sim.scene import Asset
from vla_rl.sim.view import SceneView

T = TypeVar("T")

OOD_AXES = ("colors", "positions", "distractors", "sentences")
SPLITS = ("train", "test", "ood", *(f"ood_{axis}" for axis in OOD_AXES))


# ------------------------------------------------------------------------------------------------ drawing an episode
@dataclass(frozen=True)
class Pose:
    """Where an asset stands: m, and rad about z. `z` None: lying on the table."""

    x: float
    y: float
    yaw: float = 0.0
    z: float | None = None


NUM_RINGS = 3


@dataclass(frozen=True)
class Region:
    """A rectangle on the table, m. With `hole`, a rectangle inside it that is left out: unseen positions."""

    x: tuple[float, float] = (0.40, 0.58)
    y: tuple[float, float] = (-0.16, 0.16)
    hole: Region | None = None

    def contains(self, x: float, y: float) -> bool:
        inside = self.x[0] <= x <= self.x[1] and self.y[0] <= y <= self.y[1]
        return inside and not (self.hole is not None and self.hole.contains(x, y))

    def toward(self, outer: Region, share: float) -> Region:
        """The rectangle that is `share` of the way from this one to `outer`; no hole."""
        x, y = (
            (a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1]))
            for a, b in ((self.x, outer.x), (self.y, outer.y))
        )
        return Region(x, y)


def ring(usual: Region, unseen: Region, level: int) -> Region:
    """Ring `level` of the `NUM_RINGS` of one width that lie between `usual` and the outside of `unseen`."""
    return replace(usual.toward(unseen, level / NUM_RINGS), hole=usual.toward(unseen, (level - 1) / NUM_RINGS))


TRAIN_REGION = Region()
OOD_REGION = Region(x=(0.37, 0.61), y=(-0.20, 0.20), hole=TRAIN_REGION)


@dataclass(frozen=True)
class EpisodeStart:
    """An episode before its first step.

    `poses`: every asset's pose. `instruction`: the sentence. `variables`: what the predicates need to know, such as the
    index of the named block; numbers or arrays, of the same names and shapes in every episode. `colors`: asset ->
    colour. `joints`: asset -> position of its sliding part, m (default 0).
    """

    poses: Mapping[str, Pose]
    instruction: str
    variables: Mapping[str, float | int | np.ndarray] = field(default_factory=dict)
    colors: Mapping[str, Rgba] = field(default_factory=dict)
    joints: Mapping[str, float] = field(default_factory=dict)


class Draw:
    """The random choices of one episode. `rng` is the episode's own generator: seeded by (task, split, seed) alone.

    What `sim/shift.py` changes: `position`, a ring outside of the training regions; `paraphrase`, 1 for unseen nouns, 2
    for unseen templates too, 3 for these inside of other words; `wrong_object`, which names what is not meant.
    """

    def __init__(
        self,
        task: str,
        split: str,
        seed: int,
        *,
        position: int = 0,
        paraphrase: int = 0,
        wrong_object: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        self.split = split
        self.shifted = (
            frozenset(OOD_AXES) if split == "ood" else frozenset({split.removeprefix("ood_")} & set(OOD_AXES))
        )
        self.rng = np.random.default_rng([zlib.crc32(task.encode()), SPLITS.index(split), seed])
        self._position, self._paraphrase, self._wrong_object = position, paraphrase, wrong_object
        self.region = self.select("positions", TRAIN_REGION, OOD_REGION)

    def place(
        self,
        names: Sequence[str],
        *,
        min_distance: float,
        yaw: float = 0.0,
        region: Region | None = None,
        avoid: Mapping[str, Pose] | None = None,
    ) -> dict[str, Pose]:
        """Poses for `names` inside `region` (default: the split's own), at least `min_distance` m from each other and
        from `avoid`; yaw uniform in [-yaw, yaw]. Raises ValueError where they do not fit."""
        region = region or self.region
        taken = [(p.x, p.y) for p in (avoid or {}).values()]
        for _ in range(50):  # restarts: a bad first draw can make the rest impossible
            points = self._points(len(names), region, taken, min_distance)
            if points is not None:
                turns = self.rng.uniform(-yaw, yaw, size=len(names)) if yaw else np.zeros(len(names))
                return {n: Pose(x, y, float(t)) for n, (x, y), t in zip(names, points, turns, strict=True)}
        raise ValueError(f"place: {len(names)} assets do not fit into {region} with {min_distance} m between them")

    def _points(
        self, count: int, region: Region, taken: list[tuple[float, float]], min_distance: float
    ) -> list[tuple[float, float]] | None:
        points: list[tuple[float, float]] = []
        tries = self.rng.random((40 * count, 2))
        for u, v in tries.tolist():
            x = region.x[0] + u * (region.x[1] - region.x[0])
            y = region.y[0] + v * (region.y[1] - region.y[0])
            near = any(math.hypot(x - a, y - b) < min_distance for a, b in (*taken, *points))
            if not near and region.contains(x, y):
                points.append((x, y))
                if len(points) == count:
                    return points
        return None

    def select(self, axis: str, usual: T, unseen: T) -> T:
        """`unseen` where the split shifts `axis` (one of `OOD_AXES`), else `usual`: words, regions, numbers."""
        if axis not in OOD_AXES:
            raise ValueError(f"select: axis {axis!r} is unknown; use one of {', '.join(OOD_AXES)}")
        if axis == "positions" and self._position and isinstance(usual, Region) and isinstance(unseen, Region):
            return ring(usual, unseen, self._position)
        if axis == "sentences" and self._paraphrase:
            return unseen
        return unseen if axis in self.shifted else usual

    def colors(self, count: int) -> dict[str, Rgba]:
        """`count` different colours to be named, name -> rgba, in random order; unseen ones if colours are shifted."""
        return self._choose(OOD_COLORS if "colors" in self.shifted else COLORS, count)

    def distractor_colors(self, count: int) -> dict[str, Rgba]:
        """`count` colours that are never named; if distractors are shifted, those that blocks wear in training do not
        occur, and unseen ones do, of which some may be as bright as a target's."""
        if "distractors" not in self.shifted:
            return self._choose(DISTRACTOR_COLORS, count)
        unseen = {"teal": (0.0, 0.45, 0.45, 1.0), "magenta": (0.85, 0.10, 0.60, 1.0), "lime": (0.65, 0.95, 0.25, 1.0)}
        return self._choose(unseen, count)

    def choice(self, count: int) -> int:
        """A number in [0, count): which object is meant, and named."""
        return (int(self.rng.integers(count)) + self._wrong_object) % count

    def distinct(self, count: int, of: int) -> list[int]:
        """`count` different numbers in [0, of), in random order: which objects are meant, and named."""
        return [(i + self._wrong_object) % of for i in self.rng.permutation(of)[:count].tolist()]

    def sentence(self, templates: Sequence[str], ood_templates: Sequence[str], **slots: str | Sequence[str]) -> str:
        """A sentence from `templates`, or from `ood_templates` if sentences are shifted."""
        unseen = "sentences" in self.shifted or self._paraphrase > 1
        said = sentence(self.rng, ood_templates if unseen else templates, **slots)
        return framed(said) if self._paraphrase > 2 else said

    def _choose(self, palette: Mapping[str, Rgba], count: int) -> dict[str, Rgba]:
        if count > len(palette):
            raise ValueError(f"{count} colours asked for, there are {len(palette)}: {', '.join(palette)}")
        names = list(palette)
        return {names[i]: palette[names[i]] for i in self.rng.permutation(len(names))[:count].tolist()}


def free_points(
    rng: np.random.Generator,
    regions: Mapping[str, Region],
    taken: Sequence[tuple[float, float]],
    clearance: float,
    spacing: float,
) -> dict[str, Pose]:
    """A pose in its region for each name, `clearance` m from all points of `taken` and `spacing` m from each other.
    Raises ValueError where they do not fit."""
    for _ in range(50):  # restarts: bad first points can make the rest impossible
        poses: dict[str, Pose] = {}
        for name, region in regions.items():
            for x, y in rng.uniform((region.x[0], region.y[0]), (region.x[1], region.y[1]), (200, 2)).tolist():
                near = any(math.hypot(x - a, y - b) < clearance for a, b in taken)
                if not near and all(math.hypot(x - p.x, y - p.y) >= spacing for p in poses.values()):
                    poses[name] = Pose(x, y)
                    break
        if len(poses) == len(regions):
            return poses
    raise ValueError(f"free_points: {len(regions)} objects do not fit into {set(regions.values())} beside {taken}")


# -------------------------------------------------------------------------------------------------- judging a state
@dataclass(frozen=True)
class TaskStatus:
    """How the environments stand. `success`, `failure`: bool [N]; either ends an episode. `progress`: float [N], about
    0 at the start and 1 at success; the dense reward is its change. `variables`: new values of task variables that the
    task keeps over time (a sub-goal reached), by name; the environment stores them where it is active. `stages`:
    bool [N, S], which of the task's `stage_names` hold now; None for a task without."""

    success: Tensor
    failure: Tensor
    progress: Tensor
    variables: Mapping[str, Tensor] = field(default_factory=dict)
    stages: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Waypoints of all phases of the scripted expert, evaluated for the current state.

    `targets [N, P, 3]` m: where the fingertip should go in each of P phases. `openings [N, P]`: gripper action, -1
    closed, +1 open. `done`: bool [N, P], whether a phase's goal is reached now. `yaws [N, P]`: rad, or None for 0.
    `dwell [P]`: the least number of control steps a phase lasts (time for the jaws), or None for 0.
    `lost`: bool [N, P], whether a phase cannot succeed any more (the block slipped), so that the expert starts over.
    `speeds [P]`: the largest motion action of a phase, in (0, 1] (to carry with care), or None for 1.
    """

    targets: Tensor
    openings: Tensor
    done: Tensor
    yaws: Tensor | None = None
    dwell: Sequence[int] | None = None
    lost: Tensor | None = None
    speeds: Sequence[float] | None = None


class Task(Protocol):
    """A language task on the table. Everything but `sample` is batched torch code that never asks for a number back
    from the device.

    `name` is its key; `max_episode_steps` counts control steps; `goal_names` names the columns of `goal`. A task may
    also have `stage_names` (str, in the order of the way to success; see `TaskStatus.stages`) and `clutter_regions`
    (where a test may put more objects without blocking the way; see `sim/shift.py`).
    """

    name: str
    max_episode_steps: int
    goal_names: tuple[str, ...]

    def assets(self) -> Sequence[Asset]: ...

    def sample(self, draw: Draw) -> EpisodeStart:
        """The start of an episode, all random choices through `draw`."""
        ...

    def evaluate(self, view: SceneView, variables: Mapping[str, Tensor]) -> TaskStatus: ...

    def goal(self, view: SceneView, variables: Mapping[str, Tensor]) -> Tensor:
        """What the sentence says, in numbers: [N, len(goal_names)], for state-only policies and critics."""
        ...

    def plan(self, view: SceneView, variables: Mapping[str, Tensor]) -> Plan:
        """Waypoints for the scripted expert."""
        ...


TASKS: dict[str, Task] = {}
TaskClass = TypeVar("TaskClass", bound=type)


def register_task(cls: TaskClass) -> TaskClass:
    """Class decorator: makes `cls()` available by its name. Raises ValueError where the name is taken."""
    task = cls()
    if task.name in TASKS and type(TASKS[task.name]).__qualname__ != cls.__qualname__:
        raise ValueError(f"register_task: the name {task.name!r} is taken by {type(TASKS[task.name]).__name__}")
    TASKS[task.name] = task
    return cls


def get_task(task: str | Task) -> Task:
    """A task by name, or the given one. Raises ValueError for an unknown name."""
    if not isinstance(task, str):
        return task
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; there are {', '.join(sorted(TASKS))} (see sim/tasks/base.py)")
    return TASKS[task]


def falling(distance: Tensor, scale: float) -> Tensor:
    """A smooth score in (0, 1]: 1 at distance 0, `1 - tanh(1)` = 0.24 at `scale` m. For `progress`."""
    return 1.0 - torch.tanh(distance / scale)


__all__ = [
    "OOD_AXES", "SPLITS", "TASKS", "Draw", "EpisodeStart", "Plan", "Pose", "Region", "Task", "TaskStatus", "falling",
    "free_points", "get_task", "register_task", "ring",
]  # fmt: skip
