"""Go on with a dataset whose writer was stopped, maybe killed: find what is committed, remove what is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vla_rl.data import lerobot_format as fmt
from vla_rl.data.lerobot_format import DatasetError, DatasetSpec
from vla_rl.data.lerobot_stats import STAT_NAMES, FeatureStats, combine_stats
from vla_rl.data.lerobot_tables import numbered_files, open_parquet, read_rows, read_tasks, write_parquet


@dataclass
class Recovered:
    """What a writer needs to go on. `data_tables`, `table_rows`: contents of the two files that may still grow."""

    tasks: dict[str, int] = field(default_factory=dict)
    num_episodes: int = 0
    num_frames: int = 0
    data_file: int = 0
    data_tables: list[pa.Table] = field(default_factory=list)
    table_file: int = 0
    table_rows: list[pa.Table] = field(default_factory=list)
    numbers: dict[str, list[np.ndarray]] = field(default_factory=dict)
    image_stats: dict[str, FeatureStats] = field(default_factory=dict)
    extras: list[dict[str, Any]] = field(default_factory=list)
    extra_types: dict[str, type] | None = None


def recover(path: Path, spec: DatasetSpec) -> Recovered:
    """The committed state of the dataset at `path`; rows that no committed episode names are removed.
    A video file of such an episode is overwritten by the one that takes its number.

    Raises DatasetError where the dataset has other features than `spec` or is damaged.
    """
    _check_same_kind(path, spec)
    for pattern in ("meta/.*.part", "meta/episodes/*/.*.part", "data/*/.*.part", "videos/*/*/.*.part"):
        for part in path.glob(pattern):
            part.unlink()
    out = Recovered()
    if (path / "meta/tasks.parquet").exists():
        out.tasks = read_tasks(path / "meta/tasks.parquet")
    tables = numbered_files(path / "meta/episodes")
    if tables:
        _read_episode_table(path, tables, out)
    _drop_uncommitted_rows(path, out)
    for file in numbered_files(path / "data")[: out.data_file + 1 if out.num_episodes else 0]:
        columns = [name for name in spec.data_schema().names if not name.startswith(fmt.IMAGES)]
        table = read_rows(file, open_parquet(file), None, columns)
        for name in columns:
            values = fmt.matrix(table, name)
            out.numbers.setdefault(name, []).append(values if name in fmt.VECTORS else values[:, 0])
    return out


def _check_same_kind(path: Path, spec: DatasetSpec) -> None:
    info = fmt.read_json(path / "meta/info.json")
    expected = spec.info(0, 0, 0, 0.0)
    for key in ("codebase_version", "fps", "robot_type", "data_path", "video_path"):
        if info.get(key) != expected[key]:
            raise DatasetError(
                f"the dataset at {path} has {key} {info.get(key)!r}, this run has {expected[key]!r}; "
                "write to another folder, or delete that one"
            )
    there, here = info.get("features", {}), expected["features"]
    different = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if different:
        raise DatasetError(
            f"the dataset at {path} has other features than this run: {', '.join(different)} "
            f"(there {[there.get(name) for name in different]}, here {[here.get(name) for name in different]}); "
            "write to another folder, or delete that one"
        )


def _read_episode_table(path: Path, files: list[Path], out: Recovered) -> None:
    tables = [read_rows(file, open_parquet(file), None) for file in files]
    table = pa.concat_tables(tables)
    indices = table.column("episode_index").to_pylist()
    if indices != list(range(len(indices))):
        raise DatasetError(f"the episode table of {path} is not 0, 1, 2, ... in order; it cannot be continued")
    last = table.slice(len(indices) - 1).to_pylist()[0]
    out.num_episodes, out.num_frames = len(indices), int(last["dataset_to_index"])
    out.data_file = last["data/chunk_index"] * fmt.CHUNK_SIZE + last["data/file_index"]
    out.table_file = len(files) - 1
    out.table_rows = [tables[-1].slice(i, 1) for i in range(tables[-1].num_rows)]
    names = [name for name in table.column_names if name.startswith(fmt.EXTRA)]
    extras = table.select(names).to_pylist() if names else [{} for _ in indices]
    out.extras = [{key[len(fmt.EXTRA) :]: value for key, value in row.items()} for row in extras]
    out.extra_types = {key: type(value) for key, value in out.extras[0].items()}
    for feature in {n.split("/")[1] for n in table.column_names if n.startswith("stats/" + fmt.IMAGES)}:
        rows = table.select([f"stats/{feature}/{name}" for name in STAT_NAMES]).to_pylist()
        parts = [{name: np.asarray(row[f"stats/{feature}/{name}"]) for name in STAT_NAMES} for row in rows]
        out.image_stats[feature] = combine_stats(parts)


def _drop_uncommitted_rows(path: Path, out: Recovered) -> None:
    """A kill between the data file and the episode table leaves rows, or a whole file, that no episode names."""
    files = numbered_files(path / "data")
    committed = out.data_file + 1 if out.num_episodes else 0
    for file in files[committed:]:
        file.unlink()
    if not committed:
        return
    if len(files) < committed:
        raise DatasetError(f"{path} has {len(files)} data files, its episodes need {committed}; it was copied in part")
    file = open_parquet(files[out.data_file])
    groups = [read_rows(files[out.data_file], file, [i]) for i in range(file.num_row_groups)]
    out.data_tables = [g for g in groups if g.column("episode_index")[0].as_py() < out.num_episodes]
    if len(out.data_tables) < len(groups):
        write_parquet(files[out.data_file], out.data_tables)
