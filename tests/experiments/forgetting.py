"""Learning experiment: what a policy forgets while it learns one task, by supervised fine-tuning and by reinforcement.

    make experiment NAME=forgetting

The base policy is fitted to three tabletop tasks: well to the old ones, pressing a button and closing a drawer, poorly
to the new one, reaching, whose demonstrations miss by centimetres. From it, reach is improved by fine-tuning on good
demonstrations, and by Flow-SDE PPO with the demo's numbers, with and without its KL to the base. At several points of
each, the success on all tasks is measured on held-out episodes, and KL(base || policy) on states of the new task
(`vla_rl.evaluation.forgetting`). `vla-rl report` makes a page of the summary.

The policies see the state, what the sentence says in numbers, and which task it is. Ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vla_rl.evaluation
from vla_rl.configs.demo import demo
from vla_rl.core import Observation
from vla_rl.data.chunks import ChunkDataset
from vla_rl.data.demos import collect_demos
from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.normalization import Normalizer
from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.evaluation.aggregate import hierarchical_bootstrap
from vla_rl.evaluation.evaluate import evaluate
from vla_rl.evaluation.forgetting import (
    ForgettingResult,
    Role,
    mean_divergence,
    measure_forgetting,
    policy_kl,
    visited_states,
)
from vla_rl.evaluation.forgetting_report import forgetting_chart, tradeoff_chart
from vla_rl.evaluation.result import EvalResult
from vla_rl.evaluation.statistics import Rate
from vla_rl.flow import FlowSamplerConfig
from vla_rl.onpolicy import PPOConfig
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.sim.experts import ExpertConfig, ScriptedExpert
from vla_rl.train.loop import TrainConfig, run_training
from vla_rl.train.run_folder import describe_machine, describe_source
from vla_rl.train.sft import DatasetSampler, SFTConfig, run_sft

NEW, OLD = "reach", ("press", "close_drawer")
TASKS = (NEW, *OLD)
CHUNK, EXECUTED = 8, 4
CLUMSY, GOOD = ExpertConfig(action_noise=0.4, target_bias=0.03), ExpertConfig(action_noise=0.2)
SFT_UPDATES, RL_ITERATIONS = (30, 100, 300, 1000), (10, 20, 40)
SAMPLER = FlowSamplerConfig(kernel="flow_sde", mode="full", scored_horizon=EXECUTED)
SAMPLER_IN_WORDS = "Flow-SDE, 4 steps, noise level 0.5, the 4 executed steps of a chunk"
FIRST_STATE = 10**6  # seeds of the episodes whose states the divergence is on
_GOAL = 4  # numbers that a task's goal has at most


class GoalEnv(TabletopEnv):
    """A tabletop task whose state is the same for all tasks: arm, goal (filled up with zeros), and which task it is."""

    def __init__(self, task: str, num_envs: int, split: str) -> None:
        super().__init__(task, num_envs, TabletopConfig(split=split, num_threads=1))
        goal = tuple(f"goal_{i}" for i in range(_GOAL))
        self.spec = replace(self.spec, state_names=(*self.spec.state_names, *goal, *(f"is_{name}" for name in TASKS)))

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        """Never with pictures."""
        del images
        obs = super().observe(env_ids, images=False)
        goal = self.task.goal(self.view, self.variables)[env_ids].float()
        rest = goal.new_zeros(len(goal), _GOAL - goal.shape[1] + len(TASKS))
        rest[:, rest.shape[1] - len(TASKS) + TASKS.index(self.task.name)] = 1.0
        return replace(obs, state=torch.cat([obs.state, goal, rest], dim=1))


def make_env(task: str, num_envs: int, split: str, *, auto_reset: bool = False) -> ChunkedEnv:
    return ChunkedEnv(GoalEnv(task, num_envs, split), auto_reset=auto_reset)


class MixedSampler:
    """Batches in which each of several datasets has the same share."""

    def __init__(self, datasets: Sequence[ChunkDataset], batch_size: int, seed: int) -> None:
        self._parts = [DatasetSampler(dataset, batch_size // len(datasets), seed) for dataset in datasets]

    def batch(self) -> tuple[Observation, Tensor, Tensor]:
        observations, actions, masks = zip(*(part.batch() for part in self._parts), strict=True)
        return Observation.concatenate(observations), torch.cat(actions), torch.cat(masks)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(own)


def demonstrations(folder: Path, task: str, num_episodes: int, expert: ExpertConfig) -> ChunkDataset:
    """Episodes of the scripted expert, failures too."""
    env = make_env(task, 16, "train")
    collect_demos(env, ScriptedExpert(env, expert), folder, num_episodes, range(num_episodes), progress=None)
    env.close()
    return ChunkDataset(LeRobotDataset(folder), CHUNK)


def fit_base(out: Path, demos: Path, seed: int) -> Path:
    """The policy that knows the old tasks and fumbles the new one; returns its folder."""
    parts = [demonstrations(demos / "clumsy", NEW, 100, CLUMSY)]
    parts += [demonstrations(demos / task, task, 150, GOOD) for task in OLD]
    env = make_env(NEW, 1, "train")
    torch.manual_seed(seed)
    spec = env.spec
    env.close()
    policy = FlowMLP(
        FlowMLPConfig(state_dim=spec.state_dim, action_dim=spec.action.dim, action_horizon=CHUNK, width=192)
    )
    states, actions = (torch.cat([getattr(part, name) for part in parts]) for name in ("state", "action"))
    policy.set_normalization(_normalizer(states), _normalizer(actions))
    config = SFTConfig(num_updates=1500, batch_size=96 * len(parts), learning_rate=1e-3, log_interval=300, seed=seed)
    sampler = MixedSampler(parts, config.batch_size, seed)
    return run_sft(policy, sampler, config, out, resume=True, spec=spec, tensorboard=False).policy_folder


def _normalizer(values: Tensor) -> Normalizer:
    stats = {"mean": values.mean(0), "std": values.std(0)}
    return Normalizer.from_stats(stats, "mean_std")


def fine_tuned(base: Path, out: Path, demos: Path, num_updates: int, seed: int) -> Path:
    """The base fitted to good demonstrations of the new task alone."""
    dataset = demonstrations(demos / NEW, NEW, 150, GOOD)
    config = SFTConfig(num_updates=num_updates, batch_size=96, learning_rate=1e-3, warmup_updates=10, seed=seed)
    sampler = DatasetSampler(dataset, config.batch_size, seed)
    return run_sft(load_policy(base), sampler, config, out, resume=True, tensorboard=False).policy_folder


def reinforced(base: Path, out: Path, num_iterations: int, reference_kl_coef: float, seed: int) -> Path:
    """The base improved on the new task as in the demo; a longer run goes on from a shorter one in the same folder."""
    config = demo().train
    assert isinstance(config, TrainConfig)
    assert isinstance(config.algorithm, PPOConfig)
    actor = replace(config.algorithm.actor, reference_kl_coef=reference_kl_coef)
    algorithm = replace(config.algorithm, actor=actor, seed=seed)
    config = replace(config, num_iterations=num_iterations, num_envs=96, algorithm=algorithm, eval_interval=0)
    policy, folder = load_policy(base), out / f"{num_iterations}"
    if not folder.exists():
        env = make_env(NEW, config.num_envs, "train", auto_reset=True)
        trained = run_training(policy, env, config, out / "run", resume=True, tensorboard=False)
        env.close()
        shutil.copytree(trained.policy_folder, folder)
    return folder


def evaluate_all(policy: Any, num_episodes: int) -> EvalResult:
    """The deployed policy on all tasks, on held-out episodes."""
    episodes = [
        episode
        for task in TASKS
        for episode in evaluate(
            policy,
            lambda n, task=task: make_env(task, n, "test"),
            range(num_episodes),
            execution_horizon=EXECUTED,
            num_envs=64,
            policy_batch_size=64,
            task=task,
            progress=False,
        ).episodes
    ]
    return EvalResult(tuple(episodes), {"tasks": list(TASKS), "split": "test", "execution_horizon": EXECUTED})


def run_seed(out: Path, seed: int, num_episodes: int) -> ForgettingResult:
    """All policies of one seed, their evaluations and their divergences."""
    demos, folder = out / "demos", out / f"seed_{seed}"
    base = fit_base(folder / "base", demos, seed)
    policies: dict[str, Path] = {"base": base}
    roles: dict[str, Role] = {"base": "base"}
    for updates in SFT_UPDATES:
        name = f"SFT {updates}"
        policies[name], roles[name] = fine_tuned(base, folder / f"sft_{updates}", demos, updates, seed), "sft"
    for label, coefficient in (("RL", 0.02), ("RL, no KL", 0.0)):
        for iterations in RL_ITERATIONS:
            name = f"{label} {iterations}"
            policies[name] = reinforced(base, folder / label, iterations, coefficient, seed)
            roles[name] = "rl" if coefficient else "other"
    loaded: dict[str, Any] = {name: load_policy(place) for name, place in policies.items()}
    results = {name: evaluate_all(policy, num_episodes) for name, policy in loaded.items()}
    states = visited_states(
        loaded["base"], lambda n: make_env(NEW, n, "test"), range(FIRST_STATE, FIRST_STATE + 64),
        execution_horizon=EXECUTED,
    )  # fmt: skip
    divergences = {
        name: mean_divergence(policy_kl(loaded["base"], policy, states.observations, SAMPLER), states.episode)
        for name, policy in loaded.items()
        if name != "base"
    }
    return measure_forgetting(results, divergences, roles, new_tasks=[NEW], sampler=SAMPLER_IN_WORDS)


def over_seeds(results: Sequence[ForgettingResult]) -> dict[str, Any]:
    """Mean over seeds of each policy's rates and divergence; intervals by the hierarchical bootstrap."""
    summary: dict[str, Any] = {}
    for i, first in enumerate(results[0].policies):
        rows = [result.policies[i] for result in results]
        old = [[_outcomes(rate) for rate in row.old_tasks.values()] for row in rows]
        summary[first.name] = {
            "new": hierarchical_bootstrap([[_outcomes(row.new)] for row in rows]).as_dict(),
            "old": hierarchical_bootstrap(old).as_dict(),
            "kl": [0.0 if row.divergence is None else round(row.divergence.value, 4) for row in rows],
        }
    return summary


def _outcomes(rate: Rate) -> list[float]:
    return [1.0] * rate.successes + [0.0] * (rate.n - rate.successes)


def write_chart(svg: str, path: Path) -> None:
    """An SVG file of its own: the chart with the colours of the reports."""
    css = (Path(vla_rl.evaluation.__path__[0]) / "report.css").read_text(encoding="utf-8")
    opening, end, rest = svg.partition(">")
    path.write_text(f"{opening}{end}<style>{css}</style>{rest}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=256, help="of each task and policy")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/forgetting"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    for seed in options.seeds:
        results.append(run_seed(options.out, seed, options.episodes))
        write_chart(forgetting_chart(results[-1], f"Forgetting, seed {seed}"), options.out / f"seed_{seed}.svg")
        write_chart(tradeoff_chart(results[-1], f"Tasks, seed {seed}"), options.out / f"tasks_seed_{seed}.svg")
        print(f"seed {seed}\n{results[-1].format_table()}", flush=True)
    summary = {
        "name": "forgetting",
        "tasks": {"new": NEW, "old": list(OLD)},
        "sampler": SAMPLER_IN_WORDS,
        "num_episodes": options.episodes,
        "seeds": {str(seed): result.as_dict() for seed, result in zip(options.seeds, results, strict=True)},
        "over_seeds": over_seeds(results),
        "source": describe_source()["revision"],
        "machine": describe_machine(),
    }
    atomic_write_json(options.out / "summary.json", summary)
    print(json.dumps(summary["over_seeds"], indent=1), options.out / "summary.json", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
