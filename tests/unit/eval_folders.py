"""Folders as `vla-rl eval` leaves them, with episodes, conditions, stages, timing, videos and chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from vla_rl.evaluation.result import Episode, EvalResult, Timing
from vla_rl.evaluation.video import write_video

SUITE = {"name": "reach_axes", "version": 3, "hash": "0123456789abcdef", "protocol": "held_out"}
STAGES = ("near", "grasped", "lifted")


def eval_folder(
    folder: Path,
    successes: int,
    *,
    n: int = 20,
    label: str = "rl",
    conditions: Mapping[str, int] | None = None,
    filmed: int = 2,
    suite: Mapping[str, object] | None = SUITE,
    task: str = "reach",
    **config: object,
) -> Path:
    """The last `successes` of `n` episodes succeed; under each of `conditions` that many do. Failures reach the stages
    in turn, none first. The first `filmed` episodes have a video of 6 steps and chunks of 4 steps, 2 of them executed.
    """
    episodes = []
    for condition, solved in {"": successes, **(conditions or {})}.items():
        for i in range(n):
            done = i >= n - solved
            stage = STAGES[-1] if done else ("", *STAGES)[i % 3]
            video = f"videos/episode_{i}.mp4" if i < filmed and not condition else ""
            episodes.append(
                Episode(
                    task, i, f"touch cube {i}", done, done, 6, float(done), done, condition=condition, stage=stage,
                    initial_state=str(i), latency_ms=3.0, video=video,
                )
            )  # fmt: skip
    values = {"policy": label, "control_hz": 10.0, "noise_seed": 0, "stage_names": list(STAGES), **config}
    values |= {"suite": dict(suite)} if suite else {}
    timing = Timing.of([2.0, 4.0, 9.0], [5.0, 6.0, 7.0], [0.6] * successes, 3.0)
    EvalResult(tuple(episodes), values, 3.0, timing).save(folder)
    generator = torch.Generator().manual_seed(successes)
    for i in range(filmed):
        frames = torch.randint(0, 255, (6, 48, 64, 3), dtype=torch.uint8, generator=generator)
        video = write_video(folder / f"videos/episode_{i}.mp4", frames, 10)
        np.savez_compressed(
            video.with_suffix(".npz"),
            chunks=np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2) * (i + 1),
            executed=np.array([2, 2, 2]),
            names=np.array(["dx", "grip"]),
        )
    origin = {
        "command": f"vla-rl eval --policy {label}",
        "revision": "abc123",
        "versions": {"torch": "2.13"},
        "cpus": 2,
    }
    (folder / "provenance.json").write_text(json.dumps(origin))
    return folder
