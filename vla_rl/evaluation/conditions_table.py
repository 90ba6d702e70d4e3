"""Success under changed conditions, by axis and level, of one policy or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from vla_rl.evaluation.charts import rate_bar
from vla_rl.evaluation.conditions import AXES, MUST_NOT_SUCCEED
from vla_rl.evaluation.page import html_table, section
from vla_rl.evaluation.result import EvalResult, Summary
from vla_rl.evaluation.statistics import Rate
from vla_rl.evaluation.tables import interval

STYLES = ("baseline", "trained", "other", "expert", "control")


def conditions_section(results: Mapping[str, EvalResult], criterion: str, unsupported: Mapping[str, str]) -> str:
    """Axes as rows and levels as columns; crossed conditions have rows of their own below.

    `results`: name -> evaluation; one without a name is the only one. `unsupported`: condition -> why the simulator
    cannot make it. "" where no condition was asked for.
    """
    found = list(dict.fromkeys(c for result in results.values() for c in result.per_condition if c))
    if not found and not unsupported:
        return ""
    alone = [c for c in found if "+" not in c]
    there = {_axis(c) for c in alone}
    axes = [axis for axis in AXES if axis in there] + sorted(there - set(AXES))
    levels = sorted({_level(c) for c in alone}, key=_as_number)
    per_condition = {name: result.per_condition for name, result in results.items()}
    rows = [["nominal", _cells(per_condition, "", criterion), *[""] * (len(levels) - 1)]] if levels else []
    rows += [[_label(axis), *(_cells(per_condition, f"{axis}@{n}", criterion) for n in levels)] for axis in axes]
    header = ("axis", *(f"level {level}" for level in levels))
    body = html_table(header, rows, kind="axes") if rows else ""
    crossed = [c for c in found if "+" in c]
    if crossed:
        lines = [[escape(_crossed(c)), _cells(per_condition, c, criterion)] for c in crossed]
        body += "<h3>Several at once</h3>" + html_table(("conditions", "success"), lines, kind="axes")
    if unsupported:
        items = "".join(f"<dt>{escape(c)}</dt><dd>{escape(reason)}</dd>" for c, reason in unsupported.items())
        body += f"<h3>Not measured: this simulator cannot do it</h3><dl>{items}</dl>"
    return section("Generalisation", _legend(results) + body, _hint(found, criterion))


def must_not_succeed(condition: str) -> bool:
    """Whether a good policy fails under `condition`: its sentence no longer names the goal."""
    return any(_axis(part) in MUST_NOT_SUCCEED for part in condition.split("+"))


def _cells(per_condition: Mapping[str, Mapping[str, Summary]], condition: str, criterion: str) -> str:
    """The rates of all policies under one condition, one above the other."""
    parts = ""
    for i, (name, summaries) in enumerate(per_condition.items()):
        if condition not in summaries:
            continue
        rate: Rate = getattr(summaries[condition], criterion)
        style = STYLES[i % len(STYLES)] if name else "trained"
        parts += (
            f'<div class="cell">{rate_bar(rate, style)}<b>{rate.rate:.1%}</b> '
            f"<small>{interval(rate)} n&nbsp;=&nbsp;{rate.n}</small></div>"
        )
    return parts or '<span class="absent">not asked</span>'


def _legend(results: Mapping[str, EvalResult]) -> str:
    if len(results) < 2:
        return ""
    keys = "".join(
        f'<span><span class="key s-{STYLES[i % len(STYLES)]}"></span>{escape(name)}</span>'
        for i, name in enumerate(results)
    )
    return f'<p class="legend">From top to bottom in each cell: {keys}</p>'


def _hint(found: list[str], criterion: str) -> str:
    when = "at some step" if criterion == "success_once" else "at the last step"
    hint = f"Success {when}, with Wilson intervals; a higher level is a larger change."
    if any(must_not_succeed(condition) for condition in found):
        hint += " A wrong instruction must not succeed: there, lower is better."
    return hint


def _crossed(condition: str) -> str:
    """`light@2+camera@2` as "light, camera at level 2", and with their levels where these differ."""
    parts = condition.split("+")
    levels = {_level(part) for part in parts}
    if len(levels) > 1:
        return " + ".join(parts)
    return f"{', '.join(_axis(part).replace('_', ' ') for part in parts)} at level {levels.pop()}"


def _label(axis: str) -> str:
    name = escape(axis.replace("_", " "))
    return f"{name}<small>lower is better</small>" if axis in MUST_NOT_SUCCEED else name


def _axis(condition: str) -> str:
    return condition.partition("@")[0]


def _level(condition: str) -> str:
    return condition.partition("@")[2]


def _as_number(level: str) -> tuple[float, str]:
    return (float(level), level) if level.replace(".", "", 1).isdigit() else (float("inf"), level)
