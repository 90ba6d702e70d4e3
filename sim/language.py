"""Words: colours with their names, and sentences that vary.

A task gives templates with slots, such as "touch the {color} {noun}". The `ood` templates of a task and the colours of
`OOD_COLORS` occur in no training episode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Rgba = tuple[float, float, float, float]

COLORS: dict[str, Rgba] = {
    "red": (0.86, 0.12, 0.10, 1.0),
    "green": (0.10, 0.62, 0.18, 1.0),
    "blue": (0.10, 0.25, 0.88, 1.0),
    "yellow": (0.96, 0.84, 0.10, 1.0),
    "purple": (0.52, 0.14, 0.66, 1.0),
    "orange": (0.97, 0.48, 0.05, 1.0),
}
OOD_COLORS: dict[str, Rgba] = {
    "pink": (0.98, 0.55, 0.75, 1.0),
    "cyan": (0.10, 0.80, 0.85, 1.0),
    "white": (0.97, 0.97, 0.97, 1.0),
    "brown": (0.38, 0.22, 0.10, 1.0),
}
# What distractors wear in training: none of them is ever named.
DISTRACTOR_COLORS: dict[str, Rgba] = {
    "gray": (0.45, 0.45, 0.47, 1.0),
    "black": (0.08, 0.08, 0.09, 1.0),
    "olive": (0.42, 0.44, 0.12, 1.0),
}

BLOCK_NOUNS = ("block", "cube")
OOD_BLOCK_NOUNS = ("brick", "box")
PUCK_NOUNS = ("block", "puck")
OOD_PUCK_NOUNS = ("cylinder", "token")
ZONE_NOUNS = ("zone", "disc")
OOD_ZONE_NOUNS = ("circle", "spot")
BIN_NOUNS = ("bin", "basket")
OOD_BIN_NOUNS = ("container", "crate")
DRAWER_NOUNS = ("drawer", "cabinet")
OOD_DRAWER_NOUNS = ("chest", "cupboard")
BUTTON_NOUNS = ("button",)
OOD_BUTTON_NOUNS = ("switch", "knob")


def sentence(rng: np.random.Generator, templates: Sequence[str], **slots: str | Sequence[str]) -> str:
    """One of `templates`, filled in. A slot given as several words takes one of them."""
    template = templates[int(rng.integers(len(templates)))]
    words = {k: v if isinstance(v, str) else v[int(rng.integers(len(v)))] for k, v in slots.items()}
    return template.format(**words)
