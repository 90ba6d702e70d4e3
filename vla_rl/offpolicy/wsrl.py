"""WSRL (arXiv 2412.07762): from offline to online without keeping the offline data.

WSRL has no loss of its own. The whole train state of a pessimistic agent crosses the switch, K steps of the frozen
policy fill an empty buffer, and then plain SAC goes on at a high update-to-data ratio. What is carried over is stated
item by item, so that each can be left out and seen to matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from vla_rl.offpolicy.train_state import TrainState

_LEFT_BEHIND = ("cql_multiplier",)  # belongs to the pessimism that ends at the switch


@dataclass(frozen=True)
class CarryOver:
    """What crosses the switch. The defaults are WSRL's; each other value is a control.

    `target`: "carried" (its own copy, which lags behind the critic), "critic" (a copy of the critic) or "fresh" (new).
    `moments`: of every optimiser; False is PA-RL's choice. `temperature`: else the agent's initial one.
    `generator`: of noise and subsets.
    """

    actor: bool = True
    critic: bool = True
    target: Literal["carried", "critic", "fresh"] = "carried"
    moments: bool = True
    temperature: bool = True
    generator: bool = True


class HasInitialState(Protocol):
    """An agent, whatever its update looks like."""

    def init(self, seed: int) -> TrainState: ...


def carry_over(offline: TrainState, agent: HasInitialState, carried: CarryOver, seed: int) -> TrainState:
    """The first online train state of `agent`; `seed` is that of what is not carried.

    Only the multiplier of the conservative term is left behind by itself. Raises ValueError where the offline state
    lacks a part of the agent, has one that the agent lacks, or one of another shape.
    """
    fresh = agent.init(seed)
    params, moments = dict(fresh.params), dict(fresh.moments)
    taken = {
        "actor": carried.actor,
        "critic": carried.critic,
        "target_critic": carried.target == "carried",
        "temperature": carried.temperature,
    }
    _check_parts(offline, fresh)
    for name in params:
        if taken.get(name, True):
            params[name] = _same_shape(name, offline.params[name], params[name])
            if carried.moments and name in moments:
                moments[name] = _same_shape(f"moments of {name}", offline.moments[name], moments[name])
    if carried.target == "critic":
        params["target_critic"] = params["critic"]
    return jax.tree.map(  # copies: an update hands its input's memory on, and the offline state may be used again
        jnp.copy,
        TrainState(params, moments, offline.key if carried.generator else fresh.key, offline.num_updates),
    )


def _check_parts(offline: TrainState, fresh: TrainState) -> None:
    here, there = set(fresh.params), set(offline.params) - set(_LEFT_BEHIND)
    if here != there:
        raise ValueError(
            f"the offline agent has {sorted(there)}, the online one {sorted(here)}; "
            "use an online agent with the same parts (SAC after CQL or Cal-QL)"
        )


def _same_shape(name: str, carried: object, fresh: object) -> object:
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (carried, fresh)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{name} is another network offline ({shapes[0]}) than online ({shapes[1]}); give both agents the same "
            "actor and critic configuration"
        )
    return carried
