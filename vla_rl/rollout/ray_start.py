"""Ray: started here, or a cluster that is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import ray

from vla_rl.cpu import available_cores


def connect(address: str | None, needs: Mapping[str, float], *, who: str, option: str, advice: str) -> bool:
    """Start Ray (`address` None) or connect to a cluster, unless this process has; True where that was done here.

    `needs`: resources that `who` takes together. `option`: the one that gives the address; `advice`: what to do where
    there is no room. Raises ValueError where the cluster cannot be reached or has no room.
    """
    starts = not ray.is_initialized()
    if starts:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; the other one warns
        try:
            if address is None:
                ray.init("local", num_cpus=available_cores(), include_dashboard=False, logging_level=logging.ERROR)
            else:
                ray.init(address, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"no Ray cluster at {address!r} ({option}): {error}") from error
    there = ray.cluster_resources()
    short = [
        f"{needed:g} {name}, there are {there.get(name, 0.0):g}"
        for name, needed in needs.items()
        if needed > there.get(name, 0.0)
    ]
    if short:
        if starts:
            ray.shutdown()
        raise ValueError(f"{who} need {'; and '.join(short)}. {advice}, or add machines to the cluster")
    return starts


__all__ = ["connect"]
