"""Builds the wheel, installs it apart from the checkout and imports every module of it from there.

What an editable install cannot show: a sub-package that is missing from `packages` in pyproject.toml is silently
dropped from the wheel, and so is package data without a pattern.
Usage: check_wheel.py (with the Python of `.venv`; no network)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

_NOT_SOURCE = (".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")

# Runs in the isolated environment: imports what it is told, and says where that came from.
_IMPORT_ALL = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in json.loads(sys.argv[1])}))
"""


def build_wheel(root: Path, work: Path) -> Path:
    """The wheel, built from a copy in `work`: a `build` folder in the checkout would bring stale modules into it."""
    source = work / "source"
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(*_NOT_SOURCE))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(source)], check=True)
    (wheel,) = work.glob("*.whl")
    return wheel


def modules_of(wheel: Path) -> list[str]:
    """Dotted names of the modules in a wheel, without `__main__` ones and those that a simulator's own Python runs."""
    with zipfile.ZipFile(wheel) as archive:
        files = [Path(name) for name in archive.namelist() if name.endswith(".py")]
    names = [".".join(file.parent.parts if file.stem == "__init__" else file.with_suffix("").parts) for file in files]
    return sorted(name for name in names if not name.endswith(("__main__", "_host")))


def install_apart(wheel: Path, work: Path) -> Path:
    """Installs the wheel into a virtual environment of its own and returns its Python.

    The dependencies come from the environment that runs this, by a path line: its `.pth` files, among them that of the
    editable install, are then not read, so nothing of the checkout can be imported.
    """
    venv = work / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = venv / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def import_all(python: Path, modules: list[str], work: Path) -> dict[str, str]:
    """Imports the modules in a fresh process away from the checkout; returns the file of each."""
    command = [str(python), "-I", "-c", _IMPORT_ALL, json.dumps(modules)]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="vla_rl_wheel_") as folder:
        work = Path(folder).resolve()
        try:
            wheel = build_wheel(root, work)
            modules = modules_of(wheel)
            python = install_apart(wheel, work)
            files = import_all(python, modules, work)
            subprocess.run([str(python.parent / "vla-rl"), "--help"], cwd=work, stdout=subprocess.DEVNULL, check=True)
        except subprocess.CalledProcessError as error:
            print(f"the wheel check failed in: {' '.join(map(str, error.cmd))[:200]}", file=sys.stderr)
            return 1
        strangers = {name: file for name, file in files.items() if not file.startswith(str(work))}
        if strangers or not files:
            print(f"imported from elsewhere than the wheel: {strangers or 'nothing was imported'}", file=sys.stderr)
            return 1
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KB, {len(files)} modules imported, vla-rl starts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
