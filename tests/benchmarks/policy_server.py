"""What the policy server adds to inference: round trip less the policy's own time, two 224 px cameras on loopback.

The server runs in a process of its own, each client in a thread of this one. The policy looks at both pictures; with
`--policy state` it looks at neither, though they are sent: that is the server almost alone. The policy's own time is
that of its call, preprocessing included. With several clients the overhead includes waiting for the batch before.

A robot asks ten times a second, and between its requests other work takes the caches; asked as fast as it answers, a
server shows what its code costs. Both are measured.

    make bench NAME=policy_server ARGS="--save"
    sudo chrt -f 1 make bench NAME=policy_server        # in front of a busy machine's other work
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import tyro

from tests.benchmarks.harness import BenchmarkResult, hardware
from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.serving.client import PolicyClient, PolicyServerError

CAMERAS = ("base", "wrist")
GOAL_MS = 1.0


@dataclass(frozen=True)
class PolicyServerConfig:
    """`num_requests`: of each client. `rates_hz`: of each client's requests, as a robot asks; 0: as fast as it gets
    answers. The first of both is the result. `save`: keep it."""

    policy: Literal["pictures", "state"] = "pictures"
    num_clients: tuple[int, ...] = (1, 8)
    num_requests: int = 500
    warm_up: int = 30
    rates_hz: tuple[float, ...] = (10.0, 0.0)
    batch_window_ms: float = 2.0
    port: int = 8765
    save: bool = False


def save_small_policy(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "pictures":
        save_policy(TinyVLA(TinyVLAConfig(state_dim=8, action_dim=7, cameras=CAMERAS, image_size=32)), folder)
    else:
        save_policy(FlowMLP(FlowMLPConfig(state_dim=8, action_dim=7, action_horizon=8)), folder)


def observation(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    images = {c: random.integers(0, 256, (224, 224, 3), dtype=np.uint8) for c in CAMERAS}
    return {"images": images, "state": np.zeros(8, np.float32), "prompt": "pick up the red block"}


def start_server(folder: Path, config: PolicyServerConfig) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-c", "import sys; from vla_rl.cli import main; sys.exit(main())", "serve"]
    options = {"--policy": folder, "--port": config.port, "--batch-window-ms": config.batch_window_ms}
    options |= {"--max-requests-per-s": 1e6}
    process = subprocess.Popen([*command, *(str(x) for option in options.items() for x in option)])
    url = f"ws://127.0.0.1:{config.port}"
    for _ in range(120):
        try:
            PolicyClient(url).close()
            return process, url
        except PolicyServerError:
            if process.poll() is not None:
                raise RuntimeError("the server did not start") from None
            time.sleep(0.5)
    raise RuntimeError("the server did not start within a minute")


def ask(url: str, seed: int, rate_hz: float, config: PolicyServerConfig) -> list[tuple[float, float, int]]:
    """Of each request: round trip and inference in ms, and how many requests the policy answered at once."""
    message, rows = observation(seed), []
    with PolicyClient(url, timeout_s=30.0, session=seed) as client:
        due = time.perf_counter()
        for i in range(config.warm_up + config.num_requests):
            if rate_hz:
                due = max(due + 1.0 / rate_hz, time.perf_counter())
                time.sleep(max(0.0, due - time.perf_counter()))
            begin = time.perf_counter()
            reply = client.infer(message)
            took = 1000.0 * (time.perf_counter() - begin)
            if i >= config.warm_up:
                rows.append((took, reply["policy_timing"]["infer_ms"], reply["vla_rl"]["num_batched"]))
    return rows


def measure(url: str, num_clients: int, rate_hz: float, config: PolicyServerConfig) -> dict[str, float]:
    begin = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as threads:
        rows = [
            r for part in threads.map(lambda seed: ask(url, seed, rate_hz, config), range(num_clients)) for r in part
        ]
    seconds = time.perf_counter() - begin
    trip, infer, batched = np.array(rows).T
    overhead = trip - infer
    numbers = {
        "overhead_p50_ms": np.percentile(overhead, 50),
        "overhead_p99_ms": np.percentile(overhead, 99),
        "inference_p50_ms": np.percentile(infer, 50),
        "round_trip_p50_ms": np.percentile(trip, 50),
        "round_trip_p99_ms": np.percentile(trip, 99),
        "batched_mean": batched.mean(),
        "requests_per_s": len(rows) / seconds,
    }
    return {name: round(float(value), 3) for name, value in numbers.items()}


def main(config: PolicyServerConfig) -> None:
    machine = hardware()
    with tempfile.TemporaryDirectory() as folder:
        save_small_policy(Path(folder), config.policy)
        process, url = start_server(Path(folder), config)
        try:
            results = {(n, rate): measure(url, n, rate, config) for n in config.num_clients for rate in config.rates_hz}
        finally:
            process.terminate()
            process.wait(timeout=20)
    named = {f"{n} at {f'{rate:g} Hz' if rate else 'once answered'}": v for (n, rate), v in results.items()}
    for name, numbers in named.items():
        print(f"clients: {name}: {numbers}")
    BenchmarkResult(
        name="policy_server" if config.policy == "pictures" else "policy_server_state",
        ours=next(iter(results.values()))["overhead_p99_ms"],
        peer=None,
        ratio=None,
        unit=f"ms, p99 of the overhead at {config.num_clients[0]} client",
        details={
            "goal_ms": GOAL_MS,
            "clients": named,
            "real_time_priority": os.sched_getscheduler(0) == os.SCHED_FIFO,
            "config": {k: v for k, v in vars(config).items() if k != "save"},
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(PolicyServerConfig))
