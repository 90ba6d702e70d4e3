"""Sentences as token ids. The tokenizer's own file lies in the policy, as bytes, so a saved policy is complete."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["bytes", "sentencepiece", "json"]
FILES: dict[str, Kind] = {"tokenizer.json": "json", "tokenizer.model": "sentencepiece"}
_NUM_SPECIAL = 3  # of kind "bytes": padding 0, beginning 1, end 2


@dataclass(frozen=True)
class TokenizerConfig:
    """`kind`: "bytes" needs no file (id = byte + 3); "sentencepiece" is a `tokenizer.model`, "json" a `tokenizer.json`.

    `num_bytes`: of the file. `bos`: id of the token before every sentence, -1: none. `max_tokens`: sentences are padded
    to it.
    """

    kind: Kind = "bytes"
    num_bytes: int = 0
    bos: int = 1
    max_tokens: int = 48


class Tokenizer(nn.Module):
    """Sentences -> int64 [N, max_tokens]; 0 is padding and nothing else."""

    file: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("file", torch.zeros(config.num_bytes, dtype=torch.uint8))
        self._encoder: Any = None

    @staticmethod
    def from_folder(folder: Path, *, bos: int, max_tokens: int) -> Tokenizer:
        """Of the first of `FILES` in `folder`. Raises FileNotFoundError that says which file to bring."""
        name = next((name for name in FILES if (folder / name).is_file()), None)
        if name is None:
            raise FileNotFoundError(
                f"{folder} holds no tokenizer; copy {' or '.join(FILES)} of the model into it: for pi0 and pi0.5 "
                "PaliGemma's paligemma_tokenizer.model, named tokenizer.model; for OpenVLA that of Llama 2; "
                "for SmolVLA that of SmolVLM2"
            )
        content = (folder / name).read_bytes()
        tokenizer = Tokenizer(TokenizerConfig(FILES[name], len(content), bos, max_tokens))
        tokenizer.file.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return tokenizer

    @property
    def num_ids(self) -> int:
        """Ids that it can give: the vocabulary must be at least as large."""
        if self.config.kind == "bytes":
            return 256 + _NUM_SPECIAL
        encoder = self._load()
        return encoder.vocab_size() if self.config.kind == "sentencepiece" else encoder.get_vocab_size()

    @property
    def num_text_ids(self) -> int:
        """`num_ids` without tokens that were added to a "json" one, as for a place where a picture goes."""
        return self._load().get_vocab_size(with_added_tokens=False) if self.config.kind == "json" else self.num_ids

    def ids(self, sentence: str, *, end: int = -1) -> list[int]:
        """Without padding; with `end` as the last one, where it is not there anyway (-1: none). Raises ValueError where
        they are more than `max_tokens`."""
        config = self.config
        start = [config.bos] if config.bos >= 0 else []
        if config.kind == "bytes":
            found = [byte + _NUM_SPECIAL for byte in sentence.encode()]
        elif config.kind == "sentencepiece":
            found = self._load().encode(sentence)
        else:
            found = self._load().encode(sentence, add_special_tokens=False).ids
        if end >= 0 and found[-1:] != [end]:
            found = [*found, end]
        if len(start + found) > config.max_tokens:
            raise ValueError(
                f"the sentence {sentence[:60]!r} has {len(start + found)} tokens, the policy takes "
                f"{config.max_tokens}; shorten it, or raise max_tokens"
            )
        return start + found

    def forward(self, sentences: Sequence[str], *, end: int = -1) -> Tensor:
        rows = {s: self.ids(s, end=end) for s in set(sentences)}
        tokens = torch.zeros(len(sentences), self.config.max_tokens, dtype=torch.int64)
        for i, sentence in enumerate(sentences):
            tokens[i, : len(rows[sentence])] = torch.tensor(rows[sentence])
        return tokens

    def _load(self) -> Any:
        if self._encoder is None:
            package = "sentencepiece" if self.config.kind == "sentencepiece" else "tokenizers"
            try:
                library = importlib.import_module(package)
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"this policy's tokenizer needs {package}: pip install 'vla-rl[vla]'"
                ) from error
            content = self.file.cpu().numpy().tobytes()
            if package == "sentencepiece":
                self._encoder = library.SentencePieceProcessor(model_proto=content)
            else:
                self._encoder = library.Tokenizer.from_str(content.decode())
        return self._encoder

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_encoder": None}  # a copy of the policy loads its own


__all__ = ["FILES", "Tokenizer", "TokenizerConfig"]
