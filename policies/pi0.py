"""pi0 and pi0.5 (Black et al. 2024; Physical Intelligence 2025): PaliGemma and an action expert that attends to it.

Pictures and sentence become keys and values of every layer of the language model, once a decision (`encode`). The
expert has the same number of layers; its tokens, the state (pi0) and the noisy actions, look at them (`velocity`). That
is the joint attention of the paper, because nothing of the prefix looks at the expert's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

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

PALIGEMMA_VOCABULARY = 257_152


def _tiny_vision() -> VisionTransformerConfig:
    return VisionTransformerConfig(width=64, depth=2, mlp_width=128, num_heads=4, image_size=64, patch_size=16)


def _tiny_language() -> DecoderConfig:
    return DecoderConfig(
        width=96,
        depth=3,
        mlp_width=192,
        num_heads=4,
        num_kv_heads=1,
        head_dim=24,
        vocab_size=260,
        embedding_scale=96**0.5,
    )


def _tiny_expert() -> DecoderConfig:
    return DecoderConfig(width=64, depth=3, mlp_width=128, num_heads=4, num_kv_heads=1, head_dim=24)


@dataclass(frozen=True)
class Pi0Config:
    """The defaults are a model for tests and laptops; `pi0_size` gives the published ones.

    `state_dim`, `action_dim`: 0 in a recipe, where `build_policy` takes them from the environment, `cameras` too.
    `cameras`: names in the observation; they fill the `num_image_slots` of the model in order. A slot without a camera
    is a black picture that nothing looks at and that takes no position: it is left out.
    `max_state_dim`, `max_action_dim`: normalised states and actions are padded to them with zeros.
    `num_steps`: Euler steps of the deployed ODE.
    `adaptive`: pi0.5, where the flow time modulates the expert's norms and there is no state token.
    `prompt`: of kind "state" it holds the state (pi0.5). Without it pi0.5 is blind to the state, as the public LIBERO
    checkpoint is.
    `loss_on_padding`: the loss covers the padded action dimensions as openpi's does; LeRobot's leaves them out.
    """

    state_dim: int = 0
    action_dim: int = 0
    cameras: tuple[str, ...] = ("agent",)
    num_image_slots: int = 3
    action_horizon: int = 50
    max_state_dim: int = 32
    max_action_dim: int = 32
    num_steps: int = 10
    vision: VisionTransformerConfig = field(default_factory=_tiny_vision)
    language: DecoderConfig = field(default_factory=_tiny_language)
    expert: DecoderConfig = field(default_factory=_tiny_expert)
    adaptive: bool = False
    prompt: PromptConfig = field(default_factory=PromptConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    image_padding: Padding = "center"
    loss_on_padding: bool = True
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)

    def __post_init__(self) -> None:
        if len(self.cameras) > self.num_image_slots:
            raise ValueError(f"Pi0Config: cameras must be at most {self.num_image_slots}: {self.cameras}")
        require_room(self)
        require_readable(self)
        if self.expert.condition_width not in ((0, self.expert.width) if self.adaptive else (0,)):
            raise ValueError(f"Pi0Config: expert.condition_width {self.expert.condition_width}; leave it at 0")
        if self.prompt.kind == "state" and not self.adaptive:
            raise ValueError("Pi0Config: a state in the prompt is pi0.5's; set adaptive too, or another prompt.kind")


def gemma(variant: str, *, vocab_size: int = 0) -> DecoderConfig:
    """The language models and experts of openpi by its names: "gemma_2b", "gemma_300m", "dummy"."""
    sizes = {"gemma_2b": (2048, 18, 16_384, 256), "gemma_300m": (1024, 18, 4096, 256), "dummy": (64, 4, 128, 16)}
    if variant not in sizes:
        raise ValueError(f"unknown Gemma variant {variant!r}, known are {sorted(sizes)}")
    width, depth, mlp_width, head_dim = sizes[variant]
    scale = width**0.5 if vocab_size else 1.0
    return DecoderConfig(width, depth, mlp_width, 8, 1, head_dim, vocab_size, embedding_scale=scale)


def pi0_size(variant: Literal["pi0", "pi05"] = "pi0") -> Pi0Config:
    """The published size: SigLIP So400m/14 at 224 px, Gemma of 2 billion parameters, expert of 300 million.

    The tokenizer is PaliGemma's, whose file is not part of the project; the config here has the one of bytes.
    """
    adaptive = variant == "pi05"
    return Pi0Config(
        vision=VisionTransformerConfig(1152, 27, 4304, 16, image_size=224, patch_size=14),
        language=gemma("gemma_2b", vocab_size=PALIGEMMA_VOCABULARY),
        expert=gemma("gemma_300m"),
        adaptive=adaptive,
        prompt=PromptConfig("state" if adaptive else "line"),
        tokenizer=TokenizerConfig(max_tokens=200 if adaptive else 48),
    )


class Pi0(nn.Module):
    """Implements `FlowPolicy`, `HasVisionTokens`, `HasSupervisedLoss` and `LearnsFromPrefix` of `vla_rl.protocols`.

    The language model's last attention and feed-forward, and its last norm, are part of public checkpoints but of no
    result: they are not trained.
    """

    takes_step_times = True

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        require_sizes(config)
        self.config = config
        self.action_horizon, self.action_dim = config.action_horizon, config.action_dim
        self.noise_dim = config.max_action_dim
        width = config.expert.width
        self.hidden_dim = width
        self.feature_dim = config.language.width + config.state_dim
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
        self.projector = nn.Linear(config.vision.width, config.language.width)
        self.language_model = Decoder(config.language)
        self.expert = Decoder(replace(config.expert, condition_width=width if config.adaptive else 0))
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        if config.adaptive:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.max_state_dim, width)
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
        """True where neither the vision tower nor the projector can change."""
        return is_frozen(self.vision, self.projector)

    @property
    def encoder_is_frozen(self) -> bool:
        """True where nothing that `encode` reads can change."""
        return is_frozen(*self._encoder())

    def freeze_encoder(self) -> None:
        """From now on the expert alone is trained."""
        freeze(*self._encoder())

    def _encoder(self) -> tuple[nn.Module, ...]:
        """What `encode` reads."""
        return self.vision, self.projector, self.language_model

    def preprocess(self, obs: Observation) -> PolicyInputs:
        """Raises ValueError where a camera is missing, the state has another size or a prompt is too long."""
        return self.inputs(obs)

    def with_image_tokens(self, inputs: PolicyInputs) -> PolicyInputs:
        """`inputs` with projected image tokens [N, cameras * patches, language width] instead of pictures."""
        return replace(inputs, images={}, image_tokens=self._image_tokens(inputs))

    def _image_tokens(self, inputs: PolicyInputs) -> Tensor:
        if inputs.image_tokens is not None:
            return inputs.image_tokens
        cameras = self.config.cameras
        pictures = torch.stack([inputs.images[camera] for camera in cameras], dim=1)
        seen = self.vision(to_unit_range(pictures.flatten(0, 1)))
        return project(self.projector, seen).unflatten(0, (-1, len(cameras))).flatten(1, 2)

    def encode(self, inputs: PolicyInputs) -> Prefix:
        """Keys and values of pictures and prompt, which all look at each other; `pooled`: see `make_prefix`."""
        text = self.language_model.embed(inputs.tokens)
        seen = self._image_tokens(inputs).to(text.dtype)
        mask = functional.pad(inputs.tokens != 0, (seen.shape[1], 0), value=True)
        x = torch.cat([seen, text], dim=1).to(self.language_model.dtype)
        looks = mask[:, None].expand(-1, x.shape[1], -1)
        return make_prefix(*self.language_model.prefill(x, positions_of(mask), looks), mask, inputs.state)

    # ------------------------------------------------------------------------------------------------- the expert
    def velocity(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        """`x_t` float32 [N, H, max_action_dim] normalised, `flow_time` float32 [N], or [N, H] of each step. `hidden`:
        the expert's last normed states of the action tokens, float32."""
        x, condition = self._suffix(prefix, x_t, flow_time)
        starts = torch.arange(x.shape[1], device=x.device) <= x.shape[1] - x_t.shape[1]  # the state; all the actions
        among = block_mask(torch.ones_like(starts)[None], starts)[0]
        positions = suffix_positions(prefix.mask, x.shape[1])
        mask = suffix_mask(prefix.mask, among)
        hidden, _ = self.expert(x, positions, mask, prefix=prefix.layers, condition=condition)
        hidden = hidden[:, -x_t.shape[1] :]
        return VelocityOutput(project(self.action_out_proj, hidden).float(), hidden.float())

    def _suffix(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> tuple[Tensor, Tensor | None]:
        """The expert's tokens, and the condition of its norms (pi0.5)."""
        actions, dtype = project(self.action_in_proj, x_t), self.expert.dtype
        time = time_embedding(flow_time, self.hidden_dim)
        if self.config.adaptive:
            condition = functional.silu(project(self.time_mlp_in, time))
            condition = functional.silu(project(self.time_mlp_out, condition))
            return actions.to(dtype), condition
        both = torch.cat([actions, over_steps(time.to(actions.dtype)).expand_as(actions)], dim=-1)
        tokens = project(self.action_time_mlp_out, functional.silu(project(self.action_time_mlp_in, both)))
        state = prefix.pooled[:, self.config.language.width :]
        padded = functional.pad(state, (0, self.config.max_state_dim - state.shape[1]))
        return torch.cat([project(self.state_proj, padded)[:, None].to(dtype), tokens.to(dtype)], dim=1), None

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


__all__ = ["Pi0", "Pi0Config", "gemma", "pi0_size"]
