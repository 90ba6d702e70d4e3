"""Q-chunking: the flow and its loss by hand, the target, the distillation, and the biased control."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unit.offpolicy_batches import ACTION_DIM, HORIZON, OBS_DIM, random_batch
from tests.unit.offpolicy_chunks import stacked
from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.bc_flow import FlowNetConfig, flow_matching_loss, integrate_flow
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.networks import AgentSpec
from vla_rl.offpolicy.qc import QC, QCConfig

SPEC = AgentSpec(OBS_DIM, HORIZON, ACTION_DIM)
KEY = jax.random.key(1)
NOISE = jax.random.normal(KEY, (32, HORIZON, ACTION_DIM))
SMALL = QCConfig(
    num_samples=4,
    flow=FlowNetConfig((16,), num_steps=3),
    critic=MLPCriticConfig(2, (16,), activation="gelu"),
    learning_rate=1e-2,
)
agent_of = functools.lru_cache(functools.partial(QC, SPEC))  # an update is compiled once for all tests


def small(**changes: Any) -> QCConfig:
    return dataclasses.replace(SMALL, **changes)


def constant_velocity(params: Any, obs: Any, x_t: Any, flow_time: Any) -> Any:
    return jnp.full(x_t.shape, params)


# ------------------------------------------------------------------------------------------------------------- flow
def test_masked_steps_count_neither_in_the_loss_nor_in_its_divisor() -> None:
    """Velocity 1, noise 2, action a: the error of a step is (1 - (2 - a))^2 = (a - 1)^2."""
    actions = np.asarray([[[0.0], [0.5]], [[-1.0], [100.0]]], np.float32)
    mask, weight = np.asarray([[True, True], [True, False]]), np.asarray([1.0, 3.0], np.float32)
    batch = random_batch(2, mask=mask, weight=weight)
    noise, flow_time = np.full(actions.shape, 2.0, np.float32), np.asarray([0.3, 0.9], np.float32)

    def loss(actions: np.ndarray) -> float:
        return float(flow_matching_loss(constant_velocity, 1.0, batch._replace(actions=actions), noise, flow_time))

    assert loss(actions) == pytest.approx((1.0 + 0.25 + 3.0 * 4.0) / 5.0)
    padded = actions.copy()
    padded[1, 1] = -7.0
    assert loss(padded) == loss(actions)


def test_flow_is_integrated_from_noise_to_action_in_the_projects_time() -> None:
    """The point mass c has the velocity (x - c) / t, with which Euler from t = 1 arrives at c whatever the steps."""
    target = 0.3

    def point_mass(params: Any, obs: Any, x_t: Any, flow_time: Any) -> Any:
        return (x_t - target) / flow_time[:, None, None]

    noise = jax.random.normal(KEY, (2, 5, HORIZON, ACTION_DIM))
    chunks = integrate_flow(point_mass, None, jnp.zeros((5, OBS_DIM)), noise, 4)
    np.testing.assert_allclose(chunks, np.full(noise.shape, target), atol=1e-6)
    np.testing.assert_allclose(  # v = noise - action, so the action is noise - v; clipped to the action space
        integrate_flow(constant_velocity, 0.5, jnp.zeros((5, OBS_DIM)), noise, 4),
        np.clip(noise - 0.5, -1, 1),
        atol=1e-6,
    )


# ----------------------------------------------------------------------------------------------------------- targets
def test_target_is_the_target_critics_value_of_the_online_critics_pick() -> None:
    """The key of the step is the state's, so the very candidates can be drawn again here."""
    agent, batch = agent_of(SMALL), random_batch(4)
    state = agent.init(0)
    target = agent.init(1).params["critic"]
    state = state._replace(params={**state.params, "target_critic": target})
    noise = jax.random.normal(jax.random.split(state.key, 8)[1], (4, 4, HORIZON, ACTION_DIM))
    candidates = integrate_flow(agent.nets["flow"], state.params["flow"], batch.next_obs, noise, 3)

    def values(params: Any) -> np.ndarray:
        return np.stack(
            [np.asarray(agent.nets["critic"](params, batch.next_obs, c))[:, :, 0, 0] for c in candidates], 1
        )

    online, by_target = values(state.params["critic"]).mean(axis=0), values(target).mean(axis=0)
    picked = np.take_along_axis(by_target, online.argmax(axis=0)[None], axis=0)[0]
    assert not np.allclose(picked, by_target.max(axis=0))
    expected = float((batch.reward + batch.discount * picked).mean())
    _, metrics = agent.update(state, stacked(batch))
    assert float(metrics["td_target"]) == pytest.approx(expected, rel=1e-4)


def test_distillation_has_the_same_noise_in_the_flow_and_in_the_one_step_policy() -> None:
    agent, batch = agent_of(small(policy="distilled")), random_batch(4)
    params, keys = agent.init(0).params, jax.random.split(KEY)
    loss, metrics = agent._distillation(params["one_step"], params, batch, keys)
    z = jax.random.normal(keys[0], (1, 4, HORIZON, ACTION_DIM))
    flow = integrate_flow(agent.nets["flow"], params["flow"], batch.obs, z, 3)[0]
    chunk = agent.nets["one_step"](params["one_step"], batch.obs, z[0])
    distance = float(jnp.square(chunk - flow).mean())
    q = float(agent.nets["critic"](params["critic"], batch.obs, jnp.clip(chunk, -1, 1)).mean())
    assert float(metrics["distillation"]) == pytest.approx(distance, rel=1e-5)
    assert float(loss) == pytest.approx(100.0 * distance - q, rel=1e-5)


def test_no_gradient_crosses_from_one_part_to_another() -> None:
    """The flow learns by flow matching alone, and the critic by TD alone: both as without the one-step policy."""
    agent, batch = agent_of(small(policy="distilled")), random_batch(4)
    params, keys = agent.init(0).params, jax.random.split(KEY, 7)
    trained = {name: params[name] for name in ("critic", "flow", "one_step")}
    whole = jax.grad(lambda t: agent._loss(t, params, batch, keys)[0])(trained)
    apart = jax.grad(lambda one: agent._distillation(one, params, batch, keys[5:])[0])(params["one_step"])
    flow = jax.grad(lambda t: agent._loss(t, params, batch, keys)[1]["flow_loss"])(trained)
    critic = jax.grad(lambda t: agent._loss(t, params, batch, keys)[1]["td_loss"])(trained)
    for name, expected in (("one_step", apart), ("flow", flow["flow"]), ("critic", critic["critic"])):
        for a, b in zip(*map(jax.tree.leaves, (whole[name], expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the control
def mixed_quality(num: int) -> ReplayBatch:
    """One state; the first action is always 0, the second s from -0.8 to 0.8, and the reward 0.5 + s."""
    second = np.linspace(-0.8, 0.8, num, dtype=np.float32)
    actions = np.zeros((num, HORIZON, ACTION_DIM), np.float32)
    actions[:, 1] = second[:, None]
    return random_batch(
        num, obs=np.zeros((num, OBS_DIM), np.float32), actions=actions,
        reward=0.5 + second, discount=np.zeros(num, np.float32),
    )  # fmt: skip


def trained(agent: QC, batch: ReplayBatch, num_scans: int) -> Any:
    state = agent.init(0)
    for _ in range(num_scans):
        state, _ = agent.update(state, stacked(*[batch] * 20))
    return state


def test_the_n_step_control_is_biased_where_the_chunked_critic_is_exact() -> None:
    """The control sees the first action only and learns the data's mean, 0.5, for the chunk that was worth 1.3."""
    q_best, batch = {}, mixed_quality(32)
    for biased in (False, True):
        agent = agent_of(small(biased_n_step=biased))
        noise = NOISE[:, : agent.action_horizon]
        state = trained(agent, batch, 20)
        best = batch.actions[-1:, : agent.action_horizon]
        q_best[biased] = float(agent.nets["critic"](state.params["critic"], batch.obs[:1], best).mean())
        chunks = np.asarray(agent.act(state, batch.obs, noise, explore=True))
        assert chunks.shape == (32, 1 if biased else HORIZON, ACTION_DIM)
        if not biased:  # the best of four is better than the data, whose mean is 0
            assert chunks[:, 1].mean() > 0.2
            alone = agent.act(state, batch.obs[7:8], NOISE[7:8], explore=True)
            np.testing.assert_allclose(alone[0], chunks[7], atol=1e-5)  # a row's chunk depends on its own noise only
    assert q_best[False] == pytest.approx(1.3, abs=0.1)
    assert q_best[True] == pytest.approx(0.5, abs=0.1)


def test_with_one_step_chunks_the_control_is_no_other_algorithm() -> None:
    plain, control = QC(AgentSpec(OBS_DIM, 1, ACTION_DIM), SMALL), agent_of(small(biased_n_step=True))
    batch = random_batch(4)
    first = batch._replace(actions=batch.actions[:, :1], mask=batch.mask[:, :1])
    after_plain, _ = plain.update(plain.init(0), stacked(first))
    after_control, _ = control.update(control.init(0), stacked(batch))
    for a, b in zip(*map(jax.tree.leaves, (after_plain.params, after_control.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_distilled_policy_climbs_q() -> None:
    agent, batch = agent_of(small(policy="distilled", alpha=1.0)), mixed_quality(32)
    state = trained(agent, batch, 20)
    chunks = np.asarray(agent.act(state, batch.obs, NOISE, explore=True))
    assert chunks[:, 1].mean() > 0.5


def test_defaults_are_the_papers() -> None:
    config = QCConfig()
    assert (config.num_samples, config.alpha, config.flow.num_steps) == (32, 100.0, 10)
    assert config.flow.hidden_sizes == config.critic.hidden_sizes == (512,) * 4
    assert (config.critic.num_members, config.critic.layer_norm, config.reduction.reduce) == (2, True, "mean")
    with pytest.raises(ValueError, match="num_samples >= 1"):
        QCConfig(num_samples=0)
