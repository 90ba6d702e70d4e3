"""The A/A experiment at a quarter of its size, and that its simulated pairs are what they are called."""

from __future__ import annotations

import numpy as np
import pytest

from tests.experiments.aa_comparison import better_pair, discordance, equal_pair, measure


def test_simulated_pairs_have_the_stated_discordance_and_difference():
    rng = np.random.default_rng(1)
    equal, better = ([pair(rng) for _ in range(300)] for pair in (equal_pair, lambda r: better_pair(r, 0.1)))
    for pairs, difference in ((equal, 0.0), (better, 0.1)):
        first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
        assert np.mean(first != second) == pytest.approx(discordance(), abs=0.01)
        assert second.mean() - first.mean() == pytest.approx(difference, abs=0.01)
    assert discordance() == pytest.approx(0.4)


def test_comparisons_find_what_is_there_and_nothing_else():
    found = measure(num_runs=50, seed=1)
    assert found["aa_without_finding_exact"] == pytest.approx(0.96, abs=0.01)
    assert found["aa_without_finding"] >= 0.9
    assert 0.65 <= found["ab_found"]["success_rate"] <= 0.95
    assert found["aa_found_peeking_at_the_test"]["success_rate"] > 0.1
    assert found["aa_found_peeking_with_the_rule"]["success_rate"] <= 0.1
    assert found["any_pair_of_5_found_with_holm"]["successes"] <= found["any_pair_of_5_found"]["successes"]
