"""Play data of OGBench's cube tasks, made here: a scripted arm moves cubes to random places, for no task at all.

The `ogbench` wheel has the environments and the scripted oracle, not the data. Following the published recipe, an
episode is 1000 steps; whenever the oracle is done with a cube it gets a new target. Its plan carries temporally
correlated noise (scale 0.1, smoothing 0.5). A target lies on top of another cube with a chance that is drawn once an
episode: 0 with one cube, U(0, 0.25) with two, U(0.05, 0.35) with three.

    python -m vla_rl.data.ogbench_play --env cube-double --num-episodes 300 --path runs/ogbench/cube-double-play.npz

The file has the layout that `ogbench.load_dataset` reads: `observations` [E * (T + 1), S], `actions` [.., 5],
`terminals`, `qpos`, `qvel`, all float32, with T + 1 rows an episode; `terminals` is 1 at the last row, whose action is
zeros and means nothing. Besides these there are `segments` int32 [E, 2] (targets set, targets reached) and `config`.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.episodes import StateEpisode

STACK_CHANCE = {"cube-single": (0.0, 0.0), "cube-double": (0.0, 0.25), "cube-triple": (0.05, 0.35)}
_PER_ROW = ("observations", "actions", "terminals", "qpos", "qvel")


@dataclass(frozen=True)
class PlayConfig:
    """What decides the data. `env`: a key of `STACK_CHANCE`. `noise`, `noise_smoothing`: of the oracle's plan."""

    env: str = "cube-single"
    num_episodes: int = 200
    episode_steps: int = 1000
    seed: int = 0
    noise: float = 0.1
    noise_smoothing: float = 0.5

    def __post_init__(self) -> None:
        if self.env not in STACK_CHANCE:
            raise ValueError(f"PlayConfig: no play data for env {self.env!r}; choose one of {', '.join(STACK_CHANCE)}")
        if self.num_episodes < 1 or self.episode_steps < 1:
            raise ValueError(
                f"PlayConfig: num_episodes and episode_steps must be positive, got {self.num_episodes} "
                f"and {self.episode_steps}"
            )


@dataclass(frozen=True)
class PlaySummary:
    """`num_steps` in the file; `steps_per_second` of what this call made (0 where all was there already)."""

    num_steps: int
    num_targets: int
    num_reached: int
    steps_per_second: float


# ---------------------------------------------------------------------------------------------------------- one episode
def require_ogbench() -> None:
    """Raises RuntimeError, with what to install, where OGBench is missing."""
    if importlib.util.find_spec("ogbench") is None:
        raise RuntimeError("OGBench is not installed; pip install 'vla-rl[ogbench]'")
    os.environ.setdefault("MUJOCO_GL", "egl")  # its import looks for a window system otherwise


@cache
def _collection_env(name: str) -> Any:
    require_ogbench()
    from ogbench.manipspace.envs.cube_env import CubeEnv  # pyright: ignore[reportMissingImports]

    kind = name.removeprefix("cube-")
    return CubeEnv(env_type=kind, mode="data_collection", terminate_at_goal=False, visualize_info=False)


def play_episode(config: PlayConfig, episode: int) -> dict[str, np.ndarray]:
    """The arrays of one episode, float32 with T + 1 rows, and `segments` int32 [2]. It depends on `config` and
    `episode` alone."""
    draws = np.random.default_rng([config.seed, episode])
    stack_chance = float(draws.uniform(*STACK_CHANCE[config.env]))
    env_seed, oracle_seed = (int(s) for s in draws.integers(2**31, size=2))
    outer = np.random.get_state()  # noqa: NPY002 (the oracle draws from numpy's global generator)
    np.random.seed(oracle_seed)  # noqa: NPY002
    try:
        return _play(config, env_seed, stack_chance)
    finally:
        np.random.set_state(outer)  # noqa: NPY002


def _play(config: PlayConfig, seed: int, stack_chance: float) -> dict[str, np.ndarray]:
    env = _collection_env(config.env)
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle  # pyright: ignore[reportMissingImports]

    oracle = CubePlanOracle(env=env, noise=config.noise, noise_smoothing=config.noise_smoothing)
    env.reset(seed=seed)
    obs, info = env.set_new_target(p_stack=stack_chance)
    oracle.reset(obs, info)
    rows: dict[str, list[Any]] = {name: [] for name in _PER_ROW}
    reached: list[bool] = []
    for step in range(config.episode_steps + 1):
        last = step == config.episode_steps
        action = np.zeros(5) if last else np.clip(oracle.select_action(obs, info), -1.0, 1.0)
        row = (obs, action, float(last), info["qpos"], info["qvel"])
        for name, value in zip(_PER_ROW, row, strict=True):
            rows[name].append(np.asarray(value, np.float32))
        if last:
            break
        obs, _, _, _, info = env.step(rows["actions"][-1])
        if oracle.done:
            reached.append(bool(info["success"]))
            obs, info = env.set_new_target(p_stack=stack_chance)
            oracle.reset(obs, info)
    arrays = {name: np.stack(values) for name, values in rows.items()}
    return arrays | {"segments": np.array([len(reached), sum(reached)], np.int32)}


# --------------------------------------------------------------------------------------------------------- many of them
def generate_play(
    config: PlayConfig,
    path: str | Path,
    num_processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> PlaySummary:
    """Make the data set at `path` (.npz). Episodes are kept beside it, in `<path>.parts`, until all are there, so an
    interrupted call goes on from where it stopped; a finished file is left as it is.

    `progress` is called with the number of episodes that are there and of all. Raises ValueError where the file or its
    parts were made with another `config`, RuntimeError where OGBench is missing.
    """
    path = Path(path)
    require_ogbench()
    if path.exists():
        with np.load(path) as file:
            _check_config(config, str(file["config"]), path)
            return _summary(config, file["segments"], 0.0)
    parts = path.with_name(path.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    if (parts / "config.json").exists():
        _check_config(config, (parts / "config.json").read_text(encoding="utf-8"), parts)
    else:
        _replace(parts / "config.json", lambda file: file.write(_config_text(config).encode()))
    missing = [e for e in range(config.num_episodes) if not _part(parts, e).exists()]
    began = time.monotonic()
    for done in _made(config, parts, missing, num_processes):
        if progress is not None:
            progress(config.num_episodes - len(missing) + done, config.num_episodes)
    seconds = time.monotonic() - began
    segments = _merge(config, parts, path)
    shutil.rmtree(parts)
    return _summary(config, segments, len(missing) * config.episode_steps / seconds if missing else 0.0)


def _made(config: PlayConfig, parts: Path, missing: list[int], num_processes: int) -> Iterator[int]:
    """Counts episodes as they are made."""
    make = partial(_make_part, config, parts)
    if num_processes == 1:
        for done, episode in enumerate(missing, start=1):
            make(episode)
            yield done
        return
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from (done for done, _ in enumerate(pool.map(make, missing), start=1))


def _make_part(config: PlayConfig, parts: Path, episode: int) -> None:
    arrays: dict[str, Any] = play_episode(config, episode)
    _replace(_part(parts, episode), lambda file: np.savez(file, **arrays))


def _part(parts: Path, episode: int) -> Path:
    return parts / f"episode_{episode:06d}.npz"


def _merge(config: PlayConfig, parts: Path, path: Path) -> np.ndarray:
    episodes = []
    for episode in range(config.num_episodes):
        with np.load(_part(parts, episode)) as file:
            episodes.append(dict(file))
    arrays: dict[str, Any] = {name: np.concatenate([e[name] for e in episodes]) for name in _PER_ROW}
    segments = np.stack([e["segments"] for e in episodes])
    config_text = np.array(_config_text(config))
    _replace(path, lambda file: np.savez(file, segments=segments, config=config_text, **arrays))
    return segments


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file so that a kill at any moment leaves no half of it under its name."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "wb") as file:
        write(file)
    os.replace(unfinished, path)


def _config_text(config: PlayConfig) -> str:
    return json.dumps(asdict(config))


def _check_config(config: PlayConfig, found: str, where: Path) -> None:
    if json.loads(found) != asdict(config):
        raise ValueError(f"{where} was made with {found}, asked for {_config_text(config)}; give another path")


def _summary(config: PlayConfig, segments: np.ndarray, steps_per_second: float) -> PlaySummary:
    targets, reached = (int(n) for n in segments.sum(axis=0))
    return PlaySummary(config.num_episodes * config.episode_steps, targets, reached, steps_per_second)


# ---------------------------------------------------------------------------------------------------- for a single task
def singletask_dataset(path: str | Path, name: str) -> dict[str, np.ndarray]:
    """Transitions of the play data at `path` with the rewards of the single-task environment `name`, such as
    "cube-double-singletask-task2-v0", computed by OGBench's own code.

    Returns `observations`, `next_observations`, `actions`, `rewards` (minus the number of cubes out of place in the
    observation), `masks` (0 where the task is solved in the observation) and `terminals` (1 at the last transition of a
    play episode), each float32 with E * T rows. Raises ValueError where the data is of another environment.
    """
    require_ogbench()
    import gymnasium
    import ogbench  # pyright: ignore[reportMissingImports]
    from ogbench.relabel_utils import relabel_dataset  # pyright: ignore[reportMissingImports]

    with np.load(path) as file:
        made_for = json.loads(str(file["config"]))["env"]
    if not name.startswith(f"{made_for}-singletask"):
        raise ValueError(f"{path} is play data of {made_for}; {name!r} is not one of its single tasks")
    env = gymnasium.make(name, disable_env_checker=True)
    dataset = ogbench.load_dataset(str(path), add_info=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered", category=UserWarning)  # OGBench's own spaces
        relabel_dataset(name, env, dataset)
    env.close()
    kept = ("observations", "next_observations", "actions", "rewards", "masks", "terminals")
    return {key: dataset[key] for key in kept}


def cut_episodes(dataset: dict[str, np.ndarray]) -> list[StateEpisode]:
    """Play data goes on after a task is solved; an episode of the task does not. Cut it there.

    Each solved step (`masks` 0) ends an episode by termination, as it does in the environment; the end of a play
    episode truncates. What follows a solved step begins another episode.
    """
    solved, last = dataset["masks"] == 0.0, dataset["terminals"] == 1.0
    ends = np.flatnonzero(solved | last) + 1
    starts = np.concatenate([[0], ends[:-1]])
    episodes = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        states = np.concatenate([dataset["observations"][start:end], dataset["next_observations"][end - 1 : end]])
        terminated = bool(solved[end - 1])
        rows = slice(start, end)
        episodes.append(
            StateEpisode(states, dataset["actions"][rows], dataset["rewards"][rows], terminated, not terminated)
        )
    return episodes


def main(config: PlayConfig, path: Path, num_processes: int = 1) -> None:
    """Make or finish a data set of OGBench play data."""
    began = time.monotonic()

    def report(done: int, of: int) -> None:
        print(f"episode {done}/{of}, {time.monotonic() - began:.0f} s", flush=True)

    print(generate_play(config, path, num_processes, report))


if __name__ == "__main__":
    import tyro

    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
