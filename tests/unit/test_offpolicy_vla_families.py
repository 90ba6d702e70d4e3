"""Learning from replay on every family of VLAs: a policy improved through a critic, and frozen ones that are steered."""

import functools
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.unit.offpolicy_batches import assert_same
from tests.unit.test_offpolicy_policy_learner import CRITIC, SPEC, observation, reward_of, train
from tests.unit.test_offpolicy_steered import AGENTS
from tests.unit.tiny_families import FAMILIES, TOKENS, open_zeros, tiny_policy
from vla_rl.data.normalization import Normalizer
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.offpolicy.improvement import ImprovementConfig
from vla_rl.offpolicy.policy_learner import PolicyLearner, PolicyLearnerConfig
from vla_rl.offpolicy.steered_learner import SteeredLearner
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.protocols import chunk_shape
from vla_rl.train.checkpoint import load_state, save_state
from vla_rl.train.offpolicy_stages import build_learner

HORIZON, PADDED, NUM_EPISODES, STEPS = 2, 8, 8, 3
IMPROVEMENT = ImprovementConfig(num_candidates=3, num_kept=2, num_steps=2, step_size=0.05)
CONFIG = PolicyLearnerConfig(
    critic=replace(CRITIC, improvement=IMPROVEMENT), policy_learning_rate=1e-3, policy_batch_size=16, bc_weight=0.5
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_policy(name, seed=0) -> Any:
    policy: Any = build_policy(tiny_policy(name, HORIZON, PADDED), SPEC, seed=seed)
    open_zeros(policy)
    bounds = Normalizer.bounds(torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 1.0]), kind="min_max")
    policy.set_normalization(Normalizer.identity(3), bounds)
    return policy


def make_buffer(feature_dim):
    buffer = ReplayBuffer(
        ReplayConfig(capacity=NUM_EPISODES * (STEPS + 1), gamma=0.9),
        state_dim=3, action_dim=2, cameras={"agent": (32, 32)}, feature_dim=feature_dim,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for i in range(NUM_EPISODES):
        state = rng.normal(size=(STEPS + 1, 3)).astype(np.float32)
        actions = rng.uniform(-1, 1, (STEPS, 2)).astype(np.float32)
        images = {"agent": rng.integers(0, 255, (STEPS + 1, 32, 32, 3), dtype=np.uint8)}
        buffer.add_episode(
            state=state, actions=actions, rewards=reward_of(state[:-1], actions), terminated=True, truncated=False,
            images=images, instruction=("go", "push the red block")[i % 2],
        )  # fmt: skip
    return buffer


COMPILED: dict[tuple[Any, Any], Any] = {}


def make_learner(name, horizon=1, seed=0) -> PolicyLearner:
    """Agents without a state of their own, so that one is compiled for all families."""
    config = CONFIG if name in TOKENS else replace(CONFIG, q_weight=0.5)
    learner = PolicyLearner(make_policy(name, seed), config, horizon=horizon, action_spec=SPEC.action, seed=seed)
    learner.agent = COMPILED.setdefault((learner.agent.spec, learner.agent.config), learner.agent)
    return learner


@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_is_improved_from_features_alone_and_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    learner = make_learner(name)
    policy, buffer, rng = learner.policy, make_buffer(learner.feature_dim), np.random.default_rng(0)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    learner.prepare(buffer)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "encode", None)  # nothing is left to encode
        metrics = train(learner, buffer, 2, rng)
    losses = {"td_loss", "distil_loss", "q_improved", "bc_loss"} | (set() if name in TOKENS else {"q_policy"})
    assert losses <= set(metrics)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    moved = {k for k, v in policy.state_dict().items() if not torch.equal(v, before[k])}
    learns = {k for k, v in policy.named_parameters() if v.requires_grad}
    assert moved == learns
    assert learns < set(dict(policy.named_parameters()))

    save_state(tmp_path / "state.pt", learner.state_dict() | {"rng": rng.bit_generator.state})
    wanted = train(learner, buffer, 1, rng)
    other, state = make_learner(name, seed=5), load_state(tmp_path / "state.pt")
    other.load_state_dict(state)
    rng.bit_generator.state = state["rng"]
    got = train(other, make_buffer(other.feature_dim), 1, rng)
    assert {k: float(v) for k, v in got.items()} == {k: float(v) for k, v in wanted.items()}
    assert_same(learner.state, other.state)
    ours, theirs = policy.state_dict(), other.policy.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    chunks = learner.explore(observation(4))
    assert chunks.shape == (4, 1, 2)
    assert torch.equal(chunks, other.explore(observation(4)))


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_have_no_gradient_of_q(name):
    with pytest.raises(ValueError, match="q_weight is the gradient of Q through a chunk, and tokens have none"):
        PolicyLearner(
            make_policy(name), replace(CONFIG, q_weight=0.5), horizon=1, action_spec=SPEC.action, seed=0
        )  # fmt: skip
