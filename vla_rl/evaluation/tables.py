"""Tables of results for a paper or a pull request: Markdown and LaTeX from the same cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vla_rl.evaluation.compare import Comparisons, PairedRates
from vla_rl.evaluation.methods import MethodsComparison
from vla_rl.evaluation.result import EvalResult, Summary
from vla_rl.evaluation.statistics import Difference, Rate

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u2212": "$-$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is a name and the others are numbers. `caption` says what is counted."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"Table: a row has {len(row)} cells, expected {len(self.header)}: {row}")


def markdown(table: Table) -> str:
    """A pipe table with its caption above it."""
    rule = "|" + ":--|" + "--:|" * (len(table.header) - 1)
    lines = [_pipes(table.header), rule, *(_pipes(row) for row in table.rows)]
    return f"{table.caption}\n\n" + "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A `tabular` with rules of the package booktabs, in a `table` with the caption."""
    lines = [
        r"\begin{table}",
        rf"\caption{{{_tex(table.caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        _ampersands(table.header),
        r"\midrule",
        *(_ampersands(row) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def evaluation_table(result: EvalResult, criterion: str = "success_once") -> Table:
    """A row a task and one for all; with conditions, a row for each of them instead of the tasks."""
    groups = result.per_condition if any(e.condition for e in result.episodes) else result.per_task
    rows = [(name or "nominal", summary) for name, summary in groups.items()]
    if len(rows) > 1:
        rows.append(("all", result.summary))
    return Table(
        _caption(criterion, result.summary.success_once.confidence),
        ("", "n", "success", "interval", "length", "return"),
        tuple((name, *_summary_cells(summary, criterion)) for name, summary in rows),
    )


def rates_table(comparisons: Comparisons) -> Table:
    """Success rates side by side: a row a task, a row a condition, and one for the episodes that decide."""
    groups: list[Callable[[int], dict[str, PairedRates]]] = [
        lambda i: dict(comparisons.against_first[i].per_task),
        lambda i: {name or "nominal": r for name, r in comparisons.against_first[i].per_condition.items()},
        lambda i: {comparisons.against_first[i].decided_by: comparisons.against_first[i].overall},
    ]
    rows: list[tuple[str, ...]] = []
    for group in groups:
        columns = [group(i) for i in range(len(comparisons.against_first))]
        if len(columns[0]) == 1 and group is not groups[-1]:
            continue
        for name, first in columns[0].items():
            others = [_rate_cell(column[name].second) for column in columns]
            rows.append((name, str(first.first.n), _rate_cell(first.first), *others))
    confidence = comparisons.against_first[0].overall.first.confidence
    return Table(_caption(comparisons.criterion, confidence), ("", "n", *comparisons.names), tuple(rows))


def pairs_table(comparisons: Comparisons) -> Table:
    """One row for each pair of policies: difference, exact McNemar test, and the p-value after Holm's correction."""
    rows = tuple(
        (
            f"{pair.second} \u2212 {pair.first}",
            str(pair.rates.first.n),
            points(pair.rates.difference.value),
            difference_interval(pair.rates.difference),
            f"{pair.rates.p_value:.2g}",
            f"{pair.p_holm:.2g}",
        )
        for pair in comparisons.pairs
    )
    caption = (
        f"Paired differences in percentage points (Newcombe's interval at {comparisons.confidence:.0%}), exact McNemar "
        f"tests, and Holm's correction over {len(rows)} test{'s' if len(rows) > 1 else ''}."
    )
    return Table(caption, ("pair", "n", "difference", "interval", "p", "p (Holm)"), rows)


def methods_table(comparison: MethodsComparison) -> Table:
    """One row for each method: training runs, mean and interquartile mean, and the difference from the first."""
    differences = {one.second: one.difference for one in comparison.against_first}
    rows = []
    for m in comparison.methods:
        d = differences.get(m.name)
        change = "" if d is None else f"{points(d.value)} [{points(d.low)}, {points(d.high)}]"
        mean, iqm = (f"{percent(a.value)} [{percent(a.low)}, {percent(a.high)}]" for a in (m.mean, m.iqm))
        rows.append((m.name, str(len(m.runs)), mean, iqm, change))
    num_tasks = len(comparison.tasks)
    caption = (
        f"Mean success over training runs and {num_tasks} task{'s' if num_tasks > 1 else ''} "
        f"({comparison.num_episodes} episodes a run), interquartile mean, and difference from {comparison.names[0]} in "
        f"percentage points. Bootstrap intervals at {comparison.confidence:.0%}, those of the differences together "
        "(Bonferroni)."
    )
    return Table(caption, ("", "runs", "mean", "IQM", "difference"), tuple(rows))


def percent(share: float) -> str:
    return f"{share:.1%}"


def interval(rate: Rate) -> str:
    return f"[{rate.low:.1%}, {rate.high:.1%}]"


def points(share: float) -> str:
    """A difference of rates in percentage points, with a true minus sign."""
    return f"{100 * share:+.1f}".replace("-", "\u2212")


def difference_interval(difference: Difference) -> str:
    return f"[{points(difference.low)}, {points(difference.high)}]"


def _summary_cells(summary: Summary, criterion: str) -> tuple[str, ...]:
    rate: Rate = getattr(summary, criterion)
    return str(rate.n), percent(rate.rate), interval(rate), f"{summary.mean_length:.1f}", f"{summary.mean_return:.2f}"


def _rate_cell(rate: Rate) -> str:
    return f"{percent(rate.rate)} {interval(rate)}"


def _caption(criterion: str, confidence: float) -> str:
    when = "at some step" if criterion == "success_once" else "at the last step"
    return f"Share of episodes that succeeded {when}, with Wilson intervals at {confidence:.0%}."


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(_tex(cell) for cell in cells) + r" \\"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
