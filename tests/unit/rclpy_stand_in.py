"""Just enough of rclpy's names for `policy_node` to be imported and called without ROS 2. It is no ROS: services and
the action are called directly, topics go over real DDS. What rclpy makes of them is for a machine that has it."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class LifecycleNode:
    def __init__(self, name: str) -> None:
        self.name, self.parameters, self.services, self.timers, self.log = name, {}, {}, [], []

    def declare_parameters(self, namespace: str, parameters: list[tuple[str, Any]]) -> None:
        assert namespace == ""
        self.parameters = dict(parameters)

    def get_parameter(self, name: str) -> Any:
        return SimpleNamespace(value=self.parameters[name])

    def create_service(self, kind: Any, name: str, handler: Any, *, callback_group: Any) -> None:
        self.services[name] = handler

    def create_timer(self, period: float, callback: Any, *, callback_group: Any) -> None:
        self.timers.append((period, callback))

    def get_logger(self) -> Any:
        return SimpleNamespace(error=self.log.append, warning=self.log.append)

    def get_clock(self) -> Any:
        return SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=time.time_ns()))

    def get_fully_qualified_name(self) -> str:
        return f"/{self.name}"

    def on_configure(self, state: Any) -> str:
        return "success"

    on_activate = on_deactivate = on_cleanup = on_shutdown = on_error = on_configure


class ActionServer:
    def __init__(
        self,
        node: Any,
        kind: Any,
        name: str,
        *,
        execute_callback: Any,
        goal_callback: Any,
        cancel_callback: Any,
        callback_group: Any,
    ) -> None:
        node.action = SimpleNamespace(
            name=name, execute=execute_callback, accepts=goal_callback, cancel=cancel_callback
        )


class GoalHandle:
    def __init__(self, **request: Any) -> None:
        self.request, self.is_cancel_requested = SimpleNamespace(**request), False
        self.feedback: list[Any] = []
        self.ended = ""

    def publish_feedback(self, feedback: Any) -> None:
        self.feedback.append(feedback)

    def succeed(self) -> None:
        self.ended = "succeeded"

    def abort(self) -> None:
        self.ended = "aborted"

    def canceled(self) -> None:
        self.ended = "canceled"


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    contents: dict[str, dict[str, Any]] = {
        "rclpy": {},
        "rclpy.action": {
            "ActionServer": ActionServer,
            "CancelResponse": SimpleNamespace(ACCEPT="accept"),
            "GoalResponse": SimpleNamespace(ACCEPT="accept", REJECT="reject"),
        },
        "rclpy.callback_groups": {"ReentrantCallbackGroup": object},
        "rclpy.executors": {"MultiThreadedExecutor": object},
        "rclpy.lifecycle": {
            "LifecycleNode": LifecycleNode,
            "LifecycleState": object,
            "TransitionCallbackReturn": SimpleNamespace(FAILURE="failure"),
        },
        "rclpy.signals": {"SignalHandlerOptions": SimpleNamespace(NO="no")},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
