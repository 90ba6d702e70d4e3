"""The processes that a deployment needs beside its own, and what has to fit."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vla_rl.core import ActionSpec
from vla_rl.real_robot.drivers.twin_episodes import TwinEpisodes
from vla_rl.real_robot.interfaces import HardwareError
from vla_rl.real_robot.twin import TwinConfig
from vla_rl.serving.client import ENVELOPE, PolicyClient, PolicyServerError

_START_S = 60.0
_CLI = "import sys; from vla_rl.cli import main; sys.exit(main())"


def start_server(policy: Path, log: Path, stack: ExitStack) -> tuple[subprocess.Popen[bytes], str]:
    """`vla-rl serve` of `policy` on a free port of this machine; its process and its address. Raises RuntimeError where
    it ends or does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = _start([sys.executable, "-c", _CLI, "serve", "--policy", str(policy), "--port", str(port)], log, stack)
    url, end = f"ws://127.0.0.1:{port}", time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            PolicyClient(url).close()
        except PolicyServerError:
            time.sleep(0.1)
        else:
            return process, url
    raise RuntimeError(f"the policy server does not start: {_last_line(log)}")


def start_twin(wanted: TwinConfig, log: Path, stack: ExitStack) -> TwinEpisodes:
    """The episodes of the twin that runs, or of one that is started here as `wanted`. Raises HardwareError where none
    answers, or it has other episodes."""
    try:
        twin = TwinEpisodes(timeout_s=2.0)
    except HardwareError:
        twin = _own_twin(wanted, log, stack)
    stack.callback(twin.close)
    state = twin.state()
    if (state.task, state.split) != (wanted.task, wanted.split):
        raise HardwareError(
            f"the twin that runs has task {state.task!r} of split {state.split!r}, the policy's episodes are "
            f"{wanted.task!r} of {wanted.split!r}; end it, or start it with --task {wanted.task} --split {wanted.split}"
        )
    return twin


def _own_twin(wanted: TwinConfig, log: Path, stack: ExitStack) -> TwinEpisodes:
    options = {
        "task": wanted.task,
        "split": wanted.split,
        "image-size": wanted.image_size,
        "camera-hz": wanted.camera_hz,
        "randomization": wanted.randomization,
        "record": log.with_suffix(".jsonl"),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    cameras = ["--cameras", *(wanted.cameras or ("agent",))]
    process = _start([sys.executable, "-m", "vla_rl.real_robot.twin", *words, *cameras], log, stack)
    end = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            return TwinEpisodes(timeout_s=5.0)
        except HardwareError:
            continue
    raise HardwareError(f"the twin does not start: {_last_line(log)}")


def _start(command: list[str], log: Path, stack: ExitStack) -> subprocess.Popen[bytes]:
    """A process that ends with `stack`. In a session of its own: Ctrl-C reaches this process, which stops the arm
    first."""
    file = stack.enter_context(log.open("wb"))
    process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it says nothing") + f" ({log})"


def check_server(metadata: Mapping[str, Any], action: ActionSpec, mode: str) -> None:
    """Raises RuntimeError where the server's policy, as far as it says, is not for this robot."""
    ours = metadata.get(ENVELOPE, {})
    names = tuple(ours.get("action_names", ()))
    if names and names != action.names:
        raise RuntimeError(f"the served policy's actions are {', '.join(names)}, the arm's {', '.join(action.names)}")
    if mode == "rtc" and not ours.get("rtc"):
        raise RuntimeError("the served policy does not continue chunks; use mode async, sync or ensemble")


__all__ = ["check_server", "start_server", "start_twin"]
