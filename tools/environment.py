"""Makes `.venv` ready for a level of use: `demo` (what the main job needs) or `dev` (that and the test tools).

Run by `tools/setup.sh`, with the standard library alone. Called when nothing is to be done, it takes a fraction of a
second and no network. What it finds broken (an interrupted set-up, a moved checkout, a vanished or changed Python), it
makes anew: a virtual environment holds nothing that cannot be installed again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LEVELS = ("demo", "dev")  # each holds what stands before it
_EXTRAS = {"demo": "", "dev": "[dev]"}

# Installed before the project: pip then resolves the rest around this torch. The build backend is there too, so that
# the editable install needs no isolated build, which would ask the network again.
_FIRST = (os.environ.get("TORCH") or "torch==2.13.0", "setuptools>=77")

# What rendering without a display loads, and the Debian package that has it.
_RENDERING_LIBRARIES = {
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libOSMesa.so.8": "libosmesa6",
    "libGLESv2.so.2": "libgles2",
}
_NEEDED_BY_BACK_END = {"egl": ("libEGL.so.1", "libGL.so.1"), "osmesa": ("libOSMesa.so.8", "libGL.so.1")}


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Project:
    """A checkout, and what is installed before it."""

    root: Path
    first: tuple[str, ...] = _FIRST

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """Written when everything is installed: for which level, place, Python and requirements."""
        return self.venv / ".ready.json"

    @property
    def unfinished(self) -> Path:
        """There from the first to the last step of an installation; found by the next run, it was interrupted."""
        return self.venv / ".unfinished"

    def pyproject(self) -> dict:
        return tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------------- what is there
def fingerprint(project: Project) -> str:
    """Changes when an installation could turn out differently, and not with the settings of ruff or pytest."""
    tables = project.pyproject()
    relevant = [tables.get("build-system"), tables.get("project"), tables.get("tool", {}).get("setuptools")]
    relevant.append(project.first)
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def why_rebuild(project: Project) -> str | None:
    """Why `.venv` cannot be built upon, in words; None where it can (or where there is none yet)."""
    if project.unfinished.exists():
        return "its last set-up was interrupted"
    if not (project.venv / "pyvenv.cfg").exists():
        return None
    seen = _ask(project, "import sys, pip; print('%d.%d' % sys.version_info[:2], sys.prefix, sep='\\n')")
    if seen is None:
        return "its Python or its pip does not run"
    version, prefix = seen.split("\n", 1)
    if not is_supported(project, version):
        return f"its Python is {version}, which is not supported"
    wanted = os.environ.get("VLA_RL_PYTHON_VERSION", version)
    if version != wanted:
        return f"its Python is {version}, and {wanted} is asked for"
    if os.path.realpath(prefix) != os.path.realpath(project.venv):
        return f"its Python belongs to {prefix}"
    stamp = _read_stamp(project)
    if stamp and stamp["root"] != str(project.root):
        return f"it was made in {stamp['root']}, and its commands point there"
    if stamp and stamp["python"] != version:
        return f"it was made with Python {stamp['python']}, and its Python is {version} now"
    # pip writes RECORD last: without it, an installation broke off in the middle
    half = [path.name for path in _site(project, version).glob("*.dist-info") if not (path / "RECORD").exists()]
    return f"{half[0]} is half installed" if half else None


def why_install(project: Project, level: str) -> str | None:
    """Why pip has work to do in a `.venv` that can be built upon; None where the level is ready."""
    stamp = _read_stamp(project)
    if stamp is None:
        return "the set-up has not been completed"
    if stamp["fingerprint"] != fingerprint(project):
        return "pyproject.toml has changed"
    if LEVELS.index(stamp["level"]) < LEVELS.index(level):
        return f"only what `{stamp['level']}` needs is installed"
    site = _site(project, stamp["python"])
    missing = [name for name in _requirement_names(project, level) if not _is_installed(name, site)]
    return f"{', '.join(missing)} has been removed" if missing else None


def _read_stamp(project: Project) -> dict[str, str] | None:
    try:
        stamp = json.loads(project.stamp.read_text(encoding="utf-8"))
        known = {"level", "root", "python", "fingerprint"} <= stamp.keys() and stamp["level"] in LEVELS
        return stamp if known else None
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _requirement_names(project: Project, level: str) -> list[str]:
    table = project.pyproject()["project"]
    requirements = [*table.get("dependencies", [])]
    if level == "dev":
        requirements += table.get("optional-dependencies", {}).get("dev", [])
    unconditional = [requirement for requirement in requirements if ";" not in requirement]
    return [table["name"], *(re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in unconditional)]


def _site(project: Project, version: str) -> Path:
    return project.venv / "lib" / f"python{version}" / "site-packages"


def _is_installed(name: str, site: Path) -> bool:
    return next(iter(importlib.metadata.distributions(name=name, path=[str(site)])), None) is not None


def is_supported(project: Project, version: str) -> bool:
    """Whether a Python, given as "3.12", satisfies `requires-python` of pyproject.toml, written as ">=3.11,<3.14"."""
    low, high = re.findall(r"(?:>=|<)3\.(\d+)", project.pyproject()["project"]["requires-python"])
    major, minor = map(int, version.split("."))
    return major == 3 and int(low) <= minor < int(high)


def _ask(project: Project, code: str) -> str | None:
    """What a line of Python prints in `.venv`; None where that fails."""
    try:
        done = subprocess.run(
            [project.python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ----------------------------------------------------------------------------------------------------------- the system
def missing_for_rendering(back_end: str) -> list[str]:
    """Libraries that rendering lacks on this machine; empty where the back end works. Tried, not looked up: a library
    may be there without its package, and a package without a driver. `back_end`: egl, osmesa; others are left alone."""
    if sys.platform != "linux" or back_end not in _NEEDED_BY_BACK_END:
        return []
    needed = [library for library in _NEEDED_BY_BACK_END[back_end] if not _loads(library)]
    if needed or back_end == "osmesa":
        return needed
    # In a process of its own: a broken driver ends the process that loads it.
    probe = subprocess.run([sys.executable, "-I", __file__, "probe-egl"], capture_output=True, check=False)
    return [] if probe.returncode == 0 else ["a driver for libEGL.so.1"]


def probe_egl() -> bool:
    """Whether an EGL device initialises, as rendering without a display does it (EGL_EXT_platform_device)."""
    egl = ctypes.CDLL("libEGL.so.1")
    pointer, integer, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int()
    egl.eglGetProcAddress.restype = pointer
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    addresses = [egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT")]
    if not all(addresses):
        return False
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, integer, pointer, pointer)(addresses[0])
    platform_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(addresses[1])
    devices = (pointer * 16)()
    if not query_devices(len(devices), devices, ctypes.byref(count)):
        return False
    displays = (platform_display(0x313F, device, None) for device in devices[: count.value])  # EGL_PLATFORM_DEVICE_EXT
    return any(display and egl.eglInitialize(display, None, None) for display in displays)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def ensure_system(needs_venv_module: bool) -> None:
    """The Debian packages that are really missing: installed as root, else asked for in one message."""
    back_end = os.environ.get("MUJOCO_GL", "egl").lower()
    libraries = missing_for_rendering(back_end)
    packages = [package for library, package in _RENDERING_LIBRARIES.items() if libraries and not _loads(library)]
    if libraries and not packages:  # every library loads, and no driver stands behind them
        packages = ["libegl-mesa0", "libgl1-mesa-dri"]
    lacks = list(libraries)
    if needs_venv_module and not (importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv")):
        lacks.append("Python's venv module")
        packages.append(f"python{sys.version_info.major}.{sys.version_info.minor}-venv")
    if not packages:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SetupError(missing_message(lacks, packages, debian=shutil.which("apt-get") is not None))
    _install_debian(packages)
    still = missing_for_rendering(back_end)
    if still:
        raise SetupError(
            f"{', '.join(packages)} are installed, and rendering still lacks {', '.join(still)}.\n"
            "Try the software renderer instead: MUJOCO_GL=osmesa (Debian's package libosmesa6)."
        )


def missing_message(lacks: Sequence[str], packages: Sequence[str], debian: bool) -> str:
    """The one message that says what to install."""
    if debian:
        how = f"    sudo apt-get install {' '.join(packages)}"
    else:
        how = f"    what your system's package manager has for Debian's {', '.join(packages)}"
    return f"This machine lacks {', '.join(lacks)}.\nInstall it, then run the same command again:\n{how}"


def _install_debian(packages: Sequence[str]) -> None:
    started = time.monotonic()
    say(f"installing Debian packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    subprocess.run([*apt, "update"], env=environment, check=False)  # lists may be good enough without it
    known = [p for p in packages if _run_quietly(["apt-cache", "show", p])]  # newer releases have dropped libosmesa6
    try:
        install = [*apt, "install", "-y", "--no-install-recommends", *known]
        subprocess.run(install, env=environment, stdout=subprocess.DEVNULL, check=True)
    except subprocess.CalledProcessError:
        raise SetupError(
            "apt-get could not install them (see above). Make it work, then run the same command again:\n"
            f"    apt-get update && apt-get install {' '.join(packages)}"
        ) from None
    say(f"Debian packages: {time.monotonic() - started:.0f} s")


def _run_quietly(command: Sequence[str]) -> bool:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------- the work
def is_ready(project: Project, level: str) -> bool:
    """Nothing is to be done: `.venv` is there and complete, and rendering works."""
    if why_rebuild(project) or why_install(project, level):
        return False
    return not missing_for_rendering(os.environ.get("MUJOCO_GL", "egl").lower())


def make_ready(project: Project, level: str) -> None:
    """Everything from nothing, or what is missing of it. Two of these at once wait for each other.

    Raises:
        SetupError: something is missing that only the user can provide; the message names it.
    """
    with _lock(project.root):
        if is_ready(project, level):
            return
        started = time.monotonic()
        reason = why_rebuild(project)
        has_venv = (project.venv / "pyvenv.cfg").exists() and reason is None
        ensure_system(needs_venv_module=not has_venv)
        if reason:
            say(f".venv is made anew: {reason}")
        if not has_venv:
            _create_venv(project)
        reason = why_install(project, level)
        if reason:
            say(f"installing Python packages for `{level}`: {reason}")
            _install(project, level)
        say(f"ready for `{level}` in {time.monotonic() - started:.0f} s")


def _create_venv(project: Project) -> None:
    say(f"making .venv with Python {platform.python_version()}")
    ours = project.unfinished.exists() or (project.venv / "pyvenv.cfg").exists()
    if project.venv.exists() and not ours and any(project.venv.iterdir()):
        raise SetupError(f"{project.venv} is no virtual environment. Move it away, then run the same command again.")
    project.venv.mkdir(exist_ok=True)
    project.unfinished.touch()
    for entry in project.venv.iterdir():  # what is in it, not itself: it may be a link to another disk
        if entry == project.unfinished:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    folder = os.path.realpath(project.venv)  # Python's venv refuses a link
    made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, text=True, check=False)
    if made.returncode:
        raise SetupError(f"{sys.executable} -m venv failed:\n{made.stdout}{made.stderr}")


def _install(project: Project, level: str) -> None:
    project.unfinished.touch()
    _pip(project, *project.first)
    _pip(project, "--no-build-isolation", "--editable", f".{_EXTRAS[level]}")
    _compile(project)
    version = _ask(project, "import sys; print('%d.%d' % sys.version_info[:2])")
    stamp = {"level": level, "root": str(project.root), "python": version, "fingerprint": fingerprint(project)}
    project.stamp.write_text(json.dumps(stamp), encoding="utf-8")
    project.unfinished.unlink()


def _pip(project: Project, *arguments: str) -> None:
    """`pip install`, with whatever index, proxy and cache the user's pip is configured to use."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [str(project.python), "-m", "pip", "install", "--no-compile", "--disable-pip-version-check", *quiet]
    command += arguments
    environment = {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    status = subprocess.run(command, cwd=project.root, env=environment, check=False).returncode
    if status == 1:  # pip gave up by itself and has undone what it began: what was there before still stands
        project.unfinished.unlink()
    if status:
        raise SetupError(
            f"pip could not install {' '.join(arguments)} (see above). It needs the network, or an index that pip is\n"
            "configured to use. Make that work, then run the same command again."
        )


def _compile(project: Project) -> None:
    """What pip does on one core, on all. Some packages hold files that are not for this Python: not an error."""
    command = [str(project.python), "-m", "compileall", "-qq", "-j", "0", str(project.venv / "lib")]
    subprocess.run(command, check=False)


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One set-up at a time in a checkout."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this checkout")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def say(text: str) -> None:
    print(f"[set-up] {text}", flush=True)


def main(arguments: Sequence[str]) -> int:
    project = Project(Path(__file__).resolve().parent.parent)
    match list(arguments):
        case ["probe-egl"]:
            return 0 if probe_egl() else 1
        case ["is-ready", level] if level in LEVELS:
            return 0 if is_ready(project, level) else 1
        case ["make-ready", level] if level in LEVELS:
            try:
                make_ready(project, level)
            except SetupError as error:
                print(f"\n{error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print("\nStopped. The next run starts the set-up again.", file=sys.stderr)
                return 130
            return 0
    print(f"usage: environment.py is-ready|make-ready {'|'.join(LEVELS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
