"""The gripper's convention: OpenVLA's data have 0 closed and 1 open, environments -1 and 1 in either sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class GripperConfig:
    """`kind`: what the last action is in the environment, after normalisation. "as_is": what the model says;
    "open_is_one": from -1, closed, to 1, open; "closed_is_one": the other way round (LIBERO, robosuite).

    `binary`: an environment gets -1 or 1 alone, as OpenVLA's evaluations do. Then what the environment executes does
    not tell what the model said; all other cases are inverted up to rounding, and exactly at -1, 0 and 1.
    """

    kind: Literal["as_is", "open_is_one", "closed_is_one"] = "as_is"
    binary: bool = False

    def __post_init__(self) -> None:
        if self.binary and self.kind == "as_is":
            raise ValueError("GripperConfig: binary has no effect with kind 'as_is'; name the environment's convention")

    def to_model(self, chunk: Tensor, index: int) -> Tensor:
        """`chunk [..., D]` with the environment's gripper at `index` -> with the model's."""
        if self.kind == "as_is":
            return chunk
        gripper = chunk[..., index : index + 1]
        gripper = (1.0 + gripper) / 2.0 if self.kind == "open_is_one" else (1.0 - gripper) / 2.0
        return torch.cat([chunk[..., :index], gripper, chunk[..., index + 1 :]], dim=-1)

    def to_environment(self, chunk: Tensor, index: int) -> Tensor:
        """Inverse of `to_model`, but for `binary`."""
        if self.kind == "as_is":
            return chunk
        gripper = 2.0 * chunk[..., index : index + 1] - 1.0
        gripper = gripper if self.kind == "open_is_one" else -gripper
        gripper = gripper.sign() if self.binary else gripper
        return torch.cat([chunk[..., :index], gripper, chunk[..., index + 1 :]], dim=-1)


__all__ = ["GripperConfig"]
