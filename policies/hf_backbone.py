"""Any vision-language model of transformers as the encoder of a policy: pictures, prompt and state in, a prefix out.

The model is built from its own Hugging Face config, without its vocabulary head, so a saved policy is rebuilt with no
download; the weights come from a local folder (`save_pretrained`) or from a policy that was saved before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.policies.blocks.images import Padding
from vla_rl.policies.blocks.prefix_cache import pooled_features
from vla_rl.policies.blocks.tokenizer import FILES, Tokenizer, TokenizerConfig
from vla_rl.policies.blocks.transformer import RMSNorm
from vla_rl.policies.blocks.vla_inputs import PromptConfig
from vla_rl.protocols import PolicyInputs, Prefix

# How a family takes its pictures: [N * C, 3, h, w], [N, C, 3, h, w], or rows of flattened patches with a grid.
_PICTURES = {
    "paligemma": "batch",
    "smolvlm": "list",
    "idefics3": "list",
    "qwen2_5_vl": "patches",
    "qwen3_vl": "patches",
}
_DEFAULT_IMAGE_SIZE = 224  # of a tower that takes any size


@dataclass(frozen=True)
class HFBackboneConfig:
    """`model`: the Hugging Face config as JSON text, with its `model_type`.

    `image_size`: pictures are resized to it, in pixels (0: what the model was trained with). `image_mean`, `image_std`:
    of its preprocessor, for values in [0, 1]. `before_image`, `after_image`: ids around the tokens of each picture
    (Qwen's are in its config; SmolVLM's are those of `<fake_token_around_image>` and `<global-img>`).
    `prefix_width`: of the tokens that an action head reads.
    """

    model: str = ""
    image_size: int = 0
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    padding: Padding = "stretch"
    before_image: tuple[int, ...] = ()
    after_image: tuple[int, ...] = ()
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    prefix_width: int = 256


class HFBackbone(nn.Module):
    """`PolicyInputs` -> `Prefix`, once a decision.

    The sequence is [pictures, each between its marks][prompt][state]; PaliGemma attends to all of it, the others
    causally, as they were trained. `tokens` of the prefix are the last hidden states, projected and normed; `pooled`
    their mean and the normalised state.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: HFBackboneConfig, *, num_cameras: int, state_dim: int) -> None:
        super().__init__()
        self.config, self.num_cameras = config, num_cameras
        self.vlm = _build(config.model)
        hf = self.vlm.config
        self._pictures = _PICTURES[hf.model_type]
        self.width: int = hf.get_text_config().hidden_size
        self.image_size = _image_size(config.image_size, hf.vision_config)
        self.state_in = nn.Linear(state_dim, self.width)
        self.project = nn.Linear(self.width, config.prefix_width)
        self.norm = RMSNorm(config.prefix_width)
        self.feature_dim = config.prefix_width + state_dim
        self.register_buffer("mean", torch.tensor(config.image_mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.image_std)[:, None, None], persistent=False)
        self._start: Tensor | None = None  # positions of the tokens of pictures and of the first one after them

    @property
    def language_model(self) -> nn.Module:
        """The language model inside `vlm`, its embedding of tokens included."""
        name = "language_model" if hasattr(self.vlm, "language_model") else "text_model"
        return getattr(self.vlm, name)

    # -------------------------------------------------------------------------------------------------- pictures
    @property
    def tokens_per_image(self) -> int:
        config, vision = self.vlm.config, self.vlm.config.vision_config
        patches = (self.image_size // vision.patch_size) ** 2
        shrink = vision.spatial_merge_size if self._pictures == "patches" else getattr(config, "scale_factor", 1)
        return patches // shrink**2

    def image_tokens(self, images: Mapping[str, Tensor], cameras: tuple[str, ...]) -> Tensor:
        """uint8 [N, 3, h, w] each -> [N, C * tokens_per_image, width * (1 + D)]; D features of Qwen3-VL go to deeper
        layers, and stand beside."""
        stacked = torch.stack([images[camera] for camera in cameras], dim=1)
        grid = None
        pixels = (stacked.float() / 255.0 - self.mean) / self.std
        if self._pictures == "patches":
            pixels, grid = _patches(pixels.flatten(0, 1), self.vlm.config.vision_config)
            found = self.vlm.get_image_features(pixels, grid)
        else:
            pixels = pixels.flatten(0, 1) if self._pictures == "batch" else pixels
            found = self.vlm.get_image_features(pixels.to(self.vlm.dtype))
        n = len(stacked)
        parts = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
        joined = [part if isinstance(part, Tensor) else torch.cat(list(part)) for part in parts]
        return torch.cat([part.reshape(n, -1, self.width) for part in joined], dim=-1)

    def _as_found(self, image_tokens: Tensor) -> Any:
        """What `get_image_features` gave, from `image_tokens`."""
        pictures = image_tokens.unflatten(1, (self.num_cameras, -1)).flatten(0, 1).split(self.width, dim=-1)
        if self._pictures == "batch":
            return SimpleNamespace(pooler_output=pictures[0])
        first, *deeper = (part.unbind(0) for part in pictures)
        return SimpleNamespace(pooler_output=first, deepstack_features=deeper)

    # -------------------------------------------------------------------------------------------------- sequence
    def forward(self, inputs: PolicyInputs, image_tokens: Tensor) -> Prefix:
        hidden, mask = self.hidden(inputs, image_tokens)
        dtype = self.project.weight.dtype
        tokens = self.norm(self.project(hidden.to(dtype))).float()
        return Prefix(tokens, mask, pooled_features(tokens, mask, inputs.state))

    def hidden(self, inputs: PolicyInputs, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states [N, L, width], and which of them count, bool [N, L]."""
        n, device = len(inputs), inputs.tokens.device
        pictures = torch.tensor(self._picture_ids(), dtype=torch.int64, device=device).expand(n, -1)
        mask = torch.cat([torch.ones_like(pictures, dtype=torch.bool), inputs.tokens != 0], dim=1)
        mask = torch.cat([mask, mask.new_ones(n, 1)], dim=1)
        words = self.vlm.get_input_embeddings()(torch.cat([pictures, inputs.tokens], dim=1))
        state = self.state_in(inputs.state.to(self.state_in.weight.dtype)).unsqueeze(1).to(words.dtype)
        sequence, seen = torch.cat([words, state], dim=1), image_tokens.to(words.dtype)
        options: dict[str, Any] = {}
        if self._pictures == "list":  # these models would put them into the precision of their vision tower
            places = functional.pad(pictures == self.vlm.config.image_token_id, (0, inputs.tokens.shape[1] + 1))
            sequence = sequence.masked_scatter(places.unsqueeze(-1), seen)
        else:
            options["mm_encoder_outputs"] = {"image": self._as_found(seen)}
        if self.vlm.config.model_type == "paligemma":
            options["token_type_ids"] = torch.zeros_like(mask, dtype=torch.int64)  # all attend to all
        output = self.vlm(
            inputs_embeds=sequence,
            attention_mask=mask.long(),
            position_ids=self._positions(mask, pictures.shape[1]),
            use_cache=False,
            **options,
        )
        return output.last_hidden_state, mask

    def _picture_ids(self) -> list[int]:
        config, hf = self.config, self.vlm.config
        before, after = config.before_image, config.after_image
        if self._pictures == "patches" and not before:  # Qwen counts positions of pictures from mark to mark
            before, after = (hf.vision_start_token_id,), (hf.vision_end_token_id,)
        return [*before, *[hf.image_token_id] * self.tokens_per_image, *after] * self.num_cameras

    def _positions(self, mask: Tensor, num_before: int) -> Tensor:
        """int64 [N, L], of Qwen [3, N, L]: tokens that do not count take no position."""
        counted = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
        if self._pictures != "patches":
            return counted + int(self.vlm.config.model_type == "paligemma")  # which counts from one
        if self._start is None or self._start.device != mask.device:
            self._start = self._picture_positions().to(mask.device)
        pictures = self._start[:, :-1].unsqueeze(1).expand(-1, len(mask), -1)
        text = (counted[:, num_before:] - num_before) + self._start[:, -1, None, None]
        return torch.cat([pictures, text], dim=2)

    def _picture_positions(self) -> Tensor:
        """int64 [3, P + 1] of time, row and column: of the P tokens of the pictures and of the first one after."""
        ids = torch.tensor([[*self._picture_ids(), 0]])
        side = self.image_size // self.vlm.config.vision_config.patch_size
        grid = torch.tensor([[1, side, side]] * self.num_cameras)
        kinds = (ids == self.vlm.config.image_token_id).int()
        return self.vlm.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0][:, 0]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_start": None}


def _patches(pixels: Tensor, vision: Any) -> tuple[Tensor, Tensor]:
    """[M, 3, s, s] -> rows of patches [M * patches, 3 * frames * p * p] in the order of Qwen's merging, grid [M, 3]."""
    p, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    side = pixels.shape[-1] // p
    x = pixels.unflatten(3, (side // merge, merge, p)).unflatten(2, (side // merge, merge, p))
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    grid = torch.tensor([[1, side, side]], device=pixels.device).expand(len(pixels), -1)
    return x.reshape(len(pixels) * side * side, -1), grid


def _image_size(wanted: int, vision: Any) -> int:
    size = wanted or getattr(vision, "image_size", _DEFAULT_IMAGE_SIZE)
    patch = vision.patch_size * getattr(vision, "spatial_merge_size", 1)
    if size % patch:
        raise ValueError(f"image_size is {size}, the model takes multiples of {patch}")
    return size


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this policy is a model of transformers: pip install 'vla-rl[vla]'") from error
    return transformers


def _build(text: str) -> Any:
    """Raises ValueError for a model of a family that is not known here."""
    values = json.loads(text) if text else {}
    kind = values.pop("model_type", None)
    if kind not in _PICTURES:
        raise ValueError(
            f"backbone.model must be the JSON of a Hugging Face config whose model_type is one of {sorted(_PICTURES)}, "
            f"got model_type {kind!r}; HFBackboneConfig of a local folder: backbone_of_folder"
        )
    library = _transformers()
    config = library.AutoConfig.for_model(kind, **values)
    return library.AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def backbone_of_folder(
    folder: str | Path, config: HFBackboneConfig, *, num_layers: int = 0
) -> tuple[HFBackboneConfig, dict[str, Tensor], Tensor | None]:
    """What a folder of `save_pretrained` says: `config` with its model, preprocessor and tokenizer filled in, the
    weights of `HFBackbone.vlm`, and the bytes of the tokenizer's file (None where there is none).

    `num_layers`: only so many layers of the language model are kept (0: all). Raises FileNotFoundError for a folder
    without a model, ValueError where weights are missing or do not fit.
    """
    folder, library = Path(folder), _transformers()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; expected a folder written by save_pretrained")
    hf = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hf.model_type not in _PICTURES:
        raise ValueError(f"{folder}: model_type {hf.model_type!r} is none of {sorted(_PICTURES)}")
    text = hf.get_text_config()
    if num_layers:
        text.num_hidden_layers = num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:num_layers]
    model, found = library.AutoModel.from_pretrained(
        folder, config=hf, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    wrong = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if wrong:
        raise ValueError(f"{folder}: weights are missing or of another shape: {wrong[:10]}")
    config = replace(config, model=json.dumps(hf.to_diff_dict() | {"model_type": hf.model_type}))
    config = _with_preprocessor(config, folder / "preprocessor_config.json")
    if not any((folder / name).is_file() for name in FILES):
        return config, model.state_dict(), None
    tokenizer = Tokenizer.from_folder(folder, bos=config.tokenizer.bos, max_tokens=config.tokenizer.max_tokens)
    return replace(config, tokenizer=tokenizer.config), model.state_dict(), tokenizer.file


def _with_preprocessor(config: HFBackboneConfig, file: Path) -> HFBackboneConfig:
    if not file.is_file():
        return config
    values = json.loads(file.read_text())
    mean, std = values.get("image_mean", config.image_mean), values.get("image_std", config.image_std)
    return replace(config, image_mean=tuple(mean), image_std=tuple(std))


__all__ = ["HFBackbone", "HFBackboneConfig", "backbone_of_folder"]
