"""The set-up of `.venv`: what it finds broken, what it makes anew, and that it does nothing when nothing is to be done.

The tests make real virtual environments, of a miniature project whose build backend lies in its own tree, so that pip
needs no network.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_packaging import ROOT, load_tool

environment = load_tool("environment")
SetupError = environment.SetupError

# A build backend without requirements: an editable wheel that holds one path line (PEP 660).
BACKEND = """
    import zipfile

    def _wheel(folder):
        name = "mini-0.1-py3-none-any.whl"
        files = {
            "mini.pth": __import__("os").getcwd() + "\\n",
            "mini-0.1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: mini\\nVersion: 0.1\\nProvides-Extra: dev\\n",
            "mini-0.1.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
            "mini-0.1.dist-info/RECORD": "",
        }
        with zipfile.ZipFile(f"{folder}/{name}", "w") as archive:
            for path, text in files.items():
                archive.writestr(path, text)
        return name

    def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
        return _wheel(wheel_directory)

    build_wheel = build_editable
"""
PYPROJECT = """
    [build-system]
    requires = []
    build-backend = "backend"
    backend-path = ["."]
    [project]
    name = "mini"
    version = "0.1"
    requires-python = ">=3.11,<3.14"
    dependencies = []
    [project.optional-dependencies]
    dev = []
    [tool.ruff]
    line-length = 120
"""


@pytest.fixture(autouse=True)
def _apart_from_the_machine(monkeypatch: pytest.MonkeyPatch):
    """Rendering libraries are a subject of their own; a Python asked for by the caller of these tests is not meant."""
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.delenv("VLA_RL_PYTHON_VERSION", raising=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "check out"  # with a space
    root.mkdir()
    (root / "backend.py").write_text(textwrap.dedent(BACKEND))
    (root / "pyproject.toml").write_text(textwrap.dedent(PYPROJECT))
    return root


@pytest.fixture
def project(checkout: Path):
    # `pip` satisfies itself: something to install first that is there already
    return environment.Project(checkout, first=("pip",))


def make_bare_venv(project) -> Path:
    """A `.venv` as an installation leaves it, without pip's work. Returns its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", os.path.realpath(project.venv)], check=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    site = project.venv / "lib" / f"python{version}" / "site-packages"
    (site / "pip").mkdir()
    (site / "pip" / "__init__.py").touch()
    install_record(site, "mini")
    write_stamp(project)
    return site


def install_record(site: Path, name: str) -> Path:
    info = site / f"{name}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "RECORD").touch()
    return info


def write_stamp(project, **changes: str) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stamp = {"level": "demo", "root": str(project.root), "python": version}
    stamp["fingerprint"] = environment.fingerprint(project)
    project.stamp.write_text(json.dumps(stamp | changes))


# --------------------------------------------------------------------------------------------- the whole, from nothing
def test_from_nothing_then_nothing_then_moved(project, capsys: pytest.CaptureFixture, tmp_path: Path):
    environment.make_ready(project, "demo")
    first = capsys.readouterr().out
    assert "making .venv with Python" in first
    assert "ready for `demo`" in first
    assert environment.is_ready(project, "demo")
    assert not environment.is_ready(project, "dev")
    assert not project.unfinished.exists()
    backend = subprocess.run(
        [project.python, "-c", "import backend; print(backend.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert backend.stdout.strip() == str(project.root / "backend.py")

    environment.make_ready(project, "demo")
    assert capsys.readouterr().out == "", "nothing is to be done the second time"

    moved = environment.Project(project.root.rename(tmp_path / "moved"), first=("pip",))
    assert "it was made in" in environment.why_rebuild(moved)
    environment.make_ready(moved, "dev")
    assert "made anew: it was made in" in capsys.readouterr().out
    assert environment.is_ready(moved, "dev")
    assert environment.is_ready(moved, "demo"), "dev holds demo"
    pip = (moved.venv / "bin" / "pip").read_text()
    assert str(moved.root) in pip
    assert str(project.root) not in pip


def test_failed_installation_leaves_what_was_there(project, capfd: pytest.CaptureFixture, monkeypatch):
    environment.make_ready(project, "demo")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    without = environment.Project(project.root, first=("no-such-distribution-of-vla-rl",))
    with pytest.raises(SetupError, match="pip could not install no-such-distribution-of-vla-rl"):
        environment.make_ready(without, "demo")
    assert "no-such-distribution-of-vla-rl" in capfd.readouterr().err
    assert environment.is_ready(project, "demo"), "back on the older requirements, nothing is to be done"


def test_interrupted_installation_is_made_anew(project, tmp_path: Path):
    """In place: `.venv` may be a link to another disk."""
    elsewhere = tmp_path / "other disk"
    elsewhere.mkdir()
    project.venv.symlink_to(elsewhere)
    site = make_bare_venv(project)
    assert environment.why_rebuild(project) is None
    project.unfinished.touch()
    (site / "half.py").touch()
    assert environment.why_rebuild(project) == "its last set-up was interrupted"
    environment._create_venv(project)
    assert project.venv.is_symlink()
    assert (elsewhere / "pyvenv.cfg").exists()
    assert not (site / "half.py").exists()
    assert project.unfinished.exists(), "until everything is installed"


def test_folder_that_is_no_venv_is_not_deleted(project):
    project.venv.mkdir()
    (project.venv / "thesis.tex").write_text("years of work")
    with pytest.raises(SetupError, match=r"is no virtual environment\. Move it away"):
        environment.make_ready(project, "demo")
    assert (project.venv / "thesis.tex").read_text() == "years of work"


# ------------------------------------------------------------------------------------------------------ what is broken
def test_whole_venv_has_no_fault(project):
    make_bare_venv(project)
    assert environment.why_rebuild(project) is None
    assert environment.why_install(project, "demo") is None


def vanish_python(project) -> None:
    for python in (project.venv / "bin").glob("python*"):
        python.unlink()
    project.python.symlink_to("/nonexistent/python3.11")


def lose_pip(project) -> None:
    shutil.rmtree(next(project.venv.glob("lib/python*/site-packages/pip")))


def break_off_a_package(project) -> None:
    (next(project.venv.glob("lib/python*/site-packages/mini-0.1.dist-info")) / "RECORD").unlink()


def replace_python(project) -> None:
    write_stamp(project, python="3.99")


def borrow_python(project) -> None:
    """The Python of another environment stands in bin."""
    project.python.unlink()
    project.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    project.python.chmod(0o755)


def outdate_python(project) -> None:
    project.python.unlink()
    project.python.write_text(f"#!/bin/sh\necho 3.9\necho '{project.venv}'\n")
    project.python.chmod(0o755)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (vanish_python, "its Python or its pip does not run"),
        (lose_pip, "its Python or its pip does not run"),
        (break_off_a_package, "mini-0.1.dist-info is half installed"),
        (replace_python, "it was made with Python 3.99"),
        (borrow_python, "its Python belongs to"),
        (outdate_python, "its Python is 3.9, which is not supported"),
    ],
)
def test_broken_venv_is_noticed(project, harm: Callable, reason: str):
    make_bare_venv(project)
    harm(project)
    assert reason in environment.why_rebuild(project)
    assert not environment.is_ready(project, "demo")


def test_python_asked_for_by_name_wins(project, monkeypatch: pytest.MonkeyPatch):
    make_bare_venv(project)
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    other = "3.11" if mine != "3.11" else "3.12"
    monkeypatch.setenv("VLA_RL_PYTHON_VERSION", mine)
    assert environment.why_rebuild(project) is None
    monkeypatch.setenv("VLA_RL_PYTHON_VERSION", other)
    assert environment.why_rebuild(project) == f"its Python is {mine}, and {other} is asked for"


@pytest.mark.parametrize(("version", "expected"), [("3.10", False), ("3.11", True), ("3.13", True), ("3.14", False)])
def test_supported_versions(project, version: str, expected: bool):
    assert environment.is_supported(project, version) is expected


# -------------------------------------------------------------------------------------------------- what pip has to do
def test_levels(project):
    make_bare_venv(project)
    assert environment.why_install(project, "dev") == "only what `demo` needs is installed"
    write_stamp(project, level="dev")
    assert environment.why_install(project, "dev") is None
    assert environment.why_install(project, "demo") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"level": "demo"}'])
def test_unreadable_stamp_means_not_installed(project, text: str):
    make_bare_venv(project)
    project.stamp.write_text(text)
    assert environment.why_install(project, "demo") == "the set-up has not been completed"


def test_removed_package_is_noticed(project):
    site = make_bare_venv(project)
    edit(project, "dependencies = []", 'dependencies = ["numpy>=2", "win-only; sys_platform == \'win32\'"]')
    write_stamp(project)
    assert environment.why_install(project, "demo") == "numpy has been removed"
    install_record(site, "numpy")
    assert environment.why_install(project, "demo") is None


def edit(project, old: str, new: str) -> None:
    file = project.root / "pyproject.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_fingerprint_follows_requirements_and_not_tool_settings(project):
    before = environment.fingerprint(project)
    edit(project, "line-length = 120", "line-length = 99")
    os.utime(project.root / "pyproject.toml")
    assert environment.fingerprint(project) == before
    edit(project, "dependencies = []", 'dependencies = ["numpy"]')
    assert environment.fingerprint(project) != before
    other_torch = environment.Project(project.root, first=("torch==9.9",))
    assert environment.fingerprint(other_torch) != environment.fingerprint(project)


def test_torch_comes_first_and_the_build_backend_with_it():
    """The editable install is built without isolation: its backend must be there, in the version that is asked for."""
    assert environment._FIRST[0].startswith("torch==") or "TORCH" in os.environ
    assert environment._FIRST[1:] == tuple(environment.Project(ROOT).pyproject()["build-system"]["requires"])


# ------------------------------------------------------------------------------------------------------ the system
def test_missing_message_says_exactly_what_to_install():
    lacks, packages = ["libEGL.so.1", "Python's venv module"], ["libegl1", "libosmesa6", "python3.11-venv"]
    assert environment.missing_message(lacks, packages, debian=True) == (
        "This machine lacks libEGL.so.1, Python's venv module.\n"
        "Install it, then run the same command again:\n"
        "    sudo apt-get install libegl1 libosmesa6 python3.11-venv"
    )
    assert "apt-get" not in environment.missing_message(lacks, packages, debian=False)


def test_libraries_are_tried_not_looked_up(monkeypatch: pytest.MonkeyPatch):
    assert environment._loads("libc.so.6")
    assert not environment._loads("libno_such_library_of_vla_rl.so.1")
    monkeypatch.setattr(environment, "_NEEDED_BY_BACK_END", {"egl": ("libno_such.so.1", "libc.so.6")})
    assert environment.missing_for_rendering("egl") == ["libno_such.so.1"]
    assert environment.missing_for_rendering("glfw") == [], "a display is the user's own affair"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="EGL is Linux's")
def test_egl_that_renders_is_found_in_order():
    """Agrees with MuJoCo: where the probe finds a device, a context can be made, and the other way round."""
    code = "import os, mujoco.egl; mujoco.egl.GLContext(8, 8).make_current(); print('made', flush=True); os._exit(0)"
    clean = {**os.environ, "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}
    made = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert (environment.missing_for_rendering("egl") == []) == ("made" in made.stdout)


def test_plain_user_is_told_what_is_missing(project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(environment, "_NEEDED_BY_BACK_END", {"egl": ("libno_such.so.1",)})
    monkeypatch.setattr(environment, "_RENDERING_LIBRARIES", {"libno_such.so.1": "libno-such1", "libc.so.6": "libc6"})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SetupError, match=r"lacks libno_such\.so\.1\.\n.*\n.*libno-such1$"):
        environment.make_ready(project, "demo")
    assert not project.venv.exists(), "nothing is begun that cannot be finished"


def test_two_set_ups_wait_for_each_other(checkout: Path):
    with environment._lock(checkout):
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import environment; from pathlib import Path\n"
            f"with environment._lock(Path({str(checkout)!r})): print('mine')"
        )
        second = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert "waiting for another set-up" in second.stdout.readline()
        assert second.poll() is None
    assert second.communicate(timeout=30)[0] == "mine\n"
