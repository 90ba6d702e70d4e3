"""Sentences to features without any download: bytes are the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.policies.blocks.transformer import RMSNorm, TransformerBlock

PAD, BEGIN, END = 0, 1, 2
_NUM_SPECIAL = 3
VOCABULARY_SIZE = 256 + _NUM_SPECIAL
_SPACE = 32 + _NUM_SPECIAL
_HASH_BASE, _HASH_MODULUS = 1_000_003, 2**31 - 1
_NUM_WORD_BUCKETS = 2048


@lru_cache(maxsize=65536)
def _token_ids(sentence: str) -> tuple[int, ...]:
    return (BEGIN, *(byte + _NUM_SPECIAL for byte in sentence.strip().lower().encode()), END)


def tokenize_bytes(sentences: Sequence[str], max_tokens: int) -> Tensor:
    """Sentences -> int64 [N, max_tokens] of UTF-8 bytes (lower case, stripped) between BEGIN and END, padded with PAD.

    Raises ValueError for a sentence that does not fit: cutting it off could change what is asked of the robot.
    """
    unique: dict[str, int] = {}
    rows = [unique.setdefault(sentence, len(unique)) for sentence in sentences]
    table = torch.zeros(len(unique), max_tokens, dtype=torch.int64)
    for sentence, row in unique.items():
        ids = _token_ids(sentence)
        if len(ids) > max_tokens:
            raise ValueError(
                f"instruction {sentence!r} has {len(ids)} tokens, at most {max_tokens} fit; "
                "shorten it or build the policy with a larger max_text_tokens"
            )
        table[row, : len(ids)] = torch.tensor(ids)
    return table[torch.tensor(rows, dtype=torch.int64)]


def detokenize_bytes(tokens: Tensor) -> str:
    """The sentence of one row of `tokenize_bytes`."""
    return bytes(t - _NUM_SPECIAL for t in tokens.tolist() if t >= _NUM_SPECIAL).decode()


@lru_cache(maxsize=64)
def _hash_powers(length: int) -> Tensor:
    return torch.tensor([pow(_HASH_BASE, i, _HASH_MODULUS) for i in range(length)], dtype=torch.int64)


def word_hashes(tokens: Tensor, num_buckets: int) -> Tensor:
    """For each byte of `tokens` int64 [N, T], the bucket in [0, num_buckets) of the word that it belongs to.

    A word is a run of bytes between spaces; equal words have equal buckets wherever they stand (a polynomial hash).
    """
    n, length = tokens.shape
    position = torch.arange(length, device=tokens.device).expand(n, length)
    gap = (tokens == _SPACE) | (tokens < _NUM_SPECIAL)
    word = gap.cumsum(dim=1)
    start = torch.where(gap, position + 1, 0).cummax(dim=1).values
    powers = _hash_powers(length).to(tokens.device)
    term = torch.where(gap, 0, tokens * powers[(position - start).clamp_min(0)])
    total = torch.zeros(n, length + 1, dtype=torch.int64, device=tokens.device).scatter_add_(1, word, term)
    return total.gather(1, word) % _HASH_MODULUS % num_buckets


class TextEncoder(nn.Module):
    """Bytes -> features of the whole sentence.

    Each byte knows its position and the hash of its word, so that a colour's name is one vector from the first update
    on; two convolutions add spelling, one transformer block relates words, learned queries and a maximum read them.
    Rows that are equal are computed once: a batch has far fewer sentences than samples.
    """

    def __init__(
        self, width: int, num_tokens: int, out_width: int, *, max_text_tokens: int, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY_SIZE, width, padding_idx=PAD)
        self.words = nn.Embedding(_NUM_WORD_BUCKETS, width)
        self.position = nn.Parameter(0.02 * torch.randn(max_text_tokens, width))
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(2))
        self.block = TransformerBlock(width, num_heads, 2 * width)
        self.norm = RMSNorm(width)
        self.queries = nn.Linear(width, num_tokens, bias=False)
        self.to_tokens = nn.Linear(width, out_width)
        self.to_pooled = nn.Linear((num_tokens + 1) * width, out_width)

    def forward(self, tokens: Tensor, *, alone: bool = False) -> tuple[Tensor, Tensor]:
        """`tokens` int64 [N, T] -> sentence tokens [N, num_tokens, out_width] and pooled [N, out_width].

        `alone`: every sentence is computed by itself, so that no bit of it depends on the others of the batch.
        """
        unique, inverse = torch.unique(tokens, dim=0, return_inverse=True)
        if alone:
            lengths = (unique != PAD).sum(dim=1).clamp_min(1).tolist()
            parts = [self._encode(row[None, :length]) for row, length in zip(unique, lengths, strict=True)]
            columns = [torch.cat(column)[inverse] for column in zip(*parts, strict=True)]
            return columns[0], columns[1]
        length = int((unique != PAD).sum(dim=1).max()) if unique.numel() else 0
        sentence_tokens, pooled = self._encode(unique[:, : max(length, 1)])
        return sentence_tokens[inverse], pooled[inverse]

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        counts = (tokens != PAD).unsqueeze(-1)
        counts[:, 0] = True  # an empty row still has one token to look at
        words = self.words(word_hashes(tokens, _NUM_WORD_BUCKETS))
        x = torch.where(counts, self.embedding(tokens) + words + self.position[: tokens.shape[1]], 0.0)
        for convolution in self.convolutions:
            y = functional.silu(convolution(x.transpose(1, 2)).transpose(1, 2))
            x = torch.where(counts, x + y, 0.0)
        x = self.norm(self.block(x, mask=counts[:, None, None, :, 0]))
        weights = self.queries(x).masked_fill(~counts, float("-inf")).softmax(dim=1)
        read = weights.transpose(1, 2) @ x
        peak = x.masked_fill(~counts, float("-inf")).amax(dim=1, keepdim=True)
        return self.to_tokens(read), self.to_pooled(torch.cat([read, peak], dim=1).flatten(1))
