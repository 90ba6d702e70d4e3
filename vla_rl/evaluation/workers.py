"""The episodes of an evaluation in this process, or dealt to several.

Workers only play: each sends an episode as soon as it ends, and the process that started them keeps what there is. So
a worker can die, or be killed with its parent, at any moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vla_rl.envs.vector import ChunkedEnv
from vla_rl.evaluation.evaluate import Finished, Labels, play, play_controller
from vla_rl.evaluation.policies import Actor, Expert, ReadyPolicy
from vla_rl.evaluation.stopping import StopRule
from vla_rl.evaluation.suite import Suite, SuiteCase
from vla_rl.protocols import Policy
from vla_rl.rollout.recorder import EpisodeRecorder

Report = Callable[[int, Finished], bool]
_LEAVE_S = 10.0


class WorkerError(RuntimeError):
    """A worker of an evaluation failed; what it had finished is kept."""


@dataclass(frozen=True)
class HarnessConfig:
    """`num_envs` and `workers` (processes) change the speed and never the result. `execution_horizon`: control steps of
    each chunk that are executed, None for all. `policy_batch_size`, `noise_seed`: see `evaluate`. `num_videos`: of the
    first episodes of each case, at `video_speed` times real time. `stop`: ends a case early."""

    num_envs: int = 16
    workers: int = 1
    execution_horizon: int | None = None
    policy_batch_size: int = 32
    noise_seed: int = 0
    num_videos: int = 0
    video_speed: float = 0.5
    stop: StopRule | None = None

    def __post_init__(self) -> None:
        for name in ("num_envs", "workers", "policy_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    def protocol(self) -> dict[str, Any]:
        """What decides the episodes and their rows."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in ("num_envs", "workers")}


@dataclass(frozen=True)
class Job:
    """What every process of an evaluation needs to know. `out`: folder of the result, None for no videos."""

    suite: Suite
    actor: Actor
    out: Path | None
    config: HarnessConfig

    def play_all(self, todo: Mapping[int, Sequence[int]], report: Report) -> None:
        """Run the episodes of `todo`, case by case; `report` hears of each, and True ends the case."""
        policy: Policy | None = self.actor.policy if isinstance(self.actor, ReadyPolicy) else None
        try:
            for c, indices in todo.items():
                if not indices:
                    continue
                case = self.suite.cases[c]
                if policy is None and not isinstance(self.actor, Expert):
                    one = case.env.make(1, split=case.split, task=case.task)
                    one.close()
                    policy = self.actor.open(one.spec)
                self._play(case, policy, indices, lambda finished, c=c: report(c, finished))
        finally:
            close = getattr(policy, "close", None)
            if close is not None and not isinstance(self.actor, ReadyPolicy):
                close()

    def _play(
        self, case: SuiteCase, policy: Policy | None, indices: Sequence[int], on_finish: Callable[[Finished], bool]
    ) -> None:
        config = self.config
        shared: dict[str, Any] = {
            "num_envs": config.num_envs,
            "labels": Labels(case.condition, case.initial_state, self.out),
            "record": self._recorder(case),
            "todo": indices,
            "on_finish": on_finish,
        }
        if isinstance(self.actor, Expert):
            expert, env = self.actor, self.actor.environment(case.env)

            def controller(made: ChunkedEnv) -> Any:
                return expert.controller(made, env)

            play_controller(lambda n: env.make(n, split=case.split, task=case.task), controller, case.seeds, **shared)
            return
        assert policy is not None
        play(
            policy,
            lambda n: case.env.make(n, split=case.split, task=case.task),
            case.seeds,
            execution_horizon=config.execution_horizon or policy.action_horizon,
            policy_batch_size=config.policy_batch_size,
            noise_seed=config.noise_seed,
            **shared,
        )

    def _recorder(self, case: SuiteCase) -> EpisodeRecorder | None:
        filmed = list(case.seeds)[: self.config.num_videos]
        if self.out is None or not filmed:
            return None
        folder = self.out / "videos" / case.task / case.condition
        return EpisodeRecorder(folder, filmed, case.env.control_hz, speed=self.config.video_speed)


def run_job(job: Job, todo: Mapping[int, Sequence[int]], report: Report) -> None:
    """Run the episodes of `todo` (case -> indices) in `job.config.workers` processes. `report` is called in this one,
    and True ends the case. Raises WorkerError where a worker fails, and else as `play`."""
    shares = [share for share in deal(todo, job.config.workers, job.config.num_envs) if any(share.values())]
    if len(shares) < 2:
        job.play_all(todo, report)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads and of a GPU does not work
    processes: list[Any] = []
    connections: list[Connection] = []
    try:
        for number, share in enumerate(shares):
            ours, theirs = context.Pipe()
            arguments = (job, share, torch.get_num_threads(), theirs)
            process = context.Process(target=_work, args=arguments, daemon=True, name=f"evaluation worker {number}")
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        listen(connections, report)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(_LEAVE_S)
            if process.is_alive():
                process.kill()
                process.join()


def deal(todo: Mapping[int, Sequence[int]], workers: int, block: int) -> list[dict[int, list[int]]]:
    """What each worker plays: neighbouring episodes together, since they sit in different rows of the policy's batch,
    and early ones first in every share, since a stop asks for the beginning."""
    shares: list[dict[int, list[int]]] = [{} for _ in range(workers)]
    for case, indices in todo.items():
        size = max(1, min(block, -(-len(indices) // workers)))
        for number, start in enumerate(range(0, len(indices), size)):
            shares[number % workers].setdefault(case, []).extend(indices[start : start + size])
    return shares


def listen(connections: Sequence[Connection], report: Report) -> None:
    """Hear every worker until all are done. Raises WorkerError for one that fails or falls silent."""
    running = list(connections)
    while running:
        for ready in wait(running):
            assert isinstance(ready, Connection)
            try:
                kind, *values = ready.recv()
            except (EOFError, ConnectionResetError) as error:
                raise WorkerError(
                    "a worker of the evaluation has died; what was finished is kept, --resume goes on"
                ) from error
            if kind == "finished" and report(*values):
                for other in running:
                    with suppress(BrokenPipeError):
                        other.send(values[0])
            if kind == "failed":
                failure, trace = values
                error = WorkerError(failure)
                error.add_note(trace)
                raise error
            if kind == "done":
                running.remove(ready)


def _work(job: Job, todo: Mapping[int, Sequence[int]], num_threads: int, connection: Connection) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who then sends SIGTERM
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)  # as in the parent: another number may round differently
    enough: set[int] = set()

    def report(case: int, one: Finished) -> bool:
        connection.send(("finished", case, one))
        while connection.poll():
            enough.add(connection.recv())
        return case in enough

    try:
        job.play_all(todo, report)
        connection.send(("done",))
        while True:  # the parent ends the workers when all are done: a closed connection would be a death
            connection.recv()
    except (BrokenPipeError, ConnectionResetError, EOFError):
        return
    except Exception as error:
        with suppress(BrokenPipeError):
            connection.send(("failed", f"{type(error).__name__}: {error}", traceback.format_exc()))


def _leave(signal_number: int, frame: FrameType | None) -> None:
    del signal_number, frame
    raise SystemExit(0)  # environments and servers are closed on the way out


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


__all__ = ["HarnessConfig", "Job", "WorkerError", "deal", "listen", "run_job"]
