"""A suite: the declared episodes of an evaluation, with a version and a hash, and the rule by which they count.

A case is one task under one condition: an environment, its split and the seeds. Whoever evaluates on a suite gets its
hash into the result; two results with other hashes are not of the same episodes. What a policy sees of an episode
(which cameras, how large, whether the simulator's own state) belongs to the policy and is not in the hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vla_rl.envs.config import AnyEnvConfig, PerturbedConfig, SimulatorConfig
from vla_rl.envs.libero import LiberoConfig
from vla_rl.evaluation.result import CRITERIA
from vla_rl.policies.checkpoints.config_json import config_to_dict
from vla_rl.sim.tasks import SPLITS

Protocol = Literal["held_out", "train_equals_test"]
Robot = Literal["simulator", "twin"]
_SPEED = ("num_threads", "num_workers", "device", "render_backend", "assets")  # where and how fast, never what
_SEEN = ("cameras", "image_size", "privileged_state")  # by the policy
_NOT_OF_EPISODES = ("demo_start",)


@dataclass(frozen=True)
class SuiteCase:
    """`num_episodes` episodes of `task` from seed `first_seed` on, in `split` of `env`.

    `env` is the environment under `condition` already; the condition's name ("" where nothing is changed) is for rows
    and tables.
    """

    task: str
    env: AnyEnvConfig
    condition: str = ""
    split: str = "test"
    num_episodes: int = 50
    first_seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r} is unknown; use one of {', '.join(SPLITS)}")
        if self.num_episodes < 1 or self.first_seed < 0:
            raise ValueError(
                f"SuiteCase {self.name}: num_episodes must be at least 1 and first_seed at least 0, got "
                f"{self.num_episodes} and {self.first_seed}"
            )

    @property
    def name(self) -> str:
        """For people and folders: "TASK" or "TASK CONDITION"."""
        return f"{self.task} {self.condition}".strip()

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.num_episodes)

    @property
    def initial_state(self) -> Callable[[int], str]:
        """Names the initial state of a seed's episode: LIBERO's number of it, elsewhere the seed."""
        env = _simulator(self.env)
        if not isinstance(env, LiberoConfig):
            return str
        ids = env.init_state_ids(self.split)
        return lambda seed: str(ids[seed % len(ids)])


@dataclass(frozen=True)
class Suite:
    """`criterion`: the rate that counts, one of `CRITERIA`. `protocol`: "train_equals_test" where training may have
    begun from the same initial states. `unsupported`: (condition, reason) of what the simulator cannot do, for the
    report. `robot`: "twin" runs the episodes on the digital twin of the arm, in real time.

    Raises ValueError for no case, for two of one name, and for a protocol that the cases do not keep.
    """

    name: str
    version: int
    cases: tuple[SuiteCase, ...]
    protocol: Protocol = "held_out"
    criterion: str = "success_once"
    unsupported: tuple[tuple[str, str], ...] = ()
    robot: Robot = "simulator"

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"suite {self.name}: cases must be there, and of different names; got {names}")
        if self.criterion not in CRITERIA:
            raise ValueError(f"suite {self.name}: criterion must be one of {CRITERIA}, got {self.criterion!r}")
        for case in self.cases:
            if self.protocol == "held_out" and protocol_of(case.env, case.split) != "held_out":
                raise ValueError(
                    f"suite {self.name}: {case.name} begins from states of the training, so its protocol is "
                    "'train_equals_test'"
                )

    @property
    def num_episodes(self) -> int:
        return sum(case.num_episodes for case in self.cases)

    def describe(self) -> dict[str, Any]:
        """What a result keeps of it."""
        names = {"name": self.name, "version": self.version, "hash": suite_hash(self)}
        return names | {"protocol": self.protocol, "criterion": self.criterion}

    def settings(self) -> dict[str, Any]:
        """Fields of the cases' environments, for the configuration of a result: by name where they are the same in
        all, by case under "cases" where they are not."""
        rows = [{"split": case.split} | _env_settings(case.env, without=("task", *_SPEED)) for case in self.cases]
        names = list(dict.fromkeys(name for row in rows for name in row))
        common = {n: rows[0][n] for n in names if all(n in row and row[n] == rows[0][n] for row in rows)}
        own = [{n: v for n, v in row.items() if n not in common} for row in rows]
        parts = [{"case": case.name} | settings for case, settings in zip(self.cases, own, strict=True) if settings]
        return common | ({"cases": parts} if parts else {})


def protocol_of(env: AnyEnvConfig, split: str) -> Protocol:
    """Whether episodes of `split` are held out from training."""
    simulator = _simulator(env)
    customary = isinstance(simulator, LiberoConfig) and simulator.init_states == "customary"
    return "train_equals_test" if split == "train" or customary else "held_out"


def suite_hash(suite: Suite) -> str:
    """SHA-256, in hexadecimal, of everything that decides which episodes are run and how they count."""
    cases = [
        {
            "task": case.task,
            "condition": case.condition,
            "split": case.split,
            "seeds": [case.first_seed, case.num_episodes],
            "env": type(_simulator(case.env)).__name__,
            "settings": _env_settings(case.env, without=("task", *_SPEED, *_SEEN)),
        }
        for case in suite.cases
    ]
    content = [suite.name, suite.version, suite.protocol, suite.criterion, suite.robot, cases]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _simulator(env: AnyEnvConfig) -> SimulatorConfig:
    return env.env if isinstance(env, PerturbedConfig) else env


def _env_settings(env: AnyEnvConfig, *, without: tuple[str, ...]) -> dict[str, Any]:
    values = config_to_dict(_simulator(env))
    if isinstance(env, PerturbedConfig):
        values["perturbation"] = config_to_dict(env.perturbation)
    return {n: v for n, v in values.items() if n not in (*without, *_NOT_OF_EPISODES)}


def with_fields(suite: Suite, fields: Mapping[str, Any]) -> Suite:
    """`suite` with `fields` of its environments replaced, in cases whose environment has them. Raises ValueError for
    a field that none has."""
    cases = []
    used: set[str] = set()
    for case in suite.cases:
        simulator = _simulator(case.env)
        own = {name: value for name, value in fields.items() if name in config_to_dict(simulator)}
        used |= own.keys()
        changed = replace(simulator, **own)
        env = replace(case.env, env=changed) if isinstance(case.env, PerturbedConfig) else changed
        cases.append(replace(case, env=env))
    if unknown := sorted(fields.keys() - used):
        raise ValueError(f"suite {suite.name}: its environments have no {', '.join(unknown)}; leave it out")
    return replace(suite, cases=tuple(cases))


def with_known_fields(suite: Suite, fields: Mapping[str, Any]) -> Suite:
    """The same, without those fields that no environment has."""
    names = {name for case in suite.cases for name in config_to_dict(_simulator(case.env))}
    return with_fields(suite, {name: value for name, value in fields.items() if name in names})


__all__ = ["Suite", "SuiteCase", "protocol_of", "suite_hash", "with_fields", "with_known_fields"]
