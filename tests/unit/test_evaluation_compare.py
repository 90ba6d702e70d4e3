"""Paired comparison of two evaluations."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vla_rl.evaluation.compare import EpisodesDifferError, SuitesDifferError, compare, compare_all
from vla_rl.evaluation.result import Episode, EvalResult
from vla_rl.evaluation.statistics import holm, mcnemar_exact, wilson


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


SUITE = {"name": "reach", "version": 1, "hash": "a" * 64, "protocol": "held_out"}


def under(outcomes: str, condition: str, **config) -> EvalResult:
    plain = result(outcomes, **config)
    return EvalResult(tuple(replace(e, condition=condition) for e in plain.episodes), plain.config)


def test_nominal_episodes_decide_and_conditions_stand_apart():
    first = EvalResult.merge([result("+---"), under("++--", "light@2"), under("+++-", "wrong_instruction@1")])
    second = EvalResult.merge([result("+++-"), under("+---", "light@2"), under("----", "wrong_instruction@1")])
    comparison = compare(first, second)
    assert comparison.overall.difference.value == 0.5
    assert comparison.overall.first.n == 4
    assert comparison.per_task["reach"] == comparison.overall == comparison.per_condition[""]
    assert list(comparison.per_condition) == ["", "light@2", "wrong_instruction@1"]
    assert comparison.per_condition["light@2"].difference.value == -0.25
    assert comparison.decided_by == "all nominal"
    assert "light@2 " in comparison.format_table()
    only_changed = compare(under("+-", "light@2"), under("++", "light@2"))
    assert (only_changed.overall.first.n, only_changed.decided_by) == (2, "all episodes")


def test_the_condition_is_part_of_an_episode():
    with pytest.raises(EpisodesDifferError, match=r"only in first: reach seed 0.*reach light@2 seed 0"):
        compare(result("+"), under("+", "light@2"))


def test_other_suites_are_never_compared_silently():
    first, second = result("++--", suite=SUITE), result("++++--", suite=SUITE | {"hash": "b" * 64, "version": 2})
    with pytest.raises(
        SuitesDifferError, match=r"suite reach v1 \(aaaaaaaaaaaa\).*v2 \(bbbbbbbbbbbb\).*--across-suites"
    ):
        compare(first, second)
    with pytest.raises(SuitesDifferError, match="no declared suite"):
        compare(first, result("++--"))
    labelled = compare(first, second, across_suites=True)
    assert labelled.overall.first.n == 4
    assert labelled.notes[0].startswith("ACROSS SUITES")
    assert "4 episodes are shared, 2 others are left out" in labelled.notes[0]
    with pytest.raises(EpisodesDifferError, match="share no episode"):
        compare(first, result("++", task="push"), across_suites=True)


def test_every_pair_is_tested_and_corrected():
    results = {"A": result("+" * 2 + "-" * 18), "B": result("+" * 9 + "-" * 11), "C": result("+" * 12 + "-" * 8)}
    comparisons = compare_all(results)
    assert [c.names for c in comparisons.against_first] == [("A", "B"), ("A", "C")]
    assert [(p.first, p.second) for p in comparisons.pairs] == [("A", "B"), ("A", "C"), ("B", "C")]
    raw = [mcnemar_exact(0, 7), mcnemar_exact(0, 10), mcnemar_exact(0, 3)]
    assert [p.rates.p_value for p in comparisons.pairs] == raw
    assert [p.p_holm for p in comparisons.pairs] == holm(raw) == pytest.approx([2 * raw[0], 3 * raw[1], raw[2]])
    assert "Holm's correction over 3" in comparisons.format_table()
    assert json.loads(json.dumps(comparisons.as_dict()))["pairs"][2]["p_holm"] == raw[2]
    with pytest.raises(ValueError, match="at least two"):
        compare_all({"A": results["A"]})


def test_a_gate_goes_by_the_lower_end_or_the_rate():
    comparisons = compare_all({"A": result("-" * 20), "B": result("+" * 16 + "-" * 4), "C": result("+" * 20)})
    low = wilson(16, 20).low
    assert comparisons.under(low - 1e-6) == ()
    assert comparisons.under(low + 1e-6) == ("B",)
    assert comparisons.under(0.8, "rate") == ()
    assert comparisons.under(0.81, "rate") == ("B",)
    assert comparisons.under(1.0) == ("B", "C")
    with pytest.raises(ValueError, match=r"80% is 0\.8"):
        comparisons.under(80)
