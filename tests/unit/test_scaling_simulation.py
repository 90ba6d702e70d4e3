"""The simulation behind docs/scaling.md against what can be worked out by hand."""

import pytest

from tests.experiments.scaling_simulation import Costs, Resource, learner_per_gpu, predict, simulate, table


def test_jobs_share_a_resource():
    """3 and 1 units on a capacity of 2: together for a second, then the longer one alone at 2, or capped at 1."""

    def job(resource, amount, ends):
        yield resource, amount
        ends.append(True)

    for most, expected in ((float("inf"), 2.0), (1.0, 3.0)):
        shared, ends = Resource(2.0, most=most), []
        assert simulate([job(shared, 3.0, ends), job(shared, 1.0, ends)], lambda ends=ends: len(ends) == 2) == expected
    shared, ends = Resource(2.0, most=1.0, background=2.0), []
    assert simulate([job(shared, 1.0, ends)], lambda: bool(ends)) == pytest.approx(1.5)
    with pytest.raises(RuntimeError, match="waits for another"):
        simulate([iter([lambda: False])], lambda: False)


@pytest.mark.parametrize(
    ("workers", "staleness", "background", "period"),
    [
        (1, 0, 0.0, 2.0 + 0.1 + 1.0),
        (2, 0, 0.0, 1.0 + 0.1 + 1.0),
        (1, 1, 0.0, 0.1 + 2.0),  # collected during the update, which is the shorter one
        (2, 1, 0.0, 0.1 + 1.5),  # three jobs on two cores, all of one second
        (1, 0, 3.0, (2.0 + 0.1 + 1.0) * 2.0),  # half a core
        (2, 0, 2.0, 1.0 * 2.0 + 1.1 * 1.5),
    ],
)
def test_workers_and_learner_overlap_as_they_do(workers, staleness, background, period):
    costs = Costs(collect_s=2.0, join_s=0.1, update_s=1.0, background=background)
    assert 100 * predict(costs, workers, staleness, 100, cores=2) == pytest.approx(100 / period)


def test_the_table():
    """What bounds each placement: 0.75 GB/s into a driver, 50 GB/s into a machine, 40 or 8 averaged steps a period."""
    rates = table()
    assert 40 < rates["one driver"][8] < rates["one driver"][512] <= 50 == 0.75e9 / 15e6
    assert rates["learners apart"][64] == pytest.approx(59 * 640 / (640 * 0.0104 + 59 * 640 * 15e6 / 50e9), rel=0.01)
    act_and_learn = 640 * (0.0104 + 0.37 / 396)
    assert learner_per_gpu(8) == pytest.approx(8 * 640 / act_and_learn)
    assert learner_per_gpu(512) == pytest.approx(512 * 640 / (act_and_learn + 40 * 0.048))
    assert learner_per_gpu(512, 320) == pytest.approx(512 * 640 / (act_and_learn + 8 * 0.048))
