"""How well one linear solve at a grey image draws the truth."""

from __future__ import annotations

import itertools

import pytest
import torch
from exact import dense
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import GaussianNoise, Snapshot
from lightning_gradaudit.analysis import Analysis, Leakage, NaturalImages, WhitePixels, analyse
from lightning_gradaudit.analysis.first_step import SETTINGS, first_step, searched
from lightning_gradaudit.analysis.jacobian import InPixels, Jacobian


def step_of(snapshot, *, shared=None, prior=None, seed=0, **settings):
    """Take the first step against the undefended gradient."""
    observation, truth, labels = snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels
    if shared is None:
        shared = Jacobian(observation, truth, labels, double=True).gradient
    generator = torch.Generator().manual_seed(seed)
    prior = NaturalImages() if prior is None else prior
    return first_step(observation, truth, labels, shared, prior=prior, generator=generator, double=True, **settings)


class Bilinear(nn.Module):
    """A model whose loss is linear in weights and images, so that its gradient is the image itself."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(kept))

    def forward(self, x):
        return (x.flatten(1)[:, : len(self.weight)] * self.weight).sum()


def bilinear(kept, batch=1):
    images = torch.rand((batch, 1, 6, 6), generator=torch.Generator().manual_seed(3))
    labels = torch.zeros(batch, dtype=torch.long)
    return Snapshot.from_batch(Bilinear(kept), (images, labels), loss=lambda output, _: output, mode="as_is")


def detail(image):
    """Take off each pixel the mean of those at most three rows and columns away, one by one."""
    less = torch.empty_like(image)
    for i, j in itertools.product(*map(range, image.shape[-2:])):
        window = image[..., max(i - 3, 0) : i + 4, max(j - 3, 0) : j + 4]
        less[..., i, j] = image[..., i, j] - window.mean((-2, -1))
    return less


def correlation(steps, ways):
    return F.cosine_similarity(detail(steps).flatten(1), detail(ways).flatten(1)).clamp_min(0)


def test_where_the_gradient_is_the_image_one_step_finds_it():
    assert float(step_of(bilinear(36), prior=WhitePixels()).worth) == pytest.approx(1.0, abs=1e-6)


def test_where_it_is_a_part_of_the_image_the_step_finds_that_part():
    """Oracle: under white pixels the step moves the pixels that the gradient holds to where they belong."""
    snapshot = bilinear(18)
    grey = 0.5 + SETTINGS.start_noise_std * torch.randn((1, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    way = snapshot.truth.inputs - grey
    step = way * (torch.arange(36).reshape(way.shape) < 18)
    torch.testing.assert_close(step_of(snapshot, prior=WhitePixels()).worth, correlation(step, way), atol=1e-5, rtol=0)
    assert 0.1 < float(correlation(step, way)) < 0.9


def test_brightness_and_smooth_shades_are_worth_nothing():
    """The gradient is the image's sum: the step is flat, however much of the way that is."""

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x.sum() * self.weight

    images = 0.9 + 0.1 * torch.rand((1, 1, 12, 12), generator=torch.Generator().manual_seed(3))
    snapshot = Snapshot.from_batch(
        Summed(), (images, torch.zeros(1, dtype=torch.long)), loss=lambda output, _: output, mode="as_is"
    )
    flat, way = torch.ones_like(images), images - 0.5
    assert float(F.cosine_similarity(flat.flatten(), way.flatten(), dim=0)) > 0.99
    assert float(step_of(snapshot, prior=WhitePixels()).worth) == pytest.approx(0.0, abs=1e-5)


def test_images_that_only_their_sum_gives_away_get_what_the_sum_says():
    """Oracle: the sum of two images moves both alike, along the mean of the ways."""
    snapshot = bilinear(36, batch=2)
    grey = 0.5 + SETTINGS.start_noise_std * torch.randn((2, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    ways = snapshot.truth.inputs - grey
    expected = correlation(ways.sum(0, keepdim=True).expand_as(ways), ways)
    torch.testing.assert_close(step_of(snapshot, prior=WhitePixels()).worth, expected, atol=1e-5, rtol=0)


def test_it_is_the_damped_solution_that_draws_the_truth_best(snap):
    """Oracle: the dense Jacobian, and every damping solved directly."""
    snapshot = snap("sigmoid", side=8)
    observation, truth, labels = snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels
    shared = Jacobian(observation, truth, labels, double=True).gradient
    generator = torch.Generator().manual_seed(0)
    grey = 0.5 + SETTINGS.start_noise_std * torch.randn(truth.shape, generator=generator)
    at_grey = Jacobian(observation, grey, labels, double=True)
    linear = InPixels(at_grey, truth.shape, observation.normalization, NaturalImages())
    matrix = dense(linear)
    normal = matrix.T @ matrix
    slope = matrix.T @ (shared - at_grey.gradient)
    way = (truth - grey).double()
    steps = []
    for damping in SETTINGS.dampings:
        shifted = normal + damping * torch.linalg.eigvalsh(normal)[-1] * torch.eye(len(normal), dtype=normal.dtype)
        steps.append(linear.root(torch.linalg.solve(shifted, slope)).reshape(way.shape))
    best = max(float(correlation(step, way)) for step in steps)
    found = step_of(snapshot, steps=truth.numel())
    assert float(found.worth) == pytest.approx(best, abs=1e-3)


def test_a_search_finds_what_steps_find_of_which_each_takes_a_like_share_of_what_is_left():
    worth = torch.linspace(0, 1, 21)
    left = torch.ones(21)
    for _ in range(4):
        left = left - worth * left
    torch.testing.assert_close(searched(worth), 1 - left)


def test_a_gradient_that_does_not_depend_on_the_image_leads_nowhere():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2, bias=False), nn.Threshold(1e9, 0.0))
    snapshot = Snapshot.from_batch(model, (torch.rand(1, 1, 6, 6), torch.tensor([1])), loss=F.cross_entropy)
    assert float(step_of(snapshot).worth) == 0.0


def test_noise_takes_worth_from_the_step_and_the_reach_is_no_larger(faces, build):
    images, labels = faces[0][[3]], torch.tensor([1])

    def analysed(model, *defences):
        snapshot = Snapshot.from_batch(model, (images, labels), loss=F.cross_entropy, defences=defences)
        return analyse(snapshot, Analysis(), generator=torch.Generator().manual_seed(0))

    open_model = analysed(build("conv"))
    noisy = analysed(build("conv"), GaussianNoise(relative=10.0))
    assert float(noisy.first_step) < float(open_model.first_step) - 0.1
    for found in (open_model, noisy):
        assert float(found.reach) <= float(searched(found.first_step))
    again = Leakage.from_dict(open_model.to_dict())
    torch.testing.assert_close(again.first_step, open_model.first_step)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_where_algebra_would_do_there_is_nothing_to_search(faces, build, noise):
    """One image through a first linear layer: every row of the layer's gradient is the image, with noise or without."""
    defences = (GaussianNoise(relative=noise),) if noise else ()
    snapshot = Snapshot.from_batch(
        build("mlp"), (faces[0][[3]], torch.tensor([1])), loss=F.cross_entropy, defences=defences
    )
    found = analyse(snapshot, Analysis(), generator=torch.Generator().manual_seed(0))
    assert float(found.first_step) == 1.0
    assert float(found.reach) == pytest.approx(1.0, abs=0.02) if not noise else float(found.reach) < 0.98


def test_a_model_that_is_undefined_at_grey_keeps_its_ceiling():
    class Fussy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 2))

        def forward(self, x):
            return self.body(x) + torch.where(x.mean() > 0.6, 0.0, torch.nan)

    snapshot = Snapshot.from_batch(
        Fussy(), (0.7 + 0.3 * torch.rand(1, 1, 6, 6), torch.tensor([1])), loss=F.cross_entropy
    )
    found = analyse(snapshot, Analysis(), generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(found.leak_r2).all())
    assert bool(found.first_step.isnan().all())
    assert bool(found.reach.isnan().all())
