"""The report of one evaluation: how often it succeeds and how sure that is, on what, under which changes, how fast, and
where it fails."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.evaluation.charts import rate_bar
from vla_rl.evaluation.conditions_table import conditions_section, must_not_succeed
from vla_rl.evaluation.gallery import failure_gallery
from vla_rl.evaluation.page import (
    MediaBudget,
    command_section,
    html_table,
    provenance_section,
    section,
    task_cell,
    write_page,
)
from vla_rl.evaluation.profiles import profiles_section
from vla_rl.evaluation.result import CRITERIA, Episode, EvalResult, Summary
from vla_rl.evaluation.statistics import Rate
from vla_rl.evaluation.tables import interval

REPORT_FILE = "report.html"
PROVENANCE_FILE, DIFF_FILE = "provenance.json", "source.diff"  # as in the folder of a run
_PROTOCOLS = {
    "held_out": "Held out: no episode of this suite is among those of the training.",
    "train_equals_test": "Train = test: the training may have seen these very initial states. That is this benchmark's "
    "custom, and says nothing of states that are new.",
}


def write_eval_report(folder: Path, criterion: str | None = None, media_bytes: int | None = None) -> Path:
    """Write `report.html` into the folder of a result, from what lies there, and return its path.

    `criterion`: which success decides; None is that of the suite. `media_bytes`: of videos and pictures in the page;
    None is what keeps it under 20 MB. Raises FileNotFoundError where there is no result, and ValueError for one that is
    damaged.
    """
    folder = Path(folder)
    result = EvalResult.load(folder)
    criterion = criterion_of(result) if criterion is None else criterion
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    budget = MediaBudget() if media_bytes is None else MediaBudget(media_bytes)
    origin = read_provenance(folder)
    nominal = deciding(result)
    return write_page(
        folder / REPORT_FILE,
        title=f"Evaluation of {policy_name(result, folder)}",
        description=_description(result),
        sections=(
            protocol_banner(result),
            _verdict(result, nominal, policy_name(result, folder), criterion),
            _tasks(nominal, criterion),
            _profile(nominal, criterion, policy_name(result, folder)),
            conditions_section({"": result}, criterion, unsupported(result)),
            _timing(result),
            failure_gallery(
                folder, meant_to_succeed(result), criterion, budget=budget, stage_names=stage_names(result)
            ),
            provenance_section(eval_provenance(result, origin)),
            command_section(str(origin.get("command", ""))),
        ),
    )


def deciding(result: EvalResult) -> tuple[Episode, ...]:
    """The episodes that the verdict is about: those without a condition where there are any, else all."""
    return tuple(episode for episode in result.episodes if not episode.condition) or result.episodes


def criterion_of(result: EvalResult) -> str:
    """Which success its suite counts."""
    return (result.config.get("suite") or {}).get("criterion", "success_once")


def meant_to_succeed(result: EvalResult) -> list[Episode]:
    """All but those with a wrong instruction, which a good policy does not follow into success."""
    return [episode for episode in result.episodes if not must_not_succeed(episode.condition)]


def stage_names(result: EvalResult) -> tuple[str, ...]:
    """Stages of the task in their order, as the environment named them."""
    return tuple(result.config.get("stage_names", ()))


def policy_name(result: EvalResult, folder: Path) -> str:
    return str(result.config.get("policy", folder.resolve().name))


def unsupported(result: EvalResult) -> Mapping[str, str]:
    return result.config.get("unsupported_conditions", {})


def read_provenance(folder: Path) -> dict[str, Any]:
    """What the folder of a result says of its origin: command, revision, versions, hardware, what was not committed.
    Empty without it."""
    file, difference = folder / PROVENANCE_FILE, folder / DIFF_FILE
    origin = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    text = difference.read_text(encoding="utf-8", errors="replace") if difference.is_file() else ""
    return origin | ({"uncommitted changes": text} if text else {})


def eval_provenance(result: EvalResult, origin: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text, for `provenance_section`."""
    suite = result.config.get("suite")
    texts = {"suite": f"{suite['name']}, version {suite['version']}, hash {suite['hash']}"} if suite else {}
    seeds = sorted({episode.seed for episode in result.episodes})
    texts["seeds"] = _ranges(seeds)
    for name, value in origin.items():
        if value and name != "command":
            flat = isinstance(value, dict) and not any(isinstance(v, (dict, list)) for v in value.values())
            texts[name] = ", ".join(f"{k} {v}" for k, v in value.items()) if flat else str(value)
    texts["wall time"] = f"{result.wall_s:.1f} s"
    return texts | {"configuration": json.dumps(dict(result.config), indent=2, ensure_ascii=False)}


def protocol_banner(result: EvalResult) -> str:
    """What the suite's protocol means; "train = test" cannot be overlooked."""
    protocol = (result.config.get("suite") or {}).get("protocol")
    if protocol not in _PROTOCOLS:
        return ""
    kind = "warn" if protocol == "train_equals_test" else "fine"
    head, _, rest = _PROTOCOLS[protocol].partition(":")
    return f'<p class="banner {kind}"><b>{head.upper() if kind == "warn" else head}:</b>{escape(rest)}</p>'


def eval_sentence(name: str, rate: Rate, criterion: str) -> str:
    """What may be claimed from one evaluation, in one sentence."""
    when = "" if criterion == "success_once" else " and holds it to the end"
    return (
        f"{name} succeeds in {rate.rate:.1%} of its episodes{when} "
        f"({rate.confidence:.0%} interval {rate.low:.1%} to {rate.high:.1%}, {rate.successes} of {rate.n})."
    )


def _description(result: EvalResult) -> str:
    tasks, suite = len(result.per_task), result.config.get("suite")
    conditions = [condition for condition in result.per_condition if condition]
    parts = [f"{len(result.episodes)} episodes of {tasks} task{'s' if tasks > 1 else ''}"]
    parts += [f"nominal and under {len(conditions)} conditions"] if conditions else []
    parts += [f"suite {suite['name']} version {suite['version']}"] if suite else []
    return ", ".join(parts) + "."


def _verdict(result: EvalResult, nominal: Sequence[Episode], name: str, criterion: str) -> str:
    summary = Summary.of(nominal)
    tiles = [("success at some step", summary.success_once), ("success at the last step", summary.success_at_end)]
    numbers = "".join(
        f'<div class="number b-{"trained" if i == 0 else "other"}"><b>{rate.rate:.1%}</b><span>{label}<br>'
        f"{interval(rate)} &middot; n&nbsp;=&nbsp;{rate.n}</span></div>"
        for i, (label, rate) in enumerate(tiles)
    )
    rest = [f"Mean length {summary.mean_length:.1f} control steps, mean return {summary.mean_return:.2f}."]
    rest += _early_or_lost(result)
    clamped = sum(episode.num_clamped for episode in nominal)
    if clamped:
        share = clamped / max(1, sum(episode.length for episode in nominal))
        rest.append(f"The safety filter changed the action in {clamped} control steps ({share:.1%}).")
    if len(nominal) < len(result.episodes):
        rest.append("These numbers are those of the nominal episodes; the others are under generalisation.")
    sentence = escape(eval_sentence(name, getattr(summary, criterion), criterion))
    return (
        f'<section class="verdict"><p class="sentence">{sentence}</p><div class="numbers">{numbers}</div>'
        f'<p class="rest">{escape(" ".join(rest))}</p></section>'
    )


def _both(summary: Summary) -> tuple[tuple[str, Rate], tuple[str, Rate]]:
    return ("success_once", summary.success_once), ("success_at_end", summary.success_at_end)


def _early_or_lost(result: EvalResult) -> list[str]:
    """What has to be said of cases that were stopped by their rule, and of episodes that count nowhere."""
    stopped = result.config.get("stopped", {})
    said = [
        f"{case} was stopped after {one['n']} episodes by the rule stated before the run: {one['reason']}. A Wilson "
        "interval does not hold after such a stop."
        for case, one in stopped.items()
    ]
    lost = result.config.get("lost_seeds", [])
    cases = lost if isinstance(lost, dict) else {"": lost}
    return said + [
        f"{len(seeds)} episodes {f'of {case} ' if case else ''}were lost to a simulator that died, and count nowhere: "
        f"seeds {_ranges(sorted(seeds))}."
        for case, seeds in cases.items()
        if seeds
    ]


def _tasks(nominal: Sequence[Episode], criterion: str) -> str:
    groups: dict[str, list[Episode]] = {}
    for episode in nominal:
        groups.setdefault(episode.task, []).append(episode)
    rows = []
    for task, episodes in groups.items():
        s = Summary.of(episodes)
        bars = [rate_bar(r, "trained") if name == criterion else "" for name, r in _both(s)]
        cells = [f"{r.rate:.1%} {bar}<small>{interval(r)}</small>" for (_, r), bar in zip(_both(s), bars, strict=True)]
        rows.append([task_cell(task), *cells, str(len(episodes)), f"{s.mean_length:.1f}", f"{s.mean_return:.2f}"])
    header = ("task", "success once", "success at end", "episodes", "length", "return")
    hint = "Brackets and whiskers: Wilson intervals. Length in control steps. A click on a column sorts by it."
    return section("By task", html_table(header, rows, kind="sortable"), hint)


def _profile(nominal: Sequence[Episode], criterion: str, name: str) -> str:
    """Over the tasks, where there are several."""
    per_task = EvalResult(tuple(nominal), {}).per_task.values()
    scores = np.array([[getattr(summary, criterion).rate for summary in per_task]])
    return profiles_section({name: scores}, {name: "trained"})


def _timing(result: EvalResult) -> str:
    if result.timing is None:
        return ""
    t = result.timing
    named = (
        ("policy call, of one batch", t.policy_ms, "ms"),
        ("environments' chunk", t.env_ms, "ms"),
        ("cycle time of successes", t.cycle_time_s, "s"),
    )
    rows = [
        [escape(name), *(f"{values[p]:.4g}&nbsp;{unit}" for p in ("p50", "p95", "p99", "max"))]
        for name, values, unit in named
        if values and any(values.values())
    ]
    hint = (
        f"{t.num_decisions} decisions, {t.decisions_per_s:.4g} a second over the whole evaluation. Cycle time is that "
        "of the control steps, not of the simulator."
    )
    return section("Time", html_table(("", "median", "95%", "99%", "longest"), rows) if rows else "", hint)


def _ranges(seeds: Sequence[int]) -> str:
    """Sorted numbers as text: 0 to 9, 12, 20 to 29."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
