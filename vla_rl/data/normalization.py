"""Normalisation of states and actions, stored with the policy.

Every kind is one affine map per dimension, `normalised = (x - offset) / scale`, so the inverse `normalised * scale +
offset` is exact up to float32 rounding: the round trip errs by at most `4 * 2^-23 * (|x| + |offset|)`.

| kind      | offset          | scale              | maps                         |
|-----------|-----------------|--------------------|------------------------------|
| identity  | 0               | 1                  | x to x                       |
| mean_std  | mean            | std + eps          | to zero mean, unit deviation |
| quantiles | (q01 + q99) / 2 | (q99 - q01) / 2    | [q01, q99] to [-1, 1]        |
| min_max   | (min + max) / 2 | (max - min) / 2    | [min, max] to [-1, 1]        |

A dimension that hardly varies (less than `MIN_RANGE`) gets scale 1, so that noise in it is not blown up; it maps to
about 0. Public checkpoints divide by `range + eps` instead (openpi: 1e-6): `Normalizer.bounds(..., eps=1e-6,
min_range=0.0)` is that arithmetic, in which a constant maps to -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vla_rl.core import ActionSpec

NormalizationKind = Literal["identity", "mean_std", "quantiles", "min_max"]
KINDS: tuple[str, ...] = get_args(NormalizationKind)
MIN_RANGE = 1e-6


@dataclass(frozen=True)
class Normalizer:
    """`(x - offset) / scale` over the last dimension. `offset`, `scale`: float32 [D]; `scale` is positive.

    `kind` says where the numbers came from; the arithmetic is the same for all.
    """

    kind: str
    offset: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Normalizer: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.offset.ndim != 1 or self.offset.shape != self.scale.shape:
            raise ValueError(
                f"Normalizer: offset and scale must be [D] alike, got {tuple(self.offset.shape)} and "
                f"{tuple(self.scale.shape)}"
            )
        if not bool(torch.isfinite(self.offset).all()) or not bool(
            (torch.isfinite(self.scale) & (self.scale > 0)).all()
        ):
            raise ValueError("Normalizer: offset must be finite and scale finite and positive; check the statistics")

    # ------------------------------------------------------------------------------------------------- constructors
    @staticmethod
    def identity(dim: int) -> Normalizer:
        return Normalizer("identity", torch.zeros(dim), torch.ones(dim))

    @staticmethod
    def mean_std(mean: Tensor, std: Tensor, *, eps: float = 0.0, min_range: float = MIN_RANGE) -> Normalizer:
        """Zero mean and unit deviation. `mean`, `std`: [D]. openpi divides by `std + 1e-6`, LeRobot by `std + 1e-8`."""
        std = std.double()
        scale = torch.where(std < min_range, torch.ones_like(std), std + eps)
        return Normalizer("mean_std", mean.float(), scale.float())

    @staticmethod
    def bounds(
        low: Tensor, high: Tensor, *, eps: float = 0.0, min_range: float = MIN_RANGE, kind: str = "quantiles"
    ) -> Normalizer:
        """`2 (x - low) / (high - low + eps) - 1`: maps [low, high] to [-1, 1]. `low`, `high`: [D]."""
        low, high = low.double(), high.double()
        if bool((high < low).any()):
            raise ValueError(f"Normalizer: {kind} has an upper bound below the lower one; check the statistics")
        half = (high - low + eps) / 2
        constant = high - low < min_range
        offset = torch.where(constant, (low + high) / 2, low + half)
        return Normalizer(kind, offset.float(), torch.where(constant, torch.ones_like(half), half).float())

    @staticmethod
    def action_box(action: ActionSpec) -> Normalizer:
        """The environment's bounds to [-1, 1], where agents and critics see actions. Raises ValueError where a bound is
        not finite."""
        low, high = torch.tensor(action.low), torch.tensor(action.high)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ValueError(f"finite action bounds are needed to scale actions by them, got {action}")
        return Normalizer.bounds(low, high, kind="min_max")

    @staticmethod
    def from_stats(
        stats: Mapping[str, Tensor], kind: str, *, eps: float = 0.0, min_range: float = MIN_RANGE
    ) -> Normalizer:
        """From one feature's statistics of a dataset (`LeRobotDataset.stats["action"]`).

        Raises ValueError for an unknown kind, KeyError where a statistic that it needs is missing.
        """
        needed = {
            "identity": ("mean",),
            "mean_std": ("mean", "std"),
            "quantiles": ("q01", "q99"),
            "min_max": ("min", "max"),
        }
        if kind not in needed:
            raise ValueError(f"normalisation must be one of {', '.join(KINDS)}, got {kind!r}")
        missing = [name for name in needed[kind] if name not in stats]
        if missing:
            raise KeyError(f"normalisation {kind!r} needs {missing}; the statistics have {sorted(stats)}")
        a, b = stats[needed[kind][0]], stats[needed[kind][-1]]
        if kind == "identity":
            return Normalizer.identity(a.shape[0])
        if kind == "mean_std":
            return Normalizer.mean_std(a, b, eps=eps, min_range=min_range)
        return Normalizer.bounds(a, b, eps=eps, min_range=min_range, kind=kind)

    def keep(self, dims: Sequence[int]) -> Normalizer:
        """This one, with `dims` left as they are (a gripper that is already in {0, 1} or {-1, 1})."""
        offset, scale = self.offset.clone(), self.scale.clone()
        offset[list(dims)], scale[list(dims)] = 0.0, 1.0
        return Normalizer(self.kind, offset, scale)

    # --------------------------------------------------------------------------------------------------- arithmetic
    @property
    def dim(self) -> int:
        return self.offset.shape[0]

    def normalize(self, x: Tensor) -> Tensor:
        """`x [..., D]` in its own units to normalised values, same shape and device. ValueError for another D."""
        self._check(x)
        return (x - self.offset) / self.scale

    def unnormalize(self, x: Tensor) -> Tensor:
        """Inverse of `normalize`. Nothing is clamped: that is the environment's business."""
        self._check(x)
        return x * self.scale + self.offset

    def to(self, device: torch.device | str) -> Normalizer:
        return Normalizer(self.kind, self.offset.to(device), self.scale.to(device))

    def _check(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(
                f"Normalizer of {self.dim} dimensions got {tuple(x.shape)}; "
                "the policy was made for another robot or dataset"
            )

    # ------------------------------------------------------------------------------------------------------ storage
    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; float32 survives the round trip bit for bit."""
        return {"kind": self.kind, "offset": self.offset.tolist(), "scale": self.scale.tolist()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Normalizer:
        missing = [key for key in ("kind", "offset", "scale") if key not in values]
        if missing:
            raise KeyError(f"a stored normalizer lacks {missing}; it has {sorted(values)}")
        return Normalizer(
            str(values["kind"]),
            torch.tensor(values["offset"], dtype=torch.float32),
            torch.tensor(values["scale"], dtype=torch.float32),
        )

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """For safetensors: `<prefix>.<kind>.offset` and `<prefix>.<kind>.scale`."""
        return {
            f"{prefix}.{self.kind}.offset": self.offset.detach().cpu().contiguous(),
            f"{prefix}.{self.kind}.scale": self.scale.detach().cpu().contiguous(),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> Normalizer:
        """Inverse of `to_tensors`; other tensors are ignored. Raises KeyError where there is none of `prefix`."""
        for kind in KINDS:
            offset, scale = (tensors.get(f"{prefix}.{kind}.{part}") for part in ("offset", "scale"))
            if offset is not None and scale is not None:
                return Normalizer(kind, offset.float(), scale.float())
        raise KeyError(f"no normalizer {prefix!r} among the stored tensors: {sorted(tensors)[:8]}")
