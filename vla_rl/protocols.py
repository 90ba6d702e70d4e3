"""What the parts of vla-rl ask of each other: environments, policies and their capabilities, learners.

A capability is a small protocol of its own. A learner states which it needs and calls `require`, so that a mismatch is
an error before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vla_rl.core import ActionChunk, ChunkStep, EnvSpec, Observation, Taken


# ------------------------------------------------------------------------------------------------------ environments
@dataclass(frozen=True)
class StepOutcome:
    """What one control step did, for every environment of the batch; rows of inactive environments are ignored.

    `reward`: float32 [N]. `terminated`, `truncated`, `success`: bool [N]. `lost`: bool [N], the episode cannot go on
    because its simulator died; None where that cannot happen. `taken`: what was executed in place of the actions that
    were asked for; None where no person can take over.
    """

    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    lost: Tensor | None = None
    taken: Taken | None = field(default=None, kw_only=True)


@runtime_checkable
class StepEnv(Protocol):
    """A batch of environments advanced one control step at a time: what the author of an adapter writes.

    Chunks, ends inside chunks, time limits, auto-reset and seeds of later episodes are not its business: they are
    settled once, in `vla_rl.envs.vector.ChunkedEnv`.
    """

    spec: EnvSpec
    num_envs: int

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        """Start new episodes in `env_ids` (int64 [M]); `seeds[j]` (int64, >= 0) decides all of episode `env_ids[j]`."""
        ...

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        """Advance the environments where `active` (bool [N]) by one control step of `actions` (float32 [N, A]).

        An inactive environment does not move at all: its next observation is the one it had.
        """
        ...

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        """Observations of `env_ids` (int64 [M]). With `images=False` nothing is rendered and `images` is empty."""
        ...

    def render(self, env_ids: Tensor) -> Tensor:
        """A picture for people, uint8 [M, h, w, 3]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future; tensors and plain values, so that a run resumes bit for bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class RunsAhead(Protocol):
    """A capability of a `StepEnv`: it can be told a chunk before its steps, to run them in one go."""

    def begin_chunk(self, actions: Tensor, num_steps: Tensor, images: bool) -> None:
        """The next `num_steps[i]` (int64 [N]) steps of environment i will be `actions[i]` (float32 [N, K, A]), unless
        its episode ends before. `step` still tells what came of each, and nothing else is asked in between. `images`:
        whether those whose episode goes on will be observed with pictures then."""
        ...


@runtime_checkable
class ChunkedVectorEnv(Protocol):
    """The contract that every environment of the project keeps, simulator or arm."""

    spec: EnvSpec
    num_envs: int

    def reset(self, seeds: Sequence[int], env_ids: Sequence[int] | None = None) -> Observation:
        """Start episodes in `env_ids` (default: all), seeded per environment; returns observations of all N."""
        ...

    def step(self, actions: Tensor, *, record: Sequence[int] = ()) -> ChunkStep:
        """Execute `actions [N, K, A]`. Frames of the environments in `record` are rendered at every executed step."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


# ---------------------------------------------------------------------------------------------------------- policies
@runtime_checkable
class Policy(Protocol):
    """Maps observations to action chunks. `noise` is the only source of randomness, and the caller owns it.

    A policy whose normalised chunk is wider than the environment's actions, as the padded ones of pi0, says so with an
    attribute `noise_dim`; see `chunk_shape`.
    """

    action_horizon: int
    action_dim: int

    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """The deployed policy: deterministic given `noise`, standard normal [N, *chunk_shape(policy)].

        That is the noise of a Gaussian policy's sample, whose mode zeros give, and the start of a flow policy's ODE."""
        ...


def chunk_shape(policy: Policy) -> tuple[int, int]:
    """(H, D) of a policy's noise and of its normalised chunk. The first `policy.action_dim` of D are the environment's
    actions; `normalize_actions` fills the others with zeros and `unnormalize_actions` leaves them out."""
    return policy.action_horizon, getattr(policy, "noise_dim", policy.action_dim)


@dataclass(frozen=True)
class PolicyInputs:
    """An observation after the policy's own preprocessing: normalised state, token ids, resized pictures.

    `images`: camera -> uint8 [N, 3, h, w]. `tokens`: int64 [N, T], 0 where padded. `state`: float32 [N, S] normalised.
    `image_tokens`: [N, I, D], what a frozen vision tower made of `images`, which are empty then (`HasVisionTokens`).
    """

    images: Mapping[str, Tensor]
    tokens: Tensor
    state: Tensor
    image_tokens: Tensor | None = None

    def __len__(self) -> int:
        return self.state.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory that keeping it takes."""
        tensors = [*self.images.values(), self.tokens, self.state]
        tensors += [] if self.image_tokens is None else [self.image_tokens]
        return sum(x.numel() * x.element_size() for x in tensors)

    def _map(self, function: Callable[[Tensor], Tensor]) -> PolicyInputs:
        images = {camera: function(image) for camera, image in self.images.items()}
        seen = None if self.image_tokens is None else function(self.image_tokens)
        return PolicyInputs(images, function(self.tokens), function(self.state), seen)

    def select(self, rows: Tensor) -> PolicyInputs:
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> PolicyInputs:
        return self._map(lambda x: x.to(device))

    @staticmethod
    def concatenate(parts: Sequence[PolicyInputs]) -> PolicyInputs:
        seen = [p.image_tokens for p in parts if p.image_tokens is not None]
        return PolicyInputs(
            {c: torch.cat([p.images[c] for p in parts]) for c in parts[0].images},
            torch.cat([p.tokens for p in parts]),
            torch.cat([p.state for p in parts]),
            torch.cat(seen) if seen else None,
        )


class PrefixKV(NamedTuple):
    """Keys and values of one layer, computed once and only ever read.

    `keys`, `values`: [N, num_kv_heads, T, head_dim].
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Prefix:
    """What a policy's encoder makes of its inputs, once a decision; every denoising step and the critic read it.

    `tokens`: float32 [N, T, D] for the action expert; D is 0 where the expert reads `layers` alone.
    `mask`: bool [N, T], True where a token counts. `pooled`: float32 [N, F], the features that critics get.
    `layers`: keys and values of a language model's layers, for experts and action tokens that attend to them.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    layers: tuple[PrefixKV, ...] = ()

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory that keeping it takes."""
        tensors = [self.tokens, self.mask, self.pooled, *(x for kv in self.layers for x in kv)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Prefix:
        layers = tuple(PrefixKV(function(kv.keys), function(kv.values)) for kv in self.layers)
        return Prefix(function(self.tokens), function(self.mask), function(self.pooled), layers)

    def select(self, rows: Tensor) -> Prefix:
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> Prefix:
        return self._map(lambda x: x.to(device))

    def detach(self) -> Prefix:
        return self._map(Tensor.detach)

    def repeat(self, times: int) -> Prefix:
        """[times * N]: row `d * N + i` is row i."""
        return self if times == 1 else self._map(lambda x: x.repeat(times, *(1,) * (x.dim() - 1)))

    @staticmethod
    def concatenate(parts: Sequence[Prefix]) -> Prefix:
        layers = zip(*(p.layers for p in parts), strict=True)
        return Prefix(
            torch.cat([p.tokens for p in parts]),
            torch.cat([p.mask for p in parts]),
            torch.cat([p.pooled for p in parts]),
            tuple(PrefixKV(torch.cat([kv.keys for kv in kvs]), torch.cat([kv.values for kv in kvs])) for kvs in layers),
        )


@dataclass(frozen=True)
class VelocityOutput:
    """`velocity`: float32 [N, H, A] = E[noise - action | x_t]. `hidden`: float32 [N, H, D], what a noise head reads."""

    velocity: Tensor
    hidden: Tensor


@runtime_checkable
class HasFeatures(Protocol):
    """Features for a critic. `encoder_is_frozen` says that `encode` will not change, so its result may be cached."""

    feature_dim: int
    encoder_is_frozen: bool

    def preprocess(self, obs: Observation) -> PolicyInputs: ...

    def encode(self, inputs: PolicyInputs) -> Prefix: ...


@runtime_checkable
class HasVisionTokens(HasFeatures, Protocol):
    """Its vision tower can be frozen while the language model learns; then pictures are looked at once."""

    vision_is_frozen: bool

    def with_image_tokens(self, inputs: PolicyInputs) -> PolicyInputs:
        """`inputs` with `image_tokens` in the place of pictures; `encode` takes both kinds."""
        ...


@runtime_checkable
class FlowPolicy(HasFeatures, Policy, Protocol):
    """A policy whose chunk comes from a velocity field. All tensors live in the policy's normalised action space."""

    hidden_dim: int

    def velocity(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        """`x_t` float32 [N, H, A], `flow_time` float32 [N] in [0, 1]: 1 is noise, 0 is the action. A policy with an
        attribute `takes_step_times` takes one for each step too, [N, H]."""
        ...

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """[N, H, A] in the environment's units -> [N, H, D]; see `chunk_shape`."""
        ...

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        """Exact inverse of `normalize_actions`."""
        ...

    def parameters(self, recurse: bool = True) -> Any: ...


@runtime_checkable
class GaussianPolicy(HasFeatures, Policy, Protocol):
    """A policy whose chunk is a diagonal Gaussian, in the normalised action space.

    One whose noise is Laplace's, with the same mean and standard deviation, says so with an attribute `noise_family`,
    "laplace": what explores and is scored is then what is deployed.
    """

    def distribution(self, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each float32 [N, H, A]."""
        ...

    def normalize_actions(self, actions: Tensor) -> Tensor: ...

    def unnormalize_actions(self, actions: Tensor) -> Tensor: ...


@runtime_checkable
class TokenPolicy(HasFeatures, Policy, Protocol):
    """A policy that writes its chunk in L = H * D tokens, each a bin of one number, in order of step and dimension.

    Logits are over the V action tokens alone: all others of the vocabulary are masked. A policy whose tokens do not
    depend on each other says so with an attribute `decodes_in_parallel`.
    """

    num_bins: int

    def sample_tokens(self, prefix: Prefix, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Bins int64 [N, L]. `draw(logits float32 [N, V], position)` -> int64 [N] is asked for one position after the
        other; a policy that decodes in parallel has all logits at once, and asks all the same."""
        ...

    def token_logits(self, prefix: Prefix, bins: Tensor) -> Tensor:
        """float32 [N, L, V], differentiable: at each position, given the bins before it (`bins` int64 [N, L])."""
        ...

    def actions_of_bins(self, bins: Tensor) -> Tensor:
        """Centres of the bins: normalised actions, float32 [N, H, D]."""
        ...

    def normalize_actions(self, actions: Tensor) -> Tensor: ...

    def unnormalize_actions(self, actions: Tensor) -> Tensor: ...


@runtime_checkable
class HasSupervisedLoss(Protocol):
    """Can be fitted to demonstrations."""

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Per-sample loss [N] for normalised `actions [N, H, A]`; `mask` bool [N, H] is False at padded steps."""
        ...


@runtime_checkable
class LearnsFromPrefix(HasFeatures, Policy, Protocol):
    """A policy that acts and learns from what its encoder has made, so that learning from replay encodes no picture
    twice (`vla_rl.data.flat_prefix`). Where the prefix is a function of `pooled`, a method `prefix_of(features [N, F])`
    says so, and replay keeps nothing else."""

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """The chunk that `act` deploys, normalised [N, H, D], from the `noise` that it takes."""
        ...

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of observations that are encoded already: [N]."""
        ...

    def normalize_actions(self, actions: Tensor) -> Tensor: ...

    def unnormalize_actions(self, actions: Tensor) -> Tensor: ...


class Learner(Protocol):
    """An on-policy algorithm: owns networks and optimisers, turns collected decisions into updates."""

    def iterate(self, collector: Any) -> dict[str, float]:
        """Collect with `collector` (a `RolloutCollector`) and update once; metrics `rollout/...` and `update/...`."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def require(policy: object, *capabilities: type, by: str) -> None:
    """Raise TypeError naming each protocol of `capabilities` that `policy` lacks; `by` is who asks."""
    missing = [capability.__name__ for capability in capabilities if not isinstance(policy, capability)]
    if missing:
        raise TypeError(
            f"{by} needs a policy with {', '.join(missing)}; {type(policy).__name__} has not. "
            "Choose another algorithm or policy (see vla_rl/protocols.py)."
        )


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
