"""What of a policy is trained, module by module."""

from __future__ import annotations

from torch import nn


def is_frozen(*modules: nn.Module) -> bool:
    """True where none of their parameters can change."""
    return not any(p.requires_grad for module in modules for p in module.parameters())


def freeze(*modules: nn.Module) -> None:
    """From now on none of their parameters is trained."""
    for module in modules:
        module.requires_grad_(False)


__all__ = ["freeze", "is_frozen"]
