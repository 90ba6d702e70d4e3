"""What the learning experiments share: methods times seeds in processes, each resumable; summary and report.

An experiment is a module with `EXPERIMENT`, and runs as `python -m tests.experiments.NAME --seeds 0 1 2`.
Every method starts from the policy of its seed and is evaluated on the same held-out episodes. The summary says
whether what is required holds: each trained method's rate at least `required`, each control's at most `control_margin`
above the start, and of each pair in `ahead` the first method's rate above the second's, all seeds together.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.evaluation.compare import compare
from vla_rl.evaluation.evaluate import evaluate
from vla_rl.evaluation.report import Curve, ReportData, ReportRow, write_report
from vla_rl.evaluation.result import EvalResult
from vla_rl.policies.checkpoints.config_json import config_to_dict
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.progress import format_duration
from vla_rl.train.loop import POLICY_FOLDER, TrainConfig, run_training
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.offpolicy_stages import reinforce_from_replay
from vla_rl.train.recipe import Recipe
from vla_rl.train.run_folder import describe_machine, describe_source, hold_run_folder
from vla_rl.train.stages import fine_tune, record_demos

START = "sft"


@dataclass(frozen=True)
class Method:
    """`role`: a "trained" one must reach `required`; a "control" must not learn; of an "other" nothing is required.
    `inner`: its name in the report, and the folder inside the run's, of an earlier stage's policy to evaluate too.
    `train_env(start)`: where it trains, given the start's folder; None: in the experiment's environments."""

    label: str
    train: TrainConfig | OffPolicyConfig
    role: Literal["trained", "control", "other"] = "trained"
    inner: tuple[str, str] | None = None
    train_env: Callable[[Path], ChunkedEnv] | None = None


@dataclass(frozen=True)
class Experiment:
    """`prepare(seed, folder)` writes the starting policy to `folder/policy`. `make_env(num_envs, split, auto_reset)`:
    "train" or "test". `start_range`: where the starting rate must lie. `num_envs`: of an evaluation.
    `curve_episodes`: of each point of a learning curve. `processes`: how many jobs may run at once."""

    name: str
    title: str
    prepare: Callable[[int, Path], None]
    make_env: Callable[[int, str, bool], ChunkedEnv]
    methods: dict[str, Method]
    num_episodes: int
    first_episode: int
    required: float
    start_range: tuple[float, float]
    control_margin: float = 0.08
    ahead: tuple[tuple[str, str], ...] = ()
    num_envs: int = 64
    curve_episodes: int = 128
    processes: int = 2


def start_of(recipe: Recipe) -> Callable[[int, Path], None]:
    """`prepare` of an experiment: the recipe's demonstrations and fine-tuned policy."""

    def prepare(seed: int, folder: Path) -> None:
        made = recipe.with_seed(seed)
        record_demos(made, folder / "demos")
        fine_tune(made, folder / "demos", folder, resume=True)

    return prepare


def envs_of(recipe: Recipe) -> Callable[[int, str, bool], ChunkedEnv]:
    """`make_env` of an experiment, with pictures of episodes' ends where training needs them."""

    def make_env(num_envs: int, split: str, auto_reset: bool) -> ChunkedEnv:
        return recipe.env.make(num_envs, split=split, auto_reset=auto_reset, final_images=auto_reset)

    return make_env


def main_of_task(module: str, tasks: Mapping[str, str], argv: Sequence[str]) -> int:
    """`main` of a module with an experiment for each of `tasks` (task -> its name there); `--task` chooses."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--task", choices=list(tasks), default=next(iter(tasks)))
    options, rest = parser.parse_known_args(argv)
    return main(f"{module}:{tasks[options.task]}", rest)


def find(module: str) -> Experiment:
    """`EXPERIMENT` of a module, or what `module:NAME` says."""
    path, _, name = module.partition(":")
    return getattr(importlib.import_module(path), name or "EXPERIMENT")


def main(module: str, argv: Sequence[str] | None = None) -> int:
    """Run the experiment that `find` finds. Returns 0 where everything required holds."""
    experiment = find(module)
    parser = argparse.ArgumentParser(description=importlib.import_module(module.partition(":")[0]).__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(experiment.methods), default=list(experiment.methods))
    parser.add_argument("--iterations", type=int, help="instead of the methods' own number")
    parser.add_argument("--processes", type=int, default=experiment.processes)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments") / experiment.name)
    options = parser.parse_args(argv)
    start = time.monotonic()
    for jobs in (
        [(START, seed) for seed in options.seeds],
        [(method, seed) for seed in options.seeds for method in options.methods],
    ):
        run_jobs(
            run_job,
            [(module, method, seed, options.iterations, options.out) for method, seed in jobs],
            options.processes,
        )
    summary = summarise(experiment, options.out, options.seeds, options.methods)
    summary["wall_s"] = round(time.monotonic() - start, 1)
    atomic_write_json(options.out / "summary.json", summary)
    report = _report(experiment, module, options.out, options.seeds, options.methods)
    verdict = "passed" if summary["passed"] else "FAILED: " + "; ".join(summary["failures"])
    print(f"{verdict}\n{options.out / 'summary.json'}\n{report}")
    return 0 if summary["passed"] else 1


def run_jobs(function: Callable[..., str], jobs: Sequence[tuple[Any, ...]], processes: int) -> None:
    """Call `function(*job)` for every job, so many at a time, and print what each returns.

    Each has a process of its own: JAX keeps what it compiled, and the data that it was compiled with, until it ends.
    """
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        submitted = [pool.submit(function, *job) for job in jobs]
        for done, future in enumerate(as_completed(submitted), start=1):
            left = (time.monotonic() - start) / done * (len(jobs) - done)
            print(f"[{done}/{len(jobs)}, about {format_duration(left)} left] {future.result()}", flush=True)


def run_job(module: str, name: str, seed: int, num_iterations: int | None, out: Path) -> str:
    """Train and evaluate one method with one seed, or only evaluate the start; what is done is not done again."""
    torch.set_num_threads(1)
    experiment = find(module)
    folder, source = out / f"seed_{seed}" / name, out / f"seed_{seed}" / START
    hold_run_folder(folder)
    if not (folder / "evaluation" / "eval.json").exists():
        if name == START:
            experiment.prepare(seed, folder)
        else:
            _train(experiment, experiment.methods[name], seed, num_iterations, source, folder)
        _evaluate(experiment, seed, folder / POLICY_FOLDER).save(folder / "evaluation")
        inner = experiment.methods[name].inner if name != START else None
        if inner is not None:
            as_name, place = inner
            _evaluate(experiment, seed, folder / place / POLICY_FOLDER).save(
                out / f"seed_{seed}" / as_name / "evaluation"
            )
    return f"{name} seed {seed}: {EvalResult.load(folder / 'evaluation').success_once}"


def _train(
    experiment: Experiment, method: Method, seed: int, num_iterations: int | None, source: Path, folder: Path
) -> None:
    config = method.train.with_seed(seed)
    curve = replace(experiment, num_episodes=experiment.curve_episodes, first_episode=experiment.first_episode + 10**6)

    def measure(policy: Any) -> dict[str, float]:
        rate = _rate(curve, policy, seed).success_once
        return {"eval/success_rate": rate.rate, "eval/success_rate_low": rate.low, "eval/success_rate_high": rate.high}

    def train_env(num_envs: int) -> ChunkedEnv:
        if method.train_env is not None:
            return method.train_env(source)
        return experiment.make_env(num_envs, "train", True)

    if isinstance(config, OffPolicyConfig):
        reinforce_from_replay(
            config,
            train_env,
            folder,
            policy=lambda spec: load_policy(source / POLICY_FOLDER, spec=spec),
            dataset_path=source / "demos",
            resume=True,
            evaluate=measure,
        )
        return
    if num_iterations is not None:
        config = replace(config, num_iterations=num_iterations)
    env = train_env(config.num_envs)
    policy: Any = load_policy(source / POLICY_FOLDER, spec=env.spec)
    run_training(policy, env, config, folder, resume=True, evaluate=lambda: measure(policy), tensorboard=False)
    env.close()


def _evaluate(experiment: Experiment, seed: int, policy_folder: Path) -> EvalResult:
    return _rate(experiment, load_policy(policy_folder), seed)


def _rate(experiment: Experiment, policy: Any, seed: int) -> EvalResult:
    """The training seed stands in the task's name: several of them make one result of many episodes."""
    first = experiment.first_episode
    return evaluate(
        policy,
        lambda n: experiment.make_env(n, "test", False),
        range(first, first + experiment.num_episodes),
        execution_horizon=next(iter(experiment.methods.values())).train.execution_horizon,
        num_envs=experiment.num_envs,
        policy_batch_size=experiment.num_envs,
        task=f"training seed {seed}",
        progress=False,
    )


def summarise(experiment: Experiment, out: Path, seeds: Sequence[int], methods: Sequence[str]) -> dict[str, Any]:
    """Rates of every run, and what of the requirements does not hold."""
    runs, failures = [], []
    for seed in seeds:
        before = EvalResult.load(out / f"seed_{seed}" / START / "evaluation").success_once
        if not experiment.start_range[0] <= before.rate <= experiment.start_range[1]:
            failures.append(f"the start of seed {seed} is {before}, required within {experiment.start_range}")
        for name in methods:
            after = EvalResult.load(out / f"seed_{seed}" / name / "evaluation").success_once
            role = experiment.methods[name].role
            bound = experiment.required if role == "trained" else before.rate + experiment.control_margin
            if role != "other" and ((after.rate < bound) if role == "trained" else (after.rate > bound)):
                failures.append(
                    f"{name} seed {seed} is {after}, required {'>=' if role == 'trained' else '<='} {bound:.3f}"
                )
            runs.append({"method": name, "role": role, "seed": seed, "sft": before.as_dict(), "rl": after.as_dict()})
            inner = experiment.methods[name].inner
            if inner is not None:
                at = EvalResult.load(out / f"seed_{seed}" / inner[0] / "evaluation").success_once.as_dict()
                runs.append({"method": inner[0], "role": "other", "seed": seed, "sft": before.as_dict(), "rl": at})
    leads = []
    evaluated = {START, *(run["method"] for run in runs)}
    for first, second in experiment.ahead:
        if {first, second} <= evaluated:
            lead = compare(_merged(out, seeds, second), _merged(out, seeds, first)).overall.difference
            leads.append({"ahead": first, "of": second, **lead.as_dict()})
            if lead.low <= 0.0:
                failures.append(f"{first} is ahead of {second} by {lead}, required an interval above 0")
    return {
        "name": experiment.name,
        "passed": not failures,
        "failures": failures,
        "required": {"rl_at_least": experiment.required, "control_at_most_above_sft": experiment.control_margin},
        "runs": runs,
        "ahead": leads,
        "env_steps": {name: _num_env_steps(experiment.methods[name].train) for name in methods},
        "methods": {name: config_to_dict(experiment.methods[name].train) for name in methods},
        "machine": describe_machine(),
    }


def _num_env_steps(config: TrainConfig | OffPolicyConfig) -> int:
    """Control steps of interaction that a method pays for."""
    if isinstance(config, OffPolicyConfig):
        return 0 if config.online is None else config.online.num_env_steps
    decisions = getattr(config.algorithm, "num_decisions", 0)
    return config.num_iterations * config.num_envs * decisions * config.execution_horizon


def _metrics_folder(folder: Path) -> Path:
    """Where the curve of a run lies: learning from replay has one a stage."""
    return next((folder / stage for stage in ("online", "offline") if (folder / stage).exists()), folder)


def _merged(out: Path, seeds: Sequence[int], name: str) -> EvalResult:
    return EvalResult.merge([EvalResult.load(out / f"seed_{seed}" / name / "evaluation") for seed in seeds])


def _report(experiment: Experiment, module: str, out: Path, seeds: Sequence[int], methods: Sequence[str]) -> Path:
    def merged(name: str) -> EvalResult:
        return _merged(out, seeds, name)

    first = next(name for name in methods if experiment.methods[name].role == "trained")
    rows = [ReportRow("start", "baseline", merged(START), "the policy that every method starts from")]
    curves = []
    for name in methods:
        method = experiment.methods[name]
        role = "control" if method.role == "control" else "trained" if name == first else "other"
        if method.inner is not None:
            rows.append(ReportRow(method.inner[0], "other", merged(method.inner[0])))
        rows.append(ReportRow(method.label, role, merged(name)))
        metrics = _metrics_folder(out / f"seed_{seeds[0]}" / name)
        curves.append(Curve(method.label, role, metrics))
    source = describe_source()
    return write_report(
        out / "report.html",
        ReportData(
            title=experiment.title,
            rows=tuple(rows),
            command=f"make experiment NAME={module.rpartition('.')[2].partition(':')[0]}",
            description=f"{len(seeds)} training seeds, {experiment.num_episodes} held-out episodes each. Curves: seed "
            f"{seeds[0]}.",
            curves=tuple(curves),
            provenance={
                "revision": source["revision"],
                "machine": json.dumps(describe_machine()),
                "methods": json.dumps({n: config_to_dict(experiment.methods[n].train) for n in methods}, indent=2),
            },
        ),
    )
