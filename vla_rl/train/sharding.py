"""Layers of a policy divided among the learners (FSDP2, Zhao et al. 2023): each holds a part, and has the whole of one
layer only while it computes it. What lies between the layers stays whole on each.

Which memory that saves: weights of the layers, frozen ones too, and gradients and optimiser states of what is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from vla_rl.policies.adaptation import layers_of
from vla_rl.train.distributed import is_divided, num_learners, sum_over_learners


def shard_layers(policy: nn.Module) -> None:
    """Divide `policy`, which is the same on all learners (`same_start`), in place; optimisers are built after that.
    Nothing to do where it is divided already.

    From now on all learners must call it equally often, or they wait for each other for ever. Raises ValueError where
    there is one learner, or nothing to divide.
    """
    layers = layers_of(policy)
    if num_learners() == 1:
        raise ValueError("there is one learner, which has nobody to share layers with; start several with torchrun")
    if not layers:
        raise ValueError(f"{type(policy).__name__} has no transformer layers to divide among learners")
    if any(is_divided(p) for p in policy.parameters()):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Layers return new tensors, and nobody changes those in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(policy.parameters()).device.type, (num_learners(),))
    for layer in layers:
        # said aloud, as each layer is a root of its own here, and those keep what they gathered
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


@contextmanager
def whole_layers(policy: nn.Module) -> Iterator[None]:
    """Context in which each learner has all of `policy`, and may call it without the others; nobody changes it there.
    All learners enter and leave it together. Nothing to do where nothing is divided."""
    layers: list[Any] = [module for module in policy.modules() if hasattr(module, "set_reshard_after_forward")]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True)


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


# -------------------------------------------------------------------------------------------- what is saved and loaded
def local_part(tensor: Tensor) -> Tensor:
    """This learner's part of a divided tensor, and any other as it is; the same memory."""
    return cast(Any, tensor).to_local() if is_divided(tensor) else tensor


def whole_state(state: Any, *, keep: bool = True) -> Any:
    """Nested `state` (of a policy, an optimiser) with divided tensors made whole, on the CPU; all learners call it.
    With `keep` False, for learners that do not write it, they are dropped at once."""
    if is_divided(state):
        whole = state.full_tensor()
        return whole.cpu() if keep else whole.new_empty(0)
    if isinstance(state, Mapping):
        return {key: whole_state(value, keep=keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value, keep=keep) for value in state)
    return state


def divide_like(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, the same on all learners, divided as `like` is; itself where that is not divided."""
    if not is_divided(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    own = cast(Any, like)
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)


def load_whole(policy: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`policy.load_state_dict`, where the policy may be divided and `state` is whole."""
    own = policy.state_dict()
    policy.load_state_dict({k: divide_like(v, own[k]) if k in own else v for k, v in state.items()})


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> dict[str, Any]:
    """`optimizer.state_dict()` as if it had one group of all `parameters`: the same however they are divided."""
    state = optimizer.state_dict()
    places = {id(p): i for i, p in enumerate(parameters)}
    order = [places[id(p)] for group in optimizer.param_groups for p in group["params"]]
    group = state["param_groups"][0] | {"params": list(range(len(parameters)))}
    return {"state": {order[i]: state["state"][i] for i in state["state"]}, "param_groups": [group]}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], state: Mapping[str, Any]
) -> None:
    """Load what `optimizer_state` gave and `whole_state` made whole. Raises ValueError for another number of them."""
    (group,), moments = state["param_groups"], state["state"]
    if len(group["params"]) != len(parameters):
        raise ValueError(f"the stored optimiser trains {len(group['params'])} tensors, this one {len(parameters)}")
    places = {id(p): i for i, p in enumerate(parameters)}
    groups, own, position = [], {}, 0
    for part in optimizer.param_groups:
        groups.append(group | {"params": list(range(position, position + len(part["params"])))})
        for parameter in part["params"]:
            values = moments.get(places[id(parameter)], {})
            own[position] = {k: divide_like(v, parameter) if v.ndim else v for k, v in values.items()}
            position += 1
    optimizer.load_state_dict({"state": {i: v for i, v in own.items() if v}, "param_groups": groups})


__all__ = [
    "clip_gradients",
    "divide_like",
    "load_optimizer_state",
    "load_whole",
    "local_part",
    "loss_share",
    "optimizer_groups",
    "optimizer_state",
    "shard_layers",
    "whole_layers",
    "whole_state",
]
