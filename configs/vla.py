"""One recipe for each family of public VLAs, at a size that trains on a laptop.

They are the way into the family: the same stages run on a public checkpoint with `--policy FOLDER`, and any size is a
field of the config. A transformer that begins from nothing does not learn to find a block from 450 demonstrations (the
tiny VLA of `demo` has an encoder made for that), so these have the named block's place in the state, beside the
picture and the sentence.
"""

from __future__ import annotations

from dataclasses import replace

from vla_rl.configs.demo import demo
from vla_rl.envs.config import EnvConfig
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.onpolicy import PPOConfig
from vla_rl.onpolicy.build import GaussianSamplerConfig, SamplerConfig
from vla_rl.onpolicy.tokens import TokenSamplerConfig
from vla_rl.policies.blocks.prismatic import PrismaticInputsConfig
from vla_rl.policies.blocks.tokenizer import TokenizerConfig
from vla_rl.policies.blocks.vla_inputs import PromptConfig
from vla_rl.policies.build import PolicyConfig
from vla_rl.policies.openvla import OpenVLAConfig
from vla_rl.policies.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTTokensConfig, ParallelConfig
from vla_rl.policies.pi0 import Pi0Config
from vla_rl.policies.smolvla import SmolVLAConfig
from vla_rl.train.loop import TrainConfig
from vla_rl.train.recipe import Recipe
from vla_rl.train.sft import SFTConfig

HORIZON, EXECUTED = 8, 4
# The language model of OpenVLA-OFT runs over prompt and slots in every pass, so both are kept short.
_OFT = ParallelConfig(inputs=PrismaticInputsConfig(TokenizerConfig(max_tokens=112)))
_FLOW = FlowSamplerConfig(kernel="flow_sde", mode="hybrid", scored_horizon=EXECUTED)


def _reach(policy: PolicyConfig, sampler: SamplerConfig) -> Recipe:
    """The demo's task and demonstrations, with the place of the goal in the state."""
    start = demo()
    assert isinstance(start.train, TrainConfig)
    assert isinstance(start.train.algorithm, PPOConfig)
    algorithm = replace(
        start.train.algorithm,
        critic_warmup_iterations=3,
        actor=replace(start.train.algorithm.actor, minibatch_size=640, learning_rate=1e-4),
    )
    return replace(
        start,
        env=EnvConfig(task="reach", cameras=("agent",), image_size=64, privileged_state=True),
        demos=replace(start.demos, num_episodes=200),
        policy=policy,
        sft=SFTConfig(num_updates=600, batch_size=64, learning_rate=1e-3, ema_decay=0.98),
        train=replace(start.train, num_envs=64, num_iterations=30, sampler=sampler, algorithm=algorithm),
    )


def _longer(recipe: Recipe) -> Recipe:
    """OpenVLA-OFT learns slower than the flow families: more updates on more demonstrations."""
    sft = replace(recipe.sft, num_updates=1_200, learning_rate=1.5e-3)
    return replace(recipe, demos=replace(recipe.demos, num_episodes=300), sft=sft)


def pi0() -> Recipe:
    """pi0, tiny, on reach: PaliGemma's blocks and an action expert; Flow-SDE PPO."""
    return _reach(Pi0Config(action_horizon=HORIZON, max_action_dim=8, num_steps=4), _FLOW)


def pi05() -> Recipe:
    """pi0.5, tiny, on reach: the state in the prompt, adaptive norms; Flow-SDE PPO."""
    prompt = PromptConfig("state")
    policy = Pi0Config(
        action_horizon=HORIZON,
        max_action_dim=8,
        num_steps=4,
        adaptive=True,
        prompt=prompt,
        tokenizer=TokenizerConfig(max_tokens=200),
    )
    return _reach(policy, _FLOW)


def smolvla() -> Recipe:
    """SmolVLA, tiny, on reach: interleaved cross-attention, causal actions; Flow-SDE PPO."""
    return _reach(SmolVLAConfig(action_horizon=HORIZON, max_action_dim=8, num_steps=4), _FLOW)


def openvla() -> Recipe:
    """OpenVLA, tiny, on reach: one action at a time, token by token; PPO on tokens. It does not see the state."""
    start = _reach(OpenVLAConfig(action_horizon=1), TokenSamplerConfig())
    assert isinstance(start.train, TrainConfig)
    return replace(start, train=replace(start.train, execution_horizon=1))


def _many_decisions(recipe: Recipe, learning_rate: float) -> Recipe:
    """OpenVLA-OFT's decisions are cheap beside the update's passes: more of them and fewer epochs learn more in the
    same time."""
    assert isinstance(recipe.train, TrainConfig)
    assert isinstance(recipe.train.algorithm, PPOConfig)
    actor = replace(recipe.train.algorithm.actor, learning_rate=learning_rate, num_epochs=2, minibatch_size=1024)
    algorithm = replace(recipe.train.algorithm, actor=actor)
    return replace(recipe, train=replace(recipe.train, num_envs=128, num_iterations=40, algorithm=algorithm))


def openvla_oft_tokens() -> Recipe:
    """OpenVLA-OFT, tiny, on reach: chunks of tokens decoded at once; PPO on tokens."""
    policy = OpenVLAOFTTokensConfig(action_horizon=EXECUTED, chunk_dim=4, body=_OFT)
    return _many_decisions(_longer(_reach(policy, TokenSamplerConfig(temperature=0.5))), 3e-5)


def openvla_oft() -> Recipe:
    """OpenVLA-OFT, tiny, on reach: the L1 regression head, explored by a Laplace density; PPO.

    The density is narrow, so that the first step at a rate of 1e-4 moves the policy by a KL of 0.5.
    """
    policy = OpenVLAOFTConfig(action_horizon=EXECUTED, chunk_dim=4, body=_OFT)
    return _many_decisions(_longer(_reach(policy, GaussianSamplerConfig())), 5e-5)


__all__ = ["openvla", "openvla_oft", "openvla_oft_tokens", "pi0", "pi05", "smolvla"]
