"""What `ray_scaling` collects: TinyVLA, untrained, in reach: a 64 px camera, chunks of 4, 64 environments a process."""

from __future__ import annotations

import torch

from vla_rl.envs.tabletop import make_tabletop
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.flow import FlowSamplerConfig
from vla_rl.flow.sampler import FlowSampler
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig

EXECUTION_HORIZON, NUM_DECISIONS, ENVS_PER_PROCESS = 4, 16, 64


def make_env(num_envs: int) -> ChunkedEnv:
    return make_tabletop("reach", num_envs, cameras={"agent": 64}, num_threads=1, auto_reset=True, final_images=True)


def make_sampler() -> FlowSampler:
    env = make_env(1)
    spec = env.spec
    env.close()
    torch.manual_seed(0)
    policy = TinyVLA(TinyVLAConfig(state_dim=spec.state_dim, action_dim=spec.action.dim))
    policy.freeze_encoder()
    return FlowSampler(policy, FlowSamplerConfig())
