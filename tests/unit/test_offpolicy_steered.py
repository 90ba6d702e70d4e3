"""Steering a frozen policy by DSRL, EXPO and a residual: what they learn, what stays, files, exact states, bad fits."""

import functools
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.unit.offpolicy_batches import assert_same
from tests.unit.test_offpolicy_policy_learner import (
    POLICIES,
    SPEC,
    make_buffer,
    make_policy,
    observation,
    reward_of,
    train,
)
from vla_rl.core import ActionSpec
from vla_rl.flow.sampling import ode
from vla_rl.offpolicy.bc_flow import candidate_noise
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.dsrl import DSRLConfig
from vla_rl.offpolicy.edits import EditConfig
from vla_rl.offpolicy.expo import ExpoConfig
from vla_rl.offpolicy.networks import ActorNetConfig
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.residual import ResidualConfig
from vla_rl.offpolicy.steered_learner import SteeredLearner
from vla_rl.offpolicy.steering import stored_chunks
from vla_rl.offpolicy.wsrl import CarryOver
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.policies.steered import SteeredPolicy, SteeredPolicyConfig
from vla_rl.train.checkpoint import CheckpointError, load_state, save_state
from vla_rl.train.offpolicy import OfflineConfig, OffPolicyConfig, OnlineConfig
from vla_rl.train.offpolicy_stages import build_learner, check_stages

NET, CRITIC, MIN = ActorNetConfig((32,)), MLPCriticConfig(2, (32, 32)), EnsembleReduction("min", None)
EDIT = EditConfig(scale=0.3, net=replace(NET, layer_norm=False), learning_rate=1e-2, initial_temperature=0.01)
SAC = replace(
    DSRLConfig().sac,
    actor=NET,
    critic=CRITIC,
    actor_learning_rate=1e-2,
    critic_learning_rate=3e-3,
    initial_temperature=0.01,
)
AGENTS: dict[str, Any] = {
    "dsrl": DSRLConfig(sac=SAC),
    "expo": ExpoConfig(4, EDIT, CRITIC, critic_learning_rate=3e-3, target_reduction=MIN),
    "expo_stored": ExpoConfig(4, EDIT, CRITIC, critic_learning_rate=3e-3, target_reduction=MIN, num_stored=8),
    "residual": ResidualConfig(EDIT, CRITIC, critic_learning_rate=3e-3, target_reduction=MIN),
}


def make_learner(name: str, base: str = "flow_mlp", seed: int = 0, **agent: Any) -> SteeredLearner:
    config = replace(AGENTS[name], **agent)
    learner = build_learner(config, SPEC, 2, policy=make_policy(base), dataset=None, seed=seed)
    assert isinstance(learner, SteeredLearner)
    return learner


def single_step_learner(name: str, seed: int = 0, base_seed: int = 0) -> Any:
    """The bandit's episodes are of one step, so chunks are too."""
    base = build_policy(replace(POLICIES["flow_mlp"], action_horizon=1), SPEC, seed=base_seed)
    return build_learner(AGENTS[name], SPEC, 1, policy=base, dataset=None, seed=seed)


def noise_of(n: int = 64, horizon: int = 1) -> torch.Tensor:
    return torch.randn(n, horizon, 2, generator=torch.Generator().manual_seed(3))


def mean_reward(chunks: torch.Tensor) -> float:
    return float(reward_of(observation().state.numpy(), chunks[:, 0].clamp(-1, 1).numpy()).mean())


@pytest.fixture(scope="module")
def trained() -> Any:
    """By name: the learner, weights of its base before, and what it deployed before: compiled once for all tests."""

    @functools.cache
    def of(name: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
        learner = single_step_learner(name)
        base = {key: value.clone() for key, value in learner.policy.base.state_dict().items()}
        untrained = learner.policy.act(observation(), noise_of()).actions
        metrics = train(learner, make_buffer("flow_mlp", feature_dim=learner.feature_dim), 100)
        assert {"td_loss", "q_policy", "temperature"} <= set(metrics)
        learner.publish()
        return learner, base, untrained

    return of


@pytest.mark.parametrize("name", AGENTS)
def test_steering_finds_better_chunks_of_a_policy_that_stays_as_it_is(name, trained):
    (learner, base, untrained), obs, noise = trained(name), observation(), noise_of()
    policy = learner.policy
    of_base, of_zeros = (policy.base.act(obs, z).actions.clamp(-1, 1) for z in (noise, 0 * noise))
    if name.startswith("expo"):  # before: one of four base chunks, hardly edited
        draws = torch.from_numpy(np.array(candidate_noise(jnp.asarray(noise.numpy()), 8)))[:4]
        candidates = torch.stack([policy.base.act(obs, z).actions for z in draws]).clamp(-1, 1)
        assert float((untrained - candidates).abs().amax(dim=(2, 3)).min(dim=0).values.max()) < 0.03
    else:
        torch.testing.assert_close(untrained, of_zeros, atol=0.05, rtol=0.0)
    steered = policy.act(obs, noise).actions
    assert mean_reward(steered) > max(mean_reward(untrained), mean_reward(of_base)) + 0.25
    explored = learner.explore(obs)
    assert explored.shape == (64, 1, 2)
    assert not torch.equal(explored, steered)
    assert all(torch.equal(value, base[key]) for key, value in policy.base.state_dict().items())
    if name == "residual":
        assert float((steered - of_zeros).abs().max()) <= 0.3 + 1e-6


@pytest.mark.parametrize("name", AGENTS)
def test_a_steered_policy_is_one_folder_with_its_base(name, trained, tmp_path):
    (learner, _, untrained), obs = trained(name), observation()
    save_policy(learner.policy, tmp_path, spec=SPEC)
    stored: Any = load_policy(tmp_path, spec=SPEC)
    assert stored.config == learner.policy.config
    assert (stored.action_horizon, stored.action_dim) == (1, 2)
    deployed = stored.act(obs, noise_of()).actions
    assert torch.equal(deployed, learner.policy.act(obs, noise_of()).actions)
    assert not torch.equal(deployed, untrained)


@pytest.mark.parametrize("name", AGENTS)
def test_a_learner_goes_on_bit_for_bit_and_on_its_own_base_policy(name, trained, tmp_path):
    (whole, *_), rng = trained(name), np.random.default_rng(3)
    buffer = make_buffer("flow_mlp", 32, feature_dim=whole.feature_dim)
    whole.prepare(buffer)
    save_state(tmp_path / "state.pt", whole.state_dict() | {"rng": rng.bit_generator.state})
    wanted = train(whole, buffer, 2, rng)
    other, state = single_step_learner(name, seed=9), load_state(tmp_path / "state.pt")
    other.load_state_dict(state)
    rng.bit_generator.state = state["rng"]
    got = train(other, buffer, 2, rng)
    assert {k: float(v) for k, v in got.items()} == {k: float(v) for k, v in wanted.items()}
    assert_same(whole.state, other.state)
    for learner in (whole, other):
        learner.publish()
    assert torch.equal(whole.explore(observation()), other.explore(observation()))
    elsewhere = single_step_learner(name, base_seed=1)
    with pytest.raises(CheckpointError, match="steers another base policy"):
        elsewhere.load_state_dict(state)
    elsewhere.switch_from(whole, CarryOver(), seed=4)
    assert_same(whole.state, elsewhere.state)


@pytest.mark.parametrize("name", AGENTS)
def test_the_agent_sees_base_chunks_as_the_environment_executes_them(name):
    """Bounds of another width than the policy's own units: in the box and back."""
    wide = ActionSpec(low=(-4.0, -0.5), high=(4.0, 0.5), names=("dx", "dy"))
    policy = SteeredPolicy(SteeredPolicyConfig(POLICIES["flow_mlp"], AGENTS[name]), make_policy("flow_mlp"), wide)
    obs, noise = observation(8), noise_of(8, 2)
    prefix = policy.base.encode(policy.base.preprocess(obs))
    expected = (ode(policy.base, prefix, noise, 4) / torch.tensor([4.0, 0.5])).clamp(-1.0, 1.0)
    got = policy.base_chunks(jnp.asarray(prefix.pooled.numpy()), jnp.asarray(noise.numpy()))
    np.testing.assert_allclose(np.asarray(got), expected.detach().numpy(), atol=1e-6)
    chunk = policy.explore(obs, noise)
    assert float(chunk[..., 0].abs().max()) > 0.5 >= float(chunk[..., 1].abs().max())


def test_a_vla_is_steered_through_its_features_and_saved_with_its_encoder(tmp_path):
    learner = make_learner("residual", "tiny")
    assert learner.policy.base.encoder_is_frozen
    train(learner, make_buffer("tiny", 24, steps=3), 1)
    learner.publish()
    save_policy(learner.policy, tmp_path, spec=SPEC)
    stored: Any = load_policy(tmp_path, spec=SPEC)
    assert stored.base.action_normalizer.kind == "min_max"
    obs, noise = observation(4), noise_of(4, 2)
    assert torch.equal(stored.act(obs, noise).actions, learner.policy.act(obs, noise).actions)


def test_a_critic_of_every_prefix_gets_chunks_at_every_successor():
    learner = make_learner("expo", num_base=2, critic=PrefixCriticConfig(width=8, num_layers=1))
    assert learner.needs_prefixes
    metrics = train(learner, make_buffer("flow_mlp", 24, steps=3), 1)
    assert np.isfinite(float(metrics["td_loss"]))


def test_stored_base_chunks_are_drawn_with_the_features_and_learning_asks_for_no_others(monkeypatch):
    learner = make_learner("expo_stored", "tiny", num_base=2, num_stored=3)
    policy = learner.policy
    buffer = make_buffer("tiny", 6, steps=3, feature_dim=learner.feature_dim)
    learner.prepare(buffer)
    rows = np.flatnonzero(buffer.rows.featured)
    noise = torch.randn(3, len(rows), 2, 2, generator=torch.Generator().manual_seed(0))
    prefix = policy.base.encode(policy.base.preprocess(buffer.observations(rows)))
    expected = torch.stack([policy.chunks_of(prefix, z) for z in noise], dim=1)
    features, stored = np.split(buffer.rows.obs[rows, : learner.feature_dim], [policy.base.feature_dim], axis=1)
    np.testing.assert_array_equal(features, prefix.pooled.numpy())
    np.testing.assert_allclose(stored.reshape(expected.shape), expected.numpy(), atol=1e-6)
    monkeypatch.setattr(policy.base, "chunks", None)
    train(learner, buffer, 2)


def test_an_update_takes_different_ones_of_the_stored_chunks_and_in_time_all():
    chunks = jnp.arange(5.0)[:, None, None] * jnp.ones((1, 2, 3))  # five, known by their number
    rows = jnp.broadcast_to(jnp.concatenate([-jnp.ones(4), chunks.reshape(-1)]), (2, 50, 34))
    generator = np.random.default_rng(0)
    got = np.asarray(stored_chunks(rows, 4, (2, 3), 3, lambda shape: jnp.asarray(generator.normal(size=shape))))
    assert got.shape == (2, 3, 50, 2, 3)
    numbers = got[..., 0, 0]
    assert (got == numbers[..., None, None]).all()
    assert all(len(set(numbers[u, :, m])) == 3 for u in range(2) for m in range(50))
    counts = np.bincount(numbers.astype(int).reshape(-1), minlength=5)
    assert abs(counts / 60 - 1).max() < 0.5


def test_stored_chunks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_stored is 2: give 0, or at least num_base 4"):
        ExpoConfig(num_base=4, num_stored=2)
    with pytest.raises(ValueError, match="the same num_stored, not 0 and 8"):
        OffPolicyConfig(
            agent=AGENTS["expo_stored"],
            online_agent=AGENTS["expo"],
            horizon=2,
            offline=OfflineConfig(),
            online=OnlineConfig(execution_horizon=2),
        )


def test_what_cannot_be_steered_is_refused_before_a_run():
    config = OffPolicyConfig(agent=AGENTS["dsrl"], horizon=2, online=OnlineConfig(execution_horizon=2))
    check_stages(config, SPEC, make_policy("flow_mlp"))
    with pytest.raises(ValueError, match="horizon is 3, the policy predicts 2 steps; whole chunks are steered"):
        check_stages(replace(config, horizon=3), SPEC, make_policy("flow_mlp"))
    with pytest.raises(TypeError, match="steering a frozen policy needs a policy with LearnsFromPrefix"):
        check_stages(config, SPEC, torch.nn.Linear(2, 2))
    endless = replace(SPEC, action=replace(SPEC.action, high=(1.0, float("inf"))))
    with pytest.raises(ValueError, match="finite action bounds"):
        check_stages(config, endless, make_policy("flow_mlp"))
    with pytest.raises(ValueError, match="give it with --policy"):
        build_learner(AGENTS["expo"], SPEC, 2, policy=None, dataset=None, seed=0)
