"""robosuite's single-arm tasks on a Panda, as hosted environments: numpy and robosuite 1.5 only.

Options of `build`, which `vla_rl.envs.robosuite.RobosuiteConfig` explains: task, cameras {name: [h, w]}, control,
control_hz, reward ("sparse" or "dense"), max_episode_steps, privileged_state, fast_pictures, render_size.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import mujoco_view, waypoints
from .waypoints import CLOSED, OPEN, Waypoint, above

robosuite: Any = importlib.import_module("robosuite")

_PROPRIOCEPTION = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
_POSE = ("dx", "dy", "dz", "drx", "dry", "drz")
_JOINTS = tuple(f"joint_{i}" for i in range(7))
_ACTION_NAMES = {  # joint_velocity does not start in robosuite 1.5.2
    "osc_pose": _POSE, "osc_position": _POSE[:3], "ik_pose": _POSE,
    "joint_position": _JOINTS, "joint_torque": _JOINTS,
}  # fmt: skip


class RobosuiteEnv:
    """One task. robosuite draws a new scene at each reset, sizes and materials too, from the episode's seed alone.

    robosuite refreshes its observables in every physics step; here they are read when somebody asks for an observation.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._task: str = options["task"]
        self._env: Any = robosuite.make(
            self._task,
            robots="Panda",
            controller_configs=_controller(options["control"]),
            control_freq=options["control_hz"],
            reward_shaping=options["reward"] == "dense",
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            use_object_obs=True,
            ignore_done=True,
            hard_reset=True,
            renderer="mujoco",
            seed=0,
        )
        self._refresh = self._env._update_observables
        self._env._update_observables = lambda force=False: None  # noqa: ARG005 (robosuite's argument)
        self._env._get_observations = lambda force_update=False: {}  # noqa: ARG005
        self._view = mujoco_view.View(fast=options["fast_pictures"])
        self._keys = list(_PROPRIOCEPTION)
        if options["privileged_state"]:
            self._keys += self._object_keys()
        self._steps = 0
        self._follower: Any = None

    def spec(self) -> dict[str, Any]:
        low, high = self._env.action_spec
        values = self._values()
        return {
            "name": f"robosuite/{self._task}",
            "cameras": self._options["cameras"],
            "state_names": [f"{key}_{i}" for key in self._keys for i in range(len(values[key]))],
            "action_low": low.tolist(),
            "action_high": high.tolist(),
            "action_names": [*_ACTION_NAMES[self._options["control"]], "gripper"],
            "max_episode_steps": self._options["max_episode_steps"],
            "control_hz": self._options["control_hz"],
        }

    def reset(self, seed: int) -> None:
        """Samplers and robot keep references to the one generator, so its state is set instead of the generator."""
        self._env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        np.random.seed(seed % 2**32)  # noqa: NPY002 (what is left of robosuite's global draws)
        self._env.reset()
        self._steps = 0
        self._follower = None

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        _, reward, _, _ = self._env.step(action)
        self._steps += 1
        success = bool(self._env._check_success())
        if self._options["reward"] == "sparse":
            reward = float(success)
        return float(reward), success, False, success

    def observe(self, images: bool) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
        values = self._values()
        state = np.concatenate([values[key] for key in self._keys]).astype(np.float32)
        cameras = self._options["cameras"].items() if images else ()
        return state, {c: self._picture(c, *size) for c, size in cameras}, _INSTRUCTIONS.get(self._task, self._task)

    def render(self) -> np.ndarray:
        return self._picture("frontview", *self._options["render_size"])

    def expert_action(self) -> np.ndarray:
        """Raises NotImplementedError for a task without a script, or another control than osc_pose."""
        if self._task not in _SCRIPTS or self._options["control"] != "osc_pose":
            raise NotImplementedError(
                f"there is no scripted expert for {self._task} with control {self._options['control']!r}; "
                f"there is one, with 'osc_pose', for {', '.join(_SCRIPTS)}"
            )
        if self._follower is None:
            self._follower = waypoints.Follower(_SCRIPTS[self._task](self._env))
        return self._follower.action(*_gripper(self._env), self._steps)

    def close(self) -> None:
        self._view.close()
        self._env.close()

    def _picture(self, camera: str, height: int, width: int) -> np.ndarray:
        sim = self._env.sim
        return self._view.picture(sim.model._model, sim.data._data, camera, height, width)

    def _values(self) -> dict[str, np.ndarray]:
        """Observables now. Some are computed from others that come later in robosuite's order, hence two passes."""
        self._refresh(force=True)
        self._refresh(force=True)
        return {key: np.atleast_1d(self._env._observables[key].obs) for key in self._keys}

    def _object_keys(self) -> list[str]:
        """The parts of robosuite's `object-state`, in its order."""
        return [
            key
            for key, x in self._env._observables.items()
            if x.modality == "object" and x.is_enabled() and x.is_active()
        ]


def _controller(control: str) -> dict[str, Any]:
    if control not in _ACTION_NAMES:
        raise ValueError(f"robosuite: control {control!r} is unknown; use one of {', '.join(_ACTION_NAMES)}")
    config = robosuite.load_composite_controller_config(controller=None, robot="Panda")
    arm = robosuite.load_part_controller_config(default_controller=control.upper())
    config["body_parts"]["right"] = arm | {"gripper": {"type": "GRIP"}}
    return config


# ----------------------------------------------------------------------------------------------------------- experts
def _gripper(env: Any) -> tuple[np.ndarray, np.ndarray]:
    site = env.robots[0].eef_site_id["right"]
    return np.array(env.sim.data.site_xpos[site]), np.array(env.sim.data.site_xmat[site]).reshape(3, 3)


def _body(env: Any, body_id: int) -> tuple[np.ndarray, float]:
    """Position and yaw of a body."""
    return np.array(env.sim.data.body_xpos[body_id]), waypoints.yaw_of(env.sim.data.body_xmat[body_id].reshape(3, 3))


def _grasp(position: np.ndarray, yaw: float, lift: float) -> Iterator[Any]:
    yield Waypoint(above(position, 0.1), yaw, OPEN)
    yield Waypoint(position, yaw, OPEN, tolerance=0.006)
    yield Waypoint(position, yaw, CLOSED, hold=8, max_steps=8)
    yield Waypoint(above(position, lift), yaw, CLOSED, tolerance=0.02)


def _lift(env: Any) -> Iterator[Any]:
    position, yaw = _body(env, env.cube_body_id)
    yield from _grasp(position, waypoints.wrapped(yaw, np.pi / 2), 0.15)


def _can(env: Any) -> Iterator[Any]:
    position, _ = _body(env, env.obj_body_id["Can"])
    yield from _grasp(position, 0.0, 0.25)
    x, y, z = np.array(env.target_bin_placements[env.object_id])
    goal = np.array([x - 0.07, y - 0.04, z])  # the bin's middle is out of the arm's reach
    hand = above(goal, _gripper(env)[0][2] - z)
    yield Waypoint(hand, 0.0, CLOSED, tolerance=0.02)
    yield Waypoint(above(goal, 0.12), 0.0, CLOSED, tolerance=0.02)
    yield Waypoint(above(goal, 0.12), 0.0, OPEN, hold=5, max_steps=5)
    yield Waypoint(above(goal, 0.3), 0.0, OPEN)


def _stack(env: Any) -> Iterator[Any]:
    position, yaw = _body(env, env.cubeA_body_id)
    yaw = waypoints.wrapped(yaw, np.pi / 2)
    yield from _grasp(position, yaw, 0.15)
    base, _ = _body(env, env.cubeB_body_id)
    held, _ = _body(env, env.cubeA_body_id)
    goal = above(base, env.cubeA.size[2] + env.cubeB.size[2]) + _gripper(env)[0] - held
    yield Waypoint(above(goal, 0.08), yaw, CLOSED)
    yield Waypoint(above(goal, 0.003), yaw, CLOSED, tolerance=0.004)
    yield Waypoint(above(goal, 0.003), yaw, OPEN, hold=6, max_steps=6)
    yield Waypoint(above(goal, 0.15), yaw, OPEN)


def _handle(env: Any) -> tuple[np.ndarray, float]:
    """Position of the square nut's handle and the yaw that closes across it."""
    yaw = waypoints.half_turn_yaw(_body(env, env.obj_body_id["SquareNut"])[1])
    return np.array(env.sim.data.get_site_xpos("SquareNut_handle_site")), yaw


def _square(env: Any) -> Iterator[Any]:
    """The nut's handle points along its x axis, and the fingers close across it."""
    nut = env.obj_body_id["SquareNut"]
    handle, yaw = _handle(env)
    yield Waypoint(above(handle, 0.1), yaw, OPEN)
    handle, yaw = _handle(env)  # it fell onto the table meanwhile
    yield from _grasp(handle, yaw, 0.2)
    peg, _ = _body(env, env.peg1_body_id)
    _, held_yaw = _body(env, nut)
    turned = _turn_to_peg(yaw, held_yaw)
    yield Waypoint(above(handle, 0.2), turned, CLOSED, tolerance=0.02)
    for height in (0.2, 0.15, 0.0):
        held, _ = _body(env, nut)
        offset = _gripper(env)[0] - held
        goal = np.array([peg[0], peg[1], env.table_offset[2] + 0.02 + height]) + offset
        yield Waypoint(goal, turned, CLOSED, tolerance=0.005)
    yield Waypoint(goal, turned, OPEN, hold=6, max_steps=6)
    yield Waypoint(above(goal, 0.15), turned, OPEN)


def _door(env: Any) -> Iterator[Any]:
    """Grasp the lever from above near its end, turn it down about the latch's axis, pull it around the hinge."""
    model, data = env.sim.model._model, env.sim.data._data
    hinge = np.array(data.xanchor[env.sim.model.joint_name2id("Door_hinge")])
    latch = np.array(data.xanchor[env.sim.model.joint_name2id("Door_latch_joint")])
    lever = env.sim.model.geom_name2id("Door_handle")
    bar = np.array(data.geom_xmat[lever]).reshape(3, 3)[:, 0]
    bar = bar * np.sign(bar @ (data.geom_xpos[lever] - latch))
    away = np.array([bar[1], -bar[0], 0.0]) * 0.02  # the hand is thicker than the gap between lever and door
    end = np.array(data.geom_xpos[lever]) + 0.5 * model.geom_size[lever][0] * bar * [1, 1, 0] + away
    yaw = waypoints.wrapped(np.arctan2(bar[1], bar[0]), np.pi)
    yield from _grasp(end, yaw, 0.0)
    arm = end - latch
    for angle in (0.3, 0.6, 0.9, 1.2):
        turned = above(latch + arm * [np.cos(angle), 1.0, 0.0], -np.linalg.norm(arm[:2]) * np.sin(angle))
        yield Waypoint(turned, yaw, CLOSED, tolerance=0.02, max_steps=15)
    for angle in (0.15, 0.3, 0.45, 0.6):
        pulled = hinge + waypoints.rotation_z(angle) @ (turned - hinge)
        yield Waypoint(pulled, yaw + angle, CLOSED, tolerance=0.02, max_steps=20)


def _turn_to_peg(hand_yaw: float, nut_yaw: float) -> float:
    """The hand's yaw with which the square nut fits the peg: of the four, one that the wrist can do and that leaves the
    hand, which is on the side of the handle, nearest to the arm's base."""
    nut_goals = np.arange(4) * np.pi / 2
    hand_goals = hand_yaw + np.array([waypoints.wrapped(goal - nut_yaw, 2 * np.pi) for goal in nut_goals])
    reach = np.cos(nut_goals) + 10.0 * (np.abs(hand_goals - np.pi / 4) > 2.0)
    return float(hand_goals[np.argmin(reach)])


_SCRIPTS = {"Lift": _lift, "PickPlaceCan": _can, "Stack": _stack, "NutAssemblySquare": _square, "Door": _door}
_INSTRUCTIONS = {
    "Lift": "lift the cube",
    "PickPlaceCan": "put the can into its bin",
    "Stack": "stack the red cube on the green cube",
    "NutAssemblySquare": "put the square nut on the square peg",
    "Door": "open the door",
}


def build(options: dict[str, Any]) -> RobosuiteEnv:
    """Raises ValueError for an unknown task, control, reward or camera."""
    known = robosuite.ALL_ENVIRONMENTS
    if options["task"] not in known:
        raise ValueError(f"robosuite: task {options['task']!r} is unknown; use one of {', '.join(sorted(known))}")
    env = RobosuiteEnv(options)
    there = mujoco_view.camera_names(env._env.sim.model._model)
    for camera in options["cameras"]:
        if camera not in there:
            raise ValueError(f"robosuite: {options['task']} has no camera {camera!r}; it has {', '.join(there)}")
    return env
