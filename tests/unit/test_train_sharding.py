"""An adapted policy that learns in two processes, with whole or with divided layers, against one process."""

import os
import warnings
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from tests.unit.two_learners import start_two
from vla_rl.core import Observation
from vla_rl.envs.two_way_reach import make_two_way_reach
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.sampler import FlowSampler
from vla_rl.onpolicy import CriticConfig, PPOConfig
from vla_rl.onpolicy.actor import ActorConfig, ActorData, ActorUpdate
from vla_rl.policies.adaptation import AdaptationConfig, LoRAConfig, apply_adaptation, plain_state_dict
from vla_rl.policies.blocks.expert import ActionExpertConfig
from vla_rl.policies.checkpoints.native import load_policy
from vla_rl.policies.pi0 import Pi0, Pi0Config
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.train.distributed import is_divided, join_learners, learner, leave_learners, num_learners, same_start
from vla_rl.train.loop import TrainConfig, Trainer, run_training
from vla_rl.train.metrics import read_metrics
from vla_rl.train.sharding import shard_layers, whole_state

ADDRESS_FILE = "ray_address"
NUM_ROWS = 5  # of which learner 0 has three


def pi0(precision):
    torch.manual_seed(0)
    policy = Pi0(Pi0Config(3, 2, action_horizon=4, num_steps=2)).eval()
    apply_adaptation(policy, AdaptationConfig(("expert",), LoRAConfig(rank=3), precision))
    return policy


def observation():
    g = torch.Generator().manual_seed(1)
    images = {"agent": torch.randint(0, 256, (NUM_ROWS, 64, 64, 3), generator=g, dtype=torch.uint8)}
    return Observation(images, torch.randn(NUM_ROWS, 3, generator=g), ("push", "pick", "go", "stop", "wait"))


def update(precision="float32", shard=False):
    """Two epochs of one minibatch on this learner's rows -> the state of policy and optimiser, whole."""
    policy = pi0(precision)
    sampler = FlowSampler(policy, FlowSamplerConfig(num_steps=2, mode="full"))
    inputs = policy.preprocess(observation())
    with torch.no_grad():
        _, trace = sampler.sample(policy.encode(inputs), torch.Generator().manual_seed(2))
    same_start(policy)
    if shard:
        shard_layers(policy)
    config = ActorConfig(learning_rate=1e-3, num_epochs=2, minibatch_size=NUM_ROWS, target_kl=None, max_grad_norm=0.1)
    actor = ActorUpdate(sampler, config)
    rows = torch.arange(NUM_ROWS)
    rows = rows[3 * learner() : 3 + 2 * learner()] if num_learners() > 1 else rows
    advantages = torch.linspace(-1.0, 2.0, NUM_ROWS)
    metrics = actor.update(
        ActorData(None, inputs.select(rows), trace.select(rows), advantages[rows]), torch.Generator().manual_seed(0)
    )
    divided = sum(is_divided(p) for p in policy.parameters())
    state = {
        "plain": plain_state_dict(policy),
        "adapted": policy.state_dict(),
        "optimizer": actor.state_dict()["optimizer"],
    }
    held = sum(p.to_local().numel() if is_divided(p) else p.numel() for p in policy.parameters())
    return {"metrics": metrics, "divided": divided, "held": held} | whole_state(state)


CASES = {"whole": ("float32", False), "divided": ("float32", True), "divided, bfloat16": ("bfloat16", True)}


def learn(folder):
    """One of two learners."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    assert join_learners()
    left = {name: update(*case) for name, case in CASES.items()} | {name: run_twice(name, folder) for name in RUNS}
    torch.save(left, Path(folder) / f"{learner()}.pt")
    leave_learners()


# ------------------------------------------------------------------------------------------------------- runs of PPO
# frozen encoder?, workers of each of two learners
RUNS = {"frozen encoder": (True, 0), "learning encoder": (False, 0), "learning encoder, workers": (False, 1)}


def train(name, folder, num_iterations=3, **options):
    """PPO of a TinyVLA without cameras; its scores are computed again before each update. Two divide its layers."""
    torch.manual_seed(0)
    freeze, workers = RUNS[name]
    expert = ActionExpertConfig(width=16, num_layers=2, num_heads=2)
    policy = TinyVLA(TinyVLAConfig(5, 2, (), action_horizon=4, expert=expert))
    actor = ActorConfig(
        minibatch_size=64, num_epochs=2, target_kl=None, recompute_log_probs=True, reference_kl_coef=0.1
    )
    config = TrainConfig(
        num_envs=8,
        num_iterations=num_iterations,
        freeze_encoder=freeze,
        eval_interval=2,
        algorithm=PPOConfig(
            num_decisions=4, critic_warmup_iterations=0, actor=actor, critic=CriticConfig(minibatch_size=64)
        ),
    )
    calls = []

    def evaluate():
        calls.append(sum(is_divided(p) for p in policy.parameters()))
        policy.act(Observation({}, torch.zeros(1, 5), ("go",)), torch.zeros(1, 4, 2))
        return {"eval/calls": 1.0}

    options |= {"evaluate": evaluate, "tensorboard": False, "shard": num_learners() > 1}
    if workers and num_learners() > 1:
        address = (Path(folder).parents[1] / ADDRESS_FILE).read_text()
        options["rollout"] = RolloutConfig(workers=workers, ray_address=address, cpus_per_worker=0.5)
    run_training(policy, make_two_way_reach, config, folder, **options)
    assert calls == ([0, 0] if num_iterations == 3 and learner() == 0 and "resume" not in options else [0] * len(calls))
    assert learner() == 0 or not calls
    return policy


def run_twice(name, folder):
    """In one go, and in two parts; with workers, whose start takes seconds, in two parts alone."""
    folder = Path(folder) / name
    workers = RUNS[name][1]
    parts = folder / ("whole" if workers else "parts")
    whole = None if workers else train(name, folder / "whole")
    train(name, parts, 2)
    resumed = train(name, parts, resume=True)
    whole = whole or resumed
    if workers:
        config = RolloutConfig(workers=1, ray_address=(folder.parent / ADDRESS_FILE).read_text(), cpus_per_worker=0.5)
        with pytest.raises(ValueError, match="workers take copies of the policy, and its layers are divided already"):
            Trainer(resumed, make_two_way_reach, TrainConfig(num_envs=8), rollout=config, shard=True)
        ray.shutdown()
    return {
        "whole": whole_state(plain_state_dict(whole)),
        "resumed": whole_state(plain_state_dict(resumed)),
        "divided": [is_divided(p) for p in whole.parameters()],
    }


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What both learners end with. They are started as torchrun does."""
    folder = tmp_path_factory.mktemp("learners")
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    (folder / ADDRESS_FILE).write_text(cluster.address)
    try:
        return [*start_two("tests.unit.test_train_sharding:learn", folder), folder]
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("case", CASES)
def test_two_learners_update_an_adapted_policy_as_one(learned, case):
    """Frozen parts, adapters, layers whose last projections are read by nobody; three rows here and two there."""
    torch.set_num_threads(1)
    precision, shard = CASES[case]
    one, (first, second) = update(precision), (both[case] for both in learned[:2])
    assert one["divided"] == 0
    assert (first["divided"] > 50) == shard
    assert (first["held"] < 0.8 * one["held"]) == shard
    # in bfloat16 another batch size is another rounding, and where a gradient is nearly zero Adam takes its sign
    exact = precision == "float32"
    for name in ("plain", "adapted"):
        assert first[name].keys() == one[name].keys()
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), key
            tolerance = {"atol": 5e-6, "rtol": 1e-3} if exact else {"atol": 4e-3, "rtol": 1e-2}
            torch.testing.assert_close(value, one[name][key], **tolerance, msg=key)
    start = pi0(precision).state_dict()
    moved = {k for k in start if not torch.equal(start[k], first["adapted"][k])}
    assert any(".lora_B" in k for k in moved)
    assert any(k.startswith("expert") for k in moved)
    assert not any(k.startswith("vision") or ".base_layer." in k for k in moved)
    for name in ("policy_loss", "actor_grad_norm"):
        expected = pytest.approx(one["metrics"][name], rel=1e-3 if exact else 3e-2, abs=1e-5)
        assert first["metrics"][name] == expected, name
    assert first["metrics"]["actor_grad_norm"] > 0.1  # so clipping was at work


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_that_divide_layers_is_that_of_one(learned, tmp_path, name):
    """Rollouts, updates, evaluations by the first alone, a checkpoint that goes on bit for bit, a policy that loads."""
    torch.set_num_threads(1)
    one = train(name, tmp_path / "one")
    first, second = (both[name] for both in learned[:2])
    saved = load_policy(learned[2] / name / "whole" / "policy").state_dict()
    assert any(first["divided"])
    for key, value in one.state_dict().items():
        assert torch.equal(first["whole"][key], second["whole"][key]), key
        assert torch.equal(first["whole"][key], first["resumed"][key]), key
        assert torch.equal(first["whole"][key], saved[key]), key
        torch.testing.assert_close(saved[key], value, atol=2e-5, rtol=1e-3, msg=key)
    ours, theirs = (read_metrics(folder) for folder in (learned[2] / name / "whole", tmp_path / "one"))
    assert [row.get("eval/calls") for row in ours] == [None, 1.0, 1.0]
    for metric in ("update/policy_loss", "update/actor_grad_norm", "rollout/episodes_finished"):
        assert [row[metric] for row in ours] == pytest.approx([row[metric] for row in theirs], rel=1e-3, abs=1e-5)


def test_there_must_be_somebody_to_share_with():
    with pytest.raises(ValueError, match="there is one learner"):
        shard_layers(pi0("float32"))
