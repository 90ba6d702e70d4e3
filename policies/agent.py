"""An off-policy agent as a policy: it is saved, evaluated and deployed like any other.

Its parameters are JAX's; here they are buffers (`DeployedAgent`), so that the policy's folder, its checks and its
loading are those of all policies. The chunk that it deploys is the agent's own: tanh of the mean, the one-step flow,
the best of N.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vla_rl.core import ActionChunk, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.offpolicy.arrays import to_jax, to_torch
from vla_rl.offpolicy.build import AgentConfig, build_agent
from vla_rl.offpolicy.networks import AgentSpec
from vla_rl.offpolicy.sac import SACConfig
from vla_rl.policies.blocks.deployed_agent import DeployedAgent
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.policies.blocks.sizes import require_sizes


@dataclass(frozen=True)
class AgentPolicyConfig:
    """`action_horizon`: steps of the chunks that the agent learns from. `state_dim`, `action_dim`: 0 in a recipe, where
    `build_policy` takes them from the environment."""

    agent: AgentConfig = field(default_factory=SACConfig)
    action_horizon: int = 1
    state_dim: int = 0
    action_dim: int = 0


class AgentPolicy(DeployedAgent):
    """Sees the state only."""

    def __init__(self, config: AgentPolicyConfig) -> None:
        require_sizes(config)
        super().__init__(
            build_agent(config.agent, AgentSpec(config.state_dim, config.action_horizon, config.action_dim))
        )
        self.config = config
        # the n-step control learns from chunks and acts in single steps
        self.action_horizon = getattr(self.agent, "action_horizon", config.action_horizon)
        self.action_dim = config.action_dim
        self.state_normalizer = NormalizerBuffers(config.state_dim)
        self.action_normalizer = NormalizerBuffers(config.action_dim)

    def set_normalization(self, state: Normalizer, action: Normalizer) -> None:
        """Normalisers of the state [S] and of one control step's action [A]; the action's maps its bounds to -1, 1."""
        self.state_normalizer.set(state)
        self.action_normalizer.set(action)

    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """The deployed chunk, [N, H, A] in the environment's units. Raises ValueError for a state of another size."""
        chunk = self._agent_chunk(obs, noise, explore=False)
        return ActionChunk(self.action_normalizer.unnormalize(chunk))

    def explore(self, obs: Observation, noise: Tensor) -> Tensor:
        """A chunk to explore with, [N, H, A] in the environment's units."""
        return self.action_normalizer.unnormalize(self._agent_chunk(obs, noise, explore=True))

    def _agent_chunk(self, obs: Observation, noise: Tensor, explore: bool) -> Tensor:
        if obs.state.shape[1] != self.config.state_dim:
            raise ValueError(f"the policy needs state [N, {self.config.state_dim}], got {tuple(obs.state.shape)}")
        state = self.state_normalizer.normalize(obs.state)
        chunk = self.agent.act(self.deployed_state, to_jax(state), to_jax(noise), explore=explore)
        return to_torch(chunk, obs.state.device)
