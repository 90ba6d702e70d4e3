"""A prefix as a row of replay, and back."""

import pytest
import torch

from tests.unit.test_offpolicy_policy_learner import SPEC
from vla_rl.core import Observation
from vla_rl.data.flat_prefix import FlatPrefix
from vla_rl.policies.build import build_policy
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.policies.pi0 import Pi0Config


def test_keys_and_values_survive_bit_for_bit():
    policy = build_policy(Pi0Config(cameras=("agent",), action_horizon=4), SPEC, seed=0).eval()
    flat = FlatPrefix(policy)
    pictures = {"agent": torch.randint(0, 256, (3, 20, 24, 3), dtype=torch.uint8)}
    obs = Observation(pictures, torch.randn(3, SPEC.state_dim), ("push", "pull it", ""))
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(obs))
        again = flat.unflatten(flat.flatten(prefix))
        noise = torch.randn(3, 4, policy.noise_dim)
        torch.testing.assert_close(policy.chunks(again, noise), policy.chunks(prefix, noise), rtol=0, atol=0)
    assert again.mask.dtype == torch.bool
    assert torch.equal(again.mask, prefix.mask)
    assert torch.equal(flat.flatten(prefix)[:, : policy.feature_dim], prefix.pooled)
    for ours, theirs in zip(again.layers, prefix.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    with pytest.raises(ValueError, match="rows of features must be"):
        flat.unflatten(torch.zeros(3, policy.feature_dim))


def test_a_policy_whose_features_are_its_prefix_keeps_no_more():
    policy = build_policy(FlowMLPConfig(action_horizon=2), SPEC, seed=0)
    assert FlatPrefix(policy).width == policy.feature_dim == SPEC.state_dim
