"""Which scripted expert acts in which environment."""

from __future__ import annotations

from vla_rl.envs.config import AnyEnvConfig, EnvConfig, PerturbedConfig, PointMazeConfig
from vla_rl.envs.gym import FunctionExpert, FunctionExpertConfig, GymConfig
from vla_rl.envs.ogbench import OGBenchConfig
from vla_rl.envs.ogbench_expert import CubeOracle, CubeOracleConfig
from vla_rl.envs.point_maze import WaypointConfig, WaypointExpert
from vla_rl.envs.remote_expert import RemoteExpert, RemoteExpertConfig
from vla_rl.envs.twin import TwinEnvConfig
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.sim.experts import ExpertConfig, ScriptedExpert

AnyExpertConfig = ExpertConfig | WaypointConfig | FunctionExpertConfig | RemoteExpertConfig | CubeOracleConfig
AnyExpert = ScriptedExpert | WaypointExpert | FunctionExpert | RemoteExpert | CubeOracle


def make_expert(env: ChunkedEnv, config: AnyExpertConfig) -> AnyExpert:
    """Who demonstrates in `env`. Raises TypeError where it is an expert of other environments."""
    if isinstance(config, FunctionExpertConfig):
        return FunctionExpert(env, config)
    if isinstance(config, RemoteExpertConfig):
        return RemoteExpert(env, config)
    if isinstance(config, CubeOracleConfig):
        return CubeOracle(env, config)
    return WaypointExpert(env, config) if isinstance(config, WaypointConfig) else ScriptedExpert(env, config)


def best_expert(env: AnyEnvConfig) -> AnyExpertConfig:
    """The expert of an environment, without clumsiness. Raises ValueError for a Gymnasium environment, whose expert is
    a function that somebody has to name, and for the twin, which shows nobody its simulator."""
    if isinstance(env, PerturbedConfig):
        return best_expert(env.env)
    if isinstance(env, TwinEnvConfig):
        raise ValueError("the twin has no scripted expert; evaluate the expert in the simulator that the twin is of")
    if isinstance(env, GymConfig):
        raise ValueError(
            f"{env.task} has no scripted expert; name a function of your own as the policy, module:function"
        )
    if isinstance(env, EnvConfig):
        return ExpertConfig()
    if isinstance(env, PointMazeConfig):
        return WaypointConfig()
    return CubeOracleConfig() if isinstance(env, OGBenchConfig) else RemoteExpertConfig()


__all__ = ["AnyExpert", "AnyExpertConfig", "best_expert", "make_expert"]
