"""The folder of a run: what was run, with what, from which source, so that it can be repeated.

`config.json` (resolved), `provenance.json` (command, versions, git revision, hardware), `source.diff` (what was not
committed), and beside them what the stages write.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from vla_rl.cpu import available_cores
from vla_rl.data.lerobot_format import atomic_write, atomic_write_json
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.rollout import ray_config
from vla_rl.train import loop, offpolicy, sft

CONFIG_FILE, PROVENANCE_FILE, DIFF_FILE = "config.json", "provenance.json", "source.diff"
_PACKAGES = (
    "vla-rl",
    "torch",
    "numpy",
    "mujoco",
    "mujoco-warp",
    "jax",
    "flax",
    "optax",
    "gymnasium",
    "pyarrow",
    "safetensors",
)
ConfigT = TypeVar("ConfigT")
_LOCK_FILE = ".lock"
_LOCKS: dict[int, IO[str]] = {}  # inode -> file, for as long as this process lives
MAY_CHANGE = (
    *(f"train.{name}" for name in loop.MAY_CHANGE),
    *(f"train.{stage}.{name}" for stage in ("cloning", "offline", "online") for name in offpolicy.MAY_CHANGE),
    *(f"sft.{name}" for name in sft.MAY_CHANGE),
    *(f"rollout.{name}" for name in ray_config.MAY_CHANGE),
    "torch_threads",
    "device",
)


class RunFolderError(ValueError):
    """A run folder holds another run, or none."""


def open_run_folder(
    path: str | Path, config: Any, *, resume: bool, kind: str, inputs: Mapping[str, Any] | None = None
) -> Path:
    """Make the folder of a new run, or open that of one to go on with; this process then holds its lock.

    `kind`: the command. `inputs`: folders that the run starts from. `MAY_CHANGE` of a config may differ on a resume.
    Raises RunFolderError where a run is there and `resume` is not set, where another kind of run, config or input is,
    and where another process works in the folder.
    """
    path = Path(path)
    hold_run_folder(path)
    origin = {"kind": kind, "inputs": {name: str(Path(p).resolve()) for name, p in (inputs or {}).items() if p}}
    if (path / CONFIG_FILE).exists() and _has_begun(path):
        stored = {"kind": kind} | _read_json(path / PROVENANCE_FILE)
        if stored["kind"] != kind:
            raise RunFolderError(f"{path} holds a run of `vla-rl {stored['kind']}`; choose another --run-dir")
        if not resume:
            raise RunFolderError(
                f"{path} holds a run already; add --resume to go on with it, or choose another --run-dir"
            )
        changed = _changes("", _read_json(path / CONFIG_FILE), config_to_dict(config))
        changed += _changes("inputs", stored.get("inputs"), origin["inputs"])
        if changed:
            raise RunFolderError(
                f"{path} holds a run with another configuration: {'; '.join(changed[:8])}. "
                "Go on with its own, or choose another --run-dir"
            )
        atomic_write_json(path / CONFIG_FILE, config_to_dict(config))
        return path
    write_provenance(path, origin)
    atomic_write_json(path / CONFIG_FILE, config_to_dict(config))
    return path


def write_provenance(path: Path, origin: Mapping[str, Any] | None = None) -> None:
    """Write `provenance.json`, with `origin` in it, and `source.diff` into the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    revision = describe_source()
    atomic_write(path / DIFF_FILE, revision.pop("diff").encode())
    provenance = {"command": shlex.join(["vla-rl", *sys.argv[1:]]), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    atomic_write_json(path / PROVENANCE_FILE, provenance | dict(origin or {}) | revision | describe_machine())


def read_config(path: str | Path, config_class: type[ConfigT]) -> ConfigT:
    """The config of the run in `path`. Raises RunFolderError where there is none or it cannot be read."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise RunFolderError(f"{path} holds no {CONFIG_FILE}; expected the folder of a run")
    try:
        return config_from_dict(config_class, _read_json(file), where="config")
    except ValueError as error:
        raise RunFolderError(f"{file}: {error}") from error


def describe_source() -> dict[str, str]:
    """Git revision of the source tree, whether it was changed, and the difference; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout if done.returncode == 0 else ""

    if git("rev-parse", "--show-toplevel").strip() != str(root):
        return {"revision": "", "diff": ""}
    diff = git("diff", "HEAD")
    untracked = [
        name for name in git("ls-files", "--others", "--exclude-standard").splitlines() if name.endswith(".py")
    ]
    diff += "".join(f"# not in the repository: {name}\n" for name in untracked)
    return {"revision": git("rev-parse", "HEAD").strip() + ("+changes" if diff else ""), "diff": diff}


def describe_machine() -> dict[str, Any]:
    """Versions and hardware."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": available_cores(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _has_begun(path: Path) -> bool:
    """Whether a stage left anything: a call that failed before it did is nothing to go on with."""
    return any(entry.name not in (CONFIG_FILE, PROVENANCE_FILE, DIFF_FILE, _LOCK_FILE) for entry in path.iterdir())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} cannot be read ({error}); choose another --run-dir") from error


def hold_run_folder(path: Path) -> None:
    """Lock the folder until this process ends, making it where it is not there: two processes in one would write into
    each other's files. Raises RunFolderError where another has it."""
    path.mkdir(parents=True, exist_ok=True)
    file = (path / _LOCK_FILE).open("a")
    held = _LOCKS.get(os.fstat(file.fileno()).st_ino)
    if held is not None:
        file.close()
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise RunFolderError(
            f"another process works in {path}; wait for it, stop it, or choose another --run-dir"
        ) from error
    _LOCKS[os.fstat(file.fileno()).st_ino] = file


def _changes(where: str, stored: Any, here: Any) -> list[str]:
    if isinstance(stored, dict) and isinstance(here, dict):
        names = list(dict.fromkeys([*stored, *here]))
        return [c for n in names for c in _changes(f"{where}.{n}".lstrip("."), stored.get(n), here.get(n))]
    if where in MAY_CHANGE:
        return []
    return [] if stored == here else [f"{where} was {stored!r} and is {here!r}"]
