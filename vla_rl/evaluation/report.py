"""The report of a run: one HTML file with everything in it, which needs neither network nor server.

It answers, in this order: did it get better, how sure is that, where, what does it look like, how did it learn, what
did it cost, and how is it repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from vla_rl.evaluation.charts import Bar, bar_chart
from vla_rl.evaluation.compare import Comparison, compare
from vla_rl.evaluation.page import (
    PANELS,
    Curve,
    MediaBudget,
    Panel,
    Role,
    command_section,
    curves_section,
    interval_points,
    outcome,
    p_value,
    provenance_section,
    section,
    video_element,
    write_page,
)
from vla_rl.evaluation.profiles import profiles_section
from vla_rl.evaluation.result import CRITERIA, EvalResult
from vla_rl.evaluation.statistics import Rate
from vla_rl.evaluation.tables import interval, points
from vla_rl.progress import format_duration
from vla_rl.rollout.recorder import Recording

_OF_THE_POLICY = ("policy", "policy_digest", "cameras", "image_size", "lost_seeds")


@dataclass(frozen=True)
class ReportRow:
    """One policy of the table. `role` decides colour and what the verdict says about it; `note` explains it."""

    label: str
    role: Role
    result: EvalResult
    note: str = ""


@dataclass(frozen=True)
class VideoPair:
    """The same episode before and after training."""

    seed: int
    instruction: str
    before: Path
    after: Path
    before_success: bool
    after_success: bool


@dataclass(frozen=True)
class ReportData:
    """Everything that the report shows.

    `rows`: policies in the order of the table, exactly one "baseline" and one "trained", evaluated on the same
    episodes.
    `stage_wall_s`: seconds by stage. `provenance`: name -> text (config, revision, versions, seeds; text of several
    lines is shown as it is). `command`: what to type to get this again. `criterion`: which success decides.
    """

    title: str
    rows: tuple[ReportRow, ...]
    command: str
    description: str = ""
    curves: tuple[Curve, ...] = ()
    panels: tuple[Panel, ...] = PANELS
    videos: tuple[VideoPair, ...] = ()
    stage_wall_s: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    criterion: str = "success_once"

    def __post_init__(self) -> None:
        roles = [row.role for row in self.rows]
        if roles.count("baseline") != 1 or roles.count("trained") != 1:
            raise ValueError(f"ReportData: expected one baseline and one trained row, got the roles {roles}")
        if self.criterion not in CRITERIA:
            raise ValueError(f"ReportData: criterion must be one of {CRITERIA}, got {self.criterion!r}")

    def row(self, role: Role) -> ReportRow:
        return next(row for row in self.rows if row.role == role)

    def rate(self, row: ReportRow) -> Rate:
        return row.result.rate(self.criterion)


def video_pairs(
    before: Mapping[int, Recording], after: Mapping[int, Recording], limit: int = 6
) -> tuple[VideoPair, ...]:
    """Pairs of the recordings that both sides have, in the order of their seeds: chosen by nothing else, so that a
    report does not show the best ones only."""
    shared = sorted(before.keys() & after.keys())[:limit]
    return tuple(
        VideoPair(s, after[s].instruction, before[s].path, after[s].path, before[s].success, after[s].success)
        for s in shared
    )


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write the report as one HTML file, atomically, and return its path.

    Raises FileNotFoundError for a video or metrics file that is missing, and EpisodesDifferError where the baseline and
    the trained policy were not evaluated on the same episodes.
    """
    baseline, trained = data.row("baseline"), data.row("trained")
    comparison = compare(
        baseline.result, trained.result, names=(baseline.label, trained.label), criterion=data.criterion
    )
    bars, wall_time = _bars_and_time(data)
    return write_page(
        Path(path),
        title=data.title,
        description=data.description,
        sections=(
            _verdict(data, comparison),
            _table(data, comparison),
            bars,
            _profiles(data),
            _videos(data),
            curves_section(data.curves, data.panels),
            wall_time,
            provenance_section(data.provenance),
            command_section(data.command),
        ),
    )


def verdict_sentence(comparison: Comparison) -> str:
    """What may be claimed from the paired comparison, in one sentence."""
    first, second = comparison.names
    r = comparison.overall
    rates = f"{r.first.rate:.1%} to {r.second.rate:.1%}"
    change = f"{points(r.difference.value)} points, {interval_points(r.difference)}"
    if r.difference.low > 0:
        return f"{second} is better than {first}: success rises from {rates} ({change})."
    if r.difference.high < 0:
        return f"{second} is worse than {first}: success falls from {rates} ({change})."
    return f"No difference between {second} and {first} can be claimed: success goes from {rates} ({change})."


def _verdict(data: ReportData, comparison: Comparison) -> str:
    shown = [
        data.row("baseline"),
        data.row("trained"),
        *(row for row in data.rows if row.role in ("control", "expert")),
    ]
    numbers = "".join(
        f'<div class="number b-{row.role}"><b>{data.rate(row).rate:.1%}</b>'
        f"<span>{escape(row.label)}<br>{interval(data.rate(row))} &middot; "
        f"n&nbsp;=&nbsp;{data.rate(row).n}</span></div>"
        for row in shown
    )
    r = comparison.overall
    rest = (
        f"Same {r.first.n} episodes for both: {r.both} solved by both, {r.only_second} only by "
        f"{comparison.names[1]}, {r.only_first} only by {comparison.names[0]}, {r.neither} by neither "
        f"(exact McNemar test, {p_value(r.p_value)}). Intervals are at {r.first.confidence:.0%}."
    )
    for row in data.rows:
        if row.role == "control":
            rest += " " + _control_sentence(data, row)
    notes = "".join(f'<p class="rest">Note: {escape(note)}.</p>' for note in comparison.notes if is_protocol(note))
    return (
        f'<section class="verdict"><p class="sentence">{escape(verdict_sentence(comparison))}</p>'
        f'<div class="numbers">{numbers}</div><p class="rest">{escape(rest)}</p>{notes}</section>'
    )


def _control_sentence(data: ReportData, control: ReportRow) -> str:
    """How far the control came from the baseline; it should not have moved."""
    baseline = data.row("baseline")
    difference = compare(baseline.result, control.result, criterion=data.criterion).overall.difference
    return (
        f"{control.label} is the control: it moved by {points(difference.value)} points from {baseline.label} "
        f"({interval_points(difference)})."
    )


def is_protocol(note: str) -> bool:
    """Settings that should be equal when two policies are compared; a checkpoint's name naturally is not."""
    return note.split(" is ")[0] not in _OF_THE_POLICY


def _table(data: ReportData, comparison: Comparison) -> str:
    rows = ""
    for row in data.rows:
        s = row.result.summary
        note = f"<small>{escape(row.note)}</small>" if row.note else ""
        rows += (
            f'<tr><td><span class="key s-{row.role}"></span>{escape(row.label)}{note}</td><td>{s.success_once.n}</td>'
            f"<td>{s.success_once.rate:.1%}<small>{interval(s.success_once)}</small></td>"
            f"<td>{s.success_at_end.rate:.1%}<small>{interval(s.success_at_end)}</small></td>"
            f"<td>{s.mean_length:.1f}</td><td>{s.mean_return:.2f}</td></tr>"
        )
    once = comparison.criterion == "success_once"
    hint = (
        f"Success {'at some step' if once else 'at the last step'} of the episode decides the verdict. "
        "Brackets: Wilson intervals. Length in control steps."
    )
    return (
        f'<section><h2>Results</h2><p class="hint">{hint}</p><div class="scroll"><table><thead><tr><th>policy</th>'
        "<th>episodes</th><th>success once</th><th>success at end</th><th>length</th><th>return</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _bars_and_time(data: ReportData) -> tuple[str, str]:
    """A single task's chart leaves room for the wall time beside it; with many tasks that comes after the curves."""
    bars, wall_time = _bars(data), _wall_time(data.stage_wall_s)
    single = len({task for row in data.rows for task in row.result.per_task}) == 1
    return (f'<div class="columns">{bars}{wall_time}</div>', "") if single and wall_time else (bars, wall_time)


def _bars(data: ReportData) -> str:
    """One chart a task, each with a bar a policy."""
    tasks = list(dict.fromkeys(task for row in data.rows for task in row.result.per_task))
    charts = ""
    for task in tasks:
        bars = [
            Bar(row.label, getattr(row.result.per_task[task], data.criterion), row.role)
            for row in data.rows
            if task in row.result.per_task
        ]
        title = f"{task} (n = {', '.join(sorted({str(bar.rate.n) for bar in bars}))})"
        charts += f"<figure><h3>{escape(title)}</h3>{bar_chart(bars, f'Success rate on {task}')}</figure>"
    return (
        '<section><h2>Success by task</h2><p class="hint">Whiskers are Wilson intervals of the rates.</p>'
        f'<div class="grid-cards">{charts}</div></section>'
    )


def _profiles(data: ReportData) -> str:
    """Over the tasks, where there are several."""
    scores = {
        row.label: np.array([[getattr(s, data.criterion).rate for s in row.result.per_task.values()]])
        for row in data.rows
    }
    first = {row.role: row.label for row in reversed(data.rows)}  # two curves of one role would look alike
    return profiles_section(scores, {label: role for role, label in first.items()})


def _videos(data: ReportData) -> str:
    before, after = data.row("baseline").label, data.row("trained").label
    budget, pairs = MediaBudget(), ""
    for pair in data.videos:
        sides = _side(before, pair.before, pair.before_success, budget)
        sides += _side(after, pair.after, pair.after_success, budget)
        pairs += (
            f'<figure class="pair"><figcaption><q>{escape(pair.instruction)}</q> '
            f'<small>seed {pair.seed}</small></figcaption><div class="sides">{sides}</div></figure>'
        )
    hint = (
        "The same start, sentence and noise on both sides; episodes chosen by their seeds, not by their outcome. "
        "Click a video to play the pair again."
    )
    body = f'<div class="pairs">{pairs}</div>{budget.note()}' if pairs else ""
    return section("The same episodes, before and after", body, hint)


def _side(label: str, video: Path, success: bool, budget: MediaBudget) -> str:
    if not video.exists():
        raise FileNotFoundError(f"write_report: the video {video} is missing; record it, or leave the pair out")
    url = budget.embed(video.read_bytes(), "video/mp4")
    film = video_element(url, label) if url else ""
    return f'<div class="side">{film}{escape(label)} &middot; {outcome(success)}</div>'


def _wall_time(stages: Mapping[str, float]) -> str:
    if not stages:
        return ""
    total = sum(stages.values())
    items = "".join(
        f'<li><span>{escape(stage)}</span><span class="bar"><i style="width:{100 * seconds / (total or 1):.1f}%"></i>'
        f"</span><span>{format_duration(seconds)}</span></li>"
        for stage, seconds in stages.items()
    )
    return f'<section><h2>Wall time: {format_duration(total)}</h2><ul class="stages">{items}</ul></section>'
