"""The experiment on injected latency: what it measures, and that chunks come when it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.experiments.latency import HORIZON, MODES, Episodes, Latency, jerk, make_env, summarise, table
from vla_rl.serving.inference import ServedPolicy
from vla_rl.serving.requests import RequestShapes
from vla_rl.serving.rtc import RTCConfig


class Marked:
    """A policy whose action i of decision d is the number 0.01 d + 0.0001 i in x, to be read from what is commanded."""

    action_horizon, action_dim = HORIZON, 4

    def __init__(self) -> None:
        self.num_asked, self.seen = 0, []

    def act(self, requests: Any, noise: np.ndarray) -> np.ndarray:
        self.seen.append([(len(r.prefix), r.delay) if r.prefix is not None else None for r in requests])
        chunk = np.zeros((len(requests), HORIZON, 4), np.float32)
        chunk[..., 0] = 0.01 * self.num_asked + 0.0001 * np.arange(HORIZON)
        self.num_asked += 1
        return chunk


def commanded(monkeypatch: pytest.MonkeyPatch, mode: str, delay: int, steps: int) -> tuple[list[Any], Marked]:
    """-> of each control step (decision, action), None where the arm held; of the first of two episodes."""
    env, policy = make_env(2, "test", steps), Marked()
    shapes = RequestShapes((), 18, (HORIZON, 4), 4)
    served: Any = ServedPolicy(policy, "", 0, "", shapes, RTCConfig(), {})  # type: ignore[arg-type]
    monkeypatch.setattr(ServedPolicy, "act", lambda self, *a: self.policy.act(*a))
    episodes = Episodes(env, served, MODES[mode], delay, [3, 4])
    told = []
    monkeypatch.setattr(env, "step", lambda a, active, step=env.step: (told.append(a[0, 0].item()), step(a, active))[1])
    monkeypatch.setattr("tests.experiments.latency.MAX_STEPS", steps)
    episodes.run()
    env.close()
    assert episodes.brokers[0].counts.late == 0
    read = [None if abs(x) < 1e-9 else divmod(round(x * 10_000), 100) for x in told]
    return read, policy


def test_the_chunk_of_step_t_comes_at_step_t_plus_d(monkeypatch: pytest.MonkeyPatch) -> None:
    told, policy = commanded(monkeypatch, "rtc", 6, 20)
    assert told[:6] == [None] * 6  # the first is on its way
    assert told[6] is None  # action 0 of decision 0 is the number 0
    assert told[7:12] == [(0, i) for i in range(1, 6)]
    assert told[12:18] == [(1, i) for i in range(6, 12)]  # asked at step 6, used from 12 on
    assert told[18:] == [(2, 6), (2, 7)]
    assert policy.seen[:3] == [[None] * 2, [(20, 6)] * 2, [(14, 6)] * 2]  # the delay is measured from the first on


def test_sync_waits_and_plays_as_many_as_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    told, _ = commanded(monkeypatch, "sync", 6, 30)
    assert told[12:18] == [None] * 6
    assert told[18:24] == [(1, i) for i in range(6)]
    assert told[24:] == [None] * 6


def test_without_latency_all_modes_ask_every_four_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("sync", "async"):
        told, _ = commanded(monkeypatch, mode, 0, 10)
        assert told[1:] == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]


def test_jerk_by_hand() -> None:
    t = torch.arange(6.0, dtype=torch.float64)
    positions = torch.stack([torch.stack([t**3, 0 * t, 0 * t], 1), torch.stack([0 * t, t**2, t], 1)], dim=1)
    positions[5] += 100.0  # after the end of both
    mean, largest = jerk(positions, torch.tensor([4, 4]), hz=10.0)
    torch.testing.assert_close(mean, torch.tensor([6000.0, 0.0], dtype=torch.float64))  # (t^3)''' = 6, 10^3 of them
    torch.testing.assert_close(largest, mean)
    assert jerk(positions, torch.tensor([2, 2]), hz=10.0)[0].tolist() == [0.0, 0.0]


def test_the_summary_counts_pairs() -> None:
    options = replace(Latency(), seeds=(0, 1), delays=(4,), modes=("async", "rtc"))
    base = {"wrong_object": 1, "steps_to_success": 9.0, "jerk_mean": 2.0, "jerk_max": 3.0, "starved_steps": 4.0}
    told = {"async": ("1100", "0000"), "rtc": ("1110", "1000")}
    cells = {(s, m, 4): {**base, "success": told[m][s]} for m in told for s in (0, 1)}
    cells[1, "async", 4]["steps_to_success"] = None
    summary = summarise(options, cells)
    first, second = summary["rows"]
    assert (first["success_rate"], first["n"], first["wrong_object"], first["steps_to_success"]) == (0.25, 8, 2, 9.0)
    assert second["success_rate"] == 0.5
    assert [d["difference"] for d in summary["differences"]] == [0.25]
    assert table(summary["rows"], (4,)).splitlines()[2:] == ["| async | 25%, 2 |", "| rtc | 50%, 2 |"]
