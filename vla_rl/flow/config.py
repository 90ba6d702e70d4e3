"""What a stochastic sampler of a flow policy can be told, and the errors for what cannot be meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["flow_sde", "ou", "cps", "flow_noise"]
Mode = Literal["hybrid", "full"]
Reduction = Literal["joint_sum", "per_step", "per_dim", "rlinf"]

DEFAULT_NOISE_LEVEL = 0.5
DEFAULT_STD_RANGE = (0.08, 0.3)


@dataclass(frozen=True)
class FlowSamplerConfig:
    """How a flow policy explores, and how the log-probability of what it did is reduced.

    `kernel`: `flow_sde` (Euler-Maruyama), `ou` (the exact solution with the data estimate frozen, "Precise"), `cps`
    (coefficient preserving), `flow_noise` (the ODE's mean with a learned standard deviation).
    `num_steps`: K, denoising steps.
    `mode`: `full` makes every denoising step stochastic; `hybrid` one step per sample, drawn per sample.
    `noise_level`: a of the SDE kernels (default 0.5); for `cps` in (0, 1].
    `std_min`, `std_max`: bounds of `flow_noise`'s standard deviation, in normalised action units (default 0.08, 0.3).
    `reduction`: what one PPO ratio covers. `joint_sum`: the true likelihood, summed over stochastic steps, action steps
    and dimensions. `per_step`: one ratio a denoising step. `per_dim`: one ratio for every single number. `rlinf`: that
    of RLinf at chunk level, which for a full chain averages over K+1 entries, the start's included, so that its clip of
    0.2 is a clip of 0.2*(K+1) on the true log-ratio; the same as `joint_sum` for a hybrid chain.
    `scored_horizon`, `scored_dims`: noise goes only into the first so many action steps and dimensions, and only they
    are scored; the rest follows the ODE. None: all.
    """

    kernel: Kernel = "flow_sde"
    num_steps: int = 4
    mode: Mode = "hybrid"
    noise_level: float | None = None
    std_min: float | None = None
    std_max: float | None = None
    reduction: Reduction = "joint_sum"
    scored_horizon: int | None = None
    scored_dims: int | None = None

    def __post_init__(self) -> None:
        if self.kernel not in ("flow_sde", "ou", "cps", "flow_noise"):
            raise ValueError(
                f"kernel is {self.kernel!r}, expected flow_sde, ou, cps or flow_noise (flow.ode needs none)"
            )
        if self.mode not in ("hybrid", "full"):
            raise ValueError(f"mode is {self.mode!r}, expected hybrid or full")
        if self.reduction not in ("joint_sum", "per_step", "per_dim", "rlinf"):
            raise ValueError(f"reduction is {self.reduction!r}, expected joint_sum, per_step, per_dim or rlinf")
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}, expected at least 1 denoising step")
        if self.kernel in ("ou", "cps") and self.num_steps < 2:
            raise ValueError(f"the last step of {self.kernel} is deterministic, so num_steps must be at least 2")
        for name, value in (("scored_horizon", self.scored_horizon), ("scored_dims", self.scored_dims)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1, or None to score all")
        self._check_noise()

    def _check_noise(self) -> None:
        if self.kernel == "flow_noise":
            if self.noise_level is not None:
                raise ValueError(
                    "noise_level has no effect for flow_noise, whose std is learned; set std_min and std_max"
                )
            if not 0.0 < self.std_range[0] < self.std_range[1]:
                raise ValueError(f"expected 0 < std_min < std_max, got {self.std_range}")
            return
        if self.std_min is not None or self.std_max is not None:
            raise ValueError(f"std_min and std_max have no effect for {self.kernel}; set noise_level")
        if not self.level > 0.0:
            raise ValueError(
                f"noise_level is {self.level}, expected > 0: without noise there is no log-probability; "
                "flow.ode acts without noise"
            )
        if self.kernel == "cps" and self.level > 1.0:
            raise ValueError(f"noise_level is {self.level}, cps takes (0, 1]")

    @property
    def level(self) -> float:
        """The noise level in use."""
        return DEFAULT_NOISE_LEVEL if self.noise_level is None else self.noise_level

    @property
    def std_range(self) -> tuple[float, float]:
        """Bounds of the learned standard deviation in use."""
        low, high = DEFAULT_STD_RANGE
        return (low if self.std_min is None else self.std_min, high if self.std_max is None else self.std_max)

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Denoising steps that can carry noise. The last step of `ou` and `cps` ends at t' = 0 and cannot."""
        last = self.num_steps - 1 if self.kernel in ("ou", "cps") else self.num_steps
        return tuple(range(last))

    @property
    def num_scored_steps(self) -> int:
        """Transitions of one chain that enter its log-probability."""
        return 1 if self.mode == "hybrid" else len(self.stochastic_steps)

    def scored_shape(self, action_horizon: int, action_dim: int) -> tuple[int, int]:
        """How many action steps and dimensions are scored. Raises ValueError where there are not so many."""
        horizon = action_horizon if self.scored_horizon is None else self.scored_horizon
        dims = action_dim if self.scored_dims is None else self.scored_dims
        if horizon > action_horizon or dims > action_dim:
            raise ValueError(
                f"scored_horizon {horizon} and scored_dims {dims} exceed the chunk [H={action_horizon}, A={action_dim}]"
            )
        return horizon, dims

    def joint_clip(self, clip: float, action_horizon: int, action_dim: int) -> float:
        """The bound on the true joint log-ratio that a ratio clip of `clip` amounts to under this reduction."""
        horizon, dims = self.scored_shape(action_horizon, action_dim)
        factor = {
            "joint_sum": 1,
            "per_step": self.num_scored_steps,
            "per_dim": self.num_scored_steps * horizon * dims,
            "rlinf": 1 if self.mode == "hybrid" else self.num_steps + 1,
        }
        return clip * factor[self.reduction]
