"""One page for a folder of runs: every training run and evaluation below it, with curves and links to their reports."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vla_rl.evaluation.charts import Series, line_chart, rate_bar, sparkline
from vla_rl.evaluation.compare import NOMINAL
from vla_rl.evaluation.conditions_table import STYLES
from vla_rl.evaluation.page import PANELS, Curve, Panel, curve_series, html_table, metric_points, section, write_page
from vla_rl.evaluation.result import SUMMARY_FILE
from vla_rl.evaluation.schema import validate
from vla_rl.evaluation.statistics import Rate
from vla_rl.evaluation.tables import interval
from vla_rl.train.metrics import METRICS_FILE, Metrics, read_metrics

INDEX_FILE = "index.html"
_CONFIG_FILE, _PROVENANCE_FILE, _REPORT_FILE = "config.json", "provenance.json", "report.html"
_NOT_ENTERED = {"videos", "policy", "tensorboard", "demos", "data", "venvs", "site-packages", "node_modules"}
_SEED = re.compile(r"(?<![a-z])seed[_=-]?\d+", re.IGNORECASE)
_SUCCESS = (
    Panel("evaluation", ("eval/success_rate", "eval/success_once"), percent=True),
    Panel("training", ("train/success_rate", "rollout/success_rate"), percent=True),
)


@dataclass(frozen=True)
class RunRow:
    """A folder with metrics. Runs of one `place` and `method` differ in their seed alone; `label` is the method's name.
    `origin`: provenance."""

    name: str
    place: str
    method: str
    label: str
    metrics: list[Metrics]
    origin: dict[str, Any]
    report: str


@dataclass(frozen=True)
class EvalRow:
    """A folder with an evaluation. `problem`: why its summary cannot be read, "" where it can."""

    name: str
    summary: dict[str, Any]
    report: str
    problem: str = ""


def write_runs_index(folder: str | Path) -> Path:
    """Write `index.html` into `folder`, over everything below it, and return its path.

    Raises FileNotFoundError where there is no such folder, and ValueError where nothing is in it to list.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; give the one that runs or evaluations were written into")
    runs, evaluations = scan(root)
    if not runs and not evaluations:
        raise ValueError(f"{root} holds no run ({METRICS_FILE}) and no evaluation ({SUMMARY_FILE})")
    return write_page(
        root / INDEX_FILE,
        title=f"Runs in {root.resolve().name}",
        description=f"{len(runs)} training runs and {len(evaluations)} evaluations. A click on a column sorts by it.",
        sections=(_evaluations(evaluations), *_curves(runs), _runs(runs)),
    )


def scan(root: Path) -> tuple[list[RunRow], list[EvalRow]]:
    """What lies below `root`, in the order of its names."""
    runs, evaluations = [], []
    for path, names in _folders(root):
        if METRICS_FILE in names:
            runs.append(_run_row(root, path))
        if SUMMARY_FILE in names:
            evaluations.append(_eval_row(root, path))
    return runs, evaluations


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for path, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _NOT_ENTERED and not f.startswith("."))
        yield Path(path), names


def _run_row(root: Path, path: Path) -> RunRow:
    name = path.relative_to(root).as_posix()
    around = [path, *(p for p in path.parents if p == root or root in p.parents)]
    home = next((p for p in around if (p / _CONFIG_FILE).is_file()), None)
    origin = _read(home / _PROVENANCE_FILE) if home is not None and (home / _PROVENANCE_FILE).is_file() else {}
    seed = _SEED.search(name)
    if seed is not None:
        place, label = name[: seed.start()].strip("/_-. "), name[seed.end() :].strip("/_-. ")
        method = label
    else:  # the path does not tell seeds apart, so the configuration has to
        part = "." if home is None else path.relative_to(home).as_posix()
        place, label = (path if home is None else home).parent.relative_to(root).as_posix() if name != "." else "", name
        config = {} if home is None else _without_seeds(_read(home / _CONFIG_FILE))
        method = json.dumps([part, config], sort_keys=True) if config else name
    report = next((p / _REPORT_FILE for p in around if (p / _REPORT_FILE).is_file()), None)
    return RunRow(name, place, method, label, read_metrics(path), origin, _link(root, report))


def _eval_row(root: Path, path: Path) -> EvalRow:
    name = path.relative_to(root).as_posix()
    own = path / _REPORT_FILE
    report = _link(root, own if own.is_file() else None)
    try:
        summary = json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))
        validate(summary)
    except ValueError as error:
        return EvalRow(name, {}, report, str(error))
    return EvalRow(name, summary, report)


def _evaluations(rows: Sequence[EvalRow]) -> str:
    cells = []
    for row in (row for row in rows if not row.problem):
        summary, suite = row.summary, row.summary["suite"]
        part = summary["per_condition"].get("", summary)
        once, end = (_rate(part[criterion]) for criterion in ("success_once", "success_at_end"))
        protocol = " (train = test)" if suite and suite["protocol"] == "train_equals_test" else ""
        conditions = len([c for c in summary["per_condition"] if c])
        cells.append(
            [
                _named(row.name, row.report),
                escape(f"{suite['name']} v{suite['version']}{protocol}") if suite else "&ndash;",
                f"{once.n}" + (f"<small>and {conditions} conditions</small>" if conditions else ""),
                f"{once.rate:.1%} {rate_bar(once, 'trained')}<small>{interval(once)}</small>",
                f"{end.rate:.1%}<small>{interval(end)}</small>",
                f"{part['mean_length']:.1f}",
            ]
        )
    header = ("evaluation", "suite", "episodes", "success once", "success at end", "length")
    body = html_table(header, cells, kind="sortable") if cells else ""
    bad = "".join(f"<dt>{escape(row.name)}</dt><dd>{escape(row.problem[:200])}</dd>" for row in rows if row.problem)
    if bad:
        body += f"<details><summary>{sum(bool(r.problem) for r in rows)} not readable</summary><dl>{bad}</dl></details>"
    return section("Evaluations", body, f"Rates of the {NOMINAL} episodes, with Wilson intervals.")


def _runs(rows: Sequence[RunRow]) -> str:
    cells = []
    for row in rows:
        found = next(((p, pts) for p in _SUCCESS if (pts := metric_points(p, row.metrics))[1]), None)
        curve, last, best, of = "", "", "", ""
        if found is not None:
            panel, (key, points) = found
            values = [point[key] for point in points]
            curve, of = sparkline(values), panel.title
            last, best = f"{values[-1]:.1%}", f"{max(values):.1%}"
        iterations = row.metrics[-1]["iteration"] if row.metrics else math.nan
        cells.append(
            [
                _named(row.name, row.report) + f"<small>{escape(_command(row.origin))}</small>",
                (escape(str(row.origin.get("started", ""))[:16].replace("T", " ")) or "&ndash;")
                + f"<small>{escape(str(row.origin.get('revision', ''))[:8])}</small>",
                f"{iterations:.0f}" if math.isfinite(iterations) else "&ndash;",
                curve + (f"<small>{of}</small>" if of else ""),
                last or "&ndash;",
                best or "&ndash;",
            ]
        )
    header = ("run", "started", "iterations", "success", "last", "best")
    hint = "Curves from 0 to 100%, of evaluations during the training where there are any, else of its rollouts."
    return section("Training runs", html_table(header, cells, kind="sortable") if cells else "", hint)


def _curves(rows: Sequence[RunRow]) -> list[str]:
    """Runs that differ in their seed alone, as mean and range: a section for each place that has some."""
    places: dict[str, dict[str, list[RunRow]]] = {}
    for row in rows:
        places.setdefault(row.place, {}).setdefault(row.method, []).append(row)
    sections = []
    for place, methods in places.items():
        several = [group for group in methods.values() if len(group) > 1]
        charts = "".join(_chart(panel, several) for panel in PANELS[:2])
        hint = "Lines are means over the seeds, bands go from the lowest seed to the highest."
        body = f'<div class="grid-cards">{charts}</div>' if charts else ""
        sections.append(section(f"Seeds of {place}" if place not in ("", ".") else "Seeds", body, hint))
    return sections


def _chart(panel: Panel, groups: Sequence[Sequence[RunRow]]) -> str:
    series: list[Series] = []
    for group in groups:
        curve = Curve(group[0].label or "all runs", STYLES[len(series) % len(STYLES)], ())
        line = curve_series(curve, panel, [row.metrics for row in group])
        series += [line] if line is not None else []
    shown = series[: len(STYLES)]  # more would share a colour and a dash
    if not shown:
        return ""
    note = f"<small>{len(series) - len(shown)} more methods are not drawn</small>" if len(series) > len(shown) else ""
    chart = line_chart(shown, panel.title, x_label="iteration", percent=panel.percent)
    return f"<figure><h3>{escape(panel.title)}</h3>{chart}{note}</figure>"


def _named(name: str, report: str) -> str:
    shown = escape(name if name != "." else "this folder")
    return f'<a href="{report}">{shown}</a>' if report else shown


def _link(root: Path, target: Path | None) -> str:
    return quote(target.relative_to(root).as_posix()) if target is not None else ""


def _command(origin: dict[str, Any]) -> str:
    """Command and recipe of a run, as `train demo`."""
    words = shlex.split(str(origin.get("command", "")))[1:3]
    return " ".join(word for word in words if not word.startswith("-"))


def _without_seeds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_seeds(v) for k, v in value.items() if k != "seed" and not k.endswith("_seed")}
    return [_without_seeds(v) for v in value] if isinstance(value, list) else value


def _rate(values: dict[str, Any]) -> Rate:
    return Rate(values["successes"], values["n"], values["low"], values["high"], values["confidence"])


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}  # a listing of a hundred runs does not fail for one damaged file
