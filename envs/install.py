"""Virtual environments for simulators whose pins cannot live in the main one: `vla-rl env install NAME`.

They lie in `$VLA_RL_ENVS` (default: `~/.cache/vla-rl/envs`), a folder each. What is installed is written in
`installed.json` when all of it is there, so that a half-made one is noticed and made again.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SIMULATORS = ("robosuite", "libero", "metaworld", "maniskill")
_DONE = "installed.json"


def environments_folder() -> Path:
    """Where the simulators' environments lie."""
    given = os.environ.get("VLA_RL_ENVS")
    return Path(given).absolute() if given else Path.home() / ".cache" / "vla-rl" / "envs"


def requirements(name: str) -> tuple[tuple[str, ...], ...]:
    """Arguments of each `pip install` that makes the environment of simulator `name`."""
    if name not in SIMULATORS:
        raise ValueError(f"there is no simulator {name!r}; there are {', '.join(SIMULATORS)}")
    return importlib.import_module(f"vla_rl.envs.{name}").REQUIREMENTS


def is_installed(name: str) -> bool:
    """True where the environment was made with the present requirements."""
    try:
        made = json.loads((environments_folder() / name / _DONE).read_text())
    except (OSError, ValueError):
        return False
    return made == [list(step) for step in requirements(name)]


def simulator_python(name: str) -> Path:
    """The interpreter of simulator `name`. Raises FileNotFoundError, with the command that makes it."""
    if not is_installed(name):
        raise FileNotFoundError(
            f"{name} has no environment in {environments_folder()}, or an old one; make it with: "
            f"vla-rl env install {name}"
        )
    return environments_folder() / name / "bin" / "python"


def install(name: str) -> Path:
    """Make the environment of simulator `name` where it is not there; returns its folder.

    Raises RuntimeError where a step fails; what pip said is on the terminal.
    """
    folder, steps = environments_folder() / name, requirements(name)
    if is_installed(name):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    commands += [[str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *s] for s in steps]
    for command in commands:
        print("+ " + " ".join(command), file=sys.stderr, flush=True)
        if subprocess.run(command, env=environment).returncode:
            raise RuntimeError(f"{name}: {' '.join(command)} failed; see above, mend it and call again")
    (folder / _DONE).write_text(json.dumps([list(step) for step in steps]))
    return folder
