"""How many decisions a second workers and learners make: simulated, up to 512 GPUs.

Whatever works is a process; whatever is worked on (the cores of a machine, a GPU, a link, the driver's way into memory)
is a `Resource` whose capacity the jobs on it share. With measured costs it predicts the rates of 1 and 2 workers (`make
bench NAME=scaling` compares); with those of pi0 it gives the table of docs/scaling.md.

    make experiment NAME=scaling_simulation
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Resource:
    """`capacity` (per second) in equal shares, at most `most` for a job. `background`: jobs of others on it."""

    capacity: float
    most: float = float("inf")
    background: float = 0.0


Work = tuple[Resource, float]
Process = Generator["Work | Callable[[], bool]", None, None]
"""Yields (resource, amount) to work, or a condition to wait for."""


def simulate(processes: Sequence[Process], done: Callable[[], bool]) -> float:
    """Seconds until `done`. Raises RuntimeError where everybody waits."""
    now = 0.0
    waiting: dict[Process, Callable[[], bool]] = {process: lambda: True for process in processes}
    working: dict[Process, tuple[Resource, float]] = {}
    while not done():
        ready = [process for process, condition in waiting.items() if condition()]
        for process in ready:
            del waiting[process]
            _go_on(process, waiting, working)
        if ready:
            continue
        if not working:
            raise RuntimeError("every process waits for another one")
        jobs: dict[Resource, int] = {}
        for resource, _ in working.values():
            jobs[resource] = jobs.get(resource, 0) + 1
        rate = {r: min(r.most, r.capacity / (n + r.background)) for r, n in jobs.items()}
        step = min(left / rate[r] for r, left in working.values())
        now += step
        after = {process: (r, left - step * rate[r]) for process, (r, left) in working.items()}
        working = {process: (r, left) for process, (r, left) in after.items() if left > 1e-9 * rate[r]}
        for process in after.keys() - working.keys():
            waiting[process] = lambda: True
    return now


def _go_on(process: Process, waiting: dict[Process, Callable[[], bool]], working: dict[Process, Work]) -> None:
    try:
        wish = next(process)
    except StopIteration:
        return
    if callable(wish):
        waiting[process] = wish
    else:
        working[process] = wish


# ------------------------------------------------------------------------------------------------- workers, one learner
@dataclass(frozen=True)
class Run:
    """One learner and its workers, as `RayRolloutCollector` drives them: what each of them works on for one window.

    `collect`: of each worker. `deliver`: of each worker, on its way to the learner. `join`: by the driver, for all of
    them. `update`: one after the other, by the learner. `max_staleness`: see `RolloutConfig`.
    """

    num_decisions: int
    collect: Sequence[Sequence[Work]]
    deliver: Sequence[Sequence[Work]]
    join: Sequence[Work]
    update: Sequence[Work]
    max_staleness: int = 0


def decisions_per_second(run: Run, num_windows: int = 12) -> float:
    """Over the second half of `num_windows`."""
    handed_out, updated = 1, 0
    delivered = [0] * len(run.collect)

    def worker(i: int) -> Process:
        window = 0
        while True:
            yield lambda window=window: handed_out > window
            yield from run.collect[i]
            yield from run.deliver[i]
            delivered[i] += 1
            window += 1

    def learner() -> Process:
        nonlocal handed_out, updated
        while True:
            yield lambda window=updated: min(delivered) > window
            yield from run.join
            handed_out = max(handed_out, updated + 1 + run.max_staleness)
            yield from run.update
            updated += 1
            handed_out = max(handed_out, updated + 1)

    def until(windows: int) -> float:
        nonlocal handed_out, updated
        handed_out, updated, delivered[:] = 1, 0, [0] * len(delivered)
        return simulate([*(worker(i) for i in range(len(run.collect))), learner()], lambda: updated >= windows)

    half = num_windows // 2
    return run.num_decisions * (num_windows - half) / (until(num_windows) - until(half))


# --------------------------------------------------------------------------------------------------------- this machine
@dataclass(frozen=True)
class Costs:
    """Processor seconds a decision: of a worker, of the driver that joins, of the learner's update. `background`: jobs
    of others that share the cores."""

    collect_s: float
    join_s: float
    update_s: float
    background: float


def predict(costs: Costs, num_workers: int, max_staleness: int, num_decisions: int, cores: int) -> float:
    """Decisions a second of a run on one machine with `cores`."""
    machine = Resource(cores, most=1.0, background=costs.background)
    return decisions_per_second(
        Run(
            num_decisions=num_decisions,
            collect=[[(machine, costs.collect_s * num_decisions / num_workers)]] * num_workers,
            deliver=[[]] * num_workers,
            join=[(machine, costs.join_s * num_decisions)],
            update=[(machine, costs.update_s * num_decisions)],
            max_staleness=max_staleness,
        )
    )


# ---------------------------------------------------------------------------------------------------------- many GPUs
ACT_S, LEARN_S = 10.4e-3, 0.37e12 / 396e12  # a decision of pi0 on an H100; four epochs, the expert alone
PREFIX_BYTES, LINK, DRIVER = 15.0e6, 50e9, 0.75e9  # bytes; bytes/s of a machine's link, and (measured) into one process
GRADIENT_BYTES, PER_MACHINE, PER_GPU = 1.2e9, 8, 640  # float32; GPUs a machine; decisions a GPU and update


def one_driver(num_gpus: int) -> float:
    """All prefixes into one process; 8% of the GPUs learn, while the next rollout is collected."""
    learning = max(1.0, 0.08 * num_gpus)
    acting = round(num_gpus - learning)
    into_driver, gpus = Resource(DRIVER), Resource(learning)
    return _overlapped(acting, [into_driver] * acting, gpus)


def learners_apart(num_gpus: int) -> float:
    """Prefixes into the machines that learn, 8% of all, each by its own link. Within one machine no link."""
    learning = max(1.0, 0.08 * num_gpus)
    acting, machines = round(num_gpus - learning), max(1, round(learning / PER_MACHINE))
    inside = num_gpus <= PER_MACHINE
    links = [Resource(1e12 if inside else LINK) for _ in range(machines)]
    return _overlapped(acting, [links[i % machines] for i in range(acting)], Resource(learning))


def _overlapped(acting: int, ways: Sequence[Resource], learning: Resource) -> float:
    gpus = [Resource(1.0) for _ in range(acting)]
    return decisions_per_second(
        Run(
            num_decisions=PER_GPU * acting,
            collect=[[(gpu, PER_GPU * ACT_S)] for gpu in gpus],
            deliver=[[(way, PER_GPU * PREFIX_BYTES)] for way in ways],
            join=[],
            update=[(learning, PER_GPU * acting * LEARN_S)],
            max_staleness=1,
        ),
        num_windows=6,
    )


def learner_per_gpu(num_gpus: int, minibatch_rows: int = 64) -> float:
    """Every GPU acts, then learns from its own prefixes; gradients are averaged over the machines' links."""
    steps = 4 * PER_GPU // minibatch_rows
    gpus = Resource(float(num_gpus), most=1.0)
    ring: Work = (Resource(LINK), 2 * GRADIENT_BYTES)  # every byte passes a link twice in a ring
    step: list[Work] = [(gpus, LEARN_S * PER_GPU / steps), *([ring] if num_gpus > PER_MACHINE else [])]
    return decisions_per_second(
        Run(
            num_decisions=PER_GPU * num_gpus,
            collect=[[(gpus, PER_GPU * ACT_S)]] * num_gpus,
            deliver=[[]] * num_gpus,
            join=[],
            update=step * steps,
        ),
        num_windows=4,
    )


PLACEMENTS: dict[str, Callable[[int], float]] = {
    "one driver": one_driver,
    "learners apart": learners_apart,
    "a learner a GPU, 64 rows": learner_per_gpu,
    "a learner a GPU, 320 rows": lambda n: learner_per_gpu(n, 320),
}


def table() -> dict[str, dict[int, float]]:
    """Decisions a second of each placement on 8 to 512 GPUs."""
    return {name: {n: round(rate(n)) for n in (8, 64, 512)} for name, rate in PLACEMENTS.items()}


def main() -> None:
    for name, rates in table().items():
        print(f"{name:26}" + "".join(f"{n:>6} GPUs {rate:>8.0f}/s" for n, rate in rates.items()))


if __name__ == "__main__":
    main()
