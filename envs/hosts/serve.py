"""Serves hosted environments over a socket that the parent opened: `python serve.py FD` in a simulator's Python.

The first message says which module to build from. Pictures go through shared memory that the parent made; all else is
in the messages. The process ends when the socket closes, so that a killed parent leaves nobody behind.

This folder is the package `vla_rl_hosts` here, and the host module a part of it, wherever its file lies: what it shares
with others it imports relatively, `from . import mujoco_view`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_HERE = Path(__file__).resolve().parent
_PACKAGE = "vla_rl_hosts"


def load(path: Path, name: str) -> ModuleType:
    """The module in file `path` as `name`; an `__init__.py` is its folder's package. Raises ImportError without one."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no host module {path}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_host(path: Path) -> ModuleType:
    """The host module in file `path`, which may import this folder's modules relatively."""
    return load(path, f"{_PACKAGE}.simulator")


# this folder is not searched for the simulator's own imports, whose names may be the same
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
load(_HERE / "__init__.py", _PACKAGE)
protocol: Any = importlib.import_module(f"{_PACKAGE}.protocol")


class Server:
    """`num_envs` environments of one module, stepped one after another."""

    def __init__(self, module: str, options: dict[str, Any], num_envs: int) -> None:
        host = load_host(Path(module))
        self.envs = [host.build(dict(options)) for _ in range(num_envs)]
        self.spec = self.envs[0].spec()
        self._pictures: dict[str, np.ndarray] = {}

    def attach(self, path: str) -> None:
        """Map the parent's shared memory: a picture a camera and environment, one camera after another."""
        memory = np.memmap(path, np.uint8, "r+")
        offset = 0
        for camera, (height, width) in self.spec["cameras"].items():
            shape = (len(self.envs), height, width, 3)
            size = int(np.prod(shape))
            self._pictures[camera] = memory[offset : offset + size].reshape(shape)
            offset += size

    def reset(self, ids: list[int], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        for i, seed in zip(ids, arrays["seeds"], strict=True):
            self.envs[i].reset(int(seed))
        return {}

    def run(self, ids: list[int], arrays: dict[str, np.ndarray], images: bool | None) -> dict[str, Any]:
        """Steps of each environment's chunk, "num_steps" [M] of "actions" [M, K, A] or fewer where its episode ends.
        `images`: observe those whose episode goes on, "seen" of the answer, with pictures or without; None: do not."""
        actions, limits = arrays["actions"], arrays["num_steps"]
        reward, flags = np.zeros(actions.shape[:2], np.float32), np.zeros((*actions.shape[:2], 3), bool)
        done = np.zeros(len(ids), np.int64)
        goes_on: list[int] = []
        for row, i in enumerate(ids):
            ended = False
            while done[row] < limits[row] and not ended:
                t = done[row]
                reward[row, t], *flags[row, t] = self.envs[i].step(actions[row, t])
                done[row], ended = t + 1, flags[row, t, 0] or flags[row, t, 1]
            if not ended:
                goes_on.append(i)
        ran = {"reward": reward, "flags": flags, "num_steps": done}
        if images is None or not goes_on:
            return {"seen": [], "arrays": ran}
        looked = self.observe(goes_on, images)
        return looked | {"seen": goes_on, "arrays": ran | looked["arrays"]}

    def observe(self, ids: list[int], images: bool) -> dict[str, Any]:
        states, sentences = [], []
        for i in ids:
            state, pictures, sentence = self.envs[i].observe(images)
            states.append(np.asarray(state, np.float32))
            sentences.append(sentence)
            for camera in self._pictures if images else ():
                self._pictures[camera][i] = pictures[camera]
        return {"sentences": sentences, "arrays": {"state": np.stack(states)}}

    def render(self, ids: list[int]) -> dict[str, Any]:
        return {"arrays": {"frames": np.stack([self.envs[i].render() for i in ids])}}

    def expert(self, ids: list[int]) -> dict[str, Any]:
        return {"arrays": {"actions": np.stack([np.asarray(self.envs[i].expert_action(), np.float64) for i in ids])}}

    def answer(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """What to send back for one message."""
        call, ids = message["call"], message.get("ids", [])
        if call == "attach":
            self.attach(message["path"])
            return {}
        if call == "reset":
            return self.reset(ids, arrays)
        if call == "run":
            return self.run(ids, arrays, message["images"])
        if call == "observe":
            return self.observe(ids, message["images"])
        if call in ("render", "expert"):
            return getattr(self, call)(ids)
        raise ValueError(f"unknown call {call!r}")

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _where(error: Exception) -> str:
    """The traceback of what comes from a simulator's depths; "" for what a host says itself, which is all there is to
    know."""
    *_, last = traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError | ValueError) and Path(last.filename).parent == Path(__file__).parent:
        return ""
    return traceback.format_exc()


def main(fd: int) -> None:
    """Answer until the socket closes."""
    channel = socket.socket(fileno=fd)
    server: Server | None = None
    while True:
        try:
            message, arrays = protocol.receive(channel)
        except ConnectionError:
            break
        try:
            if message["call"] == "build":
                server = Server(message["module"], message["options"], message["num_envs"])
                reply: dict[str, Any] = {"spec": server.spec}
            elif server is None:
                raise RuntimeError("nothing was built")
            else:
                reply = server.answer(message, arrays)
            sent = reply.pop("arrays", {})
        except Exception as error:
            # the simulator's own errors are the user's to read; only the process's death is not
            reply, sent = {"error": f"{type(error).__name__}: {error}", "traceback": _where(error)}, {}
        protocol.send(channel, reply, sent)
    if server is not None:
        server.close()


if __name__ == "__main__":
    stdin = os.open(os.devnull, os.O_RDONLY)
    os.dup2(stdin, 0)  # a simulator that asks a question gets no answer instead of hanging
    main(int(sys.argv[1]))
