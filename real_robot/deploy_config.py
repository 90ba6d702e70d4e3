"""Options of a deployment, and the episodes that a recipe's policy knows. Needs no hardware's packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vla_rl.envs.config import EnvConfig
from vla_rl.envs.twin import TwinEnvConfig
from vla_rl.policies.checkpoints.config_json import config_to_dict
from vla_rl.real_robot.loop_config import HEARTBEAT_S, MAX_PLAN_AGE_S, LoopConfig
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.train.recipe import Recipe

CAMERA_HZ = 50.0  # a simulator's picture is as new as its state; one of 20 Hz is up to a control step older


@dataclass(frozen=True)
class DeployConfig:
    """`episodes`: how many. `mode`: how chunks become actions, see `BrokerConfig`. `server`: address of a policy server
    that runs, "" to start one. `shadow`: everything runs and nothing is sent.

    `limits` of the safety filter: "tabletop" has the simulator's joint speeds, reached within a control period, as the
    policies have learned; "panda" has the accelerations and jerks that Franka Robotics documents besides.
    `speed_scale`: share of them, see `SafetyConfig`. `periods_ahead`: see `DDSArmConfig`; with a fifth the twin is near
    to the simulator's servos, an arm on a table wants 1. `max_state_age_s`: see `SafetyConfig`. `max_picture_age_s`,
    `max_plan_age_s` (but in mode sync, where the arm waits), `grace_s`: see `LoopConfig`. `silence_s`: a control loop
    that is silent for longer is taken for dead by the supervisor. `reply_s`: the longest wait for the policy.
    `heartbeat_s`: the longest wait for its server to answer a ping, see `PolicyClient`.
    `num_videos`: of the first episodes.
    """

    robot: Literal["twin"] = "twin"
    episodes: int = 20
    mode: Literal["sync", "async", "ensemble", "rtc"] = "async"
    server: str = ""
    shadow: bool = False
    limits: Literal["tabletop", "panda"] = "tabletop"
    speed_scale: float = 1.0
    periods_ahead: float = 0.2
    max_state_age_s: float = SafetyConfig.max_state_age_s
    max_picture_age_s: float = LoopConfig.max_picture_age_s
    max_plan_age_s: float = MAX_PLAN_AGE_S
    grace_s: float = LoopConfig.grace_s
    silence_s: float = 0.12
    reply_s: float = 0.5
    heartbeat_s: float = HEARTBEAT_S
    num_videos: int = 3

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.num_videos < 0:
            raise ValueError(f"DeployConfig: episodes must be at least 1, num_videos 0 or more, got {self}")


@dataclass(frozen=True)
class TabletopScene:
    """What a recipe says of the episodes; fields as in `EnvConfig` and `EvalConfig`. `execution_horizon`: how much of a
    chunk mode sync plays. `label`: of the policy. `protocol`: what else decides an episode, for the result."""

    task: str
    split: str
    cameras: tuple[str, ...]
    image_size: int
    control: str
    randomization: str
    max_episode_steps: int | None
    first_seed: int
    execution_horizon: int
    label: str
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(recipe: Recipe, label: str) -> TabletopScene:
        """The episodes of a recipe's evaluation. Raises ValueError for a recipe of another simulator, or a state that
        no arm measures."""
        env, evaluation = recipe.env, recipe.evaluation
        if isinstance(env, TwinEnvConfig):
            env = env.for_demos
        if not isinstance(env, EnvConfig) or env.privileged_state or len(evaluation.tasks) > 1:
            raise ValueError(
                "deploy: the twin is the tabletop's arm, and its policies see cameras and the arm's own state; this "
                f"recipe has {type(env).__name__}, privileged_state or several tasks"
            )
        settings = config_to_dict(env)
        return TabletopScene(
            task=(*evaluation.tasks, env.task)[0],
            split=evaluation.split,
            cameras=env.cameras,
            image_size=env.image_size,
            control=env.control,
            randomization=env.randomization,
            max_episode_steps=env.max_episode_steps,
            first_seed=evaluation.first_seed,
            execution_horizon=recipe.train.execution_horizon,
            label=label,
            protocol={"split": evaluation.split}
            | {name: settings[name] for name in ("cameras", "image_size", "control", "randomization")},
        )


__all__ = ["CAMERA_HZ", "DeployConfig", "TabletopScene"]
