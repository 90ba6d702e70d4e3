"""LeRobot v3.0 datasets: what is written is read back, by us and by `datasets`; v2.1 is read; errors name."""

import json

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vla_rl.core import CameraSpec
from vla_rl.data.lerobot_format import DatasetError, DatasetSpec
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.lerobot_stats import STAT_NAMES
from vla_rl.data.lerobot_writer import LeRobotWriter
from vla_rl.data.png import encode_png
from vla_rl.data.video import encode_mp4

torch.set_num_threads(1)
CAMERAS = {"agent": CameraSpec(16, 24), "wrist": CameraSpec(8, 8)}
SPEC = DatasetSpec(20, ("x", "y", "z"), ("dx", "grip"), CAMERAS, "test_arm")


def make_episode(seed: int, length: int, cameras=CAMERAS) -> dict:
    g = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 200, length)[:, None, None, None]
    images = {
        name: (ramp + 40 * torch.rand(length, c.height, c.width, 3, generator=g)).to(torch.uint8)
        for name, c in cameras.items()
    }
    return {
        "state": torch.randn(length, 3, generator=g),
        "action": torch.randn(length, 2, generator=g),
        "images": images,
        "reward": torch.rand(length, generator=g),
        "success": torch.arange(length) == length - 1,
        "instruction": f"pick block {seed % 3}",
        "truncated": seed % 2 == 1,
        "extra": {"seed": seed},
    }


def assert_same(episode, made):
    assert episode.instruction == made["instruction"]
    for name in ("state", "action", "reward", "success"):
        assert torch.equal(getattr(episode, name), made[name]), name
    assert bool(episode.truncated[-1]) == made["truncated"]
    assert not bool(episode.truncated[:-1].any())
    assert set(episode.images) == set(made["images"])
    for camera, images in made["images"].items():
        assert torch.equal(episode.images[camera], images)
    assert episode.extra == made["extra"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Seven episodes in several data files (a tiny file limit), with two resumptions."""
    path = tmp_path_factory.mktemp("demos") / "set"
    made = [make_episode(seed, length) for seed, length in enumerate([5, 1, 9, 4, 7, 3, 6])]
    for part in (made[:3], made[3:6], made[6:]):
        with LeRobotWriter.open(path, SPEC, episodes_per_commit=2, file_mb=0.01) as writer:
            for episode in part:
                writer.add_episode(**episode)
    return path, made


def test_round_trip_bit_for_bit(written):
    path, made = written
    dataset = LeRobotDataset(path)
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (7, 35, 20.0)
    assert (dataset.state_dim, dataset.action_dim, dataset.cameras) == (3, 2, CAMERAS)
    assert len(list(path.glob("data/*/*.parquet"))) > 1
    for i in (6, 0, 3, 1, 2, 5, 4):
        assert_same(dataset.episode(i), made[i])
    columns = dataset.columns(["index", "timestamp", "frame_index", "episode_index", "task_index", "next.done"])
    assert columns["index"][:, 0].tolist() == list(range(35))
    assert columns["episode_index"].dtype == torch.int64
    assert columns["task_index"][:, 0].unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(columns["timestamp"], columns["frame_index"] / 20.0, rtol=0, atol=1e-7)
    assert columns["next.done"].sum() == 7
    assert dataset.episode(2, cameras=()).images == {}


def test_chosen_rows_of_one_camera(written):
    path, made = written
    rows = torch.tensor([0, 4, 8])
    assert torch.equal(LeRobotDataset(path).images(2, "wrist", rows), made[2]["images"]["wrist"][rows])


def test_statistics_are_exact_over_the_whole_dataset(written):
    path, made = written
    stats = LeRobotDataset(path).stats
    for name, key in (("observation.state", "state"), ("action", "action")):
        x = torch.cat([m[key] for m in made]).double().numpy()
        expected = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0), "count": [35]}
        expected |= {q: np.quantile(x, int(q[1:]) / 100, axis=0) for q in ("q01", "q10", "q50", "q90", "q99")}
        assert set(stats[name]) == set(STAT_NAMES)
        for stat, value in expected.items():
            np.testing.assert_allclose(stats[name][stat].numpy(), value, rtol=1e-5, atol=1e-6)
    pixels = torch.cat([m["images"]["agent"].reshape(-1, 3) for m in made]).double() / 255
    image = stats["observation.images.agent"]
    assert image["mean"].shape == (3, 1, 1)
    torch.testing.assert_close(image["mean"].flatten(), pixels.mean(0).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image["std"].flatten(), pixels.std(0, correction=0).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image["max"].flatten(), pixels.max(0).values.float(), rtol=1e-6, atol=1e-6)


def test_meta_is_complete(written):
    path, made = written
    info = json.loads((path / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"], info["fps"]) == (7, 35, 3, 20)
    assert info["splits"] == {"train": "0:7"}
    assert info["features"]["observation.images.agent"]["shape"] == [16, 24, 3]
    assert set(json.loads((path / "meta/stats.json").read_text())) == set(info["features"])
    tasks = pd.read_parquet(path / "meta/tasks.parquet")
    assert tasks.index.name == "task"
    assert tasks.loc["pick block 2", "task_index"] == 2
    rows = pd.concat(pd.read_parquet(f) for f in sorted(path.glob("meta/episodes/*/*.parquet")))
    assert rows["length"].tolist() == [5, 1, 9, 4, 7, 3, 6]
    assert rows["dataset_to_index"].tolist() == np.cumsum([5, 1, 9, 4, 7, 3, 6]).tolist()
    np.testing.assert_allclose(rows["stats/action/max"].iloc[2], made[2]["action"].max(0).values)
    for name in info["features"]:
        assert {f"stats/{name}/{s}" for s in STAT_NAMES} <= set(rows.columns)
    first = pq.ParquetFile(sorted(path.glob("data/*/*.parquet"))[0])
    assert set(first.schema_arrow.names) == set(info["features"])
    assert first.metadata.row_group(0).num_rows == 5  # one row group an episode


def test_the_datasets_library_reads_rows_and_decodes_pictures(written, tmp_path):
    path, made = written
    files = [str(f) for f in sorted(path.glob("data/*/*.parquet"))]
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert len(table) == 35
    assert isinstance(table.features["observation.images.agent"], datasets.Image)
    row = table[5 + 1 + 8]
    assert np.array_equal(np.asarray(row["observation.images.agent"]), made[2]["images"]["agent"][8].numpy())
    np.testing.assert_array_equal(np.float32(row["observation.state"]), made[2]["state"][8].numpy())
    assert (row["next.done"], row["next.success"], row["episode_index"], row["index"]) == (True, True, 2, 14)


def test_video_dataset(tmp_path):
    cameras = {"agent": CameraSpec(32, 48)}
    spec = DatasetSpec(20, SPEC.state_names, SPEC.action_names, cameras, "test_arm", image_format="mp4")
    made = []
    for seed, length in ((0, 12), (1, 5)):
        episode = make_episode(seed, length, cameras)
        smooth = torch.linspace(0, 220, length)[:, None, None, None] + torch.linspace(0, 30, 48)[None, None, :, None]
        episode["images"] = {"agent": smooth.expand(length, 32, 48, 3).to(torch.uint8)}
        made.append(episode)
    with LeRobotWriter.open(tmp_path / "v", spec) as writer:
        for episode in made:
            writer.add_episode(**episode)
    dataset = LeRobotDataset(tmp_path / "v")
    assert dataset.info["features"]["observation.images.agent"]["dtype"] == "video"
    for i, episode in enumerate(made):
        error = (dataset.episode(i).images["agent"].int() - episode["images"]["agent"].int()).abs()
        assert error.float().mean() < 2.0
        assert error.max() <= 12  # lossy, but frame t is frame t: neighbours differ by 18 and more
    some = dataset.images(0, "agent", torch.tensor([3, 10]))
    assert (some.int() - made[0]["images"]["agent"][[3, 10]].int()).abs().max() <= 12
    (tmp_path / "v/videos/observation.images.agent/chunk-000/file-001.mp4").write_bytes(b"not a video")
    with pytest.raises(DatasetError, match="cannot be decoded"):
        dataset.images(1, "agent")


def write_v21(path, made, *, video=False):
    """The layout of LeRobot v2.1: one parquet file (and video) an episode, meta/ as JSON lines."""
    feature = {"dtype": "float32", "shape": [1], "names": None}
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": [2], "names": ["dx", "grip"]},
        "observation.images.agent": {
            "dtype": "video" if video else "image",
            "shape": [16, 24, 3],
            "names": ["height", "width", "channel"],
        },
        "timestamp": feature,
        **{n: {**feature, "dtype": "int64"} for n in ("frame_index", "episode_index", "index", "task_index")},
    }
    (path / "meta").mkdir(parents=True)
    start, episodes, stats = 0, [], []
    for i, m in enumerate(made):
        t = len(m["action"])
        data = {
            "observation.state": pa.array(m["state"].tolist(), pa.list_(pa.float32())),
            "action": pa.array(m["action"].tolist(), pa.list_(pa.float32())),
            "timestamp": pa.array(np.float32(np.arange(t) / 20)),
            "frame_index": pa.array(range(t)),
            "episode_index": pa.array([i] * t),
            "index": pa.array(range(start, start + t)),
            "task_index": pa.array([0] * t),
        }
        if video:
            file = path / f"videos/chunk-000/observation.images.agent/episode_{i:06d}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_mp4(m["images"]["agent"], 20))
        else:
            files = encode_png(m["images"]["agent"])
            data["observation.images.agent"] = pa.array([{"bytes": b, "path": None} for b in files])
        file = path / f"data/chunk-000/episode_{i:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(data), file)
        episodes.append({"episode_index": i, "tasks": [m["instruction"]], "length": t})
        x = m["action"].numpy()
        values = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0), "count": np.array([t])}
        stats.append({"episode_index": i, "stats": {"action": {k: v.tolist() for k, v in values.items()}}})
        start += t
    info = {
        "codebase_version": "v2.1",
        "fps": 20,
        "total_episodes": len(made),
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (path / "meta/info.json").write_text(json.dumps(info))
    for name, rows in (("episodes", episodes), ("episodes_stats", stats)):
        (path / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_version_21_is_read_with_exact_quantiles(tmp_path):
    made = [make_episode(i, t) for i, t in enumerate([4, 6, 3])]
    dataset = LeRobotDataset(write_v21(tmp_path / "old", made))
    assert (dataset.version, dataset.num_episodes, dataset.num_frames) == ("v2.1", 3, 13)
    for i, m in enumerate(made):
        episode = dataset.episode(i)
        assert torch.equal(episode.state, m["state"])
        assert torch.equal(episode.action, m["action"])
        assert torch.equal(episode.images["agent"], m["images"]["agent"])
        assert episode.instruction == m["instruction"]
        assert episode.reward is None
        assert episode.success is None
    x = torch.cat([m["action"] for m in made]).numpy()
    np.testing.assert_allclose(dataset.stats["action"]["q99"], np.quantile(x, 0.99, axis=0), rtol=1e-5)
    np.testing.assert_allclose(dataset.stats["observation.state"]["count"], [13])


def test_version_21_videos_are_read(tmp_path):
    made = [make_episode(i, 6) for i in range(2)]
    dataset = LeRobotDataset(write_v21(tmp_path / "old", made, video=True))
    brightness = dataset.episode(1).images["agent"].float().mean((1, 2, 3))
    torch.testing.assert_close(brightness, made[1]["images"]["agent"].float().mean((1, 2, 3)), rtol=0, atol=4.0)


def test_others_files_many_episodes_in_one_row_group_and_several_in_one_video(tmp_path, written):
    """Layouts that our writer does not make but LeRobot's does: one big row group; one video of all episodes."""
    _, made = written
    cameras = {"agent": CAMERAS["agent"]}
    made = [{**m, "images": {"agent": m["images"]["agent"]}} for m in made[:3]]
    spec = DatasetSpec(20, SPEC.state_names, SPEC.action_names, cameras, "test_arm", image_format="mp4")
    path = tmp_path / "set"
    with LeRobotWriter.open(path, spec) as writer:
        for m in made:
            writer.add_episode(**m)
    data = path / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(data), data)
    videos = path / "videos/observation.images.agent/chunk-000"
    (videos / "file-000.mp4").write_bytes(encode_mp4(torch.cat([m["images"]["agent"] for m in made]), 20))
    table_file = path / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(table_file).to_pylist()
    for row in rows:
        row["videos/observation.images.agent/file_index"] = 0
        row["videos/observation.images.agent/from_timestamp"] = row["dataset_from_index"] / 20
    pq.write_table(pa.Table.from_pylist(rows), table_file)
    dataset = LeRobotDataset(path)
    for i, m in enumerate(made):
        episode = dataset.episode(i)
        assert torch.equal(episode.state, m["state"])
        mean = episode.images["agent"].float().mean((1, 2, 3))
        torch.testing.assert_close(mean, m["images"]["agent"].float().mean((1, 2, 3)), rtol=0, atol=4.0)


@pytest.fixture
def copy(written, tmp_path):
    import shutil

    return shutil.copytree(written[0], tmp_path / "copy")


def edit_info(path, **changes):
    info = json.loads((path / "meta/info.json").read_text())
    (path / "meta/info.json").write_text(json.dumps({**info, **changes}))


def test_errors_say_what_is_wrong(copy):
    with pytest.raises(DatasetError, match="no folder"):
        LeRobotDataset(copy / "nothing")
    with pytest.raises(DatasetError, match=r"info\.json is missing"):
        LeRobotDataset(copy / "data")
    dataset = LeRobotDataset(copy)
    with pytest.raises(IndexError, match="episodes 0 to 6"):
        dataset.episode(7)
    with pytest.raises(DatasetError, match=r"no camera 'top'.*agent"):
        dataset.images(0, "top")
    with pytest.raises(DatasetError, match=r"no feature 'velocity'.*observation\.state"):
        dataset.columns(["velocity"])
    with pytest.raises(IndexError, match="5 frames"):
        dataset.images(0, "agent", torch.tensor([5]))


def test_truncated_and_missing_data_files(copy):
    first, second = sorted(copy.glob("data/*/*.parquet"))[:2]
    first.write_bytes(first.read_bytes()[:-200])
    second.unlink()
    dataset = LeRobotDataset(copy)
    with pytest.raises(DatasetError, match=r"file-000\.parquet is damaged or truncated"):
        dataset.episode(0)
    with pytest.raises(DatasetError, match=r"file-001\.parquet is missing"):
        [dataset.episode(i) for i in range(1, 7) if "file-001" in str(dataset.episodes[i].data_file)]


def test_other_versions_and_wrong_shapes(copy):
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    wrong = {**features, "observation.images.agent": {**features["observation.images.agent"], "shape": [16, 16, 3]}}
    edit_info(copy, features=wrong)
    with pytest.raises(DatasetError, match=r"16x24, expected 16x16"):
        LeRobotDataset(copy).episode(0)
    without = {k: v for k, v in features.items() if k != "action"}
    edit_info(copy, features=without)
    with pytest.raises(DatasetError, match="no feature 'action'"):
        LeRobotDataset(copy).episode(0)
    edit_info(copy, codebase_version="v1.6")
    with pytest.raises(DatasetError, match=r"version v1\.6; v3\.0 and v2\.1 are read"):
        LeRobotDataset(copy)
    (copy / "meta/info.json").write_text("{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        LeRobotDataset(copy)


def test_data_of_another_dataset_is_noticed(copy):
    files = sorted(copy.glob("data/*/*.parquet"))
    files[-1].write_bytes(files[0].read_bytes())
    with pytest.raises(DatasetError, match=r"belong to episodes|needs rows"):
        LeRobotDataset(copy).episode(6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"state": torch.zeros(4, 2)}, r"state must be \[4, 3\], got \[4, 2\]"),
        ({"action": torch.full((4, 2), float("nan"))}, "action has numbers that are not finite"),
        ({"reward": torch.zeros(3)}, r"reward must be \[4\]"),
        ({"success": torch.zeros(4)}, "success must be bool"),
        ({"images": {}}, r"expected images of \['agent', 'wrist'\]"),
        ({"instruction": ""}, "instruction is empty"),
        ({"extra": {"other": 1}}, "extra must have"),
        ({"state": torch.zeros(0, 3)}, "at least one frame"),
    ],
)
def test_bad_episodes_are_refused_whole(tmp_path, change, text):
    with LeRobotWriter.open(tmp_path / "set", SPEC) as writer:
        writer.add_episode(**make_episode(0, 4))
        with pytest.raises(ValueError, match=text):
            writer.add_episode(**(make_episode(1, 4) | change))
        writer.add_episode(**make_episode(2, 4))
    assert [e.extra["seed"] for e in LeRobotDataset(tmp_path / "set").episodes] == [0, 2]


def test_open_refuses_other_features_a_foreign_folder_and_a_second_writer(tmp_path):
    path = tmp_path / "set"
    with LeRobotWriter.open(path, SPEC) as writer:
        with pytest.raises(DatasetError, match="another process is writing"):
            LeRobotWriter.open(path, SPEC)
        writer.add_episode(**make_episode(0, 4))
    other = DatasetSpec(20, ("x", "y"), SPEC.action_names, CAMERAS, "test_arm")
    with pytest.raises(DatasetError, match=r"other features than this run: observation\.state"):
        LeRobotWriter.open(path, other)
    with pytest.raises(DatasetError, match="fps 20, this run has 10"):
        LeRobotWriter.open(path, DatasetSpec(10, SPEC.state_names, SPEC.action_names, CAMERAS, "test_arm"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("precious")
    with pytest.raises(DatasetError, match="no dataset"):
        LeRobotWriter.open(tmp_path / "foreign", SPEC)
    with pytest.raises(ValueError, match="even sizes"):
        DatasetSpec(20, ("x",), ("a",), {"c": CameraSpec(15, 16)}, "arm", image_format="mp4")


def test_an_empty_dataset_opens(tmp_path):
    LeRobotWriter.open(tmp_path / "set", SPEC).close()
    assert LeRobotDataset(tmp_path / "set").num_episodes == 0
