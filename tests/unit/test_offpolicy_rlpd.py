"""RLPD is SAC with settings: they are those of the paper, and they reach the update."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.unit.offpolicy_batches import ACTION_DIM, HORIZON, OBS_DIM, assert_same, host, minibatches, random_batch
from vla_rl.offpolicy import rlpd
from vla_rl.offpolicy.networks import AgentSpec
from vla_rl.offpolicy.sac import SAC, actor_loss, temperature_of

SPEC = AgentSpec(OBS_DIM, HORIZON, ACTION_DIM)


def test_settings_are_the_papers():
    config = rlpd.rlpd_config()
    assert (config.critic.num_members, config.critic.layer_norm, config.actor.layer_norm) == (10, True, False)
    target, actor = config.target_reduction, config.actor_reduction
    assert (target.reduce, target.subset_size, target.with_replacement) == ("min", 2, False)
    assert (actor.reduce, actor.subset_size) == ("mean", None)
    assert (config.initial_temperature, config.target_entropy_per_dim) == (1.0, 0.5)
    assert config.actor_learning_rate == config.critic_learning_rate == config.temperature_learning_rate == 3e-4
    assert (config.actor_batch, config.entropy_on_next_obs, config.bc_weight) == ("last", False, 0.0)
    assert (rlpd.UTD_RATIO, rlpd.BATCH_SIZE, rlpd.OFFLINE_SHARE) == (20, 256, 0.5)
    chunked = rlpd.qc_rlpd_config()
    assert (chunked.bc_weight, chunked.critic.hidden_sizes) == (0.01, (512,) * 4)
    assert replace(chunked, actor=config.actor, critic=config.critic, bc_weight=0.0) == config


def test_one_actor_step_for_all_critic_updates_from_the_last_minibatch():
    """Other rows in all minibatches but the last leave the first step of the temperature as it is; the critic's not."""
    agent = SAC(SPEC, rlpd.rlpd_config((8,), num_members=3))
    batches = minibatches(4)
    other = batches._replace(reward=np.concatenate([batches.reward[:-1] + 1.0, batches.reward[-1:]]))
    states = [agent.update(agent.init(0), b)[0] for b in (batches, other)]
    assert [int(s.moments["actor"][0].count) for s in states] == [1, 1]
    assert [int(s.moments["critic"][0].count) for s in states] == [4, 4]
    assert_same(states[0].params["temperature"], states[1].params["temperature"])
    assert any(
        (x != y).any() for x, y in zip(host(states[0].params["critic"]), host(states[1].params["critic"]), strict=True)
    )
    assert float(temperature_of(agent.init(0).params["temperature"])) == pytest.approx(1.0)


def test_imitation_counts_executed_steps_only():
    """QC-RLPD: what follows an episode's end in a chunk is not imitated."""
    config = replace(rlpd.rlpd_config((8,), num_members=2), bc_weight=0.01)
    agent = SAC(SPEC, config)
    params = agent.init(0).params
    loss = jax.jit(actor_loss, static_argnums=(0, 1))
    batch = random_batch(mask=np.array([[1, 0]] * 5, bool))
    padded = batch._replace(actions=batch.actions * np.array([1.0, -1.0], np.float32)[:, None])
    key = jax.random.key(0)
    values = [float(loss(agent.nets, config, params["actor"], params, b, key)[0]) for b in (batch, padded)]
    assert values[0] == values[1]
    executed = padded._replace(mask=np.ones((5, 2), bool))
    assert float(loss(agent.nets, config, params["actor"], params, executed, key)[0]) != values[0]
