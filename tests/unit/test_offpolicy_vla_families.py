"""Learning from replay on every family of VLAs: improved through a critic, or frozen and steered by an agent."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.unit.offpolicy_batches import assert_same
from tests.unit.test_offpolicy_policy_learner import CRITIC, SPEC, observation, reward_of, train
from tests.unit.test_offpolicy_steered import AGENTS
from tests.unit.tiny_families import FAMILIES, TOKENS, open_zeros, tiny_policy
from vla_rl.data.flat_prefix import FlatPrefix
from vla_rl.data.normalization import Normalizer
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.offpolicy.improvement import ImprovementConfig
from vla_rl.offpolicy.policy_learner import PolicyLearner, PolicyLearnerConfig
from vla_rl.policies.adaptation import AdaptationConfig, apply_adaptation
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


def make_policy(name, seed=0, temperature=1.0) -> Any:
    config: Any = tiny_policy(name, HORIZON, PADDED)
    if hasattr(config, "temperature"):
        config = replace(config, temperature=temperature)
    policy: Any = build_policy(config, SPEC, seed=seed)
    open_zeros(policy)
    bounds = Normalizer.bounds(torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 1.0]), kind="min_max")
    policy.set_normalization(Normalizer.identity(3), bounds)
    return policy


def make_buffer(feature_dim, num_episodes=NUM_EPISODES, steps=STEPS):
    buffer = ReplayBuffer(
        ReplayConfig(capacity=num_episodes * (steps + 1), gamma=0.9),
        state_dim=3, action_dim=2, cameras={"agent": (32, 32)}, feature_dim=feature_dim,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for i in range(num_episodes):
        state = rng.normal(size=(steps + 1, 3)).astype(np.float32)
        actions = rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
        images = {"agent": rng.integers(0, 255, (steps + 1, 32, 32, 3), dtype=np.uint8)}
        buffer.add_episode(
            state=state, actions=actions, rewards=reward_of(state[:-1], actions), terminated=True, truncated=False,
            images=images, instruction=("go", "push the red block")[i % 2],
        )  # fmt: skip
    return buffer


COMPILED: dict[tuple[Any, Any], Any] = {}


def compile_once(owner: Any) -> None:
    """Agents have no state of their own: the first of its kind serves all families, and is compiled for all."""
    owner.agent = COMPILED.setdefault((owner.agent.spec, owner.agent.config), owner.agent)


def make_learner(name, horizon=1, seed=0) -> PolicyLearner:
    config = CONFIG if name in TOKENS else replace(CONFIG, q_weight=0.5)
    learner = PolicyLearner(make_policy(name, seed), config, horizon=horizon, action_spec=SPEC.action, seed=seed)
    compile_once(learner)
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


@pytest.mark.parametrize("name", ["pi0", "openvla"])
def test_chunks_are_improved_as_executed_and_distilled_as_padded(name, monkeypatch):
    learner, seen = make_learner(name), {}
    policy, buffer = learner.policy, make_buffer(learner.feature_dim)
    assert chunk_shape(policy) == (HORIZON, PADDED)
    improve, prefix_loss = learner.agent.improve, policy.prefix_loss

    def spied_improve(state, obs, candidates, key):
        improved, values = improve(state, obs, candidates, key)
        seen["candidates"], seen["improved"] = candidates.shape, np.asarray(improved)
        return improved, values

    def spied_loss(prefix, actions, mask, generator):
        seen.setdefault("targets", (actions.clone(), mask.clone()))
        return prefix_loss(prefix, actions, mask, generator)

    monkeypatch.setattr(learner.agent, "improve", spied_improve)
    monkeypatch.setattr(policy, "prefix_loss", spied_loss)
    train(learner, buffer, 1)
    rows = 16
    assert seen["candidates"] == (3, rows, 1, 2)
    assert seen["improved"].shape == (rows, 1, 2)
    targets, mask = seen["targets"]
    assert targets.shape == (rows, HORIZON, PADDED)
    assert not targets[:, 0, 2:].any()
    in_bounds = torch.from_numpy(seen["improved"].copy()).clamp(
        -1.0, 1.0
    )  # of the environment, half as wide as the policy's
    torch.testing.assert_close(targets[:, :1, :2], in_bounds / torch.tensor([2.0, 1.0]), atol=1e-6, rtol=0.0)
    assert mask.tolist() == [[True, False]] * rows  # steps that are not executed bear no loss
    learner.config = replace(learner.config, explore_improved=True)
    assert learner.explore(observation(rows)).shape == (rows, 1, 2)


@pytest.mark.parametrize("name", ["pi0", "hf_flow", "openvla_oft"])
def test_a_bfloat16_encoder_passes_through_replay_exactly(name):
    policy = make_policy(name)
    apply_adaptation(policy, AdaptationConfig(train=("expert",), precision="bfloat16"))
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    learner = PolicyLearner(policy, CONFIG, horizon=1, action_spec=SPEC.action, seed=0)
    compile_once(learner)
    metrics = train(learner, make_buffer(learner.feature_dim), 1)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    after = policy.state_dict()
    assert any(value.dtype == torch.bfloat16 for value in after.values())
    assert all(torch.equal(value, before[k]) for k, value in after.items() if value.dtype == torch.bfloat16)
    flat = FlatPrefix(policy)
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(observation(5)))
        again = flat.unflatten(flat.flatten(prefix))
        assert [kv.keys.dtype for kv in again.layers] == [kv.keys.dtype for kv in prefix.layers]
        noise = noise_of(5, chunk_shape(policy)[1])
        assert torch.equal(policy.chunks(again, noise), policy.chunks(prefix, noise))


def test_distillation_makes_a_vla_act_better():
    """By improved chunks alone, from data of uniform actions, which earn -1.4 and best ones 0."""
    config = replace(CONFIG, bc_weight=0.0, policy_learning_rate=3e-3, policy_batch_size=64)
    learner = PolicyLearner(make_policy("pi0"), config, horizon=1, action_spec=SPEC.action, seed=0)
    compile_once(learner)

    def mean_reward() -> float:
        obs = observation(64)
        return float(reward_of(obs.state.numpy(), learner.explore(obs)[:, 0].clamp(-1, 1).numpy()).mean())

    before = mean_reward()
    train(learner, make_buffer(learner.feature_dim, num_episodes=256, steps=1), 80)
    assert before < -1.5
    assert mean_reward() > -0.7


# ------------------------------------------------------------------------------------------------------------ steering
def make_steered(name: str, base: str, seed: int = 0) -> Any:
    learner: Any = build_learner(AGENTS[name], SPEC, HORIZON, policy=make_policy(base), dataset=None, seed=seed)
    compile_once(learner.policy)
    learner.agent = learner.policy.agent
    return learner


def noise_of(n: int, width: int = 2) -> torch.Tensor:
    return torch.randn(n, HORIZON, width, generator=torch.Generator().manual_seed(1))


STEERED = [(name, base) for name in AGENTS for base in FAMILIES if base in ("pi0", "openvla_oft_tokens")]
STEERED += [("expo", base) for base in FAMILIES if ("expo", base) not in STEERED]


@pytest.mark.parametrize(("name", "base"), STEERED)
def test_a_frozen_vla_is_steered_and_saved_with_its_agent(name, base, tmp_path):
    learner = make_steered(name, base)
    before = {k: v.clone() for k, v in learner.policy.state_dict().items()}
    buffer, rng = make_buffer(learner.feature_dim), np.random.default_rng(0)
    metrics = train(learner, buffer, 2, rng)
    learner.publish()
    assert all(np.isfinite(np.asarray(value)).all() for value in metrics.values())
    after = learner.policy.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("base."))
    assert any(not torch.equal(after[k], before[k]) for k in after if not k.startswith("base."))

    save_policy(learner.policy, tmp_path / "policy", spec=SPEC)
    stored: Any = load_policy(tmp_path / "policy", spec=SPEC)
    compile_once(stored)
    assert stored.config == learner.policy.config
    assert stored.config.base == learner.policy.base.config
    chunk = stored.act(observation(4), noise_of(4)).actions
    assert chunk.shape == (4, HORIZON, 2)
    assert float(chunk.abs().max()) <= 1.0
    assert torch.equal(chunk, learner.policy.act(observation(4), noise_of(4)).actions)

    save_state(tmp_path / "state.pt", learner.state_dict() | {"rng": rng.bit_generator.state})
    wanted = train(learner, buffer, 1, rng)
    other, state = make_steered(name, base, seed=5), load_state(tmp_path / "state.pt")
    other.load_state_dict(state)
    rng.bit_generator.state = state["rng"]
    got = train(other, buffer, 1, rng)
    assert {k: float(v) for k, v in got.items()} == {k: float(v) for k, v in wanted.items()}
    assert_same(learner.state, other.state)


@pytest.mark.parametrize("base", ["pi0", "openvla_oft_tokens"])
def test_base_chunks_have_the_environments_width(base):
    learner = make_steered("dsrl", base)
    policy, obs, noise = learner.policy, observation(6), noise_of(6)
    assert (policy.action_dim, chunk_shape(policy.base)) == (2, (HORIZON, PADDED))
    prefix = policy.base.encode(policy.base.preprocess(obs))
    rows = FlatPrefix(policy.base).flatten(prefix)
    got = torch.from_numpy(np.array(policy.base_chunks(jnp.asarray(rows.numpy()), jnp.asarray(noise.numpy()))))
    with torch.no_grad():
        wide = policy.base.chunks(prefix, functional.pad(noise, (0, PADDED - 2)))
    assert wide.shape == (6, HORIZON, PADDED)
    expected = (wide[..., :2] * torch.tensor([2.0, 1.0])).clamp(-1.0, 1.0)  # the policy's units are the wider ones
    assert 0.0 < float((expected.abs() == 1.0).float().mean()) < 1.0
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("name", TOKENS)
def test_greedy_tokens_read_no_noise_so_dsrl_cannot_steer_them(name):
    policy = make_policy(name, temperature=0.0)
    prefix = policy.encode(policy.preprocess(observation(4)))
    width = chunk_shape(policy)[1]
    with torch.no_grad():
        assert torch.equal(policy.chunks(prefix, noise_of(4, width)), policy.chunks(prefix, -noise_of(4, width)))
    with pytest.raises(ValueError, match="takes the most probable tokens whatever it is; give it a temperature"):
        build_learner(AGENTS["dsrl"], SPEC, HORIZON, policy=policy, dataset=None, seed=0)
