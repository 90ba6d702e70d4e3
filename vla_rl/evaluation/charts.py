"""Charts as inline SVG, in pure Python: bars with intervals, training seeds, curves, points.

Colours are CSS classes (`s-baseline`, `s-trained`, ...; see report.css), so the page decides light or dark. Every
series also differs by a label or a dash pattern, so that no reader depends on colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from vla_rl.evaluation.statistics import Rate

_WIDTH = 344.0
_LABEL = 27  # characters that fit beside the interval
_Scale = Callable[[float], float]


@dataclass(frozen=True)
class Bar:
    """One rate of a bar chart; `style` is a role of report.css."""

    label: str
    rate: Rate
    style: str


@dataclass(frozen=True)
class Series:
    """One curve. `band`: lower and upper values at each x, or None. Points must be finite and sorted by x."""

    label: str
    style: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    band: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Point:
    """One point of a scatter chart, a rate against `x` with its interval. `group`: what the legend calls those of one
    `style`; `label` stands beside the point. `size`: of the mark, from its middle to its edge."""

    label: str
    group: str
    style: str
    x: float
    x_low: float
    x_high: float
    rate: Rate
    size: float = 5.0


@dataclass(frozen=True)
class SeedsRow:
    """The training runs of one method: the success of each, and their `mean` with its interval."""

    label: str
    style: str
    seeds: tuple[float, ...]
    mean: float
    low: float
    high: float


def bar_chart(bars: Sequence[Bar], title: str) -> str:
    """Horizontal bars from 0 to 1 with whiskers for the intervals."""
    row, top, left, right = 46.0, 6.0, 4.0, _WIDTH - 12.0
    height = top + row * len(bars) + 24.0

    def at(value: float) -> float:
        return left + value * (right - left)

    parts = [_open(height, title, "; ".join(f"{bar.label} {bar.rate}" for bar in bars))]
    parts += _share_axis(at, top, height)
    for i, bar in enumerate(bars):
        y = top + row * i
        parts.append(_text(left, y + 13, _cut(bar.label), "label"))
        interval = f"{bar.rate.rate:.1%}  [{bar.rate.low:.1%}, {bar.rate.high:.1%}]"
        parts.append(_text(right, y + 13, interval, "value", "end"))
        width = max(1.5, at(bar.rate.rate) - left)
        parts.append(f'<rect class="track" x="{left}" y="{y + 20:.1f}" width="{right - left}" height="16" rx="3"/>')
        parts.append(
            f'<rect class="fill s-{bar.style}" x="{left}" y="{y + 20:.1f}" width="{width:.1f}" height="16" rx="3"/>'
        )
        parts.append(_whisker(at(bar.rate.low), at(bar.rate.high), y + 28))
    return "".join(parts) + "</svg>"


def seeds_chart(rows: Sequence[SeedsRow], title: str) -> str:
    """A row for each method from 0 to 1: a circle a training run, their mean as a line across with its whiskers."""
    row, top, left, right = 46.0, 6.0, 8.0, _WIDTH - 12.0
    height = top + row * len(rows) + 24.0

    def at(value: float) -> float:
        return left + value * (right - left)

    said = [f"{r.label} {r.mean:.3f} [{r.low:.3f}, {r.high:.3f}], seeds {_listed(r.seeds)}" for r in rows]
    parts = [_open(height, title, "; ".join(said)), *_share_axis(at, top, height)]
    for i, r in enumerate(rows):
        y = top + row * i
        parts.append(_text(left, y + 13, _cut(r.label), "label"))
        parts.append(_text(right, y + 13, f"{r.mean:.1%}  [{r.low:.1%}, {r.high:.1%}]", "value", "end"))
        parts.append(f'<rect class="track" x="{left}" y="{y + 20:.1f}" width="{right - left}" height="16" rx="3"/>')
        parts.append(_whisker(at(r.low), at(r.high), y + 28))
        parts += [f'<circle class="dot s-{r.style}" cx="{at(s):.1f}" cy="{y + 28:.1f}" r="4.5"/>' for s in r.seeds]
        parts.append(f'<path class="whisker" d="M{at(r.mean):.1f} {y + 18:.1f}v20"/>')
    return "".join(parts) + "</svg>"


def rate_bar(rate: Rate, style: str) -> str:
    """A bar from 0 to 1 with its whisker, small enough for the cell of a table; the cell has the numbers as text."""
    width, height = 96.0, 12.0
    whisker = (
        f"M{width * rate.low:.1f} 2v8M{width * rate.low:.1f} 6H{width * rate.high:.1f}M{width * rate.high:.1f} 2v8"
    )
    return (
        f'<svg class="mini" viewBox="0 0 {width:g} {height:g}" aria-hidden="true" xmlns="http://www.w3.org/2000/svg">'
        f'<rect class="track" width="{width:g}" height="{height:g}" rx="2"/>'
        f'<rect class="fill s-{style}" width="{max(1.0, width * rate.rate):.1f}" height="{height:g}" rx="2"/>'
        f'<path class="halo" d="{whisker}"/><path class="whisker" d="{whisker}"/></svg>'
    )


def sparkline(values: Sequence[float]) -> str:
    """Rates from 0 to 1 in order, for the cell of a table; a screen reader hears the first and the last."""
    width, height = 120.0, 28.0
    step = width / max(1, len(values) - 1)
    line = _points([(i * step, (1 - min(max(y, 0.0), 1.0)) * (height - 3) + 1.5) for i, y in enumerate(values)])
    said = f"from {values[0]:.0%} to {values[-1]:.0%}"
    return (
        f'<svg class="spark" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{said}" '
        'xmlns="http://www.w3.org/2000/svg">'
        f'<rect class="track" width="{width:g}" height="{height:g}" rx="2"/>'
        f'<polyline class="curve s-trained" points="{line}"/></svg>'
    )


def line_chart(series: Sequence[Series], title: str, *, x_label: str, percent: bool = False) -> str:
    """Curves with their bands, axes with round ticks, and each curve's name at its right end.

    `percent`: the axis goes from 0 to 100%. Raises ValueError without a point.
    """
    if not any(s.x for s in series):
        raise ValueError(f"line_chart: no points for {title!r}")
    left, right, top, bottom = 44.0, _WIDTH - 10.0, 10.0, 176.0
    xs = [x for s in series for x in s.x]
    x_low, x_high = min(xs), max(xs)
    y_ticks = (0.0, 0.25, 0.5, 0.75, 1.0) if percent else _ticks(*_y_range(series), 4)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return left + (x - x_low) / ((x_high - x_low) or 1.0) * (right - left)

    def py(y: float) -> float:
        return bottom - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (bottom - top)

    last = ", ".join(f"{s.label} ends at {s.y[-1]:.3g}" for s in series if s.y)
    legend, legend_height = _legend(series, left, right, bottom + 46)
    parts = [_open(230 + legend_height, title, last)]
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(_text(left - 6, py(tick) + 4, f"{tick:.0%}" if percent else _number(tick), "tick", "end"))
    x_ticks = _ticks(x_low, x_high, 5, inside=True)
    parts += [_text(px(tick), bottom + 16, _number(tick), "tick", "middle") for tick in x_ticks]
    parts.append(_text(right, bottom + 32, x_label, "tick", "end"))
    parts += [_curve(s, px, py) for s in series]
    parts.append(legend)
    return "".join(parts) + "</svg>"


def scatter_chart(
    points: Sequence[Point], title: str, *, x_label: str, x_is_rate: bool = False, joined: bool = False
) -> str:
    """Rates against a number >= 0, with whiskers both ways; groups differ by colour and shape. The upper end is 100%,
    the lower end what the intervals need; so it is across where `x_is_rate`. `joined`: a line goes from the first point
    through those of each other group in their order. A label that would cover another one is left out.

    Raises ValueError without a point.
    """
    if not points:
        raise ValueError(f"scatter_chart: no points for {title!r}")
    left, right, top, bottom = 44.0, _WIDTH - 12.0, 26.0, 212.0
    y_ticks = _rate_ticks([point.rate.low for point in points])
    ticks = (
        _rate_ticks([p.x_low for p in points]) if x_is_rate else _ticks(0.0, max(p.x_high for p in points) or 1.0, 4)
    )

    def px(x: float) -> float:
        return left + (x - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    def py(y: float) -> float:
        return bottom - (y - y_ticks[0]) / (1.0 - y_ticks[0]) * (bottom - top)

    groups = list(dict.fromkeys((p.group, p.style) for p in points))
    parts = [_open(bottom + 48 + 18 * len(groups), title, "; ".join(_said(p, x_is_rate) for p in points))]
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(_text(left - 6, py(tick) + 4, f"{100 * tick:.3g}%", "tick", "end"))
    names = [f"{100 * tick:.3g}%" if x_is_rate else _number(tick) for tick in ticks]
    parts += [_text(px(x), bottom + 16, name, "tick", "middle") for x, name in zip(ticks, names, strict=True)]
    parts.append(_text(right, bottom + 32, x_label, "tick", "end"))
    parts += [
        _cross((px(p.x_low), px(p.x_high)), (py(p.rate.high), py(p.rate.low)), px(p.x), py(p.rate.rate)) for p in points
    ]
    for style in [style for _, style in groups if joined and style != points[0].style]:
        way = [points[0], *(p for p in points if p.style == style)]
        parts.append(
            f'<polyline class="curve s-{style}" points="{_points([(px(p.x), py(p.rate.rate)) for p in way])}"/>'
        )
    places = [(px(p.x), py(p.rate.rate)) for p in points]
    shapes = [style for _, style in groups]
    parts += [_mark(x, y, p.style, shapes.index(p.style), p.size) for p, (x, y) in zip(points, places, strict=True)]
    parts += _labels(points, places, left, right)
    for i, (group, style) in enumerate(groups):
        parts += [
            _mark(left + 4, bottom + 48 + 18 * i, style, i, 5.0),
            _text(left + 16, bottom + 52 + 18 * i, group, "label"),
        ]
    return "".join(parts) + "</svg>"


def _labels(points: Sequence[Point], places: Sequence[tuple[float, float]], left: float, right: float) -> list[str]:
    """A label at a corner of each mark where it covers no other mark or label; one without such a corner is left out.
    The last points come first."""
    taken = [(x - p.size, y - p.size, x + p.size, y + p.size) for p, (x, y) in zip(points, places, strict=True)]
    out = []
    for p, (x, y) in reversed([*zip(points, places, strict=True)]):
        width = 6.4 * len(p.label)  # that of a letter is a guess: an SVG does not measure its text
        for across, down in ((1, -1), (-1, -1), (1, 1), (-1, 1)):
            at, base = x + across * (p.size + 2), y - p.size - 2 if down < 0 else y + p.size + 10
            box = (min(at, at + across * width), base - 9, max(at, at + across * width), base + 1)
            clear = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
            if p.label and clear and left <= box[0] and box[2] <= right + 10:
                out.append(_text(at, base, p.label, "tick over", "start" if across > 0 else "end"))
                taken.append(box)
                break
    return out


def _rate_ticks(lows: Sequence[float]) -> tuple[float, ...]:
    """Of an axis of rates that ends at 100% and shows all of `lows`."""
    return tuple(tick for tick in _ticks(min(0.99, *lows), 1.0, 4) if 0.0 <= tick <= 1.0)


def _said(p: Point, x_is_rate: bool) -> str:
    name = f"{p.group} {p.label}".strip()
    return f"{name} at {f'{p.x:.1%}' if x_is_rate else _number(p.x)}: {p.rate}"


def _share_axis(at: _Scale, top: float, height: float) -> list[str]:
    """Grid and numbers of an axis from 0 to 100% below horizontal bars."""
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        anchor = "start" if tick == 0 else "end" if tick == 1 else "middle"
        parts.append(f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{top}" y2="{height - 20:.1f}"/>')
        parts.append(_text(at(tick), height - 6, f"{tick:.0%}", "tick", anchor))
    return parts


def _cut(label: str) -> str:
    """What fits of a name; the table beside the chart has all of it."""
    return label if len(label) <= _LABEL else label[: _LABEL - 1].rstrip() + "\u2026"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _cross(across: tuple[float, float], down: tuple[float, float], x: float, y: float) -> str:
    path = f"M{across[0]:.1f} {y:.1f}H{across[1]:.1f}M{x:.1f} {down[0]:.1f}V{down[1]:.1f}"
    return f'<path class="whisker thin" d="{path}"/>'


def _mark(x: float, y: float, style: str, shape: int, size: float) -> str:
    """A circle, a square, a diamond or a triangle, of about the same area."""
    if shape % 4 == 0:
        return f'<circle class="dot s-{style}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    corners = {
        1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        2: ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
        3: ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
    }[shape % 4]
    ring = [(x + a * size, y + b * size) for a, b in corners]
    return f'<polygon class="dot s-{style}" points="{_points(ring)}"/>'


def _curve(series: Series, px: _Scale, py: _Scale) -> str:
    out = ""
    if series.band is not None and len(series.x) > 1:
        low, high = series.band
        ring = [(px(x), py(y)) for x, y in zip(series.x, high, strict=True)]
        ring += [(px(x), py(y)) for x, y in zip(reversed(series.x), reversed(low), strict=True)]
        out += f'<polygon class="band s-{series.style}" points="{_points(ring)}"/>'
    line = [(px(x), py(y)) for x, y in zip(series.x, series.y, strict=True)]
    out += f'<polyline class="curve s-{series.style}" points="{_points(line)}"/>'
    if len(line) <= 25:
        out += "".join(f'<circle class="dot s-{series.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in line)
    return out


def _legend(series: Sequence[Series], left: float, right: float, y: float) -> tuple[str, float]:
    """Names of the curves in as many rows as they need, the first at `y`, and the height of the rows after it."""
    if len(series) < 2:
        return "", 0.0
    out, x, row = "", left, 0.0
    for s in series:
        width = 34 + 6.6 * len(s.label)  # that of a letter is a guess: an SVG does not measure its text
        if x > left and x + width > right:
            x, row = left, row + 18.0
        out += f'<line class="curve s-{s.style}" x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y + row - 4}" y2="{y + row - 4}"/>'
        out += _text(x + 28, y + row, s.label, "label")
        x += width + 10
    return out, row


def _whisker(low: float, high: float, y: float) -> str:
    path = f"M{low:.1f} {y - 5}v10M{low:.1f} {y}H{high:.1f}M{high:.1f} {y - 5}v10"
    return f'<path class="halo" d="{path}"/><path class="whisker" d="{path}"/>'


def _y_range(series: Sequence[Series]) -> tuple[float, float]:
    values = [y for s in series for y in s.y]
    values += [y for s in series if s.band is not None for side in s.band for y in side]
    return min(values), max(values)


def _ticks(low: float, high: float, count: int, *, inside: bool = False) -> tuple[float, ...]:
    """About `count` round numbers that cover [low, high], or with `inside` lie in it."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low, high) if inside else (low - pad, high + pad)
    if high == low:
        return (low,)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * magnitude >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9) if inside else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if inside else math.ceil(high / step - 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def _number(value: float) -> str:
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _open(height: float, title: str, description: str) -> str:
    """The picture as a screen reader meets it: one image with a title and the numbers in words."""
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}: {escape(description)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )
