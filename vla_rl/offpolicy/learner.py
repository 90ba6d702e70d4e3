"""An off-policy agent that learns from replay and acts in environments: normalisation, noise and state in one place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import torch
from torch import Tensor

from vla_rl.core import Observation
from vla_rl.data.replay import ReplayBatch, ReplayBuffer
from vla_rl.offpolicy.networks import ACTION_LIMIT
from vla_rl.offpolicy.train_state import TrainState, from_tensors, to_tensors, with_raw_key, wrap_raw_key
from vla_rl.offpolicy.update import Metrics
from vla_rl.offpolicy.wsrl import CarryOver, carry_over
from vla_rl.policies.blocks.deployed_agent import DeployedAgent


class AgentLearner:
    """`policy` is the agent as it would be deployed, with its normalisers; `state` all that learns.

    Replay holds states and actions in the environment's units; what the agent sees is made here, and nowhere else.
    """

    def __init__(self, policy: DeployedAgent, seed: int) -> None:
        self.policy: Any = policy
        self.agent = policy.agent
        self.horizon = self.policy.config.action_horizon
        self._chunk = (self.policy.action_horizon, self.policy.action_dim)
        self.needs_prefixes = getattr(self.agent, "num_prefixes", 1) > 1
        self.state: TrainState = self.agent.init(seed)
        self._generator = torch.Generator().manual_seed(seed)
        policy.take(self.state)

    def explore(self, obs: Observation) -> Tensor:
        """Chunks [N, H, A] in the environment's units, with the agent's own exploration."""
        noise = torch.randn(len(obs), *self._chunk, generator=self._generator)
        return self.policy.explore(obs, noise)

    def random(self, num_envs: int) -> Tensor:
        """Uniform chunks [N, H, A] within the bounds."""
        uniform = torch.rand(num_envs, *self._chunk, generator=self._generator)
        return self.policy.action_normalizer.unnormalize(2.0 * uniform - 1.0)

    def seed_exploration(self, seed: int) -> None:
        """Decides what `explore` and `random` draw from now on."""
        self._generator.manual_seed(seed)

    def acting_copy(self) -> Self:
        """A copy on the CPU, to act with in another process."""
        there = copy.deepcopy(self)
        there.policy.to("cpu")
        return there

    def acting_weights(self) -> list[Tensor]:
        """What acting depends on and learning changes, on the CPU."""
        return [torch.from_numpy(np.array(x)) for x in jax.tree.leaves(self.policy.deployed_state.params)]

    def act_with(self, weights: Sequence[Tensor]) -> None:
        """Act with the `acting_weights` of another learner of the same build."""
        structure = jax.tree.structure(self.policy.deployed_state.params)
        self.policy.take(self.state._replace(params=jax.tree.unflatten(structure, [x.numpy() for x in weights])))

    def prepare(self, buffer: ReplayBuffer) -> None:
        """Nothing: the state is all that the agent sees."""

    def update(self, batches: ReplayBatch) -> Metrics:
        """One call of the agent's update with minibatches [U, B, ...]. Metrics stay on the device."""
        self.state, metrics = self.agent.update(self.state, self.normalized(batches))
        return metrics

    def publish(self) -> None:
        """Act and evaluate with the parameters as they are now."""
        self.policy.take(self.state)

    def normalized(self, batch: ReplayBatch) -> ReplayBatch:
        """What the agent sees of a batch; actions are clipped to the inside of [-1, 1]."""
        prefix_next, box = batch.prefix_next_obs, self.policy.action_normalizer
        actions = (batch.actions - box.offset.cpu().numpy()) / box.scale.cpu().numpy()
        return batch._replace(
            obs=self._seen(batch.obs),
            next_obs=self._seen(batch.next_obs),
            prefix_next_obs=None if prefix_next is None else self._seen(prefix_next),
            actions=np.clip(actions, -ACTION_LIMIT, ACTION_LIMIT),
        )

    def _seen(self, obs: np.ndarray) -> np.ndarray:
        """The state, normalised."""
        normalizer = self.policy.state_normalizer
        return (obs - normalizer.offset.numpy()) / normalizer.scale.numpy()

    def state_dict(self) -> dict[str, Any]:
        return {
            "train_state": to_tensors(with_raw_key(self.state)),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the state is of another agent."""
        raw = from_tensors(state["train_state"], with_raw_key(self.state), "the stored state")
        self.state = wrap_raw_key(raw)
        self._generator.set_state(state["generator"])
        self.publish()

    def switch_from(self, offline: AgentLearner, carried: CarryOver, seed: int) -> None:
        """Go on from what `offline` has learned; see `wsrl.carry_over`."""
        self.state = carry_over(offline.state, self.agent, carried, seed)
        if carried.generator:
            self._generator.set_state(offline._generator.get_state())
        self.publish()

    def start_from_clone(self, cloned: AgentLearner, seed: int) -> None:
        """Begin with the actor of behaviour cloning (stage 1 of CO-RFT). Raises ValueError for another network's."""
        self.state = self.agent.init_from(cloned.state, seed)
        self.publish()
