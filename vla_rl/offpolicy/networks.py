"""Networks of off-policy agents, and the step from an nnx module to a pure function of its parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

Params = Any  # a pytree of arrays
_LOG_STD_MIN, _LOG_STD_MAX = math.log(1e-5), math.log(10.0)
ACTION_LIMIT = 0.99999  # actions of data are clipped to it, so that tanh's inverse is finite


@dataclass(frozen=True)
class AgentSpec:
    """Sizes that an agent's networks have: `obs_dim` O of the critic's observation, chunks [H, A]."""

    obs_dim: int
    action_horizon: int
    action_dim: int

    def __post_init__(self) -> None:
        for name in ("obs_dim", "action_horizon", "action_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"AgentSpec.{name} is {getattr(self, name)}, expected at least 1")

    @property
    def chunk_dim(self) -> int:
        """H * A."""
        return self.action_horizon * self.action_dim


class Network:
    """A module as a pure function: `network(params, *inputs)`. `params` of a new one: `network.initial`."""

    def __init__(self, module: nnx.Module) -> None:
        self._graph, self.initial = nnx.split(module)

    def __call__(self, params: Params, *inputs: Any) -> Any:
        return nnx.merge(self._graph, params)(*inputs)  # type: ignore[operator]

    def method(self, name: str) -> Callable[..., Any]:
        """Another method of the module as a pure function."""
        return lambda params, *inputs: getattr(nnx.merge(self._graph, params), name)(*inputs)


def _orthogonal(scale: float = math.sqrt(2.0)) -> nnx.Initializer:
    return nnx.initializers.orthogonal(scale)


class MLP(nnx.Module):
    """[B, I] -> [B, out_dim]. Every hidden layer is Linear, LayerNorm where asked for, activation.

    `out_scale`: gain of the last layer's orthogonal initialisation; 1e-2 starts outputs near zero.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_sizes: Sequence[int],
        out_dim: int,
        *,
        layer_norm: bool,
        rngs: nnx.Rngs,
        activation: Callable[[Array], Array] = nnx.relu,
        out_scale: float = 1.0,
    ) -> None:
        sizes = [in_dim, *hidden_sizes]
        self.linear = nnx.List(
            nnx.Linear(a, b, kernel_init=_orthogonal(), rngs=rngs) for a, b in itertools.pairwise(sizes)
        )
        self.norm = nnx.List(nnx.LayerNorm(b, rngs=rngs) for b in hidden_sizes if layer_norm)
        self.out = nnx.Linear(sizes[-1], out_dim, kernel_init=_orthogonal(out_scale), rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        for i, linear in enumerate(self.linear):
            x = linear(x)
            x = self.activation(self.norm[i](x) if self.norm else x)
        return self.out(x)


class EnsembleLinear(nnx.Module):
    """E linear layers at once: [E, B, I] -> [E, B, out_dim], one batched product instead of E small ones."""

    def __init__(self, num_members: int, in_dim: int, out_dim: int, *, rngs: nnx.Rngs, scale: float) -> None:
        init = _orthogonal(scale)
        keys = jax.random.split(rngs.params(), num_members)
        self.kernel = nnx.Param(jnp.stack([init(key, (in_dim, out_dim), jnp.float32) for key in keys]))
        self.bias = nnx.Param(jnp.zeros((num_members, 1, out_dim)))

    @property
    def num_members(self) -> int:
        """E of the parameters as they are now, which may be those of a subset."""
        return self.kernel[...].shape[0]

    def __call__(self, x: Array) -> Array:
        return jnp.einsum("ebi,eio->ebo", x, self.kernel[...]) + self.bias[...]

    def of_parts(self, *parts: Array) -> Array:
        """Of `parts` [B / n, I_i] side by side, the same for every member: [E, B, out_dim]. A part with fewer rows than
        others is repeated n times, and multiplied once."""
        num_rows = max(len(part) for part in parts)
        if all(len(part) == num_rows for part in parts):
            x = jnp.concatenate(parts, axis=-1)
            return self(jnp.broadcast_to(x, (self.num_members, *x.shape)))
        out, begin = self.bias[...], 0
        for part in parts:
            kernel = self.kernel[:, begin : begin + part.shape[1]]
            out = out + jnp.tile(jnp.einsum("bi,eio->ebo", part, kernel), (1, num_rows // len(part), 1))
            begin += part.shape[1]
        return out


class EnsembleLayerNorm(nnx.Module):
    """LayerNorm over the last axis with a scale and a shift for each of E members."""

    def __init__(self, num_members: int, dim: int) -> None:
        self.scale = nnx.Param(jnp.ones((num_members, 1, dim)))
        self.bias = nnx.Param(jnp.zeros((num_members, 1, dim)))

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
        return normal * self.scale[...] + self.bias[...]


class EnsembleMLP(nnx.Module):
    """E independent MLPs of one input, which comes in parts (`EnsembleLinear.of_parts`): [B, I] -> [E, B, out_dim]."""

    def __init__(
        self,
        num_members: int,
        in_dim: int,
        hidden_sizes: Sequence[int],
        out_dim: int,
        *,
        layer_norm: bool,
        rngs: nnx.Rngs,
        activation: Callable[[Array], Array] = nnx.relu,
    ) -> None:
        sizes = [in_dim, *hidden_sizes]
        self.linear = nnx.List(
            EnsembleLinear(num_members, a, b, rngs=rngs, scale=math.sqrt(2.0)) for a, b in itertools.pairwise(sizes)
        )
        self.norm = nnx.List(EnsembleLayerNorm(num_members, b) for b in hidden_sizes if layer_norm)
        self.out = EnsembleLinear(num_members, sizes[-1], out_dim, rngs=rngs, scale=1.0)
        self.activation = activation

    def __call__(self, *parts: Array) -> Array:
        first, *others = self.linear
        h = self._activated(0, first.of_parts(*parts))
        for i, linear in enumerate(others, start=1):
            h = self._activated(i, linear(h))
        return self.out(h)

    def _activated(self, layer: int, h: Array) -> Array:
        return self.activation(self.norm[layer](h) if self.norm else h)


# ------------------------------------------------------------------------------------------------------------ actors
@dataclass(frozen=True)
class ActorNetConfig:
    """`std`: "state" (a head of the network) or "shared" (one parameter a dimension, whatever the observation)."""

    hidden_sizes: tuple[int, ...] = (256, 256)
    layer_norm: bool = True
    std: Literal["state", "shared"] = "state"
    out_scale: float = 1e-2


class TanhGaussianActor(nnx.Module):
    """obs [B, O] -> mean and standard deviation, each [B, H, A], of the Gaussian before the tanh."""

    def __init__(self, spec: AgentSpec, config: ActorNetConfig, rngs: nnx.Rngs) -> None:
        outputs = spec.chunk_dim * (2 if config.std == "state" else 1)
        self.mlp = MLP(
            spec.obs_dim,
            config.hidden_sizes,
            outputs,
            layer_norm=config.layer_norm,
            out_scale=config.out_scale,
            rngs=rngs,
        )
        self.log_std = nnx.Param(jnp.zeros(spec.chunk_dim)) if config.std == "shared" else None
        self.chunk = (spec.action_horizon, spec.action_dim)

    def __call__(self, obs: Array) -> tuple[Array, Array]:
        out = self.mlp(obs)
        if self.log_std is None:
            mean, log_std = jnp.split(out, 2, axis=-1)
        else:
            mean, log_std = out, jnp.broadcast_to(self.log_std[...], out.shape)
        std = jnp.exp(jnp.clip(log_std, _LOG_STD_MIN, _LOG_STD_MAX))
        return mean.reshape(-1, *self.chunk), std.reshape(-1, *self.chunk)


class DeterministicActor(nnx.Module):
    """obs [B, O] -> chunk [B, H, A] in [-1, 1]."""

    def __init__(self, spec: AgentSpec, config: ActorNetConfig, rngs: nnx.Rngs) -> None:
        self.mlp = MLP(
            spec.obs_dim,
            config.hidden_sizes,
            spec.chunk_dim,
            layer_norm=config.layer_norm,
            out_scale=config.out_scale,
            rngs=rngs,
        )
        self.chunk = (spec.action_horizon, spec.action_dim)

    def __call__(self, obs: Array) -> Array:
        return jnp.tanh(self.mlp(obs)).reshape(-1, *self.chunk)


def sample_tanh_gaussian(mean: Array, std: Array, key: Array, num_samples: int) -> tuple[Array, Array]:
    """Chunks [M, B, H, A] and their log-densities [M, B], for M = `num_samples`."""
    return tanh_gaussian(mean, std, jax.random.normal(key, (num_samples, *mean.shape)))


def tanh_gaussian(mean: Array, std: Array, noise: Array) -> tuple[Array, Array]:
    """Chunks and log-densities that standard normal `noise` [M, B, H, A] makes."""
    before = mean + std * noise
    return jnp.tanh(before), tanh_gaussian_log_prob(before, mean, std)


def tanh_gaussian_log_prob(before: Array, mean: Array, std: Array, mask: Array | None = None) -> Array:
    """log-density of tanh(`before`), summed over [H, A]. log(1 - tanh^2 u) is written so that it cannot overflow.

    `mask` bool [B, H]: the steps that count.
    """
    squash = 2.0 * (math.log(2.0) - before - jax.nn.softplus(-2.0 * before))
    steps = (gaussian_log_density(before, mean, std) - squash).sum(axis=-1)
    return steps.sum(axis=-1, where=mask)


def gaussian_log_density(x: Array, mean: Array, std: Array) -> Array:
    """log-density of each element of `x`."""
    return -0.5 * jnp.square((x - mean) / std) - jnp.log(std) - 0.5 * math.log(2.0 * math.pi)
