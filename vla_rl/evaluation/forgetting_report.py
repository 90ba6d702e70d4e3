"""What learning a new task cost on the others, drawn: success on one against the other, and against the divergence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from vla_rl.evaluation.charts import Point, scatter_chart
from vla_rl.evaluation.conditions_table import STYLES
from vla_rl.evaluation.forgetting import Divergence, ForgettingResult, PolicyForgetting, Role
from vla_rl.evaluation.page import html_table, interval_points, section, write_page
from vla_rl.evaluation.result import EvalResult
from vla_rl.evaluation.statistics import Rate, wilson
from vla_rl.evaluation.tables import difference_interval, interval, points

_GROUPS: dict[Role, tuple[str, str]] = {
    "base": ("base policy", "other"),
    "sft": ("supervised fine-tuning", "baseline"),
    "rl": ("reinforcement learning", "trained"),
    "other": ("other", "expert"),
}
_SMALLEST, _LARGEST = 4.0, 9.0  # marks


def forgetting_chart(result: ForgettingResult, title: str = "Forgetting") -> str:
    """One SVG: the success on the old tasks against KL(base || policy), each policy a point with its intervals.

    Beside a point stands what sets its name apart in its group. Colours are the classes of report.css, as those of all
    charts.
    """
    marks = []
    for policy in result.policies:
        group, style, label = _group(result, policy)
        kl = policy.divergence or Divergence(0.0, 0.0, 0.0, 0, 0)
        marks.append(Point(label, group, style, kl.value, kl.low, kl.high, policy.old))
    return scatter_chart(marks, title, x_label="KL(base || policy) on the new task, nats a decision")


def tradeoff_chart(result: ForgettingResult, title: str = "New task and old tasks") -> str:
    """One SVG: the success on the old tasks against that on the new ones; lines go from the base through the policies
    of a group in their order. The area of a mark grows with KL(base || policy)."""
    kls = [0.0 if p.divergence is None else p.divergence.value for p in result.policies]
    marks = []
    for policy, kl in zip(result.policies, kls, strict=True):
        group, style, label = _group(result, policy)
        share = kl / (max(kls) or 1.0)
        size = math.sqrt(_SMALLEST**2 + share * (_LARGEST**2 - _SMALLEST**2))
        marks.append(_trade(label, group, style, policy.new, policy.old, size))
    label = f"success on {', '.join(result.new_tasks)} (trained on)"
    return scatter_chart(marks, title, x_label=label, x_is_rate=True, joined=True)


def forgetting_section(result: ForgettingResult, of: str = "") -> str:
    """Both charts and a table. `of`: which seed, where a page has several."""
    old = ", ".join(result.old_tasks)
    figures = "".join(
        f"<figure><h3>{escape(title)}</h3>{chart(result, title)}</figure>"
        for title, chart in (
            (f"{old} against {', '.join(result.new_tasks)}", tradeoff_chart),
            (f"{old} against the divergence", forgetting_chart),
        )
    )
    rows = [
        [
            escape(p.name),
            f"{p.new.rate:.1%}<small>{interval(p.new)}</small>",
            f"{p.old.rate:.1%}<small>{interval(p.old)}</small>",
            *(f"{rate.rate:.1%}" for rate in p.old_tasks.values()),
            _change(p),
            _divergence(p),
        ]
        for p in result.policies
    ]
    header = ("policy", "trained on", "not trained on", *result.old_tasks, "change", "KL, nats")
    hint = (
        f"Trained on: {', '.join(result.new_tasks)}. Not trained on: {old}; change against the base in points, on the "
        "same episodes. The larger a mark on the left, the larger KL(base || policy), in nats a decision on states of "
        f"the new task. The KL is of this sampler and no other: {result.sampler}. The table has all names."
    )
    body = f'<div class="grid-cards">{figures}</div>{html_table(header, rows)}'
    return section(f"Forgetting, {of}" if of else "Forgetting", body, hint)


def tasks_tradeoff_section(results: Mapping[str, EvalResult], new_tasks: Sequence[str], criterion: str) -> str:
    """The same from evaluations alone, without a divergence: each of `results` a point, the first one the base.

    Raises ValueError where a task is in none of the evaluations, or no other task is left.
    """
    marks = []
    for i, (name, result) in enumerate(results.items()):
        nominal = [e for e in result.episodes if not e.condition] or list(result.episodes)
        old = [task for task in result.per_task if task not in new_tasks]
        if not old or not set(new_tasks) <= set(result.per_task):
            raise ValueError(
                f"--new-tasks {' '.join(new_tasks)}: {name} was evaluated on {', '.join(result.per_task)}; name some "
                "of these tasks, and not all"
            )
        sides = [
            [getattr(e, criterion) for e in nominal if (e.task in new_tasks) == is_new] for is_new in (True, False)
        ]
        rates = [wilson(sum(side), len(side)) for side in sides]
        marks.append(_trade("", name, STYLES[i % len(STYLES)], *rates, size=5.0))
    label = f"success on {', '.join(new_tasks)} (trained on)"
    chart = scatter_chart(marks, "New task and old tasks", x_label=label, x_is_rate=True, joined=True)
    hint = "Success on all tasks that were not trained on against those that were. Lines go from the first policy."
    return section("Forgetting", f'<div class="grid-cards"><figure>{chart}</figure></div>', hint)


def read_forgetting(file: str | Path) -> dict[str, ForgettingResult]:
    """Seed -> result, of a JSON file with one `ForgettingResult.as_dict()`, or with several under "seeds".

    Raises ValueError for another file.
    """
    try:
        stored = json.loads(Path(file).read_text(encoding="utf-8"))
        seeds = stored.get("seeds", {"": stored})
        return {seed: ForgettingResult.from_dict(values) for seed, values in seeds.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error


def write_forgetting_report(file: str | Path) -> Path:
    """Write the page of such a JSON file beside it, and return its path. Raises as `read_forgetting`."""
    results = read_forgetting(file)
    first = next(iter(results.values()))
    new, old = ", ".join(first.new_tasks), ", ".join(first.old_tasks)
    return write_page(
        Path(file).with_suffix(".html"),
        title=f"What learning {new} cost on {old}",
        description=f"All policies begin from one base and are evaluated on the same {first.policies[0].new.n} new and "
        f"{first.policies[0].old.n} old episodes.",
        sections=(
            *(_verdict(result, seed if len(results) > 1 else "") for seed, result in results.items()),
            *(
                forgetting_section(r, f"seed {seed}" if seed and len(results) > 1 else "")
                for seed, r in results.items()
            ),
        ),
    )


def _verdict(result: ForgettingResult, seed: str) -> str:
    """A sentence for the last policy of each group, which was trained the longest."""
    last = {policy.role: policy for policy in result.policies}
    said = "".join(
        f'<p class="sentence">{escape(forgetting_sentence(result, policy))}</p>'
        for policy in last.values()
        if policy.change is not None
    )
    rest = f"Training seed {seed}. " if seed else ""
    rest += "One training seed of each policy: another one may forget more or less."
    return f'<section class="verdict">{said}<p class="rest">{escape(rest)}</p></section>'


def forgetting_sentence(result: ForgettingResult, policy: PolicyForgetting) -> str:
    """What may be claimed of a policy that was trained from the base, in one sentence."""
    base = result.policies[0]
    if policy.change is None or policy.divergence is None:
        raise ValueError(f"{policy.name} is the base; it has forgotten nothing")
    d = policy.change.difference
    new, old = ", ".join(result.new_tasks), ", ".join(result.old_tasks)
    said = "it forgets" if d.high < 0 else "it gains" if d.low > 0 else "no forgetting can be claimed"
    return (
        f"{policy.name}: {new} from {base.new.rate:.1%} to {policy.new.rate:.1%}; on {old} {said}, {points(d.value)} "
        f"points ({interval_points(d)}), at {policy.divergence.value:.3g} nats from the base."
    )


def _change(policy: PolicyForgetting) -> str:
    if policy.change is None:
        return ""
    d = policy.change.difference
    return f"{points(d.value)}<small>{difference_interval(d)}</small>"


def _divergence(policy: PolicyForgetting) -> str:
    d = policy.divergence
    return "0" if d is None else f"{d.value:.3g}<small>[{d.low:.3g}, {d.high:.3g}]</small>"


def _trade(label: str, group: str, style: str, new: Rate, old: Rate, size: float) -> Point:
    return Point(label, group, style, new.rate, new.low, new.high, old, size)


def _group(result: ForgettingResult, policy: PolicyForgetting) -> tuple[str, str, str]:
    """Of a policy: its group's name in the legend and style, and what stands beside its point."""
    group, style = _GROUPS[policy.role]
    shared, label = _apart(policy.name, [other.name for other in result.policies if other.role == policy.role])
    return (shared if policy.role == "other" and shared else group), style, label


def _apart(name: str, names: Sequence[str]) -> tuple[str, str]:
    """The words that all of several `names` begin with, and `name` without them."""
    words, num_shared = name.split(), 0
    while (
        len(names) > 1 and num_shared < len(words) - 1 and len({tuple(n.split()[: num_shared + 1]) for n in names}) == 1
    ):
        num_shared += 1
    return " ".join(words[:num_shared]), " ".join(words[num_shared:])
