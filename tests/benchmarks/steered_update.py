"""Updates per second of EXPO on a frozen tiny VLA: base chunks stored with the features, against drawn for each update.

LIBERO's recipe, one core: four critic updates and one of the edits, sampling included, on random episodes. With base
chunks drawn anew an update asks the VLA for one at each observation and for `num_base` at each successor.

    make bench NAME=steered_update ARGS="--save"
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import numpy as np
import torch
import tyro

from tests.benchmarks.harness import BenchmarkResult, hardware, in_turns, median_ratio, summary
from vla_rl.configs import get_recipe
from vla_rl.core import ActionSpec, CameraSpec, EnvSpec
from vla_rl.data.replay import ReplayBuffer
from vla_rl.offpolicy.expo import ExpoConfig
from vla_rl.offpolicy.steered_learner import SteeredLearner
from vla_rl.policies.build import build_policy
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.offpolicy_stages import build_learner

SPEC = EnvSpec(
    name="libero_like",
    cameras={"agentview": CameraSpec(64, 64)},
    state_names=tuple(f"s{i}" for i in range(8)),
    action=ActionSpec(low=(-1.0,) * 7, high=(1.0,) * 7, names=tuple(f"a{i}" for i in range(7))),
    max_episode_steps=100,
    control_hz=20.0,
)


@dataclass(frozen=True)
class SteeredUpdateConfig:
    """`num_calls` of an update in each of `repeats` turns. `save`: keep the result beside this file."""

    repeats: int = 5
    num_calls: int = 4
    save: bool = False


def _buffer(learner: SteeredLearner, train: OffPolicyConfig) -> ReplayBuffer:
    buffer = ReplayBuffer(
        replace(train.replay, capacity=510), state_dim=8, action_dim=7, cameras={"agentview": (64, 64)},
        feature_dim=learner.feature_dim,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(5):
        buffer.add_episode(
            state=rng.normal(size=(101, 8)).astype(np.float32),
            actions=rng.uniform(-1, 1, (100, 7)).astype(np.float32),
            rewards=np.zeros(100, np.float32),
            terminated=False,
            truncated=True,
            images={"agentview": rng.integers(0, 255, (101, 64, 64, 3), dtype=np.uint8)},
            instruction="pick up the black bowl and place it on the plate",
        )
    learner.prepare(buffer)
    return buffer


def main(config: SteeredUpdateConfig) -> None:
    torch.set_num_threads(1)
    machine, recipe = hardware(), get_recipe("libero_object")
    train = recipe.train
    assert isinstance(train, OffPolicyConfig)
    assert isinstance(train.agent, ExpoConfig)
    assert train.online is not None
    online, sides = train.online, {}
    for name, agent in {"stored": train.agent, "anew": replace(train.agent, num_stored=0)}.items():
        policy = build_policy(recipe.policy, SPEC, seed=0)
        learner = build_learner(agent, SPEC, train.horizon, policy=policy, dataset=None, seed=0)
        assert isinstance(learner, SteeredLearner)
        sides[name] = learner, _buffer(learner, train), np.random.default_rng(0)

    def rate(name: str) -> float:
        learner, buffer, rng = sides[name]
        begin, metrics = time.perf_counter(), {}
        for _ in range(config.num_calls):
            batches = buffer.sample(
                online.batch_size, rng, horizon=train.horizon, num_minibatches=online.updates_per_call
            )
            metrics = learner.update(batches)
        float(metrics["td_loss"])  # waits
        return config.num_calls * online.updates_per_call / (time.perf_counter() - begin)

    for name in sides:  # compiles
        rate(name)
    values = in_turns({name: lambda name=name: rate(name) for name in sides}, config.repeats)
    BenchmarkResult(
        name="steered_update",
        ours=round(median(values["stored"]), 2),
        peer=round(median(values["anew"]), 2),
        ratio=round(median_ratio(values["stored"], values["anew"]), 2),
        unit="critic updates/s",
        details={
            "rates": summary(values),
            "row_floats": {name: learner.feature_dim for name, (learner, *_) in sides.items()},
            "repeats": config.repeats,
            "num_calls": config.num_calls,
            "hardware": machine,
        },
    ).finish(config.save)


if __name__ == "__main__":
    main(tyro.cli(SteeredUpdateConfig))
