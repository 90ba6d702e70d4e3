"""Where the tool is: forward kinematics of a chain of hinges, which a config gives from DH rows or a MuJoCo model."""

# pyright: reportAttributeAccessIssue=false
# (mujoco's compiled modules have no type stubs)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_rl.real_robot.interfaces import Vector


@dataclass(frozen=True)
class Link:
    """A frame fixed to its parent: `position` m, `quaternion` (w, x, y, z); it turns about its z axis."""

    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    quaternion: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Chain:
    """`links`: one a joint, from the base. `tool`: the tool in the last link's frame, m."""

    links: tuple[Link, ...]
    tool: tuple[float, float, float] = (0.0, 0.0, 0.0)


def chain_from_dh(rows: Sequence[tuple[float, float, float]], tool: tuple[float, float, float]) -> Chain:
    """`rows`: (a, d, alpha) of each joint, m and rad, in Craig's convention (Introduction to Robotics, eq. 3.6), as
    Franka and Universal Robots' calibrated tables have it."""
    links = []
    for a, d, alpha in rows:
        half = alpha / 2
        position = (a, -d * math.sin(alpha), d * math.cos(alpha))
        links.append(Link(position, (math.cos(half), math.sin(half), 0.0, 0.0)))
    return Chain(tuple(links), tool)


def chain_from_mujoco(model: Any, joints: Sequence[str], site: str) -> Chain:
    """The chain of the hinges `joints`, from the base, to `site`, of a `mujoco.MjModel`.

    Raises ValueError where a joint is no hinge or does not hang on the one before it.
    """
    import mujoco

    data = mujoco.MjData(model)
    for name in joints:
        if model.joint(name).type[0] != mujoco.mjtJoint.mjJNT_HINGE:
            raise ValueError(f"chain_from_mujoco: {name} is no hinge")
        data.qpos[model.joint(name).qposadr[0]] = 0.0
    mujoco.mj_kinematics(model, data)
    place, turn = np.zeros(3), np.eye(3)
    links, last = [], -1
    for name in joints:
        joint = model.joint(name)
        above = int(joint.bodyid[0])
        while last >= 0 and above != last and above != 0:
            above = int(model.body_parentid[above])
        if last >= 0 and above != last:
            raise ValueError(f"chain_from_mujoco: {name} does not hang on the joint before it")
        last = int(joint.bodyid[0])
        position, rotation = data.xanchor[joint.id], _frame_along(data.xaxis[joint.id])
        links.append(Link(_triple(turn.T @ (position - place)), _quaternion(turn.T @ rotation)))
        place, turn = position, rotation
    return Chain(tuple(links), _triple(turn.T @ (data.site(site).xpos - place)))


class ForwardKinematics:
    """Positions of the tool, [..., 3] m in the base frame, from joint positions [..., J] rad."""

    def __init__(self, chain: Chain) -> None:
        self._places = np.array([link.position for link in chain.links])
        self._turns = np.stack([_rotation(np.array(link.quaternion)) for link in chain.links])
        self._tool = np.array(chain.tool)
        self.num_joints = len(chain.links)

    def __call__(self, joints: Vector) -> Vector:
        point = np.broadcast_to(self._tool, (*joints.shape[:-1], 3))
        cos, sin = np.cos(joints), np.sin(joints)
        for i in range(self.num_joints - 1, -1, -1):  # from the tool back: a point is cheaper than a frame
            x, y = point[..., 0], point[..., 1]
            c, s = cos[..., i], sin[..., i]
            turned = np.stack((c * x - s * y, s * x + c * y, point[..., 2]), axis=-1)
            point = turned @ self._turns[i].T + self._places[i]
        return point


def _rotation(q: Vector) -> Vector:
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _quaternion(rotation: Vector) -> tuple[float, float, float, float]:
    import mujoco

    q = np.zeros(4)
    mujoco.mju_mat2Quat(q, np.ascontiguousarray(rotation).reshape(9))
    return (float(q[0]), float(q[1]), float(q[2]), float(q[3]))


def _frame_along(axis: Vector) -> Vector:
    """A rotation whose z column is `axis`."""
    other = np.eye(3)[int(np.argmin(np.abs(axis)))]
    x = np.cross(other, axis)
    x /= np.linalg.norm(x)
    return np.stack((x, np.cross(axis, x), axis), axis=1)


def _triple(v: Vector) -> tuple[float, float, float]:
    return (float(v[0]), float(v[1]), float(v[2]))
