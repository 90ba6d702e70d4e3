"""Learning experiment: what action chunks do for offline and online RL, on OGBench's cube tasks.

    make experiment NAME=chunking [ARGS="--env cube-double-singletask-task2-v0 --data DATA"]

FQL (one step), FQL-n (the n-step target without the chunk that earned it: the biased control) and QC-FQL (chunks of 5)
learn from play data that this project makes with OGBench's own oracles, and then online with the offline data kept, as
Q-chunking does (arXiv 2507.07969). Networks, batches and updates are reduced, and the default is one cube, since two
need many hours on two cores. Published order at the end of the offline phase: QC-FQL about FQL, both far above FQL-n;
online QC-FQL ahead of both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.experiments.runner import run_jobs
from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.data.normalization import Normalizer
from vla_rl.data.ogbench_play import cut_episodes, singletask_dataset
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.envs.ogbench import make_ogbench
from vla_rl.evaluation.evaluate import evaluate
from vla_rl.evaluation.report import Curve, ReportData, ReportRow, write_report
from vla_rl.evaluation.result import EvalResult
from vla_rl.offpolicy.bc_flow import FlowNetConfig
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.learner import AgentLearner
from vla_rl.offpolicy.qc import QCConfig
from vla_rl.offpolicy.wsrl import CarryOver
from vla_rl.policies.agent import AgentPolicy, AgentPolicyConfig
from vla_rl.train.loop import run_iterations
from vla_rl.train.offpolicy import OfflineConfig, OfflineTrainer, OnlineConfig, OnlineTrainer, online_buffer
from vla_rl.train.run_folder import describe_machine, describe_source, hold_run_folder

ENV, DATA = "cube-single-singletask-task1-v0", Path("runs/ogbench/cube-single-play.npz")
FIRST_EVAL_SEED = 10**9


@dataclass(frozen=True)
class Sizes:
    """What was reduced: the paper has [512]^4, batches of 256, a million updates of each kind, 50 episodes."""

    hidden_sizes: tuple[int, ...] = (256, 256, 256)
    batch_size: int = 128
    offline_updates: int = 25_000
    online_env_steps: int = 10_000
    num_episodes: int = 50


@dataclass(frozen=True)
class Method:
    """`horizon` of the data's chunks; the biased control sees their first action only."""

    label: str
    horizon: int
    biased: bool = False


METHODS = {
    "fql": Method("FQL", 1),
    "fql_n": Method("control: FQL-n", 5, biased=True),
    "qc_fql": Method("QC-FQL", 5),
}


def agent_of(method: Method, sizes: Sizes, alpha: float) -> QCConfig:
    return QCConfig(
        policy="distilled",
        alpha=alpha,
        biased_n_step=method.biased,
        flow=FlowNetConfig(hidden_sizes=sizes.hidden_sizes),
        critic=MLPCriticConfig(2, sizes.hidden_sizes, layer_norm=True, activation="gelu"),
    )


def run_job(name: str, seed: int, env_name: str, data: Path, sizes: Sizes, alpha: float, out: Path) -> str:
    """Offline, then online, of one method and seed; both ends are evaluated."""
    torch.set_num_threads(1)
    method, folder = METHODS[name], out / f"seed_{seed}" / name
    hold_run_folder(folder)
    env = make_ogbench(env_name, 1)
    buffer = _buffer(data, env_name, env.spec.state_dim, env.spec.action.dim)

    def learner() -> AgentLearner:
        return _learner(agent_of(method, sizes, alpha), method.horizon, buffer, env, seed)

    def rate(who: AgentLearner, num_episodes: int, first: int) -> EvalResult:
        return evaluate(
            who.policy,
            lambda n: make_ogbench(env_name, n, auto_reset=False),
            range(first, first + num_episodes),
            execution_horizon=who.policy.action_horizon,
            num_envs=10,
            policy_batch_size=10,
            task=f"training seed {seed}",
            progress=False,
        )

    def curve(who: AgentLearner) -> dict[str, float]:
        r = rate(who, 20, FIRST_EVAL_SEED * 2).success_once
        return {"eval/success_rate": r.rate, "eval/success_rate_low": r.low, "eval/success_rate_high": r.high}

    offline = learner()
    config = OfflineConfig(
        num_updates=sizes.offline_updates,
        batch_size=sizes.batch_size,
        updates_per_iteration=1_000,
        eval_interval=10,
        checkpoint_interval=10,
        seed=seed,
    )
    trainer = OfflineTrainer(offline, buffer, config, env.spec)
    place = folder / "offline"
    run_iterations(
        trainer, place, config, label=f"{name} offline", resume=True, evaluate=lambda: curve(offline), tensorboard=False
    )
    if not (place / "evaluation" / "eval.json").exists():
        rate(offline, sizes.num_episodes, FIRST_EVAL_SEED).save(place / "evaluation")
    online, place = learner(), folder / "online"
    online.switch_from(offline, CarryOver(), seed)
    steps = OnlineConfig(
        num_env_steps=sizes.online_env_steps,
        execution_horizon=online.policy.action_horizon,
        warmup_env_steps=1_000,
        utd_ratio=1.0,
        updates_per_call=1,
        batch_size=sizes.batch_size,
        offline_ratio=0.5,
        env_steps_per_iteration=1_000,
        eval_interval=5,
        checkpoint_interval=5,
        seed=seed,
    )
    own = online_buffer(_replay(sizes.online_env_steps + 2_000), env.spec, 1)
    online_trainer = OnlineTrainer(online, env, own, steps, buffer)
    run_iterations(
        online_trainer,
        place,
        steps,
        label=f"{name} online",
        resume=True,
        evaluate=lambda: curve(online),
        tensorboard=False,
    )
    if not (place / "evaluation" / "eval.json").exists():
        rate(online, sizes.num_episodes, FIRST_EVAL_SEED).save(place / "evaluation")
    env.close()
    ends = [EvalResult.load(folder / stage / "evaluation").success_once for stage in ("offline", "online")]
    return f"{name} seed {seed}: offline {ends[0]}, online {ends[1]}"


def _replay(capacity: int) -> ReplayConfig:
    """OGBench's reward is minus the number of cubes out of place."""
    return ReplayConfig(capacity=capacity, gamma=0.99)


def _buffer(data: Path, env_name: str, state_dim: int, action_dim: int) -> ReplayBuffer:
    episodes = cut_episodes(singletask_dataset(data, env_name))
    rows = sum(len(e.rewards) + 1 for e in episodes)
    buffer = ReplayBuffer(_replay(rows), state_dim=state_dim, action_dim=action_dim)
    for e in episodes:
        buffer.add_episode(
            state=e.states,
            actions=e.actions,
            rewards=e.rewards,
            terminated=e.terminated,
            truncated=e.truncated,
            success=e.terminated,
        )
    return buffer


def _learner(agent: QCConfig, horizon: int, buffer: ReplayBuffer, env: Any, seed: int) -> AgentLearner:
    spec = env.spec
    policy = AgentPolicy(AgentPolicyConfig(agent, horizon, spec.state_dim, spec.action.dim))
    states = torch.from_numpy(buffer.batch(buffer.starts(1)[::10], 1).obs)
    policy.set_normalization(
        Normalizer.mean_std(states.mean(dim=0), states.std(dim=0), min_range=1e-3),
        Normalizer.action_box(spec.action),
    )
    return AgentLearner(policy, seed)


def report(out: Path, env_name: str, seeds: Sequence[int]) -> tuple[Path, dict[str, Any]]:
    """Rates at both ends, all seeds together; curves of the first."""

    def merged(name: str, stage: str) -> EvalResult:
        return EvalResult.merge([EvalResult.load(out / f"seed_{s}" / name / stage / "evaluation") for s in seeds])

    rows, curves, rates = [], [], {}
    for name, method in METHODS.items():
        role = {"fql": "baseline", "fql_n": "control", "qc_fql": "trained"}[name]
        for stage in ("offline", "online"):
            result = merged(name, stage)
            rates[f"{name} {stage}"] = result.success_once.as_dict()
            own = role if stage == "online" else "other"
            rows.append(ReportRow(f"{method.label}, {stage}", own, result))  # pyright: ignore[reportArgumentType]
        curves.append(Curve(method.label, role, out / f"seed_{seeds[0]}" / name / "online"))
    page = write_report(
        out / "report.html",
        ReportData(
            title=f"Action chunks on {env_name}",
            rows=tuple(rows),
            command="make experiment NAME=chunking",
            description="Single steps, a 5-step target without the chunk that earned it, and chunks of 5; "
            f"{len(seeds)} seeds. Curves: seed {seeds[0]}, online.",
            curves=tuple(curves),
            provenance={"revision": describe_source()["revision"], "machine": json.dumps(describe_machine())},
        ),
    )
    return page, rates


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where chunks are not behind the biased control at either end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default=ENV)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--alpha", type=float, default=100.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--offline-updates", type=int, default=Sizes.offline_updates)
    parser.add_argument("--online-env-steps", type=int, default=Sizes.online_env_steps)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/chunking"))
    o = parser.parse_args(argv)
    if not o.data.exists():
        kind = o.env.split("-singletask")[0]
        parser.error(
            f"{o.data} is not there; make it: python -m vla_rl.data.ogbench_play --env {kind} --num-episodes 200 "
            f"--path {o.data}"
        )
    sizes = Sizes(offline_updates=o.offline_updates, online_env_steps=o.online_env_steps)
    out = o.out / o.env
    jobs = [(name, seed, o.env, o.data, sizes, o.alpha, out) for seed in o.seeds for name in METHODS]
    run_jobs(run_job, jobs, o.processes)
    page, rates = report(out, o.env, o.seeds)
    behind = [
        stage
        for stage in ("offline", "online")
        if rates[f"qc_fql {stage}"]["success_rate"] < rates[f"fql_n {stage}"]["success_rate"]
    ]
    summary = {"name": "chunking", "env": o.env, "rates": rates, "passed": not behind, "machine": describe_machine()}
    atomic_write_json(out / "summary.json", summary)
    for name, rate in rates.items():
        print(f"{name:16} {rate['success_rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] n={rate['n']}")
    print("passed" if not behind else f"FAILED: QC-FQL is behind FQL-n {' and '.join(behind)}")
    print(page)
    return 0 if not behind else 1


if __name__ == "__main__":
    raise SystemExit(main())
