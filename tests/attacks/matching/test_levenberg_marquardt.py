"""Levenberg-Marquardt against an explicit Jacobian; parametrizations and their inverses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Budget, Outcome, Snapshot
from lightning_gradaudit.attacks import (
    FittedPrior,
    GradientMatching,
    LevenbergMarquardt,
    Parametrization,
    Pixels,
    PowerLawPrior,
    SensitivityWeightedError,
    Whitened,
)
from lightning_gradaudit.attacks.budget import Meter
from lightning_gradaudit.attacks.matching.levenberg_marquardt import _Linearised
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.defences import ClipNorm, GaussianNoise
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.sharing import PrivateSum

PLAIN = Pixels(box=False)


def network(channels: int = 1, side: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 5, stride=2, padding=2),
            nn.Tanh(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(6 * (side // 2) ** 2, 3),
        )


def observe(model: nn.Module, images: Tensor, **kwargs) -> Observation:
    labels = torch.arange(len(images)) % 2
    return Snapshot.from_batch(model, (images, labels), loss=F.cross_entropy, **kwargs).observation


@pytest.fixture
def scene(faces) -> tuple[Observation, Tensor]:
    """One face in double precision, its labels known."""
    image = faces[0][5:6, :, 8:16, 8:16].double()
    return observe(network().double(), image, labels_known=True), image


@pytest.fixture
def linearised(scene):
    """A run at a random point, its linear model there, and the explicit Jacobian of the weighted residual."""
    observation, _ = scene
    attack = LevenbergMarquardt(parametrization=PLAIN, iterations=400)
    generator = torch.Generator().manual_seed(0)
    at = torch.rand(observation.shape, generator=generator, dtype=torch.double)
    run = attack.start(observation, generator, at=at)
    run._calibrate(Meter(Budget(evaluations=10)))

    def residual(flat: Tensor) -> Tensor:
        simulated = observation.simulate(flat.reshape(observation.shape), observation.labels)
        return torch.cat(
            [run.roots[name] * (simulated[name] - g).flatten() for name, g in observation.gradients.items()]
        )

    point = at.flatten()
    return run, _Linearised(run, run.point), residual(point), torch.autograd.functional.jacobian(residual, point)


def test_residual_and_products_are_those_of_the_explicit_jacobian(linearised):
    _, here, residual, jacobian = linearised
    random = torch.Generator().manual_seed(1)
    v = torch.randn(jacobian.shape[1], generator=random, dtype=torch.double)
    u = torch.randn(jacobian.shape[0], generator=random, dtype=torch.double)
    torch.testing.assert_close(here.residual, residual)
    torch.testing.assert_close(here.multiply(v), jacobian @ v)
    torch.testing.assert_close(here.multiply_transpose(u), jacobian.T @ u)


@pytest.mark.parametrize("budget", [4, 1000])
def test_a_step_and_its_predicted_decrease_are_those_of_the_quadratic_model(linearised, budget):
    run, here, residual, jacobian = linearised
    run.damping = 1e-3 * float((jacobian**2).sum(0).mean())
    gradient = jacobian.T @ residual
    step, predicted = run._solve(here, gradient, Meter(Budget(evaluations=budget)))
    actual = float(residual @ residual - (residual + jacobian @ step).square().sum())
    assert predicted == pytest.approx(actual, rel=1e-6)
    assert predicted > 0
    if budget > 100:
        damped = jacobian.T @ jacobian + run.damping * torch.eye(jacobian.shape[1], dtype=torch.double)
        expected = torch.linalg.solve(damped, -gradient)
        assert float((damped @ step + gradient).norm() / gradient.norm()) < 1.1e-3
        assert float((step - expected).norm() / expected.norm()) < 0.1


def test_weights_are_those_of_the_moved_error(linearised, scene):
    """The loss is the objective that the docstring names."""
    run, here, *_ = linearised
    observation, _ = scene
    references = [observation.simulate(images, observation.labels) for images in run.references]
    objective = SensitivityWeightedError().calibrated(references, observation.gradients)
    images = run.point.reshape(observation.shape)
    expected = objective(observation.simulate(images, observation.labels), observation.gradients)
    assert float(here.residual @ here.residual) == pytest.approx(float(expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_of_a_smooth_network_is_recovered(channels, faces):
    images = faces[0][5:6, :, 4:20, 4:20] * torch.linspace(0.7, 1, channels)[:, None, None]
    observation = observe(network(channels, 16), images)
    result = LevenbergMarquardt()(
        observation, budget=Budget(evaluations=1000), generator=torch.Generator().manual_seed(0)
    )
    assert float(((result.inputs - images) ** 2).mean()) < 1e-4  # 40 dB
    assert result.labels.tolist() == [0]


def test_two_images_in_two_micro_batches_are_linearised_like_their_sum(faces):
    """The loss over micro-batches is the one whose gradient is shared."""
    images = faces[0][5:7, :, 8:16, 8:16].double()
    observation = observe(network().double(), images, labels_known=True)
    (whole,) = observation.protocol.micro_batches
    parts = tuple(replace(whole, indices=(i,)) for i in (0, 1))
    split = replace(observation, protocol=replace(observation.protocol, steps=(parts,), scale=0.5))
    run = LevenbergMarquardt(parametrization=PLAIN).start(split, torch.Generator().manual_seed(0), at=images)
    run._calibrate(Meter(Budget(evaluations=10)))
    assert float(_Linearised(run, run.point).residual.norm()) < 1e-10


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_loss_never_rises_and_the_budget_is_kept_to_the_evaluation(activation, faces, monkeypatch):
    calls = []
    simulate = Observation.simulate
    monkeypatch.setattr(Observation, "simulate", lambda *a, **k: calls.append(1) or simulate(*a, **k))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 5, stride=2, padding=2), activation(), nn.Flatten(), nn.Linear(96, 3))
    observation = observe(model, faces[0][5:6, :, 8:16, 8:16], labels_known=True)
    run = LevenbergMarquardt(tolerance=0.0).start(observation, torch.Generator().manual_seed(0))
    spent = 0
    for budget in (1, 2, 3, 5, 8, 40, 100):
        run.advance(Budget(evaluations=budget))
        assert run.evaluations <= spent + budget
        assert run.evaluations == spent + budget or run.finished
        spent = run.evaluations
    losses = [loss for _, loss in run.trajectory]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0]
    assert len(calls) <= run.evaluations
    assert run.result().evaluations == run.evaluations
    assert [count for count, _ in run.trajectory] == sorted({count for count, _ in run.trajectory})


def test_a_budget_that_ends_within_a_step_still_tries_it(scene):
    """Three references, one linearisation, one gradient, two products, and the step."""
    observation, _ = scene
    attack = LevenbergMarquardt(iterations=50)
    run = attack.start(observation, torch.Generator().manual_seed(0))
    start = run.point.clone()
    run.advance(Budget(evaluations=8))
    assert run.evaluations == 8
    assert not torch.equal(run.point, start)


def test_it_goes_on_from_given_images_and_stops_at_the_truth(scene):
    observation, image = scene
    run = LevenbergMarquardt().start(observation, torch.Generator().manual_seed(0), at=image)
    run.advance(Budget(evaluations=50))
    result = run.result()
    assert result.outcome is Outcome.CONVERGED
    assert result.evaluations == 4  # three references and one look
    assert float((result.inputs - image).abs().max()) < 1e-6


def test_it_stops_where_nothing_moves_the_loss():
    """Units that are dead for every image near: the gradient of the matching loss is zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.constant_(model[1].bias, -1e3)
    observation = observe(model, torch.rand((1, 1, 8, 8)), labels_known=True)
    moved = replace(observation, gradients={name: g + 1 for name, g in observation.gradients.items()})
    result = LevenbergMarquardt()(moved, budget=Budget(evaluations=200), generator=torch.Generator())
    assert result.outcome is Outcome.BUDGET_SPENT
    assert result.evaluations < 10


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": object()},
        {"clip": ClipNorm(max_norm=1.0)},
        {"private": PrivateSum(max_norm=1.0, noise_multiplier=0.0, divisor=1.0)},
    ],
)
def test_deltas_and_limited_gradients_are_refused(change, scene):
    observation, _ = scene
    other = replace(observation, protocol=replace(observation.protocol, **change))
    result = LevenbergMarquardt()(other, budget=Budget(evaluations=9), generator=torch.Generator())
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "not the gradient of one loss" in result.reason
    assert result.evaluations == 0


def test_defences_that_are_not_simulated_are_refused_and_noise_is_not(faces):
    images, budget = faces[0][5:6, :, 8:16, 8:16], Budget(evaluations=9)
    clipped = observe(network(), images, defences=(ClipNorm(max_norm=1e-3),))
    noisy = observe(network(), images, defences=(GaussianNoise(relative=0.01),))
    results = [LevenbergMarquardt()(o, budget=budget, generator=torch.Generator()) for o in (clipped, noisy)]
    assert results[0].outcome is Outcome.NOT_APPLICABLE
    assert "ClipNorm" in results[0].reason
    assert results[1].outcome is Outcome.BUDGET_SPENT


def test_wrong_settings_are_refused():
    for wrong in ({"iterations": 0}, {"damping": 0.0}):
        with pytest.raises(InvalidInputError, match="iterations >= 1 and damping > 0"):
            LevenbergMarquardt(**wrong)


# Going on from given images

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)


def parametrization(kind: str, shape: tuple[int, ...]) -> Pixels | Whitened:
    if kind == "pixels":
        return Pixels()
    public = torch.rand((30, *shape), generator=torch.Generator().manual_seed(5))
    return Whitened(prior=PowerLawPrior() if kind == "formula" else FittedPrior.fit(public))


@pytest.mark.parametrize("kind", ["pixels", "formula", "fitted"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_variables_are_the_inverse_of_images(kind, channels, size):
    random = torch.Generator().manual_seed(3)
    images = torch.rand((2, channels, *size), generator=random)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 2))
    observation = observe(model, images, mean=MEAN[:channels], std=STD[:channels])
    chosen = parametrization(kind, images.shape[1:])
    (found,) = chosen.variables(images, observation)
    torch.testing.assert_close(chosen.images([found], observation), images, atol=1e-4, rtol=1e-4)
    variables = torch.randn(images.shape, generator=random)
    (back,) = chosen.variables(chosen.images([variables], observation), observation)
    torch.testing.assert_close(back, variables, atol=1e-2, rtol=1e-2)


def test_given_images_are_not_written_to(scene):
    observation, image = scene
    kept = image.clone()
    (variables,) = Pixels().variables(image, observation)
    variables += 1
    assert torch.equal(image, kept)


def test_a_prior_of_another_shape_names_both():
    prior = FittedPrior.fit(torch.rand((5, 1, 4, 4)))
    with pytest.raises(InvalidInputError, match=r"fitted on images of shape \(1, 4, 4\), the audited ones are \(1, 5"):
        prior.white(torch.rand((1, 1, 5, 4)))


@pytest.mark.parametrize("kind", ["pixels", "formula"])
def test_matching_starts_at_given_images(kind, scene):
    observation, image = scene
    at = (image + 0.01).clamp(0, 1)
    attack = GradientMatching(parametrization=parametrization(kind, image.shape[1:]), restarts=2)
    run = attack.start(observation, torch.Generator().manual_seed(0), at=at)
    run.advance(Budget(evaluations=2))  # the first look of each start is at its first point
    result = run.result()
    assert float((result.inputs - at).abs().max()) < 1e-5


def test_a_parametrization_without_inverse_starts_as_ever(scene):
    class WithoutInverse(Pixels):
        def variables(self, images, observation):
            return Parametrization.variables(self, images, observation)

    observation, image = scene
    attack = GradientMatching(parametrization=WithoutInverse())
    assert attack.parametrization.variables(image, observation) is None
    runs = [attack.start(observation, torch.Generator().manual_seed(0), at=at) for at in (image, None)]
    for run in runs:
        run.advance(Budget(evaluations=2))
    assert torch.equal(runs[0].result().inputs, runs[1].result().inputs)
