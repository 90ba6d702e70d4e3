"""SmolVLA (Shukor et al. 2025): half of a small vision-language model, and an expert that reads it layer by layer.

Pictures, sentence and, as its last token, the state become keys and values of every layer of the language model, once a
decision (`encode`). The expert's tokens are the noisy actions, each looking at those before it. Every
`cross_attention_every`-th of its layers looks at prefix and actions together; the others at the prefix alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.core import ActionChunk, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.flow.sampling import ode
from vla_rl.policies.blocks.decoder import Decoder, DecoderConfig, block_mask, positions_of
from vla_rl.policies.blocks.flow_matching import FlowMatchingConfig, prefix_flow_loss
from vla_rl.policies.blocks.freezing import freeze, is_frozen
from vla_rl.policies.blocks.images import Padding, to_unit_range
from vla_rl.policies.blocks.prefix_cache import make_prefix, project, suffix_mask, suffix_positions
from vla_rl.policies.blocks.sizes import require_readable, require_room, require_sizes
from vla_rl.policies.blocks.time_embedding import over_steps, time_embedding
from vla_rl.policies.blocks.tokenizer import TokenizerConfig
from vla_rl.policies.blocks.vision_transformer import VisionTransformer, VisionTransformerConfig
from vla_rl.policies.blocks.vla_inputs import PromptConfig, VLAInputs
from vla_rl.protocols import PolicyInputs, Prefix, VelocityOutput


def _tiny_vision() -> VisionTransformerConfig:
    return VisionTransformerConfig(width=64, depth=2, mlp_width=128, num_heads=4, image_size=64, patch_size=8)


def smollm(
    width: int, depth: int, mlp_width: int, heads: tuple[int, int, int], *, vocab_size: int = 0
) -> DecoderConfig:
    """A language model of the SmolLM2 family with `heads` (queries, keys, width of each); without words an expert."""
    return DecoderConfig(
        width,
        depth,
        mlp_width,
        *heads,
        vocab_size=vocab_size,
        norm_offset=False,
        norm_eps=1e-5,
        activation="silu",
        embedding_scale=width**0.5 if vocab_size else 1.0,
        cross_attention_every=0 if vocab_size else 2,
    )


def _tiny_language() -> DecoderConfig:
    return smollm(96, 4, 192, (4, 2, 24), vocab_size=260)


def _tiny_expert() -> DecoderConfig:
    return smollm(72, 4, 144, (4, 2, 24))


@dataclass(frozen=True)
class SmolVLAConfig:
    """The defaults are a model for tests and laptops; `smolvla_size` gives the published one.

    `state_dim`, `action_dim`: 0 in a recipe, where `build_policy` takes them from the environment, `cameras` too.
    `pixel_shuffle`: so many by so many patches become one token. `max_state_dim`, `max_action_dim`: normalised states
    and actions are padded to them with zeros. `num_steps`: Euler steps of the deployed ODE.
    `image_start`, `image_end`: ids of tokens around each picture, which checkpoints may have been trained with.
    `loss_on_padding`: the loss covers the padded action dimensions, as in the public training.
    """

    state_dim: int = 0
    action_dim: int = 0
    cameras: tuple[str, ...] = ("agent",)
    action_horizon: int = 50
    max_state_dim: int = 32
    max_action_dim: int = 32
    num_steps: int = 10
    vision: VisionTransformerConfig = field(default_factory=_tiny_vision)
    pixel_shuffle: int = 2
    language: DecoderConfig = field(default_factory=_tiny_language)
    expert: DecoderConfig = field(default_factory=_tiny_expert)
    image_start: tuple[int, ...] = ()
    image_end: tuple[int, ...] = ()
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig(clean=False))
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    image_padding: Padding = "top_left"
    loss_on_padding: bool = True
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)

    def __post_init__(self) -> None:
        require_room(self)
        require_readable(self)
        side = self.vision.image_size // self.vision.patch_size
        if side % self.pixel_shuffle:
            raise ValueError(
                f"SmolVLAConfig: {side} x {side} patches do not divide by pixel_shuffle {self.pixel_shuffle}"
            )


def smolvla_size() -> SmolVLAConfig:
    """The published size: SmolVLM2-500M with 16 of its 32 layers, and an expert of 3/4 of their width.

    The tokenizer is SmolVLM2's, whose file is not part of the project; the config here has the one of bytes.
    """
    return SmolVLAConfig(
        vision=VisionTransformerConfig(768, 12, 3072, 12, image_size=512, patch_size=16),
        pixel_shuffle=4,
        language=smollm(960, 16, 2560, (15, 5, 64), vocab_size=49_280),
        expert=smollm(720, 16, 2048, (15, 5, 64)),
    )


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Patches [N, side^2, D] -> [N, (side / factor)^2, factor^2 * D]: each token is a square of patches, by rows."""
    side = int(x.shape[1] ** 0.5)
    x = x.unflatten(1, (side // factor, factor, side // factor, factor))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


class SmolVLA(nn.Module):
    """Implements `FlowPolicy`, `HasVisionTokens`, `HasSupervisedLoss` and `LearnsFromPrefix` of `vla_rl.protocols`.

    The language model's last attention and feed-forward, and its last norm, are part of public checkpoints but of no
    result: they are not trained.
    """

    takes_step_times = True

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        require_sizes(config)
        self.config = config
        self.action_horizon, self.action_dim = config.action_horizon, config.action_dim
        self.noise_dim = config.max_action_dim
        width, language_width = config.expert.width, config.language.width
        self.hidden_dim = width
        self.feature_dim = language_width + config.state_dim
        self.inputs = VLAInputs(
            cameras=config.cameras,
            image_size=config.vision.image_size,
            padding=config.image_padding,
            tokenizer=config.tokenizer,
            prompt=config.prompt,
            state_dim=config.state_dim,
            action_dim=config.action_dim,
            chunk_dim=config.max_action_dim,
        )
        self.vision = VisionTransformer(config.vision)
        self.connector = nn.Linear(config.vision.width * config.pixel_shuffle**2, language_width, bias=False)
        self.language_model = Decoder(config.language)
        self.state_proj = nn.Linear(config.max_state_dim, language_width)
        self.expert = Decoder(config.expert)
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.language_model.freeze_unread()

    # ------------------------------------------------------------------------------------------------ the encoder
    def set_normalization(self, state: Normalizer, action: Normalizer) -> None:
        """Normalisers of the state [S] and of one control step's action [A]."""
        self.inputs.set_normalization(state, action)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """[N, H, A] -> [N, H, max_action_dim]: normalised, then padded with zeros."""
        return self.inputs.normalize_actions(actions)

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        return self.inputs.unnormalize_actions(actions)

    @property
    def vision_is_frozen(self) -> bool:
        """True where neither the vision tower nor the connector can change."""
        return is_frozen(self.vision, self.connector)

    @property
    def encoder_is_frozen(self) -> bool:
        """True where nothing that `encode` reads can change: the projection of the state is part of it."""
        return is_frozen(*self._encoder())

    def freeze_encoder(self) -> None:
        """From now on the expert alone is trained."""
        freeze(*self._encoder())

    def _encoder(self) -> tuple[nn.Module, ...]:
        """What `encode` reads."""
        return self.vision, self.connector, self.language_model, self.state_proj

    def preprocess(self, obs: Observation) -> PolicyInputs:
        """Raises ValueError where a camera is missing, the state has another size or a prompt is too long."""
        return self.inputs(obs)

    def with_image_tokens(self, inputs: PolicyInputs) -> PolicyInputs:
        """`inputs` with image tokens [N, cameras * tokens, language width] instead of pictures."""
        return replace(inputs, images={}, image_tokens=self._image_tokens(inputs))

    def _image_tokens(self, inputs: PolicyInputs) -> Tensor:
        if inputs.image_tokens is not None:
            return inputs.image_tokens
        cameras = self.config.cameras
        pictures = torch.stack([inputs.images[camera] for camera in cameras], dim=1)
        patches = self.vision(to_unit_range(pictures.flatten(0, 1)))
        tokens = project(self.connector, pixel_shuffle(patches, self.config.pixel_shuffle))
        return tokens.unflatten(0, (-1, len(cameras))).flatten(1, 2)

    def _pictures(self, inputs: PolicyInputs) -> Tensor:
        """Image tokens as the language model gets them: scaled like embedded words, between their marks (unscaled)."""
        seen = self._image_tokens(inputs) * self.config.language.width**0.5
        if not (self.config.image_start or self.config.image_end):
            return seen
        n, num_cameras = len(inputs), len(self.config.cameras)
        marks = torch.tensor(self.config.image_start + self.config.image_end, device=seen.device)
        embedded = self.language_model.embed_tokens(marks).to(seen.dtype).expand(n, num_cameras, -1, -1)
        start, end = embedded.split([len(self.config.image_start), len(self.config.image_end)], dim=2)
        return torch.cat([start, seen.unflatten(1, (num_cameras, -1)), end], dim=2).flatten(1, 2)

    def encode(self, inputs: PolicyInputs) -> Prefix:
        """Keys and values of pictures, prompt and state. Only the state looks at the state."""
        text = self.language_model.embed(inputs.tokens)
        padded = functional.pad(inputs.state, (0, self.config.max_state_dim - inputs.state.shape[1]))
        parts = [self._pictures(inputs), text, project(self.state_proj, padded)[:, None]]
        x = torch.cat([part.to(self.language_model.dtype) for part in parts], dim=1)
        mask = functional.pad(inputs.tokens != 0, (parts[0].shape[1], 1), value=True)
        state = torch.arange(x.shape[1], device=x.device) == x.shape[1] - 1
        hidden, layers = self.language_model.prefill(x, positions_of(mask), block_mask(mask, state))
        return make_prefix(hidden, layers, mask, inputs.state)

    # ------------------------------------------------------------------------------------------------- the expert
    def velocity(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        """`x_t` float32 [N, H, max_action_dim] normalised, `flow_time` float32 [N], or [N, H] of each step. `hidden`:
        the expert's last normed states of the action tokens, float32."""
        actions = project(self.action_in_proj, x_t)
        time = time_embedding(flow_time, self.hidden_dim).to(actions.dtype)
        both = torch.cat([actions, over_steps(time).expand_as(actions)], dim=-1)
        x = project(self.action_time_mlp_out, functional.silu(project(self.action_time_mlp_in, both)))
        horizon = x.shape[1]
        causal = torch.ones(horizon, horizon, dtype=torch.bool, device=x.device).tril()
        hidden, _ = self.expert(
            x.to(self.expert.dtype),
            suffix_positions(prefix.mask, horizon),
            suffix_mask(prefix.mask, causal),
            prefix=prefix.layers,
        )
        return VelocityOutput(project(self.action_out_proj, hidden).float(), hidden.float())

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """`config.num_steps` Euler steps of the flow's ODE from `noise` (standard normal [N, H, max_action_dim])."""
        return ActionChunk(self.unnormalize_actions(self.chunks(self.encode(self.preprocess(obs)), noise)))

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Normalised chunks [N, H, max_action_dim]: the ODE from `noise`."""
        return ode(self, prefix, noise.to(prefix.pooled), self.config.num_steps)

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Flow-matching loss [N]; padded steps are not read and bear no loss."""
        return self.prefix_loss(self.encode(inputs), actions, mask, generator)

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of what is encoded already."""
        config, scored = self.config, self.noise_dim if self.config.loss_on_padding else self.action_dim
        return prefix_flow_loss(
            self.velocity, prefix, actions, mask, config.flow_matching, generator, num_scored=scored
        )


__all__ = ["SmolVLA", "SmolVLAConfig", "pixel_shuffle", "smollm", "smolvla_size"]
