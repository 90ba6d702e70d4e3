"""Motion limits: the next target sent is within position, velocity, acceleration and jerk limits, and one can always
still stop before the position limit.

Time is counted in control periods. With differences of the targets sent,

    v[k] = q[k] - q[k-1],   a[k] = v[k] - v[k-1],   j[k] = a[k] - a[k-1]

and with accelerations and below measured in units of the jerk limit, |j| <= 1. A stop plan from (v, a) is a sequence of
accelerations that ends at rest. `P_n` brakes as hard as it may and is released so that it ends after n periods:

    a_i = max(a - i, -A, min(0, i - n)),   i = 1, 2, ...

Sequences that keep the limits are convex, so the mixture of P_n and P_(n-1) whose sum is -v keeps them too and ends
exactly at rest; where it ends is a closed form. A target is accepted only if the state after it has a stop plan within
the position limits. Where none is, the stop plan found a period before is followed: so there is always one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_rl.real_robot.interfaces import Vector

_GRID = np.linspace(0.0, 1.0, 9)
_ROUNDS = 2  # to 1/64 of the span of accelerations: what is left, the next period corrects


@dataclass(frozen=True)
class StopPlan:
    """Plans of any shape, for a state in units of the jerk limit: accelerations after it, and where they lead.

    `end`, `low`, `high`: displacements from the state at rest, at the lowest and at the highest point of the way.
    """

    sign: Vector
    acceleration: Vector
    limit: Vector
    periods: Vector
    blend: Vector
    end: Vector
    low: Vector
    high: Vector

    def at(self, i: Vector) -> Vector:
        """Acceleration `i` periods after the state."""
        a, n = self.acceleration, self.periods
        later = np.maximum(np.maximum(a - i, -self.limit), np.minimum(0.0, i - n))
        earlier = np.maximum(np.maximum(a - i, -self.limit), np.minimum(0.0, i - n + 1.0))
        released = np.sign(a) * np.maximum(np.abs(a) - i, 0.0)
        earlier = np.where(n > np.ceil(np.abs(a)), earlier, released)
        return self.sign * (self.blend * later + (1.0 - self.blend) * earlier)


def _clip(x: Vector, low: Vector | float, high: Vector | float) -> Vector:
    """`np.clip`, which takes longer to find out what it was given than to do it."""
    return np.minimum(np.maximum(x, low), high)


def _braking(a: Vector, limit: Vector, n: Vector) -> tuple[Vector, Vector]:
    """Of P_n: how much speed it takes away, and the sum of (n + 1 - i) a_i, its displacement without that of v."""
    falling = _clip(np.floor(np.minimum(a + limit, (a + n) / 2)), 0.0, n)
    flat = np.maximum(np.ceil(n - limit) - 1 - falling, 0.0)
    rising = n - falling - flat
    triangle = falling * (falling + 1) / 2
    lost = triangle - falling * a + flat * limit + rising * (rising - 1) / 2
    moved = falling * (n + 1) * a - (n + 1 + a) * triangle + triangle * (2 * falling + 1) / 3
    moved -= limit * flat * (n + 1 - falling - (flat + 1) / 2)
    moved -= (rising - 1) * rising * (rising + 1) / 3
    return lost, moved


def _periods(v: Vector, a: Vector, limit: Vector, least: Vector) -> tuple[Vector, Vector, Vector]:
    """The smallest n >= `least` whose P_n takes away at least v: a guess by the continuous profile, made exact. With
    it what `_braking` says of P_n and of P_(n-1), [2, ...] each."""
    short = a + np.sqrt(np.maximum(2 * a * a + 4 * v, 0.0))
    full = a + 2 * limit
    long = full + (v - (limit * limit - a * a / 2)) / limit
    n = np.maximum(np.ceil(np.where(short <= full, short, long)), least)
    while True:
        lost, moved = _braking(a, limit, np.stack((n, n - 1)))
        few, many = lost[0] < v, (n > least) & (lost[1] >= v)
        if not (few | many).any():
            return n, lost, moved
        n = n + few - many  # never both: what P_n takes away rises with n


def stop_plan(v: Vector, a: Vector, limit: Vector) -> StopPlan:
    """The stop from speed `v` and acceleration `a` (|a| <= `limit`), of one shape, in units of the jerk limit."""
    size = np.abs(a)
    whole = np.floor(size)
    triangle = whole * (whole + 1) / 2
    gained = np.sign(a) * (whole * size - triangle)  # by letting the acceleration go to zero at once
    sign = np.where(v + gained >= 0, 1.0, -1.0)
    v, a, gained = sign * v, sign * a, sign * gained
    least = np.ceil(size)
    n, (lost, lost_before), (moved, moved_before) = _periods(v, a, limit, least)
    released = np.sign(a) * (whole * (n + 1) * size - (n + 1 + size) * triangle + triangle * (2 * whole + 1) / 3)
    at_least = n <= least
    moved_before = np.where(at_least, released, moved_before - lost_before)
    lost_before = np.where(at_least, -gained, lost_before)
    span = lost - lost_before
    blend = _clip(np.where(span > 0, (v - lost_before) / np.where(span > 0, span, 1.0), 1.0), 0.0, 1.0)
    end = n * v + blend * moved + (1 - blend) * moved_before
    dip = _dip(v, a, whole)
    top = np.maximum(end, 0.0)
    return StopPlan(sign, a, limit, n, blend, sign * end, np.where(sign > 0, dip, -top), np.where(sign > 0, top, -dip))


def _dip(v: Vector, a: Vector, whole: Vector) -> Vector:
    """How far the way goes back before it turns, <= 0: v < 0 < a. The two periods around the turn are tried."""
    dip = np.zeros_like(v)
    if not (v < 0).any():
        return dip
    turn = np.floor((2 * a - 1 - np.sqrt(np.maximum((2 * a - 1) ** 2 + 8 * v, 0.0))) / 2)
    for k in (_clip(turn, 0.0, whole), _clip(turn + 1, 0.0, whole)):
        dip = np.minimum(dip, k * v + a * k * (k + 1) / 2 - k * (k + 1) * (k + 2) / 6)
    return np.where(v < 0, dip, 0.0)


def _highest_acceleration(room: Vector) -> Vector:
    """The largest acceleration of the next period after which speed rises by no more than `room` until it is let go."""
    room = np.maximum(room, 0.0)
    n = np.floor((np.sqrt(1 + 8 * room) - 1) / 2)
    return (room + n * (n + 1) / 2) / (n + 1)


class MotionLimiter:
    """Follows targets [..., J] within the limits; a stream that keeps them passes unchanged.

    `low`, `high`: rad. `max_velocity`, `max_acceleration`, `max_jerk`: rad/s, rad/s^2, rad/s^3. `period`: s. Limits
    are [J] or broadcast to the targets. `position`: what was sent last. Call `reset` first.

    A target out of reach is approached so that the arm can stop at it, with the target's own speed taken into account:
    no overshoot, no lag behind a stream that keeps the limits. Limits hold to 1e-9 of each, and rounding.
    """

    def __init__(
        self, low: Vector, high: Vector, max_velocity: Vector, max_acceleration: Vector, max_jerk: Vector, period: float
    ) -> None:
        self.low, self.high = np.asarray(low, float), np.asarray(high, float)
        self._unit = np.asarray(max_jerk, float) * period**3
        self._max_v = np.asarray(max_velocity, float) * period / self._unit
        self._max_a = np.asarray(max_acceleration, float) * period**2 / self._unit
        if not (np.all(self._unit > 0) and np.all(self._max_v > 0) and np.all(self._max_a > 0)):
            raise ValueError("MotionLimiter: velocity, acceleration and jerk limits and the period must be positive")
        if not np.all(self.low < self.high):
            raise ValueError("MotionLimiter: each lower position limit must be below the upper one")
        self._tolerance = 1e-9 + 32 * np.finfo(float).eps * np.maximum(np.abs(self.low), np.abs(self.high)) / self._unit

    def reset(self, position: Vector) -> None:
        """Begin at rest. A position outside of the limits is kept, and may not get further out."""
        self.position = np.array(position, dtype=float)
        shape = self.position.shape
        self._low = np.minimum(self.low, self.position)
        self._high = np.maximum(self.high, self.position)
        self._v, self._a = np.zeros(shape), np.zeros(shape)
        self._plan = stop_plan(self._v, self._a, np.broadcast_to(self._max_a, shape))
        self._i = np.zeros(shape)  # periods of the plan that were followed
        self._base = self.position.copy()  # where the plan began
        self._target = self.position.copy()
        self._followed = np.ones(shape, dtype=bool)

    @property
    def resting(self) -> bool:
        """Whether braking is over: the next target of `brake` is the last one."""
        return bool(np.all(np.abs(self._v) < self._tolerance) and np.all(np.abs(self._a) < self._tolerance))

    @property
    def stop_position(self) -> Vector:
        """Where `brake` ends."""
        return self._base + self._plan.end * self._unit

    def brake(self) -> Vector:
        """The next target on the way to rest; the last one, once at rest."""
        a = self._plan.at(self._i + 1)
        self._target = self.stop_position
        self._advance(a, self._planned_position(a), self._plan, np.ones(a.shape, dtype=bool))
        return self.position.copy()

    def step(self, target: Vector) -> Vector:
        """The next target to send for the wanted `target`, finite and of the same shape as the position."""
        self._before = (self.position, self._v, self._a, self._plan, self._base, self._i)
        target = _clip(target, self._low, self._high)
        speed = (target - self._target) / self._unit
        self._target = target
        accelerations, positions, plan, planned = self._choose(target, _clip(speed, -self._max_v, self._max_v))
        self._advance(accelerations, positions, plan, planned)
        return self.position.copy()

    def undo_and_brake(self) -> Vector:
        """Take the last `step` back and follow the stop plan from before it instead."""
        self.position, self._v, self._a, self._plan, self._base, self._i = self._before
        return self.brake()

    # ----------------------------------------------------------------------------------------------------- choosing
    def _choose(self, target: Vector, speed: Vector) -> tuple[Vector, Vector, StopPlan, np.ndarray]:
        tolerance = self._tolerance
        limit = np.broadcast_to(self._max_a, target.shape)
        top = np.minimum(np.minimum(limit, self._a + 1), _highest_acceleration(self._max_v - self._v))
        bottom = np.maximum(np.maximum(-limit, self._a - 1), -_highest_acceleration(self._max_v + self._v))
        planned_a = self._plan.at(self._i + 1)
        a = (target - self.position) / self._unit - self._v
        near = np.abs(self._v + a - speed) <= np.minimum(limit, 1.0)  # else it would fly past the target
        exact = (a >= bottom - tolerance) & (a <= top + tolerance) & (self._followed | near)
        on_plan = np.abs(a - planned_a) <= tolerance
        a = np.where(exact, a, planned_a)
        plan = stop_plan(self._v + a, a, limit)
        exact &= self._inside(target, plan)
        self._followed = exact | on_plan
        positions = np.where(self._followed, target, self._planned_position(planned_a))
        if not self._followed.all():
            searched = self._search(target, speed, bottom, top, limit)
            found_plan = stop_plan(self._v + searched, searched, limit)
            found = self.position + (self._v + searched) * self._unit
            use = ~self._followed & self._inside(found, found_plan)
            a, positions = np.where(use, searched, a), np.where(use, found, positions)
            plan, exact = _where(use, found_plan, plan), exact | use
        planned = ~exact
        return np.where(planned, planned_a, a), positions, plan, planned

    def _planned_position(self, a: Vector) -> Vector:
        """After the plan's next acceleration; at its end without the rounding of the way, so that rest is rest."""
        over = self._i + 1 >= self._plan.periods
        return np.where(over, self.stop_position, self.position + (self._v + a) * self._unit)

    def _search(self, target: Vector, speed: Vector, bottom: Vector, top: Vector, limit: Vector) -> Vector:
        """The acceleration that brings the end of the stop plan to where the target's own stop would end, and not past
        it. The end rises with the acceleration."""
        ahead = stop_plan(speed, np.zeros_like(speed), limit).end * self._unit
        aim = (_clip(target + ahead, self._low, self._high) - self.position) / self._unit
        below = (self.stop_position - self.position) / self._unit <= aim
        low, high = np.minimum(bottom, top), top
        for _ in range(_ROUNDS):
            grid = low + _GRID.reshape(-1, *(1,) * low.ndim) * (high - low)
            v = self._v + grid
            ends = v + stop_plan(v, grid, np.broadcast_to(limit, grid.shape)).end
            cell = _clip((ends <= aim).sum(axis=0) - 1, 0, len(_GRID) - 2)
            width = (high - low) / (len(_GRID) - 1)
            past = ends[-1] <= aim
            low, high = np.where(past, high, low + cell * width), np.where(past, high, low + (cell + 1) * width)
            high = np.where(ends[0] > aim, low, high)
        return np.where(below, low, high)

    def _inside(self, position: Vector, plan: StopPlan) -> np.ndarray:
        """Whether the whole stop lies within the position limits."""
        slack = self._tolerance * self._unit
        above = position + np.minimum(plan.low, 0.0) * self._unit >= self._low - slack
        return above & (position + np.maximum(plan.high, 0.0) * self._unit <= self._high + slack)

    def _advance(self, a: Vector, positions: Vector, plan: StopPlan, planned: np.ndarray) -> None:
        """Take `a` as sent. Where `planned`, the old plan goes on; elsewhere `plan` begins at `positions`."""
        self._v = (positions - self.position) / self._unit
        self._a = a
        self.position = positions
        self._plan = _where(planned, self._plan, plan)
        self._base = np.where(planned, self._base, positions)
        self._i = np.where(planned, self._i + 1, 0.0)


def _where(first: np.ndarray, a: StopPlan, b: StopPlan) -> StopPlan:
    return StopPlan(*(np.where(first, getattr(a, f), getattr(b, f)) for f in StopPlan.__dataclass_fields__))
