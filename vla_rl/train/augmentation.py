"""Random changes of inputs during supervised fine-tuning, one draw for each sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vla_rl.flow.noise import rows_to_draw
from vla_rl.protocols import PolicyInputs


@dataclass(frozen=True)
class AugmentationConfig:
    """All off by default.

    `shift_pixels`: each picture moves by up to so many pixels in each direction, its border repeated. A shift moves the
    objects and not the action, so it costs precision: one pixel of a 64-pixel view of a metre is 1.6 cm.
    `brightness`, `contrast`: half widths of the factors' range around 1; hue stays because sentences name colours.
    `state_dropout`: the share of samples whose normalised state becomes zero. In demonstrations the way already covered
    tells where the expert goes, so a policy can fit them without looking; without a state it has to look.
    """

    shift_pixels: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    state_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.shift_pixels < 0 or not 0.0 <= self.brightness < 1.0 or not 0.0 <= self.contrast < 1.0:
            raise ValueError(f"AugmentationConfig: need shift_pixels >= 0, brightness and contrast in [0, 1): {self}")
        if not 0.0 <= self.state_dropout < 1.0:
            raise ValueError(f"AugmentationConfig: state_dropout must lie in [0, 1), got {self.state_dropout}")

    @property
    def is_off(self) -> bool:
        return self == AugmentationConfig()


def augment(inputs: PolicyInputs, config: AugmentationConfig, generator: torch.Generator) -> PolicyInputs:
    """`inputs` with changed pictures (uint8 as before) and states. Draws nothing where the configuration is off."""
    if config.is_off:
        return inputs
    images = dict(inputs.images)
    for camera in images:
        if config.shift_pixels:
            images[camera] = random_shift(images[camera], config.shift_pixels, generator)
        if config.brightness or config.contrast:
            images[camera] = random_light(images[camera], config.brightness, config.contrast, generator)
    state = inputs.state
    if config.state_dropout:
        drawn, rows = rows_to_draw(len(inputs), generator)
        keep = torch.rand(drawn, 1, generator=generator, device=generator.device) >= config.state_dropout
        state = torch.where(keep[rows].to(state.device), state, 0.0)
    return replace(inputs, images=images, state=state)


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """`images [N, 3, h, w]`, each moved by whole pixels drawn from [-pixels, pixels] in x and y."""
    n, _, height, width = images.shape
    drawn, mine = rows_to_draw(n, generator)
    offsets = torch.randint(-pixels, pixels + 1, (2, drawn, 1), generator=generator, device=generator.device)
    offsets = offsets[:, mine].to(images.device)
    rows = (torch.arange(height, device=images.device) + offsets[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + offsets[1]).clamp(0, width - 1)
    pixel = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).expand(-1, 3, -1)
    return images.flatten(2).gather(2, pixel).view_as(images)


def random_light(images: Tensor, brightness: float, contrast: float, generator: torch.Generator) -> Tensor:
    """`images [N, 3, h, w]` uint8: `(x - 127.5) * c + 127.5`, times b, with c and b drawn for each picture."""
    drawn, rows = rows_to_draw(len(images), generator)
    uniform = torch.rand(2, drawn, 1, 1, 1, generator=generator, device=generator.device)
    draw = 2.0 * uniform[:, rows].to(images.device) - 1.0
    factor_c, factor_b = 1.0 + contrast * draw[0], 1.0 + brightness * draw[1]
    changed = ((images.float() - 127.5) * factor_c + 127.5) * factor_b
    return changed.round().clamp(0, 255).to(torch.uint8)
