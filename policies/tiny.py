"""TinyVLA: a vision-language-action policy of under a million parameters, trained from scratch on a laptop.

Cameras, sentence and proprioception become a handful of prefix tokens (`encode`), once a decision; a transformer action
expert turns noise into a chunk of actions along a velocity field that reads the prefix (`velocity`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.core import ActionChunk, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.flow.sampling import ode
from vla_rl.policies.blocks.expert import ActionExpert, ActionExpertConfig
from vla_rl.policies.blocks.flow_matching import FlowMatchingConfig, prefix_flow_loss
from vla_rl.policies.blocks.heads import mlp
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.policies.blocks.sizes import require_sizes
from vla_rl.policies.blocks.text import TextEncoder, tokenize_bytes
from vla_rl.policies.blocks.transformer import RMSNorm
from vla_rl.policies.blocks.vision import ImageEncoder
from vla_rl.protocols import PolicyInputs, Prefix, VelocityOutput


@dataclass(frozen=True)
class TinyVLAConfig:
    """`state_dim`, `action_dim`: 0 in a recipe, where `build_policy` takes them from the environment, `cameras` too.
    `cameras`: names in the observation, in order. `image_size`: pictures are resized to it, in pixels.

    `tokens_per_camera` tokens with `heads_per_token` heat maps each are read from a picture:
    coordinates, and `value_channels` features, which need thousands of pictures. `num_steps`: Euler steps
    of the deployed ODE. `max_text_tokens`: bytes of the longest sentence, plus two.
    """

    state_dim: int = 0
    action_dim: int = 0
    cameras: tuple[str, ...] = ("agent",)
    image_size: int = 64
    action_horizon: int = 8
    num_steps: int = 4
    prefix_width: int = 64
    vision_channels: int = 32
    vision_blocks: int = 3
    tokens_per_camera: int = 4
    heads_per_token: int = 2
    value_channels: int = 0
    text_width: int = 64
    text_tokens: int = 2
    max_text_tokens: int = 160
    expert: ActionExpertConfig = field(default_factory=ActionExpertConfig)
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)

    def __post_init__(self) -> None:
        if self.state_dim < 0 or self.action_dim < 0 or self.action_horizon < 1 or self.num_steps < 1:
            raise ValueError("TinyVLAConfig: sizes must be positive, action_horizon and num_steps at least 1")
        if len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"TinyVLAConfig: a camera is named twice in {self.cameras}")


class TinyEncoder(nn.Module):
    """Inputs -> prefix. All of it can be frozen after supervised fine-tuning, and then its output may be cached."""

    def __init__(self, config: TinyVLAConfig) -> None:
        super().__init__()
        width = config.prefix_width
        self.cameras = config.cameras
        self.text = TextEncoder(config.text_width, config.text_tokens, width, max_text_tokens=config.max_text_tokens)
        self.images = nn.ModuleList(
            ImageEncoder(
                config.image_size,
                config.vision_channels,
                config.vision_blocks,
                condition_width=width,
                num_tokens=config.tokens_per_camera,
                heads=config.heads_per_token,
                out_width=width,
                value_channels=config.value_channels,
            )
            for _ in config.cameras
        )
        self.state = mlp(config.state_dim, [width], width)
        self.num_tokens = len(config.cameras) * config.tokens_per_camera + config.text_tokens + 1
        self.kind = nn.Parameter(0.02 * torch.randn(self.num_tokens, width))
        self.norm = RMSNorm(width)

    def forward(self, inputs: PolicyInputs, *, sentences_alone: bool = False) -> Prefix:
        text_tokens, sentence = self.text(inputs.tokens, alone=sentences_alone)
        parts = [encoder(inputs.images[c], sentence) for c, encoder in zip(self.cameras, self.images, strict=True)]
        parts += [text_tokens, self.state(inputs.state).unsqueeze(1)]
        tokens = self.norm(torch.cat([p.float() for p in parts], dim=1) + self.kind)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Prefix(tokens, mask, torch.cat([tokens.flatten(1), inputs.state], dim=1))


class TinyVLA(nn.Module):
    """Implements `FlowPolicy`, `HasSupervisedLoss` and `LearnsFromPrefix` of `vla_rl.protocols`.

    Uses no privileged information.

    Normalisation starts as the identity; `set_normalization` takes it from the demonstrations.
    """

    takes_step_times = True

    def __init__(self, config: TinyVLAConfig) -> None:
        super().__init__()
        require_sizes(config)
        self.config = config
        self.action_horizon, self.action_dim = config.action_horizon, config.action_dim
        self.hidden_dim = config.expert.width
        self.state_normalizer = NormalizerBuffers(config.state_dim)
        self.action_normalizer = NormalizerBuffers(config.action_dim)
        self.encoder = TinyEncoder(config)
        self.feature_dim = self.encoder.num_tokens * config.prefix_width + config.state_dim
        self.expert = ActionExpert(
            config.expert,
            action_dim=config.action_dim,
            action_horizon=config.action_horizon,
            prefix_width=config.prefix_width,
            pooled_dim=self.feature_dim,
        )

    def set_normalization(self, state: Normalizer, action: Normalizer) -> None:
        """Normalisers of the state [S] and of one control step's action [A], from the demonstrations' statistics."""
        self.state_normalizer.set(state)
        self.action_normalizer.set(action)

    # ------------------------------------------------------------------------------------------------ the encoder
    @property
    def encoder_is_frozen(self) -> bool:
        """True where no parameter of the encoder can change; the encoder has neither dropout nor running statistics."""
        return not any(p.requires_grad for p in self.encoder.parameters())

    def freeze_encoder(self) -> None:
        """From now on `encode` gives the same result for the same inputs, whatever is trained."""
        self.encoder.requires_grad_(False)

    def preprocess(self, obs: Observation) -> PolicyInputs:
        """Normalise the state, tokenise the sentences and resize the pictures, on the device of the policy.

        Raises ValueError where a camera is missing, the state has another size or a sentence is too long.
        """
        missing = [camera for camera in self.config.cameras if camera not in obs.images]
        if missing:
            raise ValueError(
                f"the policy needs the cameras {list(self.config.cameras)}, the observation has {sorted(obs.images)}; "
                f"render {missing}, or build the policy with the environment's cameras"
            )
        if obs.state.shape[1] != self.config.state_dim:
            raise ValueError(f"the policy needs state [N, {self.config.state_dim}], got {tuple(obs.state.shape)}")
        device = self.expert.position.device
        images = {c: resize_images(obs.images[c].to(device), self.config.image_size) for c in self.config.cameras}
        tokens = tokenize_bytes(obs.instruction, self.config.max_text_tokens).to(device)
        return PolicyInputs(images, tokens, self.state_normalizer.normalize(obs.state.to(device)))

    def encode(self, inputs: PolicyInputs) -> Prefix:
        return self.encoder(inputs)

    # ------------------------------------------------------------------------------------------------- the expert
    def velocity(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        """`x_t` float32 [N, H, A] normalised, `flow_time` float32 [N], or [N, H] of each step."""
        return self.expert(prefix, x_t, flow_time)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        return self.action_normalizer.normalize(actions)

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        return self.action_normalizer.unnormalize(actions)

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """`config.num_steps` Euler steps of the flow's ODE from `noise` (standard normal [N, H, A]).

        In a batch of the same size, a row's actions depend on no other row, to the last bit: an evaluation does not
        depend on what is evaluated beside an episode.
        """
        prefix = self.encoder(self.preprocess(obs), sentences_alone=True)
        return ActionChunk(self.unnormalize_actions(self.chunks(prefix, noise.to(prefix.tokens))))

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Normalised chunks [N, H, A]: the ODE from `noise`."""
        return ode(self, prefix, noise, self.config.num_steps)

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Flow-matching loss [N]; padded actions are not read and bear no loss."""
        return self.prefix_loss(self.encode(inputs), actions, mask, generator)

    def prefix_of(self, features: Tensor) -> Prefix:
        """`pooled` is all tokens and the state, so it holds the prefix. Raises ValueError for another size."""
        if features.shape[1] != self.feature_dim:
            raise ValueError(f"features must be [N, {self.feature_dim}], got {tuple(features.shape)}")
        tokens = features[:, : -self.config.state_dim].unflatten(1, (self.encoder.num_tokens, -1))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Prefix(tokens, mask, features)

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of what is encoded already."""
        return prefix_flow_loss(self.velocity, prefix, actions, mask, self.config.flow_matching, generator)


def resize_images(images: Tensor, size: int) -> Tensor:
    """uint8 [N, h, w, 3] -> uint8 [N, 3, size, size], with smoothing where it shrinks. The aspect may change."""
    channels_first = images.permute(0, 3, 1, 2).contiguous()
    if channels_first.shape[2:] == (size, size):
        return channels_first
    resized = functional.interpolate(channels_first.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
