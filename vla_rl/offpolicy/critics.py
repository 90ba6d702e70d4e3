"""Critics of action chunks, and what is made of an ensemble's values.

A critic maps obs [B, O] and actions [B, H, A] to outputs [E, B, P, D]: E members, P prefixes of the chunk (one for the
MLP, which values the whole chunk; H for the causal transformer of `prefix_critic.py`), D as the value head has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.networks import AgentSpec, EnsembleMLP, Network, Params
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.value_heads import ScalarHead, ValueHead


@dataclass(frozen=True)
class MLPCriticConfig:
    """An ensemble of `num_members` MLPs over (obs, flattened chunk); REDQ and WSRL have 10 with LayerNorm."""

    num_members: int = 10
    hidden_sizes: tuple[int, ...] = (256, 256)
    layer_norm: bool = True
    activation: Literal["relu", "gelu"] = "relu"
    head: ValueHead = field(default_factory=ScalarHead)

    def num_prefixes(self, spec: AgentSpec) -> int:
        """1: the whole chunk."""
        del spec
        return 1

    def build(self, spec: AgentSpec, rngs: nnx.Rngs) -> nnx.Module:
        return MLPCritic(spec, self, rngs)


class MLPCritic(nnx.Module):
    """Q(s, a_{t:t+H}) of a whole chunk."""

    def __init__(self, spec: AgentSpec, config: MLPCriticConfig, rngs: nnx.Rngs) -> None:
        self.mlp = EnsembleMLP(
            config.num_members,
            spec.obs_dim + spec.chunk_dim,
            config.hidden_sizes,
            config.head.out_dim,
            layer_norm=config.layer_norm,
            activation={"relu": nnx.relu, "gelu": nnx.gelu}[config.activation],
            rngs=rngs,
        )

    def __call__(self, obs: Array, actions: Array) -> Array:
        """[B, O], [N * B, H, A] -> [E, N * B, 1, D], as `candidate_values` wants it."""
        return self.mlp(obs, actions.reshape(actions.shape[0], -1))[:, :, None]


CriticConfig = MLPCriticConfig | PrefixCriticConfig


@dataclass(frozen=True)
class EnsembleReduction:
    """How E values become one: `reduce` over `subset_size` members (None: all), drawn anew at every call.

    WSRL draws 2 of 10 with replacement, REDQ and RLPD without.
    """

    reduce: Literal["min", "mean"] = "min"
    subset_size: int | None = 2
    with_replacement: bool = False

    def members(self, key: Array, num_members: int) -> Array | None:
        """int [M] of the members that count, None for all of them. Raises ValueError for a subset that is too large."""
        if self.subset_size is None:
            return None
        if self.subset_size > num_members and not self.with_replacement:
            raise ValueError(
                f"a subset of {self.subset_size} cannot be drawn from {num_members} critics; "
                "make it smaller, or None for all"
            )
        return jax.random.choice(key, num_members, (self.subset_size,), replace=self.with_replacement)

    def __call__(self, values: Array, key: Array) -> Array:
        """[E, ...] -> [...]."""
        members = self.members(key, values.shape[0])
        return self.over(values if members is None else values[members])

    def over(self, chosen: Array) -> Array:
        """[M, ...] of the members that count -> [...]."""
        return chosen.min(axis=0) if self.reduce == "min" else chosen.mean(axis=0)


def candidate_values(
    critic: Network, head: ValueHead, params: Params, obs: Array | np.ndarray, candidates: Array
) -> Array:
    """obs [B, O], candidates [N, B, H, A] -> values [E, N, B, P].

    A critic gets each observation once, however many chunks it judges there: features of a VLA are much wider than a
    chunk, and most of its first layer's work."""
    n, b = candidates.shape[:2]
    out = critic(params, jnp.asarray(obs), candidates.reshape(n * b, *candidates.shape[2:]))
    return head.value(out).reshape(out.shape[0], n, b, -1)


def reduced_values(
    critic: Network,
    head: ValueHead,
    reduction: EnsembleReduction,
    params: Params,
    obs: Array | np.ndarray,
    candidates: Array,
    key: Array,
) -> Array:
    """`reduction(candidate_values(...), key)`, [N, B, P], with a forward pass of the members that it draws alone."""
    members = reduction.members(key, jax.tree.leaves(params)[0].shape[0])
    if members is not None:
        params = jax.tree.map(lambda x: x[members], params)  # members are the first axis of every critic's parameters
    return reduction.over(candidate_values(critic, head, params, obs, candidates))


# ----------------------------------------------------------------------------------------------------------- targets
def successors(batch: ReplayBatch, num_prefixes: int) -> Array:
    """Observations that targets bootstrap from, [B * P, O]: s_{t+k} of the chunk, or of each of its prefixes."""
    if num_prefixes == 1:
        return jnp.asarray(batch.next_obs)
    following = _of_prefixes(batch.prefix_next_obs)
    return following.reshape(-1, following.shape[-1])


def _of_prefixes(of_batch: np.ndarray | None) -> Array:
    if of_batch is None:
        raise ValueError("a prefix critic needs batches that were sampled with prefixes=True")
    return jnp.asarray(of_batch)


def td_targets(batch: ReplayBatch, next_values: Array, num_prefixes: int) -> tuple[Array, Array]:
    """Targets [B, P] `reward + discount * V(successor)` from `next_values [B * P]`, and their weights [B, P].

    Each prefix has its own i-step target: losses are averaged over prefixes, targets never are (arXiv 2503.03660).
    A prefix that goes past the end of an episode has the target of the steps that were executed. It must be trained
    too: targets bootstrap from the longest prefix, also at an episode's last steps.
    """
    weight = jnp.asarray(batch.weight)[:, None]
    if num_prefixes == 1:
        return (jnp.asarray(batch.reward) + batch.discount * next_values)[:, None], weight
    reward, discount = _of_prefixes(batch.prefix_reward), _of_prefixes(batch.prefix_discount)
    targets = reward + discount * next_values.reshape(reward.shape)
    return targets, weight * _of_prefixes(batch.prefix_mask)


def take_prefixes(batch: ReplayBatch, prefixes: Array) -> ReplayBatch:
    """The batch with the targets of `prefixes` (int [Q], 0 is one step) only, for `successors(batch, Q)` and the rest.

    Q must be at least 2: one prefix means the whole chunk there.
    """
    names = ("prefix_reward", "prefix_discount", "prefix_next_obs", "prefix_mask")
    return batch._replace(**{name: jnp.asarray(getattr(batch, name))[:, prefixes] for name in names})


def weighted_mean(losses: Array, weights: Array | np.ndarray) -> Array:
    """Mean of `losses [..., B, P]` by `weights [B, P]`: rows of weight 0 do not count in the divisor either."""
    weights = jnp.broadcast_to(weights, losses.shape)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1e-8)


def bootstrap_loss(
    critic: Network, head: ValueHead, params: Params, batch: ReplayBatch, next_values: Array, num_prefixes: int
) -> tuple[Array, dict[str, Array]]:
    """Mean over members, rows and prefixes of the critic's loss against the one target that all members share.

    `next_values` [B * P]: V of `successors(batch, num_prefixes)`; no gradient goes through them.
    """
    targets, weights = td_targets(batch, jax.lax.stop_gradient(next_values), num_prefixes)
    out = critic(params, batch.obs, batch.actions)
    loss = weighted_mean(head.loss(out, targets), weights)
    return loss, {"td_loss": loss, "q_data": head.value(out).mean(), "td_target": targets.mean()}
