"""Clients that share the change of their weights: images recovered from it, with and without the order known."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from support import Classifier, HoldingExecutor, loader, trainer
from torch import nn
from torch.nn import functional

from lightning_gradaudit import Budget, GradAudit, Limits, Outcome, Snapshot, ThreatModel
from lightning_gradaudit.attacks import (
    LBFGS,
    Adam,
    CosineDecay,
    EpochConsistency,
    FedAvgMatching,
    GradientMatching,
    GreyStart,
    Objective,
    Pixels,
    TotalVariation,
)
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.local_optimizer import LocalOptimizer
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.sharing import MicroBatch, SharingProtocol


class Smooth(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}


def network(side=12, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * (side // 2) ** 2, 4)
        ).double()


def pictures(faces, count, side=12):
    return functional.adaptive_avg_pool2d(faces[0][3 : 3 + 7 * count : 7], side).double()


def client(model, images, labels, steps, optimizer, **knowledge):
    """Train by hand, and put the change of the weights behind a threat model."""
    trained = copy.deepcopy(model)
    live = optimizer(trained.parameters())
    local = LocalOptimizer.of(live, {id(p): n for n, p in trained.named_parameters()})
    settings = tuple(LocalOptimizer.settings_of(live) for _ in steps)
    for chosen in steps:
        live.zero_grad()
        functional.cross_entropy(trained(images[chosen]), labels[chosen]).backward()
        live.step()
    before, after = dict(model.named_parameters()), dict(trained.named_parameters())
    whole = Snapshot.from_batch(model, (images, labels), loss=functional.cross_entropy)
    return Snapshot.capture(
        step=0,
        client=whole.observation.client,
        gradients={n: (after[n] - before[n]).detach() for n in before},
        parameters=whole.observation.parameters,
        buffers={},
        truth=whole.truth,
        threat_model=ThreatModel(view="delta", precision="64-true", **knowledge),
        normalization=whole.observation.normalization,
        protocol=SharingProtocol(
            steps=tuple((MicroBatch(tuple(chosen)),) for chosen in steps),
            optimizer=replace(local, settings=settings),
        ),
    )


class LayerwiseError(Objective):
    """Mean over tensors of the relative squared error: small tensors count as much as the head's."""

    def __call__(self, simulated, observed):
        return torch.stack([((simulated[n] - g) ** 2).sum() / (g * g).sum() for n, g in observed.items()]).mean()


def decibels(found, true):
    """PSNR of each true image in the one-to-one matching."""
    errors = ((found[:, None] - true[None]) ** 2).flatten(2).mean(2)
    rows, columns = linear_sum_assignment(errors.numpy())
    return -10 * errors[rows, columns].clamp_min(1e-10).log10()


# The order is known


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["SGD", "SGD with momentum"])
def test_images_come_back_from_the_change_over_local_steps(faces, kind, steps):
    images, labels = pictures(faces, 2), torch.tensor([1, 3])
    snapshot = client(network(), images, labels, [[0, 1]] * steps, OPTIMIZERS[kind], labels_known=True)
    assert snapshot.self_test().error < 1e-6
    attack = GradientMatching(
        objective=LayerwiseError(),
        optimizer=LBFGS(line_search="strong_wolfe"),
        parametrization=Pixels(initial=GreyStart(), box=False),
    )
    result = attack(snapshot.observation, budget=Budget(evaluations=150), generator=torch.Generator().manual_seed(0))
    assert float(decibels(result.inputs, images).min()) > 40


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_the_first_step_of_momentum_reaches_the_images(faces, dampening):
    """torch starts the momentum buffer from a detached gradient, whose derivative is then lost without a word."""
    images, labels = pictures(faces, 2), torch.tensor([1, 3])
    derivatives = []
    for momentum in (0.0, 0.9):
        optimizer = lambda p, m=momentum: torch.optim.SGD(p, lr=0.05, momentum=m, dampening=dampening, weight_decay=0.1)
        snapshot = client(network(), images, labels, [[0, 1]], optimizer, labels_known=True)
        assert snapshot.self_test().error < 1e-6
        at = images.clone().requires_grad_()
        change = snapshot.observation.simulate(at, labels)
        (derivative,) = torch.autograd.grad(sum((c**2).sum() for c in change.values()), at)
        derivatives.append(derivative)
    assert float(derivatives[0].abs().max()) > 0
    torch.testing.assert_close(derivatives[1], derivatives[0])


def test_adam_gives_away_little_more_than_signs_and_still_something(faces):
    """Its first step divides each gradient by its own size; later ones tell how the gradient changed."""
    images, labels = pictures(faces, 2), torch.tensor([1, 3])
    snapshot = client(network(), images, labels, [[0, 1]] * 4, OPTIMIZERS["Adam"], labels_known=True)
    assert snapshot.self_test().error < 1e-4
    attack = GradientMatching(
        optimizer=Adam(lr=0.05, signed=True, schedule=CosineDecay()),
        regularizers=(TotalVariation(weight=1e-2),),
        parametrization=Pixels(initial=GreyStart()),
    )
    result = attack(snapshot.observation, budget=Budget(evaluations=300), generator=torch.Generator().manual_seed(0))
    start = decibels(torch.full_like(images, 0.5), images)
    assert float((decibels(result.inputs, images) - start).min()) > 2


# The order is not known

EPOCHS = [[0, 1], [2, 3], [3, 0], [1, 2]]


def test_what_reaches_the_attack_does_not_depend_on_the_order(faces):
    images, labels = pictures(faces, 4), torch.tensor([1, 3, 0, 2])
    shuffled = [
        client(network(), images, labels, [[0, 1], [2, 3], *rest], OPTIMIZERS["SGD"], order_known=False)
        for rest in ([[3, 0], [1, 2]], [[0, 1], [2, 3]], [[2, 1], [0, 3]])
    ]
    for snapshot in shuffled:
        seen = [each.indices for each in snapshot.observation.protocol.micro_batches]
        assert seen == [(0, 1), (2, 3), (0, 1), (2, 3)]
        assert snapshot.self_test().error < 1e-6  # the auditor still knows it
        assert not snapshot.observation.threat_model.order_known
    known = client(network(), images, labels, EPOCHS, OPTIMIZERS["SGD"]).observation
    assert [each.indices for each in known.protocol.micro_batches] == [(0, 1), (2, 3), (3, 0), (1, 2)]


def test_one_epoch_has_no_order_to_know(faces):
    images, labels = pictures(faces, 4), torch.tensor([1, 3, 0, 2])
    knowing, not_knowing = (
        client(network(), images, labels, [[0, 1], [2, 3]], OPTIMIZERS["SGD"], labels_known=True, order_known=known)
        for known in (True, False)
    )
    budget = Budget(evaluations=20)
    results = [
        attack(snapshot.observation, budget=budget, generator=torch.Generator().manual_seed(0)).inputs
        for attack in (FedAvgMatching(), FedAvgMatching().matching)
        for snapshot in (knowing, not_knowing)
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_epochs_are_parted_where_an_image_comes_back_and_unroll_into_images_of_their_own():
    steps = tuple((MicroBatch(tuple(i)),) for i in EPOCHS)
    protocol = SharingProtocol(steps=steps)
    assert [[each.indices for each in epoch] for epoch in protocol.epochs] == [[(0, 1), (2, 3)], [(3, 0), (1, 2)]]
    unrolled = protocol.unrolled()
    assert [each.indices for each in unrolled.micro_batches] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert len(unrolled.epochs) == 1


def test_the_tie_does_not_depend_on_the_order_and_vanishes_when_epochs_agree():
    random = torch.Generator().manual_seed(0)
    first, noise = torch.rand((4, 1, 3, 3), generator=random), 0.01 * torch.randn((4, 1, 3, 3), generator=random)
    labels = torch.tensor([0, 0, 1, 1])
    tie = EpochConsistency(labels=labels.repeat(2, 1), weight=2.0)
    order = torch.tensor([1, 0, 3, 2])  # within the classes
    assert float(tie(torch.cat([first, first[order]]))) == 0
    moved = [float(tie(torch.cat([first, second]))) for second in (first + noise, (first + noise)[order])]
    assert moved == pytest.approx([2 * float((noise**2).mean())] * 2, rel=1e-4)
    across = torch.tensor([2, 3, 0, 1])
    assert float(tie(torch.cat([first, first[across]]))) > 0.01


def test_without_the_order_images_come_back_from_two_epochs(faces):
    images, labels = pictures(faces, 4), torch.tensor([1, 3, 0, 2])
    snapshot = client(network(), images, labels, EPOCHS, OPTIMIZERS["SGD"], labels_known=True, order_known=False)
    matching = GradientMatching(
        objective=LayerwiseError(),
        optimizer=LBFGS(line_search="strong_wolfe"),
        parametrization=Pixels(initial=GreyStart(), box=False),
    )
    reached = {}
    for attack in (FedAvgMatching(matching=matching), matching):
        result = attack(
            snapshot.observation, budget=Budget(evaluations=300), generator=torch.Generator().manual_seed(0)
        )
        reached[attack.name] = float(decibels(result.inputs, images).min())
    mean = functional.adaptive_avg_pool2d(faces[0][:100].mean(0, keepdim=True), 12).double()
    guess = float(decibels(mean.expand(4, -1, -1, -1), images).min())
    assert reached["FedAvgMatching"] > guess + 5
    assert (
        reached["FedAvgMatching"] > reached["GradientMatching"] + 5
    )  # which takes the first epoch's order for the second's


@pytest.mark.parametrize("evaluations", [1, 2, 7, 40])
def test_the_order_free_attack_spends_its_budget_to_the_evaluation(faces, evaluations, monkeypatch):
    images, labels = pictures(faces, 4), torch.tensor([1, 3, 0, 2])
    snapshot = client(network(), images, labels, EPOCHS, OPTIMIZERS["SGD"], labels_known=True, order_known=False)
    spent = []
    simulate = Observation.simulate

    def counting(self, inputs, labels, leaves=None):
        spent.extend([1] * inputs.requires_grad)
        return simulate(self, inputs, labels, leaves)

    monkeypatch.setattr(Observation, "simulate", counting)
    result = FedAvgMatching()(snapshot.observation, budget=Budget(evaluations=evaluations), generator=torch.Generator())
    assert (result.evaluations, len(spent)) == (evaluations, evaluations)


def test_labels_are_recovered_where_sgd_allows_and_the_reason_is_given_where_not(faces, generator):
    images, labels = pictures(faces, 2), torch.tensor([3, 1])
    plain = client(network(), images, labels, [[0], [1], [1], [0]], OPTIMIZERS["SGD"], order_known=False)
    result = FedAvgMatching()(plain.observation, budget=Budget(evaluations=3), generator=generator)
    assert sorted(result.labels.tolist()) == [1, 3]
    assert result.evaluations == 3
    hidden = client(network(), images, labels, [[0], [1], [1], [0]], OPTIMIZERS["Adam"], order_known=False)
    result = FedAvgMatching()(hidden.observation, budget=Budget(evaluations=3), generator=generator)
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "Adam hides" in result.reason


def test_a_part_of_an_epoch_is_not_applicable(faces, generator):
    images, labels = pictures(faces, 4), torch.tensor([1, 3, 0, 2])
    snapshot = client(
        network(), images, labels, [[0, 1], [2, 3], [3, 0]], OPTIMIZERS["SGD"], labels_known=True, order_known=False
    )
    result = FedAvgMatching()(snapshot.observation, budget=Budget(evaluations=3), generator=generator)
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "[4, 2] of 4" in result.reason


def test_settings_out_of_range_are_refused_by_name():
    with pytest.raises(InvalidInputError, match="agreement"):
        FedAvgMatching(agreement=-1.0)
    with pytest.raises(InvalidInputError, match="guesses"):
        FedAvgMatching(guesses=0)


def test_a_run_hands_over_public_images_and_no_order():
    public, executor = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(0)), HoldingExecutor()
    audit = GradAudit(
        threat_model=ThreatModel(view="delta", local_steps=4, order_known=False, public_images=public),
        executor=executor,
        limits=Limits(final_wait_seconds=0),
    )
    trainer(audit, max_epochs=2).fit(Smooth(), loader(8, batch_size=4))
    (snapshot,) = executor.snapshots
    observation = snapshot.observation
    assert [each.indices for each in observation.protocol.micro_batches] == [(0, 1, 2, 3), (4, 5, 6, 7)] * 2
    told = observation.threat_model.to_dict()
    assert (told["order_known"], told["public_images"], told["view"]) == (False, 5, "delta")
    assert torch.equal(observation.public_images, public)
    assert observation.threat_model.held_images is None, "held once"
    assert snapshot.self_test().error < 1e-3
    assert FedAvgMatching()(observation, budget=Budget(evaluations=4), generator=torch.Generator()).evaluations == 4
