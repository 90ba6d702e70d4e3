"""From offline to online RL: CO-RFT and WSRL of the tiny VLA, and agents of their own on the state."""

from __future__ import annotations

from dataclasses import replace

from vla_rl.configs.demo import demo
from vla_rl.data.replay import ReplayConfig
from vla_rl.offpolicy.calql import ConservativeConfig
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.improvement import ImprovementConfig
from vla_rl.offpolicy.pa_rl import CriticAgentConfig
from vla_rl.offpolicy.policy_learner import PolicyLearnerConfig
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.train.offpolicy import OfflineConfig, OffPolicyConfig, OnlineConfig
from vla_rl.train.recipe import Recipe

HORIZON = 4  # the critic's chunk is the one that is executed


def vla_offline_to_online() -> Recipe:
    """The tiny VLA from pictures and sentences: SFT, CO-RFT on the same demonstrations, WSRL without them."""
    start = demo()
    critic = CriticAgentConfig(
        critic=MLPCriticConfig(num_members=4, hidden_sizes=(256, 256)),
        tau=0.01,
        target_reduction=EnsembleReduction("min", 2),
        improvement=ImprovementConfig(num_candidates=8, num_kept=2, num_steps=5, step_size=0.02),
        conservative=ConservativeConfig(alpha=1.0, num_actions=2, form="expectation"),
    )
    offline = PolicyLearnerConfig(critic=critic, bc_weight=0.5, critic_warmup_calls=500)
    online = replace(offline, critic=replace(critic, conservative=None), bc_weight=0.0, critic_warmup_calls=0)
    train = OffPolicyConfig(
        agent=offline,
        online_agent=online,
        horizon=HORIZON,
        replay=ReplayConfig(capacity=60_000, gamma=0.97, reward_bias=-1.0, reward_low=0.0),
        offline=OfflineConfig(num_updates=2_000, batch_size=128, updates_per_iteration=100, eval_interval=5),
        online=OnlineConfig(
            num_env_steps=30_720,
            num_envs=16,
            execution_horizon=HORIZON,
            warmup_env_steps=1_280,
            utd_ratio=0.25,
            updates_per_call=4,
            batch_size=128,
            observe_every_step=False,
            env_steps_per_iteration=640,
            eval_interval=6,
        ),
    )
    return replace(start, policy=TinyVLAConfig(action_horizon=8), train=train)
