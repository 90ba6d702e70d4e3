"""Any environment with noisy sensors, late actions or another sentence: what a test can do to every simulator.

The simulator itself is untouched: its episodes, rewards and ends are those of their seeds. Noise is a function of
(episode's seed, control step) alone, so that it is the same in any batch and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import ActionSpec, Observation
from vla_rl.protocols import RunsAhead, StepEnv, StepOutcome
from vla_rl.sim.language import contradicted, reworded


@dataclass(frozen=True)
class Perturbation:
    """`pixel_noise`: standard deviation of each channel of each pixel, in grey levels of 255. `state_noise`: of each
    number of the state, in its own unit (m, rad). `action_delay`: control steps that an action waits; until the first
    arrives the arm rests: zeros, and `open_gripper` for the action's "gripper", where it has one. `paraphrase`: level
    of `language.reworded`. `other_instruction`: of another goal in the same scene, with which the sentence is
    contradicted at level `wrong_instruction` (`language.contradicted`); success stays that of the own goal."""

    pixel_noise: float = 0.0
    state_noise: float = 0.0
    action_delay: int = 0
    open_gripper: float = 0.0
    paraphrase: int = 0
    wrong_instruction: int = 0
    other_instruction: str = ""

    def __post_init__(self) -> None:
        for name in ("pixel_noise", "state_noise", "action_delay", "paraphrase", "wrong_instruction"):
            if getattr(self, name) < 0:
                raise ValueError(f"Perturbation: {name} must not be negative, got {getattr(self, name)}")
        if bool(self.wrong_instruction) != bool(self.other_instruction):
            raise ValueError("Perturbation: wrong_instruction and other_instruction go together; give both or none")
        if self.paraphrase and self.wrong_instruction:
            raise ValueError("Perturbation: paraphrase and wrong_instruction both change the sentence; take one")


class PerturbedEnv:
    """A `StepEnv` over another one, `inner`, which does all but what `perturbation` says."""

    def __init__(self, inner: StepEnv, perturbation: Perturbation) -> None:
        self.inner, self.perturbation = inner, perturbation
        self.spec, self.num_envs = inner.spec, inner.num_envs
        self.stage_names: tuple[str, ...] = getattr(inner, "stage_names", ())
        self._seeds = torch.zeros(self.num_envs, dtype=torch.int64)
        self._steps = torch.zeros(self.num_envs, dtype=torch.int64)
        self._rest = _rest_action(inner.spec.action, perturbation.open_gripper)
        self._late = self._rest.repeat(self.num_envs, perturbation.action_delay, 1)  # [N, delay, A], the oldest first

    def furthest_stage(self) -> list[int]:
        """See `TabletopEnv.furthest_stage`; -1 where the environment inside has no stages."""
        return self.inner.furthest_stage() if self.stage_names else [-1] * self.num_envs  # pyright: ignore

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        self.inner.reset(env_ids, seeds)
        self._seeds[env_ids], self._steps[env_ids] = seeds.cpu(), 0
        self._late[env_ids] = self._rest

    def begin_chunk(self, actions: Tensor, num_steps: Tensor, images: bool) -> None:
        """See `RunsAhead`; late actions are not told before."""
        if isinstance(self.inner, RunsAhead) and not self.perturbation.action_delay:
            self.inner.begin_chunk(actions, num_steps, images)

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        self._steps += active.cpu()
        return self.inner.step(self._delayed(actions, active), active)

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        obs = self.inner.observe(env_ids, images)
        ids, noise = env_ids.tolist(), self.perturbation
        pictures, state = dict(obs.images), obs.state
        if noise.pixel_noise:
            for number, (camera, picture) in enumerate(sorted(pictures.items())):
                draw = self._normal(ids, number + 1, tuple(picture.shape[1:])).to(picture.device)
                pictures[camera] = (picture + noise.pixel_noise * draw).round().clamp(0, 255).to(torch.uint8)
        if noise.state_noise:
            state = state + noise.state_noise * self._normal(ids, 0, tuple(state.shape[1:])).to(state.device)
        return replace(obs, images=pictures, state=state, instruction=tuple(map(self._sentence, obs.instruction)))

    def render(self, env_ids: Tensor) -> Tensor:
        return self.inner.render(env_ids)

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self.inner.state_dict(),
            "perturbation": str(self.perturbation),
            "seeds": self._seeds.clone(),
            "steps": self._steps.clone(),
            "late": self._late.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, with nothing changed, for the state of another perturbation."""
        if state["perturbation"] != str(self.perturbation):
            raise ValueError(f"this state is of {state['perturbation']}, here is {self.perturbation}")
        self.inner.load_state_dict(state["inner"])
        self._seeds, self._steps = state["seeds"].clone(), state["steps"].clone()
        self._late = state["late"].clone()

    def close(self) -> None:
        self.inner.close()

    def _delayed(self, actions: Tensor, active: Tensor) -> Tensor:
        """The actions `action_delay` steps ago, [N, A]; the queue of an inactive environment does not move."""
        if not self.perturbation.action_delay:
            return actions
        queue = torch.cat([self._late.to(actions), actions[:, None]], dim=1)
        self._late = torch.where(active[:, None, None], queue[:, 1:], queue[:, :-1])
        return queue[:, 0]

    def _normal(self, ids: list[int], stream: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 [M, *shape]; Philox, keyed by the episode, its counter at (step, stream)."""
        rows = []
        for i in ids:
            bits = np.random.Philox(key=[int(self._seeds[i]), stream], counter=[0, 0, int(self._steps[i]), 0])
            rows.append(np.random.Generator(bits).standard_normal(shape, dtype=np.float32))
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, *shape)

    def _sentence(self, sentence: str) -> str:
        if self.perturbation.wrong_instruction:
            return contradicted(sentence, self.perturbation.other_instruction, self.perturbation.wrong_instruction)
        return reworded(sentence, self.perturbation.paraphrase)


def simulator_of(env: StepEnv) -> StepEnv:
    """The environment itself, for whoever must know it (a scripted expert), without what perturbs it."""
    return env.inner if isinstance(env, PerturbedEnv) else env


def _rest_action(spec: ActionSpec, open_gripper: float) -> Tensor:
    """What moves nothing, float32 [A], for actions that are changes: zeros, and an open gripper."""
    return spec.clamp(torch.tensor([open_gripper if name == "gripper" else 0.0 for name in spec.names]))
