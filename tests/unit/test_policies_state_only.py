"""Policies that see the state alone."""

from __future__ import annotations

import torch

from vla_rl.core import Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.policies.blocks.state_only import STATE_LIMIT, state_inputs


def test_a_number_that_never_varied_cannot_drown_the_others() -> None:
    buffers = NormalizerBuffers(2)
    buffers.set(Normalizer("mean_std", torch.tensor([1.0, 0.0]), torch.tensor([2.6e-4, 0.5])))
    tilted = state_inputs(Observation({}, torch.tensor([[0.95, 0.25], [1.0, -0.5]]), ("", "")), buffers).state
    torch.testing.assert_close(tilted, torch.tensor([[-STATE_LIMIT, 0.5], [0.0, -1.0]]))
