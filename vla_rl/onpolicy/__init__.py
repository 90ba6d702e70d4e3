"""On-policy reinforcement of chunk policies: PPO, GRPO, and what DPPO and FPO change about them."""

from vla_rl.onpolicy.actor import ActorConfig, ActorData, ActorUpdate
from vla_rl.onpolicy.critic import Critic, CriticConfig
from vla_rl.onpolicy.dppo import DenoisingDiscount
from vla_rl.onpolicy.fpo import FPOConfig, FPOSampler
from vla_rl.onpolicy.grpo import GRPO, GRPOConfig
from vla_rl.onpolicy.ppo import PPO, PPOConfig, flow_sampler
from vla_rl.onpolicy.tokens import TokenSampler, TokenSamplerConfig

__all__ = [
    "GRPO",
    "PPO",
    "ActorConfig",
    "ActorData",
    "ActorUpdate",
    "Critic",
    "CriticConfig",
    "DenoisingDiscount",
    "FPOConfig",
    "FPOSampler",
    "GRPOConfig",
    "PPOConfig",
    "TokenSampler",
    "TokenSamplerConfig",
    "flow_sampler",
]
