"""An environment step's update in one jit: all critic updates in a scan, then actor and temperature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.train_state import TrainState

Metrics = dict[str, Array]
# The second argument is a ReplayBatch, or a tuple of it and the arrays that belong to its rows.
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
ActorBatch = Literal["all", "last"]


class OffPolicyAgent(Protocol):
    """What the training loop asks of an agent. All methods are pure, and `update` is jitted."""

    def init(self, seed: int) -> TrainState: ...

    def update(self, state: TrainState, batches: ReplayBatch) -> tuple[TrainState, Metrics]:
        """`batches`: U minibatches, every field [U, B, ...]; U is the update-to-data ratio."""
        ...

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """obs [N, O] -> chunks [N, H, A] in [-1, 1]: to explore with, or the deployed policy's.

        `noise`, standard normal [N, H, A], is all its randomness, row by row: the caller owns it, as with `Policy`."""
        ...


def make_update(critic_step: Step, actor_step: Step | None, actor_batch: ActorBatch = "all") -> Any:
    """A jitted `update(state, batches)`; the old state's memory is reused, so keep no reference to it.

    `batches` is what the steps scan over, any pytree of arrays [U, B, ...].
    `actor_batch`: the actor step sees all U * B rows at once (WSRL), or the last minibatch (RLPD). Metrics are arrays
    on the device: nothing waits for them until somebody reads one.
    """

    def update(state: TrainState, batches: ReplayBatch) -> tuple[TrainState, Metrics]:
        state, per_step = jax.lax.scan(critic_step, state, batches)
        metrics = jax.tree.map(lambda x: x.mean(axis=0), per_step)
        if actor_step is None:
            return state, metrics
        if actor_batch == "all":
            rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
        else:
            rows = jax.tree.map(lambda x: x[-1], batches)
        state, actor_metrics = actor_step(state, rows)
        return state, metrics | actor_metrics

    return jax.jit(update, donate_argnums=0)
