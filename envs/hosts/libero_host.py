"""LIBERO's tasks, as hosted environments: numpy and LIBERO (with robosuite 1.4) only.

Options of `build`, which `vla_rl.envs.libero.LiberoConfig` explains: task ("SUITE/NAME" or "SUITE/NUMBER"), assets
(folder or None), cameras {name: [h, w]}, rotate_180, init_state_ids, settle_steps, max_episode_steps, privileged_state,
fast_pictures, render_size.
"""

from __future__ import annotations

import collections
import collections.abc
import importlib
import importlib.util
import io
import os
import pickle
import re
import runpy
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import libero_experts, mujoco_view, waypoints

_STATE_NAMES = ("eef_x", "eef_y", "eef_z", "eef_rx", "eef_ry", "eef_rz", "finger_left", "finger_right")
_NULL_ACTION = np.array([0.0] * 6 + [waypoints.OPEN])


def _import_libero(assets: str | None) -> Path:
    """Import LIBERO and return its folder. It asks a question on standard input unless its configuration is there, and
    looks for the scene assets in its own folder or on a model hub, whatever the configuration says."""
    found = importlib.util.find_spec("libero")
    if found is None or not found.submodule_search_locations:
        raise ImportError("libero is not installed in this Python")
    root = Path(next(iter(found.submodule_search_locations))) / "libero"
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        places = {"benchmark_root": "", "bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets"}
        lines = [f"{key}: {root / place}" for key, place in places.items() if key != "assets" or assets is None]
        lines += [f"datasets: {folder / 'datasets'}", *([f"assets: {assets}"] if assets else [])]
        (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    if not hasattr(collections, "Iterable"):  # LIBERO's samplers use a name that Python 3.10 moved
        collections.Iterable = collections.abc.Iterable  # pyright: ignore[reportAttributeAccessIssue]
    package: Any = importlib.import_module("libero.libero")
    if assets is not None:
        if not (Path(assets) / "scenes").is_dir():
            raise FileNotFoundError(f"LIBERO's assets are not in {assets}: there is no folder 'scenes'")
        package._assets_path_cache = str(assets)
    return root


def _find_task(root: Path, task: str) -> tuple[str, str]:
    """Suite and name of "SUITE/NAME" or "SUITE/NUMBER" (the official order)."""
    file = root / "benchmark" / "libero_suite_task_map.py"  # by itself: its package imports the training code
    suites = runpy.run_path(str(file))["libero_task_map"]
    suite, _, name = task.partition("/")
    names = suites.get(suite, [])
    if name.isdigit() and int(name) < len(names):
        return suite, names[int(name)]
    if name not in names:
        known = f"{suite} has {len(names)} tasks: {', '.join(names)}" if names else f"suites are {', '.join(suites)}"
        raise ValueError(f"libero: task {task!r} is unknown; {known}")
    return suite, name


def language_of(name: str) -> str:
    """The instruction that the literature's policies get: the task's name, without its scene."""
    return re.sub(r"^.*SCENE\d+_", "", name).replace("_", " ")


_ARRAY_PARTS = (
    ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
)  # fmt: skip


class _NumpyOnly(pickle.Unpickler):
    """Unpickles numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"init states must be plain arrays, found {module}.{name}")
        return super().find_class(module, name)


def read_init_states(path: Path) -> np.ndarray:
    """The init states of a task, float64 [50, 1 + nq + nv] (time, positions, velocities), from a torch archive."""
    with zipfile.ZipFile(path) as archive:
        data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return np.asarray(_NumpyOnly(io.BytesIO(archive.read(data))).load(), np.float64)


class LiberoEnv:
    """One task. The episode of a seed starts from init state `init_state_ids[seed % len(init_state_ids)]`; where
    furniture stands, which the init states do not say, LIBERO draws from the seed."""

    def __init__(self, options: dict[str, Any]) -> None:
        root = _import_libero(options["assets"])
        suite, name = _find_task(root, options["task"])
        from libero.libero.envs import env_wrapper  # pyright: ignore[reportMissingImports]

        self._options, self._name = options, f"{suite}/{name}"
        self._language = language_of(name)
        states = read_init_states(root / "init_files" / suite / f"{name}.pruned_init")
        self._init_states = states[np.array(options["init_state_ids"], dtype=int)]
        try:
            self._env: Any = env_wrapper.ControlEnv(
                bddl_file_name=str(root / "bddl_files" / suite / f"{name}.bddl"),
                has_offscreen_renderer=False,
                use_camera_obs=False,
                ignore_done=True,
                hard_reset=True,  # a soft one keeps traces of the episode before
                control_freq=20,
            ).env
        except FileNotFoundError as error:
            if "assets" not in Path(str(error.filename)).parts:
                raise
            raise FileNotFoundError(
                f"LIBERO's scene assets are not on this machine ({error.filename} is missing). LIBERO fetches them "
                "from its model hub at first use, which needs the network; or copy them from a machine that has them "
                "and set VLA_RL_LIBERO_ASSETS to the folder that holds their folder 'scenes'"
            ) from None
        self._refresh = self._env._update_observables
        self._env._update_observables = lambda force=False: None  # noqa: ARG005 (robosuite's argument)
        self._env._get_observations = lambda force_update=False: {}  # noqa: ARG005
        self._view = mujoco_view.View(fast=options["fast_pictures"])
        self._steps = 0
        self._follower: Any = None

    def spec(self) -> dict[str, Any]:
        low, high = self._env.action_spec
        return {
            "name": self._name,
            "cameras": self._options["cameras"],
            "state_names": [*_STATE_NAMES, *(name for name, _ in self._privileged())],
            "action_low": low.tolist(),
            "action_high": high.tolist(),
            "action_names": ["dx", "dy", "dz", "drx", "dry", "drz", "gripper"],
            "max_episode_steps": self._options["max_episode_steps"],
            "control_hz": 20.0,
        }

    def reset(self, seed: int) -> None:
        from robosuite.utils.errors import RandomizationError  # pyright: ignore[reportMissingImports]

        np.random.seed(np.random.SeedSequence(seed).generate_state(4))  # noqa: NPY002 (LIBERO draws from it)
        while True:
            try:
                self._env.object_property_initializers.clear()  # or each reset draws for all that were before it, too
                self._env.reset()
                break
            except RandomizationError:
                continue  # objects did not fit; LIBERO's own wrapper draws again, too
        self._env.sim.set_state_from_flattened(self._init_states[seed % len(self._init_states)])
        self._env.sim.forward()
        self._env._post_process()
        _once_a_substep(self._env.sim)
        for _ in range(self._options["settle_steps"]):
            self._env.step(_NULL_ACTION)
        self._steps = 0
        self._follower = None

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        self._env.step(action)
        self._steps += 1
        success = bool(self._env._check_success())
        return float(success), success, False, success

    def observe(self, images: bool) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
        self._refresh(force=True)
        seen = {key: self._env._observables[f"robot0_{key}"].obs for key in ("eef_pos", "eef_quat", "gripper_qpos")}
        parts = [seen["eef_pos"], _rotation_vector(seen["eef_quat"]), seen["gripper_qpos"]]
        state = np.concatenate([*parts, [value for _, value in self._privileged()]]).astype(np.float32)
        cameras = self._options["cameras"].items() if images else ()
        return state, {c: self._convention(self._picture(c, *size)) for c, size in cameras}, self._language

    def render(self) -> np.ndarray:
        return self._picture("agentview", *self._options["render_size"])

    def expert_action(self) -> np.ndarray:
        """Raises NotImplementedError for a goal that `libero_experts.script` has nothing for."""
        if self._follower is None:
            self._follower = waypoints.Follower(libero_experts.script(self._env))
        return self._follower.action(*libero_experts.gripper(self._env), self._steps)

    def close(self) -> None:
        self._view.close()
        self._env.close()

    def _picture(self, camera: str, height: int, width: int) -> np.ndarray:
        return self._view.picture(self._env.sim.model._model, self._env.sim.data._data, camera, height, width)

    def _convention(self, upright: np.ndarray) -> np.ndarray:
        """LIBERO's pictures are upside down, and the literature turns those by 180 degrees: upright, but mirrored."""
        return np.ascontiguousarray(upright[:, ::-1] if self._options["rotate_180"] else upright[::-1])

    def _privileged(self) -> Iterator[tuple[str, float]]:
        """Poses of objects (metres, quaternion x y z w) and furniture, and the joints of furniture."""
        if not self._options["privileged_state"]:
            return
        data = self._env.sim.data
        for name, body in self._env.obj_body_id.items():
            w, x, y, z = data.body_xquat[body]
            values = (*data.body_xpos[body], x, y, z, w)
            yield from zip((f"{name}_{part}" for part in ("x", "y", "z", "qx", "qy", "qz", "qw")), values, strict=True)
        for name, fixture in self._env.fixtures_dict.items():
            for i, joint in enumerate(fixture.joints):
                yield f"{name}_joint_{i}", float(data.qpos[self._env.sim.model.get_joint_qpos_addr(joint)])


def _once_a_substep(sim: Any) -> None:
    """Let `sim` compute positions and velocities once a substep, bit for bit what it did (tested).

    robosuite 1.4 calls mj_forward for itself, again for its controller, and mj_step, which begins with the same: three
    times what mj_step1 does before the controls are set and mj_step2 after. Other calls of `forward` than those of a
    substep must come before this one; a hard reset makes another `sim`."""
    mujoco, model, data = mujoco_view.mujoco, sim.model._model, sim.data._data
    is_known = False  # what follows from the present positions and velocities

    def forward() -> None:
        nonlocal is_known
        if not is_known:
            mujoco.mj_step1(model, data)
            is_known = True

    def step(with_udd: bool = True) -> None:  # noqa: ARG001 (robosuite's argument)
        nonlocal is_known
        forward()
        mujoco.mj_step2(model, data)
        is_known = False

    sim.forward, sim.step = forward, step


def _rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle in [0, 2 pi] of `quaternion` (x, y, z, w), as robosuite computes it and policies know it."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(sine, 0.0) else quaternion[:3] * 2.0 * np.arccos(w) / sine


def build(options: dict[str, Any]) -> LiberoEnv:
    """Raises ValueError for an unknown task or camera, FileNotFoundError where the assets are missing."""
    env = LiberoEnv(options)
    there = mujoco_view.camera_names(env._env.sim.model._model)
    for camera in options["cameras"]:
        if camera not in there:
            raise ValueError(f"libero: there is no camera {camera!r}; there are {', '.join(there)}")
    return env
