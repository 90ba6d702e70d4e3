"""The published schema: what is saved obeys it, what is changed does not, and another validator agrees."""

from __future__ import annotations

import copy
import json

import pytest

from vla_rl.evaluation.result import SCHEMA_VERSION, Episode, EvalResult, Timing
from vla_rl.evaluation.schema import SchemaError, eval_schema, validate

SUITE = {"name": "reach", "version": 1, "hash": "a1b2", "protocol": "train_equals_test", "criterion": "success_once"}


def saved(tmp_path, *, suite=SUITE, timing=True) -> dict:
    episodes = tuple(
        Episode("reach", seed, "touch it", seed > 1, seed > 2, 9, 1.0, True, condition=condition)
        for seed in range(4)
        for condition in ("", "light@2+camera@1")
    )
    clock = Timing.of([3.0, 4.0], [9.0, 8.0], [], 2.0) if timing else None
    config = {"policy": "rl", "control_hz": 10.0, "unsupported_conditions": {"physics@1": "it cannot"}}
    EvalResult(episodes, config | ({"suite": suite} if suite else {}), 1.5, clock).save(tmp_path)
    return json.loads((tmp_path / "eval.json").read_text())


@pytest.mark.parametrize(("suite", "timing"), [(SUITE, True), (None, False)])
def test_what_is_saved_obeys_the_schema(tmp_path, suite, timing):
    document = saved(tmp_path, suite=suite, timing=timing)
    validate(document)
    assert eval_schema()["properties"]["schema_version"]["const"] == SCHEMA_VERSION == document["schema_version"]


CHANGES = [
    (("schema_version",), 1, r"\$\.schema_version is 1, expected 2"),
    (("n",), 0, r"\$\.n is 0, expected at least 1"),
    (("n",), True, r"\$\.n is bool, expected integer"),
    (("success_once", "high"), 1.5, r"high is 1\.5, expected at most 1"),
    (("suite", "protocol"), "both", "protocol is 'both', expected one of"),
    (("per_task", "reach", "mean_length"), "9", "per_task.reach.mean_length is str, expected number"),
    (("timing", "policy_ms", "p95"), None, "p95 is NoneType"),
    (("config", "unsupported_conditions", "physics@1"), 3, "physics@1 is int"),
    (("author",), "me", "'author', which is not in the schema"),
]


@pytest.mark.parametrize(("where", "value", "message"), CHANGES)
def test_what_is_changed_does_not(tmp_path, where, value, message):
    document = saved(tmp_path)
    place = document
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    with pytest.raises(SchemaError, match=message):
        validate(document)
    theirs = pytest.importorskip("jsonschema").Draft202012Validator(eval_schema())
    assert not theirs.is_valid(document)


def test_every_required_field_is_missed_and_another_validator_agrees(tmp_path):
    document = saved(tmp_path)
    theirs = pytest.importorskip("jsonschema").Draft202012Validator(eval_schema())
    theirs.check_schema(eval_schema())
    assert theirs.is_valid(document)
    for name in eval_schema()["required"]:
        without = copy.deepcopy(document)
        del without[name]
        with pytest.raises(SchemaError, match=f"lacks '{name}'"):
            validate(without)
        assert not theirs.is_valid(without)


def test_a_keyword_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="'pattern' at"):
        validate({"a": "x"}, {"type": "object", "properties": {"a": {"pattern": "^y"}}})


def test_arrays_and_their_items():
    rule = {"type": ["array", "null"], "items": {"enum": [1, 2]}}
    validate([1, 2, 1], rule)
    validate(None, rule)
    with pytest.raises(SchemaError, match=r"\$\[1\] is 3"):
        validate([1, 3], rule)
