"""ManiSkill 3 on a CPU as a hosted environment, and what its GPU batch shares with it (`vla_rl.envs.maniskill`).

ManiSkill's arrays are batches of torch tensors, on a CPU of one environment; the functions here keep the batch. Its own
observation modes are not used, because they observe at every step: "none" steps, and states and pictures are read when
they are asked for.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import maniskill_experts as experts

INSTRUCTIONS = {
    "PickCube-v1": "pick up the red cube and hold it at the goal",
    "PushCube-v1": "push the blue cube to the target",
    "PullCube-v1": "pull the blue cube to the target",
    "StackCube-v1": "put the red cube on the green cube",
    "PegInsertionSide-v1": "put the orange end of the peg into the hole of the box",
    "PullCubeTool-v1": "pull the cube closer with the hook",
    "PlaceSphere-v1": "put the blue ball into the bin",
    "LiftPegUpright-v1": "put the peg upright on the table",
    "PlugCharger-v1": "plug the charger into the receptacle",
}

_AXES = {3: ("x", "y", "z"), 6: ("x", "y", "z", "rx", "ry", "rz"), 7: ("x", "y", "z", "qw", "qx", "qy", "qz")}


def build(options: dict[str, Any]) -> Host:
    """`options`: see `open_env`, and "cameras" (names), "reward" ("sparse" or "dense"), "privileged_state"."""
    import mani_skill.envs  # noqa: F401  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    # each episode's scene is built anew, and ManiSkill collects garbage when it drops the old one: what the imports
    # left need not be gone through every time, which makes a reset ten times faster
    if not gc.get_freeze_count():
        gc.freeze()
    return Host(options)


class Host:
    """One environment (see `protocol.HostedEnv`).

    Reward "sparse" is 1 at success, which ends the episode; "dense" is ManiSkill's normalised one, of which each step
    at the goal gives the most, so that success does not end the episode. Where the task can fail, failure ends it.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._env = open_env(options)
        self._cameras = check_cameras(self._env, options["cameras"])
        self._dense = options["reward"] == "dense"
        self._privileged = bool(options["privileged_state"])
        self._info = self._env.get_info()
        self._seed, self._steps = 0, 0
        self._planner: Any = None
        self._plan: np.ndarray | None = None
        self._script: Any = None

    def spec(self) -> dict[str, Any]:
        return spec_of(self._env, self._options, self._cameras, self._info)

    def reset(self, seed: int) -> None:
        self._seed, self._steps = seed_of(seed), 0
        self._plan = self._script = None
        self._info = begin(self._env, self._seed)

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        command = torch.as_tensor(action, dtype=torch.float32)[None]
        _, reward, _, _, self._info = self._env.step(command)
        self._steps += 1
        reward, terminated, success = outcome(self._env, reward, self._info, self._dense)
        return float(reward[0]), bool(terminated[0]), False, bool(success[0])

    def observe(self, images: bool) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
        state = state_of(self._env, self._info, self._privileged)[0].numpy()
        pictures = pictures_of(self._env, self._cameras) if images else {}
        return state, {c: x[0].numpy() for c, x in pictures.items()}, instruction_of(self._options["task"])

    def render(self) -> np.ndarray:
        return self._env.render_rgb_array()[0].numpy()

    def expert_action(self) -> np.ndarray:
        """With "pd_joint_pos" ManiSkill's motion planner, with "pd_ee_delta_pos" a script of waypoints.

        The planner solves the episode from its start in a second environment, and what it did there is played here,
        the action of the step at hand; after its end the arm holds still.
        """
        task, control = self._options["task"], self._options["control"]
        solve = experts.solution_of(task) if control == "pd_joint_pos" else None
        if solve is not None:
            plan = self._plan
            if plan is None:
                self._planner = self._planner or open_env(self._options, render="none")
                begin(self._planner, self._seed)
                plan = self._plan = experts.plan(self._planner, solve)
            return self._bounded(plan[min(self._steps, len(plan) - 1)])
        if control == "pd_ee_delta_pos" and task in experts.SCRIPTS:
            self._script = self._script or experts.SCRIPTS[task](self._env)
            return self._bounded(self._script.act())
        raise NotImplementedError(
            f"there is no expert for {task} with control {control!r}. With 'pd_joint_pos' there is a planner for many "
            f"tasks (see mani_skill.examples.motionplanning.panda), with 'pd_ee_delta_pos' a script for "
            f"{', '.join(experts.SCRIPTS)}"
        )

    def _bounded(self, action: np.ndarray) -> np.ndarray:
        space = self._env.single_action_space
        return np.clip(np.asarray(action, np.float64), space.low, space.high)

    def close(self) -> None:
        for env in (self._env, self._planner):
            if env is not None:
                env.close()


# ----------------------------------------------------------------- shared with the GPU batch; N environments in a batch
def open_env(options: Mapping[str, Any], num_envs: int = 1, sim: str = "physx_cpu", render: str | None = None) -> Any:
    """ManiSkill's environment, without wrappers. `options`: "task" (a registered id), "image_size" in pixels,
    "control", "reward", "robot" (None: the task's), "render_backend" ("cpu" or "gpu").

    Raises ValueError for an id, a control mode or a reward that is not there, RuntimeError for assets that are not.
    """
    import gymnasium
    import mani_skill.envs  # noqa: F401 (registers the environments)  # pyright: ignore[reportMissingImports]
    from mani_skill.utils.registration import REGISTERED_ENVS  # pyright: ignore[reportMissingImports]

    task, size = options["task"], int(options["image_size"])
    if task not in REGISTERED_ENVS:
        near = sorted(uid for uid in REGISTERED_ENVS if uid.lower()[:4] == task.lower()[:4]) or sorted(INSTRUCTIONS)
        raise ValueError(f"ManiSkill has no task {task!r}; did you mean one of {', '.join(near)}?")
    extra: dict[str, Any] = {"robot_uids": options["robot"]} if options.get("robot") else {}
    try:
        env: Any = gymnasium.make(
            task,
            obs_mode="none",
            reward_mode="normalized_dense" if options["reward"] == "dense" else "sparse",
            control_mode=options["control"],
            num_envs=num_envs,
            sim_backend=sim,
            render_backend=render or options["render_backend"],
            sensor_configs={"width": size, "height": size},
            human_render_camera_configs={"width": 256, "height": 256},
            **extra,
        ).unwrapped
    except EOFError:  # it asks whether to download them
        raise RuntimeError(
            f"{task} needs assets that are not here: run `python -m mani_skill.utils.download_asset {task}` with the "
            "Python of its environment"
        ) from None
    except NotImplementedError as error:
        raise ValueError(f"{task} has no {options['reward']!r} reward ({error}); use another") from None
    except (KeyError, AssertionError) as error:
        raise ValueError(f"{task} has no control mode {options['control']!r} ({error})") from None
    space = env.single_action_space
    if getattr(space, "shape", None) is None or len(space.shape) != 1 or not np.isfinite([space.low, space.high]).all():
        env.close()
        raise ValueError(f"{task} with control {options['control']!r} has actions {space}; bounded numbers are needed")
    return env


def begin(env: Any, seed: int) -> dict[str, Any]:
    """Start the episode of `seed` in the one environment of `env`; returns ManiSkill's info.

    The scene is built anew. In an old one the engine remembers contacts, their order and when bodies fall asleep, which
    a task reads at the start (a grasp of the last episode) and which changes the last digits of what follows.
    """
    return env.reset(seed=[seed], options={"reconfigure": True})[1]


def check_cameras(env: Any, wanted: Sequence[str]) -> tuple[str, ...]:
    """`wanted`, or ValueError for a camera that the task and its robot do not have."""
    unknown = [camera for camera in wanted if camera not in env.scene.sensors]
    if unknown:
        raise ValueError(
            f"there is no camera {', '.join(unknown)}; here are {', '.join(env.scene.sensors)} "
            "(robot='panda_wristcam' has one at the hand)"
        )
    return tuple(wanted)


def spec_of(env: Any, options: Mapping[str, Any], cameras: Sequence[str], info: Mapping[str, Any]) -> dict[str, Any]:
    """See `protocol.HostedEnv.spec`."""
    from mani_skill.utils.registration import REGISTERED_ENVS  # pyright: ignore[reportMissingImports]

    space, size = env.single_action_space, int(options["image_size"])
    entries = _entries(env, info, bool(options["privileged_state"]))
    joints = [joint.name for joint in env.agent.robot.active_joints]
    return {
        "name": f"maniskill/{options['task']}",
        "cameras": {camera: [size, size] for camera in cameras},
        "state_names": [name for key, x in entries for name in _names(key, x.shape[1], joints)],
        "action_low": space.low.tolist(),
        "action_high": space.high.tolist(),
        "action_names": _action_names(env),
        "max_episode_steps": options["max_episode_steps"] or REGISTERED_ENVS[options["task"]].max_episode_steps,
        "control_hz": float(env.control_freq),
    }


def state_of(env: Any, info: Mapping[str, Any], privileged: bool) -> Tensor:
    """float32 [N, S]: joints, the tool's pose and what the pictures do not show (a goal in the air, a grasp); with
    `privileged` all that ManiSkill's "state" mode has, with the poses of objects. `info` is of the last step or reset.
    """
    return torch.cat([x for _, x in _entries(env, info, privileged)], dim=1)


def pictures_of(env: Any, cameras: Sequence[str]) -> dict[str, Tensor]:
    """What `cameras` see now, uint8 [N, h, w, 3]."""
    if not cameras:
        return {}
    for thing in env._hidden_objects:  # goals are shown to people only
        thing.hide_visual()
    env.scene.update_render(update_sensors=True, update_human_render_cameras=False)
    sensors = [env.scene.sensors[camera] for camera in cameras]
    for sensor in sensors:
        sensor.capture()
    read = [sensor.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"] for sensor in sensors]
    return {camera: picture.clone() for camera, picture in zip(cameras, read, strict=True)}


def outcome(env: Any, reward: Tensor, info: Mapping[str, Any], dense: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Reward float32 [N], terminated and success bool [N], of what a step returned; see `Host`."""
    none = torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)
    success = info.get("success", none).bool()
    failed = info.get("fail", none).bool()
    if dense:
        return reward.float(), failed, success
    return success.float(), success | failed, success


def seed_of(seed: int) -> int:
    """ManiSkill's seed of the episode `seed`: numpy's RandomState, which it draws with, takes no larger ones."""
    return int(seed) % 2**32


def instruction_of(task: str) -> str:
    """The task in a sentence; for one without, its name in words."""
    words = "".join(f" {c.lower()}" if c.isupper() else c for c in task.rsplit("-v", 1)[0])
    return INSTRUCTIONS.get(task, words.strip())


def _entries(env: Any, info: Mapping[str, Any], privileged: bool) -> list[tuple[str, Tensor]]:
    from mani_skill.envs.utils.observations import parse_obs_mode_to_struct  # pyright: ignore[reportMissingImports]

    stepping = env._obs_mode, env.obs_mode_struct
    env._obs_mode = "state_dict" if privileged else "none"  # tasks look at one of the two to decide what they tell
    env.obs_mode_struct = parse_obs_mode_to_struct(env._obs_mode)
    try:
        tree = env._get_obs_state_dict(info)
    finally:
        env._obs_mode, env.obs_mode_struct = stepping
    return _flat({**tree["agent"], **tree["extra"]}, env.num_envs)


def _flat(tree: Mapping[str, Any], n: int, prefix: str = "") -> list[tuple[str, Tensor]]:
    parts: list[tuple[str, Tensor]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            parts += _flat(value, n, f"{prefix}{key}_")
        else:
            parts.append((prefix + key, torch.as_tensor(value).reshape(n, -1).float()))
    return parts


def _names(key: str, width: int, joints: Sequence[str]) -> list[str]:
    if key in ("qpos", "qvel") and width == len(joints):
        return [f"{key}_{joint}" for joint in joints]
    if width == 1:
        return [key]
    ends = _AXES[width] if width in (3, 7) and key.endswith(("pos", "pose")) else range(width)
    return [f"{key}_{end}" for end in ends]


def _action_names(env: Any) -> list[str]:
    parts = getattr(env.agent.controller, "action_mapping", {"action": (0, env.single_action_space.shape[0])})
    names: list[str] = []
    for part, (begin, end) in sorted(parts.items(), key=lambda item: item[1]):
        width = end - begin
        ends = _AXES[width] if "_ee_" in env.control_mode and part == "arm" and width in (3, 6) else range(width)
        names += [part] if width == 1 else [f"{part}_{end}" for end in ends]
    return names
