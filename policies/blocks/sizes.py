"""Sizes of a policy's config that must be known, or must fit each other."""

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


def require_room(config: Any) -> None:
    """Raise ValueError where state or action do not fit into the widths that they are padded to."""
    if config.state_dim > config.max_state_dim or config.action_dim > config.max_action_dim:
        raise ValueError(
            f"{type(config).__name__}: state {config.state_dim} and action {config.action_dim} must fit into "
            f"max_state_dim {config.max_state_dim} and max_action_dim {config.max_action_dim}"
        )


def require_readable(config: Any) -> None:
    """Raise ValueError where `config.expert` cannot attend to the keys of each layer of `config.language`."""
    for name in ("depth", "num_kv_heads", "head_dim"):
        ours, theirs = getattr(config.expert, name), getattr(config.language, name)
        if ours != theirs:
            raise ValueError(
                f"{type(config).__name__}: the expert reads the language model's keys: {name} {ours} != {theirs}"
            )


__all__ = ["require_readable", "require_room", "require_sizes"]
