"""The lifecycle node: ROS 2 around `bridge.Bridge`, which does the work and knows no ROS.

configure    checks the parameters, waits for every stream, connects to the policy; fails loudly
activate     accepts goals of `~/run_policy`; nothing moves yet
deactivate   brakes and disarms, and sends the controller its stop
on_error     stops, latched

rclpy's own signal handlers end its context on Ctrl-C, and the stop that should follow could not be published any more.
So it gets none (`SignalHandlerOptions.NO`), and `main` has its own: stop first, then the context.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import MultiThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions

from vla_rl.real_robot.control_loop import Tick
from vla_rl.real_robot.drivers.ros2_graph import RclpyGraph, ros_type
from vla_rl.real_robot.modes import Mode

from . import topics
from .bridge import Bridge
from .settings import DEFAULTS, make_settings

_FEEDBACK_HZ = 10.0


class PolicyNode(LifecycleNode):
    """See the module's text. `fail`: what configuring raised last."""

    def __init__(self) -> None:
        super().__init__("policy")
        self.declare_parameters("", list(DEFAULTS.items()))
        self._bridge: Bridge | None = None
        self._graph: RclpyGraph | None = None
        self._active = False
        self._seen = 0
        self._counted = (time.monotonic(), 0)
        self._shown_mode: Mode | None = None
        self.fail = ""
        # Services must answer while an action runs and while configuring waits for streams.
        self._group = ReentrantCallbackGroup()
        self._publish: dict[str, Callable[[Any], None]] = {}
        handlers = {
            "~/estop": self._estop,
            "~/reset_estop": self._reset_estop,
            "~/takeover": self._take_over,
            "~/start_episode": self._start_episode,
            "~/end_episode": self._end_episode,
            "~/set_task": self._set_task,
        }
        for name, kind in topics.SERVICES.items():
            self.create_service(ros_type(kind), name, handlers[name], callback_group=self._group)
        action, kind = topics.ACTION
        self._action_type = ros_type(kind)
        self._actions = ActionServer(
            self,
            self._action_type,
            action,
            execute_callback=self._run_policy,
            goal_callback=self._accepts,
            cancel_callback=lambda _: CancelResponse.ACCEPT,
            callback_group=self._group,
        )
        self.create_timer(1.0, self._diagnose, callback_group=self._group)

    # ------------------------------------------------------------------------------------------------------ lifecycle
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            settings = make_settings({name: self.get_parameter(name).value for name in DEFAULTS})
            self._graph = graph = RclpyGraph(self)
            self._publish = {name: graph.publisher(name, kind, qos) for name, (kind, qos) in topics.PUBLISHED.items()}
            self._bridge = Bridge(settings, graph)
        except Exception as error:  # a node that cannot work says why and stays unconfigured
            self.fail = f"{type(error).__name__}: {error}"
            self.get_logger().error(f"cannot be configured: {self.fail}")
            self._bridge = None
            return TransitionCallbackReturn.FAILURE
        self.fail = ""
        self._bridge.watch(self._on_tick)
        self._show_mode(self._bridge.mode)
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        bridge = self._configured()
        problem = bridge.arm.read().fault
        if problem:
            self.get_logger().error(f"not activated: the arm reports {problem}")
            return TransitionCallbackReturn.FAILURE
        self._active = True
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._active = False
        bridge = self._configured()
        bridge.finish()
        end = time.monotonic() + 1.0
        while bridge.mode.sends and time.monotonic() < end:
            time.sleep(0.01)
        bridge.arm.stop("deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.end("cleaned up")
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.end("shut down")
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._active = False
        if self._bridge is not None:
            self._bridge.stop("the node has an error")
        return super().on_error(state)

    def end(self, reason: str) -> None:
        """Stop the arm and let everything go. Any number of times; while the context is valid."""
        self._active = False
        bridge, self._bridge = self._bridge, None
        if bridge is not None:
            bridge.close(reason)

    # --------------------------------------------------------------------------------------------------------- action
    def _accepts(self, goal: Any) -> Any:
        if not self._active or self._bridge is None or self._bridge.mode is not Mode.IDLE:
            mode = self._bridge.mode.value if self._bridge is not None else "unconfigured"
            self.get_logger().warning(f"goal refused: active {self._active}, mode {mode}")
            return GoalResponse.REJECT
        return GoalResponse.ACCEPT if goal.max_duration_s >= 0 else GoalResponse.REJECT

    def _run_policy(self, handle: Any) -> Any:
        bridge, goal, result = self._configured(), handle.request, self._action_type.Result()
        ended = threading.Event()
        threading.Thread(target=self._follow, args=(handle, bridge, ended), daemon=True).start()
        try:
            report = bridge.run(goal.max_duration_s or None, prompt=goal.prompt, shadow=goal.shadow)
            result.success, result.reason = not report.stop_reason, report.stop_reason
            result.ticks = report.ticks
            result.latency_p99_ms = float(report.summary()["latency_p99_ms"])
        except Exception as error:
            result.success, result.reason = False, f"{type(error).__name__}: {error}"
        finally:
            ended.set()
        self._show_mode(bridge.mode)
        if handle.is_cancel_requested:
            handle.canceled()
        elif result.success:
            handle.succeed()
        else:
            self.get_logger().error(f"the policy ended: {result.reason}")
            handle.abort()
        return result

    def _follow(self, handle: Any, bridge: Bridge, ended: threading.Event) -> None:
        """Feedback, and a cancel request, which the loop does not look for."""
        while not ended.wait(1.0 / _FEEDBACK_HZ):
            if handle.is_cancel_requested:
                bridge.finish()
            if (tick := bridge.tick) is not None:
                feedback = self._action_type.Feedback()
                feedback.tick, feedback.mode = self._seen, tick.mode.value
                latencies = bridge.report.latency_s if bridge.report is not None else ()
                feedback.latency_ms = 1e3 * latencies[-1] if latencies else 0.0
                handle.publish_feedback(feedback)

    # ------------------------------------------------------------------------------------------------------- services
    def _estop(self, _: Any, response: Any) -> Any:
        return self._answer(response, lambda bridge: bridge.stop("e-stop service"))

    def _reset_estop(self, _: Any, response: Any) -> Any:
        return self._answer(response, lambda bridge: bridge.reset_stop())

    def _take_over(self, request: Any, response: Any) -> Any:
        def hold(bridge: Bridge) -> None:
            bridge.teleop.held = bool(request.data)

        return self._answer(response, hold)

    def _start_episode(self, _: Any, response: Any) -> Any:
        return self._answer(response, self._begin_record)

    def _end_episode(self, request: Any, response: Any) -> Any:
        return self._answer(response, lambda bridge: self._end_record(bridge, bool(request.data)))

    def _set_task(self, request: Any, response: Any) -> Any:
        def set_task(bridge: Bridge) -> None:
            if not request.task:
                raise ValueError("the task is empty; a policy needs a sentence")
            bridge.prompt = request.task

        return self._answer(response, set_task)

    def _begin_record(self, bridge: Bridge) -> None:
        if bridge.recorder is None:
            raise ValueError("nothing is recorded: set the parameter record.path to a folder")
        bridge.recorder.start(bridge.prompt)
        self._publish["~/episode"](topics.text("recording"))

    def _end_record(self, bridge: Bridge, success: bool) -> None:
        if bridge.recorder is None:
            raise ValueError("nothing is recorded: set the parameter record.path to a folder")
        index = bridge.recorder.end(success=success)
        self._publish["~/episode"](topics.text(f"episode {index} {'success' if success else 'failure'}"))

    def _answer(self, response: Any, do: Callable[[Bridge], None]) -> Any:
        """What every service answers: whether it was done, and why not."""
        try:
            do(self._configured())
            response.success, response.message = True, ""
            self._show_mode(self._configured().mode)
        except Exception as error:
            response.success, response.message = False, str(error)
        return response

    # ------------------------------------------------------------------------------------------------------ publishing
    def _on_tick(self, tick: Tick) -> None:
        """In the loop's thread."""
        self._seen += 1
        for name, message in topics.action_messages(tick).items():
            self._publish[name](message)
        self._show_mode(tick.mode)

    def _show_mode(self, mode: Mode) -> None:
        if mode is not self._shown_mode:
            self._shown_mode = mode
            self._publish["~/mode"](topics.text(mode.value))

    def _diagnose(self) -> None:
        bridge = self._bridge
        if bridge is None or not self._publish:
            return
        now, (then, seen) = time.monotonic(), self._counted
        hz = (self._seen - seen) / max(now - then, 1e-6)
        self._counted = (now, self._seen)
        stamp = self.get_clock().now().nanoseconds
        name = self.get_fully_qualified_name()
        self._publish["/diagnostics"](topics.diagnostics(name, stamp, bridge.mode, bridge.tick, bridge.report, hz))

    def _configured(self) -> Bridge:
        if self._bridge is None:
            raise RuntimeError("the node is not configured: ros2 lifecycle set /policy configure")
        return self._bridge


def main() -> None:
    """`ros2 run vla_rl_ros2 policy_node`."""
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = PolicyNode()
    executor = MultiThreadedExecutor(num_threads=4)
    executor.add_node(node)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    spinning = threading.Thread(target=executor.spin, daemon=True)
    spinning.start()
    try:
        ended.wait()
    finally:
        node.end("the node was told to end")  # while messages can still be sent
        executor.shutdown(timeout_sec=2.0)
        node.destroy_node()
        rclpy.shutdown()


if __name__ == "__main__":
    main()
