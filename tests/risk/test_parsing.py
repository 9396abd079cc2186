"""Parts of stored evidence are read or refused; nothing is taken for something else."""

from __future__ import annotations

import math

import pytest

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.checks import Losses
from lightning_gradaudit.risk.parsing import (
    MOST_DROPPED,
    read_engine_check,
    read_fault,
    read_losses,
    read_run_id,
    read_step,
    read_text,
    read_texts,
)

NO_STEPS = [-1, True, False, 2.0, "3", [3], math.nan]
NO_TEXTS = [None, 3, b"text", ["text"], True]


@pytest.mark.parametrize("value", [None, 0, 7])
def test_a_step_is_a_whole_number_or_unknown(value):
    assert read_step(value) is value


@pytest.mark.parametrize("value", NO_STEPS)
def test_anything_else_is_no_step(value):
    for read in (read_step, lambda step: read_fault(step, "why")):
        with pytest.raises(InvalidInputError, match="step"):
            read(value)


@pytest.mark.parametrize("value", NO_TEXTS)
def test_text_is_text(value):
    assert (read_text("a"), read_text("")) == ("a", "")
    for read in (read_text, read_run_id, lambda text: read_fault(3, text)):
        with pytest.raises(InvalidInputError, match="text"):
            read(value)
    for settings in ({"name": value}, {3: "name"}, value):
        with pytest.raises(InvalidInputError, match=r"text|settings"):
            read_texts(settings)


def test_settings_are_texts_by_name():
    assert read_texts({"a": "1", "b": ""}) == {"a": "1", "b": ""}
    assert read_texts({}) == {}


def test_a_run_has_an_identity():
    assert read_run_id("run") == "run"
    with pytest.raises(InvalidInputError, match="identity"):
        read_run_id("")


def test_a_fault_has_a_step_and_concerns_one_audit_unless_it_says_otherwise():
    assert read_fault(0, "why") == (0, "why", False)
    assert read_fault(3, "why", True) == (3, "why", True)
    with pytest.raises(InvalidInputError, match="step"):
        read_fault(None, "why")


@pytest.mark.parametrize("lasting", [1, 0, None, "yes", "False"])
def test_a_fault_lasts_or_does_not(lasting):
    with pytest.raises(InvalidInputError, match="last"):
        read_fault(3, "why", lasting)


@pytest.mark.parametrize("passed", [True, False])
def test_an_engine_check_is_read_with_its_figures(passed):
    found = read_engine_check({"passed": passed, "psnr": {"a": 40, "b": 2.5}})
    assert (found.passed, found.psnr) == (passed, {"a": 40.0, "b": 2.5})
    assert read_engine_check({"passed": passed, "psnr": {}}).psnr == {}


@pytest.mark.parametrize(
    "changes",
    [
        *({"passed": value} for value in (1, 0, None, "True", [])),
        *({"psnr": value} for value in (None, 40.0, [40.0], "40")),
        *({"psnr": {"a": 40.0, "b": value}} for value in (math.nan, math.inf, -math.inf, "40", True, None, [40.0])),
        {"psnr": {3: 40.0}},
        {"more": 1},
    ],
    ids=str,
)
def test_the_result_of_an_engine_check_is_plain_and_finite(changes):
    with pytest.raises(InvalidInputError, match="evidence"):
        read_engine_check({"passed": True, "psnr": {"a": 40.0}} | changes)


def test_losses_are_believed_up_to_a_limit():
    most = {"dropped": MOST_DROPPED, "runs": [[0, 9, MOST_DROPPED - 1], [9, 9, 1]]}
    assert read_losses(most) == Losses(dropped=MOST_DROPPED, runs=[(0, 9, MOST_DROPPED - 1), (9, 9, 1)])
    assert read_losses({}) == Losses()


@pytest.mark.parametrize("runs", [[[0, 9, MOST_DROPPED], [9, 9, 1]], [[9, 8, 1]], [[0, 0, 1], [3, 2, 1]]], ids=str)
def test_losses_beyond_it_and_runs_that_end_before_they_begin_are_refused(runs):
    with pytest.raises(InvalidInputError, match="evidence"):
        read_losses({"dropped": 1, "runs": runs})
