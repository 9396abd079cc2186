"""Gradient against data similarity, in models whose gradient is known, and against scipy and dense Jacobians."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from exact import dense
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Budget, Snapshot
from lightning_gradaudit.analysis import similarity_relation
from lightning_gradaudit.analysis.gradient_similarity import ALL, MAX_GRADIENTS
from lightning_gradaudit.analysis.jacobian import InPixels, Jacobian
from lightning_gradaudit.attacks import InvertingGradients
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError


class Scaled(nn.Module):
    """⟨w, 3x⟩: with the output as loss its gradient is three times the image."""

    def __init__(self, size=625):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return 3 * (x.flatten(1) @ self.w)


def output(out, labels):
    return out.mean()


def test_where_the_gradient_is_the_image_the_relation_is_perfect(faces):
    images, labels = faces
    snapshot = Snapshot.from_batch(Scaled(), (images[:12], labels[:12]), loss=output)
    one = Snapshot.from_batch(Scaled(), (images[:1], labels[:1]), loss=output)
    found = similarity_relation(one, images=images[:12], labels=labels[:12], double=True, rays=4)
    assert found.slopes[ALL].value == pytest.approx(1, abs=1e-9)
    assert found.rho("rays").value > 0.98  # rounding orders the rays of one radius
    assert found.rho("pairs").value == pytest.approx(1)
    assert found.rho("pairs").low == pytest.approx(1)
    for measured in (found.least, found.largest):
        assert (measured.value, measured.low, measured.high) == pytest.approx((3, 3, 3), rel=1e-6)
    assert found.sigma_max == pytest.approx(3, rel=1e-6)
    assert found.sigma_exact
    assert found.sigma_min == pytest.approx(3, rel=1e-6)
    # A batch shares the mean of its images' gradients: the Jacobian's norm falls by the root of their number.
    assert similarity_relation(snapshot, double=True, rays=2).sigma_max == pytest.approx(3 / math.sqrt(12), rel=1e-6)


def test_pairs_agree_with_gradients_taken_one_by_one(faces, build):
    images, labels = faces
    model = build("conv")
    snapshot = Snapshot.from_batch(model, (images[:1], labels[:1]), loss=F.cross_entropy)
    found = similarity_relation(snapshot, images=images[96:104], labels=labels[96:104], rays=2, resamples=20)
    flat = {"0": [], "2": [], "5": []}
    for i in range(96, 104):
        model.zero_grad()
        F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        for layer, rows in flat.items():
            rows.append(torch.cat([p.grad.flatten() for p in model[int(layer)].parameters()]).double())
    flat = {layer: torch.stack(rows) for layer, rows in flat.items()}
    flat[ALL] = torch.cat(list(flat.values()), dim=1)
    i, j = np.triu_indices(8, 1)
    mse = ((images[96 + i] - images[96 + j]) ** 2).mean((1, 2, 3)).numpy()
    padded = [np.pad(each[0].double().numpy(), 5, mode="reflect") for each in images[96:104]]
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    unlike = [1 - max(0.0, structural_similarity(padded[a], padded[b], **options)) for a, b in zip(i, j, strict=True)]
    for layer, g in flat.items():
        l2 = (g[i] - g[j]).norm(dim=1).numpy()
        cosine = 1 - F.cosine_similarity(g[i], g[j]).numpy()
        for name, distances in (("l2", l2), ("cosine", cosine)):
            rho = found.rho("pairs", gradient=name, layer=layer)
            assert rho.value == pytest.approx(spearmanr(distances, mse).statistic, abs=1e-6)
            alike = found.rho("pairs", gradient=name, data="ssim", layer=layer)
            assert alike.value == pytest.approx(spearmanr(distances, unlike).statistic, abs=2e-3)
            assert rho.low <= rho.value <= rho.high
    points = np.array(found.points["pairs"])
    np.testing.assert_allclose(points[:, 2], l2, rtol=1e-4)
    assert found.evaluations == 1 + 2 * 6 + 8


@pytest.mark.parametrize("kind", ["sigmoid", "batchnorm"])
def test_ratios_at_small_radii_lie_between_the_extreme_singular_values(snap, kind):
    """Smooth networks: beyond the first order a ratio may leave them, by as much as the radius."""
    snapshot = snap(kind, batch=2, mode="train")
    found = similarity_relation(snapshot, radii=(1e-6, 1e-5), rays=8, steps=128, double=True)
    truth = snapshot.truth
    jacobian = Jacobian(snapshot.observation, truth.inputs, truth.labels, double=True)
    values = torch.linalg.svdvals(
        dense(InPixels(jacobian, truth.inputs.shape, snapshot.observation.normalization, None))
    )
    assert found.sigma_max == pytest.approx(float(values[0]), rel=1e-6)
    assert found.sigma_min == pytest.approx(float(values[-1]), abs=1e-6 * float(values[0]))
    assert found.sigma_min * (1 - 1e-3) <= found.least.value <= found.largest.value <= found.sigma_max * (1 + 1e-3)
    assert found.slopes[ALL].value == pytest.approx(1, abs=1e-3)


def test_a_gradient_that_does_not_see_the_images_has_no_relation(faces):
    images, labels = faces

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.bias.expand(len(x), 2) + 0 * x.flatten(1)[:, :2]

    found = similarity_relation(Snapshot.from_batch(Blind(), (images[:1], labels[:1]), loss=F.cross_entropy), rays=2)
    assert math.isnan(found.rho("rays").value)
    assert math.isnan(found.slopes[ALL].value)
    assert found.largest.value == 0


def test_along_the_path_of_an_attack_that_succeeds_both_distances_fall_together(faces, build):
    images, labels = faces
    snapshot = Snapshot.from_batch(build("conv"), (images[:1], labels[:1]), loss=F.cross_entropy)
    result = InvertingGradients()(
        snapshot.observation, budget=Budget(evaluations=300), generator=torch.Generator().manual_seed(0)
    )
    found = similarity_relation(snapshot, reconstruction=result, rays=2)
    assert len(found.points["path"]) == len(result.path)
    assert found.rho("path", gradient="cosine").value > 0.8
    json.dumps(found.to_dict())


def test_bad_arguments_are_named(snap):
    with pytest.raises(InvalidInputError, match="rays"):
        similarity_relation(snap("conv"), rays=1)
    with pytest.raises(InvalidInputError, match="radii"):
        similarity_relation(snap("conv"), radii=(0.0, 1.0))
    with pytest.raises(InvalidInputError, match="no coefficient"):
        similarity_relation(snap("conv"), rays=2).rho("pairs")  # one image has no pairs


def test_too_many_gradients_are_refused_before_they_are_made(snap, monkeypatch):
    monkeypatch.setattr("lightning_gradaudit.analysis.gradient_similarity.MAX_GRADIENTS", 1000)
    snapshot = snap("conv", batch=3)
    with pytest.raises(UnsupportedError, match="pass at most 0 images"):
        similarity_relation(snapshot, rays=2)
    assert MAX_GRADIENTS > 1000
