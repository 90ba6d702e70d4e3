"""torchrl's SliceSampler on pictures; runs in torchrl's own environment (see `harness.PeerGroup`).

A chunk of H steps is a slice of H + 1. Modes: "slices", as it comes, with the pictures of all its steps; "ends", a user
who keeps the pictures in a storage of their own and reads them at the first and last step alone. Neither adds up
rewards. The sizes come as JSON in REPLAY_SIZES.
"""

import json
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the library prints goes to the log

import torch  # noqa: E402
from tensordict import TensorDict  # noqa: E402  # pyright: ignore[reportMissingImports]
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler  # noqa: E402  # pyright: ignore[reportMissingImports]


def main(mode: str) -> None:
    torch.set_num_threads(1)
    sizes = json.loads(os.environ["REPLAY_SIZES"])
    episodes, steps, batch, horizon = (sizes[k] for k in ("episodes", "steps", "batch_size", "horizon"))
    length, rows = steps + 1, episodes * (steps + 1)
    generator = torch.Generator().manual_seed(0)
    size = sizes["picture"]
    pictures = torch.randint(0, 256, (rows, size, size, 3), dtype=torch.uint8, generator=generator)
    data = TensorDict(
        {
            "state": torch.randn(rows, sizes["state_dim"], generator=generator),
            "action": torch.randn(rows, sizes["action_dim"], generator=generator),
            "reward": torch.randn(rows, 1, generator=generator),
            "terminated": torch.zeros(rows, 1, dtype=torch.bool),
            "episode": torch.arange(episodes).repeat_interleave(length),
            "row": torch.arange(rows),
        },
        batch_size=[rows],
    )
    if mode == "slices":
        data["pixels"] = pictures
    sampler = SliceSampler(slice_len=horizon + 1, traj_key="episode", strict_length=True, cache_values=True)
    buffer = ReplayBuffer(storage=LazyTensorStorage(rows), sampler=sampler, batch_size=batch * (horizon + 1))
    buffer.extend(data)

    def sample() -> tuple:
        slices = buffer.sample().reshape(batch, horizon + 1)
        if mode == "ends":
            rows = slices["row"]
            return slices, pictures[rows[:, 0]], pictures[rows[:, -1]]
        return slices, slices["pixels"]

    for _ in range(3):
        sample()
    answer({"ready": True})
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        count, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            sample()
            count += 1
        answer({"steps": count, "seconds": elapsed})


def answer(message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
