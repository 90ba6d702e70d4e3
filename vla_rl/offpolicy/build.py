"""From an agent's config to the agent."""

from __future__ import annotations

from typing import Any

from vla_rl.offpolicy.calql import CalQL, CalQLConfig
from vla_rl.offpolicy.networks import AgentSpec
from vla_rl.offpolicy.sac import SAC, SACConfig

AgentConfig = SACConfig | CalQLConfig
_AGENTS: dict[type, Any] = {SACConfig: SAC, CalQLConfig: CalQL}


def build_agent(config: AgentConfig, spec: AgentSpec) -> Any:
    """An `OffPolicyAgent`. Raises TypeError for a config that no agent has."""
    if type(config) not in _AGENTS:
        raise TypeError(
            f"{type(config).__name__} is no agent's config; use one of {', '.join(sorted(c.__name__ for c in _AGENTS))}"
        )
    return _AGENTS[type(config)](spec, config)
