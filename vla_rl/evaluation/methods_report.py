"""The report of methods with several training runs each: how they compare, and how far their seeds lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from vla_rl.evaluation.aggregate import mean_scores
from vla_rl.evaluation.charts import SeedsRow, seeds_chart
from vla_rl.evaluation.conditions_table import STYLES
from vla_rl.evaluation.eval_report import eval_provenance, protocol_banner, read_provenance
from vla_rl.evaluation.methods import MethodDifference, MethodsComparison
from vla_rl.evaluation.page import (
    Curve,
    command_section,
    curves_section,
    html_table,
    provenance_section,
    section,
    task_cell,
    write_page,
)
from vla_rl.evaluation.profiles import profiles_section
from vla_rl.evaluation.result import EvalResult
from vla_rl.evaluation.tables import points

Runs = Mapping[str, Sequence[tuple[Path, EvalResult]]]


def write_methods_report(
    path: str | Path,
    comparison: MethodsComparison,
    runs: Runs,
    *,
    command: str = "",
    curves: Sequence[Curve] = (),
) -> Path:
    """Write the comparison as one HTML file and return its path. `runs`: method -> (folder, result) of each run."""
    names = comparison.names
    banners = list(dict.fromkeys(protocol_banner(result) for group in runs.values() for _, result in group))
    banners += [f'<p class="banner warn">{escape(note)}</p>' for note in dict.fromkeys(comparison.notes)]
    styles = dict(zip(names, STYLES, strict=False))
    return write_page(
        Path(path),
        title=" against ".join((", ".join(names[1:]), names[0])),
        description=f"Training runs of each method, all evaluated on the same {comparison.num_episodes} episodes of "
        f"{', '.join(comparison.tasks)}.",
        sections=(
            *banners,
            _verdict(comparison),
            _seeds(comparison),
            profiles_section({m.name: mean_scores(m.outcomes) for m in comparison.methods}, styles),
            _differences(comparison),
            _tasks(comparison),
            curves_section(curves),
            *(
                provenance_section(eval_provenance(result, read_provenance(folder)), f"{name}, {folder}")
                for name, group in runs.items()
                for folder, result in group
            ),
            command_section(command),
        ),
    )


def method_sentence(one: MethodDifference, comparison: MethodsComparison) -> str:
    """What may be claimed of a method against the first, in one sentence."""
    d, means = one.difference, {m.name: m.mean.value for m in comparison.methods}
    change = f"{points(d.value)} points, interval {points(d.low)} to {points(d.high)}"
    rates = f"mean success goes from {means[one.first]:.1%} to {means[one.second]:.1%} ({change})"
    if one.claim == "not told apart":
        return f"No difference between {one.second} and {one.first} can be claimed: {rates}."
    return f"{one.second} is {one.claim} than {one.first}: {rates}."


def _verdict(comparison: MethodsComparison) -> str:
    said = "".join(
        f'<p class="sentence">{escape(method_sentence(one, comparison))}</p>' for one in comparison.against_first
    )
    counts = ", ".join(f"{len(m.runs)} of {m.name}" for m in comparison.methods)
    rest = f"Training runs: {counts}. Runs and episodes are resampled, the episodes together for both methods."
    if len(comparison.against_first) > 1:
        rest += (
            f" All {len(comparison.against_first)} intervals hold together at {comparison.confidence:.0%} (Bonferroni)."
        )
    fewest = min(len(m.runs) for m in comparison.methods)
    if fewest < 2:
        rest += " One run is no sample of a method: nothing is claimed of another seed."
    elif fewest < 10:
        rest += " Few runs are few: an interval at 95% covers the truth in 85% of studies with 3 runs, in 89% with 5."
    return f'<section class="verdict">{said}<p class="rest">{escape(rest)}</p></section>'


def _seeds(comparison: MethodsComparison) -> str:
    rows = [
        SeedsRow(m.name, STYLES[i % len(STYLES)], m.runs, m.mean.value, m.mean.low, m.mean.high)
        for i, m in enumerate(comparison.methods)
    ]
    hint = "Each dot is a training run. Line and whiskers: mean over the runs and its interval."
    chart = f"<figure>{seeds_chart(rows, 'Success of each training run')}</figure>"
    return section("Success of each training run", f'<div class="grid-cards">{chart}</div>', hint)


def _differences(comparison: MethodsComparison) -> str:
    rows = []
    for one in comparison.against_first:
        d = one.difference
        rows.append(
            [
                f"{escape(one.second)} &minus; {escape(one.first)}",
                str(d.num_runs),
                f"{points(d.value)}<small>[{points(d.low)}, {points(d.high)}] at {d.confidence:.1%}</small>",
                escape(one.claim),
            ]
        )
    hint = "Percentage points. The number of runs is that of the method with fewer of them."
    return section("Differences", html_table(("pair", "runs", "difference", "the second is"), rows), hint)


def _tasks(comparison: MethodsComparison) -> str:
    """Means over the runs by task, where there are several."""
    if len(comparison.tasks) < 2:
        return ""
    scores = [mean_scores(m.outcomes) for m in comparison.methods]
    rows = [
        [
            task_cell(task),
            *(f"{s[:, t].mean():.1%}<small>{s[:, t].min():.1%} to {s[:, t].max():.1%}</small>" for s in scores),
        ]
        for t, task in enumerate(comparison.tasks)
    ]
    header = ("task", *comparison.names)
    hint = "Mean over the runs, and their range. Descriptions: no test decides by task."
    return section("By task", html_table(header, rows, kind="sortable"), hint)
