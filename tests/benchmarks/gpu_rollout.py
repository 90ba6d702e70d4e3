"""Control steps per second on a GPU: thousands of tabletop environments with 64 x 64 pictures, in chunks of eight.

Physics, pictures, tasks and rewards stay on the device. The peer is our own CPU engine on the cores of the same
machine. Without a GPU the benchmark says so and measures nothing.

    make bench NAME=gpu_rollout ARGS="--save"
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro

from tests.benchmarks.harness import BenchmarkResult, hardware, in_turns, median_ratio, summary
from tests.benchmarks.tabletop import TabletopRollout


@dataclass(frozen=True)
class GpuRolloutBenchmarkConfig:
    """`cpu_envs`: environments of the CPU engine. `save`: keep the result beside this file."""

    task: str = "reach"
    num_envs: int = 4096
    image_size: int = 64
    chunk: int = 8
    cpu_envs: int = 256
    repeats: int = 5
    seconds: float = 4.0
    device: str = "cuda"
    save: bool = False


def main(config: GpuRolloutBenchmarkConfig) -> None:
    if not torch.cuda.is_available():
        why = "no CUDA device: the GPU engine was not measured here"
        print(why)
        BenchmarkResult(
            "gpu_rollout", None, None, None, "control steps/s", {"skipped": why, "hardware": hardware()}
        ).finish(save=False)
        return
    torch.set_num_threads(1)
    machine = hardware()
    cameras = {"agent": config.image_size}
    gpu = {"engine": "warp", "device": config.device, "final_images": False, "chunk": config.chunk}
    rollouts = {
        "gpu_vision": TabletopRollout(config.task, config.num_envs, cameras=cameras, **gpu),
        "gpu_state": TabletopRollout(config.task, config.num_envs, **gpu),
        "cpu_vision": TabletopRollout(
            config.task, config.cpu_envs, config.chunk, cameras=cameras, final_images=False
        ),
    }  # fmt: skip
    sides: dict[str, Callable[[], float]] = {
        name: lambda rollout=rollout: rollout.run(seconds=config.seconds) for name, rollout in rollouts.items()
    }
    values = in_turns(sides, config.repeats)
    for rollout in rollouts.values():
        rollout.env.close()
    BenchmarkResult(
        name="gpu_rollout",
        ours=round(median(values["gpu_vision"]), 1),
        peer=round(median(values["cpu_vision"]), 1),
        ratio=round(median_ratio(values["gpu_vision"], values["cpu_vision"]), 2),
        unit="control steps/s",
        details={
            "rates": summary(values),
            "repeats": config.repeats,
            "seconds": config.seconds,
            "task": config.task,
            "num_envs": config.num_envs,
            "image_size": config.image_size,
            "chunk": config.chunk,
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(GpuRolloutBenchmarkConfig))
