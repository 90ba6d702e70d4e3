"""Learning experiment: the tiny VLA from offline to online, against on-policy RL of the same number of control steps.

    make experiment NAME=offline_to_online_vla

For each seed: the demo's demonstrations and fine-tuned policy, and from it (1) CO-RFT on the same demonstrations and
then WSRL without them, (2) PPO by Flow-SDE and by Flow-Noise, (3) the control: (1) without a reward, its critic never
learning and its replay not knowing successes. The control goes on imitating, first the demonstrations and then itself,
so it may gain too: what the reward gives is the difference. The same 256 episodes of the split "test" for all.
Required: WSRL ends at .75 or above, and all seeds together ahead of CO-RFT, of the control and of PPO by Flow-SDE. What
CO-RFT gives beside the control's imitation is reported as it comes out.
"""

from __future__ import annotations

from dataclasses import replace

from tests.experiments.runner import Experiment, Method, envs_of, main, start_of
from vla_rl.configs import get_recipe
from vla_rl.data.replay import SamplingWeights
from vla_rl.offpolicy.policy_learner import PolicyLearnerConfig
from vla_rl.onpolicy import PPOConfig
from vla_rl.train.loop import TrainConfig
from vla_rl.train.offpolicy import OffPolicyConfig

RECIPE = get_recipe("vla_offline_to_online")
FLOW_SDE, FLOW_NOISE = get_recipe("demo").train, get_recipe("tabletop_flow_noise").train
assert isinstance(RECIPE.train, OffPolicyConfig)
ENV_STEPS = RECIPE.train.online.num_env_steps if RECIPE.train.online else 0


make_env = envs_of(RECIPE)


def on_policy(config: TrainConfig | OffPolicyConfig, num_env_steps: int) -> TrainConfig:
    """A recipe's PPO with an eighth of its environments, so that few control steps still make a dozen updates."""
    assert isinstance(config, TrainConfig)
    algorithm = config.algorithm
    assert isinstance(algorithm, PPOConfig)
    num_envs = 20
    steps = num_envs * algorithm.num_decisions * config.execution_horizon
    small = replace(algorithm, critic_warmup_iterations=2, actor=replace(algorithm.actor, minibatch_size=320))
    return replace(
        config, num_envs=num_envs, num_iterations=round(num_env_steps / steps), eval_interval=2, algorithm=small
    )


def without_reward(config: OffPolicyConfig) -> OffPolicyConfig:
    """The control: a critic that keeps its first weights, and every episode drawn alike."""

    def freeze(agent: object) -> PolicyLearnerConfig | None:
        if agent is None:
            return None
        assert isinstance(agent, PolicyLearnerConfig)
        return replace(agent, critic=replace(agent.critic, learning_rate=0.0))

    replay = replace(config.replay, weights=SamplingWeights())
    return replace(config, agent=freeze(config.agent), online_agent=freeze(config.online_agent), replay=replay)


EXPERIMENT = Experiment(
    name="offline_to_online_vla",
    title="The tiny VLA from offline to online",
    prepare=start_of(RECIPE),
    make_env=make_env,
    methods={
        "wsrl": Method("CO-RFT, then WSRL", RECIPE.train, "trained", inner=("co_rft", "offline")),
        "ppo": Method("Flow-SDE PPO", on_policy(FLOW_SDE, ENV_STEPS), "other"),
        "flow_noise": Method("Flow-Noise PPO", on_policy(FLOW_NOISE, ENV_STEPS), "other"),
        "control": Method("the same, no reward", without_reward(RECIPE.train), "other", inner=("imitation", "offline")),
    },
    num_episodes=256,
    first_episode=0,
    required=0.75,
    start_range=(0.0, 1.0),
    ahead=(("wsrl", "co_rft"), ("wsrl", "control"), ("wsrl", "ppo")),
)

if __name__ == "__main__":
    raise SystemExit(main("tests.experiments.offline_to_online_vla"))
