"""The commands of make around the set-up: choice of a Python, stages, named scripts, types that are really checked."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_packaging import MODULES, ROOT, load_tool

TOOLS = ROOT / "tools"
# What make hands down to these tests when it runs them.
MADE = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PYTHON", "TORCH", "ARGS", "NAME", "TEST_PROCESSES")
SYSTEM_PATH = "/usr/bin:/bin"


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in MADE}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=120
    )


# ----------------------------------------------------------------------------------------------- tools/setup.sh
@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which the set-up ends, by printing, where environment.py would go on."""
    root = tmp_path / "check out"
    (root / "tools").mkdir(parents=True)
    shutil.copy(TOOLS / "setup.sh", root / "tools")
    (root / "tools" / "environment.py").write_text("import os, sys\nprint(sys.argv[1:], 'PYTHONPATH' in os.environ)\n")
    return root


def pretend_python(folder: Path, name: str, version: str | None) -> Path:
    """A command that answers as a Python of that version does; None: one that fails, as a shim of pyenv may."""
    folder.mkdir(exist_ok=True)
    command = folder / name
    answer = f'case "$*" in *version_info*) echo {version};; *) echo "ran $@";; esac' if version else "exit 127"
    command.write_text(f"#!/bin/sh\n{answer}\n")
    command.chmod(0o755)
    return command


def coreutils_only(folder: Path) -> str:
    """A PATH with what the script needs, and without any Python."""
    folder.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "sh"):
        link = folder / name
        if not link.exists():
            link.symlink_to(shutil.which(name, path=SYSTEM_PATH) or "")
    return str(folder)


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": "3.12"}, "python3"),
        ({"python3": "3.10", "python3.13": "3.13"}, "python3.13"),
        ({"python3": "3.14", "python3.11": "3.11"}, "python3.11"),
        ({"python3": None, "python3.12": None, "python": "3.11"}, "python"),
    ],
)
def test_a_supported_python_is_found(checkout: Path, tmp_path: Path, pythons: dict[str, str | None], chosen: str):
    folder = tmp_path / "bin"
    for name, version in pythons.items():
        pretend_python(folder, name, version)
    marked = folder / chosen
    marked.write_text(marked.read_text().replace('"ran $@"', f'"{chosen} ran $@"'))
    done = run("bash", "tools/setup.sh", "demo", cwd=checkout, PATH=f"{folder}:{coreutils_only(tmp_path / 'core')}")
    assert done.stdout.strip() == f"{chosen} ran -I tools/environment.py make-ready demo"


def test_unsupported_python_gives_a_clear_message(checkout: Path, tmp_path: Path):
    old = pretend_python(tmp_path / "bin", "python3", "3.9")
    path = f"{old.parent}:{coreutils_only(tmp_path / 'core')}"
    done = run("bash", "tools/setup.sh", "demo", cwd=checkout, PATH=path)
    assert done.returncode == 1
    assert f"needs one of Python 3.11 3.12 3.13, and there is only: {old} is Python 3.9." in done.stderr
    asked = run("bash", "tools/setup.sh", "demo", cwd=checkout, PATH=path, PYTHON=str(old))
    assert asked.returncode == 1
    assert f"PYTHON={old} is not a usable Python: {old} is Python 3.9." in asked.stderr


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("apt-get") is None, reason="the message is for other machines")
def test_no_python_at_all(checkout: Path, tmp_path: Path):
    """PATH has no apt-get, so root too gets the message."""
    done = run("bash", "tools/setup.sh", "demo", cwd=checkout, PATH=coreutils_only(tmp_path / "core"))
    assert done.returncode == 1
    assert "sudo apt-get install python3 python3-venv" in done.stderr


def test_activated_venv_is_not_asked_to_rebuild_itself(checkout: Path, tmp_path: Path):
    pretend_python(checkout / ".venv", "python3", "3.11")
    inside = pretend_python(checkout / ".venv" / "bin", "python3", "3.11")
    outside = pretend_python(tmp_path / "bin", "python3", "3.12")
    path = f"{inside.parent}:{outside.parent}:{coreutils_only(tmp_path / 'core')}"
    outside.write_text(outside.read_text().replace('"ran $@"', '"outside"'))
    assert run("bash", "tools/setup.sh", "dev", cwd=checkout, PATH=path).stdout.strip() == "outside"


def test_ready_venv_needs_no_other_python(checkout: Path, tmp_path: Path):
    pretend_python(checkout / ".venv", "unused", "3.11")
    python = pretend_python(checkout / ".venv" / "bin", "python", "3.11")
    log = tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    done = run("bash", "tools/setup.sh", "dev", cwd=checkout, PATH=coreutils_only(tmp_path / "core"))
    assert (done.returncode, done.stdout) == (0, "")
    assert log.read_text() == "-I tools/environment.py is-ready dev\n"


def test_foreign_packages_of_the_shell_stay_outside(checkout: Path, tmp_path: Path):
    done = run("bash", "tools/setup.sh", "demo", cwd=checkout, PYTHON=sys.executable, PYTHONPATH="/opt/ros/packages")
    assert done.stdout.strip() == "['make-ready', 'demo'] False"


# ----------------------------------------------------------------------------------------------- tools/stage.sh
def test_stage_says_what_how_long_and_passes_the_status_on():
    good = run(TOOLS / "stage.sh", "a nap", "sleep", "0.2")
    assert good.returncode == 0
    assert re.search(r"^== a nap: done in 0\.[2-9] s$", good.stdout, flags=re.MULTILINE)
    bad = run(TOOLS / "stage.sh", "a fall", "bash", "-c", "exit 3")
    assert bad.returncode == 3
    assert re.search(r"^== a fall: FAILED \(exit status 3\) in \d+\.\d s$", bad.stdout, flags=re.MULTILINE)


# ----------------------------------------------------------------------------------------------- make's targets
def test_help_lists_every_target_that_is_documented():
    text = (ROOT / "Makefile").read_text()
    documented = re.findall(r"^([a-z-]+):[^#\n]*## ", text, flags=re.MULTILINE)
    assert {"help", "demo", "test", "check", "bench", "experiment", "test-slow", "clean"} <= set(documented)
    done = run("make", "--no-print-directory")
    assert re.findall(r"^  make ([a-z-]+) ", done.stdout, flags=re.MULTILINE) == documented
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_demo_does_not_install_the_test_tools():
    done = run("make", "-n", "demo")
    assert "tools/setup.sh demo" in done.stdout
    assert "tools/setup.sh dev" not in done.stdout
    assert re.search(r"\.venv/bin/vla-rl (run )?demo ", done.stdout)


def test_test_is_all_stages_in_order():
    lines = run("make", "-n", "test").stdout
    stages = ["setup.sh dev", "ruff check", "ruff format", "pyright", "pytest -q -n", "check_wheel.py", "demo_smoke"]
    places = [lines.index(stage) for stage in stages]
    assert places == sorted(places)


@pytest.mark.parametrize(("folder", "known"), [("benchmarks", "rollout_state"), ("experiments", "two_way_reach")])
@pytest.mark.parametrize("name", ["", "no_such_thing", "rollout", "../unit/test_setup_make"])
def test_missing_or_unknown_name_lists_the_names(folder: str, known: str, name: str):
    done = run(TOOLS / "run_named.sh", folder, name)
    assert done.returncode == 2
    assert f"    NAME={known}\n" in done.stderr
    assert (f"There is no NAME={name}" in done.stderr) == bool(name)


def test_known_name_runs_with_its_arguments():
    done = run(TOOLS / "run_named.sh", "experiments", "two_way_reach", "--help", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_continuous_integration_runs_the_test_command():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


# ----------------------------------------------------------------------------------------------- types
def test_link_tree_stands_for_every_module_and_forgets_deleted_ones(tmp_path: Path):
    tool = load_tool("link_tree")
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "sim", root / "sim", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "vla_rl").mkdir()
    shutil.copy(ROOT / "vla_rl" / "core.py", root / "vla_rl")
    package_dir = '[tool.setuptools.package-dir]\n"vla_rl" = "vla_rl"\n"vla_rl.sim" = "sim"\n'
    (root / "pyproject.toml").write_text(package_dir)
    tree = tool.make_link_tree(root)
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*.py")}
    expected = {name.replace(".", "/") for name in MODULES if name.startswith("vla_rl.sim")} | {"vla_rl/core"}
    assert {re.sub(r"(/__init__)?\.py$", "", file) for file in files} == expected
    assert not any(path.is_symlink() and path.is_dir() for path in tree.rglob("*")), (
        "pyright passes links to folders by"
    )

    shutil.rmtree(root / "sim" / "tasks")
    (root / "sim" / "new.py").touch()
    tool.make_link_tree(root)
    assert not (tree / "vla_rl" / "sim" / "tasks").exists()
    assert (tree / "vla_rl" / "sim" / "new.py").resolve() == root / "sim" / "new.py"


def test_type_errors_planted_in_root_folders_are_reported(tmp_path: Path):
    """With the real settings: pyright says nothing when it finds nothing to read, so a silent check proves nothing."""
    root = tmp_path / "checkout"
    for folder in ("sim", "policies", "vla_rl", "tests", "tools"):
        (root / folder).mkdir(parents=True)
    for folder in ("sim", "policies", "vla_rl"):
        (root / folder / "__init__.py").touch()
    (root / "vla_rl" / "core.py").write_text("class Observation:\n    num_envs: int = 1\n")
    use = "from vla_rl.core import Observation\n\n\ndef read(obs: Observation) -> str:\n    return obs.num_envs\n"
    (root / "sim" / "planted.py").write_text(use)
    (root / "policies" / "planted.py").write_text(use.replace("obs.num_envs", "obs.no_such_field"))
    (root / "tests" / "test_planted.py").write_text(use.replace("obs.num_envs", "obs.num_envs + 1"))
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / ".venv").symlink_to(sys.prefix)
    load_tool("link_tree").make_link_tree(root)
    done = run(sys.executable, "-m", "pyright", cwd=root)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = dict(re.findall(r"/(\w+/planted|test_planted)\.py:5:\d+ - error: (.*)", done.stdout))
    assert errors.keys() == {"sim/planted", "policies/planted", "test_planted"}
    assert errors["sim/planted"] == errors["test_planted"] == 'Type "int" is not assignable to return type "str"'
    assert errors["policies/planted"].startswith('Cannot access attribute "no_such_field" for class "Observation"')
    assert "3 errors" in done.stdout
