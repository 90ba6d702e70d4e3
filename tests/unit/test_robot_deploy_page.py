"""The page of a deployment, from a log that was really written and the files beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vla_rl.evaluation.result import Episode, EvalResult
from vla_rl.real_robot.control_loop import Tick
from vla_rl.real_robot.deploy_page import hold_reasons, write_deploy_page
from vla_rl.real_robot.interfaces import ArmState, Command, Picture
from vla_rl.real_robot.log import LogAbout, RobotLog
from vla_rl.real_robot.modes import Mode
from vla_rl.real_robot.takeover import Control

OLD = "camera front: its picture is 0.{} s old"


def tick(at: float, mode: Mode, problem: str = "", clamps: tuple[str, ...] = ()) -> Tick:
    state = ArmState(np.zeros(7), np.zeros(7), 0.04, at - 0.02)
    pictures = {"front": Picture(np.zeros((4, 6, 3), np.uint8), at - 0.05, 1)}
    command = Command(np.zeros(7), 0.04, 1)
    return Tick(
        at, mode, Control.POLICY, state, pictures, None, command, command, clamps, None, None, problem, 0.001
    )  # fmt: skip


TICKS = (
    [tick(0.05 * i, Mode.RUN) for i in range(10)]
    + [tick(0.5 + 0.05 * i, Mode.HOLD, OLD.format(12 + i)) for i in range(4)]
    + [tick(0.7, Mode.RUN), tick(0.75, Mode.HOLD), tick(0.8, Mode.HOLD, OLD.format(9)), tick(0.85, Mode.ESTOP)]
)


def row(seed: int, stop_reason: str = "") -> dict[str, object]:
    counts = {"steps": 11, "held": 6, "clamped": 3, "failures": 1}
    times = {"latency_p99_ms": 31.4, "late_p99_ms": 1.2}
    return {"seed": seed, "success": not stop_reason, "stop_reason": stop_reason, **counts, **times}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An episode that succeeded and one that a stop cut off."""
    for seed in (3, 4):
        with RobotLog(tmp_path / "logs" / f"episode_{seed}", LogAbout(tuple("abcdefg"), "touch <it>", 20.0)) as log:
            for one in TICKS:
                log.write(one)
    episode = Episode("tabletop/reach", 3, "touch <it>", True, True, 11, 1.0, True, "3")
    EvalResult((episode,), {"policy": "runs/x/policy"}).save(tmp_path)
    ms = {"p50": 12.0, "p99": 31.4, "max": 40.0}
    values = {
        "config": {"robot": "twin", "mode": "async", "limits": "panda", "shadow": False},
        "policy": "runs/x/policy",
        "server": {"policy_digest": "0123456789abcdef", "policy_version": 2},
        "stopped": "held for 1.0 s: <nothing>",
        "latency_ms": ms,
        "period_error_ms": ms,
        **{"ticks": 36, "missed": 0, "held": 12, "clamped": 6, "failures": 2},
        "clamps": {"velocity": 2, "jerk": 5},
        "broker": {"accepted": 20, "late": 1},
        "load": [0.5, 1.5],
        "episodes": [row(3), row(4, "held for 1.0 s: <nothing>")],
    }
    (tmp_path / "deploy.json").write_text(json.dumps(values))
    (tmp_path / "provenance.json").write_text(json.dumps({"command": "vla-rl deploy", "revision": "f00dcafe"}))
    return tmp_path


def test_reasons_of_holds_are_counted_without_their_numbers():
    fields = [{"mode": t.mode.value, "problem": t.problem} for t in TICKS]
    begun, ticks = hold_reasons(fields)
    assert ticks == {OLD.replace("0.{}", "#"): 5, "no action": 1}
    assert begun == {OLD.replace("0.{}", "#"): 1, "no action": 1}


def test_page_says_what_was_measured(folder: Path):
    page = write_deploy_page(folder).read_text()
    for said in (
        "runs/x/policy succeeds in 100.0% of its episodes",
        "[20.7%, 100.0%] &middot; n&nbsp;=&nbsp;1",  # Wilson's, of one episode: the one cut off is not counted
        "held for 1.0 s: &lt;nothing&gt;",
        "3 <small>touch &lt;it&gt;</small>",
        "<td>jerk</td><td>5</td><td>13.9%</td>",
        "<td>camera front: its picture is # s old</td><td>2</td><td>10</td>",
        "<td>no action</td><td>2</td><td>2</td>",
        "<td>age of the pictures</td><td>50.0&nbsp;ms</td>",
        "run 0.50 s, hold 0.20 s, run 0.05 s, hold 0.10 s, estop 0.00 s",
        "weights 0123456789abcdef, version 2",
        "f00dcafe",
        "vla-rl deploy",
    ):
        assert said in page, said
    assert page.index("velocity") > page.index("<td>jerk</td>")  # the most frequent first
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_page_of_a_deployment_that_did_not_start(folder: Path):
    values = json.loads((folder / "deploy.json").read_text()) | {"episodes": [], "clamps": {}, "stopped": "no picture"}
    (folder / "deploy.json").write_text(json.dumps(values))
    (folder / "eval.json").unlink()
    page = write_deploy_page(folder).read_text()
    assert "No episode ended: there is no rate." in page
    assert "<b>STOPPED:</b> no picture" in page
    assert "No command was changed." in page
    assert "The arm never held." in page
