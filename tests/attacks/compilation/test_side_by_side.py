"""Starts, and audits, whose evaluations are compiled as one, against the same one after the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from test_evaluation_graph import Counted, snapshot
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Auditor, Budget, Snapshot, audit_snapshot, audit_snapshots
from lightning_gradaudit.attacks import (
    Adam,
    BatchNormStatistics,
    CosineDistance,
    GradientMatching,
    GroupConsistency,
    SquaredError,
    TotalVariation,
    compiled_evaluation,
)
from lightning_gradaudit.attacks.compilation import batching as side_by_side
from lightning_gradaudit.attacks.compilation import evaluation_graph as compilation
from lightning_gradaudit.attacks.compilation.batching import run_interleaved

STARTS = 3


@pytest.fixture(autouse=True)
def _no_graph_of_another_test():
    compilation._compiled.clear()


@pytest.fixture
def together(monkeypatch):
    """How many calls were made as one each time, once it is found to be faster."""
    made = []
    call = side_by_side.BatchedGraph._made
    monkeypatch.setattr(
        side_by_side.BatchedGraph, "_made", lambda self, calls: made.append(len(calls)) or call(self, calls)
    )
    monkeypatch.setattr(side_by_side.BatchedGraph, "_is_faster", lambda *_: True)
    return made


def run(attack, observation, evaluations=90):
    return attack(observation, budget=Budget(evaluations=evaluations), generator=torch.Generator().manual_seed(0))


def compile_all(attack, observation):
    """Run until nothing more is compiled: first the graph of one call, then that of all."""
    known = -1
    while len(compilation._compiled) > known:
        known = len(compilation._compiled)
        with compiled_evaluation():
            run(attack, observation, 2 * STARTS * compilation._EAGER_FIRST)
        compilation.wait_for_compilers()
    assert known == 2


@pytest.mark.parametrize("consensus", [None, GroupConsistency()], ids=["apart", "drawn together"])
def test_starts_end_where_they_would_one_after_the_other(together, consensus):
    """In train mode, where BatchNorm and the training step itself write in place."""
    attack = GradientMatching(
        regularizers=(TotalVariation(weight=1e-2), BatchNormStatistics()),
        optimizer=Adam(lr=0.02),
        consensus=consensus,
        restarts=STARTS,
        exact=True,
    )
    compile_all(attack, snapshot(0).observation)
    for seed, evaluations in ((1, 90), (2, 3 * 16)):
        observation = snapshot(seed).observation
        eager = run(attack, observation, evaluations)
        together.clear()
        with compiled_evaluation() as compiled:
            found = run(attack, observation, evaluations)
        assert (compiled.evaluations, compiled.reasons) == (evaluations, [])
        assert together[2:] == [STARTS] * (len(together) - 2)
        assert len(together) >= evaluations / STARTS - 1
        assert found.evaluations == evaluations
        assert (found.inputs - eager.inputs).norm() < 1e-2 * eager.inputs.norm()
        assert found.matching_loss == pytest.approx(eager.matching_loss, rel=1e-2)


def test_a_budget_that_starts_cannot_share_evenly_is_spent_to_the_last(together):
    attack = GradientMatching(optimizer=Adam(lr=0.02), restarts=STARTS)
    compile_all(attack, snapshot(0).observation)
    together.clear()
    with compiled_evaluation():
        found = run(attack, snapshot(1).observation, 3 * STARTS + 1)
    assert found.evaluations == 3 * STARTS + 1
    assert set(together) == {STARTS}


def test_one_by_one_where_that_is_faster(together, monkeypatch):
    attack = GradientMatching(optimizer=Adam(lr=0.02), restarts=STARTS)
    compile_all(attack, snapshot(0).observation)
    monkeypatch.setattr(side_by_side.BatchedGraph, "_is_faster", lambda *_: False)
    together.clear()
    with compiled_evaluation() as compiled:
        run(attack, snapshot(1).observation, 30)
    assert together == []
    assert compiled.evaluations == 30


def test_which_is_faster_is_measured_once_for_a_graph(monkeypatch):
    measured = []
    monkeypatch.setattr(side_by_side, "_seconds", lambda work, device: measured.append(work) or len(measured))
    attack = GradientMatching(optimizer=Adam(lr=0.02), restarts=STARTS)
    compile_all(attack, snapshot(0).observation)
    for seed in (1, 2):
        with compiled_evaluation():
            run(attack, snapshot(seed).observation, 30)
    assert len(measured) == 2, "one work each way"


def test_a_graph_of_many_that_disagrees_is_not_used(together, monkeypatch):
    attack = GradientMatching(objective=CosineDistance(), optimizer=Adam(lr=0.02), restarts=STARTS)
    observation = snapshot(1).observation
    compile_all(attack, snapshot(0).observation)
    call = side_by_side.BatchedGraph._made
    monkeypatch.setattr(
        side_by_side.BatchedGraph, "_made", lambda self, calls: [(loss, 3 * g) for loss, g in call(self, calls)]
    )
    expected = run(attack, observation)
    together.clear()
    with compiled_evaluation():
        found = run(attack, observation)
    assert together == [STARTS]
    assert found.matching_loss == pytest.approx(expected.matching_loss, rel=1e-2)


def test_who_waits_for_the_compiler_has_one_call_after_the_other(together):
    """So that a trajectory does not depend on which way a machine found faster."""
    attack = GradientMatching(optimizer=Adam(lr=0.02), restarts=STARTS)
    with compiled_evaluation(wait=True) as compiled:
        run(attack, snapshot(0).observation, 30)
    assert together == []
    assert compiled.evaluations == 30


def test_soft_labels_are_kept_apart(together):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 3))
    observed = Snapshot.from_batch(net, (torch.rand(2, 1, 4, 4), torch.tensor([2, 0])), loss=F.cross_entropy)
    attack = GradientMatching(objective=SquaredError(), optimizer=Adam(lr=0.05), labels="joint", restarts=STARTS)
    compile_all(attack, observed.observation)
    eager = run(attack, observed.observation)
    together.clear()
    with compiled_evaluation():
        found = run(attack, observed.observation)
    assert STARTS in together
    assert torch.equal(found.labels, eager.labels)
    assert (found.inputs - eager.inputs).norm() < 1e-2 * eager.inputs.norm()


def test_a_loss_that_wants_classes_refuses_all_starts():
    torch.manual_seed(0)

    class NeedsClasses(Counted):
        def training_step(self, batch, batch_idx):
            images, labels = batch
            logits = self.head(self.net(images))
            return -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()

    batch = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    observation = Snapshot.from_batch(NeedsClasses(), batch, mode="train").observation
    attack = GradientMatching(optimizer=Adam(lr=0.02), labels="joint", restarts=STARTS)
    expected = run(attack, observation)
    with compiled_evaluation():
        found = run(attack, observation)
    assert found.outcome == expected.outcome
    assert found.reason == expected.reason
    assert "soft labels" in found.reason


MATCHING = GradientMatching(
    regularizers=(TotalVariation(weight=1e-2), BatchNormStatistics()), optimizer=Adam(lr=0.02), exact=True
)
SETTINGS = {"attack": MATCHING, "budget": Budget(evaluations=90), "closed_forms": False, "compile": True}


@pytest.fixture(scope="module")
def graphs():
    """The graph of one call and that of all, of models with weights of their own, in train mode."""
    compilation._compiled.clear()
    snapshots = [snapshot(seed) for seed in (10, 11, 12)]
    for _ in range(3):
        audit_snapshots(snapshots, batch_audits=STARTS, **(SETTINGS | {"budget": Budget(evaluations=60)}))
        compilation.wait_for_compilers()
    assert len(compilation._compiled) == 2
    return dict(compilation._compiled)


@pytest.fixture
def compiled(graphs):
    compilation._compiled.update(graphs)
    return compilation._compiled


def test_audits_end_where_they_would_one_after_the_other(together, compiled):
    snapshots = [snapshot(seed) for seed in (1, 2, 3)]
    eager = [audit_snapshot(each, **(SETTINGS | {"compile": False})) for each in snapshots]
    together.clear()
    found = audit_snapshots(snapshots, batch_audits=STARTS, **SETTINGS)
    assert len(compiled) == 2
    assert set(together) == {STARTS}
    assert len(together) >= 88
    for record, expected in zip(found, eager, strict=True):
        assert (record.reason, record.evaluations) == ("", 90)
        assert record.matching_loss == pytest.approx(expected.matching_loss, rel=1e-2)
        assert float((record.pixels - expected.pixels).norm()) < 1e-2 * float(expected.pixels.norm())


def test_those_who_are_left_go_on_by_the_same_graph(together, compiled):
    snapshots = [snapshot(seed) for seed in (1, 2, 3)]
    budgets = [Budget(evaluations=n) for n in (20, 70, 90)]
    alone = [
        audit_snapshot(each, **(SETTINGS | {"compile": False, "budget": budget}))
        for each, budget in zip(snapshots, budgets, strict=True)
    ]
    together.clear()
    jobs = [
        partial(audit_snapshot, each, **(SETTINGS | {"budget": budget}))
        for each, budget in zip(snapshots, budgets, strict=True)
    ]
    found = [future.result() for future in run_interleaved(jobs)]
    assert len(compiled) == 2
    assert set(together) == {3, 2}
    assert together.count(2) >= 49
    for record, expected in zip(found, alone, strict=True):
        assert record.evaluations == expected.evaluations
        assert record.matching_loss == pytest.approx(expected.matching_loss, rel=1e-2)


def test_weights_of_one_model_are_not_copied():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 3))
    snapshots = [
        Snapshot.from_batch(net, (torch.rand(1, 1, 8, 8), torch.tensor([n])), loss=F.cross_entropy, step=n)
        for n in range(2)
    ]
    held = []
    for each in snapshots:
        observation = each.observation
        held.append(
            [observation.parameters["1.weight"], observation.gradients["1.weight"], observation.parameters["3.bias"]]
        )
    assert [side_by_side._differ(pair) for pair in zip(*held, strict=True)] == [False, True, True]


@pytest.mark.usefixtures("compiled")
def test_an_audit_that_fails_leaves_the_others_alone(together):
    snapshots = [snapshot(seed) for seed in (1, 2)]

    def fails():
        audit_snapshot(snapshots[0], **(SETTINGS | {"budget": Budget(evaluations=30)}))
        raise ZeroDivisionError

    first, failed, last = run_interleaved(
        [partial(audit_snapshot, snapshots[0], **SETTINGS), fails, partial(audit_snapshot, snapshots[1], **SETTINGS)]
    )
    assert isinstance(failed.exception(), ZeroDivisionError)
    assert set(together) == {3, 2}
    for future, each in ((first, snapshots[0]), (last, snapshots[1])):
        expected = audit_snapshot(each, **(SETTINGS | {"compile": False}))
        assert future.result().matching_loss == pytest.approx(expected.matching_loss, rel=1e-2)


def test_one_thread_is_awake_at_a_time_and_calculates_as_the_callers_does():
    awake, most = [], []

    class NoticingError(SquaredError):
        def value_and_gradient(self, simulated, observed):
            awake.append(threading.current_thread().name)
            most.append((len(awake), torch.is_grad_enabled(), torch.get_num_threads()))
            found = super().value_and_gradient(simulated, observed)
            awake.pop()
            return found

    attack = GradientMatching(objective=NoticingError(), optimizer=Adam(lr=0.02))
    jobs = [partial(run, attack, snapshot(seed).observation, 20) for seed in range(3)]
    assert all(future.exception() is None for future in run_interleaved(jobs))
    assert len(most) >= 60
    assert set(most) == {(1, True, torch.get_num_threads())}


def test_what_an_interrupt_leaves_ends_at_its_next_evaluation(compiled, monkeypatch):
    begun = threading.Event()

    def interrupted(_):
        assert begun.wait(timeout=60)
        raise KeyboardInterrupt

    class TellingError(SquaredError):
        def value_and_gradient(self, simulated, observed):
            begun.set()
            return super().value_and_gradient(simulated, observed)

    monkeypatch.setattr(side_by_side, "wait_for", interrupted)
    ends, attack = [], GradientMatching(objective=TellingError(), optimizer=Adam(lr=0.02))

    def job(seed):
        try:
            with compiled_evaluation():
                run(attack, snapshot(seed).observation, 10**6)
        except BaseException as error:
            ends.append(type(error).__name__)
            raise

    with pytest.raises(KeyboardInterrupt):
        run_interleaved([partial(job, seed) for seed in range(3)])
    assert ends == ["CancelledError"] * 3


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_begin_as_they_did_before(threads):
    """The number of arithmetic threads that later threads begin with belongs to the process."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            inside = [future.result() for future in run_interleaved([torch.get_num_threads] * 4)]
            with ThreadPoolExecutor(1) as pool:
                later = pool.submit(torch.get_num_threads).result()
            assert (inside, later, torch.get_num_threads()) == ([threads] * 4, threads, threads)
    finally:
        torch.set_num_threads(usual)


def test_a_clock_runs_for_one_audit_alone(monkeypatch):
    taken = []
    monkeypatch.setattr(
        "lightning_gradaudit.audit.engine.run_interleaved",
        lambda jobs: taken.append(len(jobs)) or run_interleaved(jobs),
    )
    snapshots = [snapshot(seed) for seed in (1, 2)]
    for changed in ({"budget": Budget(evaluations=5, seconds=60)}, {"compile": False, "budget": Budget(evaluations=5)}):
        assert len(audit_snapshots(snapshots, **(SETTINGS | changed))) == 2
    assert taken == [1] * 4


@pytest.mark.parametrize("executor", ["thread", pytest.param("process", marks=pytest.mark.alone)])
def test_audits_that_wait_go_to_the_worker_together(executor):
    snapshots = [snapshot(seed, step=seed) for seed in range(4)]
    auditor = Auditor(
        attack=MATCHING,
        budget=Budget(evaluations=30),
        compile=True,
        batch_audits=3,
        executor=executor,
        engine_check=False,
    )
    assert all(auditor.submit(each) for each in snapshots)
    records = auditor.collect(wait=240)
    auditor.close()
    assert [record.step for record in records] == [0, 1, 2, 3]
    for each, record in zip(snapshots, records, strict=True):
        expected = audit_snapshot(each, attack=MATCHING, budget=Budget(evaluations=30))
        torch.testing.assert_close(record.pixels, expected.pixels, rtol=1e-3, atol=1e-3)
