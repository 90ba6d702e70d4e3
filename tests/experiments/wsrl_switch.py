"""Learning experiment: what happens at the switch from offline to online RL without the offline data.

    make experiment NAME=wsrl_switch [ARGS="--task maze --seeds 0 1 2"]

On a sparse maze, and on the tabletop's reach from the state, every arm of a seed starts from the same offline agent,
CQL or Cal-QL, and interacts from starts that the broad offline data rarely has. Two numbers are followed every 250
decisions: success on 50 held-out episodes, and the mean Q of 512 offline chunks, which should not move much. On the
table a decision is a chunk of 4 steps, so warm-up and updates are counted in decisions on both.

Required, over the seeds: going on with CQL without its data stays at .3 or falls and drifts at least five times as far
as WSRL from the same agent, which reaches .9 on these 50; WSRL from Cal-QL dips by at most .15; it needs fewer updates
to .9 than RLPD from nothing. Longer and shorter warm-ups and what is carried over are reported as they come out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from tests.experiments.runner import run_jobs
from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.data.normalization import Normalizer
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.envs.point_maze import make_point_maze, waypoint_episodes
from vla_rl.envs.tabletop import make_tabletop
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.evaluation.evaluate import evaluate
from vla_rl.evaluation.report import Curve, Panel, ReportData, ReportRow, write_report
from vla_rl.evaluation.result import EvalResult
from vla_rl.offpolicy.calql import CalQLConfig, ConservativeConfig
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.learner import AgentLearner
from vla_rl.offpolicy.networks import ActorNetConfig
from vla_rl.offpolicy.sac import SACConfig
from vla_rl.offpolicy.wsrl import CarryOver
from vla_rl.policies.agent import AgentPolicy, AgentPolicyConfig
from vla_rl.sim.experts import ExpertConfig, ScriptedExpert
from vla_rl.train.loop import run_iterations
from vla_rl.train.metrics import read_metrics
from vla_rl.train.offpolicy import OfflineConfig, OfflineTrainer, OnlineConfig, OnlineTrainer, online_buffer
from vla_rl.train.run_folder import describe_machine, describe_source, hold_run_folder

NUM_EVAL_EPISODES, FIRST_EVAL_SEED = 50, 10**9
NUM_FINAL_EPISODES = 200
NUM_PROBES = 512
DECISIONS_BETWEEN_EVALS = 250
UPDATES_PER_DECISION = 4.0


# ------------------------------------------------------------------------------------------------------------- tasks
@dataclass(frozen=True)
class Task:
    """`fill(buffer, seed)`: broad offline data of mixed quality. `make_env(num_envs, auto_reset)`: training resets
    itself, evaluation does not. `offline_updates`: enough to learn something, and not everything. `conservative`: the
    form of its term and how many chunks it draws; `calql_alpha`: its weight where it is calibrated."""

    make_env: Callable[[int, bool], ChunkedEnv]
    fill: Callable[[ReplayBuffer, int], None]
    replay: ReplayConfig
    horizon: int
    hidden_sizes: tuple[int, ...]
    offline_updates: int
    online_decisions: int
    conservative: ConservativeConfig
    calql_alpha: float
    tau: float = 0.02
    num_critics: int = 4
    batch_size: int = 128


def _fill_maze(buffer: ReplayBuffer, seed: int) -> None:
    for episode in waypoint_episodes("wall_gap", 300, seed):
        buffer.add_episode(
            state=episode.states,
            actions=episode.actions,
            rewards=episode.rewards,
            terminated=episode.terminated,
            truncated=episode.truncated,
            success=episode.terminated,
        )


def _tabletop(num_envs: int, auto_reset: bool) -> ChunkedEnv:
    """Training resets itself; evaluation does not, and has the starts of the split "test"."""
    split = "train" if auto_reset else "test"
    return make_tabletop("reach", num_envs, split=split, privileged_state=True, auto_reset=auto_reset, num_threads=1)


def _fill_tabletop(buffer: ReplayBuffer, seed: int) -> None:
    """Experts of every clumsiness, failures included."""
    for part, (noise, bias) in enumerate(((0.3, 0.0), (0.6, 0.02), (0.9, 0.04))):
        env = make_tabletop("reach", 100, privileged_state=True, auto_reset=False, num_threads=1)
        expert = ScriptedExpert(env, ExpertConfig(action_noise=noise, target_bias=bias, max_action=0.7))
        obs = env.reset([10**6 * (seed + 1) + 1000 * part + i for i in range(100)])
        states, actions, rewards, ends = [obs.state], [], [], []
        terminated = success = torch.zeros(100, dtype=torch.bool)
        while not ends or not bool(torch.stack(ends).any(dim=0).all()):
            chunk = expert()
            step = env.step(chunk)
            states.append(step.obs.state)
            actions.append(env.spec.action.clamp(chunk[:, 0]))
            rewards.append(step.rewards[:, 0])
            ends.append(step.ended)
            terminated, success = terminated | step.terminated, success | step.success
        length = torch.stack(ends).int().argmax(dim=0) + 1
        env.close()
        for i, t in enumerate(length.tolist()):
            buffer.add_episode(
                state=torch.stack(states)[: t + 1, i].numpy(),
                actions=torch.stack(actions)[:t, i].numpy(),
                rewards=torch.stack(rewards)[:t, i].numpy(),
                terminated=bool(terminated[i]),
                truncated=not terminated[i],
                success=bool(success[i]),
            )


TASKS = {
    "maze": Task(
        make_env=lambda n, auto_reset: make_point_maze(n, layout="wall_gap", start="far", auto_reset=auto_reset),
        fill=_fill_maze,
        replay=ReplayConfig(capacity=20_000, gamma=0.97, reward_bias=-1.0, reward_low=0.0),
        horizon=1,
        hidden_sizes=(128, 128),
        offline_updates=4_000,
        online_decisions=4_000,
        conservative=ConservativeConfig(num_actions=4),
        calql_alpha=1.0,
    ),
    "tabletop": Task(
        make_env=_tabletop,
        fill=_fill_tabletop,
        # 1 at success and not -1 a step: touching another object ends an episode too, and would end the costs
        replay=ReplayConfig(capacity=40_000, gamma=0.95, reward_scale=10.0, reward_low=0.0),
        horizon=4,
        hidden_sizes=(256, 256),
        offline_updates=3_000,
        online_decisions=4_000,
        conservative=ConservativeConfig(num_actions=2, form="logsumexp"),
        calql_alpha=5.0,
    ),
}


# -------------------------------------------------------------------------------------------------------------- arms
def sac_of(task: Task) -> SACConfig:
    """A small temperature: rewards are -1 a step, and WSRL's initial 1 would drown them (its rewards are ten times)."""
    return SACConfig(
        actor=ActorNetConfig(task.hidden_sizes),
        critic=MLPCriticConfig(task.num_critics, task.hidden_sizes),
        actor_learning_rate=3e-4,
        temperature_learning_rate=3e-4,
        initial_temperature=0.1,
        tau=task.tau,
    )


def pessimistic(task: Task, calibrate: bool) -> CalQLConfig:
    """CQL with its own alpha 5; Cal-QL with the task's.

    Maze, one run each: with alpha 5 Cal-QL's values of the data lie above the returns, by the plain log-sum-exp below
    them (-13.4, where WSRL settles at -9.4), and success falls at the switch, from .74 to 0 and from 1.0 to .6. With 1
    there was no dip. Table, one run each (seed 0): with alpha 1 it fell from .88 to .58, with 5 from .84 to .74.
    """
    term = replace(task.conservative, alpha=task.calql_alpha if calibrate else 5.0, calibrate=calibrate)
    return CalQLConfig(sac_of(task), term)


@dataclass(frozen=True)
class Arm:
    """`source`: the offline agent it starts from. `keeps_pessimism`: goes on with that agent instead of SAC."""

    label: str
    source: str | None
    warmup_decisions: int = 1000
    carried: CarryOver = field(default_factory=CarryOver)
    keeps_pessimism: bool = False
    wrong_reward: bool = False
    offline_ratio: float = 0.0


ARMS = {
    "wsrl_calql": Arm("WSRL from Cal-QL", "calql"),  # K = 1000
    "wsrl_calql_k0": Arm("WSRL from Cal-QL, K = 0", "calql", warmup_decisions=0),
    "wsrl_calql_k2000": Arm("WSRL from Cal-QL, K = 2000", "calql", warmup_decisions=2000),
    "calql_online": Arm("Cal-QL goes on, no data", "calql", keeps_pessimism=True),
    "wsrl_cql": Arm("WSRL from CQL", "cql"),
    "cql_online": Arm("CQL goes on, no data", "cql", keeps_pessimism=True),
    "rlpd": Arm("RLPD from nothing", None, warmup_decisions=250, offline_ratio=0.5),
    "fresh_target": Arm("control: fresh target network", "calql", carried=CarryOver(target="fresh")),
    "reset_moments": Arm("control: new optimisers", "calql", carried=CarryOver(moments=False)),
    "reset_temperature": Arm("control: new temperature", "calql", carried=CarryOver(temperature=False)),
    "wrong_reward": Arm("control: wrong reward", "calql", wrong_reward=True),
}
OFFLINE = ("calql", "cql")


# -------------------------------------------------------------------------------------------------------------- jobs
def _data(task: Task, seed: int, env: ChunkedEnv) -> ReplayBuffer:
    buffer = ReplayBuffer(task.replay, state_dim=env.spec.state_dim, action_dim=env.spec.action.dim)
    task.fill(buffer, seed)
    return buffer


def _learner(task: Task, agent: Any, data: ReplayBuffer, env: ChunkedEnv, seed: int) -> AgentLearner:
    """Normalised by the offline data, whichever the arm."""
    policy = AgentPolicy(AgentPolicyConfig(agent, task.horizon, env.spec.state_dim, env.spec.action.dim))
    states = torch.from_numpy(data.batch(data.starts(1), 1).obs)
    policy.set_normalization(
        Normalizer.mean_std(states.mean(dim=0), states.std(dim=0)), Normalizer.action_box(env.spec.action)
    )
    return AgentLearner(policy, seed)


def _success(task: Task, learner: AgentLearner, num_episodes: int, seed: int = 0) -> EvalResult:
    """The training seed stands in the task's name: several of them make one result of many episodes."""
    return evaluate(
        learner.policy,
        lambda n: task.make_env(n, False),
        range(FIRST_EVAL_SEED, FIRST_EVAL_SEED + num_episodes),
        execution_horizon=task.horizon,
        num_envs=50,
        policy_batch_size=50,
        task=f"training seed {seed}",
        progress=False,
    )


class _Watch:
    """Success, probe Q, updates, and whether any parameter has moved since the switch."""

    def __init__(self, task: Task, learner: AgentLearner, data: ReplayBuffer) -> None:
        self._task, self._learner = task, learner
        rows = np.random.default_rng(0).choice(data.starts(task.horizon), NUM_PROBES, replace=False)
        self._probe = learner.normalized(data.batch(rows, task.horizon))
        self._start = jax.tree.map(np.array, learner.state.params)
        self._updates = int(learner.state.num_updates)

    def __call__(self) -> dict[str, float]:
        state, nets = self._learner.state, self._learner.agent.nets
        rate = _success(self._task, self._learner, NUM_EVAL_EPISODES).success_once
        out = nets.critic(state.params["critic"], self._probe.obs, self._probe.actions)
        same = jax.tree.map(lambda a, b: np.array_equal(a, np.asarray(b)), self._start, dict(state.params))
        return {
            "eval/success_rate": rate.rate,
            "eval/success_rate_low": rate.low,
            "eval/success_rate_high": rate.high,
            "probe/q": float(out.mean()),
            "probe/num_updates": float(int(state.num_updates) - self._updates),
            "probe/parameters_moved": float(not all(jax.tree.leaves(same))),
        }


def run_offline(task_name: str, kind: str, seed: int, out: Path) -> str:
    """Train the offline agent of a seed and evaluate it."""
    torch.set_num_threads(1)
    task, folder = TASKS[task_name], out / f"seed_{seed}" / kind
    hold_run_folder(folder)
    if not (folder / "evaluation" / "eval.json").exists():
        env = task.make_env(1, True)
        learner, trainer = _offline_trainer(task, kind, seed, env)
        run_iterations(trainer, folder, trainer.config, label=kind, resume=True, tensorboard=False)
        _success(task, learner, NUM_FINAL_EPISODES, seed).save(folder / "evaluation")
        start = _Watch(task, learner, _data(task, seed, env))()
        atomic_write_json(folder / "start.json", start)
        env.close()
    return f"{kind} seed {seed}: {EvalResult.load(folder / 'evaluation').success_once}"


def _offline_trainer(task: Task, kind: str, seed: int, env: ChunkedEnv) -> tuple[AgentLearner, OfflineTrainer]:
    data = _data(task, seed, env)
    learner = _learner(task, pessimistic(task, kind == "calql"), data, env, seed)
    config = OfflineConfig(
        num_updates=task.offline_updates, batch_size=task.batch_size, updates_per_iteration=500, seed=seed
    )
    return learner, OfflineTrainer(learner, data, config, env.spec)


def run_arm(task_name: str, name: str, seed: int, num_decisions: int | None, out: Path) -> str:
    """One arm of a seed, from the switch on."""
    torch.set_num_threads(1)
    task, arm, folder = TASKS[task_name], ARMS[name], out / f"seed_{seed}" / name
    hold_run_folder(folder)
    if not (folder / "evaluation" / "eval.json").exists():
        env = task.make_env(1, True)
        data = _data(task, seed, env)
        warmup = arm.warmup_decisions * task.horizon
        config = OnlineConfig(
            num_env_steps=(num_decisions or task.online_decisions) * task.horizon,
            execution_horizon=task.horizon,
            warmup_env_steps=warmup,
            random_env_steps=warmup if arm.source is None else 0,
            utd_ratio=UPDATES_PER_DECISION / task.horizon,
            updates_per_call=4,
            batch_size=task.batch_size,
            offline_ratio=arm.offline_ratio,
            carried=arm.carried,
            env_steps_per_iteration=DECISIONS_BETWEEN_EVALS * task.horizon,
            eval_interval=1,
            seed=seed,
        )
        learner = _learner(task, _online_agent(task, arm), data, env, seed)
        if arm.source is not None:
            offline, trainer = _offline_trainer(task, arm.source, seed, env)
            trainer.load(out / f"seed_{seed}" / arm.source)
            learner.switch_from(offline, arm.carried, seed)
        replay = replace(task.replay, reward_bias=0.0, reward_scale=1.0) if arm.wrong_reward else task.replay
        buffer = online_buffer(replay, env.spec, 1)
        online = OnlineTrainer(learner, env, buffer, config, data if arm.offline_ratio else None)
        watch = _Watch(task, learner, data)
        run_iterations(online, folder, config, label=name, resume=True, evaluate=watch, tensorboard=False)
        _success(task, learner, NUM_FINAL_EPISODES, seed).save(folder / "evaluation")
        env.close()
    return f"{name} seed {seed}: {EvalResult.load(folder / 'evaluation').success_once}"


def _online_agent(task: Task, arm: Arm) -> Any:
    if arm.keeps_pessimism:
        return pessimistic(task, arm.source == "calql")
    if arm.source is None:  # RLPD's own settings, with the networks of the other arms
        return replace(
            sac_of(task),
            target_reduction=EnsembleReduction("min", 2, with_replacement=False),
            actor_reduction=EnsembleReduction("mean", None),
            target_entropy_per_dim=0.5,
            entropy_on_next_obs=False,
            actor_batch="last",
        )
    return sac_of(task)


# ----------------------------------------------------------------------------------------------------------- summary
def measure(out: Path, name: str, seed: int) -> dict[str, Any]:
    """The numbers of one arm: dip, drift, updates to .9, frozen warm-up."""
    arm, folder = ARMS[name], out / f"seed_{seed}"
    rows = read_metrics(folder / name)
    success = [row["eval/success_rate"] for row in rows]
    steps = [row["iteration"] * DECISIONS_BETWEEN_EVALS for row in rows]
    updates = [row["probe/num_updates"] for row in rows]
    began = next((s for s, u in zip(steps, updates, strict=True) if u > 0), steps[-1])
    after = [r for r, s, u in zip(success, steps, updates, strict=True) if u > 0 and s < began + 1000]
    reached = next((u for r, u in zip(success, updates, strict=True) if r >= 0.9), None)
    final = EvalResult.load(folder / name / "evaluation").success_once
    numbers = {
        "arm": name,
        "seed": seed,
        "final": final.as_dict(),
        "updates_to_90": reached,
        "decisions_to_90": next((s for r, s in zip(success, steps, strict=True) if r >= 0.9), None),
        "mean_success": float(np.mean(success)),
        "largest_after_switch": max(success),
        "frozen_until_updates": all(
            row["probe/parameters_moved"] == 0.0 for row in rows if row["probe/num_updates"] == 0.0
        ),
    }
    if arm.source is None:
        return numbers
    start = json.loads((folder / arm.source / "start.json").read_text())
    before = EvalResult.load(folder / arm.source / "evaluation").success_once
    drift = [row["probe/q"] - start["probe/q"] for row in rows]
    return numbers | {
        "at_switch": before.rate,
        "lowest_after_switch": min(after),
        "dip": before.rate - min(after),
        "q_at_switch": start["probe/q"],
        "q_drift": drift[-1],
        "largest_q_drift": max(drift, key=abs),
    }


def summarise(out: Path, seeds: Sequence[int], arms: Sequence[str]) -> dict[str, Any]:
    """All numbers, and which requirements do not hold in which seed."""
    runs = {(name, seed): measure(out, name, seed) for name in arms for seed in seeds}
    failures = []
    for seed in seeds:
        got = {name: runs[name, seed] for name in arms}

        def check(holds: bool, text: str, seed: int = seed) -> None:
            if not holds:
                failures.append(f"seed {seed}: {text}")

        for name, run in got.items():
            check(run["frozen_until_updates"], f"{name} moved a parameter before its first update")
        if {"cql_online", "wsrl_cql"} <= set(got):
            cql, wsrl = got["cql_online"], got["wsrl_cql"]
            rate = cql["final"]["success_rate"]
            check(rate <= 0.3 or rate < cql["at_switch"], f"CQL without its data is at {rate:.2f}")
            best = wsrl["largest_after_switch"]
            check(best >= 0.9, f"WSRL from CQL reaches {best:.2f} at most")
            check(
                abs(cql["q_drift"]) >= 5.0 * abs(wsrl["q_drift"]),
                f"Q drifts by {cql['q_drift']:.2f} with CQL and {wsrl['q_drift']:.2f} with WSRL",
            )
        if "wsrl_calql" in got:
            wsrl = got["wsrl_calql"]
            check(wsrl["dip"] <= 0.15, f"WSRL from Cal-QL dips by {wsrl['dip']:.2f}")
            if "rlpd" in got:
                ours, theirs = wsrl["updates_to_90"], got["rlpd"]["updates_to_90"]
                check(
                    ours is not None and (theirs is None or ours < theirs),
                    f"WSRL needs {ours} updates to .9, RLPD {theirs}",
                )
    return {"name": "wsrl_switch", "passed": not failures, "failures": failures, "runs": list(runs.values())}


PANELS = (
    Panel("Success on 50 held-out episodes", ("eval/success_rate",), percent=True),
    Panel("Mean Q of 512 offline chunks", ("probe/q",)),
    Panel("Critic updates", ("probe/num_updates",)),
)


def report(out: Path, task: str, seeds: Sequence[int], arms: Sequence[str]) -> Path:
    """Rates of all seeds together, curves of the first."""

    def merged(name: str) -> EvalResult:
        return EvalResult.merge([EvalResult.load(out / f"seed_{seed}" / name / "evaluation") for seed in seeds])

    rows = [
        ReportRow("Cal-QL, offline", "baseline", merged("calql")),
        ReportRow("CQL, offline", "other", merged("cql")),
    ]
    curves = []
    for name in arms:
        role = "trained" if name == "wsrl_calql" else "control" if name == "calql_online" else "other"
        rows.append(ReportRow(ARMS[name].label, role, merged(name)))
        curves.append(Curve(ARMS[name].label, role, out / f"seed_{seeds[0]}" / name))
    return write_report(
        out / "report.html",
        ReportData(
            title=f"The switch from offline to online: {task}",
            rows=tuple(rows),
            command=f'make experiment NAME=wsrl_switch ARGS="--task {task}"',
            description=f"{len(seeds)} seeds, {NUM_FINAL_EPISODES} held-out episodes each; an iteration is "
            f"{DECISIONS_BETWEEN_EVALS} decisions. Curves: seed {seeds[0]}.",
            curves=tuple(curves),
            panels=PANELS,
            provenance={"revision": describe_source()["revision"], "machine": json.dumps(describe_machine())},
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where everything required holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="maze")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--decisions", type=int, help="instead of the task's own number")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/wsrl_switch"))
    options = parser.parse_args(argv)
    out = options.out / options.task
    run_jobs(run_offline, [(options.task, kind, s, out) for s in options.seeds for kind in OFFLINE], options.processes)
    run_jobs(
        run_arm,
        [(options.task, name, s, options.decisions, out) for s in options.seeds for name in options.arms],
        options.processes,
    )
    summary = summarise(out, options.seeds, options.arms) | {"task": options.task, "machine": describe_machine()}
    atomic_write_json(out / "summary.json", summary)
    for run in summary["runs"]:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in run.items() if k != "final"})
    verdict = "passed" if summary["passed"] else "FAILED: " + "; ".join(summary["failures"])
    print(f"{verdict}\n{out / 'summary.json'}\n{report(out, options.task, options.seeds, options.arms)}")
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
