"""OpenVLA-OFT: a whole chunk in one forward pass (Kim, Finn and Liang 2025).

The prompt is followed by one empty slot for each number of the chunk and a stop token, attention is bidirectional over
all of it, and slot j is read one position earlier, as in next-token prediction. `OpenVLAOFT` regresses the chunk,
`OpenVLAOFTTokens` reads action tokens (as SimpleVLA-RL does); `ParallelBody` is what they share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.core import ActionChunk, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.flow.likelihood import Family, require_family
from vla_rl.flow.sampler import laplace_of_normal
from vla_rl.policies.blocks.action_tokens import NUM_BINS, actions_of_bins, bins_of_actions, pick_bins, token_loss
from vla_rl.policies.blocks.decoder import positions_of
from vla_rl.policies.blocks.flow_matching import masked_mean
from vla_rl.policies.blocks.freezing import freeze, is_frozen
from vla_rl.policies.blocks.prefix_cache import pooled_features
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
from vla_rl.policies.blocks.vla_inputs import VLAInputs
from vla_rl.protocols import PolicyInputs, Prefix


@dataclass(frozen=True)
class ParallelConfig:
    """`proprio`: the normalised state is one more token after the pictures. `clip_state`: to [-1, 1] before that, as
    the published policies do. `stop`: id of the token after the slots. FiLM: see `PrismaticConfig.with_film`."""

    vlm: PrismaticConfig = field(default_factory=PrismaticConfig)
    inputs: PrismaticInputsConfig = field(default_factory=PrismaticInputsConfig)
    proprio: bool = True
    clip_state: bool = False
    stop: int = 2


@dataclass(frozen=True)
class OpenVLAOFTConfig:
    """`state_dim`, `action_dim`: 0 in a recipe, where `build_policy` takes them from the environment, `cameras` too.
    `chunk_dim`: action dimensions of the model, zeros where there are fewer. Published chunks [H, D]: 8 x 7 for LIBERO,
    25 x 14 for ALOHA, 5 x 7 for Bridge.

    `noise_family`: of the distribution that the regressed chunk is the centre of, which is explored and deployed;
    `initial_std`: its standard deviation before training, in normalised actions, within `std_min` and `std_max`. No
    public checkpoint has one.
    """

    state_dim: int = 0
    action_dim: int = 0
    cameras: tuple[str, ...] = ("agent",)
    action_horizon: int = 8
    chunk_dim: int = 7
    noise_family: Family = "laplace"
    initial_std: float = 0.1
    std_min: float = 0.01
    std_max: float = 1.0
    body: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if not 0.0 < self.std_min < self.initial_std < self.std_max:
            raise ValueError(
                f"OpenVLAOFTConfig: need 0 < std_min < initial_std < std_max, got "
                f"{self.std_min}, {self.initial_std}, {self.std_max}"
            )
        require_family(self.noise_family)


@dataclass(frozen=True)
class OpenVLAOFTTokensConfig:
    """Sizes as in `OpenVLAOFTConfig`. `temperature`: of the deployed policy; 0 takes the most probable tokens."""

    state_dim: int = 0
    action_dim: int = 0
    cameras: tuple[str, ...] = ("agent",)
    action_horizon: int = 8
    chunk_dim: int = 7
    temperature: float = 0.0
    body: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise ValueError(f"temperature is {self.temperature}, expected at least 0")


def parallel_7b(
    tokenizer: TokenizerConfig | None = None, *, proprio: bool = True, film: bool = False
) -> ParallelConfig:
    """The published size; `tokenizer`: that of Llama 2, without one bytes stand in for it."""
    vlm = prismatic_7b().with_film() if film else prismatic_7b()
    inputs = replace(inputs_7b(tokenizer or TokenizerConfig(max_tokens=160)), center_crop=0.9)
    return ParallelConfig(vlm, inputs, proprio, clip_state=True)


class ProprioProjector(nn.Module):
    """Normalised state [N, S] -> one token [N, width]."""

    def __init__(self, state_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(state.to(self.fc1.weight.dtype))))


class ResidualBlock(nn.Module):
    """`x + relu(linear(norm(x)))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class RegressionHead(nn.Module):
    """The hidden states of one step's slots, side by side, -> that step's action. Names as in public checkpoints."""

    def __init__(self, in_width: int, width: int, action_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(in_width)
        self.fc1 = nn.Linear(in_width, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, action_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.fc1(self.layer_norm1(x.to(self.fc1.weight.dtype))))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class ParallelBody(nn.Module):
    """Inputs -> prefix -> the hidden state of each slot."""

    def __init__(self, config: OpenVLAOFTConfig | OpenVLAOFTTokensConfig) -> None:
        super().__init__()
        require_sizes(config)
        self.config = config.body
        self.cameras, self.num_slots = config.cameras, config.action_horizon * config.chunk_dim
        width = config.body.vlm.decoder.width
        self.feature_dim = width + config.state_dim
        self.inputs = build_inputs(
            config.body.inputs,
            config.body.vlm,
            config.cameras,
            state_dim=config.state_dim,
            action_dim=config.action_dim,
            chunk_dim=config.chunk_dim,
        )
        self.vlm = Prismatic(config.body.vlm)
        if config.body.proprio:
            self.proprio_projector = ProprioProjector(config.state_dim, width)

    @property
    def vision_is_frozen(self) -> bool:
        """With FiLM, the sentence's embedding is part of what makes image tokens."""
        words = (self.vlm.decoder.embed_tokens,) if self.config.vlm.film else ()
        return is_frozen(self.vlm.vision, self.vlm.projector, *words)

    def encoder(self) -> list[nn.Module]:
        """What `encode` reads."""
        modules = [self.vlm.vision, self.vlm.projector, self.vlm.decoder.embed_tokens]
        return [*modules, self.proprio_projector] if self.config.proprio else modules

    def image_tokens(self, inputs: PolicyInputs) -> Tensor:
        if inputs.image_tokens is not None:
            return inputs.image_tokens
        sentence = self.vlm.mean_sentence(inputs.tokens, self.config.stop) if self.config.vlm.film else None
        return self.vlm.look([inputs.images[camera] for camera in self.cameras], sentence)

    def encode(self, inputs: PolicyInputs) -> Prefix:
        """Embedded first token, pictures, state and prompt, as `tokens` float32 [N, T, width]. Attention is
        bidirectional, so nothing behind the embeddings can be computed without the slots."""
        seen = self.image_tokens(inputs)
        if self.config.proprio:
            state = inputs.state.clamp(-1.0, 1.0) if self.config.clip_state else inputs.state
            seen = torch.cat([seen, self.proprio_projector(state)[:, None].to(seen.dtype)], dim=1)
        x, mask = self.vlm.embed(inputs.tokens, seen)
        return Prefix(x.float(), mask, pooled_features(x, mask, inputs.state))

    def slots(self, prefix: Prefix) -> Tensor:
        """The language model's last hidden state for each slot: [N, H * D, width]."""
        n, length = prefix.mask.shape
        stop = self.vlm.decoder.embed(prefix.mask.new_tensor([[self.config.stop]], dtype=torch.int64))
        empty = stop.new_zeros(n, self.num_slots, stop.shape[-1])
        x = torch.cat([prefix.tokens.to(stop.dtype), empty, stop.expand(n, -1, -1)], dim=1)
        counts = torch.cat([prefix.mask, prefix.mask.new_ones(n, self.num_slots + 1)], dim=1)
        hidden, _ = self.vlm.decoder(x, positions_of(counts), counts[:, None])
        end = hidden[torch.arange(n, device=x.device), prefix.mask.sum(dim=1) - 1]
        return torch.cat([end[:, None], hidden[:, length : length + self.num_slots - 1]], dim=1)


def initial_std_logit(config: OpenVLAOFTConfig) -> Tensor:
    """[H, D]: where `initial_std` lies between the bounds, before the sigmoid."""
    low, high = math.log(config.std_min), math.log(config.std_max)
    share = (math.log(config.initial_std) - low) / (high - low)
    return torch.full((config.action_horizon, config.chunk_dim), math.log(share / (1.0 - share)))


class OpenVLAOFT(nn.Module):
    """Implements `GaussianPolicy`, `HasVisionTokens`, `HasSupervisedLoss` and `LearnsFromPrefix` of `vla_rl.protocols`.

    The standard deviation [H, D] does not depend on the state; its logarithm moves within the bounds along a sigmoid.
    """

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        self.config = config
        self.body = ParallelBody(config)
        self.action_horizon, self.noise_dim = config.action_horizon, config.chunk_dim
        self.action_dim, self.feature_dim = config.action_dim, self.body.feature_dim
        self.noise_family = config.noise_family
        width = config.body.vlm.decoder.width
        self.action_head = RegressionHead(config.chunk_dim * width, width, config.chunk_dim)
        self.std_logit = nn.Parameter(initial_std_logit(config))
        self.body.vlm.lm_head.requires_grad_(False)  # part of the layout, and of no result

    @property
    def inputs(self) -> VLAInputs:
        return self.body.inputs

    @property
    def vlm(self) -> Prismatic:
        return self.body.vlm

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

    @property
    def vision_is_frozen(self) -> bool:
        return self.body.vision_is_frozen

    @property
    def encoder_is_frozen(self) -> bool:
        return is_frozen(*self.body.encoder())

    def freeze_encoder(self) -> None:
        freeze(*self.body.encoder())

    def with_image_tokens(self, inputs: PolicyInputs) -> PolicyInputs:
        return replace(inputs, images={}, image_tokens=self.body.image_tokens(inputs))

    def encode(self, inputs: PolicyInputs) -> Prefix:
        return self.body.encode(inputs)

    def distribution(self, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Centre and standard deviation of the normalised chunk, each float32 [N, H, D]. A Laplace density of this
        standard deviation has the scale std / sqrt(2)."""
        steps = self.body.slots(prefix).unflatten(1, (self.action_horizon, self.noise_dim)).flatten(2)
        mean = self.action_head(steps).float()
        low, high = math.log(self.config.std_min), math.log(self.config.std_max)
        std = (low + (high - low) * self.std_logit.float().sigmoid()).exp()
        return mean, std.expand_as(mean)

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """`mean + std * noise`, for the Laplace family at the same quantiles; zero noise is the regressed chunk."""
        return ActionChunk(self.unnormalize_actions(self.chunks(self.encode(self.preprocess(obs)), noise)))

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Normalised chunks [N, H, D]: those that `act` deploys."""
        mean, std = self.distribution(prefix)
        noise = noise.to(mean)
        return mean + std * (laplace_of_normal(noise) if self.noise_family == "laplace" else noise)

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Mean absolute error [N] over unpadded steps and all `chunk_dim` dimensions. It leaves the deviation alone."""
        return self.prefix_loss(self.encode(inputs), actions, mask, generator)

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of what is encoded already."""
        del generator  # nothing is drawn; the argument belongs to the protocol
        mean, _ = self.distribution(prefix)
        return masked_mean((mean - torch.where(mask.unsqueeze(-1), actions, mean.detach())).abs(), mask)


class OpenVLAOFTTokens(nn.Module):
    """Implements `TokenPolicy`, `HasVisionTokens`, `HasSupervisedLoss` and `LearnsFromPrefix` of `vla_rl.protocols`."""

    num_bins, decodes_in_parallel = NUM_BINS, True

    def __init__(self, config: OpenVLAOFTTokensConfig) -> None:
        super().__init__()
        self.config = config
        self.body = ParallelBody(config)
        self.action_horizon, self.noise_dim = config.action_horizon, config.chunk_dim
        self.action_dim, self.feature_dim = config.action_dim, self.body.feature_dim

    @property
    def inputs(self) -> VLAInputs:
        return self.body.inputs

    @property
    def vlm(self) -> Prismatic:
        return self.body.vlm

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

    @property
    def vision_is_frozen(self) -> bool:
        return self.body.vision_is_frozen

    @property
    def encoder_is_frozen(self) -> bool:
        return is_frozen(*self.body.encoder())

    def freeze_encoder(self) -> None:
        freeze(*self.body.encoder())

    def with_image_tokens(self, inputs: PolicyInputs) -> PolicyInputs:
        return replace(inputs, images={}, image_tokens=self.body.image_tokens(inputs))

    def encode(self, inputs: PolicyInputs) -> Prefix:
        return self.body.encode(inputs)

    def sample_tokens(self, prefix: Prefix, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Bins int64 [N, H * D]; their logits are known at once, and do not depend on each other."""
        logits = self._logits(prefix)
        return torch.stack([draw(logits[:, i], i) for i in range(logits.shape[1])], dim=1)

    def token_logits(self, prefix: Prefix, bins: Tensor) -> Tensor:
        """float32 [N, H * D, 256]; `bins` are not read."""
        del bins
        return self._logits(prefix)

    def actions_of_bins(self, bins: Tensor) -> Tensor:
        """Bins int64 [N, H * D] -> normalised actions [N, H, D]."""
        return actions_of_bins(bins).unflatten(1, (self.action_horizon, self.noise_dim))

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """Greedy, or with `config.temperature` the bins at `Phi(noise)` of their distributions (see `pick_bins`)."""
        return ActionChunk(self.unnormalize_actions(self.chunks(self.encode(self.preprocess(obs)), noise)))

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Normalised chunks [N, H, D]: those that `act` deploys."""
        logits = self._logits(prefix)
        bins = pick_bins(logits, noise.flatten(1).to(logits), self.config.temperature)
        return self.actions_of_bins(bins)

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Cross entropy of the action tokens [N]: mean over unpadded steps and all `chunk_dim` dimensions."""
        return self.prefix_loss(self.encode(inputs), actions, mask, generator)

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of what is encoded already."""
        del generator  # nothing is drawn; the argument belongs to the protocol
        return masked_mean(token_loss(self._logits(prefix), bins_of_actions(actions)), mask)

    def _logits(self, prefix: Prefix) -> Tensor:
        return self.body.vlm.action_logits(self.body.slots(prefix))


__all__ = [
    "OpenVLAOFT",
    "OpenVLAOFTConfig",
    "OpenVLAOFTTokens",
    "OpenVLAOFTTokensConfig",
    "ParallelConfig",
    "initial_std_logit",
    "parallel_7b",
]
