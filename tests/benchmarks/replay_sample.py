"""Batches of action chunks with pictures per second, from our replay buffer and from torchrl's SliceSampler.

Ours: `sample` and the pictures of both ends of each chunk, which is what a chunk critic reads, with the reward,
discount and mask made. The peer: slices of H + 1 steps with the pictures of each, its way to sample chunks, with
nothing added up. In the details: ours with the pictures of all H + 1 steps too, and the peer with its pictures in a
storage of their own, read at both ends alone. One core, one thread; the same sizes; the same number of batches.

    make bench NAME=replay_sample ARGS="--save"
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import tyro

from tests.benchmarks.harness import (
    BenchmarkResult,
    PeerGroup,
    PeerUnavailableError,
    hardware,
    in_turns,
    median_ratio,
    peer_python,
    summary,
)
from vla_rl.data.replay import ReplayBuffer, ReplayConfig

REQUIREMENTS = (f"torch=={torch.__version__.split('+')[0]}", "torchrl==0.14.1")


@dataclass(frozen=True)
class Sizes:
    """`episodes` of `steps` control steps, each with a `picture` x `picture` RGB image: 240 MB of them by default."""

    episodes: int = 380
    steps: int = 51
    picture: int = 64
    state_dim: int = 32
    action_dim: int = 7
    batch_size: int = 256
    horizon: int = 8


@dataclass(frozen=True)
class ReplaySampleBenchmarkConfig:
    """`seconds`: of one measurement. `save`: keep the result beside the benchmarks."""

    sizes: Sizes = Sizes()
    repeats: int = 5
    seconds: float = 4.0
    save: bool = False


def fill(sizes: Sizes) -> ReplayBuffer:
    rng, t = np.random.default_rng(0), sizes.steps
    buffer = ReplayBuffer(
        ReplayConfig(capacity=sizes.episodes * (t + 1), gamma=0.99),
        state_dim=sizes.state_dim,
        action_dim=sizes.action_dim,
        cameras={"agent": (sizes.picture, sizes.picture)},
    )
    for _ in range(sizes.episodes):
        buffer.add_episode(
            state=rng.standard_normal((t + 1, sizes.state_dim)),
            actions=rng.standard_normal((t, sizes.action_dim)),
            rewards=rng.standard_normal(t),
            terminated=False,
            truncated=True,
            images={"agent": rng.integers(0, 256, (t + 1, sizes.picture, sizes.picture, 3), dtype=np.uint8)},
        )
    return buffer


def batches_per_second(sample: Callable[[], Any], seconds: float) -> float:
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        sample()
        count += 1
    return count / elapsed


def our_sides(sizes: Sizes, seconds: float) -> dict[str, Callable[[], float]]:
    buffer, rng = fill(sizes), np.random.default_rng(1)

    def ends() -> Any:
        batch = buffer.sample(sizes.batch_size, rng, horizon=sizes.horizon)
        return batch, buffer.observations(batch.rows), buffer.observations(batch.next_rows)

    def all_pictures() -> Any:
        batch = buffer.sample(sizes.batch_size, rng, horizon=sizes.horizon, prefixes=True)
        assert batch.prefix_next_rows is not None
        rows = np.concatenate([batch.rows[:, None], batch.prefix_next_rows], axis=1)
        return batch, buffer.observations(rows.ravel())

    def state_alone() -> Any:
        return buffer.sample(sizes.batch_size, rng, horizon=sizes.horizon)

    sides = {"ours": ends, "ours_all_pictures": all_pictures, "ours_state_alone": state_alone}
    for sample in sides.values():  # memory is handed out at first use
        for _ in range(5):
            sample()
    return {name: lambda sample=sample: batches_per_second(sample, seconds) for name, sample in sides.items()}


def main(config: ReplaySampleBenchmarkConfig) -> None:
    torch.set_num_threads(1)
    machine, cores = hardware(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # peers inherit it: all sides on one and the same core
    sides = our_sides(config.sizes, config.seconds)
    peers: dict[str, PeerGroup] = {}
    skipped = {}
    try:
        python = peer_python("torchrl", REQUIREMENTS)
        for mode in ("slices", "ends"):
            peers[mode] = PeerGroup(
                python, "torchrl_slices.py", mode, {"REPLAY_SIZES": json.dumps(asdict(config.sizes))}
            )
    except PeerUnavailableError as error:
        skipped["torchrl"] = str(error)
    try:
        sides |= {f"torchrl_{mode}": lambda group=group: group.rate(config.seconds) for mode, group in peers.items()}
        values = in_turns(sides, config.repeats)
    finally:
        for group in peers.values():
            group.close()
        os.sched_setaffinity(0, cores)
    ratios = {name: round(median_ratio(values["ours"], v), 2) for name, v in values.items() if name != "ours"}
    if "torchrl_slices" in values:
        same = round(median_ratio(values["ours_all_pictures"], values["torchrl_slices"]), 2)
        ratios["all_pictures_on_both_sides"] = same
    BenchmarkResult(
        name="replay_sample",
        ours=round(median(values["ours"]), 1),
        peer=round(median(values["torchrl_slices"]), 1) if "torchrl_slices" in values else None,
        ratio=ratios.get("torchrl_slices"),
        unit="batches/s",
        details={
            "rates": summary(values),
            "ratios": ratios,
            "repeats": config.repeats,
            "sizes": asdict(config.sizes),
            "peer_packages": REQUIREMENTS,
            "skipped": skipped,
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(ReplaySampleBenchmarkConfig))
