"""All stages of a recipe in one folder: demonstrations, SFT, RL, evaluation, report; optionally the negative control.

demos/                 LeRobot dataset
sft/ rl/ control/      metrics, checkpoints and policy of each training (rl/offline, rl/online: from replay)
evaluation/<who>/      episodes, rates and videos
summary.json           rates with intervals, seconds by stage, peak memory
report.html            all of it for people
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.envs.twin import TwinEnvConfig
from vla_rl.evaluation.report import Curve, ReportData, ReportRow, video_pairs, write_report
from vla_rl.evaluation.result import EvalResult
from vla_rl.rollout.recorder import Recording
from vla_rl.train.check import check_recipe
from vla_rl.train.loop import POLICY_FOLDER
from vla_rl.train.metrics import METRICS_FILE
from vla_rl.train.offpolicy_stages import CLONING_FOLDER, OFFLINE_FOLDER, ONLINE_FOLDER
from vla_rl.train.recipe import Recipe
from vla_rl.train.run_folder import (
    CONFIG_FILE,
    DIFF_FILE,
    PROVENANCE_FILE,
    RunFolderError,
    open_run_folder,
    read_config,
)
from vla_rl.train.stages import (
    evaluate_expert,
    evaluate_stage,
    fine_tune,
    record_demos,
    reinforce,
    save_untrained,
)

SUMMARY_FILE, REPORT_FILE, STAGES_FILE = "summary.json", "report.html", "stages.json"
_ROLES = {
    "start": "baseline",
    "sft": "baseline",
    "cloned": "other",
    "offline": "other",
    "rl": "trained",
    "control": "control",
    "expert": "expert",
}
_LABELS = {
    "start": "untrained",
    "sft": "SFT",
    "cloned": "behaviour cloning",
    "offline": "offline RL",
    "rl": "RL",
    "control": "shuffled advantages",
    "expert": "scripted expert",
}
_NOTES = {
    "start": "the agent before any training",
    "sft": "supervised fine-tuning on the demonstrations",
    "cloned": "the actor after imitation of the demonstrations",
    "offline": "reinforcement learning from the same demonstrations, without interaction",
    "rl": "reinforcement learning from there",
    "control": "the control: the same RL without information, must not learn",
    "expert": "sees the simulator's state",
}


class Interrupted(RuntimeError):
    """Ctrl-C stopped a stage after it had saved."""


@dataclass(frozen=True)
class PipelineResult:
    """`summary`: what `summary.json` holds."""

    run_dir: Path
    summary: dict[str, Any]


class Stages:
    """Which stages of a run are done and how long they took, over all the processes that worked on it."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STAGES_FILE
        stored = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.wall_s: dict[str, float] = stored.get("wall_s", {})
        self.done: list[str] = stored.get("done", [])
        self.peak_rss_mb: float = stored.get("peak_rss_mb", 0.0)

    def run(self, name: str, stage: Callable[[], Any]) -> None:
        """Do `stage` unless it is done. Time of an interrupted attempt counts too."""
        if name in self.done:
            return
        print(f"\n== {name} ==", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            result = stage()
            if getattr(result, "finished", True):
                self.done.append(name)
            if getattr(result, "interrupted", False):
                raise Interrupted(f"stopped in stage {name}; everything is saved, add --resume to go on")
        finally:
            self.wall_s[name] = self.wall_s.get(name, 0.0) + time.monotonic() - start
            self.peak_rss_mb = max(self.peak_rss_mb, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            state = {"done": self.done, "wall_s": self.wall_s, "peak_rss_mb": self.peak_rss_mb}
            atomic_write_json(self._file, state)


def run_pipeline(recipe: Recipe, run_dir: str | Path, *, resume: bool = False, control: bool = False) -> PipelineResult:
    """Run what is not done yet, and write summary and report.

    Without `resume`, a finished run in `run_dir` is moved aside and a new one begins; with it, only summary and report
    are written again. `control` adds the stage that trains on shuffled advantages. Raises RunFolderError where an
    unfinished run is there and `resume` is not set, ValueError for a recipe whose parts do not fit (before anything
    runs), and Interrupted after Ctrl-C.
    """
    run_dir = Path(run_dir)
    check_recipe(recipe)
    shuffled = recipe.control() if control else None
    torch.set_num_threads(recipe.torch_threads)
    if not resume:
        _set_aside_if_finished(run_dir, control)
    open_run_folder(run_dir, recipe, resume=resume, kind="run")
    stages = Stages(run_dir)
    demos, sft, rl = run_dir / "demos", run_dir / "sft", run_dir / "rl"
    stages.run("demonstrations", lambda: record_demos(recipe, demos))
    start = sft / POLICY_FOLDER if recipe.fine_tunes else None
    if recipe.fine_tunes:
        stages.run("sft", lambda: fine_tune(recipe, demos, sft, resume=True))
    else:
        stages.run("start", lambda: save_untrained(recipe, demos, run_dir / "start" / POLICY_FOLDER))
    stages.run("rl", lambda: reinforce(recipe, start, rl, resume=True, dataset_path=demos))
    if shuffled is not None:
        folder = run_dir / "control"
        stages.run("control", lambda: reinforce(shuffled, start, folder, resume=True, dataset_path=demos))
    trained = {who: folder for who, folder in _policies(run_dir).items() if who != "control"}
    stages.run("evaluation", lambda: _evaluate_all(recipe, run_dir, trained))
    if control:
        control_policy = {"control": _policies(run_dir)["control"]}
        stages.run("control evaluation", lambda: _evaluate_all(recipe, run_dir, control_policy))
    began = time.monotonic()
    write_run_report(run_dir)
    return PipelineResult(run_dir, _summarise(run_dir, stages, report_s=time.monotonic() - began))


def _set_aside_if_finished(run_dir: Path, control: bool) -> None:
    stages = Stages(run_dir)
    wanted = {"evaluation", "control evaluation"} if control else {"evaluation"}
    if not (run_dir / SUMMARY_FILE).exists() or not wanted <= set(stages.done):
        return
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(aside)
    print(f"the finished run in {run_dir} is now {aside}", file=sys.stderr)


def _policies(run_dir: Path) -> dict[str, Path]:
    """The policies that the stages of a run have made. After learning from replay in two stages, "offline" is the one
    of the first."""
    rl = run_dir / "rl"
    folders = {"start": run_dir / "start", "sft": run_dir / "sft", "cloned": rl / CLONING_FOLDER}
    if (rl / OFFLINE_FOLDER).exists() and (rl / ONLINE_FOLDER).exists():
        folders["offline"] = rl / OFFLINE_FOLDER
    folders |= {"rl": rl, "control": run_dir / "control"}
    return {who: folder / POLICY_FOLDER for who, folder in folders.items() if (folder / POLICY_FOLDER).exists()}


def _evaluate_all(recipe: Recipe, run_dir: Path, policies: Mapping[str, Path]) -> None:
    """The same episodes for all."""
    for who, folder in policies.items():
        evaluate_stage(recipe, folder, run_dir / "evaluation" / who, label=who)
    if "rl" in policies and not isinstance(recipe.env, TwinEnvConfig):  # no expert sees an arm's scene
        evaluate_expert(recipe, recipe.evaluation, run_dir / "evaluation" / "expert")


def _results(run_dir: Path) -> dict[str, EvalResult]:
    folder = run_dir / "evaluation"
    return {who: EvalResult.load(folder / who) for who in _ROLES if (folder / who).exists()}


def _summarise(run_dir: Path, stages: Stages, report_s: float) -> dict[str, Any]:
    wall_s = {name: round(seconds, 2) for name, seconds in stages.wall_s.items()} | {"report": round(report_s, 2)}
    summary = {who: result.success_once.as_dict() for who, result in _results(run_dir).items()}
    summary |= {"wall_s": wall_s, "total_s": round(sum(wall_s.values()), 2), "peak_rss_mb": round(stages.peak_rss_mb)}
    atomic_write_json(run_dir / SUMMARY_FILE, summary)
    return summary


def _recordings(run_dir: Path, who: str) -> dict[int, Recording]:
    """Of the first task, by seed."""
    folder = run_dir / "evaluation" / who
    episodes = EvalResult.load(folder).episodes
    return {
        e.seed: Recording(e.seed, folder / e.video, e.instruction, e.success_once, e.length)
        for e in episodes
        if e.video and e.task == episodes[0].task
    }


def write_run_report(run_dir: Path) -> Path:
    """The report of what lies in `run_dir`. Raises RunFolderError where that is no run with an evaluation."""
    recipe, stages = read_config(run_dir, Recipe), Stages(run_dir)
    if "evaluation" not in stages.done:
        raise RunFolderError(f"{run_dir} has no evaluation yet; go on with it: vla-rl run ... --resume")
    rows = tuple(
        ReportRow(_LABELS[who], _ROLES[who], result, _NOTES[who])  # pyright: ignore
        for who, result in _results(run_dir).items()
    )
    curves = tuple(
        Curve(label, role, run_dir / folder)  # pyright: ignore
        for label, role, folder in (
            ("SFT", "baseline", "sft"),
            ("RL", "trained", "rl"),
            ("cloning", "other", f"rl/{CLONING_FOLDER}"),
            ("offline RL", "other", f"rl/{OFFLINE_FOLDER}"),
            ("online RL", "trained", f"rl/{ONLINE_FOLDER}"),
            ("control", "control", "control"),
        )
        if (run_dir / folder / METRICS_FILE).exists()
    )
    first = next(
        (who for who in ("sft", "cloned", "offline", "start") if (run_dir / "evaluation" / who).exists()), "rl"
    )
    provenance = json.loads((run_dir / PROVENANCE_FILE).read_text())
    texts = {key: _text(value) for key, value in provenance.items() if value}
    texts["configuration"] = (run_dir / CONFIG_FILE).read_text()
    difference = (run_dir / DIFF_FILE).read_text()
    texts |= {"uncommitted changes": difference} if difference else {}
    return write_report(
        run_dir / REPORT_FILE,
        ReportData(
            title=f"{run_dir.resolve().name}: {recipe.env.task}",
            rows=rows,
            command=provenance["command"],
            description=_describe_episodes(recipe),
            curves=curves,
            videos=video_pairs(_recordings(run_dir, first), _recordings(run_dir, "rl")),
            stage_wall_s=stages.wall_s,
            provenance=texts,
        ),
    )


def _describe_episodes(recipe: Recipe) -> str:
    n, split = recipe.evaluation.num_episodes, recipe.evaluation.split
    if split == "train":
        return f"{n} episodes of the training's own split: customary for some benchmarks, and not held out."
    return f"Every policy on the same {n} episodes of the split {split!r}, which no stage of the training has seen."


def _text(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


__all__ = ["Interrupted", "PipelineResult", "RunFolderError", "run_pipeline", "write_run_report"]
