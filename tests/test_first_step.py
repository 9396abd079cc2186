"""What one linear solve at a grey image finds of the way to the truth."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import GaussianNoise, Snapshot
from lightning_gradaudit.analysis import Analysis, Leakage, NaturalImages, WhitePixels, analyse
from lightning_gradaudit.analysis.bounds import InPixels
from lightning_gradaudit.analysis.first_step import _DAMPING, _LEAVES_SYMMETRY, first_step
from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.analysis.spectrum import dense


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


def test_where_the_gradient_is_the_image_one_step_finds_it():
    assert float(step_of(bilinear(36), prior=WhitePixels()).share) == pytest.approx(1.0, abs=1e-6)


def test_where_it_is_a_part_of_the_image_the_step_finds_that_part():
    """Oracle: under white pixels the step moves the pixels that the gradient holds, and cos² is their share."""
    snapshot = bilinear(9)
    grey = 0.5 + _LEAVES_SYMMETRY * torch.randn((1, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    way = (snapshot.truth.inputs - grey).flatten().square()
    found = float(step_of(snapshot, prior=WhitePixels()).share)
    assert found == pytest.approx(float(way[:9].sum() / way.sum()), abs=1e-5)


def test_images_that_only_their_sum_gives_away_get_what_the_sum_says():
    """Oracle: the sum of two images moves both alike, so each gets the squared cosine of the mean of the ways."""
    snapshot = bilinear(36, batch=2)
    grey = 0.5 + _LEAVES_SYMMETRY * torch.randn((2, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    ways = (snapshot.truth.inputs - grey).flatten(1)
    expected = F.cosine_similarity(ways.sum(0, keepdim=True), ways).clamp_min(0).square()
    torch.testing.assert_close(step_of(snapshot, prior=WhitePixels()).share, expected, atol=1e-5, rtol=0)


def test_it_is_the_best_of_the_damped_solutions(snap):
    """Oracle: the dense Jacobian, and every damping solved directly."""
    snapshot = snap("sigmoid", side=8)
    observation, truth, labels = snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels
    shared = Jacobian(observation, truth, labels, double=True).gradient
    generator = torch.Generator().manual_seed(0)
    grey = 0.5 + _LEAVES_SYMMETRY * torch.randn(truth.shape, generator=generator)
    at_grey = Jacobian(observation, grey, labels, double=True)
    linear = InPixels(at_grey, truth.shape, observation.normalization, NaturalImages())
    matrix = dense(linear)
    normal = matrix.T @ matrix
    slope = matrix.T @ (shared - at_grey.gradient)
    way = (truth - grey).double().flatten()
    cosines = []
    for damping in _DAMPING:
        shifted = normal + damping * torch.linalg.eigvalsh(normal)[-1] * torch.eye(len(normal), dtype=normal.dtype)
        cosines.append(float(F.cosine_similarity(linear.root(torch.linalg.solve(shifted, slope)), way, dim=0)))
    found = step_of(snapshot, steps=truth.numel())
    assert float(found.share) == pytest.approx(max(cosines) ** 2, abs=1e-4)


def test_a_gradient_that_does_not_depend_on_the_image_leads_nowhere():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2, bias=False), nn.Threshold(1e9, 0.0))
    snapshot = Snapshot.from_batch(model, (torch.rand(1, 1, 6, 6), torch.tensor([1])), loss=F.cross_entropy)
    assert float(step_of(snapshot).share) == 0.0


def test_noise_takes_worth_from_the_step_and_the_reach_is_no_larger(faces, build):
    images, labels = faces[0][[3]], torch.tensor([1])

    def analysed(model, *defences):
        snapshot = Snapshot.from_batch(model, (images, labels), loss=F.cross_entropy, defences=defences)
        return analyse(snapshot, Analysis(), generator=torch.Generator().manual_seed(0))

    open_model = analysed(build("conv"))
    noisy = analysed(build("conv"), GaussianNoise(relative=10.0))
    assert float(noisy.first_step) < float(open_model.first_step) - 0.1
    assert float(open_model.reach) <= float(open_model.first_step)
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
