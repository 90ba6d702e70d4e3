"""The vision-language model of OpenVLA: two fused vision towers, a projector and Llama 2 (Karamcheti et al. 2024).

Both towers see each picture, in their own normalisation; the features are those of the second-to-last block, without
the last norm. Image tokens stand between the first token of the prompt and the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.policies.blocks.action_tokens import NUM_BINS
from vla_rl.policies.blocks.decoder import Decoder, DecoderConfig
from vla_rl.policies.blocks.gripper import GripperConfig
from vla_rl.policies.blocks.images import Padding
from vla_rl.policies.blocks.tokenizer import TokenizerConfig
from vla_rl.policies.blocks.vision_transformer import VisionTransformer, VisionTransformerConfig
from vla_rl.policies.blocks.vla_inputs import PromptConfig, VLAInputs

_BYTES = 259  # ids of the tokenizer of bytes
_TINY_TOWER = (32, 3, 64, 2, 56, 14)  # width, depth, mlp_width, num_heads, image_size, patch_size


@dataclass(frozen=True)
class PrismaticConfig:
    """`dino`, `siglip`: the towers, the last block of each not built. `image_mean`, `image_std`: of `dino`; `siglip`
    sees [-1, 1]. `num_padding_ids`: at the end of the vocabulary, after the 256 ids of action bins.

    FiLM: both towers have `film_width` equal to the decoder's width. The default is tiny: 0.3 million parameters.
    """

    dino: VisionTransformerConfig = field(
        default_factory=lambda: VisionTransformerConfig(
            *_TINY_TOWER, "gelu", num_registers=4, class_token=True, num_unused_layers=1, final_norm=False
        )
    )
    siglip: VisionTransformerConfig = field(
        default_factory=lambda: VisionTransformerConfig(*_TINY_TOWER, "gelu", num_unused_layers=1, final_norm=False)
    )
    decoder: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(
            64, 2, 128, 4, 4, 16, vocab_size=_BYTES + NUM_BINS + 64, norm_offset=False, activation="silu"
        )
    )
    num_padding_ids: int = 64
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name, tower in (("dino", self.dino), ("siglip", self.siglip)):
            if tower.image_size != self.dino.image_size or tower.num_patches != self.dino.num_patches:
                raise ValueError("the two towers are fused patch by patch, so their image and patch sizes must agree")
            if tower.film_width not in (0, self.decoder.width) or tower.film_width != self.dino.film_width:
                raise ValueError(f"film_width of {name} is {tower.film_width}, expected 0 or {self.decoder.width}")
        if self.first_action_id < 1:
            raise ValueError(f"a vocabulary of {self.decoder.vocab_size} ids has no room for {NUM_BINS} action bins")

    @property
    def first_action_id(self) -> int:
        """The id of the last bin; bin b has the id `first_action_id + 255 - b`."""
        return self.decoder.vocab_size - self.num_padding_ids - NUM_BINS

    @property
    def film(self) -> bool:
        return self.dino.film_width > 0

    def with_film(self) -> PrismaticConfig:
        width = self.decoder.width
        return replace(self, dino=replace(self.dino, film_width=width), siglip=replace(self.siglip, film_width=width))


def prismatic_7b() -> PrismaticConfig:
    """`prism-dinosiglip-224px` with Llama 2 7B. The norms' epsilon is 1e-6, what the published config.json amounts to,
    and not the 1e-5 of Llama 2 itself."""
    return PrismaticConfig(
        dino=VisionTransformerConfig(
            *(1024, 24, 4096, 16, 224, 14),
            activation="gelu",
            num_registers=4,
            class_token=True,
            layer_scale=True,
            num_unused_layers=1,
            final_norm=False,
        ),
        siglip=VisionTransformerConfig(
            1152, 27, 4304, 16, 224, 14, activation="gelu", num_unused_layers=1, final_norm=False
        ),
        decoder=DecoderConfig(
            4096, 32, 11008, 32, 32, 128, vocab_size=32064, norm_offset=False, norm_eps=1e-6, activation="silu"
        ),
    )


class FusedTowers(nn.Module):
    """uint8 pictures [N, 3, h, w] -> features of both towers side by side [N, num_patches, width + width]."""

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        self.featurizer = VisionTransformer(config.dino)
        self.fused_featurizer = VisionTransformer(config.siglip)
        self._mean, self._std = config.image_mean, config.image_std

    def forward(self, images: Tensor, sentence: Tensor | None = None) -> Tensor:
        pixels = images.float() / 255.0
        mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (self._mean, self._std))
        return torch.cat(
            [self.featurizer((pixels - mean) / std, sentence), self.fused_featurizer(2.0 * pixels - 1.0, sentence)],
            dim=-1,
        )


class FusedProjector(nn.Module):
    """Three linear layers with exact GELU between them."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_width, 4 * in_width)
        self.fc2 = nn.Linear(4 * in_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(functional.gelu(self.fc2(functional.gelu(self.fc1(x)))))


class Prismatic(nn.Module):
    """Towers, projector, decoder and the untied head of the vocabulary, of which action tokens read 256 rows."""

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.width
        self.vision = FusedTowers(config)
        self.projector = FusedProjector(config.dino.width + config.siglip.width, width)
        self.decoder = Decoder(config.decoder)
        self.lm_head = nn.Linear(width, config.decoder.vocab_size, bias=False)

    def look(self, images: Iterable[Tensor], sentence: Tensor | None = None) -> Tensor:
        """Projected image tokens [N, num_cameras * num_patches, width], camera after camera."""
        seen = [self.projector(self.vision(image, sentence)) for image in images]
        return torch.cat(seen, dim=1)

    def mean_sentence(self, tokens: Tensor, stop: int) -> Tensor:
        """What FiLM is conditioned on: the mean embedding [N, width] of the prompt's tokens and the stop token."""
        counts = (tokens != 0).unsqueeze(-1)
        words = torch.where(counts, self.decoder.embed(tokens), 0.0).sum(dim=1)
        return (words + self.decoder.embed(tokens.new_tensor([stop]))) / (counts.sum(dim=1) + 1)

    def embed(self, tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """First token, `image_tokens [N, I, width]`, other tokens -> [N, I + T, width], and bool [N, I + T]: which
        count, all but the last ones."""
        words, counts = self.decoder.embed(tokens), tokens != 0
        image_tokens = image_tokens.to(words.dtype)
        seen = torch.ones(image_tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        x = torch.cat([words[:, :1], image_tokens, words[:, 1:]], dim=1)
        return x, torch.cat([counts[:, :1], seen, counts[:, 1:]], dim=1)

    def action_ids(self, bins: Tensor) -> Tensor:
        """Token ids of int64 bins: the first bin has the last id."""
        return self.config.first_action_id + NUM_BINS - 1 - bins

    def action_logits(self, hidden: Tensor) -> Tensor:
        """`hidden [..., width]` -> logits of the 256 bins, float32 [..., 256]; no other token gets one."""
        first = self.config.first_action_id
        weight = self.lm_head.weight[first : first + NUM_BINS]
        return functional.linear(hidden.to(weight.dtype), weight).flip(-1).float()


@dataclass(frozen=True)
class PrismaticInputsConfig:
    """`center_crop`: share of a picture's area that is kept, around its centre (policies that were trained with random
    crops: 0.9). `prompt.end` is the token whose successor is the first action."""

    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(max_tokens=160))
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("question", clean=False, end=35))
    padding: Padding = "stretch"
    center_crop: float = 1.0
    gripper: GripperConfig = field(default_factory=GripperConfig)

    def __post_init__(self) -> None:
        if not 0.0 < self.center_crop <= 1.0:
            raise ValueError(f"center_crop is the share of the area that is kept, in (0, 1], got {self.center_crop}")
        if self.prompt.end < 0 or self.tokenizer.bos < 0:
            raise ValueError("OpenVLA needs a first token (tokenizer.bos) and a last one (prompt.end) in its prompt")


def inputs_7b(tokenizer: TokenizerConfig) -> PrismaticInputsConfig:
    """What the published OpenVLA takes; its end token is the empty piece of Llama's vocabulary."""
    return PrismaticInputsConfig(tokenizer, PromptConfig("question", clean=False, end=29871))


def build_inputs(
    config: PrismaticInputsConfig,
    vlm: PrismaticConfig,
    cameras: tuple[str, ...],
    *,
    state_dim: int,
    action_dim: int,
    chunk_dim: int,
) -> VLAInputs:
    """Raises ValueError for more action dimensions than the model has, or text ids that would be actions."""
    if config.tokenizer.kind == "bytes" and vlm.first_action_id < _BYTES:
        raise ValueError(f"the vocabulary has {vlm.first_action_id} ids before those of actions, bytes need {_BYTES}")
    return VLAInputs(
        cameras=cameras,
        image_size=vlm.dino.image_size,
        padding=config.padding,
        tokenizer=config.tokenizer,
        prompt=config.prompt,
        state_dim=state_dim,
        action_dim=action_dim,
        chunk_dim=chunk_dim,
        crop_area=config.center_crop,
        gripper=config.gripper,
    )


__all__ = [
    "FusedProjector",
    "FusedTowers",
    "Prismatic",
    "PrismaticConfig",
    "PrismaticInputsConfig",
    "build_inputs",
    "inputs_7b",
    "prismatic_7b",
]
