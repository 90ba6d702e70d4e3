"""Several learners started through Ray: on each, what `torchrun` would run, placed by Ray instead of by hand.

A learner is a process of its own beside the Ray actor that started it, so everything in it, workers and Ctrl-C
included, is as under `torchrun`. It ends when its actor ends, whatever the reason.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_POLL_S = 0.2


@dataclass(frozen=True)
class LearnersConfig:
    """`num`: learners that share a run (1: this process). More than one are started through Ray, on the cluster at
    `ray_address` (None: Ray is started on this machine); the run's folder must then be the same one on all machines.
    Each takes `cpus_per_learner` and `gpus_per_learner`. `shard`: the layers of the policy are divided among them
    (FSDP2, `sharding.py`) instead of repeated on each; with learners started by `torchrun`, too."""

    num: int = 1
    ray_address: str | None = None
    cpus_per_learner: float = 1.0
    gpus_per_learner: float = 0.0
    shard: bool = False

    def __post_init__(self) -> None:
        if self.num < 1 or self.cpus_per_learner < 0 or self.gpus_per_learner < 0:
            raise ValueError(f"learners.num must be at least 1 and what each takes at least 0, got {self}")
        if self.num == 1 and (self.ray_address, self.cpus_per_learner, self.gpus_per_learner) != (None, 1.0, 0.0):
            raise ValueError("learners.*: no effect with one learner; set learners.num to 2 or more")


class _Learner:
    """The Ray actor: starts a process and watches it."""

    def address(self) -> tuple[str, int]:
        """Of this machine, for the learners to meet at: host, free port."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def start(self, arguments: Sequence[str], folder: str, variables: Mapping[str, str]) -> None:
        """`vla-rl` with `arguments` in `folder`. Ray's own variables would tell it that it is a Ray worker."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            cwd=folder,
            env=kept | dict(variables),
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches it once, from `interrupt`
        )

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)


def run_learners(arguments: Sequence[str], config: LearnersConfig) -> int:
    """`vla-rl` with `arguments` in `config.num` processes that are one group of learners; the exit status of all.

    Ctrl-C is passed on: the learners save and leave together. Raises ValueError where the cluster cannot be reached or
    has no room, RuntimeError where a learner fails or its machine dies; the others are then ended.
    """
    try:
        import ray
        from ray.exceptions import RayActorError

        from vla_rl.rollout.ray_start import connect
    except ModuleNotFoundError as error:
        raise ValueError("learners.num needs Ray: pip install 'vla-rl[ray]'; or start them with torchrun") from error
    from vla_rl.train.interrupt import StopOnInterrupt

    owns_ray = connect(
        config.ray_address,
        {"CPU": config.num * config.cpus_per_learner, "GPU": config.num * config.gpus_per_learner},
        who=f"{config.num} learners",
        option="learners.ray_address",
        advice="Lower learners.num, or what each takes (learners.cpus_per_learner, learners.gpus_per_learner)",
    )
    actor = ray.remote(_Learner).options(num_cpus=config.cpus_per_learner, num_gpus=config.gpus_per_learner)
    learners: list[Any] = [actor.remote() for _ in range(config.num)]
    try:
        with StopOnInterrupt() as stop:
            _start(learners, arguments)
            passed_on = False
            while True:
                codes: list[int | None] = ray.get([one.poll.remote() for one in learners])
                failed = [i for i, code in enumerate(codes) if code not in (None, 0, 130)]
                if failed:
                    raise RuntimeError(f"learner {failed[0]} ended with status {codes[failed[0]]}; its error is above")
                if None not in codes:
                    return max(code for code in codes if code is not None)
                if stop.requested and not passed_on:
                    ray.get([one.interrupt.remote() for one in learners])
                    passed_on = True
                time.sleep(_POLL_S)
    except RayActorError as error:
        raise RuntimeError(f"a learner or its machine died ({error}); go on with --resume") from error
    finally:
        for one in learners:
            ray.kill(one)
        if owns_ray:
            ray.shutdown()


def _start(learners: Sequence[Any], arguments: Sequence[str]) -> None:
    import ray

    host, port = ray.get(learners[0].address.remote())
    group = {"WORLD_SIZE": str(len(learners)), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    ray.get(
        [
            # LOCAL_RANK 0: Ray shows each learner its own GPU alone
            one.start.remote(list(arguments), os.getcwd(), group | {"RANK": str(rank), "LOCAL_RANK": "0"})
            for rank, one in enumerate(learners)
        ]
    )


def _main() -> int:
    """In the learner's process: `vla-rl`, until its work is done or its actor is no more."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # Ray's processes block it
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def end_with_actor() -> None:
        os.read(0, 1)  # the end of a pipe whose other end has the actor; sys.stdin has a lock that outlives the thread
        os._exit(1)

    threading.Thread(target=end_with_actor, daemon=True).start()
    from vla_rl.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(_main())


__all__ = ["LearnersConfig", "run_learners"]
