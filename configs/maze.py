"""Every off-policy algorithm at a size for two cores: the point maze, seen by its state, minutes each.

Demonstrations begin anywhere and are of mixed quality (two in three arrive); episodes of learning and evaluation begin
at the far end. Networks are small, targets move fast, and the temperature starts low, since rewards are -1 a step: WSRL
has rewards ten times as large and starts at 1. The same recipes at the papers' sizes are in `offpolicy_papers`.
"""

from __future__ import annotations

from dataclasses import replace

from vla_rl.data.replay import ReplayConfig
from vla_rl.envs.config import PointMazeConfig
from vla_rl.envs.point_maze import BROAD_BEHAVIOUR
from vla_rl.offpolicy.bc_flow import FlowNetConfig
from vla_rl.offpolicy.build import SteeringConfig
from vla_rl.offpolicy.calql import CalQLConfig, ConservativeConfig
from vla_rl.offpolicy.co_rft import CoRFTConfig
from vla_rl.offpolicy.conrft import CRITIC_UPDATES, DEMO_SHARE, conrft_offline, conrft_online
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.dsrl import DSRLConfig
from vla_rl.offpolicy.edits import EditConfig
from vla_rl.offpolicy.expo import ExpoConfig
from vla_rl.offpolicy.improvement import ImprovementConfig
from vla_rl.offpolicy.iql import IQLConfig
from vla_rl.offpolicy.networks import ActorNetConfig
from vla_rl.offpolicy.pa_rl import CriticAgentConfig
from vla_rl.offpolicy.policy_learner import PolicyLearnerConfig
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.qc import QCConfig
from vla_rl.offpolicy.residual import ResidualConfig
from vla_rl.offpolicy.sac import SACConfig
from vla_rl.offpolicy.td3 import TD3Config
from vla_rl.offpolicy.wsrl import CarryOver
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.train.offpolicy import OfflineConfig, OffPolicyConfig, OnlineConfig
from vla_rl.train.recipe import DemosConfig, EvalConfig, Recipe
from vla_rl.train.sft import SFTConfig

HIDDEN, TAU, CHUNK = (128, 128), 0.02, 4
ACTOR, CRITIC = ActorNetConfig(HIDDEN), MLPCriticConfig(4, HIDDEN)
SMALL_SAC = SACConfig(
    actor=ACTOR,
    critic=CRITIC,
    actor_learning_rate=3e-4,
    temperature_learning_rate=3e-4,
    initial_temperature=0.1,
    tau=TAU,
)
OFFLINE = OfflineConfig(num_updates=4_000, batch_size=128, updates_per_iteration=250, eval_interval=4)
ONLINE = OnlineConfig(
    num_env_steps=5_000,
    num_envs=1,
    warmup_env_steps=500,
    batch_size=128,
    env_steps_per_iteration=250,
    eval_interval=4,
)
# CQL, Cal-QL, IQL and Q-chunking go on as they were, with their offline data and an update a step.
KEEPS_DATA = replace(ONLINE, offline_ratio=0.5, utd_ratio=1.0, updates_per_call=1)


def _maze(train: OffPolicyConfig) -> Recipe:
    return Recipe(
        env=PointMazeConfig(),
        demos=DemosConfig(num_episodes=300, num_envs=100, keep="all", expert=BROAD_BEHAVIOUR),
        policy=FlowMLPConfig(action_horizon=CHUNK, width=64),
        sft=SFTConfig(num_updates=1_500, batch_size=128),
        train=replace(
            train,
            replay=ReplayConfig(capacity=30_000, gamma=0.97, reward_bias=-1.0, reward_low=0.0),
        ),
        evaluation=EvalConfig(num_episodes=200, num_envs=100, policy_batch_size=100, num_videos=2),
    )


def _pessimistic(calibrate: bool) -> CalQLConfig:
    """Without densities, and so of use for chunks too; CQL needs its larger weight to stay within the data."""
    term = ConservativeConfig(alpha=1.0 if calibrate else 5.0, num_actions=4, form="logsumexp", calibrate=calibrate)
    return CalQLConfig(SMALL_SAC, term)


def cql() -> Recipe:
    """Maze: CQL, which goes on with half offline data."""
    return _maze(OffPolicyConfig(agent=_pessimistic(False), horizon=1, offline=OFFLINE, online=KEEPS_DATA))


def calql() -> Recipe:
    """Maze: Cal-QL, which goes on with half offline data."""
    return _maze(OffPolicyConfig(agent=_pessimistic(True), horizon=1, offline=OFFLINE, online=KEEPS_DATA))


def wsrl() -> Recipe:
    """Maze: Cal-QL, then WSRL: a warm-up, and SAC without the offline data."""
    train = OffPolicyConfig(agent=_pessimistic(True), online_agent=SMALL_SAC, horizon=1, offline=OFFLINE, online=ONLINE)
    return _maze(train)


def iql() -> Recipe:
    """Maze: IQL, which goes on with half offline data."""
    agent = IQLConfig(
        actor=replace(IQLConfig().actor, hidden_sizes=HIDDEN),
        critic=replace(IQLConfig().critic, hidden_sizes=HIDDEN),
        value_hidden_sizes=HIDDEN,
        expectile=0.9,
        inverse_temperature=10.0,
        tau=TAU,
    )
    return _maze(OffPolicyConfig(agent=agent, horizon=1, offline=OFFLINE, online=KEEPS_DATA))


def td3_bc() -> Recipe:
    """Maze: TD3+BC on single steps, offline only."""
    agent = TD3Config(
        actor=ACTOR, critic=replace(CRITIC, num_members=2), tau=TAU, q_weight=2.5, normalize_q=True, bc_weight=1.0
    )
    return _maze(OffPolicyConfig(agent=agent, horizon=1, offline=replace(OFFLINE, updates_per_call=2)))


def co_rft() -> Recipe:
    """Maze: CO-RFT: cloning, then calibrated Q-learning of chunks with a critic of every prefix, offline only."""
    td3 = TD3Config(
        actor=ACTOR,
        critic=PrefixCriticConfig(width=32, num_layers=1),
        tau=TAU,
        normalize_q=True,
        bc_weight=1.0,
        q_weight=0.5,
    )
    train = OffPolicyConfig(
        agent=CoRFTConfig(td3=td3),
        horizon=CHUNK,
        cloning=replace(OFFLINE, num_updates=2_000),
        offline=replace(OFFLINE, updates_per_call=2),
    )
    return _maze(train)


def rlpd() -> Recipe:
    """Maze: RLPD: from nothing, half of each minibatch demonstrations."""
    agent = replace(
        SMALL_SAC,
        target_reduction=EnsembleReduction("min", 2, with_replacement=False),
        actor_reduction=EnsembleReduction("mean", None),
        target_entropy_per_dim=0.5,
        entropy_on_next_obs=False,
        actor_batch="last",
    )
    online = replace(ONLINE, offline_ratio=0.5, random_env_steps=500)
    return _maze(OffPolicyConfig(agent=agent, horizon=1, online=online))


def _flow_agent(**changes: object) -> QCConfig:
    config = QCConfig(
        num_samples=8, flow=FlowNetConfig(HIDDEN), critic=MLPCriticConfig(2, HIDDEN, activation="gelu"), tau=TAU
    )
    return replace(config, **changes)  # pyright: ignore[reportArgumentType]


def qc() -> Recipe:
    """Maze: Q-chunking, the best of eight flow samples."""
    online = replace(KEEPS_DATA, execution_horizon=CHUNK, offline_ratio=0.0, offline_in_buffer=True)
    return _maze(OffPolicyConfig(agent=_flow_agent(), horizon=CHUNK, offline=OFFLINE, online=online))


def qc_fql() -> Recipe:
    """Maze: Q-chunking with a distilled one-step policy."""
    online = replace(KEEPS_DATA, execution_horizon=CHUNK, offline_ratio=0.0, offline_in_buffer=True)
    agent = _flow_agent(policy="distilled", alpha=10.0)
    return _maze(OffPolicyConfig(agent=agent, horizon=CHUNK, offline=OFFLINE, online=online))


def fql() -> Recipe:
    """Maze: flow Q-learning on single steps."""
    online = replace(KEEPS_DATA, offline_ratio=0.0, offline_in_buffer=True)
    agent = _flow_agent(policy="distilled", alpha=10.0)
    return _maze(OffPolicyConfig(agent=agent, horizon=1, offline=OFFLINE, online=online))


def pa_rl() -> Recipe:
    """Maze: PA-RL of a fine-tuned torch flow policy: improved chunks become its own supervised targets."""
    critic = CriticAgentConfig(
        critic=CRITIC,
        tau=TAU,
        target_reduction=EnsembleReduction("min", 2),
        improvement=ImprovementConfig(num_candidates=8, num_kept=2, num_steps=5, step_size=0.02),
        conservative=ConservativeConfig(alpha=0.5, num_actions=2, form="expectation"),
    )
    agent = PolicyLearnerConfig(critic=critic, policy_learning_rate=3e-4, bc_weight=0.2)
    online = replace(KEEPS_DATA, execution_horizon=CHUNK, carried=CarryOver(moments=False))
    return _maze(OffPolicyConfig(agent=agent, horizon=CHUNK, offline=OFFLINE, online=online))


def conrft() -> Recipe:
    """Maze: ConRFT of a fine-tuned torch flow policy: imitation under Cal-QL, then its own chunks climb Q.

    Returns are tens of times those of ConRFT's tasks, so the weight of Q is as many times smaller."""
    critic = CriticAgentConfig(
        critic=replace(CRITIC, num_members=2),
        tau=TAU,
        target_reduction=EnsembleReduction("min", None),
        conservative=ConservativeConfig(alpha=1.0, num_actions=4, form="logsumexp", bound_random_actions=True),
    )
    offline = replace(conrft_offline(), critic=critic, policy_batch_size=128)
    online = replace(KEEPS_DATA, execution_horizon=CHUNK, updates_per_call=CRITIC_UPDATES, offline_ratio=DEMO_SHARE)
    train = OffPolicyConfig(
        agent=offline,
        online_agent=replace(conrft_online(offline), bc_weight=1.0, q_weight=0.1),
        horizon=CHUNK,
        offline=replace(OFFLINE, updates_per_call=CRITIC_UPDATES),
        online=online,
    )
    return _maze(train)


def _steering(agent: SteeringConfig) -> Recipe:
    """From the frozen policy on, with half of each minibatch demonstrations."""
    return _maze(OffPolicyConfig(agent=agent, horizon=CHUNK, online=replace(KEEPS_DATA, execution_horizon=CHUNK)))


def dsrl() -> Recipe:
    """Maze: DSRL with noise aliasing: an agent chooses the noise of a frozen flow policy."""
    sac = replace(
        DSRLConfig().sac,
        actor=ACTOR,
        critic=CRITIC,
        target_reduction=EnsembleReduction("min", 2),
        initial_temperature=0.1,
        tau=TAU,
    )
    return _steering(DSRLConfig(sac=sac, distill_reduction=EnsembleReduction("mean", None)))


def expo() -> Recipe:
    """Maze: EXPO: the best of a frozen flow policy's chunks and of edits of them."""
    edit = EditConfig(scale=0.1, net=ActorNetConfig(HIDDEN, layer_norm=False), initial_temperature=0.1)
    return _steering(ExpoConfig(num_base=4, edit=edit, critic=CRITIC, tau=TAU))


def residual() -> Recipe:
    """Maze: a residual on the chunks that a frozen flow policy makes of zero noise."""
    default = ResidualConfig()
    edit = replace(default.edit, scale=0.2, net=replace(default.edit.net, hidden_sizes=HIDDEN))
    return _steering(replace(default, edit=edit, critic=CRITIC, tau=TAU))


def smoke() -> Recipe:
    """Maze: WSRL with every stage cut short: shows that all of it runs, and nothing about learning."""
    recipe = wsrl()
    train = recipe.train
    assert isinstance(train, OffPolicyConfig)
    tiny = replace(SMALL_SAC, actor=ActorNetConfig((16,)), critic=MLPCriticConfig(2, (16,)))
    train = replace(
        train,
        agent=CalQLConfig(tiny, ConservativeConfig(num_actions=2)),
        online_agent=tiny,
        offline=replace(OFFLINE, num_updates=40, batch_size=16, updates_per_iteration=10, eval_interval=0),
        online=replace(
            ONLINE, num_env_steps=160, warmup_env_steps=80, batch_size=16, env_steps_per_iteration=40, eval_interval=0
        ),
    )
    return replace(
        recipe,
        demos=replace(recipe.demos, num_episodes=8, num_envs=8),
        train=train,
        evaluation=replace(recipe.evaluation, num_episodes=8, num_envs=8, policy_batch_size=8, num_videos=1),
    )
