"""A flow head or a token head on any vision-language model of transformers (see `hf_backbone.py`).

The flow head is a small transformer over the steps of a chunk that attends to the model's last hidden states, as that
of GR00T; the token head reads the same states and gives logits over bins of each action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.core import ActionChunk, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.flow.sampling import ode
from vla_rl.policies.blocks.action_tokens import token_loss
from vla_rl.policies.blocks.decoder import Decoder, DecoderConfig, append_kv
from vla_rl.policies.blocks.expert import ActionExpert, ActionExpertConfig
from vla_rl.policies.blocks.flow_matching import FlowMatchingConfig, masked_mean, prefix_flow_loss
from vla_rl.policies.blocks.freezing import is_frozen
from vla_rl.policies.blocks.prefix_cache import suffix_mask
from vla_rl.policies.blocks.sizes import require_sizes
from vla_rl.policies.blocks.vla_inputs import VLAInputs
from vla_rl.policies.hf_backbone import HFBackbone, HFBackboneConfig, backbone_of_folder
from vla_rl.protocols import PolicyInputs, Prefix, PrefixKV, VelocityOutput


@dataclass(frozen=True)
class HFFlowConfig:
    """`state_dim`, `action_dim`: 0 in a recipe, where `build_policy` takes them from the environment, `cameras` too.

    `num_steps`: Euler steps of the deployed ODE. `expert`: size of the flow head.
    """

    state_dim: int = 0
    action_dim: int = 0
    cameras: tuple[str, ...] = ("agent",)
    action_horizon: int = 16
    num_steps: int = 4
    backbone: HFBackboneConfig = field(default_factory=HFBackboneConfig)
    expert: ActionExpertConfig = field(default_factory=lambda: ActionExpertConfig(width=256, num_layers=4))
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)


@dataclass(frozen=True)
class TokenHeadConfig:
    """A decoder of `num_layers` over the L = H * A action tokens.

    `num_bins`: equal bins of [-1, 1] in normalised actions. `decoding`: "parallel" gives all tokens at once, each
    independent of the others given the observation; "autoregressive" conditions each on those before it.
    """

    num_bins: int = 256
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    width: int = 256
    num_layers: int = 4
    num_heads: int = 4
    feed_forward_ratio: int = 2

    def __post_init__(self) -> None:
        if self.num_bins < 2 or self.width % (2 * self.num_heads):
            raise ValueError(f"TokenHeadConfig: num_bins >= 2 and width a multiple of 2 * num_heads, got {self}")


@dataclass(frozen=True)
class HFTokenConfig:
    """`state_dim`, `action_dim`: 0 in a recipe, where `build_policy` takes them from the environment, `cameras` too."""

    state_dim: int = 0
    action_dim: int = 0
    cameras: tuple[str, ...] = ("agent",)
    action_horizon: int = 8
    backbone: HFBackboneConfig = field(default_factory=HFBackboneConfig)
    head: TokenHeadConfig = field(default_factory=TokenHeadConfig)


class HFEncoder(nn.Module):
    """What both heads share: observation -> inputs -> prefix, the normalisers, and what of it is frozen."""

    def __init__(self, config: HFFlowConfig | HFTokenConfig) -> None:
        super().__init__()
        require_sizes(config)
        self.cameras = config.cameras
        backbone = config.backbone
        self.backbone = HFBackbone(backbone, num_cameras=len(config.cameras), state_dim=config.state_dim)
        self.inputs = VLAInputs(
            cameras=config.cameras,
            image_size=self.backbone.image_size,
            padding=backbone.padding,
            tokenizer=backbone.tokenizer,
            prompt=backbone.prompt,
            state_dim=config.state_dim,
            action_dim=config.action_dim,
            chunk_dim=config.action_dim,
        )
        if backbone.tokenizer.kind == "bytes":  # of others the file is filled in later
            _require_ids(self)

    @property
    def vision_is_frozen(self) -> bool:
        """True where nothing before the language model's input can change."""
        language = self.backbone.language_model
        theirs = {id(p) for p in language.parameters()}
        return not any(p.requires_grad for p in self.backbone.vlm.parameters() if id(p) not in theirs)

    def with_image_tokens(self, inputs: PolicyInputs) -> PolicyInputs:
        return replace(inputs, images={}, image_tokens=self._image_tokens(inputs))

    def forward(self, inputs: PolicyInputs) -> Prefix:
        return self.backbone(inputs, self._image_tokens(inputs))

    def _image_tokens(self, inputs: PolicyInputs) -> Tensor:
        if inputs.image_tokens is not None:
            return inputs.image_tokens
        return self.backbone.image_tokens(inputs.images, self.cameras)


class HFFlowPolicy(nn.Module):
    """Implements `FlowPolicy`, `HasVisionTokens`, `HasSupervisedLoss` and `LearnsFromPrefix` of `vla_rl.protocols`."""

    takes_step_times = True

    def __init__(self, config: HFFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.action_horizon, self.action_dim = config.action_horizon, config.action_dim
        self.encoder = HFEncoder(config)
        self.feature_dim, self.hidden_dim = self.encoder.backbone.feature_dim, config.expert.width
        self.expert = ActionExpert(
            config.expert,
            action_dim=config.action_dim,
            action_horizon=config.action_horizon,
            prefix_width=config.backbone.prefix_width,
            pooled_dim=self.feature_dim,
        )

    @staticmethod
    def from_folder(folder: str | Path, config: HFFlowConfig, *, num_layers: int = 0) -> HFFlowPolicy:
        """With a new head on the model of a folder; see `backbone_of_folder`."""
        backbone, weights, tokenizer = backbone_of_folder(folder, config.backbone, num_layers=num_layers)
        policy = HFFlowPolicy(replace(config, backbone=backbone))
        _fill(policy.encoder, weights, tokenizer)
        return policy

    # ------------------------------------------------------------------------------------------------ the encoder
    def set_normalization(self, state: Normalizer, action: Normalizer) -> None:
        self.encoder.inputs.set_normalization(state, action)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        return self.encoder.inputs.normalize_actions(actions)

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        return self.encoder.inputs.unnormalize_actions(actions)

    @property
    def vision_is_frozen(self) -> bool:
        return self.encoder.vision_is_frozen

    @property
    def encoder_is_frozen(self) -> bool:
        return is_frozen(self.encoder)

    def freeze_encoder(self) -> None:
        """From now on the head alone is trained."""
        self.encoder.requires_grad_(False)

    def preprocess(self, obs: Observation) -> PolicyInputs:
        """Raises ValueError where a camera is missing, the state has another size or a prompt is too long."""
        return self.encoder.inputs(obs)

    def with_image_tokens(self, inputs: PolicyInputs) -> PolicyInputs:
        """`inputs` with projected image tokens instead of pictures; see `HFBackbone.image_tokens`."""
        return self.encoder.with_image_tokens(inputs)

    def encode(self, inputs: PolicyInputs) -> Prefix:
        return self.encoder(inputs)

    # --------------------------------------------------------------------------------------------------- the head
    def velocity(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        """`x_t` float32 [N, H, A] normalised, `flow_time` float32 [N], or [N, H] of each step."""
        return self.expert(prefix, x_t, flow_time)

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """`config.num_steps` Euler steps of the flow's ODE from `noise` (standard normal [N, H, A])."""
        return ActionChunk(self.unnormalize_actions(self.chunks(self.encode(self.preprocess(obs)), noise)))

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Normalised chunks [N, H, A]: the ODE from `noise`."""
        return ode(self, prefix, noise.to(prefix.pooled), self.config.num_steps)

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Flow-matching loss [N]; padded actions are not read and bear no loss."""
        return self.prefix_loss(self.encode(inputs), actions, mask, generator)

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of what is encoded already."""
        return prefix_flow_loss(self.velocity, prefix, actions, mask, self.config.flow_matching, generator)


class TokenHead(nn.Module):
    """Logits over bins for each of L action tokens, from a prefix."""

    def __init__(self, config: TokenHeadConfig, *, num_tokens: int, prefix_width: int, pooled_dim: int) -> None:
        super().__init__()
        self.config, self.num_tokens = config, num_tokens
        width, head_dim = config.width, config.width // config.num_heads
        sizes = DecoderConfig(
            width, config.num_layers, config.feed_forward_ratio * width, config.num_heads, config.num_heads, head_dim
        )
        self.decoder = Decoder(sizes)
        self.context_kv = nn.ModuleList(
            nn.Linear(prefix_width, 2 * width, bias=False) for _ in range(config.num_layers)
        )
        self.slots = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.pooled_in = nn.Linear(pooled_dim, width)
        if config.decoding == "autoregressive":
            self.embed_bins = nn.Embedding(config.num_bins, width)
        self.logits_out = nn.Linear(width, config.num_bins)
        nn.init.zeros_(self.logits_out.weight)
        nn.init.zeros_(self.logits_out.bias)

    def forward(self, prefix: Prefix, bins: Tensor) -> Tensor:
        """float32 [N, L, V]: at each position, given the bins before it (`bins` int64 [N, L])."""
        x = self._slots(prefix)
        if self.config.decoding == "autoregressive":
            x = x + functional.pad(self.embed_bins(bins[:, :-1]), (0, 0, 1, 0))
        return self._decode(prefix, x, self._context(prefix), 0)[0]

    def sample(self, prefix: Prefix, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        """int64 [N, L]; see `TokenPolicy.sample_tokens`."""
        x, kept = self._slots(prefix), self._context(prefix)
        drawn: list[Tensor] = []
        if self.config.decoding == "parallel":
            logits = self._decode(prefix, x, kept, 0)[0]
            return torch.stack([draw(logits[:, i], i) for i in range(self.num_tokens)], dim=1)
        for i in range(self.num_tokens):
            now = x[:, i : i + 1] if i == 0 else x[:, i : i + 1] + self.embed_bins(drawn[-1])[:, None]
            logits, own = self._decode(prefix, now, kept, i)
            kept = [append_kv(old, new) for old, new in zip(kept, own, strict=True)]
            drawn.append(draw(logits[:, 0], i))
        return torch.stack(drawn, dim=1)

    def _slots(self, prefix: Prefix) -> Tensor:
        return self.slots + self.pooled_in(prefix.pooled).unsqueeze(1)

    def _context(self, prefix: Prefix) -> list[PrefixKV]:
        heads = (self.config.num_heads, -1)
        pairs = [layer(prefix.tokens).chunk(2, dim=-1) for layer in self.context_kv]
        return [PrefixKV(*(x.unflatten(-1, heads).transpose(1, 2) for x in pair)) for pair in pairs]

    def _decode(
        self, prefix: Prefix, x: Tensor, kept: list[PrefixKV], first: int
    ) -> tuple[Tensor, tuple[PrefixKV, ...]]:
        """Logits of tokens `first`, `first + 1`, ..., and their keys and values; `kept`: of what came before them."""
        n, length = x.shape[:2]
        positions = torch.arange(first, first + length, device=x.device)
        among = torch.ones(length, first + length, dtype=torch.bool, device=x.device)
        if self.config.decoding == "autoregressive":
            among = among.tril(diagonal=first)
        mask = suffix_mask(prefix.mask, among)
        hidden, own = self.decoder(x, positions.expand(n, -1), mask, prefix=kept)
        return self.logits_out(hidden).float(), own


class HFTokenPolicy(nn.Module):
    """Implements `TokenPolicy`, `HasVisionTokens`, `HasSupervisedLoss` and `LearnsFromPrefix` of `vla_rl.protocols`."""

    def __init__(self, config: HFTokenConfig) -> None:
        super().__init__()
        self.config = config
        self.action_horizon, self.action_dim = config.action_horizon, config.action_dim
        self.num_bins = config.head.num_bins
        self.encoder = HFEncoder(config)
        self.feature_dim = self.encoder.backbone.feature_dim
        self.action_head = TokenHead(
            config.head,
            num_tokens=config.action_horizon * config.action_dim,
            prefix_width=config.backbone.prefix_width,
            pooled_dim=self.feature_dim,
        )

    @staticmethod
    def from_folder(folder: str | Path, config: HFTokenConfig, *, num_layers: int = 0) -> HFTokenPolicy:
        """With a new head on the model of a folder; see `backbone_of_folder`."""
        backbone, weights, tokenizer = backbone_of_folder(folder, config.backbone, num_layers=num_layers)
        policy = HFTokenPolicy(replace(config, backbone=backbone))
        _fill(policy.encoder, weights, tokenizer)
        return policy

    # ------------------------------------------------------------------------------------------------ the encoder
    def set_normalization(self, state: Normalizer, action: Normalizer) -> None:
        """Of actions, one that maps to [-1, 1] ("min_max" or "quantiles"): what is outside falls into the last bin."""
        self.encoder.inputs.set_normalization(state, action)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        return self.encoder.inputs.normalize_actions(actions)

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        return self.encoder.inputs.unnormalize_actions(actions)

    @property
    def vision_is_frozen(self) -> bool:
        return self.encoder.vision_is_frozen

    @property
    def encoder_is_frozen(self) -> bool:
        return is_frozen(self.encoder)

    def freeze_encoder(self) -> None:
        """From now on the head alone is trained."""
        self.encoder.requires_grad_(False)

    def preprocess(self, obs: Observation) -> PolicyInputs:
        """Raises ValueError where a camera is missing, the state has another size or a prompt is too long."""
        return self.encoder.inputs(obs)

    def with_image_tokens(self, inputs: PolicyInputs) -> PolicyInputs:
        """`inputs` with projected image tokens instead of pictures; see `HFBackbone.image_tokens`."""
        return self.encoder.with_image_tokens(inputs)

    def encode(self, inputs: PolicyInputs) -> Prefix:
        return self.encoder(inputs)

    # --------------------------------------------------------------------------------------------------- the head
    def sample_tokens(self, prefix: Prefix, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        return self.action_head.sample(prefix, draw)

    def token_logits(self, prefix: Prefix, bins: Tensor) -> Tensor:
        return self.action_head(prefix, bins)

    def actions_of_bins(self, bins: Tensor) -> Tensor:
        """Centres of `num_bins` equal bins of [-1, 1], float32 [N, H, A]."""
        return ((2.0 * bins + 1.0) / self.num_bins - 1.0).unflatten(1, (self.action_horizon, self.action_dim))

    def bins_of_actions(self, actions: Tensor) -> Tensor:
        """int64 [N, L] of normalised actions [N, H, A]."""
        bins = ((actions + 1.0) * 0.5 * self.num_bins).floor().long()
        return bins.clamp(0, self.num_bins - 1).flatten(1)

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """The likeliest bin of each token, one after the other; `noise` has no effect."""
        return ActionChunk(self.unnormalize_actions(self.chunks(self.encode(self.preprocess(obs)), noise)))

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Normalised chunks [N, H, A]: greedy, as token policies are deployed."""
        del noise
        return self.actions_of_bins(self.sample_tokens(prefix, lambda logits, _: logits.argmax(dim=-1)))

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Mean cross-entropy of the tokens of unpadded steps: [N]."""
        return self.prefix_loss(self.encode(inputs), actions, mask, generator)

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of what is encoded already."""
        del generator  # nothing is drawn; the argument belongs to the protocol
        bins = self.bins_of_actions(torch.where(mask.unsqueeze(-1), actions, 0.0))
        logits = self.token_logits(prefix, bins)
        return masked_mean(token_loss(logits, bins.view(actions.shape)), mask)


def _fill(encoder: HFEncoder, weights: dict[str, Tensor], tokenizer: Tensor | None) -> None:
    encoder.backbone.vlm.load_state_dict(weights)
    if tokenizer is not None:
        encoder.inputs.tokenizer.file.copy_(tokenizer)
        _require_ids(encoder)


def _require_ids(encoder: HFEncoder) -> None:
    known, given = encoder.backbone.vlm.get_input_embeddings().num_embeddings, encoder.inputs.tokenizer.num_ids
    if given > known:
        raise ValueError(f"the tokenizer gives {given} ids, the model knows {known}; it is that of another model")


__all__ = ["HFFlowConfig", "HFFlowPolicy", "HFTokenConfig", "HFTokenPolicy", "TokenHeadConfig"]
