"""A torch policy that learns from replay through a JAX critic: features, improvement, what stays, exact states."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from tests.unit.offpolicy_batches import assert_same
from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.flow.sampling import ode
from vla_rl.offpolicy.calql import ConservativeConfig
from vla_rl.offpolicy.conrft import conrft_offline, conrft_online
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.improvement import ImprovementConfig
from vla_rl.offpolicy.pa_rl import CriticAgentConfig
from vla_rl.offpolicy.policy_learner import PolicyLearner, PolicyLearnerConfig
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.wsrl import CarryOver
from vla_rl.policies.build import build_policy
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.train.checkpoint import load_state, save_state

SPEC = EnvSpec(
    name="bandit",
    cameras={"agent": CameraSpec(32, 32)},
    state_names=("a", "b", "c"),
    action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0), names=("dx", "dy")),
    max_episode_steps=4,
    control_hz=20.0,
)
CRITIC = CriticAgentConfig(
    critic=MLPCriticConfig(2, (32, 32)),
    learning_rate=3e-3,
    target_reduction=EnsembleReduction("min", None),
    improvement=ImprovementConfig(num_candidates=4, num_kept=2, num_steps=5, step_size=0.05),
)
CONFIG = PolicyLearnerConfig(critic=CRITIC, policy_learning_rate=3e-3, policy_batch_size=64)
POLICIES = {
    "flow_mlp": FlowMLPConfig(action_horizon=2, width=32, num_layers=2),
    "tiny": TinyVLAConfig(image_size=32, action_horizon=2, vision_channels=8, vision_blocks=2),
}


def make_policy(name, seed=0) -> Any:
    policy: Any = build_policy(POLICIES[name], SPEC, seed=seed)
    identity = Normalizer.identity(3)
    policy.set_normalization(identity, Normalizer.bounds(-torch.ones(2), torch.ones(2), kind="min_max"))
    return policy


def make_learner(name, config=CONFIG, horizon=1, seed=0):
    return PolicyLearner(make_policy(name), config, horizon=horizon, action_spec=SPEC.action, seed=seed)


def reward_of(state, actions):
    """Best at (0.6, -0.6) times the state's first sign."""
    best = 0.6 * np.sign(state[..., :1]) * np.array([1.0, -1.0])
    return -np.square(actions - best).sum(axis=-1)


def make_buffer(name, num_episodes=128, steps=1, feature_dim=None):
    """Uniform actions; the reward is known at once, an episode is one decision."""
    feature_dim = feature_dim or make_policy(name).feature_dim
    cameras = {"agent": (32, 32)} if name == "tiny" else {}
    config = ReplayConfig(capacity=num_episodes * (steps + 1), gamma=0.9)
    buffer = ReplayBuffer(config, state_dim=3, action_dim=2, cameras=cameras, feature_dim=feature_dim)
    rng = np.random.default_rng(0)
    for _ in range(num_episodes):
        state = rng.normal(size=(steps + 1, 3)).astype(np.float32)
        actions = rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
        images = {c: rng.integers(0, 255, (steps + 1, 32, 32, 3), dtype=np.uint8) for c in cameras}
        rewards = reward_of(state[:-1], actions)
        buffer.add_episode(
            state=state, actions=actions, rewards=rewards, terminated=True, truncated=False, images=images,
            instruction="go",
        )  # fmt: skip
    return buffer


def observation(n=64):
    rng = torch.Generator().manual_seed(7)
    images = {"agent": torch.randint(0, 255, (n, 32, 32, 3), generator=rng, dtype=torch.uint8)}
    return Observation(images, torch.randn(n, 3, generator=rng), ("go",) * n)


def train(learner, buffer, num_calls, rng=None):
    rng = rng or np.random.default_rng(0)
    learner.prepare(buffer)
    metrics = {}
    for _ in range(num_calls):
        batches = buffer.sample(32, rng, horizon=learner.horizon, prefixes=learner.needs_prefixes, num_minibatches=2)
        metrics = learner.update(batches)
    return metrics


@pytest.mark.parametrize("name", POLICIES)
def test_features_hold_the_whole_prefix(name):
    policy = make_policy(name)
    prefix = policy.encode(policy.preprocess(observation(5)))
    again = policy.prefix_of(prefix.pooled)
    assert torch.equal(again.tokens, prefix.tokens)
    assert torch.equal(again.mask, prefix.mask)
    assert torch.equal(again.pooled, prefix.pooled)
    with pytest.raises(ValueError, match="features must be"):
        policy.prefix_of(prefix.pooled[:, 1:])


def mean_reward(learner):
    obs = observation()
    chunks = learner.explore(obs)
    assert chunks.shape == (64, 1, 2)
    return float(reward_of(obs.state.numpy(), chunks[:, 0].clamp(-1, 1).numpy()).mean())


def test_distillation_moves_the_policy_to_higher_values_and_imitation_alone_does_not():
    learner, buffer = make_learner("flow_mlp"), make_buffer("flow_mlp")
    learner.config = replace(CONFIG, improve_weight=0.0, bc_weight=1.0)
    metrics = train(learner, buffer, 30)
    assert "distil_loss" not in metrics
    imitation = mean_reward(learner)
    assert imitation < -0.9  # uniform actions earn -(2 * (1/3 + 0.36)) = -1.39
    learner.config = CONFIG
    metrics = train(learner, buffer, 60)
    assert "bc_loss" not in metrics
    after = mean_reward(learner)
    assert after > -0.45
    learner.config = replace(CONFIG, explore_improved=True)
    assert mean_reward(learner) > after  # the critic's steps on top


def test_the_encoder_of_a_vla_is_left_alone_and_pictures_are_encoded_once(monkeypatch):
    """With a critic of every prefix, as CO-RFT has it."""
    few = ImprovementConfig(num_candidates=2, num_kept=1, num_steps=1, step_size=0.05)
    critic_agent = replace(CRITIC, critic=PrefixCriticConfig(width=8, num_layers=1), improvement=few)
    config = replace(CONFIG, critic=critic_agent, bc_weight=0.5, critic_warmup_calls=2)
    learner, buffer = make_learner("tiny", config, horizon=2), make_buffer("tiny", 24, steps=3)
    before = {name: value.clone() for name, value in learner.policy.state_dict().items()}
    train(learner, buffer, 2)
    assert all(torch.equal(v, before[k]) for k, v in learner.policy.state_dict().items())  # the critic's warm-up
    assert int(learner.state.num_updates) == 4
    monkeypatch.setattr(learner.policy, "encode", None)  # nothing is left to encode
    metrics = train(learner, buffer, 2)
    assert {"distil_loss", "bc_loss", "q_improved", "td_loss"} <= set(metrics)
    changed = {k.split(".")[0] for k, v in learner.policy.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"expert"}


def test_the_critic_sees_a_policys_chunks_as_replay_stores_them():
    """A dimension that never moved in the demonstrations is normalised by 1: the policy's values around it reach beyond
    the bounds on one side, where nothing that is executed can correct a critic."""
    learner = make_learner("flow_mlp")
    offset, scale = torch.tensor([0.0, -1.0]), torch.tensor([0.5, 1.0])
    learner.policy.set_normalization(Normalizer.identity(3), Normalizer("min_max", offset, scale))
    proposed = torch.randn(64, 1, 2, generator=torch.Generator().manual_seed(1))
    executed = SPEC.action.clamp(learner.policy.unnormalize_actions(proposed))
    assert not torch.equal(executed, learner.policy.unnormalize_actions(proposed))
    batch = make_buffer("flow_mlp", 64)
    learner.prepare(batch)
    stored = batch.batch(batch.starts(1), 1)._replace(actions=executed.numpy())
    seen = learner._seen_by_critic(stored).actions
    np.testing.assert_array_equal(learner._to_critic(proposed).numpy(), seen)
    assert np.abs(seen).max() <= 1.0
    improved, _ = learner._improve(torch.from_numpy(stored.obs[:, : learner.feature_dim]), proposed.expand(4, 64, 1, 2))
    raw = learner.policy.unnormalize_actions(improved)
    assert torch.allclose(SPEC.action.clamp(raw), raw, atol=1e-6)  # what is distilled can be executed


def test_a_learner_goes_on_bit_for_bit(tmp_path):
    conservative = ConservativeConfig(form="expectation", num_actions=1)
    config = replace(CONFIG, critic=replace(CRITIC, conservative=conservative))
    buffer, rng = make_buffer("flow_mlp", 32), np.random.default_rng(3)
    whole = make_learner("flow_mlp", config)
    train(whole, buffer, 2, rng)
    save_state(tmp_path / "state.pt", whole.state_dict() | {"rng": rng.bit_generator.state})
    wanted = train(whole, buffer, 2, rng)
    other, state = make_learner("flow_mlp", config, seed=9), load_state(tmp_path / "state.pt")
    other.load_state_dict(state)
    rng.bit_generator.state = state["rng"]
    got = train(other, buffer, 2, rng)
    assert {k: float(v) for k, v in got.items()} == {k: float(v) for k, v in wanted.items()}
    assert_same(whole.state, other.state)
    assert all(torch.equal(v, whole.policy.state_dict()[k]) for k, v in other.policy.state_dict().items())
    assert torch.equal(whole.explore(observation()), other.explore(observation()))


def test_the_switch_takes_policy_critic_and_optimiser_along():
    offline = make_learner("flow_mlp")
    train(offline, make_buffer("flow_mlp", 32), 2)
    online = make_learner("flow_mlp", replace(CONFIG, policy_learning_rate=1e-5), seed=4)
    online.switch_from(offline, CarryOver(), seed=4)
    assert_same(offline.state, online.state)
    assert all(torch.equal(v, offline.policy.state_dict()[k]) for k, v in online.policy.state_dict().items())
    moments, theirs = online._optimizer.state_dict(), offline._optimizer.state_dict()
    assert torch.equal(moments["state"][0]["exp_avg"], theirs["state"][0]["exp_avg"])
    assert moments["param_groups"][0]["lr"] == 1e-5
    kept = theirs["state"][0]["exp_avg"].clone()
    online._optimizer.state[online._trained[0]]["exp_avg"].zero_()
    assert torch.equal(theirs["state"][0]["exp_avg"], kept)  # a copy crossed
    fresh = make_learner("flow_mlp", seed=4)
    fresh.switch_from(offline, CarryOver(moments=False), seed=4)
    assert fresh._optimizer.state_dict()["state"] == {}


def test_wrong_policies_and_horizons_are_named():
    with pytest.raises(ValueError, match="horizon is 3, the policy predicts 2 steps"):
        make_learner("flow_mlp", horizon=3)
    with pytest.raises(TypeError, match="learning from replay"):
        PolicyLearner(torch.nn.Linear(2, 2), CONFIG, horizon=1, action_spec=SPEC.action, seed=0)


# ------------------------------------------------------------------------------------------------------------- ConRFT
def torch_q(learner, features, actions):
    """Mean of the critic's members in torch, written out: Linear, LayerNorm, ReLU, twice; then Linear."""
    mlp = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), nnx.to_pure_dict(learner.state.params["critic"]))["mlp"]
    h = torch.cat([features, actions.flatten(1)], dim=1).expand(2, -1, -1)
    for linear, norm in zip(mlp["linear"].values(), mlp["norm"].values(), strict=True):
        h = h @ linear["kernel"] + linear["bias"]
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        h = torch.relu(h * norm["scale"] + norm["bias"])
    return (h @ mlp["out"]["kernel"] + mlp["out"]["bias"])[..., 0].mean(dim=0)


def test_the_policys_gradient_of_q_is_that_through_a_critic_in_torch():
    """Bounds twice as wide as the policy's own, so the chain has the units in it; some actions are beyond them."""
    wide = ActionSpec(low=(-2.0, -1.0), high=(2.0, 1.0), names=("dx", "dy"))
    learner = PolicyLearner(make_policy("flow_mlp"), CONFIG, horizon=1, action_spec=wide, seed=0)
    train(learner, make_buffer("flow_mlp", 32), 2)
    policy, features = learner.policy, observation(16).state
    policy.output.bias.data[2] = 5.0  # the second step is not executed
    policy.output.bias.data[1] = -1.0
    policy.zero_grad()
    before = learner._generator.get_state()
    towards_q, q_policy = learner._towards_q(policy.prefix_of(features))
    towards_q.backward()
    gradients = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    learner._generator.set_state(before)
    noise = torch.randn(16, 2, 2, generator=learner._generator)
    chunk = ode(policy, policy.prefix_of(features), noise, 4)[:, :1] / torch.tensor([2.0, 1.0])
    assert 0.2 < float((chunk.abs() > 1).float().mean()) < 0.8
    values = torch_q(learner, features, chunk.clamp(-1.0, 1.0))
    values.mean().backward()
    assert q_policy == pytest.approx(float(values.detach().mean()), abs=1e-5)
    for p, gradient in zip(policy.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad, atol=1e-6, rtol=1e-4)
    assert max(float(g.abs().max()) for g in gradients) > 1e-3


def test_conrft_follows_q_where_imitation_alone_stays():
    learner, buffer = make_learner("flow_mlp"), make_buffer("flow_mlp")
    learner.config = offline = replace(CONFIG, improve_weight=0.0, bc_weight=1.0)
    train(learner, buffer, 40)
    imitation = mean_reward(learner)
    learner.config = conrft_online(offline)
    metrics = train(learner, buffer, 60)
    assert set(metrics) >= {"bc_loss", "q_policy"}
    assert "distil_loss" not in metrics
    assert mean_reward(learner) > -0.45 > imitation + 0.4


def test_conrft_stages_differ_as_published_and_share_the_critic():
    offline, online = conrft_offline(), conrft_online()
    weights = [(c.improve_weight, c.bc_weight, c.q_weight) for c in (offline, online)]
    assert weights == [(0.0, 1.0, 0.0), (0.0, 0.1, 1.0)]
    assert offline.critic.conservative is not None
    assert online.critic == replace(offline.critic, conservative=None)
