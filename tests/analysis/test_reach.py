"""How far an attacker gets from afar: the bending of the gradient, and where the error stops."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import brentq
from torch.autograd.functional import jvp
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import GaussianNoise, Snapshot
from lightning_gradaudit.analysis import Analysis, analyse
from lightning_gradaudit.analysis.image_covariance import NaturalImages
from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.analysis.reach import RADII, Bending, bending, reach


class OneDirection:
    """Images of which every direction is resolved alike: R² = λ/(λ + σ²)."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def leak_r2(self, sigma):
        return torch.tensor([self.strength / (self.strength + sigma**2)], dtype=torch.float64)


def power(scale: float, exponent: float = 2.0) -> Bending:
    return Bending(RADII, scale * torch.tensor([[r**exponent for r in RADII]], dtype=torch.float64), 0)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.9, 2.5, 4.0])
def test_the_error_stops_at_the_first_fixed_point_on_its_way_down(scale):
    """Oracle: the largest root in (0, 1) of r² = ν²/(1 + ν²), ν = scale r², else 0."""
    excess = lambda r: r**2 - (scale * r**2) ** 2 / (1 + (scale * r**2) ** 2)
    # r² (1 + s² r⁴) = s² r⁴ has roots only where s² >= 4: s² r⁴ - s² r² + 1 = 0 in r².
    root = math.sqrt((1 + math.sqrt(1 - 4 / scale**2)) / 2) if scale > 2 else 0.0
    if root:
        assert excess(brentq(excess, root - 1e-3, root + 1e-3)) == pytest.approx(0, abs=1e-9)
    found = float(reach(OneDirection(1.0), power(scale), 1e-9))
    assert found == pytest.approx(1 - root**2, abs=0.02)


def test_noise_alone_is_what_decides_where_nothing_bends():
    resolved = OneDirection(1e-4)
    found = float(reach(resolved, power(0.0), 1e-2))
    assert found == pytest.approx(float(resolved.leak_r2(1e-2)), abs=1e-6)


def test_the_bending_is_that_of_the_models_gradient(snap):
    snapshot = snap("sigmoid", side=8)
    observation, truth = snapshot.observation, snapshot.truth
    jacobian = Jacobian(observation, truth.inputs, truth.labels, double=True)
    prior = NaturalImages()
    bent = bending(jacobian, observation, truth.inputs, prior=prior, rays=1, generator=torch.Generator())
    weights = {n: p.double() for n, p in observation.parameters.items()}
    model = snapshot.observation.client.module
    names = jacobian.names

    def gradient(x):
        leaves = {n: w.requires_grad_() for n, w in weights.items()}
        loss = F.cross_entropy(functional_call(model.double(), leaves, (x,)), truth.labels)
        return torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(loss, [leaves[n] for n in names], create_graph=True)]
        )

    x = truth.inputs.double()
    along = torch.full_like(x, 0.5) - x
    here, slope = jvp(gradient, x, along)
    expected = [(gradient(x + r * along) - here - r * slope).norm().item() / len(here) ** 0.5 for r in RADII]
    torch.testing.assert_close(
        bent.deviations[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-9
    )


def test_between_the_radii_it_is_interpolated_and_below_them_it_falls_as_the_square():
    bent = power(3.0, 1.5)
    assert bent.at(0.3, 0) == pytest.approx(3 * 0.3**1.5, rel=1e-6)
    assert bent.at(0.001, 0) == pytest.approx(3 * 0.01**1.5 * 0.01, rel=1e-6)


def test_noise_lowers_the_reach_and_it_never_exceeds_the_finest_ceiling(faces, build):
    found = []
    for noise in (0.0, 0.1, 10.0):
        defences = (GaussianNoise(relative=noise),) if noise else ()
        snapshot = Snapshot.from_batch(
            build("conv"), (faces[0][[3, 150]], torch.tensor([1, 0])), loss=F.cross_entropy, defences=defences
        )
        leakage = analyse(snapshot, Analysis(), generator=torch.Generator().manual_seed(0))
        found.append(float(leakage.reach.mean()))
        assert float(leakage.reach.mean()) <= leakage.curve[-1][1] + 1e-6
    assert found == sorted(found, reverse=True)
    assert found[2] < found[0] - 0.1
