"""Tabletop tasks, one family a file. Importing this package registers them in `TASKS`."""

from vla_rl.sim.tasks import drawer, pick, place, press, push, reach, stack, store  # noqa: F401  importing registers
from vla_rl.sim.tasks.base import SPLITS, TASKS, Task, get_task, register_task

__all__ = ["SPLITS", "TASKS", "Task", "get_task", "register_task"]
