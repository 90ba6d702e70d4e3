"""Parts that every report shares: the page itself, its budget of bytes, provenance, the command, learning curves."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np

from vla_rl.evaluation.charts import Series, line_chart
from vla_rl.evaluation.statistics import Difference
from vla_rl.evaluation.tables import points
from vla_rl.train.metrics import Metrics, read_metrics

Role = Literal["baseline", "trained", "control", "expert", "other"]
MEDIA_BYTES = 14_000_000  # of a page that has to stay under 20 MB
_TEXT_CHARACTERS = 200_000  # of one text of the provenance: a diff of notebooks has no end


@dataclass(frozen=True)
class Curve:
    """Metrics of one training run: a `metrics.jsonl`, or the run folder that holds it. Several are runs of one method
    with different seeds, drawn as their mean in a band from the lowest to the highest."""

    label: str
    role: Role
    metrics: Path | tuple[Path, ...]


@dataclass(frozen=True)
class Panel:
    """One learning-curve chart: the first metric of a run that matches one of `patterns` (as in file names).

    Where `<metric>_low` and `<metric>_high` exist they become a band.
    """

    title: str
    patterns: tuple[str, ...]
    percent: bool = False


PANELS = (
    Panel("Success in training rollouts", ("train/success_rate", "rollout/success_rate"), percent=True),
    Panel("Success on evaluation episodes", ("eval/success_rate", "eval/success_once"), percent=True),
    Panel("KL from the behavior policy", ("*/joint_kl", "*/kl_joint", "*/approx_kl", "*/kl")),
    Panel("Explained variance of the value", ("*/explained_variance", "*/value_explained_variance")),
    Panel("Share of clipped samples", ("*/clip_fraction", "*/clip_frac"), percent=True),
    Panel("Supervised loss", ("sft/loss", "sft/train_loss")),
)


class MediaBudget:
    """Videos and pictures go into the page until `num_bytes` of text are spent; `left_out` counts the others."""

    def __init__(self, num_bytes: int = MEDIA_BYTES) -> None:
        self.num_bytes = num_bytes
        self.left_out = 0

    def embed(self, content: bytes, kind: str) -> str | None:
        """`content` of the media type `kind` as a data URL, or None where it no longer fits."""
        size = 4 * -(-len(content) // 3)
        if size > self.num_bytes:
            self.left_out += 1
            return None
        self.num_bytes -= size
        return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"

    def note(self) -> str:
        """What the page has to say about it; "" where everything is there."""
        if not self.left_out:
            return ""
        were = "video is" if self.left_out == 1 else "videos are"
        return f'<p class="hint">{self.left_out} {were} left out, so that this page stays under 20 MB.</p>'


def write_page(path: Path, *, title: str, description: str, sections: Sequence[str]) -> Path:
    """One HTML file without anything from outside, written atomically. `sections` are HTML; "" is left out."""
    page = Template(_resource("report.html")).substitute(
        title=escape(title),
        description=escape(description),
        css=_resource("report.css"),
        javascript=_resource("report.js"),
        sections="\n".join(section for section in sections if section),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def section(title: str, body: str, hint: str = "") -> str:
    """A card of the page; `title` and `hint` are text, `body` is HTML. "" where there is no body."""
    said = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>" if body else ""


def task_cell(task: str) -> str:
    """A task's name that may break after "_" and "/": those of LIBERO are sentences, which would push the numbers out
    of the page."""
    return escape(task).replace("_", "_<wbr>").replace("/", "/<wbr>")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """`header` is text, the cells are HTML. The first column is a name, the others are numbers. `kind`: a class of
    report.css, such as "sortable"."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def video_element(url: str, label: str, attributes: str = "") -> str:
    return (
        f'<video muted playsinline preload="auto" tabindex="0" aria-label="{escape(label)}"{attributes} '
        f'src="{url}"></video>'
    )


def outcome(success: bool) -> str:
    return '<span class="outcome yes">✓ solved</span>' if success else '<span class="outcome no">✗ failed</span>'


def provenance_section(provenance: Mapping[str, str], of: str = "") -> str:
    """Name -> text; a text of several lines can be unfolded. `of`: whose it is, where a page has several."""
    items = ""
    for name, text in provenance.items():
        cut = len(text) - _TEXT_CHARACTERS
        shown = escape(text if cut <= 0 else f"{text[:_TEXT_CHARACTERS]}\n... and {cut} more characters")
        if "\n" in text.strip():
            shown = f"<details><summary>show</summary><pre>{shown}</pre></details>"
        items += f"<dt>{escape(name)}</dt><dd>{shown}</dd>"
    return section(f"Provenance of {of}" if of else "Provenance", f"<dl>{items}</dl>" if items else "")


def command_section(command: str) -> str:
    if not command:
        return ""
    return section(
        "Repeat it",
        f'<div class="command"><pre id="command">{escape(command)}</pre>'
        '<button type="button" data-copy="command">Copy</button></div>',
    )


def curves_section(curves: Sequence[Curve], panels: Sequence[Panel] = PANELS) -> str:
    """Learning curves: a chart for each panel that a run has a metric of."""
    sources = [(curve, _runs(curve)) for curve in curves]
    figures = ""
    for panel in panels:
        series = [s for curve, runs in sources if (s := curve_series(curve, panel, runs)) is not None]
        if series:
            chart = line_chart(series, panel.title, x_label="iteration", percent=panel.percent)
            figures += f"<figure><h3>{escape(panel.title)}</h3>{chart}</figure>"
    several = max((len(runs) for _, runs in sources), default=0) > 1
    hint = "Success in training rollouts includes the exploration noise and training starts."
    if several:
        hint += " Lines are means over the seeds, bands go from the lowest seed to the highest."
    return section("Learning curves", f'<div class="grid-cards">{figures}</div>' if figures else "", hint)


def curve_series(curve: Curve, panel: Panel, runs: Sequence[Sequence[Metrics]]) -> Series | None:
    """One line of a chart from the metrics of one run, or of several that differ in their seed. With several, at the
    iterations that all of them have: a mean over fewer seeds would bend where a run ended. None without the metric."""
    found = [metric_points(panel, rows) for rows in runs]
    if not found or any(not rows for _, rows in found):
        return None
    if len(found) == 1:
        key, rows = found[0]
        low, high = f"{key}_low", f"{key}_high"
        has_band = all(math.isfinite(row.get(end, math.nan)) for row in rows for end in (low, high))
        band = (tuple(row[low] for row in rows), tuple(row[high] for row in rows)) if has_band else None
        x, y = tuple(row["iteration"] for row in rows), tuple(row[key] for row in rows)
        return Series(curve.label, curve.role, x, y, band)
    by_iteration = [{row["iteration"]: row[key] for row in rows} for key, rows in found]
    shared = sorted(set.intersection(*(set(values) for values in by_iteration)))
    if not shared:
        return None
    values = np.array([[one[x] for x in shared] for one in by_iteration])
    band = (tuple(values.min(axis=0).tolist()), tuple(values.max(axis=0).tolist()))
    label = f"{curve.label} ({len(found)} seeds)"
    return Series(label, curve.role, tuple(shared), tuple(values.mean(axis=0).tolist()), band)


def metric_points(panel: Panel, rows: Sequence[Metrics]) -> tuple[str, list[Metrics]]:
    """The metric of a panel, and the rows that have a finite value of it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    key = next((name for pattern in panel.patterns for name in names if _matches(name, pattern)), None)
    return key or "", [row for row in rows if key is not None and math.isfinite(row.get(key, math.nan))]


def _matches(name: str, pattern: str) -> bool:
    """As for file names; `*/kl` is also a `kl` without a group."""
    return fnmatchcase(name, pattern) or fnmatchcase("/" + name, pattern)


def _runs(curve: Curve) -> list[list[Metrics]]:
    paths = curve.metrics if isinstance(curve.metrics, tuple) else (curve.metrics,)
    return [read_metrics(path) for path in paths]


def interval_points(difference: Difference) -> str:
    return f"{difference.confidence:.0%} interval {points(difference.low)} to {points(difference.high)}"


def p_value(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _resource(name: str) -> str:
    return files("vla_rl.evaluation").joinpath(name).read_text(encoding="utf-8")
