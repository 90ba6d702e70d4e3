"""Paired comparison of two evaluations."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vla_rl.evaluation.compare import EpisodesDifferError, compare
from vla_rl.evaluation.result import Episode, EvalResult
from vla_rl.evaluation.statistics import mcnemar_exact, wilson


def result(outcomes: str, task: str = "reach", length: int = 20, **config) -> EvalResult:
    """One episode a letter: "+" succeeded, "-" failed, "~" succeeded once but not at the end."""
    episodes = tuple(
        Episode(
            task, seed, f"do {seed}", letter != "-", letter == "+", length + seed, float(letter != "-"), letter != "-"
        )
        for seed, letter in enumerate(outcomes)
    )
    return EvalResult(episodes, {"noise_seed": 0, **config})


def test_every_number_by_hand():
    first, second = result("++--------"), result("+-+++++++-", length=15)
    comparison = compare(first, second, names=("SFT", "RL"))
    overall = comparison.overall
    assert (overall.both, overall.only_first, overall.only_second, overall.neither) == (1, 1, 7, 1)
    assert overall.first == wilson(2, 10)
    assert overall.second == wilson(8, 10)
    assert overall.difference.value == pytest.approx(0.6)
    assert 0 < overall.difference.low < 0.6 < overall.difference.high < 1
    assert overall.p_value == mcnemar_exact(1, 7) == pytest.approx(18 / 256)
    assert comparison.length_difference.value == comparison.length_difference.low == -5.0
    assert comparison.return_difference.value == pytest.approx(0.6)
    assert comparison.notes == ()


def test_the_order_of_episodes_does_not_matter():
    first, second = result("++--------"), result("+-+++++++-")
    shuffled = EvalResult(tuple(reversed(second.episodes)), second.config)
    assert compare(first, shuffled) == compare(first, second)


def test_swapping_the_two_mirrors_the_result():
    first, second = result("++--------"), result("+-+++++++-")
    one, other = compare(first, second).overall, compare(second, first).overall
    assert one.difference.value == -other.difference.value
    assert one.difference.low == pytest.approx(-other.difference.high)
    assert one.p_value == other.p_value


def test_equal_policies_are_not_told_apart():
    comparison = compare(result("+-+-"), result("+-+-"))
    assert comparison.overall.p_value == 1.0
    assert comparison.overall.difference.low < 0 < comparison.overall.difference.high


def test_the_criterion_decides():
    first, second = result("----"), result("~~+-")
    assert compare(first, second).overall.second.successes == 3
    assert compare(first, second, criterion="success_at_end").overall.second.successes == 1
    with pytest.raises(ValueError, match="success_once"):
        compare(first, second, criterion="success")


def test_other_episodes_are_an_error_that_lists_them():
    first, second = result("++--"), result("++--++")
    with pytest.raises(EpisodesDifferError, match="only in RL: reach seed 4, reach seed 5"):
        compare(first, second, names=("SFT", "RL"))
    with pytest.raises(EpisodesDifferError, match=r"and 12 more"):
        compare(first, result("+" * 24))
    with pytest.raises(EpisodesDifferError, match=r"only in first: reach seed 0.*only in second: push seed 0"):
        compare(first, result("++--", task="push"))


def test_the_same_seed_with_another_instruction_is_an_error():
    first = result("++")
    changed = EvalResult((first.episodes[0], replace(first.episodes[1], instruction="do it twice")), first.config)
    with pytest.raises(EpisodesDifferError, match="another instruction: reach seed 1"):
        compare(first, changed)


def test_other_settings_are_told():
    comparison = compare(result("+-", execution_horizon=4), result("+-", execution_horizon=8))
    assert comparison.notes == ("execution_horizon is 4 in first and 8 in second",)
    assert "note: execution_horizon is 4 in first and 8 in second" in comparison.format_table()


def test_tasks_are_compared_one_by_one_and_together():
    first = EvalResult.merge([result("+---"), result("++--", task="push")])
    second = EvalResult.merge([result("++++"), result("++--", task="push")])
    comparison = compare(first, second, names=("SFT", "RL"))
    assert list(comparison.per_task) == ["reach", "push"]
    assert comparison.per_task["reach"].difference.value == 0.75
    assert comparison.per_task["push"].difference.value == 0.0
    assert comparison.overall.difference.value == 0.375
    table = comparison.format_table().splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["reach", "push", "all"]
    assert table[4].split()[2:6] == ["8", "0.375", "(3)", "0.750"]
    assert "only by RL 3" in table[5]


def test_a_comparison_is_plain_json():
    text = json.dumps(compare(result("+-"), result("++")).as_dict())
    assert json.loads(text)["overall"]["only_second"] == 1
