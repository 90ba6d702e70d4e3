"""CO-RFT: cloning, what crosses to stage 2, the calibrated expectation gap by hand, and that it beats the data."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unit.offpolicy_batches import assert_same
from tests.unit.offpolicy_episodes import SPEC, episode_batch
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.offpolicy.co_rft import BehaviorCloning, BehaviorCloningConfig, CoRFT, CoRFTConfig, expectation_gap
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.td3 import TD3, TD3Config

ACTOR = ActorNetConfig((16,), out_scale=1.0)
TD3_CONFIG = TD3Config(
    actor=ACTOR, critic=PrefixCriticConfig(num_members=2, width=16, num_layers=1), target_noise=0.0, tau=0.05
)
CONFIG = CoRFTConfig(td3=TD3_CONFIG, alpha=0.5)
BATCH = episode_batch()


@pytest.fixture(scope="module")
def agent():
    return CoRFT(SPEC, CONFIG)


@pytest.fixture(scope="module")
def params(agent):
    return agent.init(0).params


# ------------------------------------------------------------------------------------------------------------- stage 1
def test_cloning_never_sees_steps_past_the_end_of_an_episode():
    cloner = BehaviorCloning(SPEC, BehaviorCloningConfig(ACTOR, learning_rate=3e-3))
    spoiled = np.where(BATCH.mask[..., None], BATCH.actions, 77.0).astype(np.float32)

    clean, first = cloner.update(cloner.init(0), BATCH.fold(2))
    dirty, _ = cloner.update(cloner.init(0), BATCH._replace(actions=spoiled).fold(2))

    assert_same(clean, dirty)
    assert clean.num_updates == 2
    for _ in range(60):
        clean, last = cloner.update(clean, BATCH.fold(2))
    assert last["bc_loss"] < 0.5 * first["bc_loss"]
    chunk = cloner.act(clean, BATCH.obs, np.ones((8, 3, 2), np.float32), explore=True)
    assert_same(chunk, cloner.act(clean, BATCH.obs, np.zeros((8, 3, 2), np.float32), explore=False))


def test_stage_2_starts_from_the_cloned_actor_and_a_new_critic(agent):
    cloned = BehaviorCloning(SPEC, BehaviorCloningConfig(ACTOR)).init(5)

    state = agent.init_from(cloned, seed=1)

    assert_same(state.params["actor"], cloned.params["actor"])
    assert_same(state.params["target_actor"], cloned.params["actor"])
    assert_same(state.params["critic"], agent.init(1).params["critic"])
    agent.update(state, BATCH.fold(2))  # reuses the state's memory, and must leave stage 1's alone
    assert np.isfinite(jax.tree.leaves(cloned.params["actor"])[0]).all()


def test_an_actor_of_another_size_is_refused(agent):
    other = BehaviorCloning(SPEC, BehaviorCloningConfig(ActorNetConfig((8,)))).init(0)

    with pytest.raises(ValueError, match="stage 1 trained another actor"):
        agent.init_from(other, seed=0)


# ------------------------------------------------------------------------------------------------------------- stage 2
@pytest.mark.parametrize("calibrate", [True, False])
def test_the_gap_by_hand(agent, params, calibrate):
    bound = np.linspace(-2.0, 2.0, 8).astype(np.float32)
    bound[0] = -np.inf  # nothing is known of this row
    batch = BATCH._replace(mc_return=bound, weight=np.arange(1, 9, dtype=np.float32))

    gap, metrics = expectation_gap(
        agent.nets, replace(CONFIG, calibrate=calibrate), params["critic"], params, batch, jax.random.key(0)
    )

    q_data = agent.nets.critic(params["critic"], batch.obs, batch.actions)[..., 0]
    chunks = agent.nets.actor(params["actor"], batch.obs)
    q_policy = agent.nets.critic(params["critic"], batch.obs, chunks)[..., 0]
    pushed = np.maximum(q_policy, bound[None, :, None]) if calibrate else q_policy
    rows = np.asarray(pushed - q_data).mean(axis=(0, 2))
    assert float(gap) == pytest.approx(np.average(rows, weights=batch.weight), rel=1e-4)
    share = float(metrics["calibrated_share"])
    assert share == pytest.approx(float((np.asarray(q_policy) < bound[None, :, None]).mean()), abs=1e-6)
    assert 0.0 < share < 1.0


def test_no_value_below_the_return_of_the_data_is_pushed_down(agent, params):
    """With a bound above all values, what is left of the gap's gradient is the push up on the data."""
    batch = BATCH._replace(mc_return=np.full(8, 50.0, np.float32))

    def gap(critic):
        return expectation_gap(agent.nets, CONFIG, critic, params, batch, jax.random.key(0))[0]

    def push_up(critic):
        return -agent.nets.critic(critic, batch.obs, batch.actions).mean()

    gradients = [jax.tree.leaves(jax.jit(jax.grad(f))(params["critic"])) for f in (gap, push_up)]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_without_the_term_it_is_td3(agent):
    with_none = CoRFT(SPEC, replace(CONFIG, alpha=0.0))

    here, metrics = with_none.update(with_none.init(0), BATCH.fold(2))
    td3 = TD3(SPEC, TD3_CONFIG)
    there, _ = td3.update(td3.init(0), BATCH.fold(2))
    full, _ = agent.update(agent.init(0), BATCH.fold(2))

    assert "conservative_gap" not in metrics
    assert_same(here.params, there.params)
    assert jax.tree.structure(full.params) == jax.tree.structure(there.params)  # TD3 goes on with it online
    assert not np.array_equal(*(jax.tree.leaves(s.params["critic"])[0] for s in (full, there)))


@pytest.mark.parametrize("change", [{"alpha": -1.0}, {"num_actions": 0}, {"num_actions": 4}])
def test_options_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match=r"needs alpha|all the same"):
        replace(CONFIG, **change)


# ------------------------------------------------------------------------------------------------------------ it learns
LINE = AgentSpec(obs_dim=1, action_horizon=3, action_dim=1)


def _noisy_demonstrations() -> ReplayBuffer:
    """Episodes of three steps at a place x in [-0.7, 0.7], which never moves; a step earns -(a - x)^2.

    The demonstrator goes for x + 0.4, with noise of 0.3: cloning learns its bias, and only reward tells better.
    """
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(ReplayConfig(capacity=2000, gamma=0.9, reward_low=-4.0), state_dim=1, action_dim=1)
    for _ in range(400):
        x = rng.uniform(-0.7, 0.7)
        actions = np.clip(x + 0.4 + 0.3 * rng.normal(size=(3, 1)), -1, 1)
        buffer.add_episode(
            state=np.full((4, 1), x),
            actions=actions,
            rewards=-np.square(actions[:, 0] - x),
            terminated=True,
            truncated=False,
        )
    return buffer


def _error(agent, state) -> float:
    """Mean squared distance of the deployed chunk to the best one."""
    places = np.linspace(-0.6, 0.6, 25, dtype=np.float32)[:, None]
    chunks = agent.act(state, places, np.zeros((25, 3, 1), np.float32), explore=False)
    return float(jnp.square(chunks[..., 0] - places).mean())


def test_it_gets_better_than_what_it_was_shown():
    buffer, rng = _noisy_demonstrations(), np.random.default_rng(1)
    config = CoRFTConfig(replace(TD3_CONFIG, actor_learning_rate=1e-3, critic_learning_rate=3e-3), 0.02)
    cloner, agent = BehaviorCloning(LINE, BehaviorCloningConfig(ACTOR, 1e-2)), CoRFT(LINE, config)

    def batches(num: int):
        return buffer.sample(64, rng, horizon=3, prefixes=True, num_minibatches=num)

    cloned, _ = cloner.update(cloner.init(0), batches(200))
    state = agent.init_from(cloned, seed=0)
    before = _error(agent, state)
    for _ in range(200):
        state, metrics = agent.update(state, batches(2))

    assert before == pytest.approx(0.15, abs=0.05)  # the demonstrator's 0.4^2, less where it was clipped
    assert _error(agent, state) < 0.4 * before
    assert 0.0 < float(metrics["calibrated_share"]) < 1.0
