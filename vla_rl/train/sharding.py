"""Layers of a policy divided among the learners (FSDP2, Zhao et al. 2023): each holds a part, and has the whole of one
layer only while it computes it. What lies between the layers stays whole on each.

Which memory that saves: weights of the layers, frozen ones too, and gradients and optimiser states of what is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vla_rl.policies.adaptation import layers_of
from vla_rl.train.distributed import is_divided, num_learners, sum_over_learners


def shard_layers(policy: nn.Module) -> None:
    """Divide `policy`, which is the same on all learners (`same_start`), in place; optimisers are built after that.

    From now on all learners must call it equally often, or they wait for each other for ever. Raises ValueError where
    there is one learner, or nothing to divide.
    """
    layers = layers_of(policy)
    if num_learners() == 1:
        raise ValueError("there is one learner, which has nobody to share layers with; start several with torchrun")
    if not layers:
        raise ValueError(f"{type(policy).__name__} has no transformer layers to divide among learners")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Layers return new tensors, and nobody changes those in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(policy.parameters()).device.type, (num_learners(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)


def optimizer_groups(parameters: list[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """Divided and whole parameters apart: a fused optimiser does not take both at once."""
    divided = [p for p in parameters if is_divided(p)]
    whole = [p for p in parameters if not is_divided(p)]
    return [{"params": group} for group in (whole, divided) if group]


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`: scale gradients to a norm of at most `max_norm`; returns what it was."""
    if not any(is_divided(p) for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    groups = [group["params"] for group in optimizer_groups(parameters)]
    norms: list[Any] = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norm = torch.stack([n.full_tensor() if is_divided(n) else n for n in norms]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def loss_share(parameters: Iterable[nn.Parameter], num_rows: int) -> float:
    """What to multiply a mean loss over `num_rows` by before the backward pass, in which divided layers average their
    gradients over the learners evenly: the mean is then over the rows of all. 1 where nothing is divided."""
    if not any(is_divided(p) for p in parameters):
        return 1.0
    return num_rows * num_learners() / float(sum_over_learners(torch.tensor(num_rows)))


def whole_state(state: Any) -> Any:
    """Nested `state` (of a policy, an optimiser) with divided tensors made whole, on the CPU; all learners call it."""
    if is_divided(state):
        return state.full_tensor().cpu()
    if isinstance(state, Mapping):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value) for value in state)
    return state


__all__ = ["clip_gradients", "loss_share", "optimizer_groups", "shard_layers", "whole_state"]
