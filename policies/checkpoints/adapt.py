"""A policy for another environment: other states, actions and cameras, the same network."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from vla_rl.core import EnvSpec
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.tensors import give_values, on_meta

P = TypeVar("P", bound=nn.Module)


def adapt(policy: P, spec: EnvSpec, cameras: tuple[str, ...] | None = None) -> P:
    """`policy` for the environment of `spec`, with all its weights and identity normalisers (`set_normalization`).

    pi0, pi0.5 and SmolVLA pad states and actions to widths of their own, so their networks are the same for every
    environment. `cameras`: the environment's names that fill the picture slots in order, by default all of `spec`.
    The result shares its weights with `policy`, which is not to be used any more.

    Raises ValueError where the environment is too wide, or where a policy's network has the environment's sizes.
    """
    names = {f.name for f in fields(policy.config)}  # pyright: ignore[reportArgumentType]
    wanted = {"state_dim": spec.state_dim, "action_dim": spec.action.dim, "cameras": cameras or tuple(spec.cameras)}
    unknown = set(wanted["cameras"]) - set(spec.cameras)
    if unknown:
        raise ValueError(f"{spec.name} has no cameras {sorted(unknown)}, it has {sorted(spec.cameras)}")
    config = replace(policy.config, **{k: v for k, v in wanted.items() if k in names})  # pyright: ignore
    adapted = on_meta(lambda: type(policy)(config))
    values: dict[str, Tensor] = dict(policy.state_dict())
    for name, module in adapted.named_modules():
        if isinstance(module, NormalizerBuffers):
            device = values[f"{name}.offset"].device
            values[f"{name}.offset"] = torch.zeros(module.offset.shape, device=device)
            values[f"{name}.scale"] = torch.ones(module.scale.shape, device=device)
    expected = adapted.state_dict()
    fixed = [k for k in expected if k not in values or values[k].shape != expected[k].shape]
    if fixed or len(values) != len(expected):
        raise ValueError(
            f"{type(policy).__name__} cannot move to {spec.name}: its network has sizes of its environment "
            f"({', '.join(fixed[:5])}); build a new one"
        )
    trained = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    give_values(adapted, values)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(trained[name])
    return cast(P, adapted.train(policy.training))


def check_fits(policy: nn.Module, spec: EnvSpec, where: str) -> None:
    """Raise PolicyCheckpointError where `policy` has other states, actions or cameras than the environment."""
    config = policy.config
    problems = [
        f"{what} has {ours} dimensions, the environment {theirs}"
        for what, ours, theirs in (
            ("the state", config.state_dim, spec.state_dim),  # pyright: ignore[reportAttributeAccessIssue]
            ("the action", config.action_dim, spec.action.dim),  # pyright: ignore[reportAttributeAccessIssue]
        )
        if ours != theirs
    ]
    cameras = getattr(config, "cameras", ())
    if set(cameras) - set(spec.cameras):
        problems.append(
            f"its cameras are {list(cameras)}, the environment's {list(spec.cameras)}: name them in cameras="
        )
    if problems:
        raise PolicyCheckpointError(
            f"{where} was not made for {spec.name}: {'; '.join(problems)}. Fine-tune it there first: vla-rl sft RECIPE "
            f"--policy {where}"
        )


__all__ = ["adapt", "check_fits"]
