"""Names of our parameters in the public torch checkpoints of pi0, pi0.5 and SmolVLA.

The same for openpi and LeRobot, but that LeRobot puts "model." before all.
"""

from __future__ import annotations

from collections.abc import Iterable

from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.tensors import TensorSource

_SIGLIP = {
    "vision.position_embedding": "embeddings.position_embedding.weight",
    "vision.patch_embedding.": "embeddings.patch_embedding.",
    "vision.layers.": "encoder.layers.",
    "vision.post_layernorm.": "post_layernorm.",
}


def _pi0_names(vision: str, projector: str, language: str) -> dict[str, str]:
    root = "paligemma_with_expert."
    return {
        **{ours: f"{root}{vision}{theirs}" for ours, theirs in _SIGLIP.items()},
        "projector.": f"{root}{projector}",
        "language_model.": f"{root}{language}",
        "expert.": f"{root}gemma_expert.model.",
    }


PI0_NAMES = _pi0_names(
    "paligemma.model.vision_tower.vision_model.",
    "paligemma.model.multi_modal_projector.linear.",
    "paligemma.model.language_model.",
)
# As transformers before 4.52 nested PaliGemma; LeRobot's pi0 before 0.4.
PI0_NAMES_EARLY = _pi0_names(
    "paligemma.vision_tower.vision_model.",
    "paligemma.multi_modal_projector.linear.",
    "paligemma.language_model.model.",
)
SMOLVLA_NAMES = {
    **{ours: f"vlm_with_expert.vlm.model.vision_model.{theirs}" for ours, theirs in _SIGLIP.items()},
    "connector.": "vlm_with_expert.vlm.model.connector.modality_projection.proj.",
    "language_model.": "vlm_with_expert.vlm.model.text_model.",
    "expert.": "vlm_with_expert.lm_expert.",
}

# Shipped and not needed: output layers of towers that write no text, SigLIP's pooling, tables that are computed.
UNUSED = (
    r"(.*\.)?lm_head\.weight",
    r".*gemma_expert\.model\.embed_tokens\.weight",
    r".*lm_expert\.embed_tokens\.weight",
    r".*vision_model\.head\..*",
    r".*\.position_ids",
    r".*\.inv_freq",
)
_PALIGEMMA_HEADS = (
    "paligemma_with_expert.paligemma.lm_head.weight",
    "paligemma_with_expert.paligemma.language_model.lm_head.weight",
)


def theirs(ours: str, names: dict[str, str]) -> str:
    """The public name of one of our parameters. The heads of the policy are named alike."""
    for start, replacement in names.items():
        if ours == start or (start.endswith(".") and ours.startswith(start)):
            return replacement + ours[len(start) :]
    return ours


class PublicNames:
    """Our keys in one checkpoint. `prefix`: "model." in LeRobot's. Raises PolicyCheckpointError for another family."""

    def __init__(self, source: TensorSource, prefix: str = "") -> None:
        self.source, self.prefix = source, prefix
        self.keys = source.keys()
        self.present = set(self.keys)
        self.family = family_of(self.keys, prefix)
        if self.family == "smolvla":
            self.names = SMOLVLA_NAMES
        else:
            early = f"{prefix}paligemma_with_expert.paligemma.vision_tower."
            self.names = PI0_NAMES_EARLY if any(key.startswith(early) for key in self.keys) else PI0_NAMES

    def __call__(self, ours: str) -> str:
        """The token embedding of PaliGemma lies under either of its two names: safetensors writes tied tensors once."""
        name = self.prefix + theirs(ours, self.names)
        if ours == "language_model.embed_tokens.weight" and name not in self.present:
            heads = (self.prefix + head for head in _PALIGEMMA_HEADS)
            return next((head for head in heads if head in self.present), name)
        return name

    def shape(self, ours: str) -> tuple[int, ...]:
        name = self(ours)
        if name not in self.present:
            raise PolicyCheckpointError(f"{self.source.path} has no {name}; the file is not complete")
        return self.source.shape(name)

    def depth(self, ours: str) -> int:
        """Layers below `ours`, as "expert.layers."."""
        start = self.prefix + theirs(ours, self.names)
        return len({key[len(start) :].split(".", 1)[0] for key in self.keys if key.startswith(start)})


def family_of(keys: Iterable[str], prefix: str = "") -> str:
    """ "pi0", "pi05" or "smolvla"; "" for others. No config.json of openpi says which of the first two it is."""
    present = set(keys)
    if any(key.startswith(f"{prefix}vlm_with_expert.") for key in present):
        return "smolvla"
    if not any(key.startswith(f"{prefix}paligemma_with_expert.gemma_expert.") for key in present):
        return ""
    return "pi05" if f"{prefix}time_mlp_in.weight" in present else "pi0"


__all__ = ["PI0_NAMES", "SMOLVLA_NAMES", "UNUSED", "PublicNames", "family_of", "theirs"]
