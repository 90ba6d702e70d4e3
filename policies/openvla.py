"""OpenVLA: a vision-language model that writes actions as tokens, one after the other (Kim et al. 2024).

`encode` leaves keys and values of everything up to the last token of the prompt; decoding starts from that token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from vla_rl.core import ActionChunk, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.action_tokens import NUM_BINS, actions_of_bins, bins_of_actions, pick_bins, token_loss
from vla_rl.policies.blocks.decoder import DecoderLayer, append_kv, block_mask, positions_of
from vla_rl.policies.blocks.flow_matching import masked_mean
from vla_rl.policies.blocks.freezing import freeze, is_frozen
from vla_rl.policies.blocks.prefix_cache import make_prefix, suffix_mask, suffix_positions
from vla_rl.policies.blocks.prismatic import (
    Prismatic,
    PrismaticConfig,
    PrismaticInputsConfig,
    build_inputs,
    inputs_7b,
    prismatic_7b,
)
from vla_rl.policies.blocks.sizes import require_sizes
from vla_rl.policies.blocks.tokenizer import TokenizerConfig
from vla_rl.protocols import PolicyInputs, Prefix, PrefixKV


@dataclass(frozen=True)
class OpenVLAConfig:
    """`state_dim`, `action_dim`: 0 in a recipe, where `build_policy` takes them from the environment, `cameras` too.
    The state is a feature for critics alone. `chunk_dim`: action dimensions of the model, zeros where there are fewer.

    `temperature`: of the deployed policy; 0 takes the most probable token.
    """

    state_dim: int = 0
    action_dim: int = 0
    cameras: tuple[str, ...] = ("agent",)
    action_horizon: int = 1
    chunk_dim: int = 7
    temperature: float = 0.0
    vlm: PrismaticConfig = field(default_factory=PrismaticConfig)
    inputs: PrismaticInputsConfig = field(default_factory=PrismaticInputsConfig)

    def __post_init__(self) -> None:
        if self.action_horizon < 1 or self.temperature < 0.0:
            raise ValueError("OpenVLAConfig: action_horizon must be at least 1 and temperature at least 0")
        if self.vlm.film:
            raise ValueError("OpenVLAConfig: FiLM belongs to OpenVLA-OFT; leave film_width at 0")


def openvla_7b_size(tokenizer: TokenizerConfig | None = None) -> OpenVLAConfig:
    """The published model. `tokenizer`: that of Llama 2; without one, bytes stand in for it."""
    return OpenVLAConfig(vlm=prismatic_7b(), inputs=inputs_7b(tokenizer or TokenizerConfig(max_tokens=160)))


class OpenVLA(nn.Module):
    """Implements `TokenPolicy`, `HasVisionTokens`, `HasSupervisedLoss` and `LearnsFromPrefix` of `vla_rl.protocols`."""

    num_bins = NUM_BINS

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        require_sizes(config)
        self.config = config
        self.action_horizon, self.noise_dim = config.action_horizon, config.chunk_dim
        self.action_dim = config.action_dim
        self.feature_dim = config.vlm.decoder.width + config.state_dim
        self.inputs = build_inputs(
            config.inputs,
            config.vlm,
            config.cameras,
            state_dim=config.state_dim,
            action_dim=config.action_dim,
            chunk_dim=config.chunk_dim,
        )
        self.vlm = Prismatic(config.vlm)

    # ------------------------------------------------------------------------------------------- inputs and actions
    def set_normalization(self, state: Normalizer, action: Normalizer) -> None:
        """Normalisers of the state [S] and of one control step's action [A]."""
        self.inputs.set_normalization(state, action)

    def preprocess(self, obs: Observation) -> PolicyInputs:
        """Raises ValueError where a camera is missing, the state has another size or a prompt is too long."""
        return self.inputs(obs)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        return self.inputs.normalize_actions(actions)

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        """Inverse of `normalize_actions`, but for a binary gripper."""
        return self.inputs.unnormalize_actions(actions)

    # ------------------------------------------------------------------------------------------------- the encoder
    @property
    def vision_is_frozen(self) -> bool:
        return is_frozen(self.vlm.vision, self.vlm.projector)

    @property
    def encoder_is_frozen(self) -> bool:
        return is_frozen(*self._encoder())

    def freeze_encoder(self) -> None:
        """All that the prefix depends on, which leaves the last layer's queries, output and feed-forward, the last norm
        and the head."""
        freeze(*self._encoder())

    def with_image_tokens(self, inputs: PolicyInputs) -> PolicyInputs:
        return replace(inputs, images={}, image_tokens=self._image_tokens(inputs))

    def encode(self, inputs: PolicyInputs) -> Prefix:
        """Keys and values of first token, pictures and prompt; the prompt's last token, which decoding starts from, is
        masked out. `pooled`: see `make_prefix`, of the hidden states that enter the last layer."""
        x, counts = self.vlm.embed(inputs.tokens, self._image_tokens(inputs))
        index = torch.arange(x.shape[1], device=x.device)
        mask = counts & (index != counts.sum(dim=1, keepdim=True) - 1)
        causal = block_mask(mask, torch.ones(x.shape[1], dtype=torch.bool, device=x.device))
        hidden, layers = self.vlm.decoder.prefill(x, positions_of(mask), causal)
        return make_prefix(hidden, layers, mask, inputs.state)

    # ---------------------------------------------------------------------------------------------------- decoding
    def sample_tokens(self, prefix: Prefix, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Bins int64 [N, H * D], each decoded from the cache of all before it."""
        layers, token = prefix.layers, self._start(prefix)
        drawn: list[Tensor] = []
        for position in range(self.action_horizon * self.noise_dim):
            hidden, own = self._decode(prefix, token, layers, position)
            bins = draw(self.vlm.action_logits(hidden[:, -1]), position)
            drawn.append(bins)
            token = self.vlm.action_ids(bins)[:, None]
            layers = tuple(append_kv(old, new) for old, new in zip(layers, own, strict=True))
        return torch.stack(drawn, dim=1)

    def token_logits(self, prefix: Prefix, bins: Tensor) -> Tensor:
        """float32 [N, H * D, 256] for all positions in one pass, given the bins before each one."""
        before = self.vlm.action_ids(bins[:, :-1])
        hidden, _ = self._decode(prefix, torch.cat([self._start(prefix), before], dim=1), prefix.layers, 0)
        return self.vlm.action_logits(hidden)

    def actions_of_bins(self, bins: Tensor) -> Tensor:
        """Bins int64 [N, H * D] -> normalised actions [N, H, D]."""
        return actions_of_bins(bins).unflatten(1, (self.action_horizon, self.noise_dim))

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """Greedy, or with `config.temperature` the bins at `Phi(noise)` of their distributions (see `pick_bins`)."""
        return ActionChunk(self.unnormalize_actions(self.chunks(self.encode(self.preprocess(obs)), noise)))

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Normalised chunks [N, H, D]: those that `act` deploys."""
        level = noise.flatten(1).to(prefix.pooled.device)
        bins = self.sample_tokens(
            prefix, lambda logits, position: pick_bins(logits, level[:, position], self.config.temperature)
        )
        return self.actions_of_bins(bins)

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Cross entropy of the action tokens [N]: mean over unpadded steps and all `chunk_dim` dimensions."""
        return self.prefix_loss(self.encode(inputs), actions, mask, generator)

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of what is encoded already."""
        del generator  # nothing is drawn; the argument belongs to the protocol
        bins = bins_of_actions(actions)
        return masked_mean(token_loss(self.token_logits(prefix, bins.flatten(1)), bins), mask)

    # ------------------------------------------------------------------------------------------------------ details
    def _image_tokens(self, inputs: PolicyInputs) -> Tensor:
        if inputs.image_tokens is not None:
            return inputs.image_tokens
        return self.vlm.look([inputs.images[camera] for camera in self.config.cameras])

    def _start(self, prefix: Prefix) -> Tensor:
        return torch.full((len(prefix), 1), self.config.inputs.prompt.end, device=prefix.mask.device)

    def _decode(
        self, prefix: Prefix, tokens: Tensor, layers: tuple[PrefixKV, ...], position: int
    ) -> tuple[Tensor, tuple[PrefixKV, ...]]:
        """Hidden states of `tokens [N, L]`, the first of which stands `position` tokens after the prefix; `layers`:
        keys and values of the prefix and of those `position` tokens."""
        end = position + tokens.shape[1]
        causal = torch.ones(end, end, dtype=torch.bool, device=tokens.device).tril()[position:]
        positions = suffix_positions(prefix.mask, end)[:, position:]
        mask = suffix_mask(prefix.mask, causal)
        return self.vlm.decoder(self.vlm.decoder.embed(tokens), positions, mask, prefix=layers)

    def _encoder(self) -> Iterable[nn.Module]:
        """What keys and values of the prefix depend on."""
        decoder = self.vlm.decoder
        last = cast(DecoderLayer, decoder.layers[-1])
        yield from (self.vlm.vision, self.vlm.projector, decoder.embed_tokens)
        yield from list(decoder.layers)[:-1]
        yield from (last.input_layernorm, last.self_attn.k_proj, last.self_attn.v_proj)


__all__ = ["OpenVLA", "OpenVLAConfig", "openvla_7b_size"]
