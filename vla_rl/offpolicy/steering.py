"""What each way of steering a frozen policy asks of it, in acting and in learning.

| agent    | base chunks at an observation             | what the agent learns                         |
|----------|-------------------------------------------|-----------------------------------------------|
| DSRLNA   | one, of the noise that the agent chooses  | that noise, by a critic of executed chunks    |
| Expo     | N, of as many draws of noise              | edits, and which of all 2N chunks is best     |
| Residual | one, of zero noise: always the same       | its correction; the critic sees the chunk too |

The base policy is a function of rows [M, R] (`FlatPrefix`) and noise [M, H, A] to chunks [M, H, A] as the environment
executes them, in [-1, 1]; the agent sees the first F numbers of a row, its features. The residual's correction is of a
whole chunk, made at the decision; with a horizon of 1 it is ResiP's closed loop. With `ExpoConfig.num_stored` a row of
replay is the features and the base chunks that were drawn for them, and learning never calls the base policy.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.bc_flow import candidate_noise
from vla_rl.offpolicy.build import SteeringAgent
from vla_rl.offpolicy.dsrl import DSRLNA, NoiseDistillation
from vla_rl.offpolicy.expo import Expo
from vla_rl.offpolicy.residual import Residual
from vla_rl.offpolicy.train_state import TrainState
from vla_rl.offpolicy.update import Metrics

BaseChunks = Callable[[Array, Array], Array]
Normal = Callable[[tuple[int, ...]], Array]  # standard normal numbers of a shape, others at every call


def steered_chunks(
    agent: SteeringAgent, state: TrainState, rows: Array, noise: Array, base: BaseChunks, *, explore: bool
) -> Array:
    """Rows [M, R], standard normal noise [M, H, A] -> chunks [M, H, A] in [-1, 1], to explore with or deployed."""
    obs = rows[:, : agent.spec.obs_dim]
    if isinstance(agent, DSRLNA):
        return base(rows, agent.act(state, obs, noise, explore=explore))
    if isinstance(agent, Residual):
        return agent.act(state, obs, base(rows, jnp.zeros_like(noise)), noise, explore=explore)
    n = agent.config.num_base
    drawn = candidate_noise(noise, 2 * n)  # of base chunks, then of edits
    return agent.act(state, obs, _each(base, rows, drawn[:n]), drawn[n:], explore=explore)


def steered_update(
    agent: SteeringAgent, state: TrainState, batches: ReplayBatch, base: BaseChunks, normal: Normal
) -> tuple[TrainState, Metrics]:
    """One call of the agent's update; `batches` [U, B, ...] have rows and executed chunks in [-1, 1]."""
    u, b, h, a = batches.actions.shape
    f, prefix_next = agent.spec.obs_dim, batches.prefix_next_obs
    obs, following = jnp.asarray(batches.obs), jnp.asarray(batches.next_obs)
    batches = batches._replace(
        obs=batches.obs[..., :f],
        next_obs=batches.next_obs[..., :f],
        prefix_next_obs=None if prefix_next is None else prefix_next[..., :f],
    )
    if isinstance(agent, Residual):
        none = jnp.zeros((u, b, h, a))
        return agent.update(state, batches, _each(base, obs, none), _each(base, following, none))
    if agent.num_prefixes > 1:
        following = jnp.asarray(prefix_next).reshape(u, -1, obs.shape[-1])
    rows = following.shape[1]
    if isinstance(agent, Expo) and agent.config.num_stored:
        following_chunks = stored_chunks(following, f, (h, a), agent.config.num_base, normal)
        return agent.update(state, batches, stored_chunks(obs, f, (h, a), 1, normal)[:, 0], following_chunks)
    if isinstance(agent, DSRLNA):
        flat = following.reshape(u * rows, -1)
        chosen = agent.propose(state, flat[:, :f], normal((1, u * rows, h, a)))[0]
        noise = normal((u, b, h, a))
        following_chunks = base(flat, chosen).reshape(u, 1, rows, h, a)
        return agent.update(
            state, batches, following_chunks, NoiseDistillation(obs[..., :f], noise, _each(base, obs, noise))
        )
    noise = normal((agent.config.num_base, u, rows, h, a))
    following_chunks = jnp.swapaxes(_each(base, following, noise), 0, 1)
    return agent.update(state, batches, _each(base, obs, normal((u, b, h, a))), following_chunks)


def stored_chunks(rows: Array, num_features: int, chunk: tuple[int, int], n: int, normal: Normal) -> Array:
    """Rows [U, M, F + S * H * A] that hold S base chunks -> n of each [U, n, M, H, A], none drawn twice."""
    chunks = rows[..., num_features:].reshape(*rows.shape[:2], -1, *chunk)
    order = jnp.argsort(normal(chunks.shape[:3]), axis=2)[:, :, :n]
    return jnp.swapaxes(jnp.take_along_axis(chunks, order[..., None, None], axis=2), 1, 2)


def _each(base: BaseChunks, obs: Array, noise: Array) -> Array:
    """obs [*B, F], noise [..., *B, H, A] -> chunks like `noise`, in one call."""
    rows = jnp.broadcast_to(obs, (*noise.shape[:-2], obs.shape[-1]))
    flat = base(rows.reshape(-1, obs.shape[-1]), noise.reshape(-1, *noise.shape[-2:]))
    return flat.reshape(noise.shape)


__all__ = ["BaseChunks", "Normal", "steered_chunks", "steered_update", "stored_chunks"]
