"""Recipes against the true image: what they reach beyond their own start and beyond a guess without the gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from lightning_gradaudit import Budget, Snapshot
from lightning_gradaudit.attacks import (
    DLG,
    LBFGS,
    Adam,
    ClientPrivacyLeakage,
    CosineDecay,
    CosineDistance,
    GradientMatching,
    GroupConsistency,
    InvertingGradients,
    LabelAgreement,
    Modern,
    Pixels,
    SeeThroughGradients,
    SquaredError,
    TiledStart,
    iDLG,
)
from lightning_gradaudit.attacks.matching.problem import MatchingProblem, activations
from lightning_gradaudit.attacks.matching.regularizers import registered

SIDE = 16


def psnr(a, b):
    return float(-10 * torch.log10(((a.clamp(0, 1) - b) ** 2).mean().clamp_min(1e-12)))


def small(images):
    return functional.adaptive_avg_pool2d(images, SIDE)


def snapshot_of(build, kind, images, labels, **kwargs):
    model = build(kind, side=SIDE, classes=10)
    return Snapshot.from_batch(model, (images, labels), loss=functional.cross_entropy, **kwargs)


# Each recipe with a network that it suits, and the decibels beyond the better of start and guess.
REACHED = [
    pytest.param(InvertingGradients(), "conv", 3, id="InvertingGradients"),
    pytest.param(Modern(), "conv", 2, id="Modern"),
    pytest.param(Modern(total_variation=0.01), "batchnorm", 8, id="Modern with less variation"),
    pytest.param(DLG(line_search=True), "sigmoid", 20, id="DLG"),
    pytest.param(iDLG(), "sigmoid", 20, id="iDLG"),
    pytest.param(ClientPrivacyLeakage(), "sigmoid", 20, id="ClientPrivacyLeakage"),
    pytest.param(SeeThroughGradients(restarts=1), "sigmoid", 1, id="SeeThroughGradients"),
]


@pytest.mark.parametrize(("attack", "kind", "margin"), REACHED)
def test_a_recipe_recovers_a_face_beyond_its_start_and_beyond_the_mean_face(faces, build, attack, kind, margin):
    image = small(faces[0][3:4])
    observation = snapshot_of(build, kind, image, torch.tensor([1])).observation
    start = attack.parametrization.start(observation, torch.Generator().manual_seed(0))[0]
    others = torch.cat([faces[0][:3], faces[0][4:100]])
    guess = max(psnr(start, image), psnr(small(others.mean(0, keepdim=True)), image))
    result = attack(observation, budget=Budget(evaluations=400), generator=torch.Generator().manual_seed(0))
    assert psnr(result.inputs, image) > guess + margin
    assert result.labels.tolist() == [1]


def test_recipes_have_their_published_settings():
    modern, cpl = Modern(), ClientPrivacyLeakage()
    assert (modern.objective, modern.optimizer.lr, modern.optimizer.signed) == (CosineDistance(), 0.1, "soft")
    assert modern.optimizer.schedule == CosineDecay(warmup=50 / 5000)
    assert [(type(r).__name__, r.weight) for r in modern.regularizers] == [
        ("TotalVariation", 0.1),
        ("HeadFeatures", 0.1),
    ]
    assert modern.regularizers[0].colours
    assert modern.parametrization == Pixels(initial=TiledStart(side=4))
    assert (cpl.objective, cpl.optimizer, cpl.parametrization.box) == (SquaredError(scale=0.5), LBFGS(), True)


# The label term of client privacy leakage


def test_label_agreement_is_the_squared_distance_of_the_softmax_to_the_labels(build, faces):
    images, labels = small(faces[0][:2]), torch.tensor([1, 4])
    snapshot = snapshot_of(build, "conv", images, labels, labels_known=True)
    penalty = LabelAgreement(weight=0.7)
    targets = penalty.targets(snapshot.observation)
    with activations(snapshot.observation, targets) as seen:
        snapshot.observation.simulate(images, labels)
    outputs = build("conv", side=SIDE, classes=10)(images).softmax(1).detach()
    expected = 0.7 * ((outputs - functional.one_hot(labels, 10)) ** 2).sum(1).mean()
    assert float(penalty(seen, targets).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_label_agreement_draws_images_into_their_class(build, faces):
    """Alone, it is a classifier's attack on the input: its derivative must lead there."""
    snapshot = snapshot_of(build, "sigmoid", small(faces[0][3:4]), torch.tensor([6]), labels_known=True)
    attack = GradientMatching(
        objective=SquaredError(scale=0.0), regularizers=(LabelAgreement(weight=1.0),), optimizer=Adam(lr=0.1)
    )
    result = attack(snapshot.observation, budget=Budget(evaluations=60), generator=torch.Generator().manual_seed(0))
    outputs = build("sigmoid", side=SIDE, classes=10)(result.inputs).softmax(1).detach()
    start = attack.parametrization.start(snapshot.observation, torch.Generator().manual_seed(0))[0]
    before = build("sigmoid", side=SIDE, classes=10)(start).softmax(1).detach()
    assert float(outputs[0, 6]) > 2 * float(before[0, 6])


# Registration


def test_images_are_registered_by_whole_pixels_each_on_its_own(faces):
    reference = small(faces[0][:3])
    moved = torch.stack([reference[0].roll((2, -3), (-2, -1)), reference[1], reference[2].roll((-5, 1), (-2, -1))])
    noise = 0.02 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(registered(moved, reference), reference)
    assert psnr(registered(moved + noise, reference), reference) > 30
    colour = torch.cat([moved, 0.5 * moved, 1 - moved], 1)
    assert torch.allclose(
        registered(colour, torch.cat([reference, 0.5 * reference, 1 - reference], 1)),
        torch.cat([reference, 0.5 * reference, 1 - reference], 1),
    )


def test_the_groups_mean_is_sharp_although_its_members_are_shifted(faces):
    image = small(faces[0][3:4])
    starts = [image, image.roll(2, -1), image.roll((-1, 3), (-2, -1))]
    assert torch.allclose(GroupConsistency().mean(starts), image, atol=1e-6)
    plain = GroupConsistency(register=False).mean(starts)
    torch.testing.assert_close(plain, torch.stack(starts).mean(0))
    assert psnr(plain, image) < 25


# Soft labels of each sample


@pytest.mark.parametrize(
    "attack",
    [
        DLG(line_search=True),
        replace(InvertingGradients(total_variation=1e-4), labels="joint"),
        replace(ClientPrivacyLeakage(), labels="joint"),
    ],
    ids=lambda a: a.name,
)
def test_soft_labels_of_a_batch_find_its_different_labels(faces, build, attack):
    images, labels = small(faces[0][[3, 40]]), torch.tensor([7, 2])
    observation = snapshot_of(build, "sigmoid", images, labels).observation
    # A start may be lost, whatever the attack; the loss tells which of two it was.
    starts = [
        attack(observation, budget=Budget(evaluations=150), generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    ]
    assert sorted(min(starts, key=lambda r: r.matching_loss).labels.tolist()) == [2, 7]


def test_each_soft_label_has_the_derivative_of_its_own_row(faces, build):
    """Oracle: central differences of one label's logit, image by image."""
    images, labels = small(faces[0][[3, 40]]).double(), torch.tensor([7, 2])
    model = build("sigmoid", side=SIDE, classes=10).double()
    observation = Snapshot.from_batch(model, (images, labels), loss=functional.cross_entropy).observation
    evaluation = MatchingProblem(observation, SquaredError())
    random = torch.Generator().manual_seed(0)
    at = torch.rand(images.shape, generator=random, dtype=torch.float64)
    soft = torch.randn((2, 10), generator=random, dtype=torch.float64).softmax(1)
    derivative = evaluation(at, soft, soft=True).labels_gradient
    for row, column in ((0, 3), (1, 3), (1, 7)):
        step = torch.zeros_like(soft)
        step[row, column] = 1e-5
        up, down = (float(evaluation(at, soft + sign * step, soft=True).loss) for sign in (1, -1))
        assert float(derivative[row, column]) == pytest.approx((up - down) / 2e-5, rel=1e-4)
