"""How many CPU cores there are for us."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cores() -> int:
    """CPU cores that this process may use, where a container is limited no more than that."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def cpu_limit() -> float | None:
    """Cores that a container may use, where it is limited (cgroup v2)."""
    file = Path("/sys/fs/cgroup/cpu.max")
    if not file.exists():
        return None
    quota, period = file.read_text(encoding="utf-8").split()
    return None if quota == "max" else int(quota) / int(period)
