"""The doctor's checks on this very machine, and its verdict."""

from __future__ import annotations

import json

import pytest

from vla_rl import doctor
from vla_rl.doctor import Check, format_table, is_ready, run_doctor


@pytest.fixture(scope="module")
def checks():
    return doctor.examine()


def test_every_check_has_an_answer_and_a_way_out(checks):
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    expected = (
        "Python",
        "memory",
        "torch",
        "mujoco",
        "mujoco.batch",
        "mujoco_warp",
        "MUJOCO_GL=egl",
        "MUJOCO_GL=osmesa",
    )
    assert set(expected) <= set(names)
    simulators = {c.name for c in checks if c.group == "simulators"}
    assert {"maniskill", "libero", "robosuite", "gymnasium", "Vulkan"} <= simulators
    for check in checks:
        assert check.detail
        if check.status != "ok" and check.name != "GPU":
            assert check.how, check


def test_what_is_installed_is_found_and_really_tried(checks):
    by_name = {check.name: check for check in checks}
    assert by_name["mujoco.batch"].status == "ok", by_name["mujoco.batch"].detail
    assert "steps/s" in by_name["mujoco.batch"].detail
    assert by_name["gymnasium"].status == "ok"
    assert by_name["gymnasium"].detail[0].isdigit()


def test_json_is_one_object(monkeypatch, capsys, checks):
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    code = run_doctor(json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["ready"] == (code == 0) == is_ready(checks)
    assert len(answer["checks"]) == len(checks)
    assert run_doctor() == code
    assert "rendering:" in capsys.readouterr().out


def test_a_probe_that_crashes_is_a_finding_and_not_an_end():
    def probe(script):
        return doctor._probed("x", "x", script, lambda out: "fine", "install it", required=True)

    assert probe("print('{}')").status == "ok"
    killed = probe("import os; os.abort()")
    assert (killed.status, killed.how) == ("failed", "install it")
    raised = probe("raise RuntimeError('no display')")
    assert raised.detail == "RuntimeError: no display"


def test_a_probe_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE_TIMEOUT_S", 0.5)
    check = doctor._probed("x", "x", "import time; time.sleep(60)", lambda out: "fine", "install it")
    assert (check.status, check.detail) == ("failed", "no answer within 0.5 s")


def test_the_verdict():
    fine = [Check("machine", "Python", "ok", "3.11", required=True), Check("rendering", "MUJOCO_GL=egl", "ok", "fast")]
    optional = Check("more", "Ray", "missing", "not installed", "pip install ray")
    broken = Check("engines", "mujoco", "failed", "not installed", "pip install mujoco", required=True)
    blind = Check("rendering", "MUJOCO_GL=egl", "failed", "no GL", "apt-get install libegl1")
    assert is_ready([*fine, optional])
    assert not is_ready([*fine, broken])
    assert not is_ready([fine[0], blind])
    text = format_table([*fine, optional, broken])
    assert "-> pip install ray" in text
    assert text.endswith("Something required is missing: see above.")
    assert format_table(fine).endswith("This machine can train and evaluate.")
