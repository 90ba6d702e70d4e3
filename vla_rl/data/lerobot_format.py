"""What LeRobot v3.0 files look like: names, columns, schemas. Shared by the writer and the reader.

    meta/info.json                                 version, fps, features, path templates, totals
    meta/stats.json                                min max mean std count q01 q10 q50 q90 q99 of every feature
    meta/tasks.parquet                             sentence -> task_index
    meta/episodes/chunk-000/file-000.parquet       one row an episode: length, where its rows and videos are, statistics
    data/chunk-000/file-000.parquet                one row a frame, one row group an episode
    videos/<feature>/chunk-000/file-000.mp4        where pictures are kept as video

Facts about the format: github.com/huggingface/lerobot, `src/lerobot/datasets` (v3.0).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from vla_rl.core import CameraSpec, EnvSpec

VERSION = "v3.0"
CHUNK_SIZE = 1000
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
PROPOSAL, SOURCE = "action.proposal", "source"  # ours, of labelled datasets
REWARD, DONE, TRUNCATED, SUCCESS = "next.reward", "next.done", "next.truncated", "next.success"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EXTRA = "extra/"  # prefix of our own columns in the episode table
VECTORS = (STATE, ACTION, PROPOSAL)
SCALAR_COLUMNS = {
    REWARD: "float32",
    DONE: "bool",
    TRUNCATED: "bool",
    SUCCESS: "bool",
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
ImageFormat = Literal["png", "mp4"]


class DatasetError(ValueError):
    """A dataset that is missing, damaged, of another version or of another shape than asked for."""


@dataclass(frozen=True)
class DatasetSpec:
    """What every episode of a dataset has.

    `fps`: frames (control steps) a second. `image_format`: "png" keeps pictures exactly, inside the parquet files;
    "mp4" keeps them as H.264 video, lossy and many times smaller for large pictures. `labelled`: each frame says whose
    its action is (`vla_rl.core.Source`), and what the policy proposed, with a person at the arm.
    """

    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    cameras: Mapping[str, CameraSpec]
    robot_type: str
    image_format: ImageFormat = "png"
    labelled: bool = False

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"DatasetSpec: fps must be positive, got {self.fps}")
        if self.image_format not in ("png", "mp4"):
            raise ValueError(f'DatasetSpec: image_format must be "png" or "mp4", got {self.image_format!r}')
        for name, camera in self.cameras.items():
            if not name or "/" in name:
                raise ValueError(f"DatasetSpec: a camera's name becomes a folder and must have no '/', got {name!r}")
            if self.image_format == "mp4" and (camera.height % 2 or camera.width % 2):
                raise ValueError(
                    f"DatasetSpec: H.264 needs even sizes, camera {name!r} is {camera.height}x{camera.width}; "
                    'use image_format="png" or another size'
                )

    @staticmethod
    def from_env(spec: EnvSpec, image_format: ImageFormat = "png") -> DatasetSpec:
        return DatasetSpec(
            fps=spec.control_hz,
            state_names=tuple(spec.state_names),
            action_names=tuple(spec.action.names),
            cameras=dict(spec.cameras),
            robot_type=spec.name,
            image_format=image_format,
        )

    def features(self) -> dict[str, dict[str, Any]]:
        """The `features` of meta/info.json."""
        out: dict[str, dict[str, Any]] = {
            STATE: {"dtype": "float32", "shape": [len(self.state_names)], "names": list(self.state_names)},
            ACTION: {"dtype": "float32", "shape": [len(self.action_names)], "names": list(self.action_names)},
        }
        for name, camera in self.cameras.items():
            out[IMAGES + name] = {
                "dtype": "image" if self.image_format == "png" else "video",
                "shape": [camera.height, camera.width, 3],
                "names": ["height", "width", "channels"],
            }
            if self.image_format == "mp4":
                out[IMAGES + name]["info"] = {
                    "video.height": camera.height,
                    "video.width": camera.width,
                    "video.channels": 3,
                    "video.fps": _plain_fps(self.fps),
                    "video.codec": "h264",
                    "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False,
                    "has_audio": False,
                }
        for name, dtype in SCALAR_COLUMNS.items():
            out[name] = {"dtype": dtype, "shape": [1], "names": None}
        if self.labelled:
            out[PROPOSAL] = dict(out[ACTION])
            out[SOURCE] = {"dtype": "int64", "shape": [1], "names": None}
        return out

    def info(self, num_episodes: int, num_frames: int, num_tasks: int, data_file_mb: float) -> dict[str, Any]:
        """All of meta/info.json."""
        video = bool(self.cameras) and self.image_format == "mp4"
        return {
            "codebase_version": VERSION,
            "robot_type": self.robot_type,
            "total_episodes": num_episodes,
            "total_frames": num_frames,
            "total_tasks": num_tasks,
            "chunks_size": CHUNK_SIZE,
            "data_files_size_in_mb": data_file_mb,
            "video_files_size_in_mb": 200,
            "fps": _plain_fps(self.fps),
            "splits": {"train": f"0:{num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if video else None,
            "features": self.features(),
        }

    def data_schema(self) -> pa.Schema:
        """Columns of the data files, with the metadata by which the `datasets` library decodes pictures."""
        fields, hf_features = [], {}
        for name, feature in self.features().items():
            dtype, shape = feature["dtype"], feature["shape"]
            if dtype == "video":
                continue
            if dtype == "image":
                fields.append(pa.field(name, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
                hf_features[name] = {"_type": "Image"}
                continue
            value = {"dtype": dtype, "_type": "Value"}
            if name in VECTORS:
                fields.append(pa.field(name, pa.list_(pa.float32(), shape[0])))
                hf_features[name] = {"feature": value, "length": shape[0], "_type": "Sequence"}
            else:
                fields.append(pa.field(name, pa.bool_() if dtype == "bool" else pa.type_for_alias(dtype)))
                hf_features[name] = value
        return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": hf_features}})})


def _plain_fps(fps: float) -> int | float:
    return int(fps) if float(fps).is_integer() else float(fps)


def file_numbers(count: int) -> dict[str, int]:
    """`chunk_index` and `file_index` of the `count`-th file of a kind."""
    return {"chunk_index": count // CHUNK_SIZE, "file_index": count % CHUNK_SIZE}


def matrix(table: pa.Table, name: str, dtype: type[np.generic] | None = None) -> np.ndarray:
    """A numeric column, scalar or list, as a numpy array [rows, D]. Raises DatasetError for ragged lists or nulls."""
    column = table.column(name)
    rows = len(column)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    if array.null_count:
        raise DatasetError(f"column {name!r} has {array.null_count} empty values; write the dataset again without them")
    if rows and len(array) % rows:
        raise DatasetError(f"column {name!r} has lists of different lengths ({len(array)} values in {rows} rows)")
    values = array.to_numpy(zero_copy_only=False).reshape(rows, -1)
    return values if dtype is None else values.astype(dtype, copy=False)


def atomic_write(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a kill at any moment leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name outlives a power cut too
    finally:
        os.close(folder)


def atomic_write_json(path: Path, values: Mapping[str, Any]) -> None:
    atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Raises DatasetError where the file is missing or no JSON object."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing; is this the root folder of a LeRobot dataset (it has meta/)?") from None
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON ({error}); restore it or write the dataset again") from None
    if not isinstance(values, dict):
        raise DatasetError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values
