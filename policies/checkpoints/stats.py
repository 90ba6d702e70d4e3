"""Normalisers from the statistics that public checkpoints carry, and back.

Readers: openpi divides by `std + 1e-6` and `q99 - q01 + 1e-6`; LeRobot by `std + 1e-8`, and by `q99 - q01`, which only
where it is 0 becomes 1e-8. Both are one affine map per dimension, so any normaliser can be written as either kind;
only a scale below openpi's 1e-6, of a dimension that never varied, becomes 1e-6 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vla_rl.data.normalization import Normalizer
from vla_rl.policies.checkpoints.native import PolicyCheckpointError

OPENPI_EPS, LEROBOT_EPS = 1e-6, 1e-8


def openpi_normalizer(stats: Mapping[str, Any], *, quantiles: bool, dim: int, where: str) -> Normalizer:
    """Of one entry of norm_stats.json: "quantiles" of pi0.5, "mean_std" of pi0. `dim`: see `_cut`."""
    names = ("q01", "q99") if quantiles else ("mean", "std")
    first, second = (_cut(_vector(stats, name, where), dim, stats, where) for name in names)
    if quantiles:
        return Normalizer.bounds(first, second, eps=OPENPI_EPS, min_range=0.0)
    return Normalizer.mean_std(first, second, eps=OPENPI_EPS, min_range=0.0)


def openpi_stats(normalizer: Normalizer, *, quantiles: bool) -> dict[str, list[float] | None]:
    """An entry of norm_stats.json that reads back as the same map. openpi wants a mean and a deviation in any case; for
    quantiles they are the middle and half the range, which it does not read."""
    offset, scale = normalizer.offset.double().cpu(), normalizer.scale.double().cpu()
    if not quantiles:
        std = (scale - OPENPI_EPS).clamp_min(0.0)
        return {"mean": offset.tolist(), "std": std.tolist(), "q01": None, "q99": None}
    low = offset - scale
    high = low + (2 * scale - OPENPI_EPS).clamp_min(0.0)
    return {"mean": offset.tolist(), "std": scale.tolist(), "q01": low.tolist(), "q99": high.tolist()}


def lerobot_normalizer(stats: Mapping[str, Tensor], mode: str, *, dim: int, eps: float, where: str) -> Normalizer:
    """`mode`: of LeRobot's normalization_mapping. Without statistics LeRobot leaves a feature as it is."""
    if mode == "IDENTITY" or not stats:
        return Normalizer.identity(dim)
    known = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}
    if mode not in known:
        raise PolicyCheckpointError(f"{where}: normalisation {mode!r} is not supported, known are {sorted(known)}")
    first, second = (_vector(stats, name, where) for name in known[mode])
    if len(first) != dim:
        raise PolicyCheckpointError(f"{where}: statistics of {len(first)} dimensions, config.json says {dim}")
    if mode == "MEAN_STD":
        return Normalizer.mean_std(first, second, eps=eps, min_range=0.0)
    high = torch.where(second == first, first + eps, second)
    return Normalizer.bounds(first, high, min_range=0.0, kind="min_max" if mode == "MIN_MAX" else "quantiles")


def lerobot_stats(normalizer: Normalizer) -> tuple[str, dict[str, Tensor]]:
    """Mode and statistics that read back as the same map. They are float64: what float32 would round away of a bound
    (offset - scale) could not be read back; LeRobot makes them float32 as it reads them."""
    offset, scale = normalizer.offset.double().cpu(), normalizer.scale.double().cpu()
    if normalizer.kind == "identity":
        return "IDENTITY", {}
    if normalizer.kind == "mean_std":
        return "MEAN_STD", {"mean": offset, "std": (scale - LEROBOT_EPS).clamp_min(0.0)}
    mode, low, high = ("MIN_MAX", "min", "max") if normalizer.kind == "min_max" else ("QUANTILES", "q01", "q99")
    return mode, {low: offset - scale, high: offset + scale}


def _vector(stats: Mapping[str, Any], name: str, where: str) -> Tensor:
    values = stats.get(name)
    if values is None:
        raise PolicyCheckpointError(f"{where} has no {name!r}, only {sorted(k for k in stats if stats[k] is not None)}")
    vector = torch.as_tensor(values, dtype=torch.float64).flatten()
    if not bool(torch.isfinite(vector).all()):
        raise PolicyCheckpointError(
            f"{where}: {name} holds infinite values or NaN; bring the statistics of the dataset"
        )
    return vector


def _cut(vector: Tensor, dim: int, stats: Mapping[str, Any], where: str) -> Tensor:
    """The first `dim` (0: all): early checkpoints have statistics of zeros for the dimensions that pad to 32."""
    if not dim or len(vector) == dim:
        return vector
    rest: list[Sequence[float]] = [values[dim:] for values in stats.values() if values is not None]
    if len(vector) < dim or any(any(values) for values in rest):
        raise PolicyCheckpointError(
            f"{where}: statistics of {len(vector)} dimensions, the environment has {dim}: another robot; "
            "fine-tune it there first: vla-rl sft RECIPE --policy FOLDER"
        )
    return vector[:dim]


__all__ = ["lerobot_normalizer", "lerobot_stats", "openpi_normalizer", "openpi_stats"]
