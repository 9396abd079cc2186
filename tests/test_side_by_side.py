"""Starts whose evaluations are compiled as one, against the same starts one after the other."""

from __future__ import annotations

import pytest
import torch
from test_compilation import Counted, snapshot
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Budget, Snapshot
from lightning_gradaudit.attacks import (
    Adam,
    BatchNormStatistics,
    CosineDistance,
    GradientMatching,
    GroupConsistency,
    SquaredError,
    TotalVariation,
    compilation,
    compiled_evaluation,
    side_by_side,
)

STARTS = 3


@pytest.fixture(autouse=True)
def _no_graph_of_another_test():
    compilation._compiled.clear()


@pytest.fixture
def together(monkeypatch):
    """How many calls were made as one each time, once it is found to be faster."""
    made = []
    call = side_by_side.Together._made
    monkeypatch.setattr(
        side_by_side.Together, "_made", lambda self, calls: made.append(len(calls)) or call(self, calls)
    )
    monkeypatch.setattr(side_by_side.Together, "_is_faster", lambda *_: True)
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
    monkeypatch.setattr(side_by_side.Together, "_is_faster", lambda *_: False)
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
    call = side_by_side.Together._made
    monkeypatch.setattr(
        side_by_side.Together, "_made", lambda self, calls: [(loss, 3 * g) for loss, g in call(self, calls)]
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
