"""Arrays of an orbax checkpoint through tensorstore alone: neither jax nor orbax is needed to read or write them."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.tensors import names_in

_INDEXED = re.compile(r"(.*)\[([\d,]+)\]")


def params_folder(folder: Path) -> Path | None:
    """Where the arrays of a step lie: `folder/params`, or `folder` itself; None where there are none."""
    found = [place for place in (folder / "params", folder) if (place / "_METADATA").is_file()]
    return found[0] if found else None


class OrbaxSource:
    """Names are the tree's, joined by dots, without the "params" before and the "value" after that some writers put.

    `stacked`: names of arrays over layers, and how many of their first dimensions are indices; the tensors of such an
    array are "name[3]" or "name[3,0]". One array at a time is in memory.
    Raises PolicyCheckpointError for a folder without arrays, ModuleNotFoundError without tensorstore.
    """

    def __init__(self, path: Path, stacked: Mapping[str, int]) -> None:
        self.path = path
        self._store = _library()
        self._arrays = self._open_all(path)
        self._stacked = {name: rank for name, rank in stacked.items() if name in self._arrays}
        self._last: tuple[str, Tensor] | None = None

    @property
    def names(self) -> set[str]:
        """Of the whole arrays."""
        return set(self._arrays)

    def keys(self) -> list[str]:
        names: list[str] = []
        for name, array in self._arrays.items():
            lengths = array.shape[: self._stacked.get(name, 0)]
            indices = itertools.product(*(range(n) for n in lengths))
            names += [f"{name}[{','.join(map(str, i))}]" if lengths else name for i in indices]
        return names

    def shape(self, key: str) -> tuple[int, ...]:
        name, index = _split(key)
        return self.array_shape(name)[len(index) :]

    def array_shape(self, name: str) -> tuple[int, ...]:
        """Of the whole array. Raises PolicyCheckpointError where there is none."""
        if name not in self._arrays:
            raise PolicyCheckpointError(f"{self.path} has no array {name}; it has {sorted(self._arrays)[:20]}")
        return tuple(self._arrays[name].shape)

    def dtype(self, key: str) -> str:
        return self._arrays[_split(key)[0]].dtype.name

    def view(self, key: str) -> Tensor:
        name, index = _split(key)
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is read
            try:
                self._last = name, _to_torch(self._arrays[name].read().result())
            except ValueError as error:
                raise PolicyCheckpointError(f"{self.path}: {name} cannot be read ({error}); copy it again") from error
        return self._last[1][index]

    def _open_all(self, path: Path) -> dict[str, Any]:
        store = _kvstore(path)
        try:
            files = [key.decode() for key in self._store.KvStore.open(store).result().list().result()]
            found = {}
            for file in files:
                for driver, end in (("zarr", "/.zarray"), ("zarr3", "/zarr.json")):
                    if file.endswith(end):
                        place = {**store, "path": f"{store.get('path', '')}{file.removesuffix(end)}/"}
                        spec = {"driver": driver, "kvstore": place}
                        found[_plain(file.removesuffix(end))] = self._store.open(spec, read=True)
            arrays = {name: future.result() for name, future in found.items()}
        except ValueError as error:
            raise PolicyCheckpointError(
                f"{path} is not a complete orbax checkpoint ({error}); copy it again"
            ) from error
        if not arrays:
            raise PolicyCheckpointError(f"{path} has no arrays; it holds {names_in(path)}")
        return arrays


def write_orbax(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Write `arrays`, whose names are joined by dots, as the tree {"params": ...} of one checkpoint (OCDBT, zarr)."""
    store = _library()
    path.mkdir(parents=True, exist_ok=True)
    for name, tensor in arrays.items():
        array = _to_numpy(tensor)
        kvstore = {"driver": "ocdbt", "base": f"file://{path.resolve()}/", "path": f"params.{name}/"}
        chunks = [max(1, n) for n in array.shape]
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": {"chunks": chunks, "shape": array.shape}}
        opened = store.open(spec, create=True, delete_existing=True, dtype=array.dtype, shape=array.shape).result()
        opened.write(array).result()
    tree = {
        str(("params", *name.split("."))): {
            "key_metadata": [{"key": key, "key_type": 2} for key in ("params", *name.split("."))],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in arrays
    }
    metadata = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False, "custom_metadata": None}
    (path / "_METADATA").write_text(json.dumps(metadata), encoding="utf-8")


def _library() -> Any:
    try:
        return importlib.import_module("tensorstore")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a JAX checkpoint needs tensorstore: pip install 'vla-rl[vla]'") from error


def _kvstore(path: Path) -> dict[str, Any]:
    if (path / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": f"file://{path.resolve()}/"}
    return {"driver": "file", "path": f"{path.resolve()}/"}


def _plain(name: str) -> str:
    return name.removeprefix("params.").removesuffix(".value")


def _split(key: str) -> tuple[str, tuple[int, ...]]:
    match = _INDEXED.fullmatch(key)
    return (match[1], tuple(int(i) for i in match[2].split(","))) if match else (key, ())


def _to_torch(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":  # numpy has no such dtype: the same bits by way of integers
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(importlib.import_module("ml_dtypes").bfloat16)
    return tensor.numpy()


__all__ = ["OrbaxSource", "params_folder", "write_orbax"]
