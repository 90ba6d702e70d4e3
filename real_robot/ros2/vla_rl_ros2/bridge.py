"""The bridge of one configured node: arm behind its guard, cameras, inference, loop, takeover, record. No rclpy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from vla_rl.real_robot.control_loop import ControlLoop, LoopParts, LoopReport, Tick
from vla_rl.real_robot.drivers.ros2_control import Ros2Camera, Ros2ControlArm
from vla_rl.real_robot.drivers.ros2_graph import Graph
from vla_rl.real_robot.episodes import EpisodeRecorder
from vla_rl.real_robot.inference import Infer, Inference, PolicyProcess, ServedActions
from vla_rl.real_robot.interfaces import TeleopSample
from vla_rl.real_robot.modes import Event, Mode
from vla_rl.real_robot.supervisor import Guard
from vla_rl.real_robot.takeover import Takeover
from vla_rl.real_robot.teleop import AxesTeleop, TeleopConfig

from .settings import Settings
from .topics import JOY, JoyDevice, held_by_service


class ServiceTeleop:
    """A `Teleop`: the joystick, or `~/takeover`, which holds the arm until it is given back."""

    def __init__(self, device: AxesTeleop) -> None:
        self._device, self.held = device, False

    def connect(self) -> None:
        self._device.connect()

    def read(self) -> TeleopSample:
        return held_by_service(self._device.read(), self.held)

    def close(self) -> None:
        self._device.close()


class Bridge:
    """Made by `configure`, run by `run`, stopped by anyone at any time. Raises HardwareError where a stream is missing,
    and what the policy's process raises where no policy answers."""

    def __init__(self, settings: Settings, graph: Graph, infer: Infer | None = None) -> None:
        """`infer`: for a policy in this process; None asks the policy server from a process of its own."""
        self.settings = settings
        self.report: LoopReport | None = None
        self.tick: Tick | None = None
        self.prompt = settings.loop.prompt
        self.recorder: EpisodeRecorder | None = None
        self._watchers: list[Callable[[Tick], None]] = []
        self._loop: ControlLoop | None = None
        self._process: PolicyProcess | None = None
        self._running = threading.Lock()
        self.cameras = [Ros2Camera(graph, name, topic) for name, topic in settings.cameras.items()]
        self.arm = Ros2ControlArm(graph, settings.spec, settings.arm)
        self.arm.connect()
        for camera in self.cameras:
            camera.connect()
        self.guard = Guard(self.arm, settings.safety)
        joy = JoyDevice(settings.buttons)
        if settings.joy:
            graph.subscribe(settings.joy, *JOY, lambda message, _: joy.take(message))
        config = TeleopConfig(
            settings.max_speed, settings.max_turn, settings.spec.gripper_range, "deadman" if settings.joy else ""
        )
        self.teleop = ServiceTeleop(AxesTeleop(joy, config))
        self.teleop.connect()
        self._takeover = Takeover(settings.spec, settings.takeover, settings.solve())
        if infer is None:
            self._process = PolicyProcess(partial(ServedActions, settings.server), timeout_s=settings.server.timeout_s)
            infer = self._process
        self._inference = Inference(infer)
        if settings.record_path:
            shapes = {camera.name: camera.latest().image.shape for camera in self.cameras}
            self.recorder = EpisodeRecorder.open(settings.record_path, settings.spec, shapes, settings.to_command())

    @property
    def mode(self) -> Mode:
        return self.guard.modes.mode

    def watch(self, watcher: Callable[[Tick], None]) -> None:
        """`watcher` sees every tick from now on, in the loop's thread; it must be quick."""
        self._watchers.append(watcher)

    def run(self, duration_s: float | None = None, *, prompt: str = "", shadow: bool = False) -> LoopReport:
        """Start, run and disarm. Raises StartRefusedError where the start is refused, RuntimeError where it runs."""
        if not self._running.acquire(blocking=False):
            raise RuntimeError("the policy is running already; cancel it first")
        try:
            self.prompt = prompt or self.prompt
            parts = LoopParts(
                self.guard, self.cameras, self._inference, self.settings.to_command(),
                teleop=self.teleop, takeover=self._takeover, on_tick=self._see,
            )  # fmt: skip
            self._loop = ControlLoop(parts, replace(self.settings.loop, prompt=self.prompt))
            self.report = self._loop.report
            self._loop.start(shadow=shadow)
            return self._loop.run(duration_s)
        finally:
            self._loop = None
            self._running.release()

    def finish(self) -> None:
        """Ends `run`: the arm is braked to rest and disarmed."""
        if (loop := self._loop) is not None:
            loop.finish()

    def stop(self, reason: str) -> None:
        """Latches."""
        self.guard.stop(reason)

    def reset_stop(self) -> None:
        """Forget a stop; nothing moves before the next run. Raises ModeError where nothing was stopped."""
        self.guard.fire(Event.RESET)

    def close(self, reason: str = "closed") -> None:
        """The arm is told to stop before anything else ends."""
        self.arm.stop(reason)
        self.finish()
        end = time.monotonic() + 1.0
        while self._running.locked() and time.monotonic() < end:
            time.sleep(0.01)
        self._inference.close()
        if self._process is not None:
            self._process.close()
        if self.recorder is not None:
            self.recorder.close()
        self.arm.stop(reason)
        self.arm.close()

    def _see(self, tick: Tick) -> None:
        self.tick = tick
        if self.recorder is not None:
            self.recorder.add(tick)
        for watcher in self._watchers:
            watcher(tick)


__all__ = ["Bridge", "ServiceTeleop"]
