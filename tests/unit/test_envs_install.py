"""Virtual environments of simulators: made once, made anew when requirements change or the making was cut short."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vla_rl.cli import main
from vla_rl.envs import install


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLA_RL_ENVS", str(tmp_path / "envs"))
    return tmp_path / "envs"


def _require(monkeypatch: pytest.MonkeyPatch, *steps: tuple[str, ...]) -> None:
    monkeypatch.setattr("vla_rl.envs.robosuite.REQUIREMENTS", steps)


def test_an_environment_is_made_once_and_again_when_its_requirements_change(folder: Path, monkeypatch) -> None:
    _require(monkeypatch, ("--help",))  # pip answers without the network
    with pytest.raises(FileNotFoundError, match="vla-rl env install robosuite"):
        install.simulator_python("robosuite")
    assert main(["env", "install", "robosuite"]) == 0
    python = install.simulator_python("robosuite")
    assert python == folder / "robosuite" / "bin" / "python"
    code = "import sys; print(sys.prefix)"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip() == str(python.parents[1])
    made = (folder / "robosuite" / "installed.json").stat().st_mtime_ns
    install.install("robosuite")
    assert (folder / "robosuite" / "installed.json").stat().st_mtime_ns == made
    _require(monkeypatch, ("--help",), ("--version",))
    assert not install.is_installed("robosuite")


def test_a_failed_step_leaves_nothing_that_counts_as_installed(folder: Path, monkeypatch, capfd) -> None:
    _require(monkeypatch, ("--no-index", "there-is-no-such-package-xyz"))
    assert main(["env", "install", "robosuite"]) == 1
    assert "robosuite: " in capfd.readouterr().err
    assert not install.is_installed("robosuite")


def test_the_command_says_what_there_is(folder: Path, capsys) -> None:
    assert main(["env", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(install.SIMULATORS)
    assert all(line.endswith("not installed") for line in lines)
    assert main(["env", "install", "gazebo"]) == 1
    assert "there is no simulator 'gazebo'" in capsys.readouterr().err
    assert main(["env", "install"]) == 2
    with pytest.raises(SystemExit):
        main(["env"])
