"""Point maze: a point among walls, reward 1 at the goal and 0 elsewhere. The smallest sparse task that needs a detour.

The maze fills the square [-1, 1]^2. A step of action a moves the point by 0.1 a, first along x, then along y; a
component that would enter a wall stops at its face, so the point slides along walls and never passes through one.
Reaching the goal terminates with success; the time limit truncates, and the state does not show the time.

`start` decides where episodes begin: "broad" anywhere outside of the goal's cells, "far" in cells at the other end of
the maze. Offline data with broad starts and online episodes with far ones differ in what they visit, as a robot's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import ActionSpec, EnvSpec, Observation
from vla_rl.data.episodes import StateEpisode
from vla_rl.envs.perturbed import simulator_of
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.protocols import StepOutcome

STEP_LENGTH = 0.1
GOAL_RADIUS = 0.1
STARTS = ("broad", "far")
SPLITS = ("train", "test")
# '#' wall, '.' free, 'G' the goal's cells, 'F' where far episodes begin; the border is wall
LAYOUTS = {
    "wall_gap": (
        "###########",
        "#....#....#",
        "#.........#",
        "#.........#",
        "#....#....#",
        "#....#....#",
        "#....#....#",
        "#....#....#",
        "#FF..#...G#",
        "#FF..#...G#",
        "###########",
    ),
    "umaze": (
        "#######",
        "#FF...#",
        "#.....#",
        "#####.#",
        "#.....#",
        "#G....#",
        "#######",
    ),
    "medium": (
        "#########",
        "#FF.#...#",
        "#F#.#.#.#",
        "#.#...#.#",
        "#.###.#.#",
        "#...#.#.#",
        "###.#.#.#",
        "#.....#G#",
        "#########",
    ),
}
# Share of scripted episodes with a detour that leaves about two in three episodes successful in 60 steps
_DETOUR_CHANCE = {"wall_gap": 0.7, "umaze": 0.7, "medium": 0.3}
_MAX_DETOURS = 4
_INSTRUCTION = "reach the goal"
_WALL_MARGIN = 1e-3
_PICTURE = 64
_TEST_STREAM, _BEHAVIOUR_STREAM = 0x7E57, 0xBE


@dataclass(frozen=True)
class Maze:
    """A layout as arrays over its R x R cells, numbered row by row from the upper left.

    `free`, `goal`, `far`: bool [R, R]. `centres`: float32 [R*R, 2], x to the right and y up. `next_cell`: int64
    [R*R, R*R], the cell that follows `cell` on a shortest way to `target`, at `[target, cell]`.
    """

    size: int
    free: Tensor
    goal: Tensor
    far: Tensor
    centres: Tensor
    next_cell: Tensor

    @property
    def cell_width(self) -> float:
        return 2.0 / self.size

    def cell(self, position: Tensor) -> Tensor:
        """Number (int64 [...]) of the cell that holds `position` [..., 2]."""
        column = ((position[..., 0] + 1.0) / self.cell_width).floor().long().clamp(0, self.size - 1)
        row = ((1.0 - position[..., 1]) / self.cell_width).floor().long().clamp(0, self.size - 1)
        return row * self.size + column

    def is_free(self, position: Tensor) -> Tensor:
        """bool [...] for `position` [..., 2]."""
        return self.free.flatten()[self.cell(position)]

    def move(self, position: Tensor, displacement: Tensor) -> Tensor:
        """`position` [N, 2] after `displacement` [N, 2], shorter than a cell: along x, then along y, up to a wall."""
        for axis in (0, 1):
            moved = position.clone()
            moved[:, axis] += displacement[:, axis]
            cell_centre = self.centres[self.cell(position), axis]
            stop = self.cell_width / 2 - _WALL_MARGIN
            at_face = position.clone()
            at_face[:, axis] = cell_centre + stop * displacement[:, axis].sign()
            position = torch.where(self.is_free(moved)[:, None], moved, at_face)
        return position


@cache
def load_maze(layout: str) -> Maze:
    """The maze of that name. Raises ValueError for an unknown one."""
    if layout not in LAYOUTS:
        raise ValueError(f"point maze: no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    cells = np.array([list(row) for row in LAYOUTS[layout]])
    size = len(cells)
    free = cells != "#"
    assert cells.shape == (size, size), f"{layout} is not square"
    assert free.sum() == free[1:-1, 1:-1].sum(), f"{layout} has an open border"
    assert 2.0 / size > STEP_LENGTH, f"{layout}: a step could jump over a cell"
    axis = (torch.arange(size) + 0.5) * (2.0 / size) - 1.0
    centres = torch.stack(torch.meshgrid(-axis, axis, indexing="ij")[::-1], dim=-1).flatten(0, 1)
    return Maze(
        size=size,
        free=torch.from_numpy(free),
        goal=torch.from_numpy(cells == "G"),
        far=torch.from_numpy(cells == "F"),
        centres=centres,
        next_cell=torch.from_numpy(_next_cells(free)),
    )


def _next_cells(free: np.ndarray) -> np.ndarray:
    """Shortest ways between all free cells over eight neighbours, never cutting a wall's corner (Floyd-Warshall)."""
    size = len(free)
    num = size * size
    distance = np.full((num, num), np.inf)
    for row, column in np.argwhere(free):
        here = row * size + column
        distance[here, here] = 0.0
        for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            if free[row + dr, column] and free[row, column + dc] and free[row + dr, column + dc]:
                distance[here, (row + dr) * size + column + dc] = np.hypot(dr, dc)
    neighbour = np.where(distance > 0, distance, np.inf)
    for via in range(num):
        distance = np.minimum(distance, distance[:, via, None] + distance[None, via])
    ways = neighbour[:, :, None] + distance[None]  # [cell, neighbour, target]
    following = ways.argmin(axis=1).T
    following[np.arange(num), np.arange(num)] = np.arange(num)
    return following


class PointMazeEnv:
    """A `StepEnv`. State [N, 4]: position x, y and goal x, y. A seed means another start and goal in each split."""

    def __init__(
        self,
        num_envs: int,
        layout: str = "wall_gap",
        start: str = "broad",
        max_episode_steps: int = 60,
        split: str = "train",
    ) -> None:
        for name, value, known in (("start", start, STARTS), ("split", split, SPLITS)):
            if value not in known:
                raise ValueError(f"point maze: {name} must be one of {', '.join(known)}, got {value!r}")
        self.num_envs = num_envs
        self.maze = load_maze(layout)
        self.spec = EnvSpec(
            name=f"point_maze/{layout}",
            cameras={},
            state_names=("x", "y", "goal_x", "goal_y"),
            action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0), names=("dx", "dy")),
            max_episode_steps=max_episode_steps,
            control_hz=20.0,
        )
        begin = self.maze.far if start == "far" else self.maze.free & ~self.maze.goal
        self._start_cells = begin.flatten().nonzero().flatten()
        self._goal_cells = self.maze.goal.flatten().nonzero().flatten()
        self._position = torch.zeros(num_envs, 2)
        self._goal = torch.zeros(num_envs, 2)
        self._streams = () if split == "train" else (_TEST_STREAM,)
        self.seeds = torch.zeros(num_envs, dtype=torch.int64)
        self.episode_steps = torch.zeros(num_envs, dtype=torch.int64)

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        """Start and goal are uniform over the middle 80 % of one of their cells."""
        rngs = [np.random.default_rng([*self._streams, int(s)]) for s in seeds]
        draws = torch.from_numpy(np.array([rng.random(6) for rng in rngs], dtype=np.float32).reshape(-1, 6))
        self.seeds[env_ids], self.episode_steps[env_ids] = seeds, 0
        self._position[env_ids] = self._point_in(self._start_cells, draws[:, :3])
        self._goal[env_ids] = self._point_in(self._goal_cells, draws[:, 3:])

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        moved = self.maze.move(self._position, STEP_LENGTH * self.spec.action.clamp(actions))
        self._position = torch.where(active[:, None], moved, self._position)
        self.episode_steps += active
        success = (self._position - self._goal).norm(dim=1) < GOAL_RADIUS
        return StepOutcome(
            reward=success.float(), terminated=success, truncated=torch.zeros_like(success), success=success
        )

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        """`images` makes no difference: the task has no camera."""
        del images
        state = torch.cat([self._position[env_ids], self._goal[env_ids]], dim=1)
        return Observation({}, state, (_INSTRUCTION,) * len(env_ids))

    def render(self, env_ids: Tensor) -> Tensor:
        """uint8 [M, 64, 64, 3]: walls grey, goal green, point red; y points up."""
        axis = (torch.arange(_PICTURE) + 0.5) * (2.0 / _PICTURE) - 1.0
        pixel = torch.stack(torch.meshgrid(-axis, axis, indexing="ij")[::-1], dim=-1)
        picture = torch.full((len(env_ids), _PICTURE, _PICTURE, 3), 255, dtype=torch.uint8)
        picture[:, ~self.maze.is_free(pixel)] = torch.tensor((150, 150, 150), dtype=torch.uint8)
        for centre, radius, colour in (
            (self._goal[env_ids], GOAL_RADIUS, (40, 160, 60)),
            (self._position[env_ids], 0.05, (200, 40, 40)),
        ):
            inside = (pixel - centre[:, None, None]).norm(dim=-1) < radius
            picture[inside] = torch.tensor(colour, dtype=torch.uint8)
        return picture

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self._position.clone(),
            "goal": self._goal.clone(),
            "seeds": self.seeds.clone(),
            "episode_steps": self.episode_steps.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._position, self._goal = state["position"].clone(), state["goal"].clone()
        self.seeds, self.episode_steps = state["seeds"].clone(), state["episode_steps"].clone()

    def close(self) -> None:
        """Nothing to close."""

    def _point_in(self, cells: Tensor, draws: Tensor) -> Tensor:
        """A point of one of `cells`; `draws` [M, 3] in [0, 1): which cell, then x and y within it."""
        index = (draws[:, 0] * len(cells)).long().clamp(max=len(cells) - 1)
        return self.maze.centres[cells[index]] + 0.8 * self.maze.cell_width * (draws[:, 1:] - 0.5)


def make_point_maze(
    num_envs: int,
    layout: str = "wall_gap",
    *,
    start: str = "broad",
    max_episode_steps: int = 60,
    split: str = "train",
    auto_reset: bool = True,
) -> ChunkedEnv:
    """`layout`: a name in `LAYOUTS`. `start`: "broad" or "far". `split`: "train" or "test"."""
    return ChunkedEnv(PointMazeEnv(num_envs, layout, start, max_episode_steps, split), auto_reset=auto_reset)


# ------------------------------------------------------------------------------------------------ scripted behaviour
def waypoint_actions(maze: Maze, position: Tensor, target: Tensor) -> Tensor:
    """Full speed along a shortest way through the cells' centres: float32 [N, 2] in [-1, 1] for `position` and
    `target` [N, 2]. Never runs into a wall."""
    here, there = maze.cell(position), maze.cell(target)
    waypoint = torch.where((here == there)[:, None], target, maze.centres[maze.next_cell[there, here]])
    delta = (waypoint - position) / STEP_LENGTH
    return delta / delta.abs().amax(dim=1, keepdim=True).clamp(min=1.0)


@dataclass(frozen=True)
class WaypointConfig:
    """How the scripted behaviour deviates from a shortest way at full speed; the defaults are the expert at its best.

    `noise`: standard deviation of what is added to every action. `detour_chance`: of an episode with one to four random
    cells to visit before the goal (None: the layout's, which leaves about two in three episodes successful in 60 steps
    with `noise` 0.5). `min_speed`: each episode has a speed from there to 1.
    """

    noise: float = 0.0
    detour_chance: float | None = 0.0
    min_speed: float = 1.0

    def __post_init__(self) -> None:
        if self.noise < 0.0 or not 0.0 < self.min_speed <= 1.0 or not 0.0 <= (self.detour_chance or 0.0) <= 1.0:
            raise ValueError(
                f"WaypointConfig needs noise >= 0, detour_chance in [0, 1] and min_speed in (0, 1], got {self}"
            )


BROAD_BEHAVIOUR = WaypointConfig(noise=0.5, detour_chance=None, min_speed=0.5)


class WaypointExpert:
    """Acts in a point maze. An episode's speed, detours and noise follow from its seed, whatever runs beside it."""

    def __init__(self, env: ChunkedEnv | PointMazeEnv, config: WaypointConfig | None = None) -> None:
        inner = simulator_of(env.step_env) if isinstance(env, ChunkedEnv) else env
        if not isinstance(inner, PointMazeEnv):
            raise TypeError(f"WaypointExpert acts in point mazes, not in {type(inner).__name__}")
        self._env, config = inner, config or WaypointConfig()
        if config.detour_chance is None:
            config = replace(config, detour_chance=_DETOUR_CHANCE[inner.spec.name.rpartition("/")[2]])
        self.config, n = config, inner.num_envs
        self._free = inner.maze.free.flatten().nonzero().flatten()
        self._speed = torch.ones(n, 1)
        self._detours = torch.zeros(n, _MAX_DETOURS, 2)
        self._leg = torch.full((n,), _MAX_DETOURS)  # the next detour; the last is followed by the goal
        self._noise = torch.zeros(n, inner.spec.max_episode_steps or 0, 2)

    def __call__(self) -> Tensor:
        """A chunk of one action, float32 [N, 1, 2]."""
        env, rows = self._env, torch.arange(self._env.num_envs)
        for i in (env.episode_steps == 0).nonzero().flatten().tolist():
            self._begin(i)
        position, goal = env.observe(rows, False).state.split(2, dim=1)
        self._leg += self._arrived(position)
        target = torch.cat([self._detours, goal[:, None]], dim=1)[rows, self._leg]
        step = env.episode_steps.clamp(max=self._noise.shape[1] - 1)
        action = self._speed * waypoint_actions(env.maze, position, target) + self._noise[rows, step]
        return env.spec.action.clamp(action)[:, None]

    def _arrived(self, position: Tensor) -> Tensor:
        """bool [N]: at the detour that is being made."""
        at = self._leg.clamp(max=_MAX_DETOURS - 1)
        distance = (position - self._detours[torch.arange(len(at)), at]).norm(dim=1)
        return (self._leg < _MAX_DETOURS) & (distance < self._env.maze.cell_width / 2) & (self._env.episode_steps > 0)

    def _begin(self, i: int) -> None:
        config, rng = self.config, np.random.default_rng([_BEHAVIOUR_STREAM, int(self._env.seeds[i])])
        self._speed[i] = config.min_speed + (1.0 - config.min_speed) * rng.random()
        cells = self._free[torch.from_numpy(rng.integers(len(self._free), size=_MAX_DETOURS))]
        self._detours[i] = self._env.maze.centres[cells]
        num_detours = int(rng.integers(1, _MAX_DETOURS + 1))
        self._leg[i] = _MAX_DETOURS - num_detours * (rng.random() < (config.detour_chance or 0.0))
        self._noise[i] = torch.from_numpy(config.noise * rng.standard_normal(self._noise.shape[1:]))


def waypoint_episodes(
    layout: str,
    num_episodes: int,
    seed: int,
    noise: float = 0.5,
    *,
    start: str = "broad",
    detour_chance: float | None = None,
    max_episode_steps: int = 60,
) -> list[StateEpisode]:
    """Broad behaviour of mixed quality (`BROAD_BEHAVIOUR`) without a dataset's files; failures are kept."""
    env = PointMazeEnv(num_episodes, layout, start, max_episode_steps)
    expert = WaypointExpert(env, replace(BROAD_BEHAVIOUR, noise=noise, detour_chance=detour_chance))
    ids = torch.arange(num_episodes)
    env.reset(ids, torch.randint(2**62, (num_episodes,), generator=torch.Generator().manual_seed(seed)))
    states, actions, rewards = [env.observe(ids, False).state], [], []
    terminated = torch.zeros(num_episodes, dtype=torch.bool)
    length = torch.zeros(num_episodes, dtype=torch.int64)
    for _ in range(max_episode_steps):
        action = expert()[:, 0]
        outcome = env.step(action, ~terminated)
        length += ~terminated
        terminated |= outcome.terminated
        states.append(env.observe(ids, False).state)
        actions.append(action)
        rewards.append(outcome.reward)
    all_states, all_actions = torch.stack(states, dim=1).numpy(), torch.stack(actions, dim=1).numpy()
    all_rewards = torch.stack(rewards, dim=1).numpy()
    return [
        StateEpisode(
            all_states[i, : t + 1].copy(), all_actions[i, :t].copy(), all_rewards[i, :t].copy(), done, not done
        )
        for i, (t, done) in enumerate(zip(length.tolist(), terminated.tolist(), strict=True))
    ]
