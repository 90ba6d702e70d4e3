"""Batches from a real replay buffer whose chunks meet the ends of episodes."""

import numpy as np

from vla_rl.data.replay import ReplayBatch, ReplayBuffer, ReplayConfig
from vla_rl.offpolicy.networks import AgentSpec

SPEC = AgentSpec(obs_dim=3, action_horizon=3, action_dim=2)


def episode_batch(num_rows: int = 8, prefixes: bool = True, seed: int = 0, horizon: int = 3) -> ReplayBatch:
    """Rows from a terminated and a truncated episode, of 4 and 6 steps; the first rows are all the starts."""
    rng = np.random.default_rng(seed)
    buffer = ReplayBuffer(ReplayConfig(capacity=32, gamma=0.9, reward_low=-4.0), state_dim=3, action_dim=2)
    for steps, terminated in ((4, True), (6, False)):
        buffer.add_episode(
            state=rng.normal(size=(steps + 1, 3)),
            actions=rng.uniform(-1, 1, (steps, 2)),
            rewards=np.clip(rng.normal(size=steps), -3.9, 3.9),
            terminated=terminated,
            truncated=not terminated,
        )
    starts = buffer.starts(horizon)
    return buffer.batch(np.resize(starts, num_rows), horizon, prefixes)
