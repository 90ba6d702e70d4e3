"""The process that owns the hardware. Kill anything else, and the arm holds.

`Guard` is the arm with its safety filter and its mode: nothing reaches the arm but through `Guard.apply`. `Supervisor`
runs it in a small process of its own and answers one control loop over a socket of this machine; when that loop dies,
is stopped or stays silent for longer than `timeout_s`, it stops the arm and latches. `SupervisorClient` is the guard as
the control loop sees it.

This is software: what kills the supervisor itself is answered by the arm's own timeout. Set it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from vla_rl.real_robot.interfaces import Arm, ArmSpec, ArmState, Command, HardwareError
from vla_rl.real_robot.modes import Event, Mode, ModeError, ModeMachine
from vla_rl.real_robot.safety import SafetyConfig, SafetyFilter
from vla_rl.serving.messages import pack, unpack

_MAX_BYTES = 1 << 16
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True)
class SupervisorConfig:
    """`timeout_s`: a control loop that is silent for longer is taken for dead. `linger_s`: how long the process stays,
    with the arm held, once nobody is connected; None: until it is told to end."""

    safety: SafetyConfig = field(default_factory=SafetyConfig)
    timeout_s: float = 0.1
    linger_s: float | None = None

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"SupervisorConfig: timeout_s must be positive, got {self.timeout_s}")


@dataclass(frozen=True)
class Applied:
    """What became of a command. `command`: what was sent, None where nothing was."""

    command: Command | None
    clamps: tuple[str, ...]
    mode: Mode
    stop_reason: str


class GuardedArm(Protocol):
    """An arm behind the filter: `Guard` in this process, `SupervisorClient` in another."""

    spec: ArmSpec

    def read(self) -> tuple[ArmState, Mode, str]:
        """The newest state, the mode, and why the arm was stopped ("" where it was not)."""
        ...

    def fire(self, event: Event, reason: str = "") -> Mode:
        """Raises ModeError where the mode does not allow it, ValueError where a start is refused."""
        ...

    def apply(self, command: Command) -> Applied: ...

    def stop(self, reason: str) -> None: ...


class Guard:
    """The arm, its filter and its mode in one place. Every method may be called from any thread."""

    def __init__(self, arm: Arm, config: SafetyConfig | None = None) -> None:
        self.arm, self.spec = arm, arm.spec
        self.modes = ModeMachine()
        self._filter = SafetyFilter(arm.spec, config, self.modes)
        self._lock = threading.RLock()

    def read(self) -> tuple[ArmState, Mode, str]:
        with self._lock:
            return self.arm.read(), self.modes.mode, self.modes.stop_reason

    def fire(self, event: Event, reason: str = "") -> Mode:
        if event is Event.STOP:
            self.stop(reason)
        with self._lock:
            now = time.monotonic()
            if event is Event.START:
                self._filter.start(self.arm.read(), now)
            elif event is not Event.STOP:
                self.modes.fire(event, now, reason)
            return self.modes.mode

    def apply(self, command: Command) -> Applied:
        """Filter and send. A stop by the filter stops the arm at once, and so does hardware that raises."""
        with self._lock:
            stopped = self.modes.stop_reason
            if not stopped:
                try:
                    filtered = self._filter.filter(command, self.arm.read(), time.monotonic())
                    if filtered.command is not None and not filtered.stop_reason and "early" not in filtered.clamps:
                        sent = self.arm.send(filtered.command)
                        return Applied(sent, filtered.clamps, self.modes.mode, "")
                    if not filtered.stop_reason:
                        return Applied(filtered.command, filtered.clamps, self.modes.mode, "")
                    stopped = filtered.stop_reason
                except (HardwareError, OSError) as error:
                    stopped = str(error)
            self.stop(stopped)
            return Applied(None, (), self.modes.mode, self.modes.stop_reason)

    def check(self) -> None:
        """Between commands: an armed arm is stopped where its measurement has grown old or it reports a fault."""
        if not (self.modes.mode.sends and self._lock.acquire(blocking=False)):
            return  # a command on its way to the arm is checked itself
        try:
            problem = self._filter.state_problem(self.arm.read(), time.monotonic())
        except (HardwareError, OSError) as error:
            problem = str(error)
        finally:
            self._lock.release()
        if problem:
            self.stop(problem)

    def stop(self, reason: str) -> None:
        """The software e-stop: the arm first, then the latch. Does not wait for a command on its way to the arm."""
        self.arm.stop(reason)
        with self._lock:
            self.modes.fire(Event.STOP, time.monotonic(), reason)
            self.arm.stop(reason)  # a command may have come in between


# ---------------------------------------------------------------------------------------------------------- the process
class Supervisor:
    """Serves `guard` to one control loop on `listener`, an AF_UNIX socket that listens."""

    def __init__(self, guard: Guard, listener: socket.socket, config: SupervisorConfig) -> None:
        self._guard, self._listener, self.config = guard, listener, config
        self._heard = time.monotonic()
        self._left = time.monotonic()
        self._connected = self._ending = False

    def run(self) -> None:
        """Returns when the control loop says so, or `linger_s` after the last one has gone."""
        threading.Thread(target=self._watch, daemon=True).start()
        self._listener.settimeout(0.2)
        while not self._ending:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                linger = self.config.linger_s
                if linger is not None and time.monotonic() - self._left > linger:
                    return
                continue
            with connection:
                self._serve(connection)
            self._left = time.monotonic()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        self._heard, self._connected = time.monotonic(), True
        why = "the control loop's connection has closed"
        try:
            while not self._ending and (message := _receive(connection)) is not None:
                self._heard = time.monotonic()
                _send(connection, self._answer(message))
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"the control loop's connection is broken: {type(error).__name__} {error}"
        self._connected = False
        self._stop_if_armed(why)

    def _answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        call = message["call"]
        if call == "spec":
            return _spec_fields(self._guard.spec)
        if call == "end":
            self._ending = True
            return {}
        try:
            if call == "apply":
                command = Command(message["position"], message["gripper"], message["sequence"])
                applied = self._guard.apply(command)
                sent = applied.command
                return {
                    "position": None if sent is None else sent.position,
                    "gripper": None if sent is None else sent.gripper,
                    "clamps": list(applied.clamps),
                    "mode": applied.mode.value,
                    "stop": applied.stop_reason,
                }
            if call == "fire":
                return {"mode": self._guard.fire(Event(message["event"]), str(message["reason"])).value}
            state, mode, stop = self._guard.read()
            fields = {name: getattr(state, name) for name in ("position", "velocity", "gripper", "stamp", "fault")}
            return {**fields, "mode": mode.value, "stop": stop}
        except (ModeError, ValueError, HardwareError) as error:
            return {"error": type(error).__name__, "message": str(error)}

    def _watch(self) -> None:
        """A thread of its own: whatever the other waits for, silence stops the arm, and so does an old measurement."""
        while True:
            time.sleep(self.config.timeout_s / 10)
            silent = time.monotonic() - self._heard
            if self._connected and silent > self.config.timeout_s:
                self._stop_if_armed(f"the control loop was silent for {silent:.3f} s")
            self._guard.check()

    def _stop_if_armed(self, reason: str) -> None:
        if self._guard.modes.mode.sends:
            self._guard.stop(reason)


def _main(make_arm: Callable[[], Arm], path: str, config: SupervisorConfig, ready: Any) -> None:
    """Of the process: takes signals before it has hardware, and stops the arm before it ends by one."""
    guard: Guard | None = None

    def end(number: int, _frame: object) -> NoReturn:
        if guard is not None:
            guard.arm.stop(f"the supervisor got {signal.Signals(number).name}")
        raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    arm: Arm | None = None
    try:
        arm = make_arm()
        arm.connect()
        guard = Guard(arm, config.safety)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(1)
            listener.listen(1)  # before it is said to be there
            supervisor = Supervisor(guard, listener, config)
            ready.send_bytes(b"")
            supervisor.run()
    except Exception as error:
        with suppress(OSError):
            ready.send_bytes(f"{type(error).__name__}: {error}".encode())
        raise
    finally:
        if arm is not None:
            arm.stop("the supervisor ends")
            arm.close()


class SupervisorClient:
    """The guarded arm in a process of its own, started by `start`, or one that runs, at `path`.

    A context manager: leaving it stops the arm and ends the process. One thread uses it; `stop` is for any.
    """

    def __init__(self, path: str, process: BaseProcess | None = None, *, timeout_s: float = 1.0) -> None:
        self.path, self.process = path, process
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(path)
            self.spec = _spec_of(self._call({"call": "spec"}))
        except OSError as error:
            self._socket.close()
            raise HardwareError(f"no supervisor answers at {path}: {error}") from error

    @staticmethod
    def start(
        make_arm: Callable[[], Arm], config: SupervisorConfig | None = None, *, connect_timeout_s: float = 30.0
    ) -> SupervisorClient:
        """`make_arm`: picklable, called in the new process. Raises HardwareError where the arm does not connect."""
        path = str(Path(tempfile.mkdtemp(prefix="vla_rl_arm_")) / "socket")
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_main, args=(make_arm, path, config or SupervisorConfig(), theirs), name="supervisor"
        )
        process.start()
        theirs.close()
        try:
            problem = ours.recv_bytes().decode() if ours.poll(connect_timeout_s) else "no answer in time"
        except EOFError:
            process.join(1.0)
            problem = f"its process ended with {process.exitcode}"
        if problem:
            process.terminate()
            process.join()
            raise HardwareError(f"the arm's supervisor does not start: {problem}")
        return SupervisorClient(path, process)

    def read(self) -> tuple[ArmState, Mode, str]:
        r = self._call({"call": "read"})
        state = ArmState(r["position"], r["velocity"], r["gripper"], r["stamp"], r["fault"])
        return state, Mode(r["mode"]), r["stop"]

    def fire(self, event: Event, reason: str = "") -> Mode:
        return Mode(self._call({"call": "fire", "event": event.value, "reason": reason})["mode"])

    def apply(self, command: Command) -> Applied:
        r = self._call(
            {
                "call": "apply",
                "position": np.asarray(command.position),
                "gripper": command.gripper,
                "sequence": command.sequence,
            }
        )
        sent = None if r["position"] is None else Command(r["position"], r["gripper"], command.sequence)
        return Applied(sent, tuple(r["clamps"]), Mode(r["mode"]), r["stop"])

    def stop(self, reason: str) -> None:
        """Raises HardwareError where the supervisor does not answer: it stops the arm then on its own."""
        self._call({"call": "fire", "event": Event.STOP.value, "reason": reason})

    def close(self) -> None:
        """The arm is stopped, the process ends. Any number of times."""
        with suppress(HardwareError):
            self._call({"call": "end"})
        self._socket.close()
        if self.process is not None:
            self.process.join(5.0)
            if self.process.is_alive():
                self.process.terminate()  # it stops the arm first
                self.process.join()
            self.process = None

    def __enter__(self) -> SupervisorClient:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            with self._lock:
                _send(self._socket, message)
                reply = _receive(self._socket)
        except OSError as error:
            self._socket.close()  # a reply that comes late must not be taken for the next one's
            raise HardwareError(f"the arm's supervisor does not answer: {error}") from error
        if reply is None:
            raise HardwareError("the arm's supervisor has ended; the arm was stopped")
        if "error" in reply:
            kind = {"ModeError": ModeError, "ValueError": ValueError}.get(reply["error"], HardwareError)
            raise kind(reply["message"])
        return reply


# ------------------------------------------------------------------------------------------------------------ messages
def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    data = pack(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """None where the other side has closed. Raises ValueError for what is no message."""
    header = _exactly(connection, _LENGTH.size)
    if header is None:
        return None
    (size,) = _LENGTH.unpack(header)
    if size > _MAX_BYTES:
        raise ValueError(f"a message of {size} bytes, at most {_MAX_BYTES} are taken")
    data = _exactly(connection, size)
    return None if data is None else unpack(data)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return None
        data += part
    return data


def _spec_fields(spec: ArmSpec) -> dict[str, Any]:
    fields = {name: getattr(spec, name) for name in ArmSpec.__dataclass_fields__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _spec_of(fields: Mapping[str, Any]) -> ArmSpec:
    as_tuple = {"joint_names", "gripper_range"}
    values: dict[str, Any] = {name: tuple(value) if name in as_tuple else value for name, value in fields.items()}
    return ArmSpec(**values)


__all__ = ["Applied", "Guard", "GuardedArm", "Supervisor", "SupervisorClient", "SupervisorConfig"]
