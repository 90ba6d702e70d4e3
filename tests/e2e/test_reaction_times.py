"""The chain of a deployment is harmed in some of the ways of `make experiment NAME=reaction_times`, which measures.

Here the limits are loose and the bound is generous: the machine may be busy with something else."""

import numpy as np
import pytest

from tests.experiments.bridge_chain import Chain, Sent
from tests.experiments.reaction_times import CASES, reaction, table, trial

BOUND_S = 3.0
PATIENT = {
    "grace_s": 60.0,
    "silence_s": 0.8,
    "max_state_age_s": 0.8,
    "heartbeat_s": 0.5,
    "max_picture_age_s": 0.5,
    "max_plan_age_s": 30.0,  # so that it is the heartbeat that finds out
    "reply_s": 20.0,
}
CHOSEN = ("policy server stopped (SIGSTOP)", "half-open socket to the policy server", "camera frozen", "NaN action")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    with Chain(tmp_path_factory.mktemp("chain"), PATIENT) as chain:
        yield chain


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*CHOSEN, "bridge killed"])
def test_the_arm_holds_or_is_stopped_and_does_not_move_again(chain, name):
    found = trial(CASES[name], chain, np.random.default_rng(0))
    assert 0.0 < found.told_s < BOUND_S
    assert 0.0 <= found.still_s < BOUND_S


# ------------------------------------------------------------------------------------------------------ how it is read
def at(stamp, *target):
    """A trajectory that takes 10 ms, received at `stamp` seconds; without a target it stops."""
    return Sent(stamp, np.array(target) if target else None, 0.01)


MOVING = [at(0.00, 0.0), at(0.05, 0.1), at(0.10, 0.2)]


def test_a_hold_is_the_first_target_that_stays():
    found = reaction([*MOVING, at(0.15, 0.3), at(0.20, 0.3), at(0.25, 0.3)], 0.11)
    assert found.told_s == pytest.approx(0.09)
    assert found.still_s == pytest.approx(0.05)  # the target of 0.15 was reached at 0.16


def test_a_pause_is_no_hold():
    found = reaction([*MOVING, at(0.15, 0.2), at(0.20, 0.4), at(0.25, 0.4)], 0.11)
    assert found.told_s == pytest.approx(0.14)


def test_a_stop_ends_the_way_to_the_last_target():
    found = reaction([*MOVING, at(0.15, 0.3), at(0.152)], 0.11)
    assert (found.told_s, found.still_s) == (pytest.approx(0.042), pytest.approx(0.042))
    found = reaction([*MOVING, at(0.15)], 0.105)
    assert (found.told_s, found.still_s) == (pytest.approx(0.045), pytest.approx(0.005))
    assert reaction([*MOVING, at(0.15), at(0.2, 0.3)], 0.11).told_s == np.inf  # it moves after the stop


def test_what_was_not_seen_is_not_claimed():
    assert reaction([*MOVING, at(0.15, 0.3)], 0.11).told_s == np.inf
    with pytest.raises(ValueError, match="did not move"):
        reaction([*MOVING, at(0.15, 0.2)], 0.16)


def test_the_table_has_the_worst_of_each_case():
    rows = table({"bridge killed": {"told_ms": [1.0, 3.0, 80.2], "still_ms": [0.0, 9.6, 2.0]}})
    assert rows.split("\n")[-1] == "| bridge killed | 3 | 3 | 80 | 10 |"
