"""What benchmarks share: peers in processes of their own, paired repeats, and one JSON line at the end.

A peer runs in a virtual environment of its own (`runs/venvs/<name>`, made when missing), one process a core, and waits
while it is not its turn. So all sides are measured on the same cores in one run, again and again in turns, and the
speed-up is the median over repeats of ours against the peer's rate of the same repeat.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).parent / "peers"
RESULTS = Path(__file__).parent / "results"
VENVS = ROOT / "runs" / "venvs"
LOGS = ROOT / "runs" / "benchmarks"


@dataclass(frozen=True)
class BenchmarkResult:
    """`ratio`: median over repeats of ours / peer; None where the peer does not run here. `unit`: of `ours`, `peer`."""

    name: str
    ours: float | None
    peer: float | None
    ratio: float | None
    unit: str
    details: dict[str, Any] = field(default_factory=dict)

    def finish(self, save: bool) -> None:
        """Print the result as one JSON line; with `save`, keep it in `results/<name>_<hardware>.json`."""
        if save:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{self.name}_{hardware_slug()}.json"
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")
            print(f"saved {path.relative_to(ROOT)}")
        print(json.dumps(asdict(self)))


# ---------------------------------------------------------------------------------------------------------- hardware
def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def gpu_model() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def hardware() -> dict[str, Any]:
    """What the numbers were taken on, and how busy it was a minute before."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "mujoco", "numpy")}
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "gpu": gpu_model(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": packages,
    }


def hardware_slug() -> str:
    name = gpu_model() or f"{cpu_model()}_{num_cores()}cores"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


# ------------------------------------------------------------------------------------------------------------- peers
class PeerUnavailableError(RuntimeError):
    """A peer cannot be installed or does not start on this machine."""


def peer_python(name: str, requirements: Sequence[str]) -> Path:
    """The interpreter of the peer's virtual environment, made with `requirements` if it is not there yet."""
    folder = VENVS / name
    python, stamp = folder / "bin" / "python", folder / ".requirements"
    wanted = "\n".join(requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {', '.join(requirements)} into {folder.relative_to(ROOT)} ...", flush=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PeerUnavailableError(f"installing {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    stamp.write_text(wanted)
    return python


class PeerGroup:
    """One process of a peer's script a core, or one alone with `all_cores`; `rate` runs them at the same time.

    The script is called as `script mode core`. It prints one JSON line when it is ready, then for every line
    `{"seconds": s}` on its input one line `{"steps": n, "seconds": s}`, and ends when the input does.
    """

    def __init__(
        self,
        python: Path,
        script: str,
        mode: str,
        environment: Mapping[str, str] | None = None,
        *,
        all_cores: bool = False,
    ) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        self._processes: list[subprocess.Popen[str]] = []
        cores = sorted(os.sched_getaffinity(0))
        for core in cores[:1] if all_cores else cores:
            log = LOGS / f"{script.removesuffix('.py')}_{mode}_{core}.log"
            with log.open("w") as errors:
                process = subprocess.Popen(
                    [str(python), str(PEERS / script), mode, str(core)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={**os.environ, **(environment or {})},
                )
            self._processes.append(process)
            self._answer(process, log)  # one after the other: compilers and shader caches do not like company

    def rate(self, seconds: float) -> float:
        """Steps per second of all processes together."""
        return sum(a["steps"] / a["seconds"] for a in self.measure(seconds))

    def measure(self, seconds: float) -> list[dict[str, float]]:
        """Each process's answer."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"seconds": seconds}) + "\n")
            process.stdin.flush()
        return [self._answer(process, None) for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._processes = []

    def _answer(self, process: subprocess.Popen[str], log: Path | None) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            self.close()
            reason = log.read_text().strip().splitlines()[-1:] if log else []
            raise PeerUnavailableError(f"the peer ended early: {' '.join(reason)[:300]}")
        return json.loads(line)


# ---------------------------------------------------------------------------------------------------------- measuring
def in_turns(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure all sides `repeats` times in turns, backwards every second time, so that a drift of the machine's speed
    meets all of them."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 == 0 else list(sides)[::-1]:
            values[name].append(sides[name]())
            print(f"repeat {repeat + 1}/{repeats}  {name}: {values[name][-1]:,.1f}", flush=True)
    return values


def median_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Median over repeats of ours / peer of the same repeat."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def summary(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {"median": round(statistics.median(v), 2), "min": round(min(v), 2), "max": round(max(v), 2)}
        for name, v in values.items()
        if v
    }
