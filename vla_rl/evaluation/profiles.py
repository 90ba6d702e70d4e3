"""Performance profiles and interquartile means in a report: several policies over training runs and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from vla_rl.evaluation.aggregate import Aggregate, performance_profile, stratified_bootstrap
from vla_rl.evaluation.charts import Series, line_chart
from vla_rl.evaluation.page import html_table, section

FEWEST_SCORES = 3  # a run's success in a task is a score; of two a profile says no more than the two
_THRESHOLDS = tuple(np.linspace(0.0, 1.0, 101).tolist())


def profiles_section(scores: Mapping[str, np.ndarray], styles: Mapping[str, str]) -> str:
    """A chart and a table with a row for each name. `scores`: name -> success [R, T] of its runs and tasks; `styles`:
    name -> a role of report.css; one that has none is in the table alone. "" where every name has fewer than
    `FEWEST_SCORES` scores."""
    if not scores or max(values.size for values in scores.values()) < FEWEST_SCORES:
        return ""
    series = [_series(name, scores[name], style) for name, style in styles.items() if name in scores]
    title = "Performance profiles"
    chart = line_chart(series, title, x_label="success rate to exceed, %", percent=True)
    rows = [
        [
            escape(name),
            str(len(values)),
            str(values.shape[1]),
            _aggregate_cell(stratified_bootstrap(values)),
            f"{values.mean():.1%}",
            f"{values.min():.1%} to {values.max():.1%}",
        ]
        for name, values in scores.items()
    ]
    header = ("", "runs", "tasks", "interquartile mean", "mean", "range")
    one_run = min(len(values) for values in scores.values()) == 1
    hint = (
        "A score is the success of one training run in one task. The curve at x is the share of all scores above x, so "
        "the higher curve is better, and curves that cross are better at different things. "
    )
    hint += (
        "One training run has no band and no interval: another seed may draw another curve."
        if one_run
        else "Bands and brackets are bootstrap intervals over runs within tasks, for each x alone (Agarwal et al. "
        "2021); with few runs they are too narrow."
    )
    body = f'<div class="grid-cards"><figure>{chart}</figure></div>{html_table(header, rows)}'
    return section("Over tasks" if one_run else "Over training runs and tasks", body, hint)


def _aggregate_cell(found: Aggregate) -> str:
    """A share with its interval, for the cell of a table; one run has none."""
    low_high = f"<small>[{found.low:.1%}, {found.high:.1%}]</small>" if found.num_runs > 1 else ""
    return f"{found.value:.1%}{low_high}"


def _series(name: str, scores: np.ndarray, style: str) -> Series:
    profile = performance_profile(scores, _THRESHOLDS)
    band = (profile.low, profile.high) if len(scores) > 1 else None
    return Series(name, style, tuple(100 * x for x in profile.thresholds), profile.fraction, band)
