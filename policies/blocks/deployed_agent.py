"""A JAX agent inside of a policy: what it deploys is held as buffers, so that it is saved, loaded and moved with it."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from vla_rl.offpolicy.arrays import to_jax
from vla_rl.offpolicy.train_state import TrainState


class DeployedAgent(nn.Module):
    """`take(state)` gives it an agent's parameters; new ones are those of `agent.init(0)`."""

    def __init__(self, agent: Any) -> None:
        super().__init__()
        self.agent = agent
        initial = agent.init(0)
        self._parts: tuple[str, ...] = getattr(agent, "deployed_parts", ("actor",))
        self._structure = jax.tree.structure({name: initial.params[name] for name in self._parts})
        self._names: list[str] = []
        self._state: TrainState | None = None
        self.take(initial)

    def take(self, state: TrainState) -> None:
        """The parameters of `state` are this policy's from now on."""
        parts = {name: state.params[name] for name in self._parts}
        leaves, _ = jax.tree_util.tree_flatten_with_path(parts)
        self._names = [re.sub(r"\W+", "_", jax.tree_util.keystr(path)).strip("_") for path, _ in leaves]
        for name, (_, leaf) in zip(self._names, leaves, strict=True):
            self.register_buffer(name, torch.from_numpy(np.array(leaf)))
        self._state = None

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._state = None
        return super().load_state_dict(*args, **kwargs)

    @property
    def deployed_state(self) -> TrainState:
        """The parameters as the agent's `act` takes them."""
        if self._state is None:
            leaves = [to_jax(self.get_buffer(name)) for name in self._names]
            params = jax.tree.unflatten(self._structure, [jnp.copy(leaf) for leaf in leaves])
            self._state = TrainState(params, {}, jax.random.key(0), jnp.zeros((), jnp.int32))
        return self._state
