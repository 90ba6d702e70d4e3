"""A causal transformer critic: one pass values every prefix of a chunk (arXiv 2508.02219; arXiv 2503.03660).

One token for the observation, one for each action. Token j sees the observation and actions 0..j, so its output is
Q(s, a_{t:t+j+1}), the value of executing that prefix and then following the policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.offpolicy.networks import AgentSpec, EnsembleLayerNorm, EnsembleLinear
from vla_rl.offpolicy.value_heads import ScalarHead, ValueHead


@dataclass(frozen=True)
class PrefixCriticConfig:
    """An ensemble of `num_members` transformers; defaults are for two cores.

    T-SAC (arXiv 2503.03660) has two layers 128 to 256 wide: `width=256, num_layers=2, num_heads=4, mlp_ratio=4`.
    """

    num_members: int = 2
    width: int = 64
    num_layers: int = 2
    num_heads: int = 2
    mlp_ratio: int = 2
    head: ValueHead = field(default_factory=ScalarHead)

    def __post_init__(self) -> None:
        if min(self.num_members, self.width, self.num_layers, self.num_heads, self.mlp_ratio) < 1:
            raise ValueError(f"all sizes of PrefixCriticConfig must be at least 1, got {self}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads}")

    def num_prefixes(self, spec: AgentSpec) -> int:
        """H: a value for every prefix."""
        return spec.action_horizon

    def build(self, spec: AgentSpec, rngs: nnx.Rngs) -> nnx.Module:
        return PrefixCritic(spec, self, rngs)


class PrefixCritic(nnx.Module):
    """Q(s, a_{t:t+i}) for i = 1..H, of E members that share nothing.

    Hidden states are [E, B * T, W] with T = 1 + H tokens: all that is done token by token is one product a member.
    """

    def __init__(self, spec: AgentSpec, config: PrefixCriticConfig, rngs: nnx.Rngs) -> None:
        members, width = config.num_members, config.width
        self.from_obs = EnsembleLinear(members, spec.obs_dim, width, rngs=rngs, scale=1.0)
        self.from_action = EnsembleLinear(members, spec.action_dim, width, rngs=rngs, scale=1.0)
        shape = (members, 1, 1 + spec.action_horizon, width)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))
        self.blocks = nnx.List(CausalBlock(config, rngs) for _ in range(config.num_layers))
        self.norm = EnsembleLayerNorm(members, width)
        self.out = EnsembleLinear(members, width, config.head.out_dim, rngs=rngs, scale=1.0)

    def __call__(self, obs: Array, actions: Array) -> Array:
        """[B, O], [N * B, H, A] -> [E, N * B, H, D], as `candidate_values` wants it."""
        members, (b, h, a) = self.out.num_members, actions.shape
        of_obs = self.from_obs(jnp.broadcast_to(obs, (members, *obs.shape)))
        state = jnp.tile(of_obs, (1, b // len(obs), 1))[:, :, None]
        action = self.from_action(jnp.broadcast_to(actions.reshape(b * h, a), (members, b * h, a)))
        tokens = jnp.concatenate([state, action.reshape(members, b, h, -1)], axis=2) + self.position[...]
        x = tokens.reshape(members, b * (1 + h), -1)
        for block in self.blocks:
            x = block(x, 1 + h)
        x = x.reshape(members, b, 1 + h, -1)[:, :, 1:]
        return self.out(self.norm(x.reshape(members, b * h, -1))).reshape(members, b, h, -1)


class CausalBlock(nnx.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: PrefixCriticConfig, rngs: nnx.Rngs) -> None:
        members, width, hidden = config.num_members, config.width, config.mlp_ratio * config.width
        residual = 1.0 / math.sqrt(2.0 * config.num_layers)  # so that depth does not raise the scale of the values
        self.norm_attention = EnsembleLayerNorm(members, width)
        self.qkv = EnsembleLinear(members, width, 3 * width, rngs=rngs, scale=1.0)
        self.mix = EnsembleLinear(members, width, width, rngs=rngs, scale=residual)
        self.norm_mlp = EnsembleLayerNorm(members, width)
        self.up = EnsembleLinear(members, width, hidden, rngs=rngs, scale=math.sqrt(2.0))
        self.down = EnsembleLinear(members, hidden, width, rngs=rngs, scale=residual)
        self.num_heads = config.num_heads

    def __call__(self, x: Array, num_tokens: int) -> Array:
        """[E, B * T, W] -> [E, B * T, W]."""
        x = x + self.mix(self._attention(self.qkv(self.norm_attention(x)), num_tokens))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))

    def _attention(self, qkv: Array, num_tokens: int) -> Array:
        """[E, B * T, 3 W] -> [E, B * T, W]; a token attends to itself and to those before it."""
        members, rows, _ = qkv.shape
        split = qkv.reshape(members, rows // num_tokens, num_tokens, 3, self.num_heads, -1)
        query, key, value = split[:, :, :, 0], split[:, :, :, 1], split[:, :, :, 2]
        scores = jnp.einsum("ebqhd,ebkhd->ebhqk", query, key) / math.sqrt(query.shape[-1])
        causal = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        return jnp.einsum("ebhqk,ebkhd->ebqhd", weights, value).reshape(members, rows, -1)


__all__ = ["PrefixCritic", "PrefixCriticConfig"]
