"""The parquet tables of a LeRobot dataset's meta/ folder, and reading and writing parquet with clear errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vla_rl.data.lerobot_format import DatasetError, atomic_write


def write_parquet(path: Path, tables: Sequence[pa.Table]) -> None:
    """Write `tables` of one schema atomically, each as one row group (so an episode of frames is read alone)."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, tables[0].schema, compression="snappy", use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    atomic_write(path, sink.getvalue().to_pybytes())


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises DatasetError where the file is missing or no whole parquet file."""
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing; the dataset was copied in part, or a file was deleted") from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is damaged or truncated ({error}); copy it again from its source") from None


def read_rows(
    path: Path, file: pq.ParquetFile, groups: Sequence[int] | None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Row groups `groups` (None: all) of an open file. Raises DatasetError where a column is missing or damaged."""
    missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
    if missing:
        raise DatasetError(f"{path} has no column {missing}; it has {file.schema_arrow.names}")
    wanted = None if columns is None else list(columns)
    try:
        return file.read(wanted) if groups is None else file.read_row_groups(list(groups), wanted)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}); copy it again from its source") from None


def numbered_files(folder: Path) -> list[Path]:
    """`chunk-XXX/file-XXX.parquet` below `folder`, in order."""
    return sorted(folder.glob("chunk-*/file-*.parquet"))


def tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """meta/tasks.parquet: `task_index` by sentence. The metadata makes the sentence the index of a pandas frame."""
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks.keys(), pa.string())})
    column = {"field_name": "task_index", "name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    index = {"field_name": "task", "name": "task", "pandas_type": "unicode", "numpy_type": "object"}
    names = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [names],
        "columns": [column | {"metadata": None}, index | {"metadata": None}],
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def read_tasks(path: Path) -> dict[str, int]:
    """Sentence to task index of a v3.0 meta/tasks.parquet, however the sentence column is called."""
    table = read_rows(path, open_parquet(path), None)
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise DatasetError(f"{path} needs the columns task and task_index, it has {table.column_names}")
    return dict(zip(table.column(names[0]).to_pylist(), table.column("task_index").to_pylist(), strict=True))
