"""Pictures as the public VLAs take them: one size with the aspect kept, in the range of their vision tower."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Padding = Literal["center", "top_left", "stretch", "stretch_lanczos"]


def resize_with_padding(images: Tensor, size: int, padding: Padding) -> Tensor:
    """uint8 [N, h, w, 3] -> uint8 [N, 3, size, size], bilinear, the rest black.

    `padding`: where the black goes. "center": on both sides (openpi); "top_left": above and to the left (SmolVLA);
    "stretch": nowhere, the aspect changes; "stretch_lanczos": so too, by `resize_lanczos` (OpenVLA).
    """
    x = images.permute(0, 3, 1, 2).contiguous()
    height, width = x.shape[2:]
    if (height, width) == (size, size):
        return x
    if padding == "stretch_lanczos":
        return resize_lanczos(x, size)
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


def resize_lanczos(images: Tensor, size: int) -> Tensor:
    """uint8 [N, 3, h, w] -> uint8 [N, 3, size, size] by a Lanczos filter of 3 lobes, widened where it shrinks: what
    TensorFlow's and Pillow's "lanczos" do (Pillow in integers, and so up to 1 off)."""
    rows, columns = (lanczos_weights(length, size).to(images.device) for length in images.shape[2:])
    resized = rows @ images.float() @ columns.mT
    return resized.round().clamp(0, 255).to(torch.uint8)


def lanczos_weights(length: int, size: int) -> Tensor:
    """float32 [size, length]: the share of each pixel in each new one; rows sum to 1."""
    scale = length / size
    center = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    x = (torch.arange(length, dtype=torch.float64) + 0.5 - center[:, None]) / max(scale, 1.0)
    weight = torch.where(x.abs() < 3.0, torch.sinc(x) * torch.sinc(x / 3.0), 0.0)
    return (weight / weight.sum(dim=1, keepdim=True)).float()


def center_crop(images: Tensor, area: float) -> Tensor:
    """uint8 [N, 3, h, w] -> the same shape: the share `area` of each picture around its centre, bilinear from corner to
    corner of the box, as TensorFlow has it."""
    if area == 1.0:
        return images
    side = area**0.5
    box = torch.tensor([[side, 0.0, 0.0], [0.0, side, 0.0]], device=images.device).expand(len(images), 2, 3)
    grid = functional.affine_grid(box, list(images.shape), align_corners=True)
    cropped = functional.grid_sample(images.float(), grid, mode="bilinear", align_corners=True)
    return (cropped * (255.5 / 255.0)).clamp(0, 255).to(torch.uint8)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: `x / 127.5 - 1`."""
    return images.float() / 127.5 - 1.0


__all__ = ["Padding", "center_crop", "lanczos_weights", "resize_lanczos", "resize_with_padding", "to_unit_range"]
