"""Off-policy algorithms with their papers' sizes and schedules, on the tabletop's reach from the simulator's state.

They are for a machine with time: hundreds of thousands of updates each. `vla_rl.configs.maze` has all of them at a size
for two cores. Another task is `--env.task`; rewards are 1 at success and 0 elsewhere, and each recipe transforms them
as its paper does for such tasks.
"""

from __future__ import annotations

from dataclasses import replace

from vla_rl.configs.demo import demo
from vla_rl.data.replay import ReplayConfig, SamplingWeights
from vla_rl.envs.config import EnvConfig
from vla_rl.offpolicy.build import SteeringConfig
from vla_rl.offpolicy.calql import CalQLConfig, ConservativeConfig
from vla_rl.offpolicy.co_rft import CoRFTConfig
from vla_rl.offpolicy.conrft import CRITIC_UPDATES, DEMO_SHARE, conrft_offline, conrft_online
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.dsrl import DSRLConfig
from vla_rl.offpolicy.expo import ExpoConfig
from vla_rl.offpolicy.iql import IQLConfig
from vla_rl.offpolicy.networks import ActorNetConfig
from vla_rl.offpolicy.pa_rl import pa_rl_config
from vla_rl.offpolicy.policy_learner import PolicyLearnerConfig
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.qc import QCConfig
from vla_rl.offpolicy.residual import ResidualConfig
from vla_rl.offpolicy.rlpd import BATCH_SIZE, NUM_RANDOM_STEPS, OFFLINE_SHARE, UTD_RATIO, rlpd_config
from vla_rl.offpolicy.sac import SACConfig
from vla_rl.offpolicy.td3 import TD3Config
from vla_rl.offpolicy.wsrl import CarryOver
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.sim.experts import ExpertConfig
from vla_rl.train.offpolicy import OfflineConfig, OffPolicyConfig, OnlineConfig
from vla_rl.train.recipe import DemosConfig, EvalConfig, Recipe

CHUNK = 5
OFFLINE = OfflineConfig(num_updates=250_000, updates_per_iteration=1_000, eval_interval=20)
ONLINE = OnlineConfig(num_env_steps=300_000, env_steps_per_iteration=1_000, eval_interval=20)
# CQL, Cal-QL and IQL go on as they were, with half of their offline data and an update a step.
KEEPS_DATA = replace(ONLINE, offline_ratio=0.5, utd_ratio=1.0, updates_per_call=1)
SCALED = ReplayConfig(capacity=600_000, gamma=0.99, reward_scale=10.0, reward_bias=-5.0, reward_low=0.0)
STEP_COST = ReplayConfig(capacity=1_500_000, gamma=0.99, reward_bias=-1.0, reward_low=0.0)


def _tabletop(train: OffPolicyConfig) -> Recipe:
    return Recipe(
        env=EnvConfig(task="reach", cameras=(), privileged_state=True),
        demos=DemosConfig(num_episodes=1_000, num_envs=32, keep="all", expert=ExpertConfig(action_noise=0.6)),
        policy=FlowMLPConfig(),
        train=train,
        evaluation=EvalConfig(num_episodes=256),
    )


def cql() -> Recipe:
    """CQL (arXiv 2006.04779) with ten critics, then online with half offline data."""
    term = replace(CalQLConfig().conservative, calibrate=False)
    agent = CalQLConfig(conservative=term)
    return _tabletop(OffPolicyConfig(agent=agent, replay=SCALED, horizon=1, offline=OFFLINE, online=KEEPS_DATA))


def calql() -> Recipe:
    """Cal-QL (arXiv 2303.05479): two critics, four layers, then online with half offline data."""
    sac = SACConfig(critic=MLPCriticConfig(2, (256,) * 4, layer_norm=False), num_target_actions=10)
    agent = CalQLConfig(sac, ConservativeConfig(alpha=5.0, num_actions=10))
    return _tabletop(OffPolicyConfig(agent=agent, replay=SCALED, horizon=1, offline=OFFLINE, online=KEEPS_DATA))


def wsrl() -> Recipe:
    """WSRL (arXiv 2412.07762): Cal-QL with ten critics, 5000 warm-up steps, SAC at UTD 4 without offline data."""
    train = OffPolicyConfig(
        agent=CalQLConfig(), online_agent=SACConfig(), replay=SCALED, horizon=1, offline=OFFLINE, online=ONLINE
    )
    return _tabletop(train)


def iql() -> Recipe:
    """IQL (arXiv 2110.06169) with antmaze's expectile and temperature, then online with half offline data."""
    agent = IQLConfig(expectile=0.9, inverse_temperature=10.0)
    return _tabletop(OffPolicyConfig(agent=agent, replay=STEP_COST, horizon=1, offline=OFFLINE, online=KEEPS_DATA))


def td3_bc() -> Recipe:
    """TD3+BC (arXiv 2106.06860), offline only."""
    agent = TD3Config(
        actor=ActorNetConfig(layer_norm=False),
        critic=MLPCriticConfig(2, layer_norm=False),
        q_weight=2.5,
        normalize_q=True,
        bc_weight=1.0,
    )
    offline = replace(OFFLINE, num_updates=1_000_000, updates_per_call=2)
    return _tabletop(OffPolicyConfig(agent=agent, replay=STEP_COST, horizon=1, offline=offline))


def co_rft() -> Recipe:
    """CO-RFT (arXiv 2508.02219): 30 demonstrations, cloning, calibrated chunked Q-learning, rewards drawn oftener."""
    critic = PrefixCriticConfig(width=256, num_heads=4, mlp_ratio=4)
    train = OffPolicyConfig(
        agent=CoRFTConfig(td3=TD3Config(critic=critic, bc_weight=1.0)),
        replay=ReplayConfig(capacity=100_000, gamma=0.99, reward_low=0.0, weights=SamplingWeights(reward=10.0)),
        horizon=10,
        cloning=replace(OFFLINE, num_updates=20_000),
        offline=replace(OFFLINE, num_updates=100_000, updates_per_call=2),
    )
    recipe = _tabletop(train)
    return replace(recipe, demos=replace(recipe.demos, num_episodes=30, num_envs=30, keep="success"))


def rlpd() -> Recipe:
    """RLPD (arXiv 2302.02948): from nothing, half of each minibatch demonstrations, UTD 20."""
    online = replace(
        ONLINE,
        warmup_env_steps=NUM_RANDOM_STEPS,
        random_env_steps=NUM_RANDOM_STEPS,
        utd_ratio=float(UTD_RATIO),
        updates_per_call=UTD_RATIO,
        batch_size=BATCH_SIZE,
        offline_ratio=OFFLINE_SHARE,
    )
    return _tabletop(OffPolicyConfig(agent=rlpd_config(), replay=STEP_COST, horizon=1, online=online))


def _q_chunking(agent: QCConfig, horizon: int) -> Recipe:
    """One buffer for offline and online data, and an update a step."""
    stages = replace(OFFLINE, num_updates=1_000_000)
    online = replace(
        KEEPS_DATA, num_env_steps=1_000_000, execution_horizon=horizon, offline_ratio=0.0, offline_in_buffer=True
    )
    return _tabletop(OffPolicyConfig(agent=agent, replay=STEP_COST, horizon=horizon, offline=stages, online=online))


def qc() -> Recipe:
    """Q-chunking (arXiv 2507.07969): chunks of five, the best of 32 flow samples."""
    return _q_chunking(QCConfig(), CHUNK)


def qc_fql() -> Recipe:
    """Q-chunking with a distilled one-step policy (arXiv 2507.07969): chunks of five."""
    return _q_chunking(QCConfig(policy="distilled", alpha=100.0), CHUNK)


def fql() -> Recipe:
    """Flow Q-learning (arXiv 2502.02538) on single steps."""
    return _q_chunking(QCConfig(policy="distilled", alpha=10.0), 1)


def pa_rl() -> Recipe:
    """PA-RL (arXiv 2412.06685) of the tiny VLA from pictures and sentences, with half demonstrations online."""
    start, horizon = demo(), 4
    agent = PolicyLearnerConfig(critic=pa_rl_config(), num_next_actions=32, policy_learning_rate=5e-5)
    train = OffPolicyConfig(
        agent=agent,
        replay=replace(STEP_COST, capacity=60_000),
        horizon=horizon,
        offline=replace(OFFLINE, num_updates=20_000),
        online=replace(
            KEEPS_DATA,
            num_env_steps=100_000,
            num_envs=5,
            execution_horizon=horizon,
            observe_every_step=False,
            carried=CarryOver(moments=False),
        ),
    )
    return replace(start, policy=TinyVLAConfig(action_horizon=8), train=train)


def conrft() -> Recipe:
    """ConRFT (arXiv 2502.05450) of the tiny VLA from pictures and sentences, with half demonstrations online."""
    recipe = pa_rl()
    train = recipe.train
    assert isinstance(train, OffPolicyConfig)
    assert train.offline is not None
    assert train.online is not None
    train = replace(
        train,
        agent=conrft_offline(),
        online_agent=conrft_online(),
        replay=ReplayConfig(capacity=60_000, gamma=0.98, reward_bias=-0.05, reward_low=0.0),
        offline=replace(train.offline, updates_per_call=CRITIC_UPDATES),
        online=replace(train.online, updates_per_call=CRITIC_UPDATES, offline_ratio=DEMO_SHARE, carried=CarryOver()),
    )
    return replace(recipe, train=train)


def _steering(agent: SteeringConfig) -> Recipe:
    """RLPD's schedule on a frozen flow policy: half of each minibatch demonstrations, UTD 20."""
    start = rlpd()
    train = start.train
    assert isinstance(train, OffPolicyConfig)
    assert train.online is not None
    online = replace(train.online, random_env_steps=0, execution_horizon=CHUNK)
    train = replace(train, agent=agent, horizon=CHUNK, online=online)
    return replace(start, policy=FlowMLPConfig(action_horizon=CHUNK), train=train)


def dsrl() -> Recipe:
    """DSRL (arXiv 2506.15799) with noise aliasing, the sizes of its robomimic runs, on a frozen flow policy."""
    return _steering(DSRLConfig())


def expo() -> Recipe:
    """EXPO: the best of eight chunks of a frozen flow policy and of edits of them."""
    return _steering(ExpoConfig())


def residual() -> Recipe:
    """A residual of ResiP's form (arXiv 2407.16677) on a frozen flow policy, by SAC instead of PPO."""
    return _steering(ResidualConfig())


__all__ = [
    "calql", "co_rft", "conrft", "cql", "dsrl", "expo", "fql", "iql", "pa_rl", "qc", "qc_fql", "residual", "rlpd",
    "td3_bc", "wsrl",
]  # fmt: skip
