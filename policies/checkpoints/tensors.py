"""Tensors of public checkpoints, read straight into a policy: no random initialisation, no second copy in memory.

A layout says for each of our keys where its values lie (`Recipe`). `load_into` first compares names and shapes, without
reading a value, and only then reads tensor by tensor into the dtype and device that the policy will have.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vla_rl.policies.blocks.transformer import RMSNorm
from vla_rl.policies.checkpoints.native import PolicyCheckpointError

NUM_SHOWN = 20
M = TypeVar("M", bound=nn.Module)


class ReadsTensors(Protocol):
    """Named tensors that are read when they are asked for."""

    path: Path

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def view(self, key: str) -> Tensor:
        """As it is in the file, on the CPU; it may be memory-mapped: copy what is to stay, and let go of it soon."""
        ...


class TensorSource:
    """The tensors of one safetensors file, or of all files that a `*.safetensors.index.json` names.

    Only names, shapes and dtypes are read at once. Raises PolicyCheckpointError for a file that is missing, truncated
    or not of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: dict[str, Path] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        for file in _shards(path) if path.name.endswith(".index.json") else (path,):
            self._scan(file)

    @staticmethod
    def of_folder(folder: Path, stem: str = "model") -> TensorSource:
        """Of `model.safetensors`, or of its shards. Raises PolicyCheckpointError where there is neither."""
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (folder / name).is_file():
                return TensorSource(folder / name)
        raise PolicyCheckpointError(
            f"{folder} has neither {stem}.safetensors nor {stem}.safetensors.index.json; it holds {names_in(folder)}"
        )

    def keys(self) -> list[str]:
        return list(self._file)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shape[key]

    def dtype(self, key: str) -> str:
        """As safetensors spells it: "F32", "BF16", ..."""
        return self._dtype[key]

    def view(self, key: str) -> Tensor:
        # A map of its own for each tensor: pages of a map that stays would count as memory of this process.
        with _open(self._file[key]) as file:
            return file.get_tensor(key)

    def get(self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A copy of its own."""
        view = self.view(key)
        return _copy(view, dtype or view.dtype, device)

    def _scan(self, path: Path) -> None:
        with _open(path) as file:
            self.metadata |= file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                entry = file.get_slice(key)
                self._file[key] = path
                self._shape[key], self._dtype[key] = tuple(entry.get_shape()), entry.get_dtype()


@dataclass(frozen=True)
class Recipe:
    """Where one of our tensors comes from: `combine` of the tensors `sources`; None: the only one, as it is.

    `combine` is also called with tensors on the meta device, to learn the shape that it will have.
    """

    sources: tuple[str, ...]
    combine: Callable[..., Tensor] | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.combine(*tensors) if self.combine is not None else tensors[0]


def on_meta(build: Callable[[], M]) -> M:
    """The module that `build` makes, with shapes and without values."""
    with torch.device("meta"):
        return build()


def load_into(
    module: M,
    source: ReadsTensors,
    recipes: Mapping[str, Recipe | str],
    *,
    given: Mapping[str, Tensor] | None = None,
    unused: Iterable[str] = (),
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> M:
    """Give `module`, built by `on_meta`, its values: `recipes` and `given` together name each key of its state.

    `recipes`: our key -> a recipe, or the name of a source tensor. `given`: values that lie elsewhere (normalisers,
    the tokenizer's file). `unused`: regular expressions of whole source keys that are shipped and not needed.
    Parameters get `dtype` (None: each as it is stored), but for RMS norms and what embeds patches, which are float32 as
    `float32_keys` says; buffers keep the dtype that they were built with.

    Raises PolicyCheckpointError that lists source tensors that are missing, unknown or of another shape.
    """
    plan = {key: Recipe((r,)) if isinstance(r, str) else r for key, r in recipes.items()}
    given = given or {}
    state = module.state_dict()
    _check(state, plan, given, source, tuple(unused), type(module).__name__)
    kept = float32_keys(module)
    buffers = {key for key in state if key in dict(module.named_buffers())}
    values: dict[str, Tensor] = {}
    for key in sorted(
        state, key=lambda k: () if k in given else plan[k].sources
    ):  # what lies together is read together
        expected = state[key]
        value = given[key] if key in given else plan[key](*(source.view(name) for name in plan[key].sources))
        wanted = expected.dtype if key in buffers else torch.float32 if key in kept else dtype or value.dtype
        values[key] = _copy(value, wanted, device)
        del value
    return give_values(module, values)


def give_values(module: M, values: Mapping[str, Tensor]) -> M:
    """Put `values`, all of its state, in the place of those on the meta device; they are not copied."""
    module.load_state_dict(values, strict=True, assign=True)
    left = [name for name, x in (*module.named_parameters(), *module.named_buffers()) if x.is_meta]
    if left:
        raise TypeError(
            f"{type(module).__name__} has tensors that are not part of its state, so have no values: {left}"
        )
    return module


def planned_shape(recipe: Recipe, source: ReadsTensors) -> tuple[int, ...] | str:
    """Shape that `recipe` would give, or a sentence on why it cannot."""
    shapes = [source.shape(name) for name in recipe.sources]
    try:
        return tuple(recipe(*(torch.empty(shape, device="meta") for shape in shapes)).shape)
    except (RuntimeError, IndexError, ValueError):  # a recipe turns and slices: what it cannot has other dimensions
        return f"{shapes[0] if len(shapes) == 1 else shapes}, which has other dimensions"


def float32_keys(module: nn.Module) -> set[str]:
    """Parameters that stay in float32 whatever the policy's dtype: scales of RMS norms, patch and position embedding.

    LayerNorm is not among them: its kernels compute in float32 and want weights of their input's dtype.
    """
    norms = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, RMSNorm)}
    embeddings = re.compile(r"(.*\.)?(patch_embedding\.(weight|bias)|position_embedding)")
    return norms | {name for name, _ in module.named_parameters() if embeddings.fullmatch(name)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, replaced atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def names_in(folder: Path) -> str:
    """What lies in a folder, for a message."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir()) if folder.is_dir() else []
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more if names else "nothing"


def read_json(path: Path) -> dict[str, Any]:
    """Raises PolicyCheckpointError where there is no such file, or no JSON object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PolicyCheckpointError(f"{path} is missing; the folder holds {names_in(path.parent)}") from error
    except ValueError as error:
        raise PolicyCheckpointError(f"{path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise PolicyCheckpointError(f"{path} holds no JSON object; copy it again")
    return values


# ------------------------------------------------------------------------------------------------------------ details
def _check(
    state: Mapping[str, Tensor],
    plan: Mapping[str, Recipe],
    given: Mapping[str, Tensor],
    source: ReadsTensors,
    unused: tuple[str, ...],
    name: str,
) -> None:
    present = set(source.keys())
    problems: list[str] = []
    used: set[str] = set()
    for key, expected in state.items():
        if key in given:
            shape = tuple(given[key].shape)
        elif key not in plan:
            problems.append(f"missing {key} {tuple(expected.shape)}: the layout does not name it")
            continue
        else:
            used |= set(plan[key].sources)
            absent = [s for s in plan[key].sources if s not in present]
            problems += [f"missing {s} (for {key} {tuple(expected.shape)})" for s in absent]
            if absent:
                continue
            shape = planned_shape(plan[key], source)
        if shape != tuple(expected.shape):
            whence = "" if key in given else f" (from {', '.join(plan[key].sources)})"
            problems.append(f"{key}{whence} has shape {shape}, expected {tuple(expected.shape)}")
    skipped = [re.compile(pattern) for pattern in unused]
    problems += [
        f"unknown {key} {source.shape(key)}"
        for key in sorted(present - used)
        if not any(pattern.fullmatch(key) for pattern in skipped)
    ]
    if problems:
        more = f"\n  and {len(problems) - NUM_SHOWN} more" if len(problems) > NUM_SHOWN else ""
        raise PolicyCheckpointError(
            f"{source.path} does not fit {name}:\n  " + "\n  ".join(problems[:NUM_SHOWN]) + more
        )


def _copy(view: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.empty(view.shape, dtype=dtype, device=device).copy_(view)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise PolicyCheckpointError(f"{path} is missing; the folder holds {names_in(path.parent)}") from error
    except (SafetensorError, OSError) as error:
        raise PolicyCheckpointError(
            f"{path} is truncated or no safetensors file ({error}); it has {path.stat().st_size} bytes: compare that "
            "with the original and copy it again (a file of a few hundred bytes is a Git LFS pointer)"
        ) from error


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PolicyCheckpointError(f"{index} has no weight_map; copy it again")
    files = sorted({index.parent / str(name) for name in weight_map.values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise PolicyCheckpointError(f"{index} names {len(files)} files, of which are missing: {', '.join(missing)}")
    return files


__all__ = [
    "ReadsTensors",
    "Recipe",
    "TensorSource",
    "float32_keys",
    "give_values",
    "load_into",
    "names_in",
    "on_meta",
    "planned_shape",
    "read_json",
    "write_tensors",
]
