"""Write demonstrations as a LeRobot v3.0 dataset while they are collected.

A kill at any moment, a full disk or a power cut never costs a committed episode: every file is replaced whole
(`atomic_write`), and an episode counts from the moment at which its row stands in the episode table. The order of a
commit is tasks, videos, data, episode table, statistics, totals; `LeRobotWriter.open` removes what a killed commit left
behind and goes on from there.

Several episodes share a data file: while it is smaller than `file_mb` it is written again with the new episodes at its
end, and the reader never looks at rows that no episode names.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vla_rl.data import lerobot_format as fmt
from vla_rl.data.lerobot_format import DatasetError, DatasetSpec
from vla_rl.data.lerobot_recovery import recover
from vla_rl.data.lerobot_stats import FeatureStats, combine_stats, image_stats, vector_stats
from vla_rl.data.lerobot_tables import tasks_table, write_parquet
from vla_rl.data.png import encode_png
from vla_rl.data.video import encode_mp4

_EPISODES_PER_TABLE = 200
_STATS_GROWTH = 1.1  # meta/stats.json is at most this factor behind while writing; `close` makes it exact

ExtraValue = int | float | str | bool


class DatasetWriteError(OSError):
    """The disk refused a write; what was committed before is intact, and `commit()` can be called again."""


@dataclass(frozen=True)
class _PendingEpisode:
    row: dict[str, Any]
    frames: pa.Table
    videos: dict[str, bytes]
    numbers: dict[str, np.ndarray]
    image_stats: dict[str, FeatureStats]


class LeRobotWriter:
    """Appends whole episodes to a dataset. Make one with `LeRobotWriter.open`; use it as a context manager.

    `episodes_per_commit`: 1 makes each episode safe at once; more is faster, and that many can be lost by a kill.
    Numeric columns stay in memory for exact quantiles: 4 bytes a number, some 200 bytes a frame.
    """

    def __init__(self, path: Path, spec: DatasetSpec, episodes_per_commit: int, file_mb: float, lock: TextIO) -> None:
        self.path, self.spec = path, spec
        self._episodes_per_commit, self._file_mb, self._lock = episodes_per_commit, file_mb, lock
        self._schema = spec.data_schema()
        self._pending: list[_PendingEpisode] = []
        self._num_episodes = self._num_frames = 0
        try:
            if not (path / "meta/info.json").exists():
                fmt.atomic_write_json(path / "meta/info.json", spec.info(0, 0, 0, file_mb))
            found = recover(path, spec)
        except OSError as error:
            raise self._write_error(error) from error
        self._tasks, self._tasks_on_disk = found.tasks, len(found.tasks)
        self._num_episodes, self._num_frames = found.num_episodes, found.num_frames
        self._data_file, self._data_tables = found.data_file, found.data_tables
        self._table_file, self._table_rows = found.table_file, found.table_rows
        self._numbers, self._image_stats = found.numbers, found.image_stats
        self._extra_types: dict[str, type] | None = found.extra_types
        self.extras: list[dict[str, ExtraValue]] = found.extras
        self._stats_frames = -1  # the first commit, or close(), writes the statistics that a kill may have left behind

    @staticmethod
    def open(
        path: str | Path, spec: DatasetSpec, *, episodes_per_commit: int = 1, file_mb: float = 8.0
    ) -> LeRobotWriter:
        """Start a dataset at `path`, or go on with the one that is there.

        Raises DatasetError where the dataset there has other features, is damaged, or is open in another process.
        """
        root = Path(path)
        if episodes_per_commit < 1 or file_mb <= 0:
            raise ValueError(f"episodes_per_commit {episodes_per_commit} and file_mb {file_mb} must be positive")
        if root.exists() and not root.is_dir():
            raise DatasetError(f"{root} is a file; give a folder")
        if root.exists() and not (root / "meta").exists() and any(root.iterdir()):
            raise DatasetError(
                f"{root} has files but no meta/ folder, so it is no dataset; give an empty or new folder"
            )
        (root / "meta").mkdir(parents=True, exist_ok=True)
        lock = open(root / "meta/.writer.lock", "w")  # noqa: SIM115  held until close(); freed by the kernel on a kill
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return LeRobotWriter(root, spec, episodes_per_commit, file_mb, lock)
        except BlockingIOError:
            lock.close()
            raise DatasetError(f"another process is writing to {root}; wait for it or choose another folder") from None
        except BaseException:
            lock.close()
            raise

    # --------------------------------------------------------------------------------------------------- properties
    @property
    def num_episodes(self) -> int:
        """Committed episodes."""
        return self._num_episodes

    @property
    def num_frames(self) -> int:
        """Frames of the committed episodes."""
        return self._num_frames

    @property
    def num_pending(self) -> int:
        """Episodes added and not yet committed."""
        return len(self._pending)

    # ------------------------------------------------------------------------------------------------------ writing
    def add_episode(
        self,
        *,
        state: Tensor,
        action: Tensor,
        images: Mapping[str, Tensor],
        reward: Tensor,
        success: Tensor,
        instruction: str,
        truncated: bool = False,
        proposal: Tensor | None = None,
        source: Tensor | None = None,
        extra: Mapping[str, ExtraValue] | None = None,
    ) -> int:
        """Add one whole episode of T frames; returns its index.

        `state` [T, S] and `images[camera]` uint8 [T, h, w, 3] are what was seen before `action` [T, A];
        `reward` [T] and `success` bool [T] are what came of it. The last frame is done; `truncated` says that it ended
        by time and not by its task. `proposal` [T, A] and `source` int64 [T] (`vla_rl.core.Source`) are those of a
        labelled dataset: what the policy wanted, and whose action it is. `extra`: values of the episode (a seed), kept
        in the episode table; every episode of a dataset has the same keys. Raises ValueError for wrong shapes, missing
        cameras or numbers that are not finite, before anything is kept, and DatasetWriteError where the disk is full.
        """
        self._check(state, action, images, reward, success, instruction)
        labels = self._labels(state.shape[0], proposal, source)
        extra = dict(extra or {})
        self._check_extra(extra)
        t = state.shape[0]
        index = self._num_episodes + len(self._pending)
        start = self._num_frames + sum(p.row["length"] for p in self._pending)
        task_index = self._tasks.setdefault(instruction, len(self._tasks))
        done = np.arange(t) == t - 1
        numbers = {
            fmt.STATE: state.detach().cpu().numpy().astype(np.float32),
            fmt.ACTION: action.detach().cpu().numpy().astype(np.float32),
            fmt.REWARD: reward.detach().cpu().numpy().astype(np.float32),
            fmt.DONE: done,
            fmt.TRUNCATED: done & truncated,
            fmt.SUCCESS: success.cpu().numpy(),
            "timestamp": (np.arange(t) / self.spec.fps).astype(np.float32),
            "frame_index": np.arange(t),
            "episode_index": np.full(t, index),
            "index": np.arange(start, start + t),
            "task_index": np.full(t, task_index),
            **labels,
        }
        row = {
            "episode_index": index,
            "tasks": [instruction],
            "length": t,
            "dataset_from_index": start,
            "dataset_to_index": start + t,
            **{fmt.EXTRA + key: value for key, value in extra.items()},
        }
        self._pending.append(self._encode(row, numbers, images))
        if len(self._pending) >= self._episodes_per_commit:
            self.commit()
        return index

    def _encode(
        self, row: dict[str, Any], numbers: dict[str, np.ndarray], images: Mapping[str, Tensor]
    ) -> _PendingEpisode:
        pictures = {fmt.IMAGES + camera: images[camera] for camera in self.spec.cameras}
        as_video = self.spec.image_format == "mp4"
        return _PendingEpisode(
            row=row,
            frames=_frame_table(self._schema, numbers, {} if as_video else pictures),
            videos={key: encode_mp4(x, self.spec.fps) for key, x in pictures.items()} if as_video else {},
            numbers=numbers,
            image_stats={key: image_stats(x) for key, x in pictures.items()},
        )

    def commit(self) -> None:
        """Make all added episodes safe on disk. Raises DatasetWriteError where the disk refuses; then nothing that was
        committed is harmed, the episodes stay pending, and `commit()` can be called again once there is space."""
        if not self._pending:
            return
        try:
            self._commit()
            if self._num_frames >= _STATS_GROWTH * self._stats_frames:
                self._write_summary(exact=True)
            else:
                self._write_summary(exact=False)
        except OSError as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Commit what is pending, make the statistics exact, free the folder for other writers."""
        if self._lock.closed:
            return
        try:
            self.commit()
            if self._num_frames != self._stats_frames and self._num_episodes:
                self._write_summary(exact=True)
        except DatasetWriteError:
            raise
        except OSError as error:
            raise self._write_error(error) from error
        finally:
            self._lock.close()

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DatasetWriteError):
            self._lock.close()  # the disk is full: a second attempt would only hide the first error
            return
        self.close()

    def _commit(self) -> None:
        data_file, tables = self._data_file, self._data_tables
        if sum(table.nbytes for table in tables) >= self._file_mb * 2**20:
            data_file, tables = data_file + 1, []
        table_file, rows = self._table_file, self._table_rows
        if len(rows) >= _EPISODES_PER_TABLE:
            table_file, rows = table_file + 1, []
        if len(self._tasks) > self._tasks_on_disk:
            write_parquet(self.path / "meta/tasks.parquet", [tasks_table(self._tasks)])
            self._tasks_on_disk = len(self._tasks)
        for episode in self._pending:
            for key, data in episode.videos.items():
                number = fmt.file_numbers(episode.row["episode_index"])
                fmt.atomic_write(self.path / fmt.VIDEO_PATH.format(video_key=key, **number), data)
        tables = [*tables, *(p.frames for p in self._pending)]
        write_parquet(self.path / fmt.DATA_PATH.format(**fmt.file_numbers(data_file)), tables)
        rows = [*rows, *(self._table_row(p, data_file, table_file) for p in self._pending)]
        write_parquet(self.path / fmt.EPISODES_PATH.format(**fmt.file_numbers(table_file)), [pa.concat_tables(rows)])

        self._data_file, self._data_tables = data_file, tables
        self._table_file, self._table_rows = table_file, rows
        for episode in self._pending:
            self._num_episodes += 1
            self._num_frames += episode.row["length"]
            self.extras.append({k[len(fmt.EXTRA) :]: v for k, v in episode.row.items() if k.startswith(fmt.EXTRA)})
            for name, values in episode.numbers.items():
                self._numbers.setdefault(name, []).append(values)
            for key, stats in episode.image_stats.items():
                known = self._image_stats.get(key)
                self._image_stats[key] = stats if known is None else combine_stats([known, stats])
        self._pending = []

    def _table_row(self, episode: _PendingEpisode, data_file: int, table_file: int) -> pa.Table:
        row = dict(episode.row)
        for prefix, number in (("data/", data_file), ("meta/episodes/", table_file)):
            row |= {prefix + key: value for key, value in fmt.file_numbers(number).items()}
        for key in episode.videos:
            row |= {f"videos/{key}/{k}": v for k, v in fmt.file_numbers(row["episode_index"]).items()}
            row[f"videos/{key}/from_timestamp"] = 0.0
            row[f"videos/{key}/to_timestamp"] = row["length"] / self.spec.fps
        for feature, stats in {**_stats_of(episode.numbers), **episode.image_stats}.items():
            row |= {f"stats/{feature}/{name}": value.tolist() for name, value in stats.items()}
        return pa.Table.from_pylist([row])

    def _write_summary(self, *, exact: bool) -> None:
        if exact:
            numbers = {name: np.concatenate(parts) for name, parts in self._numbers.items()}
            stats = {**_stats_of(numbers), **self._image_stats}
            plain = {f: {name: value.tolist() for name, value in values.items()} for f, values in stats.items()}
            fmt.atomic_write_json(self.path / "meta/stats.json", plain)
            self._stats_frames = self._num_frames
        info = self.spec.info(self._num_episodes, self._num_frames, self._tasks_on_disk, self._file_mb)
        fmt.atomic_write_json(self.path / "meta/info.json", info)

    def _write_error(self, error: OSError) -> DatasetWriteError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return DatasetWriteError(
            error.errno,
            f"{'no space to write' if full else 'cannot write'} to {self.path} ({error.strerror}). "
            f"{self._num_episodes} episodes ({self._num_frames} frames) are committed and intact, {len(self._pending)} "
            "are not; free space and call commit(), or open the dataset again to go on",
        )

    # ----------------------------------------------------------------------------------------------------- checking
    def _check(
        self,
        state: Tensor,
        action: Tensor,
        images: Mapping[str, Tensor],
        reward: Tensor,
        success: Tensor,
        instruction: str,
    ) -> None:
        if self._lock.closed:
            raise ValueError("add_episode: the writer is closed; open the dataset again with LeRobotWriter.open")
        t = state.shape[0] if state.ndim else 0
        if t < 1:
            raise ValueError("add_episode: an episode needs at least one frame")
        expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
            "state": (state, (t, len(self.spec.state_names))),
            "action": (action, (t, len(self.spec.action_names))),
            "reward": (reward, (t,)),
            "success": (success, (t,)),
        }
        if set(images) != set(self.spec.cameras):
            raise ValueError(f"add_episode: expected images of {sorted(self.spec.cameras)}, got {sorted(images)}")
        for name, camera in self.spec.cameras.items():
            expected[f"images[{name!r}]"] = (images[name], (t, camera.height, camera.width, 3))
            if images[name].dtype != torch.uint8:
                raise ValueError(f"add_episode: images[{name!r}] must be uint8, got {images[name].dtype}")
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"add_episode: {name} must be {list(shape)}, got {list(tensor.shape)}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"add_episode: {name} has numbers that are not finite")
        if success.dtype != torch.bool:
            raise ValueError(f"add_episode: success must be bool, got {success.dtype}")
        if not instruction:
            raise ValueError("add_episode: the instruction is empty; a policy needs a sentence")

    def _labels(self, t: int, proposal: Tensor | None, source: Tensor | None) -> dict[str, np.ndarray]:
        if not self.spec.labelled:
            if proposal is not None or source is not None:
                raise ValueError("add_episode: proposal and source need a dataset with DatasetSpec(labelled=True)")
            return {}
        if proposal is None or source is None:
            raise ValueError("add_episode: this dataset is labelled; give proposal [T, A] and source [T]")
        shape = (t, len(self.spec.action_names))
        if tuple(proposal.shape) != shape or not bool(torch.isfinite(proposal).all()) or source.shape != (t,):
            raise ValueError(
                f"add_episode: expected a finite proposal {list(shape)} and source [{t}], got "
                f"{list(proposal.shape)} and {list(source.shape)}"
            )
        return {
            fmt.PROPOSAL: proposal.detach().cpu().numpy().astype(np.float32),
            fmt.SOURCE: source.cpu().numpy().astype(np.int64),
        }

    def _check_extra(self, extra: Mapping[str, ExtraValue]) -> None:
        types = {key: type(value) for key, value in extra.items()}
        if self._extra_types is None:
            wrong = {k: t.__name__ for k, t in types.items() if t not in (int, float, str, bool)}
            if wrong:
                raise ValueError(f"add_episode: extra values must be int, float, str or bool, got {wrong}")
            self._extra_types = types
        elif types != self._extra_types:
            raise ValueError(
                f"add_episode: extra must have {_names(self._extra_types)} as the episodes before, got {_names(types)}"
            )


def _names(types: Mapping[str, type]) -> dict[str, str]:
    return {key: value.__name__ for key, value in types.items()}


def _stats_of(numbers: Mapping[str, np.ndarray]) -> dict[str, FeatureStats]:
    """Statistics of all numeric columns in one pass: `numbers[name]` is [T] or [T, D]."""
    wide = [values.reshape(len(values), -1).astype(np.float64) for values in numbers.values()]
    stats = vector_stats(np.concatenate(wide, axis=1))
    edges = np.cumsum([0, *(w.shape[1] for w in wide)])
    return {
        name: {s: value if s == "count" else value[low:high] for s, value in stats.items()}
        for name, low, high in zip(numbers, edges[:-1], edges[1:], strict=True)
    }


def _frame_table(schema: pa.Schema, numbers: Mapping[str, np.ndarray], pictures: Mapping[str, Tensor]) -> pa.Table:
    columns = []
    for field in schema:
        if field.name in pictures:
            files = pa.array(encode_png(pictures[field.name]), pa.binary())
            columns.append(pa.StructArray.from_arrays([files, pa.nulls(len(files), pa.string())], ["bytes", "path"]))
        elif field.name in fmt.VECTORS:
            flat = pa.array(numbers[field.name].reshape(-1), pa.float32())
            columns.append(pa.FixedSizeListArray.from_arrays(flat, numbers[field.name].shape[1]))
        else:
            columns.append(pa.array(numbers[field.name], field.type))
    return pa.Table.from_arrays(columns, schema=schema)
