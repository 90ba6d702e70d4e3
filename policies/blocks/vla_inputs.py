"""What a VLA does to an observation before its networks see it, and to their chunk before an arm does.

It belongs to the policy and is saved with it: prompt, tokenizer, picture size, normalisers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.core import Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.gripper import GripperConfig
from vla_rl.policies.blocks.images import Padding, center_crop, resize_with_padding
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.policies.blocks.tokenizer import Tokenizer, TokenizerConfig
from vla_rl.protocols import PolicyInputs

NUM_STATE_BINS = 256


@dataclass(frozen=True)
class PromptConfig:
    """How a sentence becomes a prompt.

    `kind`: "line" is the sentence and a line break (pi0, SmolVLA, pi0.5 without a state in its prompt); "state" has the
    normalised state as integers (pi0.5); "question" asks for the action (OpenVLA). `clean`: strip the sentence, with
    spaces for "_" and line breaks (openpi does, LeRobot does not). `state_width`: zeros follow the state up to this
    width before it is written (LeRobot up to 0.4.4: 32; 0: as it is). `end`: id of a token that ends every prompt
    (OpenVLA: 29871), -1: none.
    """

    kind: Literal["line", "state", "question"] = "line"
    clean: bool = True
    state_width: int = 0
    end: int = -1


def state_bins(state: Tensor) -> Tensor:
    """Normalised state [N, S] -> integers from -1 (below -1) to 255, as pi0.5 writes them into its prompt."""
    edges = torch.linspace(-1.0, 1.0, NUM_STATE_BINS + 1, dtype=torch.float64)[:-1]
    return torch.bucketize(state.double().cpu(), edges, right=True) - 1


def prompts(sentences: tuple[str, ...], state: Tensor, config: PromptConfig) -> list[str]:
    """One for each row; `state`: normalised [N, S]."""
    texts = [s.strip().replace("_", " ").replace("\n", " ") if config.clean else s for s in sentences]
    if config.kind == "line":
        return [text if text.endswith("\n") else f"{text}\n" for text in texts]
    if config.kind == "question":
        return [f"In: What action should the robot take to {text.lower()}?\nOut:" for text in texts]
    wide = functional.pad(state, (0, max(0, config.state_width - state.shape[1])))
    written = [" ".join(map(str, row)) for row in state_bins(wide).tolist()]
    return [f"Task: {text}, State: {row};\nAction: " for text, row in zip(texts, written, strict=True)]


class VLAInputs(nn.Module):
    """Observation -> `PolicyInputs`; actions of the environment [N, H, A] <-> the policy's chunk [N, H, chunk_dim].

    `cameras`: names in the observation, one for each picture that the networks take. `crop_area`: share of a picture
    that is kept (`center_crop`). `gripper`: whose convention the environment's last action has.
    """

    def __init__(
        self,
        *,
        cameras: tuple[str, ...],
        image_size: int,
        padding: Padding,
        tokenizer: TokenizerConfig,
        prompt: PromptConfig,
        state_dim: int,
        action_dim: int,
        chunk_dim: int,
        crop_area: float = 1.0,
        gripper: GripperConfig | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= len(set(cameras)) == len(cameras):
            raise ValueError(f"cameras must be at least one, with different names: {cameras}")
        if action_dim > chunk_dim:
            raise ValueError(f"the environment has {action_dim} action dimensions, the model at most {chunk_dim}")
        self.cameras, self.image_size, self.prompt = cameras, image_size, prompt
        self.padding: Padding = padding
        self.state_dim, self.action_dim, self.chunk_dim = state_dim, action_dim, chunk_dim
        self.crop_area, self.gripper = crop_area, gripper or GripperConfig()
        self.tokenizer = Tokenizer(tokenizer)
        self.state_normalizer = NormalizerBuffers(state_dim)
        self.action_normalizer = NormalizerBuffers(action_dim)

    def set_normalization(self, state: Normalizer, action: Normalizer) -> None:
        """Normalisers of the state [S] and of one control step's action [A]."""
        self.state_normalizer.set(state)
        self.action_normalizer.set(action)

    def forward(self, obs: Observation) -> PolicyInputs:
        """Raises ValueError where a camera is missing, the state has another size or a prompt is too long."""
        missing = [camera for camera in self.cameras if camera not in obs.images]
        if missing:
            raise ValueError(
                f"the policy needs the cameras {list(self.cameras)}, the observation has {sorted(obs.images)}; "
                f"render {missing}, or name the environment's cameras in the policy's config"
            )
        if obs.state.shape[1] != self.state_dim:
            raise ValueError(f"the policy needs state [N, {self.state_dim}], got {tuple(obs.state.shape)}")
        device = self.state_normalizer.offset.device
        state = self.state_normalizer.normalize(obs.state.to(device))
        images = {camera: self._picture(obs.images[camera].to(device)) for camera in self.cameras}
        tokens = self.tokenizer(prompts(obs.instruction, state, self.prompt), end=self.prompt.end)
        return PolicyInputs(images, tokens.to(device), state)

    def _picture(self, image: Tensor) -> Tensor:
        return center_crop(resize_with_padding(image, self.image_size, self.padding), self.crop_area)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """[N, H, A] -> [N, H, chunk_dim]: normalised, then padded with zeros."""
        chunk = functional.pad(self.action_normalizer.normalize(actions), (0, self.chunk_dim - self.action_dim))
        return self.gripper.to_model(chunk, self.action_dim - 1)

    def unnormalize_actions(self, chunk: Tensor) -> Tensor:
        """Inverse of `normalize_actions`, but for a binary gripper."""
        chunk = self.gripper.to_environment(chunk, self.action_dim - 1)
        return self.action_normalizer.unnormalize(chunk[..., : self.action_dim])


__all__ = ["PromptConfig", "VLAInputs", "prompts", "state_bins"]
