"""Bounds on what a gradient gives away, against closed forms and dense matrices in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from exact import dense, resolved_exactly
from test_spectrum import Dense

from benchmarks.published_bounds import dfil, fil, i2f_bound, lavp, leakage_bits
from lightning_gradaudit.analysis.image_covariance import WhitePixels
from lightning_gradaudit.analysis.jacobian import InPixels, Jacobian
from lightning_gradaudit.analysis.resolution import layer_shares
from lightning_gradaudit.analysis.spectrum import bidiagonalise, effective_rank, rademacher
from lightning_gradaudit.simulation.normalization import Normalization

SIGMA, SHAPE = 0.3, torch.Size((1, 1, 3, 4))


@pytest.fixture(params=["full rank", "rank deficient", "zero"])
def matrix(request, generator):
    a = torch.randn((20, 12), generator=generator, dtype=torch.float64)
    if request.param == "rank deficient":
        a[:, 5:] = a[:, :1]
    return a * 0 if request.param == "zero" else a


def posterior_share(a, sigma, variance):
    """1 - tr(posterior)/tr(prior) of a linear-Gaussian model, by inverting its precision."""
    eye = torch.eye(12, dtype=torch.float64)
    posterior = torch.linalg.inv(a.T @ a / sigma**2 + eye / variance)
    return 1 - float(posterior.trace()) / (12 * variance)


def in_pixels(a):
    return InPixels(Dense(a), SHAPE, Normalization(), WhitePixels(variance=0.5))


def test_leak_r2_is_the_posteriors_share_of_a_linear_gaussian_model(matrix, generator):
    found = resolved_exactly(in_pixels(matrix), blocks=1)
    assert float(found.leak_r2(SIGMA)) == pytest.approx(posterior_share(matrix, SIGMA, 0.5), abs=1e-8)


def test_bits_are_the_log_determinant(matrix, generator):
    eye = torch.eye(12, dtype=torch.float64)
    expected = float(torch.logdet(eye + 0.5 * matrix.T @ matrix / SIGMA**2)) / (2 * math.log(2))
    found = leakage_bits(in_pixels(matrix), sigma=SIGMA, steps=12, probes=4000, generator=generator)
    assert found == pytest.approx(expected, rel=0.02, abs=1e-8)


def test_more_noise_and_fewer_rows_lower_leak_r2(generator):
    a = torch.randn((20, 12), generator=generator, dtype=torch.float64)
    whole = resolved_exactly(in_pixels(a), blocks=1)
    part = resolved_exactly(in_pixels(a[:6]), blocks=1)
    values = [float(whole.leak_r2(s)) for s in (0.01, 0.1, 1.0, 10.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    assert float(part.leak_r2(SIGMA)) < float(whole.leak_r2(SIGMA))


def test_noise_to_hide_brings_leak_r2_to_the_level(generator):
    a = torch.randn((20, 12), generator=generator, dtype=torch.float64)
    found = resolved_exactly(in_pixels(a), blocks=1)
    sigma = float(found.noise_to_hide(0.1))
    assert posterior_share(a, sigma, 0.5) == pytest.approx(0.1, abs=1e-8)


def test_published_bounds_are_those_of_the_matrix(generator):
    a = torch.randn((20, 12), generator=generator, dtype=torch.float64)
    delta = torch.randn(20, generator=generator, dtype=torch.float64)
    options = SimpleNamespace(steps=12, generator=generator)
    gram, top = a.T @ a, float(torch.linalg.matrix_norm(a, 2))
    assert fil(Dense(a), sigma=SIGMA, **vars(options)) == pytest.approx(top / SIGMA, rel=1e-8)
    diagonal = dfil(Dense(a), sigma=SIGMA, probes=4000, generator=generator)
    assert diagonal == pytest.approx(float(gram.trace()) / (12 * SIGMA**2), rel=0.02)
    bound = i2f_bound(Dense(a), delta, **vars(options))
    assert bound == pytest.approx(float((a.T @ delta).norm()) / top**2, rel=1e-8)
    rank = effective_rank(Dense(a), probes=4000, generator=generator)
    assert rank == pytest.approx(float(gram.trace() ** 2 / (gram @ gram).trace()), rel=0.02)


def jacobian_of(snapshot, **options):
    return Jacobian(snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels, double=True, **options)


def test_matching_curvature_is_that_of_the_dense_jacobian(snap, generator):
    jacobian = jacobian_of(snap("sigmoid"))
    a, g = dense(jacobian), jacobian.gradient
    direction = g / g.norm()
    tangential = (a - direction[:, None] * (direction @ a)) / g.norm()
    for objective, matrix in (("l2", a), ("cosine", tangential)):
        largest, _ = lavp(jacobian, objective=objective, steps=60, generator=generator)
        assert largest == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)) ** 2, rel=1e-6)


def test_layer_shares_add_up_and_freezing_the_leaking_layer_lowers_leak_r2(snap, generator):
    jacobian = jacobian_of(snap("mlp"))
    shape = snap("mlp").truth.inputs.shape
    linear = InPixels(jacobian, shape, Normalization(), WhitePixels())
    sigma = 0.1 * float(jacobian.gradient.norm())
    run = bidiagonalise(linear, linear.root(rademacher(linear, generator)), 40)
    shares = layer_shares(jacobian, linear, run, sigma=sigma, group=str)
    assert sum(shares.values()) == pytest.approx(1)
    leaking = max(shares, key=shares.get)
    kept = jacobian_of(snap("mlp"), tensors=[name for name in jacobian.names if name != leaking])
    frozen = InPixels(kept, shape, Normalization(), WhitePixels())
    whole, part = (float(resolved_exactly(each, blocks=1).leak_r2(sigma)) for each in (linear, frozen))
    assert part < whole
