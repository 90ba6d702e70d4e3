"""What a critic's last layer means: a number, or a distribution over bins (HL-Gauss)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class ScalarHead:
    """One output, the value itself; squared error."""

    out_dim: int = 1

    def value(self, out: Array) -> Array:
        """[..., 1] -> [...]."""
        return out[..., 0]

    def loss(self, out: Array, target: Array) -> Array:
        """[..., 1] and targets that broadcast to [...] -> [...]."""
        return jnp.square(out[..., 0] - target)


@dataclass(frozen=True)
class HLGaussHead:
    """`num_bins` classes on [low, high]; a target is a Gaussian's histogram (Imani and White 2018, arXiv 2403.03950).

    `sigma_in_bins`: the Gaussian's standard deviation in widths of a bin. Values outside of the range cannot be
    represented and are clipped to it: choose it from the bounds of the return.
    """

    low: float
    high: float
    num_bins: int = 101
    sigma_in_bins: float = 0.75

    def __post_init__(self) -> None:
        if not self.low < self.high or self.num_bins < 2 or self.sigma_in_bins <= 0.0:
            raise ValueError(f"HLGaussHead needs low < high, at least 2 bins and sigma_in_bins > 0, got {self}")

    @property
    def out_dim(self) -> int:
        return self.num_bins

    @property
    def _edges(self) -> Array:
        return jnp.linspace(self.low, self.high, self.num_bins + 1)

    def value(self, out: Array) -> Array:
        """Expected value: [..., bins] -> [...]."""
        centres = 0.5 * (self._edges[1:] + self._edges[:-1])
        return (jax.nn.softmax(out) * centres).sum(axis=-1)

    def probabilities(self, target: Array) -> Array:
        """[...] -> [..., bins], the mass of the target's Gaussian in each bin, normalised within the range."""
        sigma = self.sigma_in_bins * (self.high - self.low) / self.num_bins
        clipped = jnp.clip(target, self.low, self.high)
        cdf = jax.scipy.special.erf((self._edges - clipped[..., None]) / (jnp.sqrt(2.0) * sigma))
        mass = cdf[..., 1:] - cdf[..., :-1]
        return mass / mass.sum(axis=-1, keepdims=True)

    def loss(self, out: Array, target: Array) -> Array:
        """Cross-entropy: [..., bins] and targets that broadcast to [...] -> [...]."""
        return -(self.probabilities(target) * jax.nn.log_softmax(out)).sum(axis=-1)


ValueHead = ScalarHead | HLGaussHead
