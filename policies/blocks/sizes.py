"""Sizes that a policy's config leaves open until an environment is known."""

from __future__ import annotations

from typing import Any


def require_sizes(config: Any) -> None:
    """Raise ValueError where `state_dim` or `action_dim` of `config` is still 0."""
    for name in ("state_dim", "action_dim"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"{type(config).__name__}.{name} is {getattr(config, name)}, expected at least 1; "
                "give it, or let build_policy take it from an environment"
            )
