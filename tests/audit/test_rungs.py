"""Audits in rungs: what each is given, their order, and that a further rung updates a record and never adds one."""

from __future__ import annotations

import random
import time
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from support import Classifier, FakeClock, loader, record, trainer

from lightning_gradaudit import Auditor, AuditSettings, Budget, GradAudit, Limits, RiskGate, Status, audit_snapshot
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Meter
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.audit import ladder as ladder_module
from lightning_gradaudit.audit.engine_check import check_engine
from lightning_gradaudit.audit.ladder import Audit, Ladder, Parcel
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.rungs import combined, rungs_of
from lightning_gradaudit.callbacks.exchange import RankExchange, RankResults
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.risk.history import AuditHistory, make_stamp
from lightning_gradaudit.risk.run_log import RunLog, evidence_from_events
from lightning_gradaudit.utils.digests import ImageKey


class OneWorker(Executor):
    """Run nothing until it is told to, and then what was submitted first."""

    workers = 1

    def __init__(self) -> None:
        self.work, self.log, self.stop_at = [], [], 10**9

    def submit(self, fn, /, *args, **kwargs):
        future: Future = Future()
        if fn is check_engine:
            future.set_result(None)
            return future
        self.work.append((future, fn, args))
        return future

    def step(self):
        future, fn, args = self.work.pop(0)
        self.log.append((args[0].step, args[1].budget.evaluations))
        future.set_result(fn(*args))


class Eager(OneWorker):
    """Run at once what has fewer evaluations than `stop_at`, and never the rest."""

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.stop_at = stop_at

    def submit(self, fn, /, *args, **kwargs):
        future = super().submit(fn, *args, **kwargs)
        if self.work and self.work[-1][0] is future and args[1].budget.evaluations < self.stop_at:
            self.work.pop()
            future.set_result(fn(*args))
        return future


@dataclass(frozen=True)
class Copies(Attack):
    """Return grey, and from a given number of evaluations on an image that it was told."""

    image: torch.Tensor | None = None
    most: int = 0

    @property
    def name(self):
        return "Copies"

    def run(self, observation, *, budget, generator):
        images = torch.full(observation.shape, 0.5)
        if self.image is not None and budget.evaluations <= self.most:
            images[0] = self.image
        return Reconstruction(
            inputs=images, labels=torch.zeros(len(images), dtype=torch.long), matching_loss=0.5,
            evaluations=budget.evaluations, outcome=Outcome.BUDGET_SPENT,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("total", "counts"), [(1, [1]), (100, [100]), (101, [20, 101]), (399, [20, 399]), (400, [20, 100, 400])]
)
def test_the_budgets_of_the_rungs_and_what_is_measured_once(total, counts):
    settings = AuditSettings(budget=Budget(evaluations=total, seconds=9), analysis=True, confirm=7, rungs=True)
    found = rungs_of(settings)
    assert [each.budget.evaluations for each in found] == counts
    assert {each.budget.seconds for each in found} == {9}
    assert sum(bool(each.analysis) for each in found) == sum(each.confirm == 7 for each in found) == 1
    assert rungs_of(replace(settings, rungs=False)) == [replace(settings, rungs=False)]
    by_time = replace(settings, budget=Budget(seconds=5))
    assert rungs_of(by_time) == [by_time]


def test_each_image_keeps_the_better_of_two_attacks_made_by_hand(snap):
    snapshot, baseline = snap("conv", batch=2), Baseline()
    budgets = [Budget(evaluations=20), Budget(evaluations=110)]
    attack = Copies(image=snapshot.truth.inputs[0], most=50)
    auditor = Auditor(
        attack=attack, closed_forms=False, budget=budgets[1], rungs=True, executor="inline", engine_check=False
    )
    auditor.submit(snapshot)
    first, last = auditor.collect()
    alone = [audit_snapshot(snapshot, attack=attack, closed_forms=False, budget=b, baseline=baseline) for b in budgets]
    assert alone[0].exposure.max() > 0.9 > alone[1].exposure.max(), "the longer attack is worse here"
    assert torch.equal(first.exposure, alone[0].exposure)
    assert torch.equal(last.exposure, torch.maximum(alone[0].exposure, alone[1].exposure))
    assert torch.equal(last.pixels[0], alone[0].pixels[0])
    assert (first.evaluations, last.evaluations) == (20, 110), "the capacity, not the sum"
    assert float(last.effort.min()) == 20
    assert [(r.rung, r.rungs, r.audit, r.finished) for r in (first, last)] == [(1, 2, 1, False), (2, 2, 1, True)]
    assert (auditor.completed, auditor.pending) == (1, 0)


def test_short_rungs_go_first_and_a_new_audit_before_the_long_rungs_of_others(snap):
    worker = OneWorker()
    auditor = Auditor(
        attack=Copies(), closed_forms=False, budget=Budget(evaluations=400), rungs=True, executor=worker,
        engine_check=False,
    )  # fmt: skip
    for step in (0, 1):
        auditor.submit(snap("conv", step=step))
    worker.step()
    worker.step()
    worker.step()  # the second rung of step 0; that of step 1 is now with the worker
    auditor.submit(snap("conv", step=2))
    while worker.work:
        worker.step()
    expected = [(0, 20), (1, 20), (0, 100), (1, 100), (2, 20), (2, 100), (0, 400), (1, 400), (2, 400)]
    assert worker.log == expected
    records = auditor.collect()
    assert sorted((r.step, r.evaluations) for r in records) == sorted(expected)
    for step in range(3):
        assert [r.rung for r in records if r.step == step] == [1, 2, 3]
    assert auditor.pending == 0


def test_a_failed_rung_ends_its_audit_alone(snap):
    worker = OneWorker()
    auditor = Auditor(
        attack=Copies(), closed_forms=False, budget=Budget(evaluations=110), rungs=True, executor=worker,
        engine_check=False,
    )  # fmt: skip
    for step in (0, 1):
        auditor.submit(snap("conv", step=step))
    worker.step()
    worker.step()
    worker.work.pop(0)[0].set_exception(RuntimeError("lost"))
    worker.step()
    assert [(r.step, r.rung) for r in auditor.collect()] == [(0, 1), (1, 1)]
    with pytest.raises(RuntimeError, match="lost"):
        auditor.collect()
    assert [(r.step, r.rung) for r in auditor.collect()] == [(1, 2)]
    assert (auditor.completed, auditor.failed, auditor.pending) == (1, 1, 0)


def rung(audit: int, number: int, exposure: float = 0.0, **changes):
    """A record of an audit of one image of its own, as it stands after a rung."""
    told = {"session": "s", "digests": (f"{audit:024x}",), "audit": audit, "rungs": 3, "rung": number}
    return record(audit, (exposure,), evaluations=(20, 100, 400)[number - 1], **told, **changes)


@pytest.mark.parametrize("seed", range(20))
def test_however_results_come_each_audit_counts_once_and_no_finding_is_lost(seed):
    order = random.Random(seed)
    left = {audit: order.randint(1, 3) for audit in range(12)}
    reached, worst, events = {}, {}, []
    while left:
        audit = order.choice(sorted(left))
        reached[audit] = reached.get(audit, 0) + 1
        worst[audit] = max(worst.get(audit, 0.0), order.choice([0.0, 0.1, 0.2]))
        events.append(rung(audit, reached[audit], worst[audit]))
        if reached[audit] == left[audit]:
            del left[audit]
    history = AuditHistory()
    for each in events:
        history.add(each)
        history.add(order.choice(events[: events.index(each) + 1]))  # what is known already changes nothing
    assert {r.audit: r.rung for r in history.records} == reached
    assert {r.audit: round(float(r.exposure), 6) for r in history.records} == {a: round(w, 6) for a, w in worst.items()}
    assert len(history.records) == len(reached)
    assert not history.damage
    verdict = history.verdict(RiskGate(0.9), engine_required=False)
    assert verdict.images == sum(rungs == 3 for rungs in reached.values()), "only what ended is evidence of absence"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (rung(1, 2, 0.8), rung(1, 3, 0.1)),
        (rung(1, 3, 0.1), replace(rung(1, 3, 0.2), evaluations=20)),
        (rung(1, 1, identified=torch.ones(1)), rung(1, 2)),
    ],
)  # fmt: skip
def test_a_result_that_takes_another_back_stands_beside_it_and_is_damage(first, second):
    history = AuditHistory()
    history.add(first)
    history.add(second)
    assert history.records == [first, second]
    assert "takes back" in history.damage[0]
    assert history.verdict(RiskGate()).status is not Status.PASS


def test_an_audit_that_ended_early_is_no_evidence_but_its_finding_is():
    clean = AuditHistory(records=[rung(at, 3) for at in range(29)], step=29)
    assert clean.verdict(RiskGate(), engine_required=False).status is Status.PASS
    for at in range(29):
        early = AuditHistory(records=[rung(i, 2 if i == at else 3) for i in range(29)], step=29)
        assert early.verdict(RiskGate(), engine_required=False).status is Status.UNKNOWN
    found = AuditHistory(records=[*clean.records, rung(30, 1, 0.8)], step=30)
    assert found.verdict(RiskGate(), engine_required=False).status is Status.BLOCK
    cut = AuditHistory(records=[*clean.records, rung(30, 1)], step=30)
    cut.lost.cut_short = 1
    assert cut.verdict(RiskGate(), engine_required=False).status is Status.UNKNOWN


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_run_with_unfinished_audits_alone_is_judged_and_says_so(count):
    engine = check_engine(None, Budget(evaluations=100))
    early = AuditHistory(records=[rung(at, 1) for at in range(count)], step=count, engine=engine)
    verdict = early.verdict(RiskGate())
    assert verdict.status is Status.UNKNOWN
    assert f"None of {count} audits has ended its last rung (the furthest: 20 evaluations)" in str(verdict)


@pytest.mark.parametrize("stop_at", [100, 400])
def test_the_end_of_training_keeps_what_ended_and_says_so(tmp_path, stop_at):
    audit = GradAudit(
        every_n_steps=2, attack=Copies(), budget=Budget(evaluations=400), executor=Eager(stop_at), dirpath=tmp_path,
        settings=AuditSettings(analysis=False, confirm=0), limits=Limits(queue_size=9, final_wait_seconds=1),
        mean=0.0, std=1.0,
    )  # fmt: skip
    trainer(audit).fit(Classifier(), loader(16))
    reached = 20 if stop_at == 100 else 100
    kept = audit.evidence
    assert [(r.step, r.rung) for r in kept.records] == [(0, 1), (2, 1)] if stop_at == 100 else [(0, 2), (2, 1)]
    assert kept.records[0].evaluations == reached
    assert f"ended after {reached} of 400 evaluations because time was up" in kept.records[0].reason
    assert (kept.lost.cut_short, kept.lost.given_up) == (2, 0)
    assert not kept.faults, kept.faults
    assert "has ended its last rung" in str(audit.verdict())
    read = RunLog(tmp_path).evidence()
    assert [r.to_dict() for r in read.records] == [r.to_dict() for r in kept.records]
    assert (read.damage, read.lost) == ([], kept.lost)


def test_the_log_of_a_resumed_run_and_a_stamp_hold_each_audit_once(tmp_path):
    log = RunLog(tmp_path)
    log.create()
    history = AuditHistory()
    log.begin(history)
    for each in (rung(1, 1), rung(2, 1, 0.1), rung(1, 2), rung(3, 1)):
        history.add(each)
        log.append("record", each.to_dict())
    stamped = AuditHistory.from_dict(make_stamp(history, RiskGate(), weights=None, global_step=1)["evidence"])
    assert [(r.audit, r.rung) for r in stamped.records] == [(1, 2), (2, 1), (3, 1)]
    log.append("record", rung(1, 3).to_dict())  # after the checkpoint
    log.append("record", rung(4, 1).to_dict())
    log.begin(stamped)
    log.append("record", replace(rung(1, 1), session="t").to_dict())
    read = evidence_from_events(log.events())
    told = sorted((r.session, r.audit, r.rung) for r in read.records)
    assert told == [("s", 1, 3), ("s", 2, 1), ("s", 3, 1), ("s", 4, 1), ("t", 1, 1)]
    assert not read.damage


def test_chances_of_naming_an_image_add_up_over_the_tries():
    before = record(0, (0.0,), chance_hits=10.0, chance_trials=100)
    after = record(0, (0.0,), chance_hits=6.0, chance_trials=50)
    assert combined(before, after).chance_hits == pytest.approx(11.0)
    assert combined(before, replace(after, chance_hits=48.0)).chance_hits == 50.0


@dataclass(frozen=True)
class Endless(Attack):
    """Evaluate nothing until the budget or the time is over."""

    @property
    def name(self):
        return "Endless"

    def run(self, observation, *, budget, generator):
        meter = Meter(budget)
        while not meter.exhausted:
            if budget.evaluations > 100:
                time.sleep(0.01)  # a last rung goes on for days
            meter.spend()
        return Reconstruction(
            inputs=torch.full(observation.shape, 0.5), labels=torch.zeros(observation.batch_size, dtype=torch.long),
            matching_loss=0.5, evaluations=meter.evaluations, outcome=Outcome.BUDGET_SPENT,
        )  # fmt: skip


@pytest.mark.parametrize("rungs", [True, False])
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_rung_under_way_ends_when_it_is_told_to_and_keeps_what_it_found(snap, executor, rungs):
    auditor = Auditor(
        attack=Endless(), closed_forms=False, budget=Budget(evaluations=10**7), rungs=rungs, executor=executor,
        engine_check=False,
    )  # fmt: skip
    auditor.submit(snap("conv"))
    (audit,) = auditor._ladder.audits
    seen = []
    while len(audit.sent) < len(auditor._ladder.rungs):
        seen += auditor.collect(wait=0.05)
    auditor.end_by(0.5)
    while auditor.pending:
        found = auditor.collect(wait=60)
        assert found, "it did not end"
        seen += found
    last = seen[-1]
    assert not last.finished
    assert f"ended after {last.evaluations} of 10000000 evaluations because time was up" in last.reason
    assert (auditor.completed, auditor.cut, auditor.failed) == (1, 1, 0)
    assert AuditRecord.from_dict(last.to_dict()).finished is False, "also when it is read again"
    assert not audit.notice.path.exists()
    auditor.close()


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (10_000.0, [(100, None), (100, None), (400, None), (400, None)]),  # there is time for everything
        (400.0, [(100, 180.0), (400, 100.0)]),  # first rungs take 40 s; 100 evaluations and the analysis fit into half
        (120.0, [(400, 70.6)]),  # 80 s are too little for two that learn more, and enough for one
        (100.0, []),
    ],
)  # fmt: skip
def test_later_rungs_get_what_is_left_of_the_run_and_all_end_by_then(snap, monkeypatch, left, expected):
    clock, worker, given = FakeClock(), OneWorker(), []
    monkeypatch.setattr(ladder_module, "time", SimpleNamespace(monotonic=clock))
    rungs = rungs_of(AuditSettings(budget=Budget(evaluations=400), analysis=True, confirm=0, rungs=True))
    ladder = Ladder(rungs, ImageKey())
    ladder.executor = worker
    ladder.plan(0.0, left)
    for step in (0, 1):
        ladder.add(Audit(step, step, Parcel(snap("conv", step=step)), Baseline()))
    while worker.work:
        future, _, (_, settings, *_) = worker.work.pop(0)
        budget = settings.budget  # an evaluation takes a second, an analysis sixty
        whole = budget.evaluations + 60 * bool(settings.analysis)
        taken = min(budget.seconds or whole, whole)
        given.append((budget.evaluations, budget.seconds and round(budget.seconds, 1)))
        clock.now += taken
        made = max(1, int(taken - 60 * bool(settings.analysis)))
        future.set_result(record(0, evaluations=made, seconds=taken, outcome=Outcome.BUDGET_SPENT))
    assert given[:2] == [(20, None)] * 2
    shown = [(count, None if seconds is not None and seconds > 1000 else seconds) for count, seconds in given[2:]]
    assert shown == expected
    assert clock.now <= left


def test_processes_exchange_results_of_rungs_and_each_audit_counts_once():
    class Two:
        is_single, is_global_zero, rank = False, True, 0

        def gather(self, box):
            return [box, other.pop(0)]

    ranks = [replace(rung(audit, number), rank=1) for audit, number in ((1, 1), (2, 1), (1, 3), (2, 2))]
    other = [RankResults(records=ranks[:2]), RankResults(records=ranks[2:])]
    exchange = RankExchange(AuditHistory(), Two())
    for own in ([rung(1, 1), rung(1, 2)], [rung(1, 3)]):
        exchange.outbox.records += own
        for each in exchange.meet(None).records:
            exchange.history.add(each)
    told = sorted((r.rank, r.audit, r.rung) for r in exchange.history.records)
    assert told == [(0, 1, 3), (1, 1, 3), (1, 2, 2)]
    assert not exchange.history.damage


@pytest.mark.parametrize(("number", "status"), [(1, Status.BLOCK), (3, Status.UNKNOWN)])
def test_names_that_three_tries_may_find_by_chance_do_not_block_where_chance_was_not_measured(number, status):
    """5 of 16 named: the rate is above .13 with 95 % confidence; a try names 5 % by chance, three tries up to 15 %."""
    named = torch.tensor([1.0] * 5 + [0.0] * 11)
    told = {"rungs": 3, "rung": number, "audit": 1, "session": "s", "digests": tuple(f"{at:024x}" for at in range(16))}
    found = record(0, (0.0,) * 16, identified=named, chance_hits=0.0, chance_trials=0, **told)
    assert AuditHistory(records=[found], step=1).verdict(RiskGate(), engine_required=False).status is status
