"""The paired report: several evaluations of the same episodes, each against the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from vla_rl.evaluation.action_curves import action_curves, read_plan, shared_range
from vla_rl.evaluation.charts import Bar, bar_chart
from vla_rl.evaluation.compare import Comparisons, paired_episodes
from vla_rl.evaluation.conditions_table import STYLES, conditions_section
from vla_rl.evaluation.eval_report import (
    eval_provenance,
    meant_to_succeed,
    protocol_banner,
    read_provenance,
    stage_names,
    unsupported,
)
from vla_rl.evaluation.forgetting_report import tasks_tradeoff_section
from vla_rl.evaluation.gallery import failure_gallery
from vla_rl.evaluation.page import (
    Curve,
    MediaBudget,
    command_section,
    curves_section,
    html_table,
    outcome,
    p_value,
    provenance_section,
    section,
    task_cell,
    video_element,
    write_page,
)
from vla_rl.evaluation.profiles import profiles_section
from vla_rl.evaluation.report import is_protocol, verdict_sentence
from vla_rl.evaluation.result import Episode, EvalResult
from vla_rl.evaluation.statistics import Difference, Rate
from vla_rl.evaluation.tables import difference_interval, interval, points

_PAIRS = 6  # filmed episodes that are shown


def write_comparison(
    path: str | Path,
    comparisons: Comparisons,
    results: Mapping[str, tuple[Path, EvalResult]],
    *,
    command: str = "",
    curves: Sequence[Curve] = (),
    new_tasks: Sequence[str] = (),
) -> Path:
    """Write the comparison as one HTML file and return its path.

    `results`: name -> (folder of the result, result), in the order of `comparisons.names`. `curves`: learning curves.
    `new_tasks`: those that were trained on after the first policy, to be drawn against all others.
    """
    names, budget = comparisons.names, MediaBudget()
    first, last = results[names[0]], results[names[-1]]
    played = {name: result for name, (_, result) in results.items()}
    unable = {c: reason for _, result in results.values() for c, reason in unsupported(result).items()}
    return write_page(
        Path(path),
        title=" against ".join((", ".join(names[1:]), names[0])),
        description=f"Paired on {comparisons.against_first[0].overall.first.n} episodes that all of them played.",
        sections=(
            *_labels(comparisons, results),
            _verdict(comparisons),
            _bars(comparisons),
            _tests(comparisons),
            _tasks(comparisons),
            _profiles(comparisons),
            tasks_tradeoff_section(played, new_tasks, comparisons.criterion) if new_tasks else "",
            conditions_section(played, comparisons.criterion, unable),
            _films((names[0], *first), (names[-1], *last), comparisons, budget),
            failure_gallery(
                last[0],
                meant_to_succeed(last[1]),
                comparisons.criterion,
                stage_names=stage_names(last[1]),
                budget=budget,
            ),
            curves_section(curves),
            *(provenance_section(eval_provenance(r, read_provenance(f)), name) for name, (f, r) in results.items()),
            command_section(command),
        ),
    )


def _labels(comparisons: Comparisons, results: Mapping[str, tuple[Path, EvalResult]]) -> list[str]:
    """What qualifies everything below: the protocol, and settings that differ."""
    banners = list(dict.fromkeys(protocol_banner(result) for _, result in results.values()))
    notes = list(dict.fromkeys(note for one in comparisons.against_first for note in one.notes if is_protocol(note)))
    return banners + [f'<p class="banner warn">{escape(note)}</p>' for note in notes]


def _verdict(comparisons: Comparisons) -> str:
    said = "".join(f'<p class="sentence">{escape(verdict_sentence(one))}</p>' for one in comparisons.against_first)
    rest = ""
    for one in comparisons.against_first:
        r = one.overall
        rest += (
            f'<p class="rest">{escape(one.names[1])}: {r.both} episodes solved by both, {r.only_second} only by '
            f"{escape(one.names[1])}, {r.only_first} only by {escape(one.names[0])}, {r.neither} by neither (exact "
            f"McNemar test, {p_value(r.p_value)}). Episode length {_steps(one.length_difference)} control steps.</p>"
        )
    return f'<section class="verdict">{said}{rest}</section>'


def _steps(d: Difference) -> str:
    return f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]".replace("-", "\u2212")


def _bars(comparisons: Comparisons) -> str:
    rates = [comparisons.against_first[0].overall.first, *(one.overall.second for one in comparisons.against_first)]
    bars = [
        Bar(name, rate, STYLES[i % len(STYLES)])
        for i, (name, rate) in enumerate(zip(comparisons.names, rates, strict=True))
    ]
    return section("Success", f'<div class="grid-cards"><figure>{bar_chart(bars, "Success rates")}</figure></div>')


def _tests(comparisons: Comparisons) -> str:
    """All pairs, with the correction named."""
    rows = []
    for pair in comparisons.pairs:
        r = pair.rates
        claim = "differ" if pair.p_holm < 1 - comparisons.confidence else "not told apart"
        rows.append(
            [
                f"{escape(pair.second)} &minus; {escape(pair.first)}",
                str(r.first.n),
                f"{points(r.difference.value)}<small>{difference_interval(r.difference)}</small>",
                p_value(r.p_value),
                p_value(pair.p_holm),
                claim,
            ]
        )
    count = len(rows)
    hint = (
        f"Differences in percentage points with Newcombe's {comparisons.confidence:.0%} interval for paired rates; "
        "exact McNemar tests. "
        f"Corrected by Holm's method over {'one test' if count == 1 else f'all {count} tests'} of this table, which "
        f"keeps the chance of one false claim at {1 - comparisons.confidence:.0%}. Tests by task or condition are not "
        "part of it."
    )
    header = ("pair", "episodes", "difference", "p", "p, corrected", f"at {comparisons.confidence:.0%}")
    return section("Every pair", html_table(header, rows), hint)


def _tasks(comparisons: Comparisons) -> str:
    reference = comparisons.against_first[0]
    if len(reference.per_task) < 2:
        return ""
    rows = []
    for task, first in reference.per_task.items():
        cells = [task_cell(task), str(first.first.n), _rate(first.first)]
        for one in comparisons.against_first:
            r = one.per_task[task]
            cells.append(_rate(r.second))
            cells.append(f"{points(r.difference.value)}<small>{difference_interval(r.difference)}</small>")
        rows.append(cells)
    header = ["task", "episodes", comparisons.names[0]]
    for name in comparisons.names[1:]:
        header += [name, "difference"]
    return section(
        "By task",
        html_table(header, rows, kind="sortable"),
        "Differences in percentage points with their intervals, paired.",
    )


def _profiles(comparisons: Comparisons) -> str:
    """Over the tasks; each policy is a training run of its own."""
    names, against = comparisons.names, comparisons.against_first
    scores = {names[0]: np.array([[r.first.rate for r in against[0].per_task.values()]])}
    scores |= {one.names[1]: np.array([[r.second.rate for r in one.per_task.values()]]) for one in against}
    return profiles_section(scores, dict(zip(names, STYLES, strict=False)))


def _rate(rate: Rate) -> str:
    return f"{rate.rate:.1%}<small>{interval(rate)}</small>"


Side = tuple[str, Path, EvalResult]


def _films(first: Side, second: Side, comparisons: Comparisons, budget: MediaBudget) -> str:
    """The first episodes that both were filmed in, side by side, with their action chunks."""
    names = (first[0], second[0])
    pairs, _ = paired_episodes(first[2], second[2], names=names, across_suites=comparisons.across_suites)
    figures, shown, drawn = "", 0, False
    for a, b in pairs:
        films = (first[1] / a.video, second[1] / b.video)
        if shown == _PAIRS or not (a.video and b.video and all(film.is_file() for film in films)):
            continue
        plans = [read_plan(film) for film in films]
        scale = shared_range([plan for plan in plans if plan is not None]) if any(plans) else None
        drawn |= scale is not None
        sides = ""
        for name, episode, film, plan in zip(names, (a, b), films, plans, strict=True):
            curves = action_curves(plan, *scale) if plan is not None and scale is not None else ""
            sides += _side(name, episode, film, curves, comparisons.criterion, budget)
        where = f"{a.task}{f', {a.condition}' if a.condition else ''}, seed {a.seed}"
        figures += (
            f'<figure class="pair"><figcaption><q>{escape(a.instruction)}</q> <small>{escape(where)}</small>'
            f'</figcaption><div class="sides">{sides}</div></figure>'
        )
        shown += 1
    hint = (
        "The same start, sentence and noise on both sides; episodes in their declared order, not chosen by their "
        "outcome. Click a video to play the pair again."
    )
    if drawn:
        hint += (
            " Curves: actions by control step, before the environment clamps them. Thick: executed. Thin: each chunk "
            "as it was planned. Dotted: decisions. Both sides have one scale."
        )
    body = f'<div class="pairs wide">{figures}</div>{budget.note()}' if figures else ""
    return section("The same episodes side by side", body, hint)


def _side(name: str, episode: Episode, film: Path, curves: str, criterion: str, budget: MediaBudget) -> str:
    url = budget.embed(film.read_bytes(), "video/mp4")
    video = video_element(url, name) if url else ""
    success = outcome(getattr(episode, criterion))
    said = f"{escape(name)} &middot; {success} &middot; {episode.length} steps"
    return f'<div class="side">{video}{said}{curves}</div>'
