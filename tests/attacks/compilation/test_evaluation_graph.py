"""Compiled evaluations against eager ones, and what happens where nothing can be compiled."""

from __future__ import annotations

import threading
from functools import partial

import cloudpickle
import pytest
import pytorch_lightning as pl
import torch
from support import Classifier, loader, trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Accuracy

from lightning_gradaudit import AuditSettings, Budget, GradAudit, Outcome, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import (
    Adam,
    BatchNormStatistics,
    CosineDistance,
    GradientMatching,
    GroupConsistency,
    InvertingGradients,
    Objective,
    SensitivityWeightedError,
    TotalVariation,
    compiled_evaluation,
)
from lightning_gradaudit.attacks.compilation import evaluation_graph as module
from lightning_gradaudit.attacks.matching.problem import MatchingProblem
from lightning_gradaudit.utils.pickling import split_tensors


class Counted(nn.Module):
    """A training step with Python, a metric and a tensor that it counts in."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(36, 3))
        self.accuracy = Accuracy(task="multiclass", num_classes=3)
        self.calls: list[int] = []
        self.seen = torch.zeros(())

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.head(self.net(images))
        self.calls.append(batch_idx)
        self.seen += len(labels)
        self.accuracy.update(logits.detach(), labels)
        return {"loss": F.cross_entropy(logits, labels), "calls": len(self.calls)}


def snapshot(seed: int = 0, *, batch: int = 2, dropout: float = 0.0, mode: str = "train", step: int = 0) -> Snapshot:
    torch.manual_seed(seed)
    batch_ = torch.rand(batch, 1, 8, 8), torch.arange(batch) % 3
    return Snapshot.from_batch(Counted(dropout), batch_, mode=mode, labels_known=True, step=step)


def evaluation_of(observed: Snapshot, objective: Objective | None = None) -> MatchingProblem:
    return MatchingProblem(
        observed.observation, objective or CosineDistance(), (TotalVariation(weight=0.1), BatchNormStatistics())
    )


@pytest.fixture(autouse=True)
def _no_graph_of_another_test():
    module._compiled.clear()


@pytest.fixture
def compilers(monkeypatch):
    """Every problem that a compiler was started for."""
    started = []
    compile_ = module._compile
    monkeypatch.setattr(module, "_compile", lambda *problem: started.append(problem) or compile_(*problem))
    return started


@pytest.mark.parametrize(("exact", "off"), [(True, 1e-3), (False, 1e-2)], ids=["twice", "difference"])
def test_a_compiled_trajectory_is_the_eager_one(compilers, exact, off):
    """Over weights, images and steps that the graph was not traced with: nothing of its example is baked in."""
    attack = GradientMatching(
        objective=SensitivityWeightedError(),
        regularizers=(TotalVariation(weight=1e-3), BatchNormStatistics()),
        optimizer=Adam(lr=0.02),
        exact=exact,
    )
    for seed in (0, 1):
        observation = snapshot(seed).observation
        eager = attack(observation, budget=Budget(evaluations=60), generator=torch.Generator().manual_seed(seed))
        with compiled_evaluation(wait=True) as compilation:
            compiled = attack(observation, budget=Budget(evaluations=60), generator=torch.Generator().manual_seed(seed))
        assert compilation.reasons == []
        assert compilation.evaluations == 60 - SensitivityWeightedError().draws
        assert [at for at, _ in compiled.trajectory] == [at for at, _ in eager.trajectory]
        losses = [torch.tensor([loss for _, loss in run.trajectory]) for run in (eager, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
        # Over all pixels: Adam makes whole steps of the smallest gradients, which are rounding alone.
        assert (compiled.inputs - eager.inputs).norm() < off * eager.inputs.norm()
    assert len(compilers) == 1, "the second audit reuses the graph of the first"


def test_soft_labels_are_compiled_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 3))
    observed = Snapshot.from_batch(net, (torch.rand(1, 1, 4, 4), torch.tensor([2])), loss=F.cross_entropy)
    evaluation = MatchingProblem(observed.observation, CosineDistance())
    images, labels = torch.rand(1, 1, 4, 4), torch.rand(1, 3).softmax(1)
    expected = evaluation(images, labels, soft=True)
    with compiled_evaluation(wait=True) as compilation:
        found = evaluation(images, labels, soft=True)
    assert compilation.evaluations == 1
    torch.testing.assert_close(found.inputs_gradient, expected.inputs_gradient)
    torch.testing.assert_close(found.labels_gradient, expected.labels_gradient)


def test_evaluations_are_eager_until_the_graph_is_ready(monkeypatch):
    observed = snapshot()
    evaluation, images = evaluation_of(observed), torch.rand(observed.observation.shape)
    expected = evaluation(images, observed.truth.labels)
    ready, done = threading.Event(), threading.Event()

    def compile_when_allowed(*_):
        ready.wait(10)
        return lambda *_: (expected.loss + 1e-5, expected.inputs_gradient)  # tells itself from the eager result

    monkeypatch.setattr(module, "_compile", compile_when_allowed)
    with compiled_evaluation() as compilation:
        for _ in range(module.SETTINGS.eager_evaluations + 2):
            assert torch.equal(evaluation(images, observed.truth.labels).loss, expected.loss)
        (future,) = module._compiled.values()
        future.add_done_callback(lambda _: done.set())
        ready.set()
        assert done.wait(10)
        assert evaluation(images, observed.truth.labels).loss > expected.loss
        assert compilation.evaluations == 1
        later = evaluation_of(observed)
        assert later(images, observed.truth.labels).loss > expected.loss, "a later audit has it from the start"
    assert (compilation.evaluations, compilation.reasons) == (2, [])


def test_nothing_is_compiled_unless_asked_for(compilers):
    audit_snapshot(snapshot(), budget=Budget(evaluations=2 * module.SETTINGS.eager_evaluations), closed_forms=False)
    assert compilers == []
    assert not module._compiled


def test_a_graph_that_disagrees_is_not_used(monkeypatch):
    observed = snapshot()
    evaluation, images = evaluation_of(observed), torch.rand(observed.observation.shape)
    expected = evaluation(images, observed.truth.labels)
    monkeypatch.setattr(module, "_compile", lambda *_: lambda *_: (expected.loss, 1.1 * expected.inputs_gradient))
    with compiled_evaluation(wait=True) as compilation:
        for _ in range(2):
            found = evaluation(images, observed.truth.labels)
            torch.testing.assert_close(found.inputs_gradient, expected.inputs_gradient)
    assert compilation.evaluations == 0
    assert compilation.reasons == ["not compiled: the compiled graph is off by 0.1"]


@pytest.mark.parametrize(("loss", "gradient", "used"), [(1.0, 1.1, True), (1.0, 3.0, False), (1.1, 1.0, False)])
def test_a_graph_may_be_off_by_what_rounding_does_to_a_gradient_and_no_more(monkeypatch, loss, gradient, used):
    def jumping(images):  # by a tenth of it, wherever rounding puts a pixel
        jumps = torch.where(images > 0.5, 1.1, 0.9)
        return images.sum(), jumps

    def compiled(images):
        expected = jumping(images)
        return loss * expected[0], gradient * expected[1]

    monkeypatch.setattr(module, "_compile", lambda *_: compiled)
    whole = module.CompiledEvaluation(jumping)
    with compiled_evaluation(wait=True) as compilation:
        whole(torch.full((1, 1, 8, 8), 0.5))
    assert bool(compilation.evaluations) is used


class Unpicklable(CosineDistance):
    def __reduce__(self):
        raise TypeError("cannot pickle an open file")


class Branching(CosineDistance):
    """Decides in Python by a value that a graph only has when it runs."""

    def value_and_gradient(self, simulated, observed):
        value, gradient = super().value_and_gradient(simulated, observed)
        return (value, gradient) if value.item() < 2 else (2 * value, gradient)


@pytest.mark.parametrize(
    ("options", "objective", "reason"),
    [
        ({"dropout": 0.5}, CosineDistance(), "draws random numbers"),
        ({}, Unpicklable(), "cannot pickle an open file"),
        ({}, Branching(), "not compiled: "),
    ],
    ids=["dropout", "unpicklable", "branching"],
)
def test_what_cannot_be_compiled_stays_eager_and_says_why(options, objective, reason):
    observed = snapshot(**options)
    evaluation, images = evaluation_of(observed, objective), torch.rand(observed.observation.shape)
    expected = evaluation(images, observed.truth.labels)
    with compiled_evaluation(wait=True) as compilation:
        for _ in range(2):
            assert torch.equal(evaluation(images, observed.truth.labels).inputs_gradient, expected.inputs_gradient)
    assert compilation.evaluations == 0
    (found,) = compilation.reasons
    assert reason in found


def test_the_record_says_why_an_audit_was_eager():
    attack = GradientMatching(optimizer=Adam(lr=0.02))
    observed = snapshot(dropout=0.5)
    for _ in range(2):  # the first audit may be over before the compiler has looked
        record = audit_snapshot(
            observed, attack=attack, budget=Budget(evaluations=80), closed_forms=False, compile=True
        )
        for future in module._compiled.values():
            assert future.exception(timeout=60) is not None
    assert "not compiled: UnsupportedError: the training step draws random numbers" in record.reason


def test_one_problem_in_other_processes_is_still_one():
    """A worker unpickles every snapshot anew, weights, replica and all."""
    keys = []
    for seed in (0, 1):
        travelled = cloudpickle.loads(cloudpickle.dumps(snapshot(seed)))
        evaluation = evaluation_of(travelled)
        problem, tensors = split_tensors(partial(evaluation.differentiate_twice, soft=False))
        assert len(tensors) > len(travelled.observation.parameters)
        keys.append(problem)
    assert keys[0] == keys[1]
    other = evaluation_of(snapshot(2, batch=3))
    assert split_tensors(partial(other.differentiate_twice, soft=False))[0] != keys[0]


def test_a_graph_does_not_count_on_in_a_tensor_of_the_module():
    observed = snapshot()
    evaluation, images = evaluation_of(observed), torch.rand(observed.observation.shape)
    held, arguments = (
        split_tensors(partial(evaluation.differentiate_twice, soft=False)),
        [images, observed.truth.labels],
    )
    graph = module._traced(*held, arguments)
    before = [t.clone() for t in held[1]]
    with torch.no_grad():
        loss, _ = graph(*held[1], *arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, held[1], strict=True))
    torch.testing.assert_close(loss, evaluation(*arguments).loss)


def test_a_compiler_beside_training_leaves_no_trace_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETTINGS", module.CompilationSettings(eager_evaluations=1))

    def fit(*callbacks):
        pl.seed_everything(3, verbose=False)
        task = Classifier(dropout=0.0)
        task.net[3] = nn.Identity()
        trainer(*callbacks, max_steps=30, max_epochs=-1).fit(task, loader())
        return task.state_dict(), torch.get_rng_state()

    weights, random = fit()
    audit = GradAudit(
        every_n_steps=10,
        attack=InvertingGradients(),
        budget=Budget(evaluations=30),
        executor="thread",
        settings=AuditSettings(analysis=False, confirm=0, compile=True),
        dirpath=tmp_path,
    )
    audited_weights, _ = fit(audit)
    (future,) = module._compiled.values()
    assert callable(future.result(timeout=300))
    assert len(audit.evidence.records) == 3
    assert not audit.evidence.faults
    assert all(torch.equal(weights[name], audited_weights[name]) for name in weights)
    assert torch.equal(random, torch.get_rng_state())


def test_compiled_restarts_end_where_the_eager_ones_do():
    """In train mode, where BatchNorm and the training step itself write in place."""
    attack = GradientMatching(
        regularizers=(TotalVariation(weight=1e-2), BatchNormStatistics()),
        optimizer=Adam(lr=0.02),
        consensus=GroupConsistency(),
        restarts=3,
        exact=True,
    )
    budget, observation = Budget(evaluations=3 * 16 + 1), snapshot(1).observation
    eager = attack(observation, budget=budget, generator=torch.Generator().manual_seed(0))
    with compiled_evaluation(wait=True) as compilation:
        found = attack(observation, budget=budget, generator=torch.Generator().manual_seed(0))
    assert (compilation.evaluations, compilation.reasons) == (49, [])
    assert found.evaluations == eager.evaluations == 49
    assert (found.inputs - eager.inputs).norm() < 1e-2 * eager.inputs.norm()
    assert found.matching_loss == pytest.approx(eager.matching_loss, rel=1e-2)


def test_a_loss_that_needs_classes_refuses_soft_labels_of_all_restarts():
    class NeedsClasses(Counted):
        def training_step(self, batch, batch_idx):
            images, labels = batch
            logits = self.head(self.net(images))
            return -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()

    torch.manual_seed(0)
    observation = Snapshot.from_batch(NeedsClasses(), (torch.rand(2, 1, 8, 8), torch.tensor([0, 1])), mode="train")
    attack = GradientMatching(optimizer=Adam(lr=0.02), labels="joint", restarts=3)
    with compiled_evaluation():
        found = attack(observation.observation, budget=Budget(evaluations=90), generator=torch.Generator())
    assert found.outcome is Outcome.NOT_APPLICABLE
    assert "soft labels" in found.reason
