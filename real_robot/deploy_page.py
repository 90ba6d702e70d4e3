"""The page of a deployment: one HTML file with how often it succeeded, how late things were, what the safety filter
changed, when and why the arm held, videos, and where all of it came from. Made from what lies in the folder."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.evaluation.eval_report import eval_sentence, read_provenance
from vla_rl.evaluation.page import (
    MediaBudget,
    command_section,
    html_table,
    outcome,
    provenance_section,
    section,
    video_element,
    write_page,
)
from vla_rl.evaluation.result import EvalResult
from vla_rl.evaluation.tables import interval
from vla_rl.real_robot.log import config_digest, read_tick_fields
from vla_rl.real_robot.modes import Mode

PAGE_FILE = "deploy.html"
_STRIPS = 60  # episodes whose modes are drawn
_NUMBER = re.compile(r"\d+(\.\d+)?")
# Of the strip of a mode: the colour's class, and its height, so that no reader depends on colour.
_STYLES = {
    Mode.RUN: ("trained", 1.0),
    Mode.HUMAN: ("expert", 1.0),
    Mode.SHADOW: ("other", 0.6),
    Mode.HOLD: ("baseline", 0.45),
    Mode.ESTOP: ("control", 0.25),
    Mode.IDLE: ("control", 0.1),
}


@dataclass(frozen=True)
class _Ticks:
    """An episode's log: `seconds` since its first tick, and what was logged of each."""

    seconds: tuple[float, ...]
    fields: tuple[Mapping[str, Any], ...]

    def runs(self) -> list[tuple[Mode, float, float]]:
        """Mode, begin and end of each stretch without a change."""
        out: list[tuple[Mode, float, float]] = []
        for i, at in enumerate(self.seconds):
            mode = Mode(self.fields[i]["mode"])
            end = self.seconds[i + 1] if i + 1 < len(self.seconds) else at
            out = [*out[:-1], (mode, out[-1][1], end)] if out and out[-1][0] is mode else [*out, (mode, at, end)]
        return out


def write_deploy_page(folder: Path) -> Path:
    """Write `deploy.html` into the folder of a deployment and return its path. Raises FileNotFoundError where there is
    none."""
    values = json.loads((folder / "deploy.json").read_text(encoding="utf-8"))
    result = EvalResult.load(folder) if (folder / "eval.json").is_file() else None
    ticks = {row["seed"]: _ticks(folder / "logs" / f"episode_{row['seed']}") for row in values["episodes"]}
    origin = read_provenance(folder)
    config = values["config"]
    return write_page(
        folder / PAGE_FILE,
        title=f"Deployment of {values['policy']}",
        description=(
            f"{len(values['episodes'])} episodes on the {config['robot']} in real time, chunks {config['mode']}, "
            f"limits {config['limits']}{', in shadow: nothing was sent' if config['shadow'] else ''}."
        ),
        sections=(
            f'<p class="banner warn"><b>STOPPED:</b> {escape(values["stopped"])}</p>' if values["stopped"] else "",
            _verdict(values, result),
            _videos(folder, values["episodes"]),
            _modes(ticks),
            _holds(ticks),
            _times(values, ticks),
            _clamps(values),
            _chunks(values["broker"]),
            _episodes(values["episodes"], result),
            provenance_section(_provenance(values, origin)),
            command_section(str(origin.get("command", ""))),
        ),
    )


def _ticks(log: Path) -> _Ticks:
    """Empty for an episode that was not started."""
    rows = [*read_tick_fields(log)] if log.is_dir() else []
    return _Ticks(tuple(at for at, _ in rows), tuple(fields for _, fields in rows))


def _verdict(values: Mapping[str, Any], result: EvalResult | None) -> str:
    ticks = max(1, values.get("ticks", 0))
    held, clamped = values.get("held", 0), values.get("clamped", 0)
    latency = values["latency_ms"]
    tiles = [
        (f"{latency['p50']:.0f}&nbsp;ms", f"policy latency, median<br>99%: {latency['p99']:.0f}&nbsp;ms"),
        (f"{held / ticks:.1%}", f"of the ticks held<br>{held} of {ticks}"),
        (f"{clamped / ticks:.1%}", f"of the commands clamped<br>{clamped} of {ticks}"),
    ]
    sentence = "No episode ended: there is no rate."
    if result is not None:
        rate = result.success_once
        tiles.insert(0, (f"{rate.rate:.1%}", f"success<br>{interval(rate)} &middot; n&nbsp;=&nbsp;{rate.n}"))
        sentence = eval_sentence(values["policy"], rate, "success_once")
    numbers = "".join(
        f'<div class="number b-{"trained" if i == 0 and result else "other"}"><b>{number}</b><span>{label}</span></div>'
        for i, (number, label) in enumerate(tiles)
    )
    rest = "The interval is Wilson's. An episode that a stop cut off is not in the rate."
    return (
        f'<section class="verdict"><p class="sentence">{escape(sentence)}</p><div class="numbers">{numbers}</div>'
        f'<p class="rest">{rest}</p></section>'
    )


def _episodes(rows: Sequence[Mapping[str, Any]], result: EvalResult | None) -> str:
    instructions = {e.seed: e.instruction for e in result.episodes} if result else {}
    cells = [
        [
            f"{row['seed']} <small>{escape(instructions.get(row['seed'], ''))}</small>",
            _outcome(row),
            *(str(row[name]) for name in ("steps", "held", "clamped", "failures")),
            f"{row['latency_p99_ms']:.0f}&nbsp;ms",
            f"{row['late_p99_ms']:.1f}&nbsp;ms",
        ]
        for row in rows
    ]
    header = ("seed", "outcome", "steps", "held", "clamped", "failed", "latency 99%", "late 99%")
    hint = (
        "Steps are executed actions of the policy; failed: replies that did not come, or with an error; late: of a "
        "tick, after its deadline. A click on a column sorts."
    )
    return section("Episodes", html_table(header, cells, kind="sortable") if cells else "", hint)


def _outcome(row: Mapping[str, Any]) -> str:
    return "stopped" if row["stop_reason"] else outcome(row["success"])


def _modes(ticks: Mapping[int, _Ticks]) -> str:
    drawn = {seed: t for seed, t in ticks.items() if t.seconds}
    longest = max((t.seconds[-1] for t in drawn.values()), default=0.0)
    if not longest:
        return ""
    rows = [(str(seed), t.runs()) for seed, t in [*drawn.items()][:_STRIPS]]
    present = [mode for mode in _STYLES if any(mode is m for _, runs in rows for m, _, _ in runs)]
    legend = "".join(f"<span>{_swatch(mode)} {mode.value}</span>" for mode in present)
    left_out = f" The first {_STRIPS} of {len(drawn)} episodes." if len(drawn) > _STRIPS else ""
    hint = f"Each row is an episode by its seed, from its start; all {longest:.1f} s wide. Heights differ by mode."
    cells = [[seed, _strip(runs, longest), f"{runs[-1][2]:.1f}&nbsp;s"] for seed, runs in rows]
    table = html_table(("seed", "modes over time", "length"), cells)
    return section("Modes", f'<p class="legend">{legend}</p>{table}', hint + left_out)


def _strip(runs: Sequence[tuple[Mode, float, float]], longest: float) -> str:
    width, height = 480.0, 14.0
    said = ", ".join(f"{mode.value} {end - begin:.2f} s" for mode, begin, end in runs[:40])
    parts = ""
    for mode, begin, end in runs:
        style, share = _STYLES[mode]
        wide = max(0.8, width * (end - begin) / longest)
        parts += (
            f'<rect class="fill s-{style}" x="{width * begin / longest:.1f}" y="{height * (1 - share):.1f}" '
            f'width="{wide:.1f}" height="{height * share:.1f}"/>'
        )
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" role="img" aria-label="{said}" '
        f'style="width:100%;min-width:150px;height:14px;display:block" xmlns="http://www.w3.org/2000/svg">{parts}</svg>'
    )


def _swatch(mode: Mode) -> str:
    style, share = _STYLES[mode]
    rect = f'<rect class="fill s-{style}" y="{12 * (1 - share):.1f}" width="12" height="{12 * share:.1f}"/>'
    return (
        f'<svg viewBox="0 0 12 12" style="width:12px;display:inline-block" aria-hidden="true" '
        f'xmlns="http://www.w3.org/2000/svg">{rect}</svg>'
    )


def hold_reasons(fields: Sequence[Mapping[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """Of the ticks of one episode: how often the arm began to hold for each reason, and for how many ticks it did.
    Numbers are taken out of a reason, so that those that differ by them alone are one."""
    begun: Counter[str] = Counter()
    ticks: Counter[str] = Counter()
    before = Mode.RUN
    for tick in fields:
        mode = Mode(tick["mode"])
        if mode is Mode.HOLD:
            reason = _NUMBER.sub("#", tick["problem"]) or "no action"
            ticks[reason] += 1
            begun[reason] += before is not Mode.HOLD
        before = mode
    return begun, ticks


def _holds(ticks: Mapping[int, _Ticks]) -> str:
    begun: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for t in ticks.values():
        for total, one in zip((begun, held), hold_reasons(t.fields), strict=True):
            total.update(one)
    rows = [[escape(reason), str(begun[reason]), str(count)] for reason, count in held.most_common()]
    body = html_table(("reason", "holds begun", "ticks held"), rows) if rows else "<p>The arm never held.</p>"
    return section("Why the arm held", body, "# stands for a number: reasons that differ by it alone are one.")


def _times(values: Mapping[str, Any], ticks: Mapping[int, _Ticks]) -> str:
    fields = [tick for t in ticks.values() for tick in t.fields]
    pictures = [age for tick in fields for age in tick["picture_age_ms"].values()]
    named = {
        "policy latency": values["latency_ms"],
        "period error": values["period_error_ms"],
        "age of the measurement": _percentiles([tick["state_age_ms"] for tick in fields]),
        "age of the pictures": _percentiles(pictures),
    }
    rows = [[name, *(f"{v[p]:.1f}&nbsp;ms" for p in ("p50", "p99", "max"))] for name, v in named.items() if v]
    hint = (
        "Latency: from the observation to the reply, over the websocket. Period error: of a tick, after its deadline. "
        f"The machine's load was {values['load'][0]} when it began and {values['load'][1]} when it ended."
    )
    return section("Time", html_table(("", "median", "99%", "longest"), rows), hint)


def _percentiles(ms: Sequence[float]) -> dict[str, float]:
    if not ms:
        return {}
    p50, p99, most = np.percentile(ms, [50, 99, 100])
    return {"p50": float(p50), "p99": float(p99), "max": float(most)}


def _clamps(values: Mapping[str, Any]) -> str:
    ticks = max(1, values.get("ticks", 0))
    counts = sorted(values["clamps"].items(), key=lambda item: -item[1])
    rows = [[escape(name), str(count), f"{count / ticks:.1%}"] for name, count in counts]
    body = html_table(("limit", "commands", "of all ticks"), rows) if rows else "<p>No command was changed.</p>"
    return section("What the safety filter changed", body, "A command can meet several limits.")


def _chunks(broker: Mapping[str, int]) -> str:
    rows = [[escape(name), str(count)] for name, count in broker.items()]
    hint = "Replies of the policy: what became of them. Starved: ticks that no chunk reached."
    return section("Chunks", html_table(("", "count"), rows) if rows else "", hint)


def _videos(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    budget, cards = MediaBudget(), ""
    for row in rows:
        path, name = folder / "videos" / f"episode_{row['seed']}.mp4", f"seed {row['seed']}"
        if path.is_file() and (url := budget.embed(path.read_bytes(), "video/mp4")) is not None:
            said = f"{_outcome(row)} <small>{name}, {row['steps']} steps</small>"
            cards += f'<figure class="clip">{video_element(url, name)}<figcaption>{said}</figcaption></figure>'
    body = f'<div class="clips">{cards}</div>{budget.note()}' if cards else ""
    return section(
        "What it looks like", body, "The first episodes, at half their speed; click a video to play it again."
    )


def _provenance(values: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, str]:
    server = values["server"]
    said = f"{values['policy']}, weights {server.get('policy_digest', 'unknown')}"
    texts = {"policy": f"{said}, version {server.get('policy_version', 1)}"}
    texts["configuration"] = f"hash {config_digest(values['config'])[:16]}\n{json.dumps(values['config'], indent=2)}"
    for name, value in origin.items():
        if value and name != "command":
            flat = isinstance(value, dict) and not any(isinstance(v, dict | list) for v in value.values())
            texts[name] = ", ".join(f"{k} {v}" for k, v in value.items()) if flat else str(value)
    return texts


__all__ = ["PAGE_FILE", "hold_reasons", "write_deploy_page"]
