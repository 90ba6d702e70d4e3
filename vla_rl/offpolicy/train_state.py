"""Everything that an off-policy agent's next update depends on, as one pytree; saved and restored bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax import Array

from vla_rl.offpolicy.networks import Params
from vla_rl.train.checkpoint import CheckpointError, load_state, save_state


class TrainState(NamedTuple):
    """`params`: by name ("actor", "critic", "target_critic", "temperature", ...). `moments`: state of the optimiser of
    each trained one. `key`: of the generator. `num_updates`: critic updates done."""

    params: dict[str, Params]
    moments: dict[str, Any]
    key: Array
    num_updates: Array


class Optimizers:
    """One Adam for each trained part, so that a part that is not updated keeps its moments (and its parameters).

    A single optimiser fed with zero gradients would go on moving along its momentum.
    """

    def __init__(self, learning_rates: Mapping[str, float], grad_clip: float | None = None) -> None:
        self._of = {
            name: optax.adam(rate)
            if grad_clip is None
            else optax.chain(optax.clip_by_global_norm(grad_clip), optax.adam(rate))
            for name, rate in learning_rates.items()
        }

    def init(self, params: Mapping[str, Params]) -> dict[str, Any]:
        return {name: optimizer.init(params[name]) for name, optimizer in self._of.items()}

    def apply(self, state: TrainState, gradients: Mapping[str, Params]) -> TrainState:
        """One step of each part in `gradients`; all others stay as they are."""
        params, moments = dict(state.params), dict(state.moments)
        for name, gradient in gradients.items():
            updates, moments[name] = self._of[name].update(gradient, moments[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        return state._replace(params=params, moments=moments)


def polyak(state: TrainState, online: str, target: str, tau: float) -> TrainState:
    """target <- tau * online + (1 - tau) * target."""
    mixed = optax.incremental_update(state.params[online], state.params[target], tau)
    return state._replace(params={**state.params, target: mixed})


def split_key(state: TrainState, num: int) -> tuple[TrainState, Array]:
    """`num` keys to use, and the state with a fresh one."""
    keys = jax.random.split(state.key, num + 1)
    return state._replace(key=keys[0]), keys[1:]


# -------------------------------------------------------------------------------------------------------------- files
def to_tensors(tree: Any) -> dict[str, torch.Tensor]:
    """Leaves by their path, as torch tensors for `save_state`."""
    return {path: torch.from_numpy(np.array(leaf)) for path, leaf in _leaves(tree)}


def from_tensors(stored: Mapping[str, torch.Tensor], like: Any, where: str) -> Any:
    """A tree of the structure of `like`. Raises CheckpointError where a leaf is missing, too many, or of another shape
    or type."""
    leaves = _leaves(like)
    missing = sorted({path for path, _ in leaves} ^ set(stored))
    if missing:
        raise CheckpointError(f"{where} is of another agent: {', '.join(missing[:4])} is in one of them only")
    out = []
    for path, leaf in leaves:
        array, wanted = stored[path].numpy(), np.asarray(leaf)
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise CheckpointError(
                f"{where}: {path} is {array.dtype} {array.shape}, this agent has {wanted.dtype} {wanted.shape}; "
                "resume with the configuration of the stored run"
            )
        out.append(jnp.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(like), out)


def save_train_state(path: str | Path, state: TrainState) -> None:
    """Write `state` atomically. Raises OSError (a full disk) with the former file untouched."""
    save_state(path, to_tensors(with_raw_key(state)))


def load_train_state(path: str | Path, like: TrainState) -> TrainState:
    """What `save_train_state` wrote; `like` is a new state of the same agent. Raises CheckpointError."""
    return wrap_raw_key(from_tensors(load_state(path), with_raw_key(like), str(path)))


def with_raw_key(state: TrainState) -> TrainState:
    """The generator's key as plain numbers, for files."""
    return state._replace(key=jax.random.key_data(state.key))


def wrap_raw_key(state: TrainState) -> TrainState:
    """Inverse of `with_raw_key`."""
    return state._replace(key=jax.random.wrap_key_data(state.key))


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in paths]
