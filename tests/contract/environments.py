"""Every environment of the project, for the contract suite. Whoever adds an environment adds it here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from tests.contract.gym_env import make_drift
from tests.contract.scripted_env import ScriptedEnv
from vla_rl.envs import install
from vla_rl.envs.gym import GymStepEnv
from vla_rl.envs.maniskill import ManiSkillConfig
from vla_rl.envs.ogbench import make_ogbench
from vla_rl.envs.point_maze import PointMazeEnv
from vla_rl.envs.remote import HostConfig, RemoteStepEnv
from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.envs.two_way_reach import TwoWayReachEnv
from vla_rl.protocols import StepEnv


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
    "remote": lambda n: RemoteStepEnv(HostConfig(sys.executable, DRIFT_HOST), n, num_workers=2),
}
SLOW = {"ogbench"}  # half a second to make one
if install.is_installed("maniskill"):
    blind = ManiSkillConfig(task="PushCube-v1", cameras=(), max_episode_steps=13)
    ENVIRONMENTS["maniskill"] = lambda n: blind.make(n, split="train").step_env
    SLOW.add("maniskill")
