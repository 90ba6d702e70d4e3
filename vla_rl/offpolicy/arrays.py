"""Arrays between torch, numpy and JAX: by reference on a CPU, by DLPack on a GPU."""

from __future__ import annotations

import jax
import numpy as np
import torch
from jax import Array
from torch import Tensor


def to_jax(tensor: Tensor) -> Array:
    """A torch tensor as a JAX array on the same device, without a copy where the device allows it."""
    tensor = tensor.detach().contiguous()
    if tensor.is_cuda:
        return jax.dlpack.from_dlpack(tensor)
    return jax.numpy.asarray(tensor.numpy())


def to_torch(array: Array | np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """An array as a torch tensor on `device`. On a CPU it is a copy: JAX's memory must not be written to."""
    device = torch.device(device)
    if isinstance(array, Array) and device.type == "cuda" and array.devices().pop().platform == "gpu":
        return torch.from_dlpack(array)
    return torch.from_numpy(np.array(array)).to(device)
