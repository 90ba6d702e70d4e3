"""Conditions: how an evaluation departs from what a policy was trained on, one axis at a time or several crossed.

    apply_condition(EnvConfig(task="reach"), "light@2")
    apply_condition(EnvConfig(task="reach"), "light@1+camera@1")

A condition is "AXIS@LEVEL", crossed with "+"; "" is the nominal one. Levels are 1 (mild) to 3 (severe). An episode
keeps its seed, its goal and everything that the axis does not change, so that results pair with the nominal ones. What
the levels mean in numbers is in `vla_rl/sim/shift.py` for the tabletop, and below for axes of any simulator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from vla_rl.envs.config import AnyEnvConfig, EnvConfig, PerturbedConfig, PointMazeConfig, SimulatorConfig
from vla_rl.envs.gym import GymConfig
from vla_rl.envs.libero import LiberoConfig
from vla_rl.envs.libero_sentences import other_sentence
from vla_rl.envs.maniskill import ManiSkillConfig
from vla_rl.envs.metaworld import MetaworldConfig
from vla_rl.envs.ogbench import OGBenchConfig
from vla_rl.envs.perturbed import Perturbation
from vla_rl.envs.robosuite import RobosuiteConfig
from vla_rl.sim.shift import MAX_LEVEL, sample_episode
from vla_rl.sim.tasks import get_task

AXES: tuple[str, ...] = (
    "position", "distractors", "color", "light", "camera", "sensor_noise", "action_delay", "physics", "paraphrase",
    "wrong_instruction",
)  # fmt: skip
# Axes under which an episode must not succeed: its goal is still the one that the sentence no longer names.
MUST_NOT_SUCCEED: tuple[str, ...] = ("wrong_instruction",)

PIXEL_NOISE = (8.0, 20.0, 40.0)  # grey levels of 255, by level
STATE_NOISE = (0.002, 0.005, 0.01)  # m or rad
ACTION_DELAY_MS = (50.0, 100.0, 150.0)  # rounded to control steps, one at least

_SCENE_AXES = ("position", "distractors", "color", "light", "camera", "physics")
_OPEN_GRIPPER = 1.0


class UnsupportedConditionError(ValueError):
    """A simulator cannot do what a condition asks; the text says why."""


def parse_condition(condition: str) -> dict[str, int]:
    """Axis -> level of "AXIS@LEVEL+AXIS@LEVEL"; empty for "". Raises ValueError for what is no condition."""
    levels: dict[str, int] = {}
    for part in condition.split("+") if condition else ():
        axis, _, level = part.partition("@")
        if axis not in AXES:
            raise ValueError(f"condition {condition!r}: axis {axis!r} is unknown; use one of {', '.join(AXES)}")
        if level not in ("1", "2", "3"):
            raise ValueError(f"condition {condition!r}: {axis} needs a level from 1 to {MAX_LEVEL}, such as {axis}@2")
        if axis in levels:
            raise ValueError(f"condition {condition!r}: {axis} is there twice")
        levels[axis] = int(level)
    if "paraphrase" in levels and "wrong_instruction" in levels:
        raise ValueError(f"condition {condition!r}: paraphrase and wrong_instruction both change the sentence")
    return levels


def crossed(axes: Iterable[str], level: int) -> str:
    """The condition that crosses `axes` at one `level`, in the order of `AXES`."""
    wanted = set(axes)
    unknown = sorted(wanted - set(AXES))
    condition = "+".join(f"{axis}@{level}" for axis in (*AXES, *unknown) if axis in wanted)
    parse_condition(condition)
    return condition


def apply_condition(env: AnyEnvConfig, condition: str) -> AnyEnvConfig:
    """`env` under `condition`; `env` itself for "".

    Raises ValueError for what is no condition, and UnsupportedConditionError where the simulator cannot do it.
    """
    levels = parse_condition(condition)
    if not levels:
        return env
    if isinstance(env, PerturbedConfig) or (isinstance(env, EnvConfig) and env.shift != EnvConfig().shift):
        raise UnsupportedConditionError(f"{condition}: this environment is under a condition already")
    perturbation = Perturbation()
    for axis in ("sensor_noise", "action_delay"):
        if axis in levels:
            perturbation = _sensors_and_delay(env, perturbation, axis, levels.pop(axis))
    if isinstance(env, EnvConfig):
        env = _shifted(env, levels)
    else:
        for axis, level in levels.items():
            perturbation = _other_words(env, perturbation, axis, level)
    return env if perturbation == Perturbation() else PerturbedConfig(env, perturbation)


def _shifted(env: EnvConfig, levels: dict[str, int]) -> EnvConfig:
    fixed = [axis for axis in levels if axis in ("color", "light", "camera", "physics")]
    if fixed and env.randomization != "off":
        raise UnsupportedConditionError(
            f"{', '.join(fixed)}: looks and physics are randomised already; use randomization='off'"
        )
    shift = replace(env.shift, **levels)
    task = get_task(env.task)
    try:
        sample_episode(task, "test", 0, shift)  # a task of another author may name nothing, or leave no room
    except ValueError as error:
        raise UnsupportedConditionError(f"{', '.join(levels)}: {error}") from error
    return replace(env, shift=shift)


def _sensors_and_delay(env: SimulatorConfig, nominal: Perturbation, axis: str, level: int) -> Perturbation:
    if axis == "sensor_noise":
        return replace(nominal, pixel_noise=PIXEL_NOISE[level - 1], state_noise=STATE_NOISE[level - 1])
    steps = max(1, round(ACTION_DELAY_MS[level - 1] / 1000 * env.control_hz))
    return replace(nominal, action_delay=steps, open_gripper=_open_gripper(env))


def _open_gripper(env: SimulatorConfig) -> float:
    """The action that keeps the gripper open while nothing has arrived yet. Raises UnsupportedConditionError where the
    other actions are no changes, so that zeros would be a movement."""
    reason = ""
    if isinstance(env, ManiSkillConfig) and "delta" not in env.control:
        reason = f"actions of {env.control} are positions, and there is none that an arm could wait with"
    if isinstance(env, RobosuiteConfig) and env.control == "joint_torque":
        reason = "actions are torques, and an arm does not rest without"
    if isinstance(env, GymConfig):
        reason = "what an action of no movement is, is not known of a Gymnasium environment"
    if reason:
        raise UnsupportedConditionError(f"action_delay: {reason}")
    return _OPEN_GRIPPER if isinstance(env, EnvConfig | ManiSkillConfig) else -_OPEN_GRIPPER


def _other_words(env: SimulatorConfig, nominal: Perturbation, axis: str, level: int) -> Perturbation:
    if axis in _SCENE_AXES:
        raise UnsupportedConditionError(
            f"{axis}: {_name(env)} draws and paints its scenes itself and has no option for it; the tabletop has"
        )
    if isinstance(env, PointMazeConfig | OGBenchConfig | GymConfig):
        raise UnsupportedConditionError(f"{axis}: no sentence says what to do in {_name(env)}")
    if axis == "paraphrase":
        return replace(nominal, paraphrase=level)
    other = other_sentence(env.task) if isinstance(env, LiberoConfig) else None
    if other is None:
        raise UnsupportedConditionError(
            f"{axis}: the scene of {env.task} has one goal only, so no other sentence could be followed in it"
        )
    return replace(nominal, wrong_instruction=level, other_instruction=other)


def _name(env: SimulatorConfig) -> str:
    names = {
        PointMazeConfig: "the point maze", ManiSkillConfig: "ManiSkill", RobosuiteConfig: "robosuite",
        LiberoConfig: "LIBERO", MetaworldConfig: "Metaworld", GymConfig: "a Gymnasium environment",
        OGBenchConfig: "OGBench",
    }  # fmt: skip
    return names.get(type(env), type(env).__name__)


__all__ = [
    "AXES", "MUST_NOT_SUCCEED", "UnsupportedConditionError", "apply_condition", "crossed", "parse_condition",
]  # fmt: skip
