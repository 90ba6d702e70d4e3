"""Importers of robomimic's and LIBERO's HDF5 files, on small files of the same layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_rl.data.import_hdf5 import ImportOptions, import_hdf5
from vla_rl.data.lerobot_format import DatasetError
from vla_rl.data.lerobot_reader import LeRobotDataset

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'vla-rl[importers]'")
LENGTHS = {"demo_0": 6, "demo_2": 5, "demo_10": 4}  # sorted by number, not by name
SUCCESS_AT = {"demo_0": 3, "demo_2": None, "demo_10": 3}


def _demo(group: Any, name: str, obs: dict[str, np.ndarray], seed: int) -> None:
    demo = group.create_group(name)
    length = LENGTHS[name]
    rng = np.random.default_rng(seed)
    demo["actions"] = rng.uniform(-1, 1, (length, 7))
    at = SUCCESS_AT[name]
    demo["rewards"] = np.array([float(at is not None and t >= at) for t in range(length)])
    demo["dones"] = np.array([int(t == length - 1) for t in range(length)])
    demo["states"] = rng.standard_normal((length, 32))
    demo.attrs["num_samples"] = length
    demo.attrs["model_file"] = "<mujoco/>"
    for key, value in obs.items():
        demo[f"obs/{key}"] = value[:length]


def _arrays(seed: int, widths: dict[str, int], pictures: tuple[str, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    obs = {key: rng.standard_normal((6, width)) for key, width in widths.items()}
    return obs | {key: rng.integers(0, 256, (6, 8, 10, 3), dtype=np.uint8) for key in pictures}


@pytest.fixture
def robomimic_file(tmp_path: Path) -> Path:
    path = tmp_path / "image.hdf5"
    widths = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 14}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        kwargs = {"control_freq": 20, "robots": ["Panda"]}
        data.attrs["env_args"] = json.dumps({"env_name": "PickPlaceCan", "type": 1, "env_kwargs": kwargs})
        data.attrs["total"] = 15
        for i, name in enumerate(LENGTHS):
            _demo(data, name, _arrays(i, widths, ("agentview_image", "robot0_eye_in_hand_image")), i)
        file["mask/train"] = np.array([b"demo_10", b"demo_0"])
    return path


@pytest.fixture
def libero_file(tmp_path: Path) -> Path:
    path = tmp_path / "soup_demo.hdf5"
    widths = {"ee_pos": 3, "ee_ori": 3, "ee_states": 6, "gripper_states": 2, "joint_states": 7}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Libero_Floor_Manipulation", "env_kwargs": {}})
        data.attrs["problem_info"] = json.dumps({"language_instruction": ['"Pick the soup"']})
        data.attrs["bddl_file_name"] = "chiliocosm/bddl_files/libero_10/KITCHEN_SCENE3_turn_on_the_stove.bddl"
        for i, name in enumerate(LENGTHS):
            _demo(data, name, _arrays(i, widths, ("agentview_rgb", "eye_in_hand_rgb")), i)
    return path


def test_robomimic_columns_and_the_cut_at_the_first_success(robomimic_file: Path, tmp_path: Path) -> None:
    summary = import_hdf5("robomimic", robomimic_file, tmp_path / "out")
    assert (summary.num_episodes, summary.num_frames) == (3, 4 + 5 + 4)
    assert (summary.num_imported, summary.num_successes) == (3, 2)
    dataset = LeRobotDataset(tmp_path / "out")
    episodes = [dataset.episode(i) for i in range(3)]
    assert [e.extra["demo"] for e in episodes] == ["demo_0", "demo_2", "demo_10"]
    assert [len(e) for e in episodes] == [4, 5, 4]
    assert [bool(e.truncated[-1]) for e in episodes] == [False, True, False]
    assert [e.reward.sum().item() for e in episodes] == [1.0, 0.0, 1.0]
    assert torch.equal(episodes[0].success, torch.tensor([False, False, False, True]))
    assert {e.instruction for e in episodes} == {"put the can into its bin"}
    with h5py.File(robomimic_file) as file:
        demo = file["data/demo_10"]
        keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        state = np.concatenate([demo[f"obs/{key}"][()] for key in keys], axis=1)
        np.testing.assert_array_equal(episodes[2].state.numpy(), state.astype(np.float32))
        np.testing.assert_array_equal(episodes[2].action.numpy(), demo["actions"][()].astype(np.float32))
        np.testing.assert_array_equal(episodes[2].images["agentview"].numpy(), demo["obs/agentview_image"][()])
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["fps"] == 20
    assert info["features"]["observation.state"]["names"][:4] == [
        "robot0_eef_pos_0", "robot0_eef_pos_1", "robot0_eef_pos_2", "robot0_eef_quat_0",
    ]  # fmt: skip
    assert info["features"]["action"]["names"] == ["dx", "dy", "dz", "drx", "dry", "drz", "gripper"]


def test_options_choose_episodes_cameras_and_state(robomimic_file: Path, tmp_path: Path) -> None:
    options = ImportOptions(cameras=("robot0_eye_in_hand",), state_keys=("object",), mask="train", instruction="go")
    summary = import_hdf5("robomimic", robomimic_file, tmp_path / "out", options)
    assert summary.num_imported == 2
    episode = LeRobotDataset(tmp_path / "out").episode(1)
    assert (episode.extra["demo"], episode.instruction) == ("demo_10", "go")
    assert tuple(episode.state.shape) == (4, 14)
    assert list(episode.images) == ["robot0_eye_in_hand"]


def test_importing_again_adds_what_is_missing(robomimic_file: Path, tmp_path: Path) -> None:
    import_hdf5("robomimic", robomimic_file, tmp_path / "out", ImportOptions(mask="train"))
    summary = import_hdf5("robomimic", robomimic_file, tmp_path / "out")
    assert (summary.num_imported, summary.num_episodes) == (1, 3)
    assert import_hdf5("robomimic", robomimic_file, tmp_path / "out").num_imported == 0


@pytest.mark.parametrize("rotate", [True, False])
def test_libero_columns_sentence_and_rotation(libero_file: Path, tmp_path: Path, rotate: bool) -> None:
    import_hdf5("libero", libero_file, tmp_path / "out", ImportOptions(rotate_180=rotate))
    episode = LeRobotDataset(tmp_path / "out").episode(0)
    assert episode.instruction == "turn on the stove"
    with h5py.File(libero_file) as file:
        obs = file["data/demo_0/obs"]
        state = np.concatenate([obs["ee_states"][:4], obs["gripper_states"][:4]], axis=1)
        np.testing.assert_array_equal(episode.state.numpy(), state.astype(np.float32))
        for camera, key in (("agentview", "agentview_rgb"), ("robot0_eye_in_hand", "eye_in_hand_rgb")):
            picture = obs[key][:4][:, ::-1, ::-1] if rotate else obs[key][:4]
            np.testing.assert_array_equal(episode.images[camera].numpy(), picture)
    names = json.loads((tmp_path / "out/meta/info.json").read_text())["features"]["observation.state"]["names"]
    assert names == ["eef_x", "eef_y", "eef_z", "eef_rx", "eef_ry", "eef_rz", "finger_left", "finger_right"]


def test_libero_sentence_of_a_file_without_its_task(libero_file: Path, tmp_path: Path) -> None:
    with h5py.File(libero_file, "a") as file:
        del file["data"].attrs["bddl_file_name"]
    import_hdf5("libero", libero_file, tmp_path / "a", ImportOptions(cameras=()))
    assert LeRobotDataset(tmp_path / "a").episode(0).instruction == "Pick the soup"
    with h5py.File(libero_file, "a") as file:
        del file["data"].attrs["problem_info"]
    with pytest.raises(DatasetError, match="neither bddl_file_name nor a language_instruction"):
        import_hdf5("libero", libero_file, tmp_path / "b")


def test_bad_files_are_told(robomimic_file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.hdf5").write_text("hello")
    out = tmp_path / "out"
    with pytest.raises(DatasetError, match="cannot be read as HDF5"):
        import_hdf5("robomimic", tmp_path / "text.hdf5", out)
    with pytest.raises(DatasetError, match="cannot be read as HDF5"):
        import_hdf5("robomimic", tmp_path / "none.hdf5", out)
    with pytest.raises(DatasetError, match=re.escape("has no obs/ee_states; it has agentview_image, object")):
        import_hdf5("libero", robomimic_file, out, ImportOptions(instruction="x"))
    with pytest.raises(DatasetError, match="has no camera moon; it has agentview, robot0_eye_in_hand"):
        import_hdf5("robomimic", robomimic_file, out, ImportOptions(cameras=("moon",)))
    with pytest.raises(DatasetError, match="has no mask 'valid'; it has train"):
        import_hdf5("robomimic", robomimic_file, out, ImportOptions(mask="valid"))
    with pytest.raises(ValueError, match="layout 'rlds' is unknown"):
        import_hdf5("rlds", robomimic_file, out)
    assert not out.exists()
    with h5py.File(robomimic_file, "a") as file:
        del file["data/demo_2/obs"]
    with pytest.raises(DatasetError, match=r"demo_2 has no observations; .*dataset_states_to_obs"):
        import_hdf5("robomimic", robomimic_file, out)
    with h5py.File(tmp_path / "empty.hdf5", "w") as file:
        file.create_group("data")
    with pytest.raises(DatasetError, match="has no data/demo_N; it is not a libero file"):
        import_hdf5("libero", tmp_path / "empty.hdf5", out)
