"""Read LeRobot datasets, v3.0 and v2.1, without LeRobot.

Opening reads meta/ alone; rows and pictures are read when asked for, an episode at a time. An episode that stands in
the episode table counts, whatever the totals in info.json say, so a dataset whose writer was killed opens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vla_rl.core import CameraSpec
from vla_rl.data import lerobot_format as fmt
from vla_rl.data.lerobot_format import DatasetError
from vla_rl.data.lerobot_stats import combine_stats, to_tensors, vector_stats
from vla_rl.data.lerobot_tables import numbered_files, open_parquet, read_rows, read_tasks
from vla_rl.data.png import decode_images
from vla_rl.data.video import decode_mp4

_SUPPORTED = "v3.0 and v2.1 are read; convert older datasets with LeRobot's own scripts"


@dataclass(frozen=True)
class EpisodeInfo:
    """Where an episode is. `first_row`: of its rows within `data_file`. `videos`: feature -> (file, start in seconds).
    `first_frame`: index of its first frame in the whole dataset. `extra`: what the writer was given for it."""

    index: int
    length: int
    instruction: str
    first_frame: int
    data_file: Path
    first_row: int
    videos: Mapping[str, tuple[Path, float]]
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Episode:
    """One episode of T frames. `state` float32 [T, S], `action` float32 [T, A], `images[camera]` uint8 [T, h, w, 3].

    `reward` float32 [T], `success` and `truncated` bool [T], and of a labelled dataset `proposal` float32 [T, A] and
    `source` int64 [T] (`vla_rl.core.Source`): None where the dataset has no such column.
    """

    index: int
    instruction: str
    state: Tensor
    action: Tensor
    images: Mapping[str, Tensor]
    reward: Tensor | None
    success: Tensor | None
    truncated: Tensor | None
    extra: Mapping[str, Any]
    proposal: Tensor | None = None
    source: Tensor | None = None

    def __len__(self) -> int:
        return self.action.shape[0]


class LeRobotDataset:
    """A dataset on disk. `path`: the folder that has meta/. Raises DatasetError where it cannot be understood."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DatasetError(
                f"{self.path} is no folder; give the root of a LeRobot dataset, the folder that has meta/"
            )
        self.info = fmt.read_json(self.path / "meta/info.json")
        self.version = str(self.info.get("codebase_version", "none"))
        if not (self.version.startswith("v3.") or self.version == "v2.1"):
            raise DatasetError(f"{self.path} is a LeRobot dataset of version {self.version}; {_SUPPORTED}")
        for key in ("fps", "features", "data_path"):
            if key not in self.info:
                raise DatasetError(f"{self.path}/meta/info.json lacks {key!r}; it has {sorted(self.info)}")
        self.fps = float(self.info["fps"])
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.image_keys = {
            k: k.removeprefix(fmt.IMAGES) for k, f in self.features.items() if f["dtype"] in ("image", "video")
        }
        self.cameras = {name: self._camera_spec(key) for key, name in self.image_keys.items()}
        self.episodes = self._episodes_v3() if self.version.startswith("v3.") else self._episodes_v2()
        self._cached: dict[tuple[str, ...], tuple[tuple[Path, int, int], pa.Table]] = {}
        self._open_file: tuple[Path, pq.ParquetFile] | None = None

    # --------------------------------------------------------------------------------------------------- properties
    @property
    def num_episodes(self) -> int:
        return len(self.episodes)

    @property
    def num_frames(self) -> int:
        return sum(e.length for e in self.episodes)

    @property
    def state_dim(self) -> int:
        return int(np.prod(self._feature(fmt.STATE)["shape"]))

    @property
    def action_dim(self) -> int:
        return int(np.prod(self._feature(fmt.ACTION)["shape"]))

    @cached_property
    def stats(self) -> dict[str, dict[str, Tensor]]:
        """Statistics by feature: min max mean std count q01 q10 q50 q90 q99, float32 [D]; pictures [3, 1, 1] in [0, 1].

        From meta/ where it is whole; numeric features are computed from the rows where it is missing, has no quantiles
        (v2.1), or is behind the episode table (a killed writer).
        """
        stored = self._stored_stats()
        numeric = [k for k, f in self.features.items() if k not in self.image_keys and f["dtype"] != "string"]
        missing = [k for k in numeric if not self._is_whole(stored.get(k))]
        if missing and self.num_frames:
            columns = self.columns(missing)
            stored |= {k: vector_stats(columns[k].reshape(self.num_frames, -1).numpy()) for k in missing}
        return to_tensors(stored)

    # ------------------------------------------------------------------------------------------------------ reading
    def episode(self, index: int, *, cameras: Sequence[str] | None = None) -> Episode:
        """Episode `index` with the pictures of `cameras` (None: all; (): none). Raises IndexError, DatasetError."""
        where = self._where(index)
        names = tuple(self.cameras if cameras is None else cameras)
        optional = [k for k in (fmt.REWARD, fmt.SUCCESS, fmt.TRUNCATED, fmt.PROPOSAL, fmt.SOURCE) if k in self.features]
        for name in (fmt.STATE, fmt.ACTION):
            self._feature(name)
        table = self._rows(where, [fmt.STATE, fmt.ACTION, "episode_index", *optional])

        def column(name: str, dtype: type[np.generic]) -> Tensor:
            return torch.from_numpy(fmt.matrix(table, name, dtype).copy())

        def flat(name: str, dtype: type[np.generic]) -> Tensor | None:
            return column(name, dtype)[:, 0] if name in optional else None

        return Episode(
            index=where.index,
            instruction=where.instruction,
            state=column(fmt.STATE, np.float32),
            action=column(fmt.ACTION, np.float32),
            images={name: self.images(index, name) for name in names},
            reward=flat(fmt.REWARD, np.float32),
            success=flat(fmt.SUCCESS, np.bool_),
            truncated=flat(fmt.TRUNCATED, np.bool_),
            extra=where.extra,
            proposal=column(fmt.PROPOSAL, np.float32) if fmt.PROPOSAL in optional else None,
            source=flat(fmt.SOURCE, np.int64),
        )

    def images(self, index: int, camera: str, rows: Tensor | None = None) -> Tensor:
        """Pictures of `camera` in episode `index`: uint8 [M, h, w, 3] at `rows` (int64 [M], ascending; None: all)."""
        if camera not in self.cameras:
            raise DatasetError(f"{self.path} has no camera {camera!r}; it has {sorted(self.cameras)}")
        key = next(k for k, name in self.image_keys.items() if name == camera)
        spec, where = self.cameras[camera], self._where(index)
        picked = torch.arange(where.length) if rows is None else rows
        if len(picked) and not 0 <= int(picked.min()) <= int(picked.max()) < where.length:
            raise IndexError(f"episode {index} has {where.length} frames, asked for {picked.tolist()}")
        if self.features[key]["dtype"] == "video":
            return self._video_frames(where, key, picked, spec)
        column = self._rows(where, [key, "episode_index"]).column(key).take(pa.array(picked.numpy()))
        files = [self._picture_bytes(cell, where) for cell in column.to_pylist()]
        try:
            return decode_images(files, spec.height, spec.width)
        except ValueError as error:
            raise DatasetError(f"{where.data_file}, episode {index}, camera {camera!r}: {error}") from None

    def columns(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Numeric columns over all frames, in episode order: name -> [num_frames, D] in the stored type (bool, int64,
        float32, ...). Pictures are not among them."""
        for name in names:
            self._feature(name)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for where in self.episodes:
            table = self._rows(where, [*names, "episode_index"])
            for name in names:
                parts[name].append(fmt.matrix(table, name))
        empty = np.zeros((0, 1), np.float32)
        return {n: torch.from_numpy(np.concatenate(p) if p else empty) for n, p in parts.items()}

    # ----------------------------------------------------------------------------------------------------- internal
    def _feature(self, name: str) -> dict[str, Any]:
        if name not in self.features:
            raise DatasetError(
                f"{self.path} has no feature {name!r}; it has {sorted(self.features)}. "
                "Rename the column in meta/info.json and in the data files, or use another dataset"
            )
        return self.features[name]

    def _camera_spec(self, key: str) -> CameraSpec:
        shape, names = self.features[key]["shape"], self.features[key].get("names")
        if len(shape) != 3:
            raise DatasetError(f"{self.path}: the shape of {key} in info.json must be [h, w, 3], got {shape}")
        channels_first = shape[0] == 3 and (shape[2] != 3 or (names or ["height"])[0] in ("channel", "channels"))
        h, w = (shape[1], shape[2]) if channels_first else (shape[0], shape[1])
        return CameraSpec(int(h), int(w))

    def _where(self, index: int) -> EpisodeInfo:
        if not 0 <= index < len(self.episodes):
            raise IndexError(f"{self.path} has episodes 0 to {len(self.episodes) - 1}, asked for {index}")
        return self.episodes[index]

    def _rows(self, where: EpisodeInfo, names: Sequence[str]) -> pa.Table:
        """The rows of one episode. The last row groups of each set of columns are kept: others may put many episodes in
        one."""
        if self._open_file is None or self._open_file[0] != where.data_file:
            self._open_file = (where.data_file, open_parquet(where.data_file))
        file = self._open_file[1]
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        edges = np.cumsum([0, *sizes])
        end = where.first_row + where.length
        if end > edges[-1]:
            raise DatasetError(
                f"{where.data_file} has {edges[-1]} rows, episode {where.index} needs rows {where.first_row} to {end}; "
                "the file is not the one that meta/episodes speaks of, copy the dataset again"
            )
        first = int(np.searchsorted(edges, where.first_row, side="right")) - 1
        last = int(np.searchsorted(edges, end, side="left"))
        place, columns = (where.data_file, first, last), tuple(names)
        if columns not in self._cached or self._cached[columns][0] != place:
            self._cached[columns] = (place, read_rows(where.data_file, file, range(first, last), names))
        table = self._cached[columns][1].slice(where.first_row - int(edges[first]), where.length)
        if "episode_index" in names:
            found = np.unique(fmt.matrix(table, "episode_index")).tolist()
            if found != [where.index]:
                raise DatasetError(
                    f"{where.data_file}: rows of episode {where.index} belong to episodes {found}; meta/episodes and "
                    "data/ are of different datasets, copy the dataset again"
                )
        return table

    def _picture_bytes(self, cell: Any, where: EpisodeInfo) -> bytes:
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is not None:
            return data
        file = self.path / path if path else None
        if file is None or not file.is_file():
            raise DatasetError(
                f"{where.data_file}, episode {where.index}: a picture has no bytes and no file ({path!r})"
            )
        return file.read_bytes()

    def _video_frames(self, where: EpisodeInfo, key: str, rows: Tensor, spec: CameraSpec) -> Tensor:
        path, start = where.videos[key]
        if not path.is_file():
            raise DatasetError(f"{path} is missing; the dataset was copied without its videos")
        if not len(rows):
            return torch.zeros(0, spec.height, spec.width, 3, dtype=torch.uint8)
        try:
            return decode_mp4(path, rows.double() / self.fps + start, self.fps, spec.height, spec.width)
        except ValueError as error:
            raise DatasetError(f"episode {where.index}: {error}") from None

    def _video_keys(self) -> list[str]:
        keys = [k for k in self.image_keys if self.features[k]["dtype"] == "video"]
        if keys and not self.info.get("video_path"):
            raise DatasetError(f"{self.path}/meta/info.json has video features {keys} but no video_path")
        return keys

    # -------------------------------------------------------------------------------------------------- version 3.0
    def _episodes_v3(self) -> tuple[EpisodeInfo, ...]:
        files = numbered_files(self.path / "meta/episodes")
        if not files:
            if self.info.get("total_episodes"):
                raise DatasetError(f"{self.path}/meta/episodes has no parquet file; copy the dataset again")
            return ()
        rows: list[dict[str, Any]] = []
        for file in files:
            parquet = open_parquet(file)
            columns = [n for n in parquet.schema_arrow.names if not n.startswith("stats/")]
            rows += read_rows(file, parquet, None, columns).to_pylist()
        needed = ("episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index")
        missing = [name for name in needed if name not in rows[0]]
        if missing:
            raise DatasetError(f"{files[0]} lacks the columns {missing}; it has {sorted(rows[0])}")
        rows.sort(key=lambda row: row["episode_index"])
        if [row["episode_index"] for row in rows] != list(range(len(rows))):
            raise DatasetError(f"{self.path}/meta/episodes does not list episodes 0 to {len(rows) - 1} once each")
        file_start: dict[tuple[int, int], int] = {}
        for row in rows:
            number, start = (row["data/chunk_index"], row["data/file_index"]), int(row["dataset_from_index"])
            file_start[number] = min(file_start.get(number, start), start)
        sentences = self._sentences_v3(rows)
        return tuple(self._info_v3(row, file_start, sentence) for row, sentence in zip(rows, sentences, strict=True))

    def _sentences_v3(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        if all(row.get("tasks") for row in rows):
            return [str(row["tasks"][0]) for row in rows]
        by_index = {i: task for task, i in read_tasks(self.path / "meta/tasks.parquet").items()}
        return [by_index.get(int(row.get("task_index", 0)), "") for row in rows]

    def _info_v3(self, row: Mapping[str, Any], file_start: Mapping[tuple[int, int], int], sentence: str) -> EpisodeInfo:
        chunk, file = row["data/chunk_index"], row["data/file_index"]
        videos = {}
        for key in self._video_keys():
            where = {"chunk_index": row[f"videos/{key}/chunk_index"], "file_index": row[f"videos/{key}/file_index"]}
            path = self.path / self.info["video_path"].format(video_key=key, **where)
            videos[key] = (path, float(row[f"videos/{key}/from_timestamp"]))
        return EpisodeInfo(
            index=row["episode_index"],
            length=row["length"],
            instruction=sentence,
            first_frame=row["dataset_from_index"],
            data_file=self.path / self.info["data_path"].format(chunk_index=chunk, file_index=file),
            first_row=row["dataset_from_index"] - file_start[chunk, file],
            videos=videos,
            extra={k.removeprefix(fmt.EXTRA): v for k, v in row.items() if k.startswith(fmt.EXTRA)},
        )

    # -------------------------------------------------------------------------------------------------- version 2.1
    def _episodes_v2(self) -> tuple[EpisodeInfo, ...]:
        first_frame, out = 0, []
        for row in self._json_lines("episodes.jsonl"):
            if "episode_index" not in row or "length" not in row:
                raise DatasetError(f"{self.path}/meta/episodes.jsonl: a line lacks episode_index or length: {row}")
            index = int(row["episode_index"])
            if index != len(out):
                raise DatasetError(f"{self.path}/meta/episodes.jsonl: expected episode {len(out)}, found {index}")
            place = {"episode_chunk": index // int(self.info.get("chunks_size", 1000)), "episode_index": index}
            videos = {
                key: (self.path / self.info["video_path"].format(video_key=key, **place), 0.0)
                for key in self._video_keys()
            }
            sentence = str((row.get("tasks") or [""])[0])
            file = self.path / self.info["data_path"].format(**place)
            out.append(EpisodeInfo(index, int(row["length"]), sentence, first_frame, file, 0, videos, {}))
            first_frame += int(row["length"])
        return tuple(out)

    def _json_lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / "meta" / name
        if not path.is_file():
            raise DatasetError(f"{path} is missing; a v2.1 dataset has it, copy the dataset again")
        try:
            return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except ValueError as error:
            raise DatasetError(f"{path} is not valid JSON lines ({error}); copy it again from its source") from None

    # --------------------------------------------------------------------------------------------------- statistics
    def _stored_stats(self) -> dict[str, Any]:
        path = self.path / "meta/stats.json"
        if self.version == "v2.1":
            if not (self.path / "meta/episodes_stats.jsonl").is_file():
                return {}
            rows = [row["stats"] for row in self._json_lines("episodes_stats.jsonl")]
            return {key: combine_stats([row[key] for row in rows]) for key in (rows[0] if rows else {})}
        return fmt.read_json(path) if path.is_file() else {}

    def _is_whole(self, stats: Mapping[str, Any] | None) -> bool:
        return stats is not None and "q01" in stats and int(np.ravel(stats["count"])[0]) == self.num_frames
