"""The parts of the matching loop against independent oracles."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_gradaudit import Budget, GaussianNoise, Outcome, Snapshot
from lightning_gradaudit.attacks import (
    LBFGS,
    Adam,
    BatchNormStatistics,
    CosineDistance,
    FittedPrior,
    GradientMatching,
    GreyStart,
    InvertingGradients,
    LayerwiseError,
    MaximumAPosteriori,
    Pixels,
    PowerLawPrior,
    SeeThroughGradients,
    SquaredError,
    TotalVariation,
    UntrainedDecoder,
    WeightedError,
)
from lightning_gradaudit.attacks.evaluation import Evaluation, activations
from lightning_gradaudit.attacks.objectives import Objective
from lightning_gradaudit.attacks.priors import declared_noise

OBJECTIVES = (CosineDistance(), SquaredError(scale=0.3), LayerwiseError(), WeightedError())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_closed_form_of_an_objective_is_its_derivative(objective):
    random = torch.Generator().manual_seed(0)
    a, b = ({n: torch.randn(s, generator=random).double() for n, s in (("w", (3, 4)), ("b", (3,)))} for _ in range(2))
    value, gradient = objective.value_and_gradient(a, b)
    expected, derivative = Objective.value_and_gradient(objective, a, b)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    for name in a:
        assert torch.allclose(gradient[name], derivative[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_vector_jacobian_form_equals_the_plain_double_backward(snap, objective):
    snapshot = snap("sigmoid", batch=2, channels=3)
    observation, labels = snapshot.observation, snapshot.truth.labels
    inputs = torch.rand(observation.shape, generator=torch.Generator().manual_seed(1))
    penalty = TotalVariation(weight=0.1)
    found = Evaluation(observation, objective, (penalty,))(inputs, labels)
    plain = inputs.clone().requires_grad_()
    loss = objective(observation.simulate(plain, labels), observation.gradients) + penalty(plain)
    (expected,) = torch.autograd.grad(loss, plain)
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.allclose(found.inputs_gradient, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_batchnorm_statistics_are_biased_over_images_and_pixels(snap):
    observation = snap("batchnorm", batch=1, channels=3).observation
    penalty = BatchNormStatistics(weight=0.5, first=2.0)
    inputs = torch.rand(observation.shape, generator=torch.Generator().manual_seed(1))
    targets = penalty.targets(observation)
    with activations(observation, targets) as seen:
        observation.simulate(inputs, torch.zeros(1, dtype=torch.long))
    parameters = observation.parameters
    (values,) = functional.conv2d(inputs, parameters["0.weight"], parameters["0.bias"], stride=2, padding=1).numpy()
    mean, variance = values.mean((1, 2)), values.var((1, 2))  # NumPy's variance is the biased one
    expected = 0.5 * 2.0 * ((mean**2).sum() ** 0.5 + ((variance - 1) ** 2).sum() ** 0.5)
    assert float(penalty(seen, targets).detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "attack",
    [SeeThroughGradients(restarts=2), GradientMatching(parametrization=UntrainedDecoder(width=8), optimizer=Adam())],
    ids=lambda a: a.name,
)
def test_compositions_spend_exactly_their_budget_and_repeat_themselves(snap, attack, channels):
    observation = snap("batchnorm", batch=2, channels=channels, side=9).observation
    first, again = (
        attack(observation, budget=Budget(evaluations=21), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert first.evaluations == 21
    assert torch.equal(first.inputs, again.inputs)
    assert first.inputs.shape == observation.shape


def test_lbfgs_converges_on_an_objective_far_below_one(build, faces):
    """torch drops curvature pairs below 1e-10: unscaled, a cosine this small is descended without any memory."""
    image = functional.adaptive_avg_pool2d(faces[0][3:4], 16)
    batch = image, torch.tensor([1])
    snapshot = Snapshot.from_batch(build("sigmoid", side=16, classes=10), batch, loss=functional.cross_entropy)
    attack = GradientMatching(
        objective=SquaredError(scale=1e-8),
        optimizer=LBFGS(line_search="strong_wolfe"),
        parametrization=Pixels(initial=GreyStart(), box=False),
        tolerance=0.0,
    )
    result = attack(snapshot.observation, budget=Budget(evaluations=200), generator=torch.Generator().manual_seed(0))
    assert float(((result.inputs - image) ** 2).mean()) < 1e-3


# Priors and noise


def test_the_power_law_prior_has_the_contrast_and_the_correlation_it_states():
    white = torch.randn((4000, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels = PowerLawPrior(contrast=0.2, colour=0.7).images(white)
    assert float(pixels.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(pixels.var(0).mean().sqrt()) == pytest.approx(0.2, rel=0.02)
    flat = (pixels - 0.5).transpose(0, 1).flatten(1)
    assert float(torch.corrcoef(flat)[0, 1]) == pytest.approx(0.7, abs=0.03)


def test_a_fitted_prior_has_the_moments_of_its_images(faces):
    images = functional.adaptive_avg_pool2d(faces[0][:100], 6)
    prior = FittedPrior.fit(images, shrinkage=0.01)
    covariance = (prior.root @ prior.root.T).numpy()
    expected = torch.cov(images.flatten(1).T).numpy()
    assert abs(covariance - expected).max() < 0.05 * abs(expected).max()
    assert torch.allclose(prior.images(torch.zeros(1, 1, 6, 6))[0], images.mean(0), atol=1e-5)


@pytest.mark.parametrize("defence", [GaussianNoise(relative=0.7), GaussianNoise(std=0.01)])
def test_the_noise_is_read_off_the_declaration(snap, defence):
    clean = snap("conv", channels=3, side=16).observation.gradients
    noised = defence(clean, generator=torch.Generator().manual_seed(0))
    added = torch.cat([(noised[n] - clean[n]).flatten() for n in clean])
    assert declared_noise((defence,), noised) == pytest.approx(float(added.std()), rel=0.05)
    assert declared_noise((), noised) is None


def test_maximum_a_posteriori_needs_noise_and_then_beats_plain_matching(faces, build, generator):
    images, labels = faces
    model = build("conv")
    quiet = Snapshot.from_batch(model, (images[3:4], labels[3:4]), loss=nn.functional.cross_entropy)
    budget = Budget(evaluations=150)
    result = MaximumAPosteriori()(quiet.observation, budget=budget, generator=generator)
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "noise" in result.reason
    errors = []
    for attack in (MaximumAPosteriori(), InvertingGradients()):
        error = 0.0
        for index in (3, 30, 60):
            batch = images[index : index + 1], labels[index : index + 1]
            noisy = Snapshot.from_batch(
                model, batch, loss=nn.functional.cross_entropy, defences=(GaussianNoise(relative=1.0),), seed=index
            )
            found = attack(noisy.observation, budget=budget, generator=torch.Generator().manual_seed(0))
            error += float(((found.inputs.clamp(0, 1) - batch[0]) ** 2).mean())
        errors.append(error)
    assert errors[0] < 0.5 * errors[1]
