"""Work that is handed to all Ray workers in windows, and comes back whole, whatever dies meanwhile.

With `max_staleness` s, the s windows after the one that the learner updates with are worked on meanwhile, by the policy
as it was when they were handed out; so a window's staleness is min(s, updates so far), and nothing depends on who is
faster. The object store never holds more than max(1, s) windows, in one part a worker, and the weights of those and of
the newest policy.

The driver keeps each worker's state after its last delivered window. A worker that dies is started again, on whichever
machine has room, from that state, and does what it had not delivered once more. Only where it dies there again (a state
that kills its simulator) it begins new episodes, and the lost ones are counted. A worker that hangs is killed after
`timeout_s`, and then it is one that died.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from vla_rl.rollout.ray_batches import from_plain, to_plain
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.rollout.ray_simulators import DIED, MAX_DEATHS


@dataclass
class _Window:
    """A window that was handed out. `parts`: one a worker, on its way or, after `_receive`, here."""

    request: Sequence[Any]
    weights: Any
    version: int
    parts: list[Any] = field(default_factory=list)
    joined: Any = None


class RayWindows:
    """`spawn(i, fresh)` starts the actor of worker i, which has `pid()` and `collect(weights, version, request, state
    or None) -> (part, state after it, simulators that were started again)`; with `fresh` above 0 it is to begin
    episodes that nobody has had, `num_envs[i]` of them. `weights()`: what an update changes. `join`: of all parts.
    """

    def __init__(
        self,
        spawn: Callable[[int, int], Any],
        weights: Callable[[], Any],
        join: Callable[[list[Any]], Any],
        num_envs: Sequence[int],
        config: RolloutConfig,
    ) -> None:
        self.config, self.policy_version = config, 0
        self.wait_s = 0.0
        self._spawn, self._weights, self._join, self._num_envs = spawn, weights, join, num_envs
        count = len(num_envs)
        self._states: list[dict[str, Any] | None] = [None] * count
        self._must_restore, self._deaths = [False] * count, [0] * count
        self._windows: deque[_Window] = deque()
        self._published: tuple[int, Any] | None = None
        self._num_restarts = self._num_lost_episodes = self._num_fresh_starts = 0
        self.workers = [spawn(i, 0) for i in range(count)]
        self._started = [worker.pid.remote() for worker in self.workers]

    def ask(self, method: str) -> list[Any]:
        """What `method` of each worker says, once they are ready. Raises ValueError where one cannot start."""
        try:
            return ray.get([getattr(worker, method).remote() for worker in self.workers])
        except RayActorError as error:
            raise ValueError(f"a rollout worker cannot start: {error}") from error

    def collect(self, request: Callable[[], Sequence[Any]]) -> Any:
        """The next window, joined; those after it are handed out. `request()`: of a new window, one part a worker."""
        if not self._windows:
            self._hand_out(request())
        start = time.monotonic()
        joined = self._receive(self._windows[0])
        self._windows.popleft()
        self.wait_s = time.monotonic() - start
        while len(self._windows) < self.config.max_staleness:
            self._hand_out(request())
        return joined

    def metrics(self) -> dict[str, float]:
        """Of the last window: seconds waited. Since the start: deaths of workers, and episodes that they took along."""
        return {
            "rollout/wait_s": self.wait_s,
            "rollout/worker_restarts": float(self._num_restarts),
            "rollout/worker_lost_episodes": float(self._num_lost_episodes),
        }

    @property
    def num_in_flight(self) -> int:
        """Windows that were handed out and not yet given to the learner."""
        return len(self._windows)

    def state_dict(self) -> dict[str, Any]:
        """What decides the future windows; those that were handed out are waited for, and are in it."""
        for window in self._windows:
            self._receive(window)
        return {
            "workers": list(self._states),
            "windows": [to_plain(window.joined) for window in self._windows],
            "policy_version": self.policy_version,
            "counts": [self._num_restarts, self._num_lost_episodes, self._num_fresh_starts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of another number of workers."""
        if "workers" not in state or len(state["workers"]) != len(self.workers):
            there = f"{len(state['workers'])} workers" if "workers" in state else "one process"
            raise ValueError(
                f"this state is of rollouts by {there}, here are {len(self.workers)} workers; "
                "set rollout.workers as it was"
            )
        self._states = list(state["workers"])
        self._must_restore = [s is not None for s in self._states]
        self._windows = deque(_Window([], None, 0, joined=from_plain(w)) for w in state["windows"])
        self.policy_version = state["policy_version"]
        self._num_restarts, self._num_lost_episodes, self._num_fresh_starts = state["counts"]
        self._published = None

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            ray.kill(worker)
        self.workers, self._windows = [], deque()

    # -------------------------------------------------------------------------------------------------------- windows
    def _hand_out(self, request: Sequence[Any]) -> None:
        version, weights = self._publish()
        window = _Window(request, weights, version)
        self._windows.append(window)
        window.parts = [self._submit(i, window) for i in range(len(self.workers))]

    def _publish(self) -> tuple[int, Any]:
        """The weights as they are now, put into the object store once for all workers."""
        if self._published is None or self._published[0] != self.policy_version:
            self._published = (self.policy_version, ray.put(self._weights()))
        return self._published

    def _submit(self, i: int, window: _Window) -> Any:
        restore = self._states[i] if self._must_restore[i] else None
        self._must_restore[i] = False
        return self.workers[i].collect.remote(window.weights, window.version, window.request[i], restore)

    def _receive(self, window: _Window) -> Any:
        """Wait for all parts, whatever dies meanwhile."""
        if window.joined is None:
            parts = [self._receive_part(i, window) for i in range(len(self.workers))]
            window.joined, window.parts = self._join(parts), []
        return window.joined

    def _receive_part(self, i: int, window: _Window) -> Any:
        limit = self.config.timeout_s
        while True:
            try:
                ray.get(self._started[i])  # room for it may take long to come: not limited
                part, self._states[i], restarts = ray.get(window.parts[i], timeout=limit)
            except GetTimeoutError:
                self._start_again(i, TimeoutError(f"no rollout in {limit:g} s (rollout.timeout_s)"))
            except DIED as error:
                self._start_again(i, error)
            else:
                self._deaths[i] = 0
                self._num_restarts += restarts
                return part

    def _start_again(self, i: int, error: Exception) -> None:
        """A new process for worker `i`, with everything that it has not delivered handed out again."""
        self._deaths[i] += 1
        self._num_restarts += 1
        if self._deaths[i] > MAX_DEATHS:
            raise RuntimeError(f"rollout worker {i} died {self._deaths[i]} times in one window: {error}") from error
        ray.kill(self.workers[i])  # where only its machine's memory was lost
        self._must_restore[i], fresh = self._states[i] is not None, 0
        if self._deaths[i] > 1:
            self._num_lost_episodes += self._num_envs[i]
            self._num_fresh_starts += 1
            self._must_restore[i], fresh = False, self._num_fresh_starts
        self.workers[i] = self._spawn(i, fresh)
        self._started[i] = self.workers[i].pid.remote()
        for window in self._windows:
            if window.joined is None:
                window.parts[i] = self._submit(i, window)


__all__ = ["RayWindows"]
