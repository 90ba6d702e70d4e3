"""The whole chain of a deployment, every part a process of its own, to be harmed: the twin (`vla-rl twin`) behind DDS,
a policy server behind a websocket, and `Deployment` with its supervisor. What the twin received is read in its record.

Server and bridge are forked from a process that has imported everything: a start takes a second and not ten.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import numpy as np

from tests.unit.tcp_proxy import TcpProxy
from vla_rl.real_robot.deploy_config import CAMERA_HZ, DeployConfig, TabletopScene
from vla_rl.real_robot.drivers.twin_episodes import TwinEpisodes
from vla_rl.real_robot.twin_faults import Faults

TRAJECTORY = "/arm/joint_trajectory"
PERIOD_S = 0.05
_HORIZON, _ACTION_DIM, _STATE_DIM = 16, 4, 12
_NAN = "nan"  # a file: while it is there the policy's actions are not finite, and <name>.at says since when
_START_S = 60.0
_SCENE = TabletopScene(
    task="reach",
    split="test",
    cameras=("agent",),
    image_size=64,
    control="ee_delta",
    randomization="off",
    max_episode_steps=1_000_000,
    first_seed=0,
    execution_horizon=8,
    label="circling",
)


class Sent(NamedTuple):
    """A trajectory that the twin received. `target` [J] rad, None for an empty one, which stops the arm; `duration_s`:
    that the arm has for the way to it."""

    stamp: float
    target: np.ndarray | None
    duration_s: float


# ----------------------------------------------------------------------------------------------------------- processes
class Circling:
    """A policy that keeps the fingertip on a circle above the table, at 0.12 m/s. It looks at the state alone."""

    action_horizon, action_dim = _HORIZON, _ACTION_DIM
    _center, _radius, _height, _speed, _step = np.array([0.49, 0.0]), 0.08, 0.2, 0.3, 0.02

    def __init__(self, folder: Path) -> None:
        self._nan = folder / _NAN

    def act(self, obs: Any, noise: Any) -> Any:
        import torch

        from vla_rl.core import ActionChunk

        del noise
        chunks = np.stack([self._chunk(state[7:10]) for state in obs.state.numpy()])
        if self._nan.exists():
            self._nan.with_suffix(".at").write_text(f"{time.monotonic()}\n")
            chunks *= np.nan
        return ActionChunk(torch.from_numpy(chunks.astype(np.float32)))

    def _chunk(self, tip: np.ndarray) -> np.ndarray:
        chunk = np.zeros((_HORIZON, _ACTION_DIM))
        for action in chunk:
            away = tip[:2] - self._center
            radius = float(np.linalg.norm(away)) + 1e-9
            out = away / radius
            wanted = np.array([-out[1], out[0]]) + 4 * (self._radius - radius) / self._radius * out
            action[:2] = self._speed * wanted / np.linalg.norm(wanted)
            action[2] = np.clip((self._height - tip[2]) / self._step, -self._speed, self._speed)
            tip = tip + self._step * action[:3]
        return chunk


def _serve(folder: str, port: int) -> None:
    """The policy server's process."""
    _log_to(Path(folder) / "server.log")
    from vla_rl.serving.config import ServerConfig
    from vla_rl.serving.inference import ServedPolicy
    from vla_rl.serving.requests import RequestShapes
    from vla_rl.serving.rtc import RTCConfig
    from vla_rl.serving.server import PolicyServer

    shapes = RequestShapes(("agent",), _STATE_DIM, (_HORIZON, _ACTION_DIM), _ACTION_DIM)
    policy = ServedPolicy(Circling(Path(folder)), "circling", 1, "", shapes, RTCConfig(), {})
    PolicyServer(policy, ServerConfig(port=port)).run()


def _deploy(folder: str, domain: int, config: DeployConfig, supervisor: Any) -> None:
    """The bridge's process, and by it the supervisor's: a group of their own, as a terminal's job is."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["ROS_DOMAIN_ID"] = str(domain)
    sys.modules["__main__"] = ModuleType("__main__")  # else the supervisor would import the experiment
    _log_to(Path(folder) / "bridge.log")
    from vla_rl.real_robot.deploy import Deployment

    with Deployment(_SCENE, None, Path(folder) / f"deployed_{os.getpid()}", config) as deployment:
        supervisor.send(next(p.pid for p in multiprocessing.active_children() if p.name == "supervisor"))
        deployment.run()


def _log_to(file: Path) -> None:
    with file.open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


# --------------------------------------------------------------------------------------------------------------- chain
class Chain:
    """A context manager: entering starts the twin; `ensure` starts what is missing. `server`, `bridge`, `supervisor`:
    process ids. `proxy`: before the server, for a bridge that was started `by_proxy`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """`config`: options of `DeployConfig`."""
        self.folder, self.server, self.bridge, self.supervisor = folder, 0, 0, 0
        self.sent: list[Sent] = []
        self.faults: list[float] = []  # when the twin was told of some
        self._config = dict(config)
        self._domain = 10 + os.getpid() % 80
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["vla_rl.real_robot.deploy", "vla_rl.serving.server"])
        self._processes: dict[str, Any] = {}
        self._by_proxy = False
        self._read_to = 0

    def __enter__(self) -> Chain:
        self._port = _free_port()
        self.proxy = TcpProxy(self._port)
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as starting:
            starting.callback(self.proxy.close)
            log = starting.enter_context((self.folder / "twin.log").open("wb"))
            options = ["--task", _SCENE.task, "--cameras", "agent", "--camera-hz", str(CAMERA_HZ)]
            options += ["--record", str(self.folder / "twin.jsonl")]
            command = [sys.executable, "-c", "import sys; from vla_rl.cli import main; sys.exit(main())", "twin"]
            environment = {**os.environ, "ROS_DOMAIN_ID": str(self._domain)}
            twin = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)
            starting.callback(lambda: (twin.kill(), twin.wait()))
            from vla_rl.real_robot.dds import NodeConfig

            self.episodes = TwinEpisodes(NodeConfig("harness", self._domain), timeout_s=_START_S)
            starting.callback(self.episodes.close)
            starting.callback(self.end_bridge)
            starting.callback(lambda: self._kill("server"))
            self._stack = starting.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def ensure(self, *, by_proxy: bool = False) -> None:
        """Nothing is wrong, everything runs, and the arm moves. Raises RuntimeError where it does
        not."""
        self.episodes.inject(Faults())
        self.proxy.speak()
        (self.folder / _NAN).unlink(missing_ok=True)
        (self.folder / _NAN).with_suffix(".at").unlink(missing_ok=True)
        for _ in range(5):  # a start is refused, or ends at once, where the machine was too busy
            if not self._alive("server"):
                self._start("server", _serve, (str(self.folder), self._port))
                self._wait(lambda: self._answers() or not self._alive("server"))
            os.kill(self.server, signal.SIGCONT)
            if self._by_proxy != by_proxy or not self._alive("bridge"):
                self.end_bridge()
                self._start_bridge(by_proxy)
            if self._moves_within(_START_S):
                return
        raise RuntimeError(f"the arm does not move: {self._last_words()}")

    def end_bridge(self) -> None:
        """Bridge and supervisor are gone."""
        if self.bridge:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.bridge, signal.SIGKILL)
            self._kill("bridge")
            self.bridge = self.supervisor = 0

    def spoil_actions(self) -> float:
        """The policy's actions are not finite; when it gave the first of them."""
        (self.folder / _NAN).touch()
        told = (self.folder / _NAN).with_suffix(".at")
        self._wait(lambda: told.exists() and told.read_text().endswith("\n"))
        return float(told.read_text())

    def inject(self, faults: Faults) -> float:
        """When the twin was told."""
        self.read()
        before = len(self.faults)
        self.episodes.inject(faults)
        self._wait(lambda: self.read() or len(self.faults) > before)
        return self.faults[-1]

    def read(self) -> None:
        """What the twin wrote down since the last time, whole lines alone."""
        with (self.folder / "twin.jsonl").open("rb") as file:
            file.seek(self._read_to)
            lines = file.read().split(b"\n")[:-1]
        self._read_to += sum(len(line) + 1 for line in lines)
        for event in (json.loads(line) for line in lines):
            if event["event"] == "received" and event["topic"] == TRAJECTORY:
                targets = event["positions"]
                target = np.array(targets[0]) if targets else None
                self.sent.append(Sent(event["stamp"], target, event["times"][0] if targets else 0.0))
            elif event["event"] == "received" and event["topic"] == "/twin/faults":
                self.faults.append(event["stamp"])

    # -------------------------------------------------------------------------------------------------------- starting
    def _start_bridge(self, by_proxy: bool) -> None:
        port = self.proxy.port if by_proxy else self._port
        config = DeployConfig(server=f"ws://127.0.0.1:{port}", episodes=1, num_videos=0, **self._config)
        ours, theirs = self._context.Pipe(duplex=False)
        self._start("bridge", _deploy, (str(self.folder), self._domain, config, theirs))
        theirs.close()
        self._by_proxy = by_proxy
        with contextlib.suppress(EOFError):
            self.supervisor = ours.recv() if ours.poll(_START_S) else 0
        ours.close()

    def _start(self, name: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        process = self._context.Process(target=function, args=arguments, name=name)
        process.start()
        self._processes[name] = process
        setattr(self, name, process.pid)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1.0):
            return True
        return False

    def _alive(self, name: str) -> bool:
        return name in self._processes and self._processes[name].is_alive()

    def _kill(self, name: str) -> None:
        if (process := self._processes.pop(name, None)) is not None:
            process.kill()
            process.join()

    def _moves_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._alive("bridge") and time.monotonic() < end:
            self.read()
            newest = self.sent[-11:]
            if len(newest) == 11 and all(moving for _, moving in steps(newest)):
                fresh = time.monotonic() - newest[-1].stamp < 2 * PERIOD_S
                if fresh and newest[-1].stamp - newest[0].stamp < 15 * PERIOD_S:
                    return True
            time.sleep(0.01)
        return False

    def _last_words(self) -> str:
        logs = (self.folder / f"{name}.log" for name in ("server", "bridge"))
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs if log.exists())

    @staticmethod
    def _wait(condition: Callable[[], object]) -> None:
        end = time.monotonic() + _START_S
        while not condition():
            if time.monotonic() > end:
                raise RuntimeError("a process of the chain does not answer")
            time.sleep(0.005)


def _free_port() -> int:
    """Not one of those that the system gives to clients: one that asks for a server which is not there yet could be
    given that very port, and be connected to itself."""
    for port in range(20_000 + os.getpid() % 8_000, 30_000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("no port is free")


def steps(sent: list[Sent]) -> Iterator[tuple[Sent, bool]]:
    """Each trajectory but the first, and whether it moves the target from the one before. After a stop the next one
    moves the arm, whatever it says."""
    for before, after in itertools.pairwise(sent):
        if after.target is None:
            yield after, False
        else:
            yield after, before.target is None or bool(np.abs(after.target - before.target).max() > 1e-9)


__all__ = ["PERIOD_S", "TRAJECTORY", "Chain", "Sent", "steps"]
