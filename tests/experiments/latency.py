"""Experiment: what is left of a policy when its chunks come late, and what real-time chunking saves of it.

    make experiment NAME=latency [ARGS="--seeds 0 1 2"]

The tabletop's reach, by the goal's place in the state: with pictures the same would take hours. Time is simulated, and
the parts are those of a robot: the policy as the server asks it (`ServedPolicy`), and a `ChunkBroker` for each episode.
The chunk for the observation of control step t comes at step t + d. The demo's chunks of 8 steps cannot bridge 10, so
two policies with chunks of 20 are fitted to the same demonstrations: one as usual, one with training-time real-time
chunking. Each mode and delay runs the same held-out episodes. What is done is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from vla_rl.configs import get_recipe
from vla_rl.core import Observation
from vla_rl.data.chunks import ChunkDataset
from vla_rl.data.demos import collect_demos
from vla_rl.data.lerobot_format import atomic_write_json, read_json
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.normalization import Normalizer
from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.evaluation.evaluate import policy_noise
from vla_rl.evaluation.statistics import paired_rate_difference, wilson
from vla_rl.policies.blocks.flow_matching import FlowMatchingConfig
from vla_rl.policies.build import build_policy
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.serving.broker import BrokerConfig, ChunkBroker
from vla_rl.serving.inference import ServedPolicy, read_policy
from vla_rl.serving.requests import Request
from vla_rl.serving.rtc import RTCConfig
from vla_rl.sim.experts import ExpertConfig, ScriptedExpert
from vla_rl.train.run_folder import describe_machine, hold_run_folder
from vla_rl.train.sft import DatasetSampler, run_sft

HORIZON, MAX_DELAY = 20, 10
SPEEDS, ACTION_NOISE, DEMO_STEPS = (0.3, 0.6, 1.0), 0.2, 45  # of demonstrations; 1 is 0.4 m/s
REPLAN = 4  # control steps between two observations, or as many as the chunk needs to come
MAX_STEPS = 100  # 5 s
HOLD = (0.0, 0.0, 0.0, -1.0)  # deltas: the target stays; the fingers, which this task has no use for, closed
RESULT = Path("tests/experiments/results/latency.json")


@dataclass(frozen=True)
class Mode:
    """`policy`: the folder of the one that is asked."""

    policy: Literal["plain", "trained"]
    broker: Literal["sync", "async", "ensemble", "rtc"]
    rtc: RTCConfig = field(default_factory=RTCConfig)


MODES = {
    "sync": Mode("plain", "sync"),
    "async": Mode("plain", "async"),
    "ensemble": Mode("plain", "ensemble"),
    "rtc": Mode("plain", "rtc", RTCConfig("guided")),
    "rtc_no_jacobian": Mode("plain", "rtc", RTCConfig("guided", jacobian=False)),
    "rtc_trained": Mode("trained", "rtc", RTCConfig("trained")),
    "trained_async": Mode("trained", "async"),  # the control: it is taught to continue, and not told what
}


@dataclass(frozen=True)
class Latency:
    """`seeds`: of training. `out`: where everything is kept; `result`: the summary."""

    seeds: tuple[int, ...] = (0, 1, 2)
    delays: tuple[int, ...] = (0, 1, 2, 4, 6, 8, 10)
    modes: tuple[str, ...] = tuple(MODES)
    num_episodes: int = 128
    num_demos: int = 450
    num_updates: int = 1000
    out: Path = Path("runs/experiments/latency")
    result: Path = RESULT


def make_env(num_envs: int, split: str, max_steps: int) -> TabletopEnv:
    config = TabletopConfig(
        split=split,
        privileged_state=True,
        max_episode_steps=max_steps,
        terminate_on_success=split == "test",  # a demonstration goes on at the goal: late actions are taught too
        num_threads=1,
    )
    return TabletopEnv("reach", num_envs, config)


# ------------------------------------------------------------------------------------------------------- the policies
def record(options: Latency) -> Path:
    """Demonstrations at several speeds, which no observation shows: chunks of one observation differ, and one that does
    not go on from what is executed changes the speed."""
    path = options.out / "demos"
    env = ChunkedEnv(make_env(32, "train", DEMO_STEPS), auto_reset=False)
    for i, speed in enumerate(SPEEDS, start=1):
        expert = ScriptedExpert(env, ExpertConfig(action_noise=ACTION_NOISE, max_action=speed))
        num = options.num_demos * i // len(SPEEDS)
        collect_demos(env, expert, path, num, range(10 * options.num_demos), keep="success")
    env.close()
    return path


def fit(options: Latency, demos: Path, seed: int, name: str) -> Path:
    """One policy from the demo's recipe, with longer chunks and no camera; `name` "trained" is that with prefixes."""
    recipe, folder = get_recipe("demo"), options.out / f"seed_{seed}" / name
    hold_run_folder(folder)
    dataset, spec = LeRobotDataset(demos), make_env(1, "train", DEMO_STEPS).spec
    config = TinyVLAConfig(action_horizon=HORIZON, cameras=(), flow_matching=FlowMatchingConfig(num_draws=2))
    policy: Any = build_policy(config, spec, seed=seed)
    policy.set_normalization(
        Normalizer.from_stats(dataset.stats["observation.state"], recipe.state_normalization),
        Normalizer.from_stats(dataset.stats["action"], recipe.action_normalization),
    )
    sft = replace(
        recipe.sft,
        num_updates=options.num_updates,
        seed=seed,
        augmentation=type(recipe.sft.augmentation)(),  # the state is all that it has
        max_prefix_delay=MAX_DELAY if name == "trained" else 0,
    )
    sampler = DatasetSampler(ChunkDataset(dataset, HORIZON, cameras=()), sft.batch_size, seed)
    return run_sft(policy, sampler, sft, folder, resume=True, spec=spec, tensorboard=False).policy_folder


# ------------------------------------------------------------------------------------------------------- the episodes
@dataclass
class _Request:
    """Chunks [N, H, A] of the observation at control step `observed`; `number` of the request."""

    observed: int
    number: int
    chunks: NDArray[np.float32]


class Episodes:
    """All episodes of one mode and delay, side by side: they ask at the same steps, each has a broker of its own."""

    def __init__(self, env: TabletopEnv, served: ServedPolicy, mode: Mode, delay: int, seeds: Sequence[int]) -> None:
        self.env, self.served, self.delay, self.seeds = env, served, delay, seeds
        self.hz, self.every = env.spec.control_hz, max(delay, REPLAN)
        config = BrokerConfig(self.hz, mode.broker, execution_horizon=self.every)
        self.brokers = [ChunkBroker(config) for _ in seeds]
        self.active = torch.ones(len(seeds), dtype=torch.bool)
        self.in_flight: _Request | None = None
        self.num_requests, self.asked_at = 0, -self.every

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """-> success bool [N], number of control steps int64 [N], commanded positions [T, N, 3], m."""
        n, env = len(self.seeds), self.env
        env.reset(torch.arange(n), torch.tensor(self.seeds))
        success, steps = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
        targets = [env.controller.state_dict()["target_pos"]]
        for tick in range(MAX_STEPS):
            self._deliver(tick)
            if self._is_due(tick):
                self._ask(tick)
                self._deliver(tick)
            outcome = env.step(self._actions(tick), self.active)
            steps += self.active
            success |= outcome.success & self.active
            self.active = self.active & ~outcome.terminated
            targets.append(env.controller.state_dict()["target_pos"])
            if not self.active.any():
                break
        return success, steps, torch.stack(targets)

    def _is_due(self, tick: int) -> bool:
        if self.in_flight is not None:
            return False
        if self.brokers[0].config.mode == "sync":  # asked once the chunk is used up, as in the control loop
            return all(self.brokers[i].remaining(tick / self.hz) == 0 for i in self._rows())
        return tick - self.asked_at >= self.every

    def _rows(self) -> list[int]:
        return self.active.nonzero().flatten().tolist()

    def _ask(self, tick: int) -> None:
        rows, horizon = self._rows(), self.served.policy.action_horizon
        obs: Observation = self.env.observe(torch.tensor(rows), images=False)
        requests = [
            Request({}, obs.state[j].numpy(), obs.instruction[j], **self.brokers[i].continuation(tick / self.hz))
            for j, i in enumerate(rows)
        ]
        width = self.served.policy.action_dim
        noise = [policy_noise(0, self.seeds[i], self.num_requests, horizon, width).numpy() for i in rows]
        chunks = np.zeros((len(self.seeds), horizon, width), np.float32)
        chunks[rows] = self.served.act(requests, np.stack(noise))
        self.in_flight = _Request(tick, self.num_requests, chunks)
        self.num_requests, self.asked_at = self.num_requests + 1, tick

    def _deliver(self, tick: int) -> None:
        reply = self.in_flight
        if reply is None or tick < reply.observed + self.delay:
            return
        for i in self._rows():
            self.brokers[i].offer(reply.chunks[i], reply.observed / self.hz, reply.number, tick / self.hz)
        self.in_flight = None

    def _actions(self, tick: int) -> Tensor:
        actions = torch.tensor(HOLD).repeat(len(self.seeds), 1)
        for i in self._rows():
            if (action := self.brokers[i].action_at(tick / self.hz)) is not None:
                actions[i] = torch.from_numpy(action)
        return actions


def jerk(positions: Tensor, steps: Tensor, hz: float) -> tuple[Tensor, Tensor]:
    """Mean and largest length of the third difference of `positions [T, N, 3]`, each [N], m/s^3: of `steps` control
    steps of each episode. An episode of less than three has none, 0."""
    lengths = torch.linalg.vector_norm(positions.diff(n=3, dim=0), dim=2) * hz**3
    counts = torch.arange(len(lengths))[:, None] < steps - 2
    lengths = torch.where(counts, lengths, 0.0)
    return lengths.sum(dim=0) / counts.sum(dim=0).clamp_min(1), lengths.amax(dim=0)


def run_cell(served: ServedPolicy, mode: Mode, delay: int, num_episodes: int) -> dict[str, Any]:
    """Numbers of one mode and delay; `success` holds a letter, 1 or 0, for each episode."""
    env = make_env(num_episodes, "test", MAX_STEPS)
    episodes = Episodes(env, replace(served, rtc=mode.rtc), mode, delay, range(num_episodes))
    with torch.random.fork_rng(devices=[]):
        success, steps, targets = episodes.run()
    env.close()
    mean, largest = jerk(targets, steps, episodes.hz)
    took = steps[success].double()
    return {
        "success": "".join("01"[int(x)] for x in success),
        "wrong_object": int((~episodes.active & ~success).sum()),
        "steps_to_success": float(took.mean()) if len(took) else None,
        "jerk_mean": float(mean.mean()),
        "jerk_max": float(largest.mean()),
        "starved_steps": sum(broker.counts.starved for broker in episodes.brokers) / num_episodes,
    }


# -------------------------------------------------------------------------------------------------------- the summary
def summarise(options: Latency, cells: dict[tuple[int, str, int], dict[str, Any]]) -> dict[str, Any]:
    """All seeds together: a row for each mode and delay, and the paired differences to the mode without a prefix."""
    rows, differences = [], []

    def outcomes(mode: str, delay: int) -> str:
        return "".join(cells[seed, mode, delay]["success"] for seed in options.seeds)

    for mode in options.modes:
        for delay in options.delays:
            runs = [cells[seed, mode, delay] for seed in options.seeds]
            told = outcomes(mode, delay)
            row: dict[str, Any] = {"mode": mode, "delay": delay, **wilson(told.count("1"), len(told)).as_dict()}
            for name in ("steps_to_success", "jerk_mean", "jerk_max", "starved_steps"):
                values = [run[name] for run in runs if run[name] is not None]
                row[name] = float(np.mean(values)) if values else None
            row["wrong_object"] = sum(run["wrong_object"] for run in runs)
            rows.append(row)
    for mode in (m for m in options.modes if m.startswith("rtc")):
        base = "trained_async" if MODES[mode].policy == "trained" else "async"
        for delay in options.delays if base in options.modes else ():
            pairs = list(zip(outcomes(base, delay), outcomes(mode, delay), strict=True))
            counts = [pairs.count(kind) for kind in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))]
            difference = paired_rate_difference(*counts).as_dict()
            differences.append({"mode": mode, "against": base, "delay": delay, **difference})
    return {"rows": rows, "differences": differences}


def table(rows: Sequence[dict[str, Any]], delays: Sequence[int]) -> str:
    """Markdown: success, and the mean jerk, by mode and delay."""
    lines = ["| | " + " | ".join(f"d = {d}" for d in delays) + " |", "|---" * (len(delays) + 1) + "|"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        found = {row["delay"]: row for row in rows if row["mode"] == mode}
        told = [f"{100 * found[d]['success_rate']:.0f}%, {found[d]['jerk_mean']:.0f}" for d in delays]
        lines.append(f"| {mode} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def main(options: Latency) -> None:
    """Write the summary to `options.result`."""
    torch.set_num_threads(1)
    begin, demos = time.monotonic(), record(options)
    cells: dict[tuple[int, str, int], dict[str, Any]] = {}
    for seed in options.seeds:
        policies = {name: fit(options, demos, seed, name) for name in ("plain", "trained")}
        served = {name: read_policy(path, 0, device="cpu", rtc=RTCConfig()) for name, path in policies.items()}
        for delay in options.delays:
            for name in options.modes:
                file = options.out / f"seed_{seed}" / "cells" / f"{name}_{delay}_of_{options.num_episodes}.json"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    mode = MODES[name]
                    atomic_write_json(file, run_cell(served[mode.policy], mode, delay, options.num_episodes))
                cells[seed, name, delay] = cell = read_json(file)
                rate = cell["success"].count("1") / options.num_episodes
                print(f"seed {seed}, delay {delay}, {name}: {rate:.3f}, jerk {cell['jerk_mean']:.0f} m/s^3", flush=True)
    summary = summarise(options, cells)
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items() if k not in ("out", "result")}
    about = {"horizon": HORIZON, "replan": REPLAN, "max_steps": MAX_STEPS, "jerk": "m/s^3", **plain}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    wall = round(time.monotonic() - begin, 1)
    atomic_write_json(options.result, {"config": about, **summary, "machine": describe_machine(), "wall_s": wall})
    print(table(summary["rows"], options.delays))
    print(options.result)


if __name__ == "__main__":
    main(tyro.cli(Latency))
