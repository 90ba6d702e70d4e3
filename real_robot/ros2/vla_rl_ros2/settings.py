"""The node's parameters: one flat table with defaults, read from ROS or from a YAML file, checked in one place.

No rclpy. A ROS parameter "arm.joint_names" is the field `joint_names` of the group `arm`. ROS cannot hold an empty list
of unknown type, so a list's default says its type: [""] and [0.0] stand for nothing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.envs.robot_actions import JointDelta, JointPosition
from vla_rl.real_robot.control_loop import joint_targets
from vla_rl.real_robot.drivers.ros2_control import Ros2ControlConfig
from vla_rl.real_robot.inference import ServerConfig
from vla_rl.real_robot.interfaces import ArmSpec, Vector
from vla_rl.real_robot.kinematics import Chain, ForwardKinematics, chain_from_dh
from vla_rl.real_robot.loop_config import HEARTBEAT_S, MAX_PLAN_AGE_S, LoopConfig
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.takeover import InverseKinematics, TakeoverConfig
from vla_rl.serving.broker import BrokerConfig

Value = bool | int | float | str | list[Any]

_SAFETY = ("max_step", "position_margin", "speed_scale", "max_state_age_s")  # defaults: those of the configs themselves
_LOOP = ("max_picture_age_s", "grace_s", "start_tolerance", "ramp_s")

DEFAULTS: dict[str, Value] = {
    "task": "",
    "arm.name": "arm",
    "arm.joint_names": [""],
    "arm.position_low": [0.0],
    "arm.position_high": [0.0],
    "arm.max_velocity": [0.0],
    "arm.max_acceleration": [0.0],
    "arm.max_jerk": [0.0],
    "arm.gripper_range": [0.0, 0.08],
    "arm.home": [0.0],
    "arm.rate_hz": 50.0,
    "output.kind": "joint_trajectory",
    "output.topic": "/joint_trajectory_controller/joint_trajectory",
    "output.periods_ahead": 2.0,
    "input.joint_states": "/joint_states",
    "input.fault": "",
    "input.joy": "",
    "input.cameras": [""],  # "name:=topic" each
    "gripper.kind": "",
    "gripper.name": "/gripper_controller/gripper_cmd",
    "gripper.joint": "",
    "gripper.finger_joints": [""],
    "gripper.scale": 0.5,
    "gripper.effort": 20.0,
    "policy.url": "ws://127.0.0.1:8000",
    "policy.api_key": "",
    "policy.timeout_s": 1.0,
    "policy.heartbeat_s": HEARTBEAT_S,
    "policy.action": "joint_targets",
    "policy.max_step": 0.05,
    "policy.mode": "async",
    "policy.execution_horizon": 8,
    **{f"safety.{name}": getattr(SafetyConfig, name) for name in _SAFETY},
    "safety.workspace_low": [0.0],
    "safety.workspace_high": [0.0],
    "safety.dh": [0.0],  # a, d, alpha of each joint, one after the other
    "safety.tool": [0.0, 0.0, 0.0],
    "takeover.max_speed": 0.1,
    "takeover.max_turn": 0.5,
    "takeover.deadman_button": 0,
    "takeover.gripper_button": 1,
    **{f"loop.{name}": getattr(LoopConfig, name) for name in _LOOP},
    "loop.max_plan_age_s": MAX_PLAN_AGE_S,  # but in mode sync, where the arm waits
    "record.path": "",
}

ACTIONS = ("joint_targets", "joint_position", "joint_delta")


class SettingsError(ValueError):
    """A parameter that is missing, unknown, of another type or out of range; the message names it."""


@dataclass(frozen=True)
class Settings:
    """What the node is built from. `cameras`: name to topic."""

    spec: ArmSpec
    arm: Ros2ControlConfig
    safety: SafetyConfig
    loop: LoopConfig
    server: ServerConfig
    cameras: dict[str, str]
    joy: str
    action: str
    max_step: float
    takeover: TakeoverConfig
    max_speed: float
    max_turn: float
    buttons: dict[str, int]
    record_path: str

    def to_command(self) -> Any:
        """An action [A] and the standing target to the next one (`LoopParts.to_command`)."""
        if self.action == "joint_targets":
            return joint_targets
        mapping = JointDelta(self.spec, self.max_step) if self.action == "joint_delta" else JointPosition(self.spec)
        low, high = np.array(mapping.action.low), np.array(mapping.action.high)
        return lambda action, standing: mapping.target(np.clip(np.asarray(action, float), low, high), standing)

    def solve(self) -> InverseKinematics | None:
        """Tool translations for a takeover, by the chain of the safety box; None without one."""
        return None if self.safety.chain is None else partial(translated, ForwardKinematics(self.safety.chain))


def translated(forward: ForwardKinematics, position: Vector, delta: Vector, damping: float = 0.02) -> Vector:
    """Joints [J] whose tool is `delta[:3]` m further, by damped least squares; turns are not followed."""
    step = 1e-5
    moved = position + step * np.eye(len(position))
    jacobian = (forward(moved) - forward(position)).T / step
    return position + jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + damping**2 * np.eye(3), delta[:3])


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"arm": {"name": "ur"}} to {"arm.name": "ur"}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_yaml(path: str | Path, node: str = "policy") -> dict[str, Any]:
    """The parameters of `node` in a ROS parameter file. Raises SettingsError where it has none."""
    import yaml

    document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for name in (node, f"/{node}", "/**"):
        if isinstance(document, Mapping) and isinstance(document.get(name), Mapping):
            return flatten(document[name].get("ros__parameters", {}))
    raise SettingsError(f"{path} has no parameters of the node {node!r} (node: ros__parameters: ...)")


def make_settings(parameters: Mapping[str, Any]) -> Settings:
    """Raises SettingsError for what is missing, unknown, of a wrong type or out of range."""
    p = _checked(parameters)
    spec = _spec(p)
    try:
        return Settings(
            spec=spec,
            arm=Ros2ControlConfig(
                output=p["output.kind"],
                command_topic=p["output.topic"],
                joint_states=p["input.joint_states"],
                fault_topic=p["input.fault"],
                periods_ahead=p["output.periods_ahead"],
                finger_joints=tuple(_names(p["gripper.finger_joints"])),
                gripper=p["gripper.kind"],
                gripper_name=p["gripper.name"],
                gripper_joint=p["gripper.joint"],
                gripper_scale=p["gripper.scale"],
                gripper_effort=p["gripper.effort"],
            ),
            safety=_safety(p, spec),
            loop=LoopConfig(
                prompt=p["task"],
                broker=BrokerConfig(spec.rate_hz, p["policy.mode"], p["policy.execution_horizon"]),
                **{name: p[f"loop.{name}"] for name in _LOOP},
                max_plan_age_s=None if p["policy.mode"] == "sync" else p["loop.max_plan_age_s"],
            ),
            server=ServerConfig(
                p["policy.url"],
                p["policy.api_key"] or None,
                timeout_s=p["policy.timeout_s"],
                heartbeat_s=p["policy.heartbeat_s"],
            ),
            cameras=dict(_camera(text) for text in _names(p["input.cameras"])),
            joy=p["input.joy"],
            action=_one_of("policy.action", p["policy.action"], ACTIONS),
            max_step=p["policy.max_step"],
            takeover=TakeoverConfig(),
            max_speed=p["takeover.max_speed"],
            max_turn=p["takeover.max_turn"],
            buttons={"deadman": p["takeover.deadman_button"], "gripper": p["takeover.gripper_button"]},
            record_path=p["record.path"],
        )
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _checked(parameters: Mapping[str, Any]) -> dict[str, Any]:
    for name in parameters.keys() - DEFAULTS.keys():
        near = difflib.get_close_matches(name, DEFAULTS, 1)
        raise SettingsError(f"parameter {name} is unknown" + (f"; do you mean {near[0]}?" if near else ""))
    values: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        value = parameters.get(name, default)
        wanted: Any = default[0] if isinstance(default, list) else default
        items = list(value) if isinstance(default, list) and isinstance(value, (list, tuple)) else [value]
        if isinstance(default, list) != isinstance(value, (list, tuple)) or not all(_is(x, wanted) for x in items):
            kind = f"a list of {type(wanted).__name__}" if isinstance(default, list) else type(wanted).__name__
            raise SettingsError(f"parameter {name} must be {kind}, got {value!r}")
        items = [float(x) if isinstance(wanted, float) else x for x in items]
        values[name] = items if isinstance(default, list) else items[0]
    return values


def _is(value: Any, like: Any) -> bool:
    if isinstance(like, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is type(like)


def _spec(p: Mapping[str, Any]) -> ArmSpec:
    names = _names(p["arm.joint_names"])
    if not names:
        raise SettingsError(
            "parameter arm.joint_names is missing: give the joints as the robot's joint states call them"
        )
    limits: dict[str, Vector] = {}
    for name in ("position_low", "position_high", "max_velocity", "max_acceleration", "max_jerk", "home"):
        limits[name] = np.array(p[f"arm.{name}"])
        if limits[name].shape != (len(names),):
            raise SettingsError(f"parameter arm.{name} has {limits[name].size} numbers, expected {len(names)}")
    if not np.all(limits["position_low"] < limits["position_high"]):
        raise SettingsError("arm.position_low must be below arm.position_high for every joint")
    if not all(np.all(limits[name] > 0) for name in ("max_velocity", "max_acceleration", "max_jerk")):
        raise SettingsError("arm.max_velocity, max_acceleration and max_jerk must be positive")
    if np.any(limits["home"] < limits["position_low"]) or np.any(limits["home"] > limits["position_high"]):
        raise SettingsError("arm.home lies outside of the position limits")
    closed, opened = p["arm.gripper_range"] if len(p["arm.gripper_range"]) == 2 else (0.0, 0.0)
    if not closed < opened or not p["arm.rate_hz"] > 0:
        raise SettingsError("arm.gripper_range must be [closed, open] and arm.rate_hz positive")
    return ArmSpec(p["arm.name"], tuple(names), gripper_range=(closed, opened), rate_hz=p["arm.rate_hz"], **limits)


def _safety(p: Mapping[str, Any], spec: ArmSpec) -> SafetyConfig:
    chain: Chain | None = None
    low, high, dh = p["safety.workspace_low"], p["safety.workspace_high"], p["safety.dh"]
    boxed = len(low) == len(high) == 3
    if boxed:
        if len(dh) != 3 * spec.num_joints:
            raise SettingsError(f"safety.dh has {len(dh)} numbers, expected a, d, alpha of {spec.num_joints} joints")
        rows = [(dh[i], dh[i + 1], dh[i + 2]) for i in range(0, len(dh), 3)]
        chain = chain_from_dh(rows, (p["safety.tool"][0], p["safety.tool"][1], p["safety.tool"][2]))
    elif (low, high) != ([0.0], [0.0]):
        raise SettingsError("safety.workspace_low and workspace_high need x, y, z each, in m")
    return SafetyConfig(
        chain=chain,
        workspace_low=(low[0], low[1], low[2]) if boxed else None,
        workspace_high=(high[0], high[1], high[2]) if boxed else None,
        **{name: p[f"safety.{name}"] for name in _SAFETY},
    )


def _names(values: list[str]) -> list[str]:
    return [value for value in values if value]


def _camera(text: str) -> tuple[str, str]:
    name, separator, topic = text.partition(":=")
    if not separator or not name or not topic:
        raise SettingsError(f'input.cameras: {text!r} must be "name:=topic"')
    return name, topic


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise SettingsError(f"parameter {name} is {value!r}; use one of {', '.join(allowed)}")
    return value


__all__ = ["ACTIONS", "DEFAULTS", "Settings", "SettingsError", "flatten", "make_settings", "read_yaml", "translated"]
