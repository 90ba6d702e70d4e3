"""Every family of VLAs by two learners that divide its layers, against one process: fine-tuning, then PPO."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.e2e.test_vla_families import HORIZON, make_env, make_policy, train_config
from tests.unit.tiny_families import FAMILIES
from tests.unit.two_learners import start_two
from vla_rl.core import Observation
from vla_rl.onpolicy import ActorConfig
from vla_rl.policies.adaptation import plain_state_dict
from vla_rl.train.distributed import is_divided, join_learners, learner, leave_learners, num_learners, share_of_learner
from vla_rl.train.loop import run_training
from vla_rl.train.metrics import read_metrics
from vla_rl.train.sft import SFTConfig, run_sft
from vla_rl.train.sharding import whole_state

BATCH = 5
SFT = SFTConfig(num_updates=2, batch_size=BATCH, learning_rate=1e-3, warmup_updates=1, log_interval=1)


class Demonstrations:
    """The same random rows in every batch."""

    def __init__(self, spec):
        g = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (BATCH, 32, 32, 3), generator=g, dtype=torch.uint8)
        self.state = torch.randn(BATCH, spec.state_dim, generator=g)
        self.actions = torch.rand(BATCH, HORIZON, spec.action.dim, generator=g) - 0.5

    def batch(self):
        rows = share_of_learner(BATCH)
        sentences = ("push the cube", "pick", "go", "stop", "wait")[rows]
        obs = Observation({"agent": self.images[rows]}, self.state[rows], sentences)
        return obs, self.actions[rows], torch.ones(len(obs), HORIZON, dtype=torch.bool)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def train(name, folder):
    """What fine-tuning and then PPO leave: their first metrics, the policy, and how much of it was divided."""
    env = make_env(1)
    env.close()
    policy, shard = make_policy(name, env.spec), num_learners() > 1
    run_sft(policy, Demonstrations(env.spec), SFT, folder / "sft", spec=env.spec, tensorboard=False, shard=shard)
    config = train_config(name, num_envs=4)
    actor = ActorConfig(learning_rate=1e-4, num_epochs=2, minibatch_size=100, target_kl=None, reference_kl_coef=0.02)
    config = replace(config, algorithm=replace(config.algorithm, actor=actor))
    run_training(policy, make_env, config, folder / "rl", tensorboard=False, shard=shard)
    return {
        "policy": whole_state(plain_state_dict(policy)),
        "divided": sum(is_divided(p) for p in policy.parameters()),
        "sft": read_metrics(folder / "sft") if learner() == 0 else [],
        "rl": read_metrics(folder / "rl") if learner() == 0 else [],
    }


def learn(folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    assert join_learners()
    left = {name: train(name, Path(folder) / name) for name in FAMILIES}
    torch.save(left, Path(folder) / f"{learner()}.pt")
    leave_learners()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return start_two("tests.e2e.test_vla_learners:learn", tmp_path_factory.mktemp("learners"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_two_that_divide_a_family_learn_as_one(learned, tmp_path, name):
    torch.set_num_threads(1)
    first, second = (both[name] for both in learned)
    one = train(name, tmp_path)
    assert first["divided"] > one["divided"] == 0
    for key, value in first["policy"].items():
        assert torch.equal(value, second["policy"][key]), key
    for stage, metric in (("sft", "sft/loss"), ("sft", "sft/grad_norm"), ("rl", "update/policy_loss")):
        ours, theirs = ([row[metric] for row in run[stage]] for run in (first, one))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), metric
    # where a gradient is rounding alone (biases of keys), Adam makes steps of it
    for key, value in one["policy"].items():
        torch.testing.assert_close(first["policy"][key], value, atol=3e-4, rtol=1e-3, msg=key)
