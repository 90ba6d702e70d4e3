"""The action chunks of a filmed episode as small curves, one row for each dimension of the action.

Drawn in the action's own units, which every environment has; where in the picture the gripper would go is known only
with a camera model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_WIDTH, _ROW, _TOP = 240.0, 40.0, 14.0
_MOST_ROWS = 8
_MOST_CHUNKS = 40  # of a long episode, evenly spread: a page of 20 MB holds no more
_MOST_POINTS = 400


@dataclass(frozen=True)
class Plan:
    """`chunks` float32 [D, H, A]: what the policy planned at each decision. `executed` int [D]: how many control steps
    of each were executed. `names` [A]."""

    chunks: NDArray[np.float32]
    executed: NDArray[np.int64]
    names: tuple[str, ...]

    @property
    def starts(self) -> NDArray[np.int64]:
        """[D]: control step of each decision."""
        return np.cumsum(self.executed) - self.executed

    @property
    def num_steps(self) -> int:
        return int(self.executed.sum())

    @property
    def actions(self) -> NDArray[np.float32]:
        """[T, A]: what was executed, before the environment's clamp."""
        return np.concatenate([chunk[:steps] for chunk, steps in zip(self.chunks, self.executed, strict=True)])


def read_plan(video: Path) -> Plan | None:
    """The chunks that lie beside a video (see `EpisodeRecorder`), or None without them."""
    file = video.with_suffix(".npz")
    if not file.is_file():
        return None
    with np.load(file) as stored:
        chunks, executed = stored["chunks"], stored["executed"].astype(np.int64)
        names = tuple(str(name) for name in stored["names"]) or tuple(f"a{i}" for i in range(chunks.shape[2]))
    if chunks.ndim != 3 or executed.shape != chunks.shape[:1] or len(names) != chunks.shape[2]:
        raise ValueError(f"{file}: chunks {chunks.shape}, executed {executed.shape} and {len(names)} names do not fit")
    return Plan(chunks, executed, names)


def shared_range(plans: Sequence[Plan]) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Lowest and highest action [A] and the most steps of several plans, so that their curves have one scale."""
    lows = [plan.chunks.min(axis=(0, 1)) for plan in plans]
    highs = [plan.chunks.max(axis=(0, 1)) for plan in plans]
    return np.min(lows, axis=0), np.max(highs, axis=0), max(plan.num_steps for plan in plans)


def action_curves(plan: Plan, low: NDArray[np.float32], high: NDArray[np.float32], num_steps: int) -> str:
    """An SVG: each row is one dimension from `low` to `high` over `num_steps` control steps; the executed actions, the
    whole chunk as planned at each decision, and a line at each decision."""
    rows = min(_MOST_ROWS, len(plan.names))
    height, span = rows * _ROW, max(1, num_steps)
    title = f"Actions of {plan.num_steps} control steps in {len(plan.chunks)} decisions: {', '.join(plan.names[:rows])}"
    parts = [
        f'<svg class="actions" viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    every = max(1, -(-len(plan.chunks) // _MOST_CHUNKS))
    starts, actions = plan.starts, plan.actions
    marks = "".join(f"M{_WIDTH * start / span:.1f} 0V{height:g}" for start in starts[::every])
    parts.append(f'<path class="decision" d="{marks}"/>')
    for i in range(rows):
        below, above = i * _ROW + _TOP, (i + 1) * _ROW - 3
        reach = float(high[i] - low[i]) or 1.0

        def at(step: NDArray, value: NDArray, i: int = i, y: float = above, r: float = reach) -> str:
            ys = y - (value - low[i]) / r * (_ROW - _TOP - 3)
            return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(_WIDTH * step / span, ys, strict=True))

        label = f"{plan.names[i]}  {low[i]:.2g} to {high[i]:.2g}"
        parts.append(f'<text class="tick" x="0" y="{below - 4:g}">{escape(label)}</text>')
        parts.append(f'<line class="zero" x1="0" x2="{_WIDTH:g}" y1="{above:g}" y2="{above:g}"/>')
        for start, chunk in zip(starts[::every], plan.chunks[::every], strict=True):
            steps = start + np.arange(len(chunk))
            inside = steps < span
            if inside.sum() > 1:
                parts.append(f'<polyline class="planned" points="{at(steps[inside], chunk[inside, i])}"/>')
        shown = np.unique(np.linspace(0, len(actions) - 1, min(len(actions), _MOST_POINTS)).round().astype(int))
        parts.append(f'<polyline class="executed" points="{at(shown, actions[shown, i])}"/>')
    width = _WIDTH * plan.num_steps / span
    parts.append(f'<path class="playhead" data-width="{width:.1f}" d="M0 0V{height:g}"/></svg>')
    if len(plan.names) > rows:
        parts.append(f"<small>and {len(plan.names) - rows} more dimensions</small>")
    return "".join(parts)
