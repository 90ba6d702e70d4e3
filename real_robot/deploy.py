"""A policy on the arm: `vla-rl deploy --robot twin --policy RUN`. Several processes of one machine:

    the twin             physics and cameras behind topics; started here where none answers
    the policy server    `vla-rl serve`; started here unless one is named
    the supervisor       owns the arm: safety filter, e-stop; the arm holds when anything else dies
    this one             control loop, episodes, report

Episodes are those of `vla-rl eval`: the same seeds of the same split, the same limit of steps, the same files.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vla_rl.evaluation.result import Episode, EvalResult, Timing
from vla_rl.evaluation.video import write_video
from vla_rl.real_robot.control_loop import ControlLoop, LoopParts, StartRefusedError, Tick
from vla_rl.real_robot.deploy_config import CAMERA_HZ, DeployConfig, TabletopScene
from vla_rl.real_robot.deploy_page import PAGE_FILE, write_deploy_page
from vla_rl.real_robot.deploy_processes import check_server, start_server, start_twin
from vla_rl.real_robot.drivers.dds_arm import DDSArm, DDSArmConfig, DDSCamera, DDSCameraConfig
from vla_rl.real_robot.drivers.twin_episodes import EpisodeState
from vla_rl.real_robot.inference import Inference, ServedActions, ServerConfig
from vla_rl.real_robot.interfaces import HardwareError
from vla_rl.real_robot.log import LogAbout, RobotLog
from vla_rl.real_robot.loop_config import LoopConfig
from vla_rl.real_robot.modes import Mode
from vla_rl.real_robot.supervisor import SupervisorClient, SupervisorConfig
from vla_rl.real_robot.tabletop_arm import TabletopArm, tabletop_limits, tabletop_safety
from vla_rl.real_robot.twin import TwinConfig
from vla_rl.serving.broker import BrokerConfig
from vla_rl.serving.client import ENVELOPE
from vla_rl.train.run_folder import write_provenance

RESULT_FILE = "deploy.json"


class DeployStoppedError(RuntimeError):
    """The arm was stopped, or could not be started; it holds. What ran before is in the results."""


@dataclass
class EpisodeRun:
    """Ticks of one episode as the control loop ran it. `steps`: executed actions of the policy."""

    seed: int
    max_steps: int
    film: bool
    steps: int = 0
    state: EpisodeState | None = None
    clamps: Counter[str] = field(default_factory=Counter)
    num_clamped: int = 0
    frames: list[NDArray[np.uint8]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        s = self.state
        return self.steps >= self.max_steps or (s is not None and (s.success_once or s.failure))

    def add(self, tick: Tick, state: EpisodeState) -> None:
        self.state = state
        if self.film and tick.pictures:
            self.frames.append(next(iter(tick.pictures.values())).image.copy())
        if not self.over:
            self.steps += tick.wanted is not None
            self.clamps.update(tick.clamps)
            self.num_clamped += bool(tick.clamps)


@dataclass
class _Totals:
    """Of all episodes."""

    late_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    clamps: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    broker: Counter[str] = field(default_factory=Counter)


class Deployment:
    """A context manager: entering starts what is missing and connects everything, leaving stops the arm and ends what
    was started. `run` the episodes in between.

    Raises HardwareError where the twin or the arm does not answer or is another one, RuntimeError where the server does
    not start or its policy is for another robot.
    """

    def __init__(self, scene: TabletopScene, policy: Path | None, out: Path, config: DeployConfig) -> None:
        self.scene, self.policy, self.out, self.config = scene, policy, out, config
        self.episodes: list[Episode] = []
        self.rows: list[dict[str, Any]] = []
        self.stopped = ""
        self._totals = _Totals()
        self._stack = ExitStack()
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Deployment:
        try:
            self._connect()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _connect(self) -> None:
        scene, config, stack = self.scene, self.config, self._stack
        if (self.out / RESULT_FILE).exists() or (self.out / "logs").exists():
            raise ValueError(f"{self.out} holds a deployment already; name another folder with --out")
        (self.out / "logs").mkdir(parents=True)
        url = config.server
        if not url:
            if self.policy is None:
                raise ValueError("name a policy's folder, or the address of a server that has one")
            self._server, url = start_server(self.policy, self.out / "server.log", stack)
        wanted = TwinConfig(scene.task, scene.split, 0, scene.cameras, scene.image_size, CAMERA_HZ, scene.randomization)
        self._twin = start_twin(wanted, self.out / "twin.log", stack)
        self._cameras = [DDSCamera(DDSCameraConfig(name, f"/camera/{name}/image_raw")) for name in scene.cameras]
        for camera in self._cameras:
            camera.connect()
            stack.callback(camera.close)
            height, width = camera.latest().image.shape[:2]
            if (height, width) != (scene.image_size, scene.image_size):
                raise HardwareError(
                    f"camera {camera.name} has {width}x{height} pixels, the policy wants {scene.image_size}; "
                    f"start the twin with --image-size {scene.image_size}"
                )
        safety = replace(tabletop_safety(), speed_scale=config.speed_scale, max_state_age_s=config.max_state_age_s)
        make_arm = partial(DDSArm, tabletop_limits(config.limits), DDSArmConfig(periods_ahead=config.periods_ahead))
        supervisor = SupervisorConfig(safety, timeout_s=config.silence_s, linger_s=0.0)
        self._guarded = stack.enter_context(SupervisorClient.start(make_arm, supervisor))
        self._arm = TabletopArm(self._guarded, scene.control)
        self._served = ServedActions(ServerConfig(url, timeout_s=config.reply_s, heartbeat_s=config.heartbeat_s))
        stack.callback(self._served.close)
        check_server(self._served.metadata, self._arm.action, config.mode)
        self._inference = Inference(self._served)
        stack.callback(self._inference.close)

    # ------------------------------------------------------------------------------------------------------- episodes
    def run(self) -> EvalResult:
        """All episodes, and their files. Raises DeployStoppedError where the arm was stopped; what ran is saved."""
        start, load = time.monotonic(), os.getloadavg()[0]
        seed = first = self.scene.first_seed
        try:
            for seed in range(first, first + self.config.episodes):
                self._episode(seed)
                if self.stopped:
                    break
        finally:
            result = self._save(time.monotonic() - start, load)
        if self.stopped:
            raise DeployStoppedError(self._why_stopped(seed))
        assert result is not None
        return result

    def _episode(self, seed: int) -> None:
        if self._server is not None and self._server.poll() is not None:
            self.stopped = "it was not started"
            return
        state = self._twin.reset(seed)
        while self._inference.busy:  # with the episode before; its reply is not used
            time.sleep(0.005)
        self._inference.poll()
        self._served.begin(seed)
        run = EpisodeRun(
            seed, self.scene.max_episode_steps or state.max_steps, film=len(self.rows) < self.config.num_videos
        )
        parts = LoopParts(
            arm=self._arm,
            cameras=self._cameras,
            inference=self._inference,
            to_command=self._arm.target,
            observe=self._arm.observe,
            policy_problem=self._served.problem,
            on_tick=lambda tick: self._on_tick(tick, run, loop, log),
        )
        loop = ControlLoop(parts, self._loop_config(state.instruction))
        self._arm.read()
        self._arm.begin()
        with RobotLog(self.out / "logs" / f"episode_{seed}", self._about(state.instruction)) as log:
            try:
                loop.start(shadow=self.config.shadow)
            except StartRefusedError as error:
                self.stopped = f"it was not started: {error}"
                return
            self._arm.begin()  # the first action is executed in the first tick, not in start's check
            loop.run(duration_s=3 * run.max_steps / self._arm.spec.rate_hz + self.config.grace_s + 1.0)
        self._finish(run, loop, state.instruction)

    def _about(self, instruction: str) -> LogAbout:
        said = self._served.metadata.get(ENVELOPE, {})
        return LogAbout(
            joint_names=self._arm.spec.joint_names,
            prompt=instruction,
            control_hz=self._arm.spec.rate_hz,
            policy=self.scene.label,
            policy_digest=str(said.get("policy_digest", "")),
            action_names=self._arm.action.names,
            config=asdict(self.config) | asdict(self.scene),
        )

    def _loop_config(self, instruction: str) -> LoopConfig:
        rate, config = self._arm.spec.rate_hz, self.config
        return LoopConfig(
            prompt=instruction,
            broker=BrokerConfig(rate, config.mode, self.scene.execution_horizon),
            max_picture_age_s=config.max_picture_age_s,
            max_plan_age_s=None if config.mode == "sync" else config.max_plan_age_s,
            grace_s=config.grace_s,
            ramp_s=0.0,  # an action moves the setpoint by 2 cm at most: there is no way to come in from
        )

    def _on_tick(self, tick: Tick, run: EpisodeRun, loop: ControlLoop, log: RobotLog) -> None:
        log.write(tick)
        run.add(tick, self._twin.state())
        if run.over:
            loop.finish()

    def _finish(self, run: EpisodeRun, loop: ControlLoop, instruction: str) -> None:
        state, report, totals = run.state, loop.report, self._totals
        assert state is not None
        if loop.mode is Mode.ESTOP:
            self.stopped = report.stop_reason
        summary = report.summary()
        totals.late_s += report.late_s
        totals.latency_s += report.latency_s
        totals.clamps.update(run.clamps)
        totals.broker.update(asdict(loop.broker.counts))
        totals.counts.update({name: int(summary[name]) for name in ("ticks", "missed", "held", "clamped", "failures")})
        row = {"seed": run.seed, "steps": run.steps, "success": state.success_once, "twin_late": state.late_ticks}
        self.rows.append({**row, "clamps": dict(run.clamps), **summary})
        video = f"videos/episode_{run.seed}.mp4" if run.frames else ""
        if video:
            frames = torch.from_numpy(np.stack(run.frames))
            write_video(self.out / video, frames, 0.5 * self._arm.spec.rate_hz)
        if not self.stopped:  # an episode that was cut off says nothing of the policy
            latency_ms = 1000 * float(np.mean(report.latency_s)) if report.latency_s else 0.0
            episode = _as_episode(state, run, instruction)
            self.episodes.append(replace(episode, video=video, latency_ms=latency_ms))
        print(_line(self.rows[-1]), flush=True)

    # --------------------------------------------------------------------------------------------------------- results
    def _save(self, wall_s: float, load: float) -> EvalResult | None:
        totals = self._totals
        result = None
        if self.episodes:
            config = {"policy": self.scene.label, **self.scene.protocol, "robot": self.config.robot}
            config |= {"chunks": self.config.mode, "execution_horizon": self.scene.execution_horizon}
            rate = self._arm.spec.rate_hz
            config |= {"control_hz": rate}
            cycles = [e.length / rate for e in self.episodes if e.success_once]
            timing = Timing.of([1000 * s for s in totals.latency_s], [], cycles, wall_s)
            result = EvalResult(tuple(self.episodes), config, wall_s, timing)
            result.save(self.out)
        values = {
            "config": asdict(self.config),
            "policy": self.scene.label,
            "server": self._served.metadata.get(ENVELOPE, {}),
            "stopped": self.stopped,
            "success_once": result.success_once.as_dict() if result else None,
            "latency_ms": percentiles_ms(totals.latency_s),
            "period_error_ms": percentiles_ms(totals.late_s),
            **totals.counts,
            "clamps": dict(totals.clamps),
            "broker": dict(totals.broker),
            "load": [round(load, 2), round(os.getloadavg()[0], 2)],
            "episodes": self.rows,
        }
        (self.out / RESULT_FILE).write_text(json.dumps(values, indent=2) + "\n")
        return result

    def _why_stopped(self, seed: int) -> str:
        code = None if self._server is None else self._server.poll()
        why = "" if code is None else f"; the policy server has ended with {code}, see {self.out / 'server.log'}"
        return f"the arm was stopped in the episode of seed {seed} and holds: {self.stopped}{why}"


def deploy(scene: TabletopScene, policy: Path | None, out: Path, config: DeployConfig) -> EvalResult:
    """Run the episodes and write `eval.json`, `episodes.parquet`, `deploy.json`, `deploy.html`, logs and videos into
    `out`. Raises as `Deployment`."""
    with Deployment(scene, policy, out, config) as deployment:
        write_provenance(out)
        try:
            return deployment.run()
        finally:
            write_deploy_page(out)


def format_deployment(out: Path) -> str:
    """The text table of what `deploy` measured."""
    v = json.loads((out / RESULT_FILE).read_text())
    ticks = max(1, v.get("ticks", 0))
    lines = []
    for name, label in (("latency_ms", "policy latency"), ("period_error_ms", "period error")):
        lines.append(
            f"{label:16} p50 {v[name]['p50']:.1f} ms, p99 {v[name]['p99']:.1f} ms, max {v[name]['max']:.1f} ms"
        )
    lines.append(
        f"{'ticks':16} {ticks}, held {v.get('held', 0)}, clamped {v.get('clamped', 0)}, missed {v.get('missed', 0)}"
    )
    lines.append(f"{'clamps':16} " + (", ".join(f"{n} {c}" for n, c in sorted(v["clamps"].items())) or "none"))
    lines.append(f"{'chunks':16} " + ", ".join(f"{n} {c}" for n, c in v["broker"].items()))
    lines.append(f"{'machine load':16} {v['load'][0]} to {v['load'][1]} on {os.cpu_count()} cores")
    lines.append(f"{'page':16} {out / PAGE_FILE}")
    return "\n".join(lines)


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and max, in ms; zeros for nothing."""
    if not seconds:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    p50, p99, most = 1000 * np.percentile(seconds, [50, 99, 100])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(float(most), 3)}


def _as_episode(state: EpisodeState, run: EpisodeRun, instruction: str) -> Episode:
    return Episode(
        task=f"tabletop/{state.task}",
        seed=run.seed,
        instruction=instruction,
        success_once=state.success_once,
        success_at_end=state.success,
        length=run.steps,
        episode_return=float(state.success_once),
        terminated=state.success_once or state.failure,
        initial_state=str(run.seed),
        num_clamped=run.num_clamped,
    )


def _line(row: dict[str, Any]) -> str:
    outcome = "success" if row["success"] else "no success"
    clamps = " ".join(f"{name}:{count}" for name, count in sorted(row["clamps"].items()))
    return (
        f"seed {row['seed']:4}  {outcome:10}  {row['steps']:3} steps  held {row['held']:2}  "
        f"latency p99 {row['latency_p99_ms']:6.1f} ms  period p99 {row['late_p99_ms']:6.1f} ms  {clamps}"
    )


__all__ = [
    "DeployStoppedError", "Deployment", "deploy", "format_deployment",
]  # fmt: skip
