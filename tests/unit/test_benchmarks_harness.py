"""The benchmarks' arithmetic: turns, paired ratios, what is printed and saved; and a peer in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import harness
from tests.benchmarks.harness import BenchmarkResult, PeerGroup, PeerUnavailableError, in_turns, median_ratio, summary
from tests.benchmarks.tabletop import TabletopRollout

torch.set_num_threads(1)

COUNTING_PEER = """
import json, os, sys, time
assert os.environ["FLAVOUR"] == "vanilla"
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    seconds = json.loads(line)["seconds"]
    print(json.dumps({"steps": int(100 * seconds), "seconds": seconds, "mode": sys.argv[1]}), flush=True)
"""


def test_sides_take_turns_and_every_second_time_backwards() -> None:
    calls: list[str] = []

    def side(name: str, value: float) -> object:
        return lambda: (calls.append(name), value)[1]

    values = in_turns({"a": side("a", 1.0), "b": side("b", 2.0)}, repeats=3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_the_ratio_pairs_repeats() -> None:
    """A machine that is half as fast in one repeat does not change the ratio; medians of the sides would."""
    assert median_ratio([10.0, 5.0, 12.0], [2.0, 1.0, 2.0]) == 5.0
    assert summary({"x": [3.0, 1.0, 2.0], "none": []}) == {"x": {"median": 2.0, "min": 1.0, "max": 3.0}}


def test_the_last_line_is_the_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "ROOT", tmp_path.parent)
    BenchmarkResult("speed", 10.0, 2.0, 5.0, "steps/s", {"hardware": harness.hardware()}).finish(save=True)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(printed) == ["name", "ours", "peer", "ratio", "unit", "details"]
    assert printed["details"]["hardware"]["cores"] >= 1
    (saved,) = tmp_path.iterdir()
    assert saved.name == f"speed_{harness.hardware_slug()}.json"
    assert json.loads(saved.read_text()) == printed


def test_a_peer_runs_one_process_a_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "PEERS", tmp_path)
    monkeypatch.setattr(harness, "LOGS", tmp_path / "logs")
    (tmp_path / "counter.py").write_text(COUNTING_PEER)
    group = PeerGroup(Path(sys.executable), "counter.py", "state", {"FLAVOUR": "vanilla"})
    assert group.rate(2.0) == pytest.approx(100.0 * harness.num_cores())
    assert group.rate(0.5) == pytest.approx(100.0 * harness.num_cores())
    group.close()
    with pytest.raises(PeerUnavailableError, match="AssertionError"):
        PeerGroup(Path(sys.executable), "counter.py", "state", {"FLAVOUR": "chocolate"})


def test_our_side_counts_executed_steps_only() -> None:
    """Rate times time is what the environment executed: less than chunk * num_envs where episodes end in a chunk."""
    rollout = TabletopRollout(num_envs=32, chunk=7, num_threads=1)
    executed: list[int] = []
    step = rollout.env.step

    def counted(actions: torch.Tensor) -> object:
        result = step(actions)
        executed.append(int(result.executed.sum()))
        return result

    rollout.env.step = counted
    rate = rollout.run(chunks=20)
    assert len(executed) == 20
    assert 0.8 * 20 * 7 * 32 < sum(executed) < 20 * 7 * 32
    assert rate > 0
    rollout.env.close()
