"""What a reader of public checkpoints may be told, because no file says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vla_rl.policies.blocks.tokenizer import FILES, Tokenizer, TokenizerConfig
from vla_rl.policies.checkpoints.native import PolicyCheckpointError


@dataclass(frozen=True)
class ReadOptions:
    """`dtype`: of the parameters, None: as they are stored. `tokenizer`: folder with the tokenizer's file, where the
    checkpoint's has none. `cameras`: names in the observation that fill the model's picture slots in order; empty: the
    names that the checkpoint uses. `state_dim`, `action_dim`: of the environment, 0: of the checkpoint. `asset`: which
    of several `assets/<asset>/norm_stats.json`. `discrete_state`: whether pi0.5 reads the state in its prompt; None: it
    does (openpi's pi05_libero is the exception). `state_width`: the state is padded to it before it is written into the
    prompt; None: as the checkpoint's LeRobot version did (see `lerobot.py`). `action_horizon`: length of the chunk,
    which JAX checkpoints do not say; 0: of the checkpoint. `require_tokenizer`: False to look at one without.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = torch.float32
    tokenizer: Path | None = None
    cameras: tuple[str, ...] = ()
    state_dim: int = 0
    action_dim: int = 0
    asset: str = ""
    discrete_state: bool | None = None
    state_width: int | None = None
    action_horizon: int = 0
    require_tokenizer: bool = True


def read_tokenizer(folder: Path, options: ReadOptions, *, bos: int, max_tokens: int, vocab_size: int) -> Tokenizer:
    """Raises FileNotFoundError that says which file to bring, PolicyCheckpointError for one of another model."""
    place = options.tokenizer or folder
    if not any((place / name).is_file() for name in FILES) and (place / "tokenizer").is_dir():
        place = place / "tokenizer"  # as LeRobot stores it since 0.6
    if not options.require_tokenizer and not any((place / name).is_file() for name in FILES):
        return Tokenizer(TokenizerConfig(bos=bos, max_tokens=max_tokens))
    tokenizer = Tokenizer.from_folder(place, bos=bos, max_tokens=max_tokens)
    # Added tokens are not those of sentences: PaliGemma's tokenizer.json has one more than its models embed.
    if tokenizer.num_text_ids > vocab_size:
        raise PolicyCheckpointError(
            f"the tokenizer in {place} has {tokenizer.num_text_ids} tokens, the model embeds {vocab_size}: "
            "bring the tokenizer of this model"
        )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises PolicyCheckpointError for the tokenizer of bytes, which has no file and no other reader."""
    names = {"sentencepiece": "tokenizer.model", "json": "tokenizer.json"}
    if tokenizer.config.kind not in names:
        raise PolicyCheckpointError(
            "the policy's tokenizer is that of bytes, which only the project's own layout has; convert to 'native'"
        )
    (folder / names[tokenizer.config.kind]).write_bytes(tokenizer.file.cpu().numpy().tobytes())


__all__ = ["ReadOptions", "read_tokenizer", "write_tokenizer"]
