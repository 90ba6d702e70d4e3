"""Updates of critics and actor per second: our SAC, torchrl's and sbx's, with networks and batches of equal sizes.

One update is all that follows one environment step: `utd` critic updates, each on its own minibatch and with its
target's Polyak step, then one step of actor and temperature on the last minibatch. Batches are in memory already:
sampling does not count. Two cases: REDQ's ten critics on single actions, and two wider critics on chunks of five.
REDQ's target takes the least of two critics drawn: ours evaluates these two alone; torchrl's REDQLoss too, but it has
no update without the actor's, and its SACLoss and sbx take the least of all ten. `ratio` is the lesser over all cases
and peers. All cores for all sides, or one with `--one-core`. Torch's threads spin while they wait for one another:
beside other programs torchrl's time on two cores grows six- to tenfold, wall and CPU alike, and says nothing. So on a
busy machine only `--one-core` can be saved, best read by `cpu_ratios`, which compare CPU seconds.
Where JAX sees a GPU, `utd` is 20 and `milliseconds` is the time per environment step.

    make bench NAME=critic_update ARGS="--save"
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import jax
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
    num_cores,
    peer_python,
    summary,
)
from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec
from vla_rl.offpolicy.sac import SAC, SACConfig


def requirements(library: str) -> tuple[str, ...]:
    """A function, because JAX counts its cores when it is first asked for its backend."""
    if library == "torchrl":
        return f"torch=={torch.__version__.split('+')[0]}", "torchrl==0.14.1"
    extra = "[cuda12]" if jax.default_backend() == "gpu" else ""
    return "sbx-rl==0.28.0", f"jax{extra}=={importlib.metadata.version('jax')}"


@dataclass(frozen=True)
class Case:
    """`peers`: (virtual environment, mode). `subset`: members in the target, None for all."""

    num_members: int
    hidden_sizes: tuple[int, ...]
    action_horizon: int
    action_dim: int
    subset: int | None
    peers: tuple[tuple[str, str], ...]


CASES = {
    "redq": Case(10, (256, 256), 1, 6, 2, (("torchrl", "redq"), ("torchrl", "sac"), ("sbx", "sac"))),
    "chunk": Case(2, (512, 512, 512, 512), 5, 5, None, (("torchrl", "sac"), ("sbx", "sac"))),
}


@dataclass(frozen=True)
class CriticUpdateBenchmarkConfig:
    """`seconds`: of one measurement. `one_core`: all sides on one and the same core. `utd`: by default 4, on a GPU 20.
    `compiled`: torchrl under torch.compile too. `save`: keep the result."""

    repeats: int = 5
    seconds: float = 4.0
    obs_dim: int = 24
    batch_size: int = 256
    utd: int | None = None
    one_core: bool = False
    compiled: bool = False
    save: bool = False


def random_batches(case: Case, config: CriticUpdateBenchmarkConfig) -> ReplayBatch:
    assert config.utd is not None
    rng, lead, obs = np.random.default_rng(0), (config.utd, config.batch_size), config.obs_dim
    chunk = (case.action_horizon, case.action_dim)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((*lead, *shape)).astype(np.float32)

    return ReplayBatch(
        obs=normal(obs),
        actions=np.tanh(normal(*chunk)),
        mask=np.ones((*lead, case.action_horizon), bool),
        reward=normal(),
        discount=np.full(lead, 0.99, np.float32),
        next_obs=normal(obs),
        mc_return=normal(),
        weight=np.ones(lead, np.float32),
        rows=np.zeros(lead, np.int64),
        next_rows=np.zeros(lead, np.int64),
    )


class Ours:
    """SAC as its users call it."""

    def __init__(self, case: Case, config: CriticUpdateBenchmarkConfig) -> None:
        sac = SACConfig(
            actor=ActorNetConfig(case.hidden_sizes, layer_norm=False),
            critic=MLPCriticConfig(case.num_members, case.hidden_sizes),
            target_reduction=EnsembleReduction("min", case.subset),
            backup_entropy=True,
            entropy_on_next_obs=False,
            actor_batch="last",
        )
        agent = SAC(AgentSpec(config.obs_dim, case.action_horizon, case.action_dim), sac)
        self._update, self._state, self._seconds = agent.update, agent.init(0), config.seconds
        self._batches = random_batches(case, config)
        for _ in range(2):
            self._step()

    def measure(self) -> dict[str, float]:
        count, begin, cpu = 0, time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - begin) < self._seconds:
            self._step()
            count += 1
        return {"steps": count, "seconds": elapsed, "cpu_seconds": time.process_time() - cpu}

    def _step(self) -> None:
        self._state, metrics = self._update(self._state, self._batches)
        jax.block_until_ready((self._state.params, metrics))


def start_peers(
    case: Case, config: CriticUpdateBenchmarkConfig, groups: dict[str, PeerGroup], skipped: dict[str, str]
) -> None:
    """Peers of a case, into `groups`; one that does not start, into `skipped`."""
    sizes = {
        "obs_dim": config.obs_dim,
        "chunk_dim": case.action_horizon * case.action_dim,
        "num_members": case.num_members,
        "hidden_sizes": case.hidden_sizes,
        "batch_size": config.batch_size,
        "utd": config.utd,
        "num_threads": num_cores(),
    }
    environment = {"CRITIC_SIZES": json.dumps(sizes), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    extra = (("torchrl", "sac_compiled"),) if config.compiled else ()
    for library, mode in (*case.peers, *extra):
        name = f"{library}_{mode}"
        try:
            python = peer_python(library, requirements(library))
            groups[name] = PeerGroup(python, f"{library}_critics.py", mode, environment, all_cores=True)
        except PeerUnavailableError as error:
            skipped[name] = str(error)


def run_case(case: Case, config: CriticUpdateBenchmarkConfig) -> dict[str, Any]:
    """Rates by wall clock and by CPU seconds of all sides, and ours against each peer."""
    groups: dict[str, PeerGroup] = {}
    skipped: dict[str, str] = {}
    cpu: dict[str, list[float]] = {}

    def rate(name: str, measured: dict[str, float]) -> float:
        cpu.setdefault(name, []).append(measured["steps"] / measured["cpu_seconds"])
        return measured["steps"] / measured["seconds"]

    try:
        start_peers(case, config, groups, skipped)
        ours = Ours(case, config)
        sides: dict[str, Callable[[], float]] = {"ours": lambda: rate("ours", ours.measure())}
        for name, group in groups.items():
            sides[name] = lambda name=name, group=group: rate(name, group.measure(config.seconds)[0])
        values = in_turns(sides, config.repeats)
    finally:
        for group in groups.values():
            group.close()
    return {
        "rates": summary(values),
        "milliseconds": {name: round(1e3 / median(v), 2) for name, v in values.items()},
        "ratios": {name: round(median_ratio(values["ours"], values[name]), 2) for name in groups},
        "cpu_ratios": {name: round(median_ratio(cpu["ours"], cpu[name]), 2) for name in groups},
        "cpu_milliseconds": {name: round(1e3 / median(v), 2) for name, v in cpu.items()},
        "skipped": skipped,
    }


def main(config: CriticUpdateBenchmarkConfig) -> None:
    machine, cores = hardware(), os.sched_getaffinity(0)
    if not config.one_core and machine["load_1min"] > 0.5 and config.save:
        raise SystemExit(f"load {machine['load_1min']}: ratios on all cores would be false; wait, or use --one-core")
    if config.one_core:
        os.sched_setaffinity(0, {min(cores)})  # before JAX counts its cores; peers inherit it
    if config.utd is None:
        config = replace(config, utd=20 if jax.default_backend() == "gpu" else 4)
    results = {name: run_case(case, config) for name, case in CASES.items()}
    ratio, name, peer = min(
        ((r, name, peer) for name, result in results.items() for peer, r in result["ratios"].items()),
        default=(None, "redq", None),
    )
    os.sched_setaffinity(0, cores)
    rates = results[name]["rates"]
    BenchmarkResult(
        name="critic_update",
        ours=rates["ours"]["median"],
        peer=rates[peer]["median"] if peer else None,
        ratio=ratio,
        unit="updates/s",
        details={
            "cases": results,
            "ratio_is_of": [name, peer],
            "repeats": config.repeats,
            "config": asdict(config),
            "sizes": {name: asdict(case) for name, case in CASES.items()},
            "peer_packages": {name: requirements(name) for name in ("torchrl", "sbx")},
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(CriticUpdateBenchmarkConfig))
