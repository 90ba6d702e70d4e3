"""What ros2_control's joint trajectory controller does with the messages that it gets on its topic, for the twin.

As its documentation and source have it (ros2_controllers, `interpolate_from_desired_state: true`): a new trajectory
replaces the running one at once and begins at the setpoint; an empty one stops, and the arm holds where it was
measured; so does a command time-out, which counts from the trajectory's last point; points in the past are skipped;
between points with velocities the path is a cubic, else a line. Accelerations and efforts are not looked at. Numbers
that are not finite are refused, which the original does not do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_rl.real_robot.interfaces import Vector


class TrajectoryController:
    """Setpoints of J joints. Times are seconds of one clock, positions rad.

    `status`: "moving", "arrived" or why it holds: "reset", "stopped", "timed out", "fault".
    """

    def __init__(self, joint_names: Sequence[str], position: Vector, cmd_timeout_s: float = 0.0) -> None:
        """`cmd_timeout_s`: 0 turns the time-out off, as it is in ros2_control by default."""
        self.joint_names = tuple(joint_names)
        self.cmd_timeout_s = cmd_timeout_s
        self.hold(position, "reset")

    def hold(self, position: Vector, status: str) -> None:
        """Drop the trajectory and stand at `position [J]`."""
        self.status = status
        self.position, self.velocity = np.array(position), np.zeros(len(position))
        self._times: Vector | None = None

    def accept(self, message: Any, now: float, measured: Vector, start_in_s: float | None = None) -> str:
        """Take a trajectory_msgs/msg/JointTrajectory. `start_in_s`: when its header says that it begins, from now;
        None for a header without a time: at once. Returns "", or why it is refused: nothing has changed then."""
        if not len(message.points):
            self.hold(measured, "stopped")
            return ""
        if sorted(message.joint_names) != sorted(self.joint_names):
            return f"joints {list(message.joint_names)}, expected {list(self.joint_names)}"
        order = [list(message.joint_names).index(name) for name in self.joint_names]
        count = len(self.joint_names)
        fields = [("positions", p.positions) for p in message.points] + [
            ("velocities", p.velocities) for p in message.points if len(p.velocities)
        ]
        for name, values in fields:
            if len(values) != count or not np.isfinite(values).all():
                return f"a point's {name} are not {count} finite numbers"
        offsets = np.array([p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points])
        if (np.diff(offsets) <= 0).any():
            return "times of points do not rise"
        times = now + (start_in_s or 0.0) + offsets
        if start_in_s is not None and times[-1] < now:
            return f"it ended {now - times[-1]:.3f} s ago"
        positions = np.stack([p.positions for p in message.points])[:, order]
        cubic = all(len(p.velocities) for p in message.points)
        velocities = np.stack([p.velocities for p in message.points])[:, order] if cubic else None
        self._follow(now, times, positions, velocities)
        return ""

    def _follow(self, now: float, times: Vector, positions: NDArray[np.float64], velocities: Any) -> None:
        if times[0] > now:  # from the setpoint to the first point
            times = np.concatenate([[now], times])
            positions = np.concatenate([self.position[None], positions])
            if velocities is not None:
                velocities = np.concatenate([self.velocity[None], velocities])
        self._times, self._positions, self._velocities = times, positions, velocities
        self.status = "moving"

    def sample(self, now: float, measured: Vector) -> Vector:
        """The setpoint [J] at `now`, which does not go back."""
        times = self._times
        if times is None:
            return self.position
        i = int(np.searchsorted(times, now, side="right"))
        if i >= len(times):
            self.position, self.velocity = self._positions[-1], np.zeros(len(self.joint_names))
            self.status = "arrived"
            if 0 < self.cmd_timeout_s < now - times[-1]:
                self.hold(measured, "timed out")
            return self.position
        if i == 0:  # it begins later: stand until then
            return self.position
        duration, share = times[i] - times[i - 1], (now - times[i - 1]) / (times[i] - times[i - 1])
        start, end = self._positions[i - 1], self._positions[i]
        if self._velocities is None:
            self.position, self.velocity = start + share * (end - start), (end - start) / duration
        else:
            v0, v1 = duration * self._velocities[i - 1], duration * self._velocities[i]
            self.position, self.velocity = _hermite(start, end, v0, v1, share, duration)
        return self.position


def _hermite(q0: Vector, q1: Vector, v0: Vector, v1: Vector, x: float, duration: float) -> tuple[Vector, Vector]:
    """Cubic through `q0`, `q1` with slopes `v0`, `v1` over x in 0..1: the position, and the velocity per second."""
    c2, c3 = 3 * (q1 - q0) - 2 * v0 - v1, 2 * (q0 - q1) + v0 + v1
    return q0 + x * (v0 + x * (c2 + x * c3)), (v0 + x * (2 * c2 + 3 * x * c3)) / duration


__all__ = ["TrajectoryController"]
