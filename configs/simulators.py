"""Recipes of other people's simulators. All but Gymnasium's want an environment first: `vla-rl env install NAME`.

ManiSkill's are from the state: twenty noisy demonstrations, cloned by a small flow policy that EXPO then edits online.
LIBERO's is the tiny VLA from one camera, which EXPO edits; the others are that VLA and Flow-SDE PPO, sized for two
cores.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vla_rl.configs.demo import demo
from vla_rl.data.replay import ReplayConfig
from vla_rl.envs.config import AnyEnvConfig
from vla_rl.envs.gym import FunctionExpertConfig, GymConfig
from vla_rl.envs.libero import LiberoConfig
from vla_rl.envs.maniskill import ManiSkillConfig
from vla_rl.envs.metaworld import MetaworldConfig
from vla_rl.envs.ogbench import OGBenchConfig
from vla_rl.envs.ogbench_expert import CubeOracleConfig
from vla_rl.envs.remote_expert import RemoteExpertConfig
from vla_rl.envs.robosuite import RobosuiteConfig
from vla_rl.offpolicy.bc_flow import FlowNetConfig
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.edits import EditConfig
from vla_rl.offpolicy.expo import ExpoConfig
from vla_rl.offpolicy.networks import ActorNetConfig
from vla_rl.offpolicy.qc import QCConfig
from vla_rl.onpolicy import PPOConfig
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.train.loop import TrainConfig
from vla_rl.train.offpolicy import OfflineConfig, OffPolicyConfig, OnlineConfig
from vla_rl.train.recipe import DemosConfig, EvalConfig, Recipe
from vla_rl.train.sft import SFTConfig

CHUNK = 4


def _maniskill(task: str, action_noise: float, edit_scale: float, reward: str = "sparse") -> Recipe:
    hidden = (256, 256)
    agent = ExpoConfig(
        num_base=4,
        edit=EditConfig(scale=edit_scale, net=ActorNetConfig(hidden, layer_norm=False), initial_temperature=0.1),
        critic=MLPCriticConfig(4, hidden),
        tau=0.01,
    )
    online = OnlineConfig(
        num_env_steps=20_000,
        num_envs=2,
        execution_horizon=CHUNK,
        warmup_env_steps=1_000,
        utd_ratio=1.0,
        updates_per_call=4,
        batch_size=128,
        offline_ratio=0.5,
        env_steps_per_iteration=1_000,
        eval_interval=5,
    )
    return Recipe(
        env=ManiSkillConfig(task=task, cameras=(), reward=reward, num_workers=2),
        demos=DemosConfig(num_episodes=20, num_envs=2, keep="success", expert=RemoteExpertConfig(action_noise)),
        policy=FlowMLPConfig(action_horizon=CHUNK, width=128),
        sft=SFTConfig(num_updates=1_500, batch_size=128),
        train=OffPolicyConfig(
            agent=agent,
            horizon=CHUNK,
            replay=ReplayConfig(capacity=50_000, gamma=0.97, reward_bias=-1.0, reward_low=0.0),
            online=online,
        ),
        evaluation=EvalConfig(num_episodes=100, num_envs=2, policy_batch_size=2, num_videos=2),
    )


def maniskill_push_cube() -> Recipe:
    """ManiSkill PushCube from the state: 20 noisy demonstrations, then EXPO online."""
    return _maniskill("PushCube-v1", 0.4, edit_scale=0.3)


def maniskill_pick_cube() -> Recipe:
    """ManiSkill PickCube from the state: 20 noisy demonstrations, then EXPO online with ManiSkill's dense reward.

    With twice the noise the expert succeeds in 1 of 15: success requires the robot to stand still. So edits must be
    small too: with PushCube's, whose samples explore, 5% of the first episodes succeed instead of 41%. With the sparse
    reward 11,000 control steps changed nothing (one run)."""
    return _maniskill("PickCube-v1", 0.2, edit_scale=0.1, reward="dense")


def ogbench_cube() -> Recipe:
    """OGBench's single cube, task 1, from play data made here: QC-FQL, offline and then online.

    The sizes are those of `tests/experiments/chunking.py`; half as much data."""
    chunk, hidden = 5, (256, 256, 256)
    agent = QCConfig(
        policy="distilled",
        alpha=100.0,
        flow=FlowNetConfig(hidden_sizes=hidden),
        critic=MLPCriticConfig(2, hidden, layer_norm=True, activation="gelu"),
    )
    online = OnlineConfig(
        num_env_steps=10_000,
        execution_horizon=chunk,
        warmup_env_steps=1_000,
        utd_ratio=1.0,
        updates_per_call=1,
        batch_size=128,
        offline_ratio=0.5,
        env_steps_per_iteration=1_000,
        eval_interval=5,
    )
    return Recipe(
        env=OGBenchConfig(),
        demos=DemosConfig(num_episodes=100, num_envs=4, keep="all", expert=CubeOracleConfig(play=True, noise=0.1)),
        train=OffPolicyConfig(
            agent=agent,
            horizon=chunk,
            replay=ReplayConfig(capacity=12_000, gamma=0.99),
            offline=OfflineConfig(num_updates=25_000, batch_size=128, updates_per_iteration=1_000, eval_interval=10),
            online=online,
        ),
        evaluation=EvalConfig(num_episodes=50, num_envs=10, policy_batch_size=10, num_videos=2),
    )


def _flow_sde(env: AnyEnvConfig, num_demos: int) -> Recipe:
    start = demo()
    assert isinstance(start.train, TrainConfig)
    algorithm = start.train.algorithm
    assert isinstance(algorithm, PPOConfig)
    small = replace(
        algorithm, num_decisions=25, critic_warmup_iterations=2, actor=replace(algorithm.actor, minibatch_size=100)
    )
    return replace(
        start,
        env=env,
        demos=DemosConfig(num_episodes=num_demos, num_envs=2, expert=RemoteExpertConfig(action_noise=0.1)),
        train=replace(start.train, num_envs=8, num_iterations=30, algorithm=small),
        evaluation=EvalConfig(num_episodes=100, num_envs=8, policy_batch_size=8, num_videos=2),
    )


def robosuite_lift() -> Recipe:
    """robosuite Lift from one camera: the tiny VLA, Flow-SDE PPO."""
    return _flow_sde(RobosuiteConfig("Lift", image_size=64, fast_pictures=True, num_workers=2), 50)


def libero_object() -> Recipe:
    """LIBERO-Object's first task from one camera: 20 noisy demonstrations for the tiny VLA, then EXPO online on the
    frozen VLA, a quarter of each minibatch demonstrations; disjoint initial states.

    Only success is rewarded and nothing else costs anything, so what the critic has not seen is worth nothing to it and
    edits stay near what has succeeded. Edits of .2 left 2 of 10 warm-up episodes successful, of .1 four."""
    chunk, hidden = 8, (256, 256)
    agent = ExpoConfig(
        num_base=4,
        num_stored=8,
        edit=EditConfig(scale=0.1, net=ActorNetConfig(hidden, layer_norm=False), initial_temperature=0.01),
        critic=MLPCriticConfig(5, hidden),
        tau=0.01,
    )
    online = OnlineConfig(
        num_env_steps=32_000,
        num_envs=8,
        execution_horizon=chunk,
        warmup_env_steps=6_400,
        utd_ratio=0.5,
        updates_per_call=4,
        batch_size=128,
        offline_ratio=0.25,
        observe_every_step=False,
        env_steps_per_iteration=1_600,
        eval_interval=0,  # a hundred episodes are half as many control steps as all of this
        checkpoint_interval=5,
    )
    start = demo()
    return replace(
        start,
        env=LiberoConfig(cameras=("agentview",), image_size=64, fast_pictures=True, num_workers=2),
        demos=DemosConfig(num_episodes=20, num_envs=2, expert=RemoteExpertConfig(action_noise=0.1)),
        policy=TinyVLAConfig(action_horizon=chunk),
        sft=replace(start.sft, num_updates=3_000),
        train=OffPolicyConfig(
            agent=agent,
            horizon=chunk,
            replay=ReplayConfig(capacity=40_000, gamma=0.99, reward_scale=10.0, reward_low=0.0),
            online=online,
        ),
        evaluation=EvalConfig(num_episodes=100, num_envs=8, policy_batch_size=8, num_videos=2),
    )


def metaworld_reach() -> Recipe:
    """Metaworld reach from one camera: the tiny VLA, Flow-SDE PPO."""
    return _flow_sde(MetaworldConfig("reach-v3", image_size=64, num_workers=2), 50)


def with_its_momentum(state: np.ndarray) -> np.ndarray:
    """Expert of Gymnasium's mountain car: full throttle the way that it moves. `state [N, 2]`: position, velocity."""
    return np.sign(state[:, 1:] + 1e-9)


def gym_mountain_car() -> Recipe:
    """Gymnasium's continuous mountain car from the state: imitation of a noisy rule, then Flow-SDE PPO.

    One run: 45% after imitation, 80% after RL, 23% after the control on shuffled advantages (100 episodes)."""
    start = demo()
    assert isinstance(start.train, TrainConfig)
    assert isinstance(start.train.algorithm, PPOConfig)
    algorithm = replace(start.train.algorithm, num_decisions=50, gamma=0.99)
    expert = FunctionExpertConfig("vla_rl.configs.simulators:with_its_momentum", action_noise=1.0)
    return replace(
        start,
        env=GymConfig("MountainCarContinuous-v0", "drive up the hill", success="end", max_episode_steps=200),
        demos=DemosConfig(num_episodes=20, num_envs=20, keep="all", expert=expert),
        policy=FlowMLPConfig(action_horizon=CHUNK, width=64),
        sft=SFTConfig(num_updates=1_000, batch_size=128),
        train=replace(start.train, num_envs=32, num_iterations=60, algorithm=algorithm),
        evaluation=EvalConfig(num_episodes=100, num_envs=50, policy_batch_size=50, num_videos=0),  # it draws by pygame
    )


__all__ = [
    "gym_mountain_car", "libero_object", "maniskill_pick_cube", "maniskill_push_cube", "metaworld_reach",
    "ogbench_cube", "robosuite_lift",
]  # fmt: skip
