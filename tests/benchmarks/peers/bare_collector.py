"""A collector in a process of its own, without Ray and without anyone to deliver to (see `harness.PeerGroup`)."""

import json
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402

from tests.benchmarks.collecting import (  # noqa: E402
    ENVS_PER_PROCESS,
    EXECUTION_HORIZON,
    NUM_DECISIONS,
    make_env,
    make_sampler,
)
from vla_rl.rollout.collector import RolloutCollector  # noqa: E402


def main(core: int) -> None:
    torch.set_num_threads(1)
    options = {"execution_horizon": EXECUTION_HORIZON, "seed": 0, "first_env": core * ENVS_PER_PROCESS}
    collector = RolloutCollector(make_env(ENVS_PER_PROCESS), make_sampler(), **options)
    collector.collect(NUM_DECISIONS)
    answer({"ready": True})
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        decisions, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            decisions += collector.collect(NUM_DECISIONS).valid.numel()
        answer({"steps": decisions, "seconds": elapsed})


def answer(message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[2]))
