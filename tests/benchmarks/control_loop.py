"""The control loop at 100 Hz with inference running: how late its ticks are, and what the way through the supervisor
costs. An arm without physics; the supervisor and the policy are processes of their own, as on an arm.

Twice: as the machine is, and beside `--busy` processes that compute all the time.

    make bench NAME=control_loop ARGS="--save"
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from tests.benchmarks.harness import BenchmarkResult, hardware
from tests.unit.sim_arm import SPEC, Reaching, SimArm, SimCamera
from vla_rl.real_robot.control_loop import ControlLoop, LoopParts
from vla_rl.real_robot.inference import Inference, PolicyProcess
from vla_rl.real_robot.loop_config import LoopConfig
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.supervisor import SupervisorClient, SupervisorConfig
from vla_rl.serving.broker import BrokerConfig

GOAL_MS = 1.0


@dataclass(frozen=True)
class ControlLoopBenchmark:
    """`seconds`: of each case. `busy`: processes that compute beside the second case; 0: as many as cores.
    `inference_s`: of computing for each chunk. `save`: keep the result beside it."""

    seconds: float = 20.0
    busy: int = 0
    inference_s: float = 0.05
    save: bool = False


class ComputingPolicy(Reaching):
    """Multiplies matrices for `delay_s` instead of sleeping."""

    def __call__(self, observation: dict) -> np.ndarray:
        end, self.delay_s, delay = time.monotonic() + self.delay_s, 0.0, self.delay_s
        matrix = np.ones((256, 256), np.float32)
        while time.monotonic() < end:
            matrix = matrix @ matrix / 256
        chunk = super().__call__(observation)
        self.delay_s = delay
        return chunk


def _compute() -> None:
    while True:
        np.linalg.svd(np.ones((128, 128)))


def measure(config: ControlLoopBenchmark) -> dict[str, Any]:
    """One run of the loop: ms."""
    safety = SafetyConfig(speed_scale=1.0, max_state_age_s=1.0, max_clamped_fraction=1.0)
    policy = PolicyProcess(functools.partial(ComputingPolicy, delay_s=config.inference_s))
    inference = Inference(policy)
    begins: list[float] = []
    supervisor = SupervisorConfig(safety=safety, timeout_s=1.0)
    try:
        with SupervisorClient.start(functools.partial(SimArm, ""), supervisor) as arm:
            parts = LoopParts(arm, [SimCamera()], inference, on_tick=lambda tick: begins.append(tick.at))
            loop = ControlLoop(parts, LoopConfig("go", BrokerConfig(SPEC.rate_hz), max_picture_age_s=2.0, grace_s=5.0))
            loop.start()
            report = loop.run(config.seconds)
    finally:
        inference.close()
        policy.close()
    late = 1000 * np.array(report.late_s)
    error = np.abs(1000 * np.diff(begins) - 1000 / SPEC.rate_hz)
    return {
        "ticks": report.ticks,
        "missed": report.missed,
        "stopped": report.stop_reason,
        **{f"late_p{q}_ms": round(float(np.percentile(late, q)), 3) for q in (50, 99, 100)},
        **{f"period_error_p{q}_ms": round(float(np.percentile(error, q)), 3) for q in (50, 99, 100)},
    }


def main(config: ControlLoopBenchmark) -> None:
    machine = hardware()
    idle = measure(config)
    print(f"as the machine is: {idle}", flush=True)
    count = config.busy or len(os.sched_getaffinity(0))
    burners = [multiprocessing.Process(target=_compute, daemon=True) for _ in range(count)]
    for process in burners:
        process.start()
    try:
        busy = measure(config)
    finally:
        for process in burners:
            process.kill()
    print(f"beside {count} processes that compute: {busy}")
    BenchmarkResult(
        name="control_loop",
        ours=idle["period_error_p99_ms"],
        peer=None,
        ratio=None,
        unit=f"ms, p99 of the period's error at {SPEC.rate_hz:.0f} Hz with inference running",
        details={
            "goal_ms": GOAL_MS,
            "as_it_is": idle,
            "busy": busy,
            "config": {"seconds": config.seconds, "busy": count, "inference_s": config.inference_s},
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(ControlLoopBenchmark))
