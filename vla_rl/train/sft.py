"""Supervised fine-tuning of any policy that has a supervised loss (flow matching, Gaussian likelihood, ...).

`run_sft` is the loop, `SupervisedTrainer` one update. On a CPU a run that was killed and resumed ends with the same
parameters, bit for bit, as one that was not. Several learners (`distributed.py`) share every batch: the result is that
of one to rounding, as a sample's noise and augmentation do not depend on who has it; so a run may go on with another
number of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vla_rl.core import EnvSpec, Observation
from vla_rl.data.chunks import ChunkDataset, EpochSampler
from vla_rl.flow.noise import ShareGenerator
from vla_rl.policies.adaptation import plain_state_dict
from vla_rl.policies.checkpoints.config_json import config_to_dict
from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.progress import Progress
from vla_rl.protocols import HasFeatures, HasSupervisedLoss, PolicyInputs, require, trainable_parameters
from vla_rl.train.augmentation import AugmentationConfig, augment
from vla_rl.train.checkpoint import load_state, require_same_config, save_state
from vla_rl.train.distributed import (
    LEARNERS_FOLDER,
    any_learner,
    average_gradients,
    learner,
    mean_over_learners,
    num_learners,
    same_start,
    share_of_learner,
    wait_for_all,
)
from vla_rl.train.divergence import dumping, require_finite
from vla_rl.train.ema import Ema
from vla_rl.train.interrupt import StopOnInterrupt
from vla_rl.train.metrics import MetricsLogger
from vla_rl.train.sharding import (
    clip_gradients,
    load_optimizer_state,
    load_whole,
    loss_share,
    optimizer_groups,
    optimizer_state,
    shard_layers,
    whole_state,
)

STATE_FILE, POLICY_FOLDER, DIVERGED_FILE = "sft_state.pt", "policy", "diverged_batch.safetensors"
MAY_CHANGE = ("log_interval", "checkpoint_interval")  # across a resume


class BatchSampler(Protocol):
    """Where training batches come from; deterministic, and resumable through its state.

    Of several learners each has one, in the same state; `batch` gives its rows (`share_of_learner`) of the batch.
    """

    def batch(self) -> tuple[Observation, Tensor, Tensor]:
        """Observations, actions [B, H, A] in the environment's units, mask bool [B, H], False at padded steps."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class DatasetSampler:
    """Shuffled batches of a `ChunkDataset`, as `run_sft` wants them. `batch_size`: of all learners together."""

    def __init__(self, dataset: ChunkDataset, batch_size: int, seed: int) -> None:
        self._dataset = dataset
        self._order = EpochSampler(len(dataset), batch_size, seed)
        self._share = share_of_learner(batch_size)

    def batch(self) -> tuple[Observation, Tensor, Tensor]:
        chunk = self._dataset.batch(self._order.next()[self._share])
        return chunk.obs, chunk.actions, chunk.mask

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._order.load_state_dict(state)


@dataclass(frozen=True)
class SFTConfig:
    """`batch_size` is the sampler's, of all learners together; it is checked here so that a recipe says it once.

    The learning rate rises linearly over `warmup_updates` and falls along a cosine to `final_lr_fraction` of its peak.
    `ema_decay` 0 keeps the last parameters; otherwise the saved and returned policy holds their moving average.
    `precision`: "auto" is bfloat16 autocast on a GPU and float32 on a CPU. `max_prefix_delay`: training-time real-time
    chunking for delays of so many control steps (`flow_matching_loss`), which the policy's own config then says; 0
    leaves that as it is.
    """

    num_updates: int = 1000
    batch_size: int = 96
    learning_rate: float = 2e-3
    warmup_updates: int = 50
    final_lr_fraction: float = 0.01
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    ema_decay: float = 0.99
    grad_clip: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_prefix_delay: int = 0
    seed: int = 0
    log_interval: int = 20
    checkpoint_interval: int = 250

    def __post_init__(self) -> None:
        if self.max_prefix_delay < 0:
            raise ValueError(f"SFTConfig.max_prefix_delay must be 0 or more, got {self.max_prefix_delay}")
        for name in ("num_updates", "batch_size", "log_interval", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"SFTConfig.{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0 or not self.grad_clip > 0:
            raise ValueError("SFTConfig: learning_rate and grad_clip must be positive")
        if not 0 <= self.warmup_updates < self.num_updates:
            raise ValueError(
                f"SFTConfig: warmup_updates {self.warmup_updates} must lie in [0, num_updates={self.num_updates})"
            )

    def learning_rate_at(self, update: int) -> float:
        """Learning rate of the update with this index (0 is the first)."""
        if update < self.warmup_updates:
            return self.learning_rate * (update + 1) / self.warmup_updates
        progress = (update - self.warmup_updates) / max(1, self.num_updates - self.warmup_updates)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.final_lr_fraction + (1.0 - self.final_lr_fraction) * cosine)


@dataclass(frozen=True)
class SFTResult:
    """`num_updates` done so far, all of them where `finished`. `interrupted`: Ctrl-C came, perhaps in the last one.
    `policy_folder` loads with `load_policy`. `final_loss`: NaN where nothing was left to do."""

    num_updates: int
    finished: bool
    interrupted: bool
    policy_folder: Path
    final_loss: float
    wall_s: float


class SupervisedTrainer:
    """Owns optimiser, moving average and the random generator of one policy's supervised fine-tuning.

    Of several learners each has one, and calls it as often as the others. `policy` is the same on all, or divided.
    """

    def __init__(self, policy: nn.Module, config: SFTConfig) -> None:
        require(policy, HasFeatures, HasSupervisedLoss, by="supervised fine-tuning")
        if config.max_prefix_delay:
            _learn_to_continue(policy, config.max_prefix_delay)
        self.policy: Any = policy
        self.config = config
        parameters = trainable_parameters(policy)
        if not parameters:
            raise ValueError("supervised fine-tuning: every parameter of the policy is frozen")
        self.parameters = parameters
        self.device = parameters[0].device
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(parameters),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema = Ema(parameters, config.ema_decay) if config.ema_decay > 0 else None
        self.generator = _generator(config)
        self.generator.manual_seed(config.seed)
        self.num_updates = 0
        self.recent_losses: list[float] = []  # since the last line of metrics; a resumed run logs the same mean
        if config.precision == "bfloat16" and self.device.type == "cpu":
            raise ValueError("precision 'bfloat16' is for a GPU and the policy is on the CPU; use 'auto' or 'float32'")

    def update(self, obs: Observation, actions: Tensor, mask: Tensor) -> dict[str, float]:
        """One gradient step on this learner's rows of a batch. Raises DivergenceError, on all learners and with nothing
        changed, where loss or gradient is not finite."""
        if not bool(mask.any()):
            raise ValueError("supervised fine-tuning: a batch has no unpadded step")
        config = self.config
        inputs = augment(self.policy.preprocess(obs), config.augmentation, self.generator)
        targets, mask = self.policy.normalize_actions(actions.to(self.device)), mask.to(self.device)
        with self._autocast():
            losses = self.policy.supervised_loss(inputs, targets, mask, self.generator)
        dump = _batch_tensors(inputs, actions, mask)
        details = {"update": self.num_updates, "instruction": list(obs.instruction)}
        own = losses.mean()
        mean = mean_over_learners({"loss": float(own.detach())}, len(losses))["loss"]
        loss = require_finite("the supervised loss", torch.tensor(mean), dump, details)
        self.optimizer.zero_grad()
        (own * loss_share(self.parameters, len(losses))).backward()
        average_gradients(self.parameters, len(losses))
        grad_norm = clip_gradients(self.parameters, config.grad_clip)
        norm = require_finite("the gradient's norm", grad_norm, dump, details)
        learning_rate = config.learning_rate_at(self.num_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        self.num_updates += 1
        self.recent_losses.append(loss)
        return {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate}

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the policy holds the averaged parameters (the last ones without an average)."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def state_dict(self) -> dict[str, Any]:
        """Of a divided policy divided, too; `whole_state` makes it whole, and `load_state_dict` takes it so."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.parameters),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "generator": self.generator.get_state(),
            "num_updates": self.num_updates,
            "recent_losses": list(self.recent_losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if (state["ema"] is None) != (self.ema is None):
            raise ValueError("the stored run and this one differ in whether they average parameters (ema_decay)")
        load_whole(self.policy, state["policy"])
        load_optimizer_state(self.optimizer, self.parameters, state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.generator.set_state(state["generator"])
        self.num_updates = int(state["num_updates"])
        self.recent_losses = list(state["recent_losses"])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32" or self.device.type == "cpu":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _learn_to_continue(policy: Any, max_prefix_delay: int) -> None:
    """From now on the policy's flow-matching loss, and what is saved of its config, have `max_prefix_delay`."""
    if not getattr(policy, "takes_step_times", False):
        raise TypeError(
            f"max_prefix_delay needs a flow policy that takes a flow time for each step of its chunk (TinyVLA, pi0, "
            f"pi0.5, SmolVLA, HFFlowPolicy); {type(policy).__name__} does not. Leave it at 0"
        )
    if max_prefix_delay >= policy.action_horizon:
        raise ValueError(
            f"max_prefix_delay is {max_prefix_delay}, expected less than the policy's {policy.action_horizon} steps: "
            "none is left to learn"
        )
    flow_matching = replace(policy.config.flow_matching, max_prefix_delay=max_prefix_delay)
    policy.config = replace(policy.config, flow_matching=flow_matching)


def _generator(config: SFTConfig) -> torch.Generator:
    if num_learners() == 1:
        return torch.Generator()
    generator = ShareGenerator()
    generator.num_rows, generator.rows = config.batch_size, share_of_learner(config.batch_size)
    return generator


def run_sft(
    policy: nn.Module,
    sampler: BatchSampler,
    config: SFTConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    spec: EnvSpec | None = None,
    tensorboard: bool = True,
    shard: bool = False,
) -> SFTResult:
    """Fine-tune `policy` in place; at the end it holds what lies in `run_dir/policy`.

    Several learners call it together, and the first one writes; with `shard` they divide the policy's layers
    (`sharding.py`), which stay divided.

    Ctrl-C stops after the running update, saves and returns with `finished` False. `resume=True` goes on from
    `run_dir/sft_state.pt`, or starts where there is none. Raises FileExistsError where a run would be overwritten,
    ValueError where the configuration is not that of the stored run, DivergenceError for a loss that is not finite; the
    batch is then in `run_dir/diverged_batch.safetensors` and the last checkpoint is untouched.
    """
    run_dir, is_first = Path(run_dir), learner() == 0
    same_start(policy)
    if shard:
        shard_layers(policy)
    trainer = SupervisedTrainer(policy, config)
    _start_or_resume(trainer, sampler, run_dir, resume)
    progress = Progress(config.num_updates, "sft", unit="updates", initial=trainer.num_updates)
    policy.train()
    begin, last_loss = time.monotonic(), math.nan
    logged_s, logged_updates = time.monotonic(), trainer.num_updates
    resume_after = trainer.num_updates if resume else None
    logger = MetricsLogger(run_dir, resume_after=resume_after, tensorboard=tensorboard) if is_first else nullcontext()
    with StopOnInterrupt() as stop, logger as log:
        while trainer.num_updates < config.num_updates and not any_learner(stop.requested):
            metrics = _update(trainer, sampler, run_dir)
            last_loss = metrics["loss"]
            if trainer.num_updates % config.log_interval == 0 or trainer.num_updates == config.num_updates:
                rate = (trainer.num_updates - logged_updates) * config.batch_size / (time.monotonic() - logged_s)
                metrics["loss"] = last_loss = sum(trainer.recent_losses) / len(trainer.recent_losses)
                row = {f"sft/{k}": v for k, v in metrics.items()} | {"sft/samples_per_s": rate}
                if log is not None:
                    log.log(trainer.num_updates, row)
                logged_s, logged_updates, trainer.recent_losses = time.monotonic(), trainer.num_updates, []
            if is_first:
                progress.update(trainer.num_updates, loss=last_loss)
            if trainer.num_updates % config.checkpoint_interval == 0 and trainer.num_updates < config.num_updates:
                _save(trainer, sampler, run_dir, spec)
        _save(trainer, sampler, run_dir, spec)
    if trainer.ema is not None:
        trainer.ema.copy_to_parameters()
    policy.eval()
    finished = trainer.num_updates >= config.num_updates
    return SFTResult(
        trainer.num_updates, finished, stop.requested, run_dir / POLICY_FOLDER, last_loss, time.monotonic() - begin
    )


def _update(trainer: SupervisedTrainer, sampler: BatchSampler, run_dir: Path) -> dict[str, float]:
    obs, actions, mask = sampler.batch()
    size, share = trainer.config.batch_size, share_of_learner(trainer.config.batch_size)
    if len(obs) != share.stop - share.start:
        mine = "" if num_learners() == 1 else f", and this learner's share of it {share.stop - share.start}"
        raise ValueError(
            f"the sampler gives batches of {len(obs)}, SFTConfig.batch_size is {size}{mine}; "
            "build the sampler with the configuration's batch size"
        )
    folder = run_dir if learner() == 0 else run_dir / LEARNERS_FOLDER / str(learner())
    with dumping(folder / DIVERGED_FILE, run_dir / STATE_FILE):
        return trainer.update(obs, actions, mask)


def _batch_tensors(inputs: PolicyInputs, actions: Tensor, mask: Tensor) -> dict[str, Tensor]:
    images = {f"images.{camera}": image for camera, image in inputs.images.items()}
    return images | {"tokens": inputs.tokens, "state": inputs.state, "actions": actions, "mask": mask}


# -------------------------------------------------------------------------------------------------------- run folder
def _start_or_resume(trainer: SupervisedTrainer, sampler: BatchSampler, run_dir: Path, resume: bool) -> None:
    path = run_dir / STATE_FILE
    if not path.exists():
        return
    if not resume:
        raise FileExistsError(f"{path} holds a run already; resume it, or choose another run folder")
    state = load_state(path)
    require_same_config(state["config"], trainer.config, MAY_CHANGE, path)
    trainer.load_state_dict(state["trainer"])
    sampler.load_state_dict(state["sampler"])


def _save(trainer: SupervisedTrainer, sampler: BatchSampler, run_dir: Path, spec: EnvSpec | None) -> None:
    is_first = learner() == 0
    with trainer.averaged():
        plain = whole_state(plain_state_dict(trainer.policy), keep=is_first)
        if is_first:
            metadata = {"sft_updates": trainer.num_updates}
            save_policy(trainer.policy, run_dir / POLICY_FOLDER, spec=spec, metadata=metadata, state=plain)
        del plain
    state = {
        "trainer": whole_state(trainer.state_dict(), keep=is_first),
        "sampler": sampler.state_dict(),
        "config": config_to_dict(trainer.config),
    }
    wait_for_all(lambda: save_state(run_dir / STATE_FILE, state))
