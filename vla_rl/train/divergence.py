"""A loss that is not finite stops a run before any parameter changes, and leaves the batch to look into."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


class DivergenceError(RuntimeError):
    """The loss or the gradient is not finite. `tensors`: the batch; `details`: JSON values such as its sentences."""

    def __init__(self, message: str, tensors: Mapping[str, Tensor], details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.details = dict(details or {})

    def dump(self, path: str | Path) -> Path:
        """Write the batch as safetensors, `message` and `details` in its header."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"message": str(self), "details": json.dumps(self.details)}
        save_file({k: v.cpu().contiguous() for k, v in self.tensors.items()}, path, metadata=header)
        return path


@contextmanager
def dumping(path: Path, state_file: Path) -> Iterator[None]:
    """Write the batch of a DivergenceError to `path`, and say so, and where the last good checkpoint is."""
    try:
        yield
    except DivergenceError as error:
        kept = f"the last good checkpoint is {state_file}" if state_file.exists() else "no checkpoint was written yet"
        error.add_note(f"batch written to {error.dump(path)}; {kept}")
        raise


def require_finite(
    name: str, value: Tensor, tensors: Mapping[str, Tensor], details: Mapping[str, Any] | None = None
) -> float:
    """The number in `value`, or DivergenceError with the batch."""
    number = float(value.detach())
    if not math.isfinite(number):
        raise DivergenceError(
            f"{name} is not finite ({number}); this step was not taken. Look at the dumped batch; usual causes "
            "are a learning rate that is too high and a reward or an action that is not finite",
            tensors,
            details,
        )
    return number
