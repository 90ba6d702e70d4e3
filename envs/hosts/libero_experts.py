"""Experts for LIBERO's tasks: scripts of waypoints that read the goal, and the poses of what is in the scene."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import waypoints
from .waypoints import CLOSED, OPEN, Waypoint, above

mujoco: Any = importlib.import_module("mujoco")

_MAX_WIDTH = 0.07  # metres that fit between the open fingers (0.08) with a margin
_TILT = 1.4  # rad from straight down, of the hand that pulls a drawer


def gripper(env: Any) -> tuple[np.ndarray, np.ndarray]:
    """Position [3] and rotation [3, 3] of the gripper's site."""
    site = env.robots[0].eef_site_id
    return np.array(env.sim.data.site_xpos[site]), np.array(env.sim.data.site_xmat[site]).reshape(3, 3)


def _corners(env: Any, name: str) -> np.ndarray:
    """Corners of the boxes around an object's collision shapes, [M, 3] in the world."""
    model, data = env.sim.model._model, env.sim.data._data
    geoms = [env.sim.model.geom_name2id(geom) for geom in env.get_object(name).contact_geoms]
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, 8).T
    return np.concatenate(
        [
            data.geom_xpos[g]
            + (model.geom_aabb[g, :3] + signs * model.geom_aabb[g, 3:]) @ data.geom_xmat[g].reshape(3, 3).T
            for g in geoms
        ]
    )


def _grasp_pose(env: Any, name: str) -> tuple[np.ndarray, float]:
    """Where the gripper closes around an object: across its narrow side, or on the rim of what is too wide."""
    corners = _corners(env, name)
    low, high = corners[:, 2].min(), corners[:, 2].max()
    best_yaw, best_width, middle = 0.0, np.inf, np.zeros(2)
    for yaw in np.linspace(-np.pi / 4, 3 * np.pi / 4, 36, endpoint=False):
        x, y = (corners @ waypoints.rotation_z(yaw))[:, :2].T
        if y.max() - y.min() < best_width - 1e-3:
            best_yaw, best_width = float(yaw), float(y.max() - y.min())
            middle = waypoints.rotation_z(yaw)[:2, :2] @ np.array([x.max() + x.min(), y.max() + y.min()]) / 2
    if best_width <= _MAX_WIDTH:
        return np.array([*middle, max((low + high) / 2, high - 0.04)]), best_yaw
    others = [np.array(env.sim.data.body_xpos[b][:2]) for n, b in env.obj_body_id.items() if n != name]
    middle = (corners.max(0) + corners.min(0))[:2] / 2
    radius = (corners.max(0) - corners.min(0))[1] / 2 - 0.008
    sides = [middle + np.array([0.0, side * radius]) for side in (1.0, -1.0)]
    room = [min((float(np.linalg.norm(side - other)) for other in others), default=1.0) for side in sides]
    return np.array([*sides[int(np.argmax(room))], high - 0.015]), 0.0


def _place(env: Any, target: str) -> np.ndarray:
    """The middle of the top of where an object shall go: another object, or a region of one."""
    if target in env.object_sites_dict:
        position = np.array(env.sim.data.get_site_xpos(target))
        parent = env.object_sites_dict[target].parent_name
        if target.endswith("contain_region") and parent in env.objects_dict:
            position[2] = _corners(env, parent)[:, 2].max() - 0.02
        return position
    corners = _corners(env, target)
    return np.array([*(corners.max(0) + corners.min(0))[:2] / 2, corners[:, 2].max()])


def script(env: Any) -> Iterator[Waypoint]:
    """The goal's parts one after another: furniture first, then objects. Raises NotImplementedError for other parts."""
    parts: list[tuple[int, Iterator[Waypoint]]] = []
    for predicate, name, *place in env.parsed_problem["goal_state"]:
        if predicate == "open" and _is_drawer(env, name):
            parts.append((0, _open_drawer(env, name)))
        elif predicate == "turnon":
            parts.append((0, _turn_knob(env, name)))
        elif predicate in ("on", "in") and name in env.objects_dict:
            parts.append((1, _pick_and_place(env, name, *place)))
        else:
            raise NotImplementedError(
                f"the scripted expert opens, turns on and moves; this goal has {predicate} {name}"
            )
    return itertools.chain.from_iterable(part for _, part in sorted(parts, key=lambda part: part[0]))


def _is_drawer(env: Any, region: str) -> bool:
    joints = getattr(env.object_sites_dict.get(region), "joints", None)
    sliding = mujoco.mjtJoint.mjJNT_SLIDE
    return bool(joints) and env.sim.model.jnt_type[env.sim.model.joint_name2id(joints[0])] == sliding


def _joint(env: Any, name: str) -> tuple[int, list[int]]:
    """Number of the joint `name`, and the collision shapes of what it moves."""
    model = env.sim.model._model
    joint = env.sim.model.joint_name2id(name)
    geoms = np.flatnonzero((model.geom_bodyid == model.jnt_bodyid[joint]) & (model.geom_contype > 0))
    return joint, geoms.tolist()


def _open_drawer(env: Any, region: str) -> Iterator[Waypoint]:
    """From the front: the handles of drawers lie one above another. The handle is the drawer's foremost shape."""
    model, data = env.sim.model._model, env.sim.data._data
    joint, geoms = _joint(env, env.object_sites_dict[region].joints[0])
    opened = max(model.jnt_range[joint], key=abs)
    out = np.array(data.xaxis[joint]) * np.sign(opened)
    handle = np.array(max(data.geom_xpos[geoms], key=lambda position: position @ out))
    yaw = waypoints.wrapped(float(np.arctan2(out[1], out[0])) - np.pi / 2, 2 * np.pi)
    yield Waypoint(handle + 0.12 * out, yaw, OPEN, tilt=_TILT, tolerance=0.02)
    yield Waypoint(handle, yaw, OPEN, tilt=_TILT, tolerance=0.008)
    yield Waypoint(handle, yaw, CLOSED, tilt=_TILT, hold=8, max_steps=8)
    pulled = handle + (abs(opened - data.qpos[model.jnt_qposadr[joint]]) + 0.02) * out
    yield Waypoint(pulled, yaw, CLOSED, tilt=_TILT)
    yield Waypoint(pulled, yaw, OPEN, tilt=_TILT, hold=5, max_steps=5)
    yield Waypoint(above(pulled + 0.1 * out, 0.05), yaw, OPEN, tilt=_TILT, tolerance=0.03)
    yield Waypoint(above(pulled + 0.1 * out, 0.2), yaw, OPEN, tolerance=0.05)


def _turn_knob(env: Any, fixture: str) -> Iterator[Waypoint]:
    """The knob's highest shape is a bar through its axis."""
    model, data = env.sim.model._model, env.sim.data._data
    joint, geoms = _joint(env, env.fixtures_dict[fixture].joints[0])
    bar = max(geoms, key=lambda g: data.geom_xpos[g][2] + (abs(data.geom_xmat[g][6:]) @ model.geom_aabb[g, 3:]))
    along = data.geom_xmat[bar].reshape(3, 3)[:, np.argmax(model.geom_aabb[bar, 3:])]
    yaw = waypoints.wrapped(float(np.arctan2(along[1], along[0])), np.pi)
    knob = np.array([*data.xanchor[joint][:2], data.geom_xpos[bar][2]])
    yield Waypoint(above(knob, 0.12), yaw, OPEN, tolerance=0.006)
    yield Waypoint(knob, yaw, OPEN)
    yield Waypoint(knob, yaw, CLOSED, hold=8, max_steps=8)
    for angle in (0.3, 0.6, 0.9):
        yield Waypoint(knob, yaw + angle, CLOSED, max_steps=15)
    yield Waypoint(knob, yaw + 0.9, OPEN, hold=5, max_steps=5)
    yield Waypoint(above(knob, 0.15), yaw, OPEN, tolerance=0.03)


def _pick_and_place(env: Any, name: str, target: str) -> Iterator[Waypoint]:
    """Take an object and put it on another, or in a region of one."""
    grasp, yaw = _grasp_pose(env, name)
    yield Waypoint(above(grasp, 0.12), yaw, OPEN)
    grasp, yaw = _grasp_pose(env, name)
    yield Waypoint(grasp, yaw, OPEN, tolerance=0.006)
    yield Waypoint(grasp, yaw, CLOSED, hold=10, max_steps=10)
    lifted = above(grasp, 0.25)
    yield Waypoint(lifted, yaw, CLOSED, tolerance=0.02)
    place, held = _place(env, target), _corners(env, name)
    middle = np.array([*(held.max(0) + held.min(0))[:2] / 2, held[:, 2].min()])
    goal = place + gripper(env)[0] - middle
    over = np.array([goal[0], goal[1], max(lifted[2], goal[2] + 0.05)])
    yield Waypoint(over, yaw, CLOSED, tolerance=0.015)
    yield Waypoint(above(goal, 0.01), yaw, CLOSED, tolerance=0.01)
    yield Waypoint(above(goal, 0.01), yaw, OPEN, hold=8, max_steps=8)
    yield Waypoint(above(goal, 0.2), yaw, OPEN)
