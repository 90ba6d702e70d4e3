"""The open-loop check of a log: a policy is asked for every logged observation, and what it says is compared with what
was proposed on the arm. Without an arm, it shows a policy that was trained on other units, cameras or normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_rl.evaluation.charts import Series, line_chart
from vla_rl.real_robot.inference import Infer
from vla_rl.real_robot.log import LogAbout, read_about, read_ticks

_POINTS = 400  # of a curve; more cannot be seen


@dataclass(frozen=True)
class Replay:
    """`seconds` [T]. `policy` [T, A]: what the policy says now for the tick, from the last observation before it.
    `proposed` [T, A]: what was proposed on the arm. `applied` [T, A]: what reached the arm, in the action's units; NaN
    where that is not known. `human` [T]: a person drove."""

    about: LogAbout
    seconds: NDArray[np.float64]
    policy: NDArray[np.float64]
    proposed: NDArray[np.float64]
    applied: NDArray[np.float64]
    human: NDArray[np.bool_]
    num_decisions: int

    @property
    def names(self) -> list[str]:
        dim = self.policy.shape[1]
        names = list(self.about.action_names)
        return names if len(names) == dim else [f"action {i}" for i in range(dim)]

    def errors(self, other: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean and largest distance of `other` from the policy, in each action dimension: [A, 2], NaN without data."""
        known = ~np.isnan(other).any(axis=1)
        if not known.any():
            return np.full((self.policy.shape[1], 2), np.nan)
        away = np.abs(self.policy[known] - other[known])
        return np.stack((away.mean(axis=0), away.max(axis=0)), axis=1)

    def format_table(self) -> str:
        proposed, applied = self.errors(self.proposed), self.errors(self.applied)
        lines = [
            f"{self.num_decisions} observations, {len(self.seconds)} ticks, {int(self.human.sum())} of them a person's",
            f"{'':14}|policy - proposed|       |policy - applied|",
            f"{'action':14}{'mean':>10}{'max':>10}   {'mean':>10}{'max':>10}",
        ]
        for name, a, b in zip(self.names, proposed, applied, strict=True):
            lines.append(f"{name:14}{a[0]:10.4f}{a[1]:10.4f}   {b[0]:10.4f}{b[1]:10.4f}")
        return "\n".join(lines)

    def write_html(self, path: Path) -> None:
        """One page with a chart for each action dimension."""
        every = slice(None, None, max(1, len(self.seconds) // _POINTS))
        charts = []
        for i, name in enumerate(self.names):
            curves = (("policy now", "trained", self.policy), ("proposed", "baseline", self.proposed),
                      ("applied", "control", self.applied))  # fmt: skip
            series = [s for label, style, y in curves if (s := _series(label, style, self.seconds[every], y[every, i]))]
            charts.append(f"<figure><figcaption>{escape(name)}</figcaption>")
            charts.append(line_chart(series, name, x_label="seconds") + "</figure>")
        css = files("vla_rl.evaluation").joinpath("report.css").read_text(encoding="utf-8")
        table = f"<pre>{escape(self.format_table())}</pre>"
        title = f"Open-loop check of {escape(self.about.policy or 'a log')}"
        page = f'<meta charset="utf-8"><title>{title}</title><style>{css}</style><main><h1>{title}</h1>{table}'
        path.write_text(f"<!doctype html><html>{page}{''.join(charts)}</main></html>", encoding="utf-8")


def replay(log: Path | str, infer: Infer) -> Replay:
    """Ask `infer` for every logged observation.

    Raises ValueError where `log` is no log, has no observation, or has actions of another size.
    """
    about = read_about(log)
    rows: list[tuple[float, NDArray, NDArray, NDArray, bool]] = []
    chunk, asked_at, decisions = None, 0.0, 0
    for tick in read_ticks(log):
        if tick.observation is not None:
            chunk, asked_at, decisions = np.asarray(infer(tick.observation), float), tick.at, decisions + 1
        if chunk is None or tick.raw is None:
            continue
        if chunk.shape[1] != len(tick.raw):
            raise ValueError(f"the policy gives actions of {chunk.shape[1]} numbers, the log has {len(tick.raw)}")
        i = round((tick.at - asked_at) * about.control_hz)
        if i < len(chunk):
            applied = np.full(len(tick.raw), np.nan)
            if tick.applied is not None and tick.wanted is not None and _is_joint_target(tick.raw, about):
                applied = np.append(tick.applied.position, tick.applied.gripper)
            rows.append((tick.at, chunk[i], tick.raw, applied, tick.fields["source"] == "human"))
    if not rows:
        raise ValueError(f"{log} has no observation that the policy answered; was it a run of a policy?")
    seconds, policy, proposed, applied, human = (np.array(column) for column in zip(*rows, strict=True))
    return Replay(about, seconds, policy, proposed, applied, human, decisions)


def stored_policy(folder: Path) -> Infer:
    """The policy of a folder, on the CPU; each observation's noise is addressed by its number, so a replay repeats.

    Raises PolicyCheckpointError as `load_any`.
    """
    from vla_rl.serving.inference import read_policy  # torch: not where only a server is asked
    from vla_rl.serving.requests import read_request
    from vla_rl.serving.rtc import RTCConfig

    served = read_policy(folder, 1, device="cpu", rtc=RTCConfig())
    count = 0

    def infer(observation: Mapping[str, Any]) -> NDArray[np.floating]:
        nonlocal count
        noise = np.random.default_rng([0, count]).standard_normal((1, *served.shapes.noise), np.float32)
        count += 1
        return served.act([read_request(dict(observation), served.shapes)], noise)[0]

    return infer


def _is_joint_target(action: NDArray, about: LogAbout) -> bool:
    """The action's names are the joints': only then is what was applied in its units."""
    return len(action) == len(about.joint_names) + 1 and about.action_names[:-1] == about.joint_names


def _series(label: str, style: str, x: NDArray, y: NDArray) -> Series | None:
    known = ~np.isnan(y)
    return Series(label, style, tuple(x[known].tolist()), tuple(y[known].tolist())) if known.any() else None


__all__ = ["Replay", "replay", "stored_policy"]
