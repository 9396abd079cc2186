"""Batch statistics of shared buffers as a term of gradient matching, against statistics computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from lightning_gradaudit import Budget, Snapshot, ThreatModel
from lightning_gradaudit.attacks import GradientMatching
from lightning_gradaudit.attacks.matching.objectives import SquaredError
from lightning_gradaudit.attacks.matching.problem import MatchingProblem
from lightning_gradaudit.attacks.matching.shared_statistics import SharedStatistics, statistics_distance
from lightning_gradaudit.simulation.local_optimizer import LocalOptimizer
from lightning_gradaudit.simulation.sharing import MicroBatch, SharingProtocol


@pytest.fixture
def held(snap):
    return snap("batchnorm", batch=4, mode="train", buffers_shared=True, labels_known=True)


def test_the_term_is_the_mean_squared_distance_of_means_and_deviations(held):
    observation, labels = held.observation, held.truth.labels
    inputs = torch.rand(observation.shape, generator=torch.Generator().manual_seed(1))
    weights = observation.parameters

    def values(images):
        found = functional.conv2d(images, weights["0.weight"], weights["0.bias"], stride=2, padding=1)
        return found.transpose(0, 1).flatten(1)

    true, ours = values(held.truth.inputs), values(inputs)
    mean = (ours.mean(1) - true.mean(1)) / true.std(1)
    spread = ours.std(1) / true.std(1) - 1
    expected = float((mean**2).mean() + (spread**2).mean())
    assert statistics_distance(observation, inputs, labels) == pytest.approx(expected, rel=1e-3)
    assert statistics_distance(observation, held.truth.inputs, labels) < 1e-9


def test_the_derivative_is_that_of_finite_differences(held):
    tensors = ("gradients", "parameters", "buffers", "buffers_after")
    exact = {
        name: {k: t.double() if t.is_floating_point() else t for k, t in getattr(held.observation, name).items()}
        for name in tensors
    }
    observation = replace(held.observation, **exact, input_dtype=torch.float64)
    problem = MatchingProblem(observation, SquaredError(scale=0.0), (SharedStatistics(),))
    generator = torch.Generator().manual_seed(2)
    at, towards = (torch.rand(observation.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, step = held.truth.labels, 1e-5
    losses = [float(problem(at + sign * step * towards, labels).loss) for sign in (1, -1)]
    slope = float((problem(at, labels).inputs_gradient * towards).sum())
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)


def test_matching_has_the_term_where_the_buffers_are_shared_and_nowhere_else(held, snap):
    def penalties(snapshot, attack):
        run = attack.start(snapshot.observation, torch.Generator().manual_seed(0))
        return [r for r, _ in run.problem._activation_penalties]

    assert penalties(held, GradientMatching()) == [SharedStatistics(weight=1.0)]
    squares = sum(float((g**2).sum()) for g in held.observation.gradients.values())
    (found,) = penalties(held, GradientMatching(objective=SquaredError(scale=0.5)))
    assert found.weight == pytest.approx(0.5 * squares)
    given = GradientMatching(regularizers=(SharedStatistics(weight=0.2),))
    assert penalties(held, given) == [SharedStatistics(weight=0.2)]
    assert penalties(snap("batchnorm", batch=4, mode="train", labels_known=True), GradientMatching()) == []
    still = snap("batchnorm", batch=4, mode="eval", buffers_shared=True, labels_known=True)
    assert penalties(still, GradientMatching()) == []


def test_several_local_steps_have_one_constraint_and_the_truth_meets_it(build):
    """The weights move between the passes, and so do the statistics of the same images."""
    model, count = build("batchnorm", side=8).train(), 3
    images, labels = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 0, 1])
    whole = Snapshot.from_batch(model, (images, labels), loss=functional.cross_entropy, mode="train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    local = LocalOptimizer.of(optimizer, {id(p): n for n, p in model.named_parameters()})
    local = replace(local, settings=(LocalOptimizer.settings_of(optimizer),) * count)
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for _ in range(count):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    before = whole.observation.parameters
    snapshot = Snapshot.capture(
        step=0, client=whole.observation.client,
        gradients={n: (p - before[n]).detach() for n, p in model.named_parameters()},
        parameters=before, buffers=whole.observation.buffers,
        buffers_after={n: b.clone() for n, b in model.named_buffers()},
        truth=whole.truth, threat_model=ThreatModel(view="delta", labels_known=True),
        normalization=whole.observation.normalization,
        protocol=SharingProtocol(steps=((MicroBatch((0, 1, 2, 3)),),) * count, optimizer=local),
    )  # fmt: skip
    weights = [0.81 / 2.71, 0.9 / 2.71, 1 / 2.71]
    mean = sum(w * x.mean((0, 2, 3)) for w, x in zip(weights, seen, strict=True))
    assert torch.allclose(snapshot.observation.statistics["1"].mean, mean, rtol=1e-5, atol=1e-5)
    assert (seen[0].mean((0, 2, 3)) - seen[2].mean((0, 2, 3))).abs().max() > 1e-3  # the constraint is over the passes
    assert snapshot.self_test().statistics < 1e-4
    assert statistics_distance(snapshot.observation, images, labels) < 1e-7
    found = GradientMatching()(
        snapshot.observation, budget=Budget(evaluations=3), generator=torch.Generator().manual_seed(0)
    )
    assert found.evaluations == 3


def test_the_term_brings_the_colour_of_the_images_without_any_search_of_the_gradient(held):
    """A model whose gradient says nothing (its objective weighs 0) still tells the mean of the images."""
    attack = GradientMatching(objective=SquaredError(scale=0.0), regularizers=(SharedStatistics(),))
    found = attack(held.observation, budget=Budget(evaluations=300), generator=torch.Generator().manual_seed(0))
    assert statistics_distance(held.observation, found.inputs, held.truth.labels) < 1e-2
    assert abs(float(found.inputs.mean() - held.truth.inputs.mean())) < 0.05
