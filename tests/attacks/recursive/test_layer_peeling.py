"""Peeling against the true activations, and its linear equations against explicit matrices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Budget, Outcome, Snapshot
from lightning_gradaudit.attacks import KnownFeatures, RecursiveInversion
from lightning_gradaudit.attacks.recursive.layer_equations import Known, Layer, Preconditioner, least_squares
from lightning_gradaudit.attacks.recursive.layer_peeling import Peeled, peel
from lightning_gradaudit.simulation.defences import ClipNorm, GaussianNoise
from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.observation import Observation

SIDE = 12
PLENTY = 20_000.0


def conv(
    activation: Callable[[], nn.Module], *, channels: int = 1, classes: int = 4, uniform: bool = False
) -> nn.Module:
    """Three convolutions whose equations determine all inputs, and a head."""
    model = nn.Sequential(
        nn.Conv2d(channels, 12, 5, stride=2, padding=2),
        activation(),
        nn.Conv2d(12, 12, 3, padding=1),
        activation(),
        nn.Conv2d(12, 8, 3, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(8 * (SIDE // 2) ** 2, classes),
    )
    if uniform:
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * (SIDE // 2) ** 2, 2),
    )


def trained_batchnorm(faces: tuple[Tensor, Tensor]) -> nn.Module:
    model, (images, labels) = batchnorm().train(), faces
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(15):
        at = slice(8 * step, 200, 25)
        optimizer.zero_grad()
        F.cross_entropy(model(images[at, :, :SIDE, :SIDE]), labels[at]).backward()
        optimizer.step()
    return model


def mlp(inner: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE**2, 40), nn.ReLU(), nn.Linear(40, 30), inner, nn.Linear(30, 20), nn.Linear(20, 3)
    )


class Functional(nn.Module):
    """Activations and reshaping as functions, between modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 5, stride=2, padding=2)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.inner = nn.Linear(12 * (SIDE // 2) ** 2, 30)
        self.head = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(torch.relu(self.inner(x.view(len(x), -1))))


class FunctionalMLP(nn.Module):
    """The image itself is reshaped by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(SIDE**2, 30), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(x.flatten(1))))


def geometry() -> nn.Module:
    """Dilated, grouped, one-sided and same-padded convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(16, 12, (3, 5), padding="same"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12 * (SIDE // 2) ** 2, 4),
    )


def after_the_head() -> nn.Module:
    return nn.Sequential(*conv(nn.Tanh), nn.LogSoftmax(1))


def observe(
    model: nn.Module, faces: tuple[Tensor, Tensor], *, channels: int = 1, batch: int = 1, **kwargs
) -> tuple[Observation, Tensor]:
    images = faces[0][7 : 7 + batch, :, 6 : 6 + SIDE, 6 : 6 + SIDE].repeat(1, channels, 1, 1)
    if channels > 1:
        images = images * torch.linspace(0.6, 1, channels)[:, None, None]
    images = images.to(next(model.parameters()).dtype)
    kwargs.setdefault("loss", F.cross_entropy)
    snapshot = Snapshot.from_batch(model, (images, torch.arange(batch) % 2), **kwargs)
    return snapshot.observation, images


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What really goes into each module in eval mode."""
    seen: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, n=n: seen.__setitem__(n, a[0].detach().clone()))
        for n, m in model.named_modules()
    ]
    was = model.training
    model.eval()(images)
    model.train(was)
    for hook in hooks:
        hook.remove()
    return seen


def peeled(observation: Observation, budget: float = PLENTY, **kwargs) -> Peeled:
    return peel(observation, budget=budget, generator=torch.Generator().manual_seed(3), **kwargs)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b.reshape(a.shape)).norm() / b.norm())


REACHED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # network: how many layers have weights
    "MLP": (lambda: mlp(nn.Tanh()), 4),
    "MLP with dropout in eval mode": (lambda: mlp(nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5))), 4),
    "MLP reshaped by a function": (FunctionalMLP, 2),
    "sigmoid": (lambda: conv(nn.Sigmoid, uniform=True), 4),
    "tanh": (lambda: conv(nn.Tanh), 4),
    "leaky ReLU": (lambda: conv(nn.LeakyReLU), 4),
    "leaky ReLU in place": (lambda: conv(lambda: nn.LeakyReLU(0.2, inplace=True)), 4),
    "two classes": (lambda: conv(nn.Tanh, classes=2), 4),
    "dilated and grouped": (geometry, 5),
    "a module after the head": (after_the_head, 4),
    "double precision": (lambda: conv(nn.Sigmoid, uniform=True).double(), 4),
}


@pytest.mark.parametrize("name", REACHED)
def test_every_input_of_a_determined_chain_is_recovered_down_to_the_image(name, faces):
    make, layers = REACHED[name]
    torch.manual_seed(0)
    model = make()
    observation, image = observe(model, faces)
    found, truth = peeled(observation), inputs_of(model, image)
    assert found.reason == "reached the image"
    assert len(found.features) == layers
    for layer, values in found.features.items():
        assert relative(values, truth[layer]) < 1e-3, layer
    assert found.image.shape == image.shape
    assert found.image.dtype == image.dtype
    assert relative(found.image, image) < 1e-3


def test_colour_images_are_reached_too(faces):
    torch.manual_seed(0)
    model = conv(nn.Tanh, channels=3)
    observation, image = observe(model, faces, channels=3)
    found, truth = peeled(observation), inputs_of(model, image)
    assert len(found.features) >= 3
    assert all(relative(values, truth[name]) < 1e-3 for name, values in found.features.items())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_what_a_relu_network_gives_is_right(faces, trained, functional):
    torch.manual_seed(0)
    model = Functional() if functional else trained_batchnorm(faces) if trained else batchnorm()
    observation, image = observe(model, faces)
    found, truth = peeled(observation), inputs_of(model, image)
    assert len(found.features) >= 3
    assert all(relative(values, truth[name]) < 1e-4 for name, values in found.features.items())


def test_relu_in_place_is_no_different(faces):
    def network(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return conv(lambda: nn.ReLU(inplace=inplace))

    (first, image), (second, _) = observe(network(False), faces), observe(network(True), faces)
    a, b = peeled(first), peeled(second)
    assert a.features.keys() == b.features.keys()
    assert len(a.features) >= 3
    truth = inputs_of(network(False), image)
    for name, values in b.features.items():
        assert relative(values, truth[name]) < 1e-4


def test_a_trace_of_leaves_reports_what_went_in_and_out_even_in_place(faces):
    torch.manual_seed(0)
    model = conv(lambda: nn.LeakyReLU(inplace=True))
    observation, image = observe(model, faces)
    calls = observation.trace(image, torch.zeros(1, dtype=torch.long), kinds=None)
    assert [call.name for call in calls] == [str(n) for n in range(8)]
    for above, below in zip(calls[1:], calls, strict=False):
        assert torch.equal(above.inputs, below.outputs)
    assert torch.equal(calls[1].outputs, F.leaky_relu(calls[1].inputs))
    assert torch.equal(calls[0].inputs, image)


class Bright(nn.Module):
    """Outputs that are positive for images around grey; for a dark one, half of them are not."""

    def __init__(self, *, relu: bool) -> None:
        super().__init__()
        self.inner, self.head, self.relu = nn.Linear(SIDE**2, 10), nn.Linear(10, 3), relu
        nn.init.constant_(self.inner.weight, 10 / SIDE**2)
        self.inner.weight.data += 1e-3 * torch.randn(10, SIDE**2)
        self.inner.bias.data = torch.tensor([-3.0, 1.0] * 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x.flatten(1))
        return self.head(torch.relu(x) if self.relu else x)


@pytest.mark.parametrize("relu", [False, True])
def test_a_relu_that_the_trial_image_does_not_show_is_no_trap(faces, relu):
    torch.manual_seed(0)
    model = Bright(relu=relu)
    dark = 0.2 * faces[0][7:8, :, 6 : 6 + SIDE, 6 : 6 + SIDE]
    observation = Snapshot.from_batch(model, (dark, torch.tensor([1])), loss=F.cross_entropy).observation
    grey = model.inner(torch.full_like(dark, 0.5).flatten(1))
    assert bool((grey > 1).all())
    assert int((model.inner(dark.flatten(1)) < 0).sum()) == 5
    found = peeled(observation)
    assert found.reason == "reached the image"
    assert relative(found.image, dark) < 1e-3


class Centred(nn.Conv2d):
    """A convolution by weights less their mean, as weight standardisation has."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_convolution_that_computes_something_of_its_own_is_left_alone(faces):
    torch.manual_seed(0)
    model = conv(nn.Tanh)
    model[2] = Centred(12, 12, 3, padding=1)
    observation, image = observe(model, faces)
    found, truth = peeled(observation), inputs_of(model, image)
    assert list(found.features) == ["7", "4"]
    assert found.reason == "the equations of '2' are not known"
    assert all(relative(values, truth[name]) < 1e-3 for name, values in found.features.items())


# The equations of one layer


def layer_of(module: nn.Module, x: Tensor, *, seen: float = 0.5, seed: int = 1) -> Layer:
    """Equations of a random layer at x, with a share of its outputs known."""
    random = torch.Generator().manual_seed(seed)
    module = module.double()
    z = module(x).detach()
    delta = torch.randn(z.shape, generator=random, dtype=torch.double)
    weight = module.weight.detach().requires_grad_()
    bias = None if module.bias is None else module.bias.detach()
    how = (module.stride, module.padding, module.dilation, module.groups)
    (gradient,) = torch.autograd.grad((F.conv2d(x, weight, bias, *how) * delta).sum(), weight)
    weights = {f"layer.{name}": p.detach() for name, p in module.named_parameters()}
    known = Known(z, torch.rand(z.shape, generator=random) < seen, delta)
    layer = Layer.of(LayerCall("layer", module, x, z), known, weights, {"layer.weight": gradient})
    assert layer is not None
    return layer


def matrix_of(layer: Layer) -> Tensor:
    """The equations as a matrix, column by column."""
    shape = layer.call.inputs.shape
    columns = [torch.cat([p.flatten() for p in layer(e.reshape(shape))]) for e in torch.eye(shape.numel()).double()]
    return torch.stack(columns, 1)


LAYERS = {
    "plain": lambda: nn.Conv2d(2, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(2, 16, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(2, 8, 3, padding=2, dilation=2, bias=False),
    "grouped": lambda: nn.Conv2d(2, 8, 3, padding=1, groups=2),
    "uneven": lambda: nn.Conv2d(2, 8, (3, 5), padding=(1, 0)),
}


@pytest.fixture(params=list(LAYERS))
def layer(request) -> Layer:
    torch.manual_seed(0)
    x = torch.rand((1, 2, 6, 7), generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return layer_of(LAYERS[request.param](), (x - 0.4).clamp_min(0))


def solve(layer: Layer, *, free: bool, most: int = 3000) -> Tensor:
    x = torch.zeros(layer.call.inputs.shape, dtype=torch.double)
    return least_squares(layer, Preconditioner.of(layer), start=x, free=free, most=most, deadline=float("inf"))[0]


def test_the_truth_solves_the_equations_and_the_adjoint_is_the_transpose(layer):
    assert layer.misfit(layer.call.inputs) < 1e-12
    matrix, random = matrix_of(layer), torch.Generator().manual_seed(2)
    parts = [torch.randn(t.shape, generator=random, dtype=torch.double) for t in (layer.gradient, layer.outputs)]
    expected = matrix.T @ torch.cat([p.flatten() for p in parts])
    torch.testing.assert_close(layer.adjoint(*parts).flatten(), expected)
    assert torch.linalg.matrix_rank(matrix) <= layer.equations


def inconsistent(layer: Layer) -> tuple[Layer, Tensor, Tensor]:
    """The same matrix with a right-hand side that no x meets."""
    random = torch.Generator().manual_seed(5)
    noise = [0.2 * torch.randn(t.shape, generator=random, dtype=torch.double) for t in (layer.gradient, layer.outputs)]
    outputs = (layer.outputs + noise[1] * layer.outputs.abs().mean()) * (layer.where > 0)
    other = replace(layer, gradient=layer.gradient + noise[0] * layer.gradient.abs().mean(), outputs=outputs)
    return other, matrix_of(layer), torch.cat([other.gradient.flatten(), other.outputs.flatten()])


def test_free_solutions_are_those_of_lstsq(layer):
    other, matrix, right = inconsistent(layer)
    expected = torch.linalg.lstsq(matrix, right, driver="gelsd").solution
    assert relative(solve(other, free=True).flatten(), expected) < 1e-6


def test_non_negative_solutions_are_those_of_nnls(layer):
    other, matrix, right = inconsistent(layer)
    expected, _ = nnls(matrix.numpy(), right.numpy())
    found = solve(other, free=False).flatten()
    assert (expected == 0).sum() > 5
    assert float(found.min()) >= 0
    assert relative(found, torch.from_numpy(expected)) < 1e-2
    # not better than the optimum, and hardly worse
    best, reached = (float((matrix @ x - right).norm()) for x in (torch.from_numpy(expected), found))
    assert best <= reached * (1 + 1e-9)
    assert reached < best * (1 + 1e-4)


def test_the_preconditioner_inverts_the_part_from_the_weight_exactly():
    torch.manual_seed(0)
    x = torch.rand((1, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.double)
    layer = layer_of(nn.Conv2d(3, 8, 3, padding=1), x, seen=0.0)
    normal = matrix_of(layer).T @ matrix_of(layer)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    there_and_back = Preconditioner.of(layer)((normal @ v.flatten()).reshape(x.shape))
    assert relative(there_and_back, v) < 1e-6


def test_the_outputs_enter_the_preconditioner_by_their_mean_diagonal():
    torch.manual_seed(0)
    x = torch.rand((1, 2, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.double)
    layer = layer_of(nn.Conv2d(2, 8, 3, padding=1), x, seen=1.0)
    matrix = matrix_of(layer)
    rows = layer.gradient.numel()
    by_weight, by_output = matrix[:rows].T @ matrix[:rows], matrix[rows:].T @ matrix[rows:]
    approximate = by_weight + by_output.diagonal().mean() * torch.eye(len(by_weight), dtype=torch.double)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    found = Preconditioner.of(layer)((approximate @ v.flatten()).reshape(x.shape))
    assert relative(found, v) < 1e-6


# What is refused


def blind() -> nn.Module:
    """Many equations, yet three pixels of four are seen by none; no bias below could notice."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 256, 1, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256 * (SIDE // 2) ** 2, 3),
    )


def narrow() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 2, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2 * (SIDE // 2) ** 2, 3),
    )


@pytest.mark.parametrize("make", [blind, narrow])
def test_a_solution_that_is_not_the_only_one_is_not_accepted(make, faces):
    torch.manual_seed(0)
    observation, _ = observe(make(), faces)
    found = peeled(observation)
    assert list(found.features) == ["4" if make is blind else "5"]  # the head's alone
    assert "not determined" in found.reason
    assert not found.unfinished
    assert found.image is None


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * SIDE**2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.stem(x))
        return self.head((y + self.branch(y)).flatten(1))


class Twice(nn.Module):
    """One module called twice: its gradient belongs to neither call alone."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(SIDE**2, SIDE**2)
        self.second = nn.Linear(SIDE**2, SIDE**2) if tied else self.first
        self.second.weight = self.first.weight
        self.activation = nn.Tanh()
        self.head = nn.Linear(SIDE**2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.second(x.flatten(1)))
        return self.head(self.activation(self.first(x)))


class Bare(nn.Module):
    """No module is called at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, SIDE**2))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12 * (SIDE // 2) ** 2, 3),
    )


def normalised() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 30), nn.LayerNorm(30), nn.Linear(30, 3))


STOPPED: dict[str, tuple[Callable[[], nn.Module], str, str, list[str]]] = {
    # network, mode, why, of which layers the inputs come out
    "BatchNorm in train mode": (batchnorm, "train", r"'7' \(BatchNorm2d\) cannot be inverted", ["10"]),
    "dropout in train mode": (lambda: mlp(nn.Dropout(0.5)), "train", r"'4' \(Dropout\) cannot be inverted", ["6", "5"]),
    "layer norm": (normalised, "eval", r"'2' \(LayerNorm\) cannot be inverted", ["3"]),
    "residual": (Residual, "eval", "'head' is not fed by 'branch' alone", ["head"]),
    "called twice": (lambda: Twice(tied=False), "eval", "the equations of 'first' are not known", ["head"]),
    "tied weights": (lambda: Twice(tied=True), "eval", "the equations of 'first' are not known", ["head"]),
    "no module": (Bare, "eval", "not a linear head", []),
    "no bias": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 3, bias=False)),
        "eval",
        "not a linear head",
        [],
    ),
    "pooling": (pooled, "eval", r"'2' \(MaxPool2d\) cannot be inverted", ["6", "3"]),
}


@pytest.mark.parametrize("name", STOPPED)
def test_the_recursion_ends_where_a_step_cannot_be_inverted(name, faces):
    make, mode, why, known = STOPPED[name]
    torch.manual_seed(0)
    model = make()
    observation, image = observe(model, faces, mode=mode)
    found = peeled(observation)
    assert list(found.features) == known
    assert found.image is None
    assert re.search(why, found.reason)
    if mode == "eval":
        truth = inputs_of(model, image)
        assert all(relative(values, truth[name]) < 1e-4 for name, values in found.features.items())
    result = RecursiveInversion()(
        observation, budget=Budget(evaluations=20), generator=torch.Generator().manual_seed(0)
    )
    if len(known) < 2:
        assert result.outcome is Outcome.NOT_APPLICABLE
        assert result.reason == found.reason
        assert result.evaluations == 0
    else:
        assert result.evaluations <= 20


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"batch": 2}, "single image"),
        ({"defences": (GaussianNoise(std=1e-3),)}, "changed on its way"),
        ({"defences": (ClipNorm(max_norm=0.1),)}, "changed on its way"),
    ],
)
def test_batches_and_changed_gradients_are_refused(settings, why, faces):
    observation, _ = observe(conv(nn.Tanh), faces, **settings)
    assert not peeled(observation).features
    result = RecursiveInversion()(observation, budget=Budget(evaluations=20), generator=torch.Generator())
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert why in result.reason


def test_clipping_by_the_protocol_is_refused(faces):
    observation, _ = observe(conv(nn.Tanh), faces)
    clipped = replace(observation, protocol=replace(observation.protocol, clip=ClipNorm(max_norm=1.0)))
    assert peeled(observation).features
    assert not peeled(clipped).features


# Budgets


@pytest.fixture(scope="module")
def sigmoid(faces) -> tuple[Observation, Tensor]:
    torch.manual_seed(0)
    return observe(conv(nn.Sigmoid, uniform=True), faces)


def test_no_layer_is_begun_without_budget_or_time(sigmoid):
    for found in (peeled(sigmoid[0], 0.0), peeled(sigmoid[0], seconds=0.0)):
        assert list(found.features) == ["7"]
        assert found.unfinished
        assert found.image is None
    assert peeled(sigmoid[0], 0.0).cost == 0


@pytest.mark.parametrize("budget", [0.0, 100.0, 400.0, 1000.0, 3000.0])
def test_the_equations_cost_at_most_their_budget(sigmoid, budget):
    found = peeled(sigmoid[0], budget)
    assert found.cost <= budget
    assert found.unfinished == (found.image is None)


def test_the_preconditioner_is_paid_for(sigmoid, monkeypatch):
    observation, image = sigmoid
    calls = observation.trace(image, torch.zeros(1, dtype=torch.long), kinds=None)
    evaluation = 7 * sum(
        c.module.weight.numel() * (c.outputs.numel() // len(c.module.weight))
        for c in calls
        if hasattr(c.module, "weight")
    )
    costs = []
    for building in (1, 10**6 + 1):
        monkeypatch.setattr(Preconditioner, "cost", staticmethod(lambda _, building=building: (building, 0)))
        costs.append(peeled(observation).cost)
    # three convolutions, in arithmetic of twice the price
    assert costs[1] - costs[0] == pytest.approx(3 * 2 * 10**6 / evaluation)


@pytest.mark.parametrize("evaluations", [1, 2, 7, 300, 1000])
def test_cost_and_simulated_gradients_stay_within_the_budget(sigmoid, evaluations, monkeypatch):
    calls = []
    simulate = Observation.simulate

    def counting(self, inputs, labels, leaves=None):
        calls.append(inputs.requires_grad)
        return simulate(self, inputs, labels, leaves)

    monkeypatch.setattr(Observation, "simulate", counting)
    attack = RecursiveInversion(share=0.7)
    run = attack.start(sigmoid[0], torch.Generator().manual_seed(0))
    assert not calls
    run.advance(Budget(evaluations=evaluations))
    assert run.evaluations <= evaluations
    assert run.cost <= 0.7 * evaluations
    assert run.cost + len(calls) <= evaluations
    first = run.evaluations
    if not run.finished:
        run.advance(Budget(evaluations=10))
        assert first < run.evaluations <= first + 10
    assert run.result().evaluations == run.evaluations


def test_the_attack_polishes_what_the_equations_reached_and_repeats_itself(sigmoid):
    observation, image = sigmoid
    budget = Budget(evaluations=2500)
    result, again = (
        RecursiveInversion()(observation, budget=budget, generator=torch.Generator().manual_seed(2)) for _ in range(2)
    )
    assert "4 layer(s) peeled, reached the image" in result.reason
    assert torch.equal(result.inputs, again.inputs)
    assert result.evaluations == again.evaluations
    assert float(((result.inputs - image) ** 2).mean()) < 1e-6  # 60 dB
    assert result.matching_loss < 1e-9


def test_what_lies_above_is_a_target_where_the_equations_end(faces):
    """Weights of the match that the target alone can tell: its pull on the features of a pooled network."""
    torch.manual_seed(0)
    model = pooled()
    observation, image = observe(model, faces)
    budget, generator = Budget(evaluations=1200), torch.Generator().manual_seed(0)
    result = RecursiveInversion(share=0.9)(observation, budget=budget, generator=generator)
    assert result.reason.startswith("2 layer(s) peeled")
    found, truth = inputs_of(model, result.inputs)["3"], inputs_of(model, image)["3"]
    grey = inputs_of(model, torch.full_like(image, 0.5))["3"]
    assert relative(found, truth) < 0.3 * relative(grey, truth)


def test_an_image_without_labels_is_returned_as_the_equations_gave_it(faces):
    torch.manual_seed(0)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs, F.one_hot(labels, 3).to(outputs))

    observation, image = observe(mlp(nn.Tanh()), faces, loss=loss)
    result = RecursiveInversion()(observation, budget=Budget(evaluations=20), generator=torch.Generator())
    assert result.outcome is Outcome.CONVERGED
    assert result.labels is None
    assert relative(result.inputs, image) < 1e-4


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4, 6)])
def test_known_features_cost_nothing_at_the_truth_and_one_at_the_mean(shape, sigmoid):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    penalty = KnownFeatures(features={"layer": features}, weight=0.5)
    targets = penalty.targets(sigmoid[0])
    assert float(penalty({"layer": [features.flatten(1)]}, targets)) == 0
    mean = features.mean(tuple(range(2, features.ndim)) or 1, keepdim=True).expand_as(features)
    assert float(penalty({"layer": [mean]}, targets)) == pytest.approx(0.5)
    given = (features + 0.3).requires_grad_()
    penalty({"layer": [given]}, targets).backward()
    variance = float(((features - mean) ** 2).mean())
    torch.testing.assert_close(given.grad, torch.full(shape, 0.5 * 2 * 0.3 / variance / features.numel()))
    assert float(penalty({"another": [features]}, targets)) == 0
