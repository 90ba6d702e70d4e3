"""State files: everything that a run needs to go on, written so that a kill at any moment leaves a whole one.

They are torch files, read with the restricted unpickler, which builds tensors and plain containers and calls nothing.
Policies are kept apart, as safetensors (`vla_rl.policies.checkpoints`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict


class CheckpointError(ValueError):
    """A state file cannot be read, or belongs to another run."""


def require_same_config(stored: Mapping[str, Any], config: Any, may_change: Collection[str], where: Path) -> None:
    """Raise CheckpointError where the run of the state file `where` had another `config`, but for `may_change`."""
    changed = {name: pair for name, pair in changed_options(stored, config).items() if name not in may_change}
    if changed:
        changes = ", ".join(f"{name}: {before} -> {now}" for name, (before, now) in changed.items())
        raise CheckpointError(f"{where}: the stored run has another configuration ({changes}); resume with its own")


def changed_options(stored: Mapping[str, Any], config: Any) -> dict[str, tuple[Any, Any]]:
    """The fields of `config` that `stored`, JSON values, has otherwise: before and now. An option that did not exist
    when it was stored had its default."""
    try:
        before = config_to_dict(config_from_dict(type(config), stored))
    except ValueError:  # of another class, or with options that went
        before = dict(stored)
    now = config_to_dict(config)
    return {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Replace `path` atomically by `state`: nested dicts and lists of tensors and plain values.

    Raises OSError (a full disk) with the former file untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: str | Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU. Raises CheckpointError for a file that is damaged or holds anything else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such state file; start this run without resuming")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a file cut short
        raise CheckpointError(f"{path}: cannot be read ({error}); delete it to start this stage again") from error
