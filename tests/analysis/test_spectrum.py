"""Products with the Jacobian, and Krylov methods on them, against dense autograd in float64."""

from __future__ import annotations

import pytest
import torch
from exact import dense
from torch import nn
from torch.nn import functional

from lightning_gradaudit import Snapshot
from lightning_gradaudit.analysis.jacobian import Jacobian, in_full_precision
from lightning_gradaudit.analysis.spectrum import (
    LinearMap,
    bidiagonalise,
    extremes,
    rademacher,
)
from lightning_gradaudit.errors import DoubleBackwardError, InvalidInputError, UnsupportedError

CROSS_ENTROPY = functional.cross_entropy


class Dense(LinearMap):
    """A matrix as a map."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.rows, self.columns = matrix.shape
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, v):
        return self.matrix @ v

    def rmatvec(self, u):
        return self.matrix.T @ u


class TinyViT(nn.Module):
    """Four patches, one transformer block, fused attention inside."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Conv2d(1, 8, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, 8) * 0.1)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.block(self.embedding(x).flatten(2).transpose(1, 2) + self.position).mean(1))


def vit(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(2))
        return Snapshot.from_batch(TinyViT(), (images, torch.tensor([1])), loss=CROSS_ENTROPY, **kwargs)


CASES = {
    "mlp": lambda snap: snap("mlp"),
    "conv, two images": lambda snap: snap("conv", batch=2),
    "sigmoid": lambda snap: snap("sigmoid"),
    "BatchNorm in train mode": lambda snap: snap("batchnorm", batch=3, mode="train"),
    "dropout in train mode": lambda snap: snap("dropout", mode="train"),
    "tied weights": lambda snap: snap("tied"),
    "vit": lambda snap: vit(),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A Jacobian in float64, and the same matrix by one reverse pass for each row of autograd's."""
    from conftest import _KINDS

    def snap(kind, *, batch=1, mode="eval"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _KINDS[kind](1, 8, 2)
        images = torch.rand((batch, 1, 8, 8), generator=torch.Generator().manual_seed(11))
        return Snapshot.from_batch(model, (images, torch.arange(batch) % 2), loss=CROSS_ENTROPY, mode=mode)

    snapshot = CASES[request.param](snap)
    truth = snapshot.truth
    exact, _ = in_full_precision(snapshot.observation, double=True)

    def gradient(x):
        return torch.cat([g.flatten() for g in exact.simulate(x, truth.labels).values()])

    matrix = torch.autograd.functional.jacobian(gradient, truth.inputs.double())
    return Jacobian(snapshot.observation, truth.inputs, truth.labels, double=True), matrix.flatten(1)


def test_both_products_are_those_of_the_matrix(case, generator):
    jacobian, matrix = case
    v = torch.randn(jacobian.columns, generator=generator, dtype=torch.float64)
    u = torch.randn(jacobian.rows, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(jacobian.matvec(v), matrix @ v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(jacobian.rmatvec(u), matrix.T @ u, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dense(jacobian), matrix, rtol=1e-9, atol=1e-12)
    jacobian.check_adjoint(generator)


def test_spectra_and_solves_agree_with_dense_ones(case, generator):
    jacobian, matrix = case
    gram = matrix.T @ matrix
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0)
    d, top = jacobian.columns, float(eigenvalues[-1])
    shift = 1e-3 * top
    shifted = gram + shift * torch.eye(d, dtype=torch.float64)

    found = extremes(jacobian, steps=d, generator=generator)
    assert found.exact
    assert found.largest == pytest.approx(top, rel=1e-6)
    assert found.smallest == pytest.approx(float(eigenvalues[0]), abs=1e-6 * top)

    z = rademacher(jacobian, generator)
    solution = torch.linalg.solve(shifted, z)
    krylov = bidiagonalise(jacobian, z, d)
    assert krylov.exhausted
    quadratic = float(krylov.measure().integrate(lambda x: 1 / (x + shift)) * (z @ z))
    assert quadratic == pytest.approx(float(z @ solution), rel=1e-6)
    assert float((krylov.solve(shift) - solution).norm()) < 1e-6 * float(solution.norm())


def test_gauss_and_radau_rules_enclose_the_exact_value_at_every_step(case, generator):
    jacobian, matrix = case
    gram = matrix.T @ matrix
    shift = 1e-3 * float(torch.linalg.eigvalsh(gram)[-1])
    z = rademacher(jacobian, generator)
    exact = float(z @ torch.linalg.solve(gram + shift * torch.eye(jacobian.columns, dtype=torch.float64), z) / (z @ z))
    widths = []
    for steps in (1, 2, 4, 8, 16):
        krylov = bidiagonalise(jacobian, z, steps)
        low, high = (float(krylov.measure(radau=radau).integrate(lambda x: 1 / (x + shift))) for radau in (False, True))
        assert low <= exact * (1 + 1e-9)
        assert exact <= high * (1 + 1e-9)
        widths.append(high - low)
    assert widths[-1] < widths[0]


def test_the_images_of_a_batch_share_one_run_and_sum_to_it(snap, generator):
    snapshot = snap("batchnorm", batch=3, mode="train")
    jacobian = Jacobian(snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels, double=True)
    matrix = dense(jacobian)
    shift = 1e-2 * float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    z = torch.randn(jacobian.columns, generator=generator, dtype=torch.float64)
    gram = matrix.T @ matrix
    y = torch.linalg.solve(gram + shift * torch.eye(len(gram), dtype=torch.float64), z)
    by_image = (z * y).reshape(3, -1).sum(1) / (z**2).reshape(3, -1).sum(1)
    measure = bidiagonalise(jacobian, z, jacobian.columns).measure(blocks=3)
    torch.testing.assert_close(measure.integrate(lambda x: 1 / (x + shift)), by_image, rtol=1e-6, atol=0)


def test_a_rank_deficient_matrix_exhausts_the_space_and_stays_finite(generator):
    matrix = torch.randn((40, 5), generator=generator, dtype=torch.float64) @ torch.randn(
        (5, 30), generator=generator, dtype=torch.float64
    )
    linear = Dense(matrix)
    krylov = bidiagonalise(linear, rademacher(linear, generator), 30)
    assert krylov.exhausted
    assert krylov.steps <= 6
    found = extremes(linear, steps=30, generator=generator)
    assert found.exact
    assert found.smallest == pytest.approx(0, abs=1e-9 * found.largest)
    zero = Dense(torch.zeros((7, 4), dtype=torch.float64))
    assert extremes(zero, steps=4, generator=generator).largest == 0


def test_a_jacobian_of_some_tensors_holds_their_rows(snap):
    snapshot = snap("conv")
    truth = snapshot.truth
    whole = Jacobian(snapshot.observation, truth.inputs, truth.labels, double=True)
    names = list(snapshot.observation.gradients)[2:4]
    part = Jacobian(snapshot.observation, truth.inputs, truth.labels, tensors=names, double=True)
    v = torch.ones(whole.columns, dtype=torch.float64)
    rows = whole.split(whole.matvec(v))
    torch.testing.assert_close(part.matvec(v), torch.cat([rows[name] for name in names]))
    assert part.rows == sum(snapshot.observation.gradients[name].numel() for name in names)
    with pytest.raises(InvalidInputError, match="no-such"):
        Jacobian(snapshot.observation, truth.inputs, truth.labels, tensors=["no-such"])


def test_products_are_counted(snap):
    snapshot = snap("mlp")
    jacobian = Jacobian(snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels)
    krylov = bidiagonalise(jacobian, torch.ones(jacobian.columns), 5)
    assert jacobian.products == 2 * krylov.steps == 10


def test_a_bfloat16_model_is_analysed_in_float32_and_says_so(build):
    model = build("conv", side=8).bfloat16()
    batch = torch.rand((1, 1, 8, 8)).bfloat16(), torch.tensor([1])
    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY)
    jacobian = Jacobian(snapshot.observation, *batch)
    same = Snapshot.from_batch(model.float(), (batch[0].float(), batch[1]), loss=CROSS_ENTROPY)
    reference = Jacobian(same.observation, batch[0].float(), batch[1])
    v = torch.ones(64)
    torch.testing.assert_close(jacobian.matvec(v), reference.matvec(v))
    assert jacobian.dtype == torch.float32
    assert "bfloat16" in jacobian.note
    assert "float32" in jacobian.note
    assert reference.note == ""


class Once(torch.autograd.Function):
    """Square, with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Curl(torch.autograd.Function):
    """Copy, with a backward pass that is no function's derivative: each output follows its neighbour's value."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].roll(1, -1)


class With(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.head = function, nn.Linear(64, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.function(self.first(x.flatten(1))))


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        pytest.param(Once.apply, DoubleBackwardError, "second derivative", id="once differentiable"),
        pytest.param(Curl.apply, UnsupportedError, "not symmetric", id="no derivative"),
    ],
)
def test_what_has_no_jacobian_is_refused_by_name(function, error, says, generator):
    images = torch.rand((1, 1, 8, 8), generator=generator)
    snapshot = Snapshot.from_batch(With(function), (images, torch.tensor([1])), loss=CROSS_ENTROPY)
    with pytest.raises(error, match=says):
        Jacobian(snapshot.observation, images, torch.tensor([1])).check_adjoint(generator)


def test_integer_images_and_useless_starts_are_refused(snap):
    snapshot = snap("mlp")
    with pytest.raises(InvalidInputError, match="floating-point"):
        Jacobian(snapshot.observation, torch.zeros((1, 1, 8, 8), dtype=torch.uint8), torch.tensor([0]))
    with pytest.raises(InvalidInputError, match="not 0"):
        bidiagonalise(Dense(torch.eye(3)), torch.zeros(3), 2)
