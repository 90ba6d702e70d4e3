"""What policies share that see the state alone: their inputs, and a prefix that is the normalised state itself."""

from __future__ import annotations

import torch

from vla_rl.core import Observation
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.protocols import PolicyInputs, Prefix

# What hardly varies in the demonstrations, such as a quaternion at rest, has a tiny scale: its first tilt would be
# hundreds of standard deviations, and the loss of a minibatch with it ten times the usual.
STATE_LIMIT = 10.0


def state_inputs(obs: Observation, normalizer: NormalizerBuffers) -> PolicyInputs:
    """The normalised state on the normaliser's device, within `STATE_LIMIT` unless it is the raw one. Raises ValueError
    where the state has another size."""
    size = normalizer.offset.shape[0]
    if obs.state.shape[1] != size:
        raise ValueError(f"the policy needs state [N, {size}], got {tuple(obs.state.shape)}")
    state = normalizer.normalize(obs.state.to(normalizer.offset.device))
    if normalizer.kind != "identity":
        state = state.clamp(-STATE_LIMIT, STATE_LIMIT)
    return PolicyInputs({}, torch.zeros(len(obs), 0, dtype=torch.int64, device=state.device), state)


def state_prefix(inputs: PolicyInputs) -> Prefix:
    """One token, which is the normalised state, as the pooled features are."""
    mask = torch.ones(len(inputs), 1, dtype=torch.bool, device=inputs.state.device)
    return Prefix(inputs.state[:, None], mask, inputs.state)
