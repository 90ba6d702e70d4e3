"""Named suites: functions that return a `Suite`. `vla-rl eval --suite NAME` takes them, and `module:function` of yours.

A suite that changes gets another version; its hash changes by itself.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace

from vla_rl.configs.demo import demo
from vla_rl.envs.config import AnyEnvConfig, EnvConfig
from vla_rl.envs.gym import GymConfig
from vla_rl.envs.libero import LiberoConfig
from vla_rl.envs.maniskill import ManiSkillConfig
from vla_rl.envs.robosuite import TASKS as ROBOSUITE_TASKS
from vla_rl.envs.robosuite import RobosuiteConfig
from vla_rl.evaluation.conditions import AXES, MUST_NOT_SUCCEED, UnsupportedConditionError, apply_condition, crossed
from vla_rl.evaluation.suite import Suite, SuiteCase
from vla_rl.sim.shift import MAX_LEVEL
from vla_rl.sim.tasks import TASKS

_NUM_LIBERO_TASKS = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}
_MANISKILL_TASKS = ("PushCube-v1", "PickCube-v1", "StackCube-v1", "PegInsertionSide-v1")


def tabletop() -> Suite:
    """All tasks of our tabletop, nothing changed: 50 held-out episodes of each."""
    cases = tuple(SuiteCase(task, EnvConfig(task=task), num_episodes=50) for task in sorted(TASKS))
    return Suite("tabletop", version=1, cases=cases)


def reach() -> Suite:
    """The demo's task: 256 held-out episodes of reaching the block that a sentence names."""
    env = demo().env
    return Suite("reach", version=1, cases=(SuiteCase(env.task, env, num_episodes=256),))


def tabletop_axes() -> Suite:
    """The demo's task under every condition: each axis alone at three levels, and what a scene can change crossed."""
    alone = [f"{axis}@{level}" for axis in AXES for level in range(1, MAX_LEVEL + 1)]
    mixed = [axis for axis in AXES if axis not in MUST_NOT_SUCCEED]
    together = [crossed(mixed, level) for level in range(1, MAX_LEVEL + 1)]
    return _under_conditions("tabletop_axes", demo().env, ["", *alone, *together], num_episodes=100)


def _under_conditions(name: str, env: AnyEnvConfig, conditions: list[str], num_episodes: int) -> Suite:
    """One task under each of `conditions`; those that its simulator cannot do are listed with the reason."""
    cases, unsupported = [], []
    for condition in conditions:
        try:
            changed = apply_condition(env, condition)
        except UnsupportedConditionError as error:
            unsupported.append((condition, str(error)))
            continue
        cases.append(SuiteCase(env.task, changed, condition, num_episodes=num_episodes))
    return Suite(name, version=1, cases=tuple(cases), unsupported=tuple(unsupported))


def _libero(part: str, *, customary: bool) -> Suite:
    env = LiberoConfig(init_states="customary" if customary else "disjoint")
    tasks = [f"{part}/{i}" for i in range(_NUM_LIBERO_TASKS[part])]
    cases = tuple(SuiteCase(task, env, num_episodes=50 if customary else 25) for task in tasks)
    name = f"{part}_customary" if customary else part
    return Suite(name, version=1, cases=cases, protocol="train_equals_test" if customary else "held_out")


def libero_spatial() -> Suite:
    """LIBERO-Spatial, each of the 25 initial states a task that training does not begin from."""
    return _libero("libero_spatial", customary=False)


def libero_object() -> Suite:
    """LIBERO-Object, each of the 25 initial states a task that training does not begin from."""
    return _libero("libero_object", customary=False)


def libero_goal() -> Suite:
    """LIBERO-Goal, each of the 25 initial states a task that training does not begin from."""
    return _libero("libero_goal", customary=False)


def libero_10() -> Suite:
    """LIBERO-10 (Long), each of the 25 initial states a task that training does not begin from."""
    return _libero("libero_10", customary=False)


def libero_90() -> Suite:
    """LIBERO-90, each of the 25 initial states a task that training does not begin from."""
    return _libero("libero_90", customary=False)


def libero_spatial_customary() -> Suite:
    """LIBERO-Spatial by the custom of the literature: all 50 initial states, train = test."""
    return _libero("libero_spatial", customary=True)


def libero_object_customary() -> Suite:
    """LIBERO-Object as in the literature: all 50 initial states, train = test."""
    return _libero("libero_object", customary=True)


def libero_goal_customary() -> Suite:
    """LIBERO-Goal as in the literature: all 50 initial states, train = test."""
    return _libero("libero_goal", customary=True)


def libero_10_customary() -> Suite:
    """LIBERO-10 (Long) as in the literature: all 50 initial states, train = test."""
    return _libero("libero_10", customary=True)


def libero_90_customary() -> Suite:
    """LIBERO-90 as in the literature: all 50 initial states, train = test."""
    return _libero("libero_90", customary=True)


def _maniskill(name: str, split: str) -> Suite:
    # With turns of the tool: a peg that lies at any angle cannot be gripped without.
    env = ManiSkillConfig(control="pd_ee_delta_pose", privileged_state=False)
    cases = tuple(SuiteCase(task, replace(env, task=task), split=split, num_episodes=100) for task in _MANISKILL_TASKS)
    return Suite(name, version=2, cases=cases, protocol="train_equals_test" if split == "train" else "held_out")


def maniskill() -> Suite:
    """ManiSkill PushCube, PickCube, StackCube and PegInsertionSide: 100 held-out episodes of each."""
    return _maniskill("maniskill", "test")


def maniskill_customary() -> Suite:
    """The same tasks of ManiSkill on the seeds that training draws from: train = test, as is customary."""
    return _maniskill("maniskill_customary", "train")


def robosuite() -> Suite:
    """robosuite Lift, Can, Square, Stack and Door: 50 held-out episodes of each."""
    cases = tuple(SuiteCase(task, RobosuiteConfig(task=task), num_episodes=50) for task in ROBOSUITE_TASKS)
    return Suite("robosuite", version=1, cases=cases)


def twin() -> Suite:
    """The demo's task on the digital twin of the arm, in real time, through the safety filter: 20 episodes."""
    env = demo().env
    return Suite("twin", version=1, cases=(SuiteCase(env.task, env, num_episodes=20),), robot="twin")


def gymnasium(env_id: str) -> Suite:
    """Any Gymnasium environment, `gym/ID`: 100 episodes of seeds that training does not draw."""
    env = GymConfig(env_id)
    return Suite(f"gym/{env_id}", version=1, cases=(SuiteCase(env_id, env, num_episodes=100),))


SUITES: dict[str, Callable[[], Suite]] = {
    make.__name__: make
    for make in (
        tabletop, reach, tabletop_axes,
        libero_spatial, libero_object, libero_goal, libero_10, libero_90,
        libero_spatial_customary, libero_object_customary, libero_goal_customary, libero_10_customary,
        libero_90_customary,
        maniskill, maniskill_customary, robosuite, twin,
    )
}  # fmt: skip


def get_suite(name: str) -> Suite:
    """The suite of that name; `gym/ID`; or of a function of your own, `module:function`, the module lying on the path
    or in the working folder. Raises ValueError where there is none."""
    if name in SUITES:
        return SUITES[name]()
    if name.startswith("gym/"):
        return gymnasium(name.removeprefix("gym/"))
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, SUITES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one, or name your own as module:function"
        raise ValueError(f"there is no suite {name!r}; {hint} (known: {', '.join(SUITES)}, gym/ID)")
    sys.path.insert(0, os.getcwd())
    try:
        suite = getattr(importlib.import_module(module), function)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"suite {name!r} cannot be loaded: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(suite, Suite):
        raise ValueError(f"suite {name!r} returns {type(suite).__name__}, expected a vla_rl.evaluation.suite.Suite")
    return suite


def list_suites() -> str:
    """A line a suite: name, version, hash, protocol, cases and episodes, and what it is."""
    lines = []
    for name, make in SUITES.items():
        suite = make()
        size = f"{len(suite.cases):3} x {suite.num_episodes // len(suite.cases)}"
        summary = (make.__doc__ or "").strip().splitlines()[0]
        about = suite.describe()
        lines.append(f"{name:26} v{about['version']} {about['hash'][:12]}  {suite.protocol:17} {size:>9}  {summary}")
    lines.append(f"{'gym/ID':26} any Gymnasium environment; module:function is a suite of your own")
    return "\n".join(lines)


__all__ = ["SUITES", "get_suite", "gymnasium", "list_suites"]
