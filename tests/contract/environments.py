"""Every environment of the project, for the contract suite. Whoever adds an environment adds it here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from tests.contract.gym_env import make_drift
from tests.contract.robot_env import make_robots
from tests.contract.scripted_env import ScriptedEnv
from vla_rl.envs import install
from vla_rl.envs.gym import GymStepEnv
from vla_rl.envs.libero import LiberoConfig
from vla_rl.envs.maniskill import ManiSkillConfig
from vla_rl.envs.metaworld import MetaworldConfig
from vla_rl.envs.ogbench import make_ogbench
from vla_rl.envs.perturbed import Perturbation, PerturbedEnv
from vla_rl.envs.point_maze import PointMazeEnv
from vla_rl.envs.remote import HostConfig, RemoteStepEnv
from vla_rl.envs.robosuite import RobosuiteConfig
from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.envs.task_mix import TaskMixEnv
from vla_rl.envs.two_way_reach import TwoWayReachEnv
from vla_rl.protocols import StepEnv
from vla_rl.sim.shift import SceneShift
from vla_rl.train.curriculum import CurriculumConfig, TaskCurriculum


def _gym(mode: AutoresetMode, vector: Callable[..., VectorEnv] = SyncVectorEnv) -> Callable[[int], StepEnv]:
    def make(num_envs: int) -> StepEnv:
        env = vector([make_drift] * num_envs, autoreset_mode=mode)
        return GymStepEnv(env, success_key="success", instruction="go right")

    return make


def _tabletop(control: str) -> Callable[[int], StepEnv]:
    config = TabletopConfig(
        control=control, cameras={"agent": 32}, reward="dense", privileged_state=True, max_episode_steps=7
    )
    return lambda num_envs: TabletopEnv("reach", num_envs, config)


def _task_mix(num_envs: int) -> StepEnv:
    """Tasks with equal shares whatever succeeds: an episode is then a function of its seed alone."""
    mazes = [PointMazeEnv(num_envs, layout, "far", max_episode_steps=12) for layout in ("wall_gap", "umaze")]
    return TaskMixEnv(mazes, TaskCurriculum(CurriculumConfig(("wall_gap", "umaze"), uniform_share=1.0)))


def _perturbed(num_envs: int) -> StepEnv:
    """All that a test can do to any simulator, over the tabletop with a shift of each part that draws."""
    shift = SceneShift(position=2, distractors=1, color=2, physics=2)
    inner = TabletopEnv("pick", num_envs, TabletopConfig(cameras={"agent": 32}, shift=shift, max_episode_steps=7))
    noise = Perturbation(pixel_noise=20.0, state_noise=0.01, action_delay=2, open_gripper=1.0, paraphrase=3)
    return PerturbedEnv(inner, noise)


DRIFT_HOST = Path(__file__).with_name("drift_host.py")

ENVIRONMENTS: dict[str, Callable[[int], StepEnv]] = {
    "scripted": lambda n: ScriptedEnv(n, max_episode_steps=6),
    "gym_disabled": _gym(AutoresetMode.DISABLED),
    "gym_next_step": _gym(AutoresetMode.NEXT_STEP),
    "gym_same_step": _gym(AutoresetMode.SAME_STEP),
    "gym_async": _gym(AutoresetMode.SAME_STEP, partial(AsyncVectorEnv, context="forkserver")),
    "tabletop": _tabletop("ee_delta_yaw"),
    "tabletop_joint": _tabletop("joint_delta"),
    "two_way_reach": TwoWayReachEnv,
    "ogbench": lambda n: make_ogbench("cube-single-singletask-task1-v0", n, max_episode_steps=13).step_env,
    "point_maze": lambda n: PointMazeEnv(n, "wall_gap", "far", max_episode_steps=12),
    "task_mix": _task_mix,
    "robot": make_robots,
    "perturbed": _perturbed,
    "remote": lambda n: RemoteStepEnv(HostConfig(sys.executable, DRIFT_HOST), n, num_workers=2),
}
SLOW = {"ogbench"}  # half a second to make one


def _simulators() -> dict[str, Any]:
    """Of those that have an environment of their own, what is installed; LIBERO wants its scene assets too."""
    configs: dict[str, Any] = {
        "robosuite": RobosuiteConfig("Lift", cameras=(), max_episode_steps=13),
        "libero": LiberoConfig("libero_object/0", cameras=(), max_episode_steps=13, settle_steps=2),
        "metaworld": MetaworldConfig("reach-v3", cameras=(), max_episode_steps=13),
        "maniskill": ManiSkillConfig("PushCube-v1", cameras=(), max_episode_steps=13),
    }
    if "VLA_RL_LIBERO_ASSETS" not in os.environ:
        del configs["libero"]
    return {name: config for name, config in configs.items() if install.is_installed(name)}


for _name, _config in _simulators().items():
    ENVIRONMENTS[_name] = lambda n, config=_config: config.make(n, split="train").step_env
