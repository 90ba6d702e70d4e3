"""Several learners, one policy: each process has its own slice of the environments, and gradients are averaged.

Started by `torchrun` (its environment variables say who is who); without it there is one learner, and everything here
is the identity. The gradient of a minibatch is that of one process on the rows of all learners, to rounding; and so are
the normalisation of advantages, the number of minibatches, the KL that ends an update, and the metrics.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LEARNERS_FOLDER = "learners"  # in a run's folder: what the learners beside the first leave
_COUNTS = ("episodes_finished", "episodes_lost", "num_samples", "worker_restarts", "worker_lost_episodes")
_WEIGHT = "rollout/episodes_finished"


def join_learners() -> bool:
    """Join the group that `torchrun` started this process for; False where it did not. NCCL where there are GPUs, one
    for each process, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return dist.is_initialized()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return True


def leave_learners() -> None:
    """End the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def num_learners() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def learner() -> int:
    """This process's number; 0 writes the files of a run."""
    return dist.get_rank() if dist.is_initialized() else 0


def slice_of_learner(num_envs: int) -> range:
    """The environments of this process. Raises ValueError where they do not divide."""
    each, rest = divmod(num_envs, num_learners())
    if rest:
        raise ValueError(f"{num_envs} environments do not divide among {num_learners()} learners; change num_envs")
    return range(learner() * each, (learner() + 1) * each)


def share_of_learner(num_rows: int) -> slice:
    """The rows of this process of a batch that all have together; shares differ by one at most. Raises ValueError where
    there are more learners than rows."""
    if num_rows < num_learners():
        raise ValueError(f"a batch of {num_rows} samples is too small for {num_learners()} learners; raise batch_size")
    return slice(learner() * num_rows // num_learners(), (learner() + 1) * num_rows // num_learners())


def sum_over_learners(values: Tensor) -> Tensor:
    """The sum of `values` of all learners, a new tensor."""
    if num_learners() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def total_over_learners(count: int) -> int:
    return int(sum_over_learners(torch.tensor(count)))


def any_learner(flag: bool) -> bool:
    """Whether it holds for one of them: all learners must leave a loop together."""
    return total_over_learners(int(flag)) > 0


def num_minibatches(num_rows: int, minibatch_size: int) -> int:
    """Into how many each learner splits its own `num_rows`, so that one of all together has about `minibatch_size`.

    Raises ValueError where a learner has fewer rows than that.
    """
    if num_learners() == 1:
        return max(1, -(-num_rows // minibatch_size))
    number = max(1, -(-total_over_learners(num_rows) // minibatch_size))
    if any_learner(num_rows < number):
        raise ValueError(f"a learner has fewer rows than there are minibatches ({number}): raise minibatch_size")
    return number


def is_divided(tensor: object) -> bool:
    """Whether it is a part of a tensor that learners share (`sharding.py`). Importing its class takes two seconds."""
    return hasattr(tensor, "full_tensor")


def average_gradients(parameters: Iterable[nn.Parameter], num_rows: int) -> None:
    """Replace the gradients by those of the mean over the rows of all learners, of which `num_rows` are here.

    Where parameters are divided among learners (`sharding.py`), the loss has had its weight already (`loss_share`) and
    their gradients are means; the others are averaged evenly here."""
    if num_learners() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = [g for g in gradients if not is_divided(g)]
    if len(whole) < len(gradients):
        gradients, num_rows = whole, 1
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_ones(1)]) * num_rows
    dist.all_reduce(flat)
    flat /= flat[-1].clone()
    for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def mean_over_learners(metrics: Mapping[str, float], num_rows: int) -> dict[str, float]:
    """Means weighted by `num_rows` of this learner; all learners have the same names."""
    if num_learners() == 1:
        return dict(metrics)
    values = torch.tensor([*metrics.values(), 1.0], dtype=torch.float64) * num_rows
    total = sum_over_learners(values)
    return dict(zip(metrics, (total[:-1] / total[-1]).tolist(), strict=True))


def gather(value: Any) -> list[Any]:
    """The `value` of every learner, in their order."""
    if num_learners() == 1:
        return [value]
    values: list[Any] = [None] * num_learners()
    dist.all_gather_object(values, value)
    return values


def join_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Counts summed, rates of episodes weighted by their number, the rest averaged over the learners that have it."""
    return merge_metrics(gather(dict(metrics)))


def merge_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """See `join_metrics`."""
    if len(parts) == 1:
        return dict(parts[0])
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [part for part in parts if name in part]
        values = [part[name] for part in having]
        by_episode = name.startswith("rollout/") and ("success" in name or "episode_" in name)
        weights = [part.get(_WEIGHT, 0.0) for part in having] if by_episode else [1.0] * len(having)
        if name.rpartition("/")[2] in _COUNTS:
            merged[name] = math.fsum(values)
        else:
            merged[name] = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / max(math.fsum(weights), 1.0)
    return merged


def same_start(module: nn.Module) -> None:
    """Give every learner the parameters and buffers of learner 0. Divided ones are of all together anyway."""
    if num_learners() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            if not is_divided(tensor):
                dist.broadcast(tensor.data, src=0)


def wait_for_all(write: Callable[[], object]) -> None:
    """Learner 0 writes, and nobody goes on before it has."""
    if learner() == 0:
        write()
    if num_learners() > 1:
        dist.barrier()


__all__ = [
    "LEARNERS_FOLDER",
    "any_learner",
    "average_gradients",
    "gather",
    "is_divided",
    "join_learners",
    "join_metrics",
    "learner",
    "leave_learners",
    "mean_over_learners",
    "merge_metrics",
    "num_learners",
    "num_minibatches",
    "same_start",
    "share_of_learner",
    "slice_of_learner",
    "sum_over_learners",
    "wait_for_all",
]
