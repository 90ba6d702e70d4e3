"""Rollouts in parts: joined along the environments, moved to a device, and as plain values for a state file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vla_rl.core import ChunkStep, Observation
from vla_rl.flow.sampler import GaussianTrace
from vla_rl.flow.trace import FlowTrace
from vla_rl.onpolicy.fpo import FPOTrace
from vla_rl.onpolicy.tokens import TokenTrace
from vla_rl.protocols import PolicyInputs, Prefix, PrefixKV
from vla_rl.rollout.collector import EpisodeStats, RolloutBatch
from vla_rl.rollout.replay_actor import ReplayWindow

T = TypeVar("T")
_KINDS = {
    k.__name__: k
    for k in (
        RolloutBatch,
        EpisodeStats,
        ReplayWindow,
        Observation,
        ChunkStep,
        Prefix,
        PrefixKV,
        PolicyInputs,
        FlowTrace,
        FPOTrace,
        GaussianTrace,
        TokenTrace,
    )
}


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """`value`, a dataclass, mapping or list, with `function` of each tensor in it."""
    return _joined([value], lambda tensors: function(tensors[0]))


def _joined(values: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """One value of the structure that all `values` have; the tensors at each place are joined."""
    first = values[0]
    if isinstance(first, Tensor):
        return join(list(values))
    if dataclasses.is_dataclass(first):
        names = [f.name for f in dataclasses.fields(first)]
        return type(first)(**{name: _joined([getattr(v, name) for v in values], join) for name in names})  # pyright: ignore[reportCallIssue]
    if isinstance(first, Mapping):
        return {key: _joined([v[key] for v in values], join) for key in first}
    if isinstance(first, tuple):
        items = [_joined(list(column), join) for column in zip(*values, strict=True)]
        return PrefixKV(*items) if isinstance(first, PrefixKV) else tuple(items)
    return first


def join_envs(parts: Sequence[RolloutBatch]) -> RolloutBatch:
    """The rollout of all environments from those of slices, in their order.

    A part with fewer decisions (its episodes ended sooner) is filled up with rows that are not `valid`.
    """
    t = max(p.num_decisions for p in parts)
    sizes = [p.rewards.shape[1] for p in parts]

    def filled(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(t - len(x), *x.shape[1:])]) if len(x) < t else x

    def steps(tensors: list[Tensor]) -> Tensor:
        return torch.cat([filled(x) for x in tensors], dim=1)

    def rows(tensors: list[Tensor]) -> Tensor:
        return steps([x.unflatten(0, (-1, n)) for x, n in zip(tensors, sizes, strict=True)]).flatten(0, 1)

    index, features = _join_bootstraps(parts, filled)

    def of_all(name: str, join: Callable[[list[Tensor]], Tensor]) -> Any:
        return _joined([getattr(p, name) for p in parts], join)

    over_steps = ("rewards", "executed", "terminated", "truncated", "success", "valid", "policy_version")
    fields: dict[str, Any] = {name: of_all(name, steps) for name in over_steps}
    fields |= {name: of_all(name, rows) for name in ("prefix", "inputs", "features", "trace")}
    num_lost = sum(p.episodes.num_lost for p in parts)
    episodes = dataclasses.replace(of_all("episodes", torch.cat), num_lost=num_lost)
    return RolloutBatch(**fields, bootstrap_features=features, bootstrap_index=index, episodes=episodes)


def _join_bootstraps(parts: Sequence[RolloutBatch], filled: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Index [T, N] and features [B, F], in the order in which one collector gathers them: ends by truncation as they
    come, then one row for each environment at the window's end. (A critic rounds by a row's place.)"""
    index, features, last, offset = [], [], [], 0
    for part in parts:
        count, n = len(part.bootstrap_features), part.rewards.shape[1]
        here = filled(part.bootstrap_index + 1) - 1  # what is filled up needs no successor
        index.append(torch.where(here >= 0, here + offset, here))
        features.append(part.bootstrap_features)
        last.append(torch.arange(offset + count - n, offset + count, device=here.device))
        offset += count
    joined, final_rows = torch.cat(index, dim=1), torch.cat(last)
    flat = joined.flatten()
    used = flat[flat >= 0]
    order = torch.cat([used[~torch.isin(used, final_rows)], final_rows])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return torch.where(joined >= 0, place[joined.clamp(min=0)], joined), torch.cat(features)[order]


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts with their names, for `save_state`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, PrefixKV):
        return {"kind": "PrefixKV", "fields": value._asdict()}
    if isinstance(value, Mapping):
        return {"kind": "mapping", "fields": {key: to_plain(item) for key, item in value.items()}}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(value: Any) -> Any:
    """What `to_plain` was given."""
    if isinstance(value, list):
        return tuple(from_plain(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {key: from_plain(item) for key, item in value["fields"].items()}
    return fields if value["kind"] == "mapping" else _KINDS[value["kind"]](**fields)


__all__ = ["from_plain", "join_envs", "map_tensors", "to_plain"]
