"""Each reason not to trust a run, at the border where it begins."""

from __future__ import annotations

import math
from dataclasses import replace
from math import comb

import pytest
import torch
from support import record

from lightning_gradaudit import Outcome
from lightning_gradaudit.audit.engine_check import REFERENCE_PSNR, EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk import checks
from lightning_gradaudit.risk.checks import Fault, Losses

INVALID = {"self_test": 0.5}
UNMATCHED = {"gradient_similarity": 0.1}
INERT = {"outcome": Outcome.NOT_APPLICABLE}


# Lost samples


def test_losses_of_two_processes_add_up():
    lost = Losses(dropped=2, runs=[(1, 2, 2)], given_up=3, skipped=5)
    lost.add(Losses(dropped=1, runs=[(7, 7, 1)], given_up=10, skipped=20))
    assert lost == Losses(dropped=3, runs=[(1, 2, 2), (7, 7, 1)], given_up=13, skipped=25)


def test_drops_are_kept_as_runs_in_whatever_order_steps_come():
    lost = Losses()
    lost.drop(4, in_a_row=True)  # none before it
    lost.drop(6, in_a_row=True)
    lost.drop(5, in_a_row=True)
    lost.drop(9, in_a_row=False)
    assert (lost.dropped, lost.runs) == (4, [(4, 6, 3), (9, 9, 1)])


def test_the_share_of_drops_is_of_all_that_were_due():
    assert Losses().share(0) == 0
    assert Losses().share(3) == 0
    assert Losses(dropped=1).share(3) == 0.25
    assert Losses(dropped=3).share(0) == 1


def test_losses_are_written_by_the_names_of_stored_evidence():
    lost = Losses(dropped=1, runs=[(7, 7, 1)], given_up=2, skipped=3)
    assert lost.to_dict() == {"dropped": 1, "runs": [[7, 7, 1]], "given_up": 2, "thinned": 3}
    assert Losses.from_dict({}) == Losses()
    assert Losses.from_dict({"runs": [(7, 8, 0)], "thinned": 3}) == Losses(runs=[(7, 8, 0)], skipped=3)


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None, [1]])
@pytest.mark.parametrize("place", ["dropped", "given_up", "thinned", "first", "last", "count"])
def test_a_count_of_lost_samples_is_a_whole_number(place, value):
    values = {"dropped": 1, "runs": [[7, 7, 1]], "given_up": 2, "thinned": 3}
    if place in values:
        values[place] = value
    else:
        values["runs"][0][["first", "last", "count"].index(place)] = value
    with pytest.raises(InvalidInputError, match="lost"):
        Losses.from_dict(values)


@pytest.mark.parametrize("runs", [((7, 7, 1),), {}, "", 3, None, [[7, 7]], [[7, 7, 1, 1]], ["777"], [7], [{1, 2, 3}]])
def test_runs_of_drops_are_a_list_of_three_numbers_each(runs):
    with pytest.raises(InvalidInputError, match="lost"):
        Losses.from_dict({"runs": runs})


def lost_at(steps):
    lost = Losses()
    for step in steps:
        lost.drop(step, in_a_row=False)
    return lost


@pytest.mark.parametrize(
    ("dropped", "audited"),
    [(4, 100), (100, 4), (5, 100), (100, 5), (6, 7), (7, 7), (5, 9), (5, 10)],
)
@pytest.mark.parametrize("later", [True, False])
def test_drops_on_one_side_of_all_audits_are_a_doubt_below_a_chance_of_a_thousandth(dropped, audited, later):
    """If order were chance, all orders were equally likely, and two of them are as one-sided as this."""
    chance = 2 / comb(dropped + audited, dropped)
    steps = range(200, 200 + dropped) if later else range(dropped)
    doubts = checks.losses(lost_at(steps), [record(100 + i, (0.0,)) for i in range(audited)])
    assert len(doubts) == (chance < 1e-3 and min(dropped, audited) >= 5)
    assert all(("later" if later else "earlier") in doubt for doubt in doubts)


def test_a_run_of_drops_lies_evenly_between_its_first_and_last_step():
    audits = [record(step, (0.0,)) for step in range(100)]
    assert checks.losses(Losses(dropped=40, runs=[(0, 99, 40)]), audits) == []
    assert len(checks.losses(Losses(dropped=40, runs=[(0, 20, 40)]), audits)) == 1
    assert len(checks.losses(Losses(dropped=40, runs=[(80, 99, 40)]), audits)) == 1


@pytest.mark.parametrize(
    ("lost", "doubts"),
    [
        (Losses(), 0),
        (Losses(skipped=9), 0),
        (Losses(given_up=1), 1),
        (Losses(dropped=1), 1),
        (Losses(dropped=1, runs=[(0, 0, 2)]), 1),
        (Losses(dropped=2, runs=[(0, 0, 1), (3, 3, 1)]), 0),
        (Losses(dropped=1, given_up=1), 2),
    ],
)
def test_what_is_not_on_record_about_lost_samples_is_a_doubt(lost, doubts):
    assert len(checks.losses(lost, [record(0)])) == doubts


# Records


def test_records_out_of_range_are_told_from_the_others_each_time():
    forged = record(1)
    object.__setattr__(forged, "step", -1)
    good = [record(0), record(2)]
    for _ in range(2):
        kept, doubts = checks.sound([good[0], forged, good[1], "no record"])
        assert kept == good
        assert len(doubts) == 1
    assert checks.sound(good) == (good, [])


def test_only_broken_records_are_no_evidence_at_all():
    kept, doubts = checks.sound([None])
    assert (kept, len(doubts)) == ([], 1)


@pytest.mark.parametrize(
    ("check", "changes"),
    [(checks.self_tests, INVALID), (checks.unattacked, INERT), (checks.uncopied, {"exact_leaks": torch.ones(4) > 0})],
)
def test_one_such_audit_among_others_is_one_doubt(check, changes):
    assert check([]) == []
    assert check([record(0), record(1)]) == []
    assert len(check([record(0, **changes), record(1), record(2, **changes)])) == 1


def test_the_newest_audit_without_an_attack_says_why():
    (doubt,) = checks.unattacked([record(0, **INERT, reason="old"), record(1, **INERT, reason="new"), record(2)])
    assert "new" in doubt
    assert "old" not in doubt
    (doubt,) = checks.unattacked([record(0, **INERT)])
    assert "()" not in doubt


@pytest.mark.parametrize(
    ("records", "doubts"),
    [
        ([record(0, (0.0,) * 9), record(1, (0.0,), **UNMATCHED)], 0),  # a tenth of the images is the tail
        ([record(0, (0.0,) * 8), record(1, (0.0,), **UNMATCHED)], 1),
        ([record(0, (0.0,) * 9), record(1, (0.0,) * 2, **UNMATCHED)], 1),
        ([record(0, (0.0,), **INVALID, **UNMATCHED)], 0),  # another check's matter
        ([record(0, (0.0,), **INERT, **UNMATCHED)], 0),
        # Neither of these counts as an attacked image:
        ([record(0, (0.0,) * 8), record(1, (0.0,), **UNMATCHED), record(2, (0.0,) * 9, **INVALID)], 1),
        ([record(0, (0.0,) * 8), record(1, (0.0,), **UNMATCHED), record(2, (0.0,) * 9, **INERT)], 1),
        ([], 0),
    ],
)
def test_attacks_that_did_not_match_are_weighed_by_images(records, doubts):
    assert len(checks.unmatched(records, 0.1)) == doubts


# Age


@pytest.mark.parametrize(
    ("newest", "step", "doubts"),
    [(None, None, 0), (None, 5, 0), (7, None, 1), (7, 6, 1), (7, 7, 0), (7, 17, 0), (7, 18, 1), (0, 10, 0), (0, 11, 1)],
)
def test_an_audit_is_stale_beyond_the_limit(newest, step, doubts):
    assert len(checks.age(newest, step, 10)) == doubts


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], 1000),
        ([70_000], 1000),
        ([0, 100], 1000),
        ([0, 101], 1010),
        ([0, 1], 1000),
        ([0, 200, 400, 1000], 2000),  # the median distance, not the mean
        ([1000, 0, 400, 200], 2000),
        ([0, 0, 0, 300], 3000),  # micro-batches of one step lie no distance apart
    ],
)
def test_the_usual_age_is_ten_usual_distances_and_never_less_than_a_thousand(steps, expected):
    assert checks.usual_age([record(step, (0.0,)) for step in steps]) == expected


# Engine, identification, ceiling, faults

ENOUGH, LESS = float(REFERENCE_PSNR), REFERENCE_PSNR - 0.1


@pytest.mark.parametrize(
    ("engine", "doubts"),
    [
        (EngineCheck(True, {"a": ENOUGH, "b": 80.0}), 0),
        (EngineCheck(True, {"a": LESS, "b": 80.0}), 1),
        (EngineCheck(True, {"a": 80.0, "b": LESS}), 1),
        (EngineCheck(True, {"a": math.nan}), 1),
        (EngineCheck(True, {}), 1),
        (EngineCheck(False, {"a": 80.0}), 1),
        (EngineCheck(False, {}), 1),
        (EngineCheck(1, {"a": 80.0}), 1),
    ],
)
@pytest.mark.parametrize("required", [True, False])
def test_an_engine_check_counts_when_each_attack_reached_the_reference(engine, doubts, required):
    assert len(checks.engine_check(engine, required=required)) == doubts


@pytest.mark.parametrize("required", [True, False])
def test_a_missing_engine_check_is_a_doubt_where_one_is_required(required):
    assert len(checks.engine_check(None, required=required)) == required


def test_identification_is_in_doubt_only_where_no_image_was_ever_looked_up():
    nothing = record(0, (0.0,) * 2, identified=torch.full((2,), math.nan), gallery=12)
    partly = record(1, (0.0,) * 2, identified=torch.tensor([math.nan, 0.0]))
    assert checks.identification([]) == []
    assert len(checks.identification([nothing, replace(nothing, step=2, gallery=3)])) == 1
    assert "12" in checks.identification([nothing, replace(nothing, step=2, gallery=3)])[0]
    assert checks.identification([nothing, partly]) == []


def at_ceiling(*values, **changes):
    return record(0, (0.0,) * len(values), ceiling=torch.tensor(values), **changes)


@pytest.mark.parametrize(
    ("records", "limit", "doubts"),
    [
        ([at_ceiling(1.0)], None, 0),
        ([record(0)], None, 0),
        ([], 0.5, 0),
        ([at_ceiling(0.5, 0.1)], 0.5, 0),
        ([at_ceiling(0.1, 0.75)], 0.5, 1),
        ([at_ceiling(0.75), at_ceiling(0.1)], 0.5, 1),
        ([at_ceiling(0.0)], 0.0, 0),
        ([record(0)], 0.5, 1),
        ([at_ceiling(0.1), record(0)], 1.0, 1),
        ([at_ceiling(0.75), record(0)], 0.5, 2),
    ],
)
def test_the_highest_ceiling_of_all_images_counts_and_a_missing_one_is_a_doubt(records, limit, doubts):
    assert len(checks.ceiling(records, limit)) == doubts


def test_the_newest_audit_without_a_ceiling_says_why():
    (doubt,) = checks.ceiling([record(0, reason="old"), record(1, reason="new"), at_ceiling(0.1)], 0.5)
    assert "new" in doubt
    assert "old" not in doubt
    (doubt,) = checks.ceiling([record(0)], 0.5)
    assert "()" not in doubt


@pytest.mark.parametrize(
    ("faults", "shown"),
    [
        ([], None),
        ([(9, "old")], None),
        ([(10, "at once")], "at once"),
        ([(9, "old"), (11, "first"), (12, "last")], "last"),
        ([Fault(3, "wired wrongly", True), (12, "last")], "wired wrongly"),
        ([(3, "wired wrongly", True), (4, "worse", True), (12, "last")], "worse"),
    ],
)
def test_faults_count_from_a_step_on_and_lasting_ones_always(faults, shown):
    doubts = checks.faults(faults, 10)
    assert len(doubts) == (shown is not None)
    assert all(shown in doubt for doubt in doubts)
