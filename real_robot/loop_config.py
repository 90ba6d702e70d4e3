"""Options of the control loop. Needs no hardware's packages, so that commands and the ROS 2 node take its defaults."""

from __future__ import annotations

from dataclasses import dataclass

from vla_rl.serving.broker import BrokerConfig

HEARTBEAT_S = 0.06  # longest wait for a policy server to answer a ping
MAX_PLAN_AGE_S = 0.2  # of whoever deploys, but in mode sync, where the arm waits


@dataclass(frozen=True)
class LoopConfig:
    """`prompt`: the instruction. `broker`: of action chunks; deltas need its `control_hz` to be the arm's rate.

    `max_picture_age_s`: since a picture came, and since a camera last showed another one (a frozen camera repeats its
    own stamp). `grace_s`: in HOLD for want of actions, before the arm is stopped. `start_tolerance`: rad between the
    first target and the measured pose. `ramp_s`: over which a start, or the policy after a person, comes to full
    effect. `max_plan_age_s`: how long a chunk is followed after its observation, so how long a dead policy goes
    unnoticed; None: to its end. `start_timeout_s`: for fresh streams and the first chunk.
    """

    prompt: str
    broker: BrokerConfig
    max_picture_age_s: float = 0.08
    grace_s: float = 1.0
    start_tolerance: float = 0.3
    ramp_s: float = 1.0
    max_plan_age_s: float | None = None
    start_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if not (self.max_picture_age_s > 0 and self.grace_s >= 0 and self.start_tolerance > 0 and self.ramp_s >= 0):
            raise ValueError(f"LoopConfig: times and tolerances must be positive, got {self}")


__all__ = ["HEARTBEAT_S", "MAX_PLAN_AGE_S", "LoopConfig"]
