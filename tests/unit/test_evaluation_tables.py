"""Tables in Markdown and LaTeX: the same cells, escaped for each."""

from __future__ import annotations

import pytest

from vla_rl.evaluation.compare import compare_all
from vla_rl.evaluation.result import Episode, EvalResult
from vla_rl.evaluation.tables import Table, evaluation_table, latex, markdown, pairs_table, points, rates_table


def result(successes: int, tasks: tuple[str, ...] = ("reach",), conditions: tuple[str, ...] = ("",)) -> EvalResult:
    episodes = tuple(
        Episode(task, i, "go", i < successes, i < successes, 9, 1.0, True, condition=condition)
        for task in tasks
        for condition in conditions
        for i in range(20)
    )
    return EvalResult(episodes, {})


def test_an_evaluation_by_task_or_by_condition():
    table = evaluation_table(result(16, tasks=("reach", "push_up")))
    assert table.rows[0] == ("reach", "20", "80.0%", "[58.4%, 91.9%]", "9.0", "1.00")
    assert [row[:3] for row in table.rows[1:]] == [("push_up", "20", "80.0%"), ("all", "40", "80.0%")]
    by_condition = evaluation_table(result(16, conditions=("", "light@2")))
    assert [row[0] for row in by_condition.rows] == ["nominal", "light@2", "all"]
    assert len(evaluation_table(result(16)).rows) == 1


def test_a_comparison_side_by_side_and_its_tests():
    comparisons = compare_all({"SFT": result(9, ("reach", "push")), "RL": result(16, ("reach", "push"))})
    rates = rates_table(comparisons)
    assert rates.header == ("", "n", "SFT", "RL")
    assert [row[:2] for row in rates.rows] == [("reach", "20"), ("push", "20"), ("all episodes", "40")]
    assert rates.rows[0][2].startswith("45.0% [")
    assert rates.rows[2][3].startswith("80.0% [")
    (row,) = pairs_table(comparisons).rows
    assert row[:3] == ("RL \u2212 SFT", "40", "+35.0")
    assert row[4] == row[5] == f"{2 * 0.5**14:.2g}"
    assert "over 1 test." in pairs_table(comparisons).caption


def test_markdown_has_as_many_columns_in_every_line():
    text = markdown(Table("c", ("", "n"), (("a|b", "1"), ("c", "2"))))
    assert text == "c\n\n|  | n |\n|:--|--:|\n| a\\|b | 1 |\n| c | 2 |\n"


def test_latex_is_escaped():
    text = latex(Table("50% of A_B", ("", "n"), (("a&b_c $x^2$ \\", points(-0.031)),)))
    assert r"\caption{50\% of A\_B}" in text
    assert r"a\&b\_c \$x\textasciicircum{}2\$ \textbackslash{} & $-$3.1 \\" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"\begin{tabular}{lr}" in text


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="1 cells, expected 2"):
        Table("c", ("", "n"), (("a",),))
