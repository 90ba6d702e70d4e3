"""Does a comparison find what is there, and nothing else? Simulated evaluations, compared as `vla-rl compare` does.

    make experiment NAME=aa_comparison

Two policies solve the same episodes; some episodes are harder than others, which is why pairing helps. In an A/A run
both have the same chance in every episode. In an A/B run they differ by the minimum detectable difference of the
planned number of episodes, at the discordance that it was planned with. Required: at least 95% of the A/A runs end
without a finding, and the A/B runs' share of findings is the stated power within its simulation error. Beside them:
what peeking after every episode does to the same test, and to the rule that allows it; and five equal policies
compared in pairs, with and without Holm's correction. Seconds on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.evaluation.compare import PairedRates
from vla_rl.evaluation.statistics import (
    Rate,
    detection_power,
    holm,
    mcnemar_exact,
    minimum_detectable_difference,
    wilson,
)
from vla_rl.evaluation.stopping import PairedStopRule

NUM_EPISODES, CONFIDENCE, POWER = 256, 0.95, 0.8
DIFFICULTY = (2.0, 2.0)  # of the beta distribution of an episode's chance of success: half succeed, .4 are discordant
NUM_POLICIES = 5


def chances(rng: np.random.Generator) -> np.ndarray:
    """Of success in each episode, float64 [NUM_EPISODES]."""
    return rng.beta(*DIFFICULTY, size=NUM_EPISODES)


def discordance() -> float:
    """Share of the episodes that one of two equal policies alone solves: 2 E[p (1 - p)]."""
    a, b = DIFFICULTY
    return 2 * a * b / ((a + b) * (a + b + 1))


def paired(first: np.ndarray, second: np.ndarray) -> PairedRates:
    return PairedRates.of(list(zip(first.tolist(), second.tolist(), strict=True)), CONFIDENCE)


def equal_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of two policies with the same chance in every episode."""
    p = chances(rng)
    return rng.random(NUM_EPISODES) < p, rng.random(NUM_EPISODES) < p


def better_pair(rng: np.random.Generator, difference: float) -> tuple[np.ndarray, np.ndarray]:
    """The second is better by `difference`, at the planned discordance."""
    apart = discordance()
    draw, shared = rng.random(NUM_EPISODES), rng.random(NUM_EPISODES) < 0.5
    only_second, only_first = draw < (apart + difference) / 2, draw > 1 - (apart - difference) / 2
    return np.where(only_second, False, only_first | shared), np.where(only_first, False, only_second | shared)


def share(found: Callable[[], bool], num_runs: int) -> Rate:
    """How many of the runs find a difference."""
    return wilson(sum(found() for _ in range(num_runs)), num_runs)


def peeked_test(first: np.ndarray, second: np.ndarray) -> bool:
    """McNemar's test after every episode, stopping at the first p <= 0.05: what nobody should do."""
    lost, won = np.cumsum(first & ~second), np.cumsum(second & ~first)
    return any(
        mcnemar_exact(b, c) <= 1 - CONFIDENCE for b, c in sorted(set(zip(lost.tolist(), won.tolist(), strict=True)))
    )


def peeked_rule(first: np.ndarray, second: np.ndarray) -> bool:
    """`PairedStopRule` after every episode."""
    rule, lost, won = PairedStopRule(CONFIDENCE), np.cumsum(first & ~second), np.cumsum(second & ~first)
    return any(rule.should_stop(b, c) for b, c in sorted(set(zip(lost.tolist(), won.tolist(), strict=True))))


def family(rng: np.random.Generator) -> list[float]:
    """p-values of all pairs of `NUM_POLICIES` equal policies."""
    p = chances(rng)
    outcomes = [rng.random(NUM_EPISODES) < p for _ in range(NUM_POLICIES)]
    return [paired(outcomes[i], outcomes[j]).p_value for i, j in combinations(range(NUM_POLICIES), 2)]


def measure(num_runs: int = 200, seed: int = 0) -> dict[str, Any]:
    """All shares, and whether what is required holds."""
    rng, alpha = np.random.default_rng(seed), 1 - CONFIDENCE
    difference = minimum_detectable_difference(
        NUM_EPISODES, discordance=discordance(), power=POWER, confidence=CONFIDENCE
    )
    assert difference is not None
    same = share(lambda: paired(*equal_pair(rng)).p_value <= alpha, num_runs)
    better = share(lambda: _found_second(paired(*better_pair(rng, difference)), alpha), num_runs)
    families = [family(rng) for _ in range(num_runs)]
    nothing = 1 - same.rate
    failures = [] if nothing >= CONFIDENCE else [f"{nothing:.3f} of the A/A runs end without a finding"]
    if not better.low <= POWER <= better.high:
        failures.append(f"the known difference is found in {better}, planned with {POWER}")
    return {
        "name": "aa_comparison",
        "passed": not failures,
        "failures": failures,
        "num_runs": num_runs,
        "num_episodes": NUM_EPISODES,
        "discordance": discordance(),
        "aa_without_finding": nothing,
        "aa_without_finding_exact": 1 - 2 * detection_power(NUM_EPISODES, 1e-9, discordance=discordance()),
        "aa_found": same.as_dict(),
        "minimum_detectable_difference": difference,
        "power": POWER,
        "ab_found": better.as_dict(),
        "aa_found_peeking_at_the_test": share(lambda: peeked_test(*equal_pair(rng)), num_runs).as_dict(),
        "aa_found_peeking_with_the_rule": share(lambda: peeked_rule(*equal_pair(rng)), num_runs).as_dict(),
        "ab_found_peeking_with_the_rule": share(lambda: peeked_rule(*better_pair(rng, difference)), num_runs).as_dict(),
        "any_pair_of_5_found": wilson(sum(min(p) <= alpha for p in families), num_runs).as_dict(),
        "any_pair_of_5_found_with_holm": wilson(sum(min(holm(p)) <= alpha for p in families), num_runs).as_dict(),
    }


def _found_second(rates: PairedRates, alpha: float) -> bool:
    return rates.p_value <= alpha and rates.difference.value > 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/aa_comparison/summary.json"))
    options = parser.parse_args(argv)
    summary = measure(options.runs, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(options.out, summary)
    for name, value in summary.items():
        shown = (
            f"{value['success_rate']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            if isinstance(value, dict)
            else value
        )
        print(f"{name:34} {shown}")
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
