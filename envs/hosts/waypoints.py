"""Scripted experts for arms under operational-space control: follow waypoints of the gripper, one after another.

A script is a generator of `Waypoint`s. It is asked for the next one when the last is reached, so it reads the poses of
objects as they are by then. numpy and mujoco only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

mujoco: Any = importlib.import_module("mujoco")

OPEN, CLOSED = -1.0, 1.0
_GAIN = 1.5
_ROTATION_TOLERANCE = 0.08  # rad
# The gripper's site in the arm's home position: it points down, and its x axis is the one that the fingers close along.
_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])


class Waypoint(NamedTuple):
    """Where the gripper goes next: `position` [3] metres, `yaw` radians, `grip` OPEN or CLOSED.

    At yaw 0 the hand is turned as at home, and the fingers close along the world's y. `tilt` radians raise the hand
    about its own x axis before that: it points down at 0, and at yaw 0 towards the world's -y at pi / 2. The waypoint
    is reached within `tolerance` metres, not before `hold` control steps, and given up after `max_steps`.
    """

    position: np.ndarray
    yaw: float
    grip: float
    hold: int = 0
    tolerance: float = 0.01
    max_steps: int = 60
    tilt: float = 0.0


class Follower:
    """Turns a script into actions: deltas of the gripper's pose in units of `scale` (metres, radians), and the grip.

    The first call of a step may move on to the next waypoint; more calls in the same step give the same action.
    """

    def __init__(self, script: Iterator[Waypoint], scale: tuple[float, float] = (0.05, 0.5)) -> None:
        self._script, self._scale = script, scale
        self._waypoint: Waypoint | None = None
        self._since = 0

    def action(self, position: np.ndarray, rotation: np.ndarray, step: int) -> np.ndarray:
        """float64 [7] in [-1, 1] for the gripper at `position [3]`, `rotation [3, 3]`, `step` steps into an episode."""
        while self._waypoint is None or self._reached(self._waypoint, position, rotation, step):
            following = next(self._script, None)
            if following is None:
                break
            self._waypoint, self._since = following, step
        assert self._waypoint is not None, "a script has at least one waypoint"
        move, turn = _error(self._waypoint, position, rotation)
        delta = np.concatenate([move / self._scale[0], turn / self._scale[1]]) * _GAIN
        return np.append(np.clip(delta, -1.0, 1.0), self._waypoint.grip)

    def _reached(self, waypoint: Waypoint, position: np.ndarray, rotation: np.ndarray, step: int) -> bool:
        age = step - self._since
        if age == 0 or age < waypoint.hold:
            return False
        move, turn = _error(waypoint, position, rotation)
        near = np.linalg.norm(move) < waypoint.tolerance and np.linalg.norm(turn) < _ROTATION_TOLERANCE
        return bool(near) or age >= waypoint.max_steps


def _error(waypoint: Waypoint, position: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target = rotation_z(waypoint.yaw) @ _rotation_x(-waypoint.tilt) @ _DOWN
    return waypoint.position - position, rotation_vector(target @ rotation.T)


def half_turn_yaw(angle: float) -> float:
    """The yaw equal to `angle` up to half a turn, which a parallel gripper does not notice, that is well within the
    Panda's last joint: home is 0.8 rad of 2.9."""
    return wrapped(angle - np.pi / 4, np.pi) + np.pi / 4


def above(position: np.ndarray, height: float) -> np.ndarray:
    """`position` moved up by `height` metres."""
    return np.asarray(position) + np.array([0.0, 0.0, height])


def yaw_of(rotation: np.ndarray) -> float:
    """Angle of a rotation's x axis in the horizontal plane, radians, from `rotation [3, 3]`."""
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def rotation_z(yaw: float) -> np.ndarray:
    """Rotation by `yaw` radians about the vertical, [3, 3]."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _rotation_x(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle, radians [3], of `rotation [3, 3]`."""
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, np.asarray(rotation, np.float64).reshape(9))
    vector = np.empty(3)
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def wrapped(angle: float, period: float) -> float:
    """`angle` moved by multiples of `period` into [-period / 2, period / 2)."""
    return (angle + period / 2) % period - period / 2
