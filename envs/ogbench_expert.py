"""OGBench's plan oracle as an expert in the cube tasks: it solves the task, or plays without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.envs.gym import GymStepEnv
from vla_rl.envs.perturbed import simulator_of
from vla_rl.envs.vector import ChunkedEnv


@dataclass(frozen=True)
class CubeOracleConfig:
    """`play`: move cubes to random places on the table, one after another, as in OGBench's play data, instead of where
    the task wants them. `noise`, `noise_smoothing`: of the plan, OGBench's are 0.1 and 0.5."""

    play: bool = False
    noise: float = 0.0
    noise_smoothing: float = 0.5


class CubeOracle:
    """Acts in OGBench's cube tasks (`make_ogbench`); what it does follows from the episode's seed.

    Raises TypeError for other environments.
    """

    def __init__(self, env: ChunkedEnv, config: CubeOracleConfig) -> None:
        inner = simulator_of(env.step_env)
        if not isinstance(inner, GymStepEnv) or not env.spec.name.startswith("cube-"):
            raise TypeError(f"{env.spec.name} is not one of OGBench's cube tasks; its oracle knows only those")
        vector: Any = inner.vector_env
        self._env, self._config = env, config
        self._cubes: list[Any] = [one.unwrapped for one in vector.envs]
        self._oracles = [self._oracle(cubes) for cubes in self._cubes]
        self._draws = [np.random.default_rng(0) for _ in self._cubes]

    def _oracle(self, cubes: Any) -> Any:
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle  # pyright: ignore[reportMissingImports]

        return CubePlanOracle(env=cubes, noise=self._config.noise, noise_smoothing=self._config.noise_smoothing)

    def __call__(self) -> Tensor:
        """Actions [N, 1, 5], zero where an episode has ended."""
        actions = torch.zeros(self._env.num_envs, 1, 5)
        steps = self._env.episode_steps.tolist()
        for i in (~self._env.ended).nonzero().flatten().tolist():
            oracle = self._oracles[i]
            if steps[i] == 0:
                self._draws[i] = np.random.default_rng(self._env.episode_seeds[i])
            if steps[i] == 0 or oracle.done:
                with _numpy_seeded(int(self._draws[i].integers(2**31))):
                    oracle.reset(None, self._cubes[i].compute_ob_info() | self._target(i))
            action = oracle.select_action(None, self._cubes[i].compute_ob_info())
            actions[i, 0] = torch.from_numpy(np.clip(action, -1.0, 1.0)).float()
        return actions

    def _target(self, i: int) -> dict[str, Any]:
        """Which cube goes where next, in the words of OGBench's oracle."""
        cubes, draws = self._cubes[i], self._draws[i]
        if self._config.play:
            block = int(draws.integers(cubes._num_cubes))
            place = np.array([*draws.uniform(*cubes._target_sampling_bounds), 0.02])
            yaw = draws.uniform(0.0, 2 * np.pi)
        else:
            block = int(np.argmin(cubes._compute_successes()))
            place, yaw = cubes._data.mocap_pos[cubes._cube_target_mocap_ids[block]].copy(), 0.0
        return {
            "privileged/target_block": block,
            "privileged/target_block_pos": place,
            "privileged/target_block_yaw": np.array([yaw]),
        }


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """OGBench's oracles draw from numpy's global generator."""
    outer = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(outer)  # noqa: NPY002
