"""The gallery of failures: where in the task episodes ended without success, with videos and filmstrips of some."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from vla_rl.evaluation.page import MediaBudget, section, video_element
from vla_rl.evaluation.result import Episode
from vla_rl.evaluation.video import filmstrip

_PER_STAGE = 4
_LISTED = 40


def failure_gallery(
    folder: Path,
    episodes: Sequence[Episode],
    criterion: str,
    *,
    stage_names: Sequence[str] = (),
    budget: MediaBudget,
    per_stage: int = _PER_STAGE,
) -> str:
    """Failed episodes by the furthest stage that they reached, in the order of `stage_names` and then of appearance.

    Of each stage the first `per_stage` that were filmed are shown, in the order of the episodes: chosen by nothing
    else. `folder`: that the episodes' videos are relative to. "" where nothing failed.
    """
    failed = [episode for episode in episodes if not getattr(episode, criterion)]
    groups: dict[str, list[Episode]] = {"": []} | {name: [] for name in stage_names}
    for episode in failed:
        groups.setdefault(episode.stage, []).append(episode)
    staged = any(episode.stage for episode in episodes) or bool(stage_names)
    body = "".join(
        _group(folder, stage, group, len(failed), staged, budget, per_stage) for stage, group in groups.items() if group
    )
    hint = f"{len(failed)} of {len(episodes)} episodes failed. " + (
        "They are grouped by the furthest stage of the task that was reached."
        if staged
        else "The environment names no stages, so they are in one group."
    )
    hint += " Shown are the first that were filmed, not a choice by looks; click a video to play it again."
    return section("Where it failed", body + budget.note() if body else "", hint)


def _group(
    folder: Path, stage: str, group: Sequence[Episode], num_failed: int, staged: bool, budget: MediaBudget, most: int
) -> str:
    filmed = [episode for episode in group if episode.video and (folder / episode.video).is_file()]
    cards = "".join(_card(folder, episode, budget) for episode in filmed[:most])
    where = (f"got as far as: {stage}" if stage else "before the first stage") if staged else "all failures"
    share = len(group) / num_failed
    listed = ", ".join(_name(episode) for episode in group[:_LISTED])
    more = f" and {len(group) - _LISTED} more" if len(group) > _LISTED else ""
    return (
        f'<div class="stage"><h3>{escape(where)} <small>{len(group)} of {num_failed} ({share:.0%})</small></h3>'
        f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'
        + (f'<div class="clips">{cards}</div>' if cards else '<p class="hint">None of them was filmed.</p>')
        + f"<details><summary>which episodes</summary><p>{escape(listed)}{more}</p></details></div>"
    )


def _card(folder: Path, episode: Episode, budget: MediaBudget) -> str:
    """A video above its filmstrip; past the budget of videos only the strip, which costs a tenth."""
    path = folder / episode.video
    strip = budget.embed(filmstrip(path), "image/jpeg")
    film = budget.embed(path.read_bytes(), "video/mp4")
    said = f"{episode.instruction}, {_name(episode)}"
    pictures = video_element(film, said) if film else ""
    pictures += f'<img class="strip" alt="{escape(said)}: first to last frame" src="{strip}">' if strip else ""
    return (
        f'<figure class="clip">{pictures}<figcaption><q>{escape(episode.instruction)}</q> '
        f"<small>{escape(_name(episode))}, {episode.length} steps</small></figcaption></figure>"
    )


def _name(episode: Episode) -> str:
    condition = f" {episode.condition}" if episode.condition else ""
    return f"{episode.task}{condition} seed {episode.seed}"
