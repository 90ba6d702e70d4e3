"""Tabletop tasks, one family a file. Importing this package registers them in `TASKS`."""

from vla_rl.sim.tasks import reach  # noqa: F401  registers its tasks
from vla_rl.sim.tasks.base import SPLITS, TASKS, Task, get_task, register_task

__all__ = ["SPLITS", "TASKS", "Task", "get_task", "register_task"]
