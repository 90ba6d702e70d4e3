"""Words: colours with their names, and sentences that vary.

A task gives templates with slots, such as "touch the {color} {noun}". The `ood` templates of a task and the colours of
`OOD_COLORS` occur in no training episode.
"""

from __future__ import annotations

import re
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
# What objects wear that only a test puts on the table (`sim/shift.py`).
CLUTTER_COLORS: dict[str, Rgba] = {
    "teal": (0.00, 0.45, 0.45, 1.0),
    "magenta": (0.85, 0.10, 0.60, 1.0),
    "lime": (0.65, 0.95, 0.25, 1.0),
    "navy": (0.05, 0.08, 0.35, 1.0),
    "maroon": (0.45, 0.05, 0.12, 1.0),
    "ivory": (0.95, 0.93, 0.80, 1.0),
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


# ------------------------------------------------------------------------------------------- other words, for tests
_SYNONYMS: tuple[tuple[str, str], ...] = (
    ("pick up", "grab"), ("place", "set"), ("put", "set down"), ("push", "shove"), ("pull", "drag"),
    ("open", "draw open"), ("close", "shut"), ("turn on", "switch on"), ("turn off", "switch off"), ("lift", "raise"),
    ("reach", "get to"), ("press", "push down on"), ("move", "bring"), ("insert", "slide"), ("stack", "pile"),
    ("on top of", "onto"), ("next to", "beside"), ("in the", "inside the"), ("on the", "onto the"),
)  # fmt: skip
_SYNONYM_OF: dict[str, str] = dict(_SYNONYMS)
_SYNONYM_PATTERN = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _SYNONYM_OF), key=len, reverse=True)) + r")\b")


def framed(sentence: str) -> str:
    """`sentence` inside of other words, which say nothing of the task."""
    return f"hello robot, when you have a moment, here is what i would like: {sentence}, thank you"


def reworded(sentence: str, level: int) -> str:
    """A request for the same, without templates: 0 `sentence` itself; 1 politely; 2 with other verbs and prepositions,
    where it has common ones; 3 these, inside of words that say nothing."""
    if level == 0:
        return sentence
    if level == 1:
        return f"could you please {sentence}"
    other = _SYNONYM_PATTERN.sub(lambda match: _SYNONYM_OF[match[0]], sentence)
    return f"please {other}" if level == 2 else framed(other)


def contradicted(sentence: str, other: str, level: int) -> str:
    """A request for `other` and not for `sentence`, the more tempting the higher the level: 1 `other` alone; 2 that,
    and then `sentence`, negated; 3 the negated sentence first."""
    return (other, f"{other}, do not {sentence}", f"do not {sentence}, {other}")[level - 1]
