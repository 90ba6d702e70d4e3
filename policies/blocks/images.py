"""Pictures as the public VLAs take them: one size with the aspect kept, in the range of their vision tower."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Padding = Literal["center", "top_left", "stretch"]


def resize_with_padding(images: Tensor, size: int, padding: Padding) -> Tensor:
    """uint8 [N, h, w, 3] -> uint8 [N, 3, size, size], bilinear, the rest black.

    `padding`: where the black goes. "center": on both sides (openpi); "top_left": above and to the left (SmolVLA);
    "stretch": nowhere, the aspect changes.
    """
    x = images.permute(0, 3, 1, 2).contiguous()
    height, width = x.shape[2:]
    if (height, width) == (size, size):
        return x
    if padding == "stretch":
        new_height = new_width = size
    else:
        ratio = max(height, width) / size
        new_height, new_width = int(height / ratio), int(width / ratio)
    resized = functional.interpolate(x.float(), (new_height, new_width), mode="bilinear", align_corners=False)
    resized = resized.round().clamp(0, 255).to(torch.uint8)
    rows, columns = size - new_height, size - new_width
    top, left = (rows, columns) if padding == "top_left" else (rows // 2, columns // 2)
    return functional.pad(resized, (left, columns - left, top, rows - top))


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: `x / 127.5 - 1`."""
    return images.float() / 127.5 - 1.0
