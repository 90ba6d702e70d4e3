"""From an agent's config to the agent."""

from __future__ import annotations

from typing import Any

from vla_rl.offpolicy.calql import CalQL, CalQLConfig
from vla_rl.offpolicy.co_rft import BehaviorCloning, BehaviorCloningConfig, CoRFT, CoRFTConfig
from vla_rl.offpolicy.dsrl import DSRLNA, DSRLConfig
from vla_rl.offpolicy.expo import Expo, ExpoConfig
from vla_rl.offpolicy.iql import IQL, IQLConfig
from vla_rl.offpolicy.networks import AgentSpec
from vla_rl.offpolicy.qc import QC, QCConfig
from vla_rl.offpolicy.residual import Residual, ResidualConfig
from vla_rl.offpolicy.sac import SAC, SACConfig
from vla_rl.offpolicy.td3 import TD3, TD3Config

# Agents that act by themselves. RLPD and WSRL's online phase are SAC, CQL is Cal-QL without calibration, FQL is QC.
AgentConfig = SACConfig | CalQLConfig | IQLConfig | TD3Config | CoRFTConfig | BehaviorCloningConfig | QCConfig
_AGENTS: dict[type, Any] = {
    SACConfig: SAC,
    CalQLConfig: CalQL,
    IQLConfig: IQL,
    TD3Config: TD3,
    CoRFTConfig: CoRFT,
    BehaviorCloningConfig: BehaviorCloning,
    QCConfig: QC,
}

# Agents that steer a frozen policy. DSRL is DSRLNA here: replay holds executed chunks and not the noise behind them.
SteeringConfig = DSRLConfig | ExpoConfig | ResidualConfig
SteeringAgent = DSRLNA | Expo | Residual


def build_agent(config: AgentConfig, spec: AgentSpec) -> Any:
    """An `OffPolicyAgent`. Raises TypeError for a config that no agent has."""
    if type(config) not in _AGENTS:
        raise TypeError(
            f"{type(config).__name__} is no agent's config; use one of {', '.join(sorted(c.__name__ for c in _AGENTS))}"
        )
    return _AGENTS[type(config)](spec, config)


def build_steering(config: SteeringConfig, spec: AgentSpec) -> SteeringAgent:
    """An agent that steers chunks of `spec`'s shape."""
    if isinstance(config, DSRLConfig):
        return DSRLNA(spec, config)
    return Expo(spec, config) if isinstance(config, ExpoConfig) else Residual(spec, config)
