"""Import demonstrations of robomimic and LIBERO, HDF5 files, as LeRobot datasets of the environments here.

    python -m vla_rl.data.import_hdf5 --layout robomimic --source image.hdf5 --path runs/can --cameras agentview
    python -m vla_rl.data.import_hdf5 --layout libero --source pick_up_..._demo.hdf5 --path runs/soup

Both keep an episode in `data/demo_N`: `actions` [T, A], `rewards` [T], and under `obs` what was seen before each
action. The columns come out as `RobosuiteConfig` and `LiberoConfig` name them. An episode is cut at its first success,
where the environments here end it too. h5py is optional: pip install 'vla-rl[importers]'.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vla_rl.core import CameraSpec
from vla_rl.data.lerobot_format import DatasetError, DatasetSpec, ImageFormat
from vla_rl.data.lerobot_writer import LeRobotWriter

Layout = Literal["robomimic", "libero"]

_ACTIONS = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
_LIBERO_STATE = ("eef_x", "eef_y", "eef_z", "eef_rx", "eef_ry", "eef_rz", "finger_left", "finger_right")
_LIBERO_CAMERAS = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}
_STATE_KEYS = {
    "robomimic": ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
    "libero": ("ee_states", "gripper_states"),
}
_INSTRUCTIONS = {
    "Lift": "lift the cube",
    "PickPlaceCan": "put the can into its bin",
    "NutAssemblySquare": "put the square nut on the square peg",
}


@dataclass(frozen=True)
class ImportSummary:
    """`num_episodes`, `num_frames`: of the whole dataset. `num_imported`, `num_successes`: episodes of this call."""

    path: Path
    num_episodes: int
    num_frames: int
    num_imported: int
    num_successes: int


@dataclass(frozen=True)
class ImportOptions:
    """What of a file is imported.

    `cameras`: by the environment's names; None takes all that the file has, () none. `state_keys`: entries of `obs`
    that make the state; None takes the gripper's pose and fingers (add "object" for robomimic's object poses). `mask`:
    import only the episodes that `mask/NAME` of the file lists. `rotate_180`: turn LIBERO's upside-down pictures, as
    `LiberoConfig` does; robomimic's are upright. `instruction`: None takes the file's own.
    """

    cameras: tuple[str, ...] | None = None
    state_keys: tuple[str, ...] | None = None
    mask: str | None = None
    rotate_180: bool = True
    instruction: str | None = None
    image_format: ImageFormat = "png"


DEFAULTS = ImportOptions()


def import_hdf5(
    layout: Layout, source: str | Path, path: str | Path, options: ImportOptions = DEFAULTS
) -> ImportSummary:
    """Append the episodes of the `layout` file `source` to the dataset at `path`; those it has already are left out, so
    that a killed import goes on.

    Raises DatasetError where the file is not of that layout, lacks what was asked for, or differs from the dataset;
    RuntimeError without h5py.
    """
    if layout not in _STATE_KEYS:
        raise ValueError(f"import_hdf5: layout {layout!r} is unknown; use one of {', '.join(_STATE_KEYS)}")
    if importlib.util.find_spec("h5py") is None:
        raise RuntimeError("importing HDF5 files needs h5py: pip install 'vla-rl[importers]'")
    import h5py

    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise DatasetError(f"{source} cannot be read as HDF5: {error}") from None
    with file:
        reader = _Reader(layout, Path(source), file, options)
        num_imported = num_successes = 0
        with LeRobotWriter.open(path, reader.spec, episodes_per_commit=8) as writer:
            known = {(extra.get("source"), extra.get("demo")) for extra in writer.extras}
            for name, episode in reader.episodes(known):
                writer.add_episode(**episode, extra={"source": reader.source.name, "demo": name})
                num_imported += 1
                num_successes += bool(episode["success"][-1])
            writer.commit()
            return ImportSummary(Path(path), writer.num_episodes, writer.num_frames, num_imported, num_successes)


class _Reader:
    """One file; `spec` is that of the dataset it becomes."""

    def __init__(self, layout: Layout, source: Path, file: Any, options: ImportOptions) -> None:
        self.layout, self.source, self._options = layout, source, options
        if "data" not in file or not any(name.startswith("demo_") for name in file["data"]):
            raise DatasetError(f"{source} has no data/demo_N; it is not a {layout} file")
        self._data = file["data"]
        self._names = self._chosen(file)
        env = _json(self._data.attrs.get("env_args", "{}"), source)
        first = self._data[self._names[0]].get("obs", {})
        self._cameras = self._camera_keys(first)
        self._state_keys = options.state_keys or _STATE_KEYS[layout]
        shapes = {key: self._entry(first, key).shape for key in (*self._state_keys, *self._cameras.values())}
        widths = {key: shapes[key][1] for key in self._state_keys}
        own = layout == "libero" and self._state_keys == _STATE_KEYS["libero"]
        names = _LIBERO_STATE if own else tuple(f"{key}_{i}" for key, width in widths.items() for i in range(width))
        num_actions = self._data[self._names[0]]["actions"].shape[1]
        self._instruction = options.instruction or self._own_instruction(env)
        self.spec = DatasetSpec(
            fps=float(env.get("env_kwargs", {}).get("control_freq", 20)),
            state_names=names,
            action_names=_ACTIONS if num_actions == 7 else tuple(f"action_{i}" for i in range(num_actions)),
            cameras={camera: CameraSpec(*shapes[key][1:3]) for camera, key in self._cameras.items()},
            robot_type=f"{layout}/{env.get('env_name', 'unknown')}",
            image_format=options.image_format,
        )

    def episodes(self, known: set[tuple[Any, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and `LeRobotWriter.add_episode`'s arguments of each episode that is not `known`."""
        for name in self._names:
            if (self.source.name, name) not in known:
                yield name, self._episode(name)

    def _episode(self, name: str) -> dict[str, Any]:
        demo = self._data[name]
        if "obs" not in demo:
            raise DatasetError(
                f"{self.source}: {name} has no observations; make them with robomimic's dataset_states_to_obs.py"
            )
        rewards = np.asarray(demo["rewards"], np.float32)
        solved = np.flatnonzero(rewards > 0)
        length = int(solved[0]) + 1 if len(solved) else len(rewards)
        arrays = {key: np.asarray(self._entry(demo["obs"], key)[:length]) for key in self._state_keys}
        arrays["actions"] = np.asarray(demo["actions"][:length], np.float32)
        pictures = {c: np.asarray(self._entry(demo["obs"], key)[:length]) for c, key in self._cameras.items()}
        for key, array in {**arrays, **pictures}.items():
            if len(array) != length:
                raise DatasetError(f"{self.source}: {name} has {len(array)} rows of {key}, expected {length}")
        turn = self.layout == "libero" and self._options.rotate_180
        state = np.concatenate([arrays[key] for key in self._state_keys], axis=1, dtype=np.float32)
        return {
            "state": torch.from_numpy(state),
            "action": torch.from_numpy(arrays["actions"]),
            "images": {c: torch.from_numpy(x[:, ::-1, ::-1].copy() if turn else x) for c, x in pictures.items()},
            "reward": torch.from_numpy(rewards[:length]),
            "success": torch.from_numpy(rewards[:length] > 0),
            "instruction": self._instruction,
            "truncated": not len(solved),
        }

    def _chosen(self, file: Any) -> list[str]:
        names = sorted((n for n in self._data if n.startswith("demo_")), key=lambda n: int(n.removeprefix("demo_")))
        if self._options.mask is None:
            return names
        masks = file.get("mask", {})
        if self._options.mask not in masks:
            raise DatasetError(f"{self.source} has no mask {self._options.mask!r}; it has {', '.join(masks) or 'none'}")
        listed = {n.decode() if isinstance(n, bytes) else str(n) for n in masks[self._options.mask][()]}
        if not listed.intersection(names):
            raise DatasetError(f"{self.source}: the mask {self._options.mask!r} lists no episode of the file")
        return [name for name in names if name in listed]

    def _camera_keys(self, obs: Mapping[str, Any]) -> dict[str, str]:
        if self.layout == "libero":
            there = {camera: key for camera, key in _LIBERO_CAMERAS.items() if key in obs}
        else:
            there = {key.removesuffix("_image"): key for key in obs if key.endswith("_image")}
        wanted = there if self._options.cameras is None else self._options.cameras
        missing = [camera for camera in wanted if camera not in there]
        if missing:
            raise DatasetError(f"{self.source} has no camera {', '.join(missing)}; it has {', '.join(there) or 'none'}")
        return {camera: there[camera] for camera in wanted}

    def _entry(self, obs: Any, key: str) -> Any:
        if key not in obs:
            raise DatasetError(f"{self.source} has no obs/{key}; it has {', '.join(obs) or 'no observations'}")
        return obs[key]

    def _own_instruction(self, env: Mapping[str, Any]) -> str:
        if self.layout == "robomimic":
            name = str(env.get("env_name", "unknown task"))
            return _INSTRUCTIONS.get(name, name)
        task = Path(str(self._data.attrs.get("bddl_file_name", ""))).stem
        if task:  # what the benchmark says, and LiberoConfig: the task's name without its scene
            return re.sub(r"^.*SCENE\d+_", "", task).replace("_", " ")
        language = _json(self._data.attrs.get("problem_info", "{}"), self.source).get("language_instruction", "")
        text = "".join(language) if isinstance(language, list) else str(language)
        if not text:
            raise DatasetError(f"{self.source} has neither bddl_file_name nor a language_instruction; give one")
        return text.strip().strip('"')


def _json(text: str | bytes, source: Path) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{source}: an attribute of data is not JSON: {error}") from None


def main(layout: Layout, source: Path, path: Path, options: ImportOptions = DEFAULTS) -> None:
    """Import an HDF5 file; see the module."""
    summary = import_hdf5(layout, source, path, options)
    print(
        f"{summary.path}: {summary.num_imported} episodes imported, {summary.num_successes} of them successes; "
        f"{summary.num_episodes} episodes, {summary.num_frames} frames in all"
    )


if __name__ == "__main__":
    import tyro

    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
