"""Off-policy agents as policies: the chunk of each, rows apart, files, evaluation."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vla_rl.core import Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.envs.point_maze import make_point_maze
from vla_rl.evaluation.evaluate import evaluate
from vla_rl.offpolicy.bc_flow import FlowNetConfig
from vla_rl.offpolicy.build import build_agent
from vla_rl.offpolicy.calql import CalQLConfig
from vla_rl.offpolicy.co_rft import BehaviorCloningConfig, CoRFTConfig
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.iql import IQLConfig
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.qc import QCConfig
from vla_rl.offpolicy.sac import SACConfig
from vla_rl.offpolicy.td3 import TD3Config
from vla_rl.policies.agent import AgentPolicy, AgentPolicyConfig
from vla_rl.policies.checkpoints.native import PolicyCheckpointError, load_policy, save_policy

ACTOR, CRITIC = ActorNetConfig((8,), out_scale=1.0), MLPCriticConfig(2, (8,))
SAC = SACConfig(actor=ACTOR, critic=CRITIC)
FLOW = QCConfig(num_samples=4, flow=FlowNetConfig((8,), num_steps=3), critic=CRITIC)
PREFIX = PrefixCriticConfig(width=8, num_layers=1)
AGENTS = {
    "sac": SAC,
    "calql": CalQLConfig(SAC),
    "iql": IQLConfig(actor=replace(IQLConfig().actor, hidden_sizes=(8,)), critic=CRITIC, value_hidden_sizes=(8,)),
    "td3": TD3Config(actor=ACTOR, critic=CRITIC),
    "co_rft": CoRFTConfig(TD3Config(actor=ACTOR, critic=PREFIX)),
    "cloning": BehaviorCloningConfig(ACTOR, exploration_noise=0.1),
    "qc": FLOW,
    "qc_fql": replace(FLOW, policy="distilled"),
}
DEPLOYED = {"qc": {"flow", "critic"}, "qc_fql": {"one_step"}}
ONES = torch.ones(2)


def make_policy(name, seed=3):
    policy = AgentPolicy(AgentPolicyConfig(AGENTS[name], 3, 4, 2))
    state = Normalizer.bounds(-2 * torch.ones(4), 2 * torch.ones(4), kind="min_max")
    policy.set_normalization(state, Normalizer.bounds(-3 * ONES, ONES, kind="min_max"))
    policy.take(policy.agent.init(seed))
    return policy


def observation(n=5):
    return Observation({}, torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), ("go",) * n)


def noise_of(n=5):
    return torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_is_a_policy_with_files_and_rows_apart(name, tmp_path):
    policy, obs, noise = make_policy(name), observation(), noise_of()
    deployed, explored = policy.act(obs, noise).actions, policy.explore(obs, noise)
    for chunks in (deployed, explored):
        assert chunks.shape == (5, 3, 2)
        assert chunks.dtype == torch.float32
        assert chunks.min() >= -3.0 - 1e-5
        assert chunks.max() <= 1.0 + 1e-5
    assert torch.equal(deployed, policy.act(obs, noise).actions)
    assert (name in DEPLOYED) == torch.equal(deployed, explored)  # a flow's deployed chunk is the exploring one
    for i in (0, 3):  # another row's state and noise
        other_state, other_noise = obs.state.flip(0).clone(), noise.flip(0).clone()
        other_state[i], other_noise[i] = obs.state[i], noise[i]
        again = policy.explore(Observation({}, other_state, obs.instruction), other_noise)
        assert torch.equal(again[i], explored[i])
        assert not torch.equal(again[4 - i], explored[4 - i])
    save_policy(policy, tmp_path)
    stored: Any = load_policy(tmp_path)
    assert torch.equal(stored.act(obs, noise).actions, deployed)
    assert not torch.equal(make_policy(name, seed=4).act(obs, noise).actions, deployed)
    parts = DEPLOYED.get(name, {"actor"})
    assert set(policy._parts) == parts
    assert all(key.startswith((*parts, "state_normalizer", "action_normalizer")) for key in policy.state_dict())


def test_the_agent_sees_normalised_states_and_acts_in_normalised_units():
    policy, obs = make_policy("sac"), observation()
    chunk = policy.agent.act(policy.agent.init(3), obs.state.numpy() / 2.0, noise_of().numpy(), explore=True)
    expected = 2.0 * torch.from_numpy(np.array(chunk)) - 1.0  # -1, 1 are the bounds -3, 1
    torch.testing.assert_close(policy.explore(obs, noise_of()), expected)


def test_an_evaluation_does_not_depend_on_the_number_of_environments(tmp_path):
    policy = AgentPolicy(AgentPolicyConfig(replace(FLOW, num_samples=2), 3, 4, 2))
    policy.set_normalization(Normalizer.identity(4), Normalizer.bounds(-ONES, ONES, kind="min_max"))
    env = make_point_maze(1)
    save_policy(policy, tmp_path, spec=env.spec)
    stored: Any = load_policy(tmp_path, spec=env.spec)
    results = [
        evaluate(
            who,
            lambda n: make_point_maze(n, max_episode_steps=12, split="test", auto_reset=False),
            range(6),
            execution_horizon=3,
            num_envs=num_envs,
            policy_batch_size=6,
            progress=False,
        )
        for who, num_envs in ((policy, 6), (stored, 2))
    ]
    assert results[0].episodes == results[1].episodes
    assert len({e.episode_return for e in results[0].episodes} | {e.length for e in results[0].episodes}) > 1


def test_what_does_not_fit_is_refused(tmp_path):
    policy = make_policy("sac")
    with pytest.raises(ValueError, match=r"needs state \[N, 4\], got \(2, 3\)"):
        policy.act(Observation({}, torch.zeros(2, 3), ("a", "b")), noise_of(2))
    save_policy(policy, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(PolicyCheckpointError, match="saved without the spec"):
        load_policy(tmp_path, spec=make_point_maze(1).spec)
    with pytest.raises(TypeError, match="FlowNetConfig is no agent's config; use one of BehaviorCloningConfig"):
        build_agent(FlowNetConfig(), AgentSpec(4, 3, 2))
