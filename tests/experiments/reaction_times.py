"""How soon an arm is stopped or held: real processes that are killed, stopped and fed with garbage.

Each trial starts a supervisor and a loop, waits until the arm moves, does the harm, and reads in the arm's own record
when it was told to stop, or when its targets stopped moving. CLOCK_MONOTONIC is the same in all processes.

make experiment NAME=reaction_times ARGS="--trials 50 --out runs/experiments/reaction_times.json"
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from tests.unit.sim_arm import RATE_HZ, Reaching, SimArm, SimCamera, read_record
from vla_rl.real_robot.control_loop import ControlLoop, LoopConfig, LoopParts
from vla_rl.real_robot.inference import Inference, PolicyProcess
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.supervisor import SupervisorClient, SupervisorConfig
from vla_rl.serving.broker import BrokerConfig

CASES = (
    "loop killed",
    "loop stopped (SIGSTOP)",
    "Ctrl-C",
    "supervisor SIGTERM",
    "policy killed",
    "policy stopped (SIGSTOP)",
    "NaN action",
    "stale measurement",
    "frozen camera",
)
_HARM = "harm"  # a file: when it appears, the process does the harm to itself and writes when


@dataclass(frozen=True)
class ReactionTimes:
    """`cases`: part of a case's name, "" for all. `timeout_s`: of the supervisor."""

    trials: int = 50
    cases: str = ""
    timeout_s: float = 0.1
    out: Path | None = None


class HarmedArm(SimArm):
    """Its measurement grows old on demand."""

    def read(self) -> Any:
        if self.frozen_at is None and (folder := Path(self.record).parent / _HARM).exists():
            self.frozen_at = time.monotonic()
            folder.with_suffix(".at").write_text(str(self.frozen_at))
        return super().read()


def _loop(folder: str, case: str, timeout_s: float, pids: Any) -> None:
    harm, record = Path(folder) / _HARM, str(Path(folder) / "arm.jsonl")
    policy = PolicyProcess(Reaching, timeout_s=1.0)
    camera = SimCamera()
    safety = SafetyConfig(speed_scale=1.0, max_state_age_s=0.1, max_clamped_fraction=1.0)
    make = functools.partial(HarmedArm if case == "stale measurement" else SimArm, record)
    with SupervisorClient.start(make, SupervisorConfig(safety=safety, timeout_s=timeout_s, linger_s=5.0)) as arm:
        assert arm.process is not None
        pids[:] = [os.getpid(), arm.process.pid, policy.pid]
        spoiled = False

        def harm_here(_tick: object) -> None:
            nonlocal spoiled
            if not spoiled and case in ("NaN action", "frozen camera") and harm.exists():
                spoiled, camera.frozen = True, case == "frozen camera"
                harm.with_suffix(".at").write_text(str(time.monotonic()))

        def act(action: np.ndarray, standing: Any) -> Any:
            from vla_rl.real_robot.control_loop import joint_targets

            return joint_targets(action * np.nan if spoiled and case == "NaN action" else action, standing)

        parts = LoopParts(arm, [camera], Inference(policy), to_command=act, on_tick=harm_here)
        broker = BrokerConfig(RATE_HZ)
        config = LoopConfig("go", broker, max_picture_age_s=0.07, grace_s=0.5, max_plan_age_s=0.07)
        loop = ControlLoop(parts, config)
        loop.start()
        loop.run(30.0)


def _do(case: str, folder: Path, pids: list[int]) -> float:
    """Do the harm; returns when."""
    loop, supervisor, policy = pids
    signals: dict[str, Callable[[], None]] = {
        "loop killed": lambda: os.kill(loop, signal.SIGKILL),
        "loop stopped (SIGSTOP)": lambda: os.kill(loop, signal.SIGSTOP),
        "Ctrl-C": lambda: (os.kill(loop, signal.SIGINT), os.kill(supervisor, signal.SIGINT))[0],
        "supervisor SIGTERM": lambda: os.kill(supervisor, signal.SIGTERM),
        "policy killed": lambda: os.kill(policy, signal.SIGKILL),
        "policy stopped (SIGSTOP)": lambda: os.kill(policy, signal.SIGSTOP),
    }
    if case in signals:
        at = time.monotonic()
        signals[case]()
        return at
    (folder / _HARM).touch()
    told = (folder / _HARM).with_suffix(".at")
    while not told.exists() or not told.read_text():
        time.sleep(0.001)
    return float(told.read_text())


def reaction(events: list[dict], at: float) -> tuple[float, float]:
    """Seconds from `at` until the arm was told to stop or its targets came to rest, whichever was first; and until it
    began to slow down (the first step that is shorter than the longest before by a tenth)."""
    stop = min((e["at"] for e in events if e["what"] == "stop" and e["at"] >= at), default=np.inf)
    sent = [(e["at"], np.array(e["position"])) for e in events if e["what"] == "send" and e["at"] <= stop]
    steps = [(b[0], float(np.abs(b[1] - a[1]).max())) for a, b in itertools.pairwise(sent)]
    after = [(t, d) for t, d in steps if t > at]
    usual = max((d for t, d in steps if t <= at), default=0.0)
    rest = next((t for t, d in after if d == 0.0), np.inf)
    slow = next((t for t, d in after if d < 0.9 * usual), np.inf)
    return min(stop, rest) - at, min(stop, slow) - at


def trial(case: str, timeout_s: float) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        record = folder / "arm.jsonl"
        context = multiprocessing.get_context("spawn")
        pids = context.Array("i", 3)
        process = context.Process(target=_loop, args=(folder_name, case, timeout_s, pids))
        process.start()
        try:
            while sum(e["what"] == "send" for e in read_record(record)) < 130:  # the ramp is over, the goal is far
                if not process.is_alive():
                    raise RuntimeError(f"{case}: the loop has ended before its time")
                time.sleep(0.01)
            at = _do(case, folder, list(pids))
            time.sleep(0.7)
            return reaction(read_record(record), at)
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.join()


def main(config: ReactionTimes) -> None:
    results = {}
    for case in (c for c in CASES if config.cases in c):
        times = []
        for i in range(config.trials):
            times.append(trial(case, config.timeout_s))
            print(f"\r{case}: {i + 1} of {config.trials}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        stopped, slowed = 1000 * np.array(times).T
        results[case] = {
            "trials": config.trials,
            **{f"still_{n}_ms": round(float(f(stopped)), 1) for n, f in (("median", np.median), ("worst", np.max))},
            **{f"slows_{n}_ms": round(float(f(slowed)), 1) for n, f in (("median", np.median), ("worst", np.max))},
        }
    print(json.dumps(results))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(ReactionTimes))
