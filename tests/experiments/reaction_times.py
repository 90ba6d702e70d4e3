"""How soon the arm holds or is stopped when something dies, hangs or lies, as the twin received it.

Each trial waits until the arm moves, does the harm at a random time of the control period, and looks in the twin's
record of received trajectories. "told": the first one that holds or stops, with none that moves the target after it.
"still": when the target of the arm's controller came to rest, which may be earlier, for a trajectory goes no further
than its last point. Every time is CLOCK_MONOTONIC, one clock for all processes.

    make experiment NAME=reaction_times          # goes on where it was cut off, case by case
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from tests.benchmarks.harness import hardware
from tests.experiments.bridge_chain import Chain, Sent, steps
from vla_rl.real_robot.deploy_config import DeployConfig
from vla_rl.real_robot.twin_faults import Faults

GOAL_MS = 150.0
_GRACE_S = 30.0  # of holding: so that a bridge lives from trial to trial
_WATCH_S = 0.4  # after the hold or stop, for what might still move the arm
_LONGEST_S = 5.0


@dataclass(frozen=True)
class Case:
    """`harm` returns when it was done. `ends_bridge`: the next trial needs another bridge."""

    harm: Callable[[Chain], float]
    ends_bridge: bool = True
    by_proxy: bool = False


def _signal(number: signal.Signals, process: str) -> Callable[[Chain], float]:
    def harm(chain: Chain) -> float:
        at, pid = time.monotonic(), getattr(chain, process)
        os.kill(pid, number)
        return at

    return harm


def _ctrl_c(chain: Chain) -> float:
    """To the whole job, as a terminal sends it."""
    at = time.monotonic()
    os.killpg(chain.bridge, signal.SIGINT)
    return at


CASES: Mapping[str, Case] = {
    "policy server killed": Case(_signal(signal.SIGKILL, "server"), ends_bridge=False),
    "policy server stopped (SIGSTOP)": Case(_signal(signal.SIGSTOP, "server"), ends_bridge=False),
    "half-open socket to the policy server": Case(lambda c: c.proxy.fall_silent(), ends_bridge=False, by_proxy=True),
    "camera frozen": Case(lambda c: c.inject(Faults(freeze=("agent",))), ends_bridge=False),
    "bridge killed": Case(_signal(signal.SIGKILL, "bridge")),
    "bridge stopped (SIGSTOP)": Case(_signal(signal.SIGSTOP, "bridge")),
    "Ctrl-C": Case(_ctrl_c),
    "NaN action": Case(lambda c: c.spoil_actions()),
    "stale observation: no joint states": Case(lambda c: c.inject(Faults(drop={"/joint_states": 1.0}))),
    "supervisor told to end (SIGTERM)": Case(_signal(signal.SIGTERM, "supervisor")),
}


@dataclass(frozen=True)
class Reaction:
    """Seconds after the harm; see the module's text. `inf`: not while it was watched."""

    told_s: float
    still_s: float


def reaction(sent: list[Sent], at: float) -> Reaction:
    """Raises ValueError where the arm did not move at the time."""
    marked = list(steps(sent))
    before = [(s, moving) for s, moving in marked if s.stamp <= at]
    after = [(s, moving) for s, moving in marked if s.stamp > at]
    if not before or not before[-1][1]:
        raise ValueError("the arm did not move when the harm was done")
    last = max((i for i, (_, moving) in enumerate(after) if moving), default=-1)
    mover = after[last][0] if last >= 0 else before[-1][0]
    told = after[last + 1][0] if last + 1 < len(after) else None
    rest = max(at, mover.stamp + mover.duration_s)
    if told is None:
        return Reaction(np.inf, rest - at)
    return Reaction(told.stamp - at, (min(rest, told.stamp) if told.target is None else rest) - at)


def trial(case: Case, chain: Chain, rng: np.random.Generator) -> Reaction:
    """One reaction; the bridge is ended where the next one needs another."""
    for _ in range(5):
        chain.ensure(by_proxy=case.by_proxy)
        time.sleep(rng.uniform(0.0, 0.1))
        at = case.harm(chain)
        try:
            found = _watch(chain, at)
        except ValueError:  # it held for want of processor time just then: once more
            continue
        finally:
            if case.ends_bridge:
                chain.end_bridge()
        return found
    raise RuntimeError("the arm never moved long enough; is the machine idle?")


def _watch(chain: Chain, at: float) -> Reaction:
    while True:
        time.sleep(0.02)
        chain.read()
        found, waited = reaction(chain.sent, at), time.monotonic() - at
        if waited > min(found.told_s + _WATCH_S, _LONGEST_S):
            return found


# -------------------------------------------------------------------------------------------------------------- results
@dataclass(frozen=True)
class ReactionTimes:
    """`cases`: part of a case's name, "" for all. `out`: cases that it has with as many trials are not measured again.
    `deploy`: the options of the deployment."""

    trials: int = 50
    cases: str = ""
    out: Path = Path(__file__).parent / "results" / "reaction_times.json"
    deploy: DeployConfig = field(default_factory=lambda: DeployConfig(grace_s=_GRACE_S))


def measure(name: str, chain: Chain, trials: int, seed: int) -> dict[str, Any]:
    """Times in ms of one case."""
    rng, load = np.random.default_rng(seed), os.getloadavg()[0]
    reactions = []
    for i in range(trials):
        reactions.append(trial(CASES[name], chain, rng))
        worst = 1000 * max(r.told_s for r in reactions)
        print(f"\r{name}: {i + 1} of {trials}, worst {worst:.0f} ms ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {
        "trials": trials,
        "told_ms": [round(1000 * r.told_s, 1) for r in reactions],
        "still_ms": [round(1000 * r.still_s, 1) for r in reactions],
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }


def table(cases: Mapping[str, Any]) -> str:
    """Markdown: ms."""
    rows = ["| what is done | trials | hold or stop received: median | worst | arm's target at rest: worst |"]
    rows.append("|---|---|---|---|---|")
    for name, case in cases.items():
        told, still = np.array(case["told_ms"]), np.array(case["still_ms"])
        rows.append(f"| {name} | {len(told)} | {np.median(told):.0f} | {told.max():.0f} | {still.max():.0f} |")
    return "\n".join(rows)


def main(config: ReactionTimes) -> None:
    deploy = {f.name: getattr(config.deploy, f.name) for f in dataclasses.fields(DeployConfig)}
    result: dict[str, Any] = json.loads(config.out.read_text()) if config.out.exists() else {}
    if result.get("deploy") not in (None, deploy):
        raise ValueError(f"{config.out} was measured with other options; name another file with --out")
    done = result.get("cases", {})
    for name in ("server", "episodes", "num_videos"):
        del deploy[name]
    with tempfile.TemporaryDirectory() as folder, Chain(Path(folder), deploy) as chain:
        for seed, name in enumerate(CASES):
            if config.cases not in name or done.get(name, {}).get("trials", 0) >= config.trials:
                continue
            done[name] = measure(name, chain, config.trials, seed)
            cases = {n: done[n] for n in CASES if n in done}
            result = {"goal_ms": GOAL_MS, "deploy": dataclasses.asdict(config.deploy), "hardware": hardware()}
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.write_text(json.dumps({**result, "cases": cases}, indent=1) + "\n")
    print(table({n: done[n] for n in CASES if n in done}))
    missed = [n for n, case in done.items() if not max(case["told_ms"]) <= GOAL_MS]
    print(f"goal of {GOAL_MS:.0f} ms: {'missed by ' + ', '.join(missed) if missed else 'met by all'}")


if __name__ == "__main__":
    main(tyro.cli(ReactionTimes, description=__doc__))
