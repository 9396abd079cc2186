"""The limit on the audit's share of training, under a clock that the tests move."""

from __future__ import annotations

import math
from functools import partial

import pytest
import pytorch_lightning as pl
from support import Classifier, CostlyExecutor, FakeClock, loader, trainer

from lightning_gradaudit import GradAudit, Limits
from lightning_gradaudit.callbacks import sampler
from lightning_gradaudit.callbacks.overhead import Overhead, Spent
from lightning_gradaudit.errors import InvalidInputError


def test_time_is_split_between_training_and_audit():
    clock = FakeClock()
    overhead = Overhead(0.1, clock)
    overhead.step_begins()
    with overhead:
        clock.now += 1
        with overhead:  # counted once
            clock.now += 2
    clock.now += 10
    overhead.add(0.5)  # of those ten
    overhead.step_ends()
    clock.now += 100  # validation
    with overhead:
        clock.now += 4
    assert overhead.spent() == Spent(training=9.5, audit=7.5)


def test_an_audit_is_allowed_when_the_next_one_still_fits():
    overhead = Overhead(0.1)
    assert overhead.allows([Spent(0, 0)]), "nothing is known yet"
    assert not overhead.allows([Spent(training=39, audit=2)]), "4 s of audits are more than a tenth of 39 s"
    assert overhead.allows([Spent(training=40, audit=2)])
    assert not overhead.allows([Spent(training=59, audit=4)])
    assert not overhead.allows([Spent(training=500, audit=1), Spent(training=50, audit=4)]), "the slowest decides"
    assert overhead.allows([Spent(training=60, audit=4)])
    assert overhead.skipped == 3


@pytest.mark.parametrize("limit", [0, -0.1, math.nan, math.inf, True])
def test_a_limit_that_is_no_share_is_refused_by_name(limit):
    with pytest.raises(InvalidInputError, match="max_overhead"):
        Limits(max_overhead=limit)


@pytest.mark.parametrize(
    "given", [{"queue_size": 0}, {"queue_size": True}, {"final_wait_seconds": -1}, {"final_wait_seconds": math.nan}]
)
def test_limits_out_of_range_are_named(given):
    with pytest.raises(InvalidInputError, match=next(iter(given))):
        Limits(**given)


class Ticking(Classifier):
    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = [clock]

    def training_step(self, batch, batch_idx):
        self.clock[0].now += 1.0
        return super().training_step(batch, batch_idx)


def test_the_schedule_is_thinned_to_the_limit(tmp_path, monkeypatch):
    """Steps take 1 s, audits 1.95 s: after k audits the next fits a quarter from 7.8 (k + 1) s on."""
    clock = FakeClock()
    monkeypatch.setattr(sampler, "Overhead", partial(Overhead, clock=clock))
    executor = CostlyExecutor(clock, 1.95)
    audit = GradAudit(
        every_n_steps=1,
        limits=Limits(max_overhead=0.25, queue_size=99, final_wait_seconds=0),
        executor=executor,
        dirpath=tmp_path,
    )
    pl.seed_everything(0, verbose=False)
    trainer(audit, max_steps=38, max_epochs=-1).fit(Ticking(clock), loader())
    assert [snapshot.step for snapshot in executor.snapshots] == [0, 16, 24, 32]
    assert not audit.evidence.faults
    assert audit.evidence.skipped == 34
    assert audit.evidence.to_dict()["lost"]["thinned"] == 34
    assert '"thinned": 34' in (tmp_path / "records.jsonl").read_text()


def test_without_a_limit_nothing_is_thinned(tmp_path, monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(sampler, "Overhead", partial(Overhead, clock=clock))
    executor = CostlyExecutor(clock, 100.0)
    audit = GradAudit(
        every_n_steps=2, executor=executor, limits=Limits(queue_size=99, final_wait_seconds=0), dirpath=tmp_path
    )
    trainer(audit, max_steps=8, max_epochs=-1).fit(Ticking(clock), loader())
    assert [snapshot.step for snapshot in executor.snapshots] == [0, 2, 4, 6]
