"""From offline to online RL: CO-RFT and WSRL of the tiny VLA, and agents of their own on the state."""

from __future__ import annotations

from dataclasses import replace

from vla_rl.configs.demo import demo
from vla_rl.data.replay import ReplayConfig, SamplingWeights
from vla_rl.envs.twin import TwinEnvConfig
from vla_rl.offpolicy.calql import ConservativeConfig
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.improvement import ImprovementConfig
from vla_rl.offpolicy.pa_rl import CriticAgentConfig
from vla_rl.offpolicy.policy_learner import PolicyLearnerConfig
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.train.offpolicy import OfflineConfig, OffPolicyConfig, OnlineConfig
from vla_rl.train.recipe import EvalConfig, Recipe

HORIZON = 4  # the critic's chunk is the one that is executed


def vla_offline_to_online() -> Recipe:
    """The tiny VLA from pictures and sentences: SFT, CO-RFT on the same demonstrations, WSRL without them.

    What was measured on the way here, one run each, from a policy at .71. Distilling improved chunks alone, the policy
    follows what the critic does not know yet: .03 after 1000 decisions, with gradient steps on the chunk and without.
    Cloning its own successes beside them (success-weighted replay and `bc_weight`) holds it: .82 after 5000 control
    steps. With gamma .97 the squared TD error is twenty times that of .9, and chunks differ by a fraction of a step.
    """
    start = demo()
    critic = CriticAgentConfig(
        critic=MLPCriticConfig(num_members=4, hidden_sizes=(256, 256)),
        tau=0.02,
        target_reduction=EnsembleReduction("min", 2),
        improvement=ImprovementConfig(num_candidates=8, num_kept=1, num_steps=0),
        conservative=ConservativeConfig(alpha=0.5, num_actions=1, form="expectation"),
    )
    offline = PolicyLearnerConfig(
        critic=critic, policy_batch_size=96, improve_weight=0.3, bc_weight=1.0, critic_warmup_calls=150
    )
    online = replace(offline, critic=replace(critic, conservative=None), critic_warmup_calls=80)
    train = OffPolicyConfig(
        agent=offline,
        online_agent=online,
        horizon=HORIZON,
        replay=ReplayConfig(
            capacity=60_000, gamma=0.9, reward_bias=-1.0, reward_low=0.0, weights=SamplingWeights(success=10.0)
        ),
        offline=OfflineConfig(
            num_updates=600, batch_size=128, updates_per_call=2, updates_per_iteration=100, eval_interval=3
        ),
        online=OnlineConfig(
            num_env_steps=15_360,
            num_envs=16,
            execution_horizon=HORIZON,
            warmup_env_steps=1_280,
            utd_ratio=0.25,
            updates_per_call=4,
            batch_size=128,
            env_steps_per_iteration=640,
            eval_interval=4,
        ),
    )
    return replace(start, policy=TinyVLAConfig(action_horizon=8), train=train)


def twin_hil() -> Recipe:
    """The tiny VLA on the digital twin's arm, in real time, with a person who takes over (`--env.operator keyboard`):
    SFT on demonstrations of the simulator, then RL from replay, half of it demonstrations and the person's steps.

    As `vla_offline_to_online` online; 4800 control steps are some ten minutes with the resets and updates."""
    start = vla_offline_to_online()
    assert isinstance(start.train, OffPolicyConfig)
    assert start.train.online is not None
    assert start.train.online_agent is not None
    online = replace(
        start.train.online,
        num_env_steps=4_800,
        num_envs=1,
        warmup_env_steps=480,
        offline_ratio=0.5,
        intervention_rows=5_000,
        env_steps_per_iteration=480,
        eval_interval=0,  # there is one arm
        checkpoint_interval=2,
    )
    return replace(
        start,
        env=TwinEnvConfig(),
        train=replace(start.train, agent=start.train.online_agent, online_agent=None, offline=None, online=online),
        evaluation=EvalConfig(num_episodes=24, num_envs=1, policy_batch_size=1),
    )
