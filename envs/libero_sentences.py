"""Which sentence of LIBERO is wrong for which task: it names another object, place or goal that the same scene has.

From the BDDL files of LIBERO (hf-libero 0.1.4): what lies in each task's scene. In libero_spatial the other sentence is
of the scene's second bowl, in libero_object of another object that lies there; all tasks of libero_goal, and the first
two of libero_10, share one scene. No other task of libero_10 shares its scene with one of its suite.
"""

from __future__ import annotations

_BOWLS = (
    "between the plate and the ramekin", "next to the ramekin", "from table center", "on the cookie box",
    "in the top drawer of the wooden cabinet", "on the ramekin", "next to the cookie box", "on the stove",
    "next to the plate", "on the wooden cabinet",
)  # fmt: skip
_GROCERIES = (
    "alphabet soup", "cream cheese", "salad dressing", "bbq sauce", "ketchup", "tomato sauce", "butter", "milk",
    "chocolate pudding", "orange juice",
)  # fmt: skip
SENTENCES: dict[str, tuple[str, ...]] = {
    "libero_spatial": tuple(f"pick up the black bowl {place} and place it on the plate" for place in _BOWLS),
    "libero_object": tuple(f"pick up the {thing} and place it in the basket" for thing in _GROCERIES),
    "libero_goal": (
        "open the middle drawer of the cabinet",
        "put the bowl on the stove",
        "put the wine bottle on top of the cabinet",
        "open the top drawer and put the bowl inside",
        "put the bowl on top of the cabinet",
        "push the plate to the front of the stove",
        "put the cream cheese in the bowl",
        "turn on the stove",
        "put the bowl on the plate",
        "put the wine bottle on the rack",
    ),
    "libero_10": (
        "put both the alphabet soup and the tomato sauce in the basket",
        "put both the cream cheese box and the butter in the basket",
    ),
}
_OTHER: dict[str, tuple[int, ...]] = {
    "libero_spatial": (1, 6, 8, 9, 9, 3, 7, 9, 1, 7),
    "libero_object": (1, 0, 4, 8, 3, 7, 5, 6, 9, 8),
    "libero_goal": (3, 8, 9, 4, 1, 6, 5, 1, 4, 2),
    "libero_10": (1, 0),
}


def other_sentence(task: str) -> str | None:
    """A sentence of another task whose goal could be reached in the scene of `task` ("SUITE/NUMBER" or "SUITE/NAME");
    None where there is none."""
    suite, _, name = task.partition("/")
    sentences = SENTENCES.get(suite, ())
    if not name.isdigit():
        words = name.partition("SCENE2_")[2] or name
        name = str(sentences.index(said)) if (said := words.replace("_", " ")) in sentences else ""
    number = int(name) if name else len(sentences)
    return sentences[_OTHER[suite][number]] if number < len(sentences) else None
