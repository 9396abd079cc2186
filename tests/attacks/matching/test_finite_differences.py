"""Derivatives by difference against differentiating twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Budget, Snapshot
from lightning_gradaudit.attacks import (
    LBFGS,
    Adam,
    BatchNormStatistics,
    CosineDistance,
    GradientMatching,
    SensitivityWeightedError,
    SquaredError,
    TotalVariation,
    compiled_evaluation,
)
from lightning_gradaudit.attacks.matching.finite_differences import Kinks, has_kinks, move_weights, step_length
from lightning_gradaudit.attacks.matching.problem import MatchingProblem
from lightning_gradaudit.errors import UnsupportedError
from lightning_gradaudit.simulation.defences import ClipNorm

PENALTIES = TotalVariation(weight=0.1), BatchNormStatistics(weight=0.1)


def network(activation: nn.Module, pool: nn.Module | None = None, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Deep enough that some unit lies near its kink at every point."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for channels in (2, 8, 8, 8):
        blocks += [nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), activation]
    return nn.Sequential(*blocks, pool or nn.Identity(), nn.Flatten(), nn.LazyLinear(3)).to(dtype)


def observe(model: nn.Module, mode: str = "train", *, side: int = 12, dtype: torch.dtype = torch.float32) -> Snapshot:
    torch.manual_seed(1)
    images = torch.rand(2, 2, side, side, dtype=dtype)
    model(images)  # lazy layers
    return Snapshot.from_batch(
        model, (images, torch.tensor([0, 2])), loss=F.cross_entropy, mode=mode, labels_known=True
    )


def both(observed: Snapshot, objective=None, *, soft: bool = False, penalties=PENALTIES):
    """Return what differentiating twice gives, and what a difference gives."""
    observation = observed.observation
    evaluation = MatchingProblem(observation, objective or CosineDistance(), penalties, exact=False)
    torch.manual_seed(2)
    images = torch.rand(observation.shape, dtype=observation.input_dtype)
    labels = torch.rand(2, 3, dtype=images.dtype).softmax(1) if soft else observed.truth.labels
    return evaluation.differentiate_twice(images, labels, soft=soft), evaluation.take_difference(
        images, labels, soft=soft
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


KINKED = {
    "relu": (nn.ReLU(), None),
    "relu in place": (nn.ReLU(inplace=True), None),
    "leaky": (nn.LeakyReLU(0.2), None),
    "leaky in place": (nn.LeakyReLU(0.2, inplace=True), None),
    "clipped": (nn.Hardtanh(-0.5, 0.7), None),
    "clipped in place": (nn.ReLU6(inplace=True), None),
    "threshold": (nn.Sequential(nn.ReLU(), nn.Hardtanh(0.0, 1.0)), None),
    "pool": (nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)),
}


@pytest.mark.parametrize("layers", KINKED.values(), ids=KINKED)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_difference_is_the_exact_derivative(layers, mode):
    exact, difference = both(observe(network(*layers), mode))
    assert torch.equal(difference[0], exact[0]) or relative(difference[0], exact[0]) < 1e-5
    assert relative(difference[1], exact[1]) < 0.01


def test_in_double_precision_the_step_is_shorter():
    double = torch.float64
    exact, difference = both(observe(network(nn.ReLU(), dtype=double), dtype=double))
    assert relative(difference[1], exact[1]) < 1e-5


@pytest.mark.parametrize("objective", [SquaredError(), CosineDistance()], ids=lambda o: type(o).__name__)
def test_soft_labels_have_a_derivative_too(objective):
    exact, difference = both(observe(network(nn.Softplus())), objective, soft=True)
    assert relative(difference[1], exact[1]) < 0.01
    assert relative(difference[2], exact[2]) < 0.01


def test_a_large_layer_needs_the_decisions_of_the_first_pass():
    exact, difference = both(observe(network(nn.ReLU()), side=32), penalties=())
    assert relative(difference[1], exact[1]) < 0.01


def test_without_the_decisions_of_the_first_pass_a_difference_is_of_no_use(monkeypatch):
    from lightning_gradaudit.attacks.matching import finite_differences as differences

    monkeypatch.setattr(differences, "_RULES", {})
    exact, difference = both(observe(network(nn.ReLU()), side=32), penalties=())
    assert relative(difference[1], exact[1]) > 0.1


def test_decisions_are_those_of_the_first_pass():
    x, y = torch.tensor([-1.0, 2.0, 7.0]), torch.tensor([5.0, -3.0, 1.0])
    kinks = Kinks()
    with kinks:
        first = F.relu(x), F.leaky_relu(x, 0.5), F.relu6(x)
    with kinks.repeated():
        second = F.relu(y), F.leaky_relu(y, 0.5), F.relu6(y)
    assert [t.tolist() for t in first] == [[0, 2, 7], [-0.5, 2, 7], [0, 2, 6]]
    assert [t.tolist() for t in second] == [[0, -3, 1], [2.5, -3, 1], [0, -3, 6]]


def test_the_largest_of_a_window_stays_the_same_pixel():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    kinks = Kinks()
    with kinks:
        F.max_pool2d(x, 2)
    with kinks.repeated():
        assert F.max_pool2d(-x, 2).flatten().tolist() == [-5, -7, -13, -15]


@pytest.mark.parametrize(("activation", "kinked"), [(nn.ReLU(), True), (nn.Tanh(), False)], ids=["relu", "tanh"])
def test_kinks_are_found_by_looking(activation, kinked):
    observation = observe(network(activation)).observation
    assert has_kinks(observation) == kinked
    assert not has_kinks(replace(observation, labels=None)), "no pass without labels"


def test_another_way_through_the_model_is_refused():
    kinks = Kinks()
    with kinks:
        F.relu(torch.ones(2))
    with pytest.raises(UnsupportedError, match="other operations"), kinks.repeated():
        F.relu6(torch.ones(2))
    with pytest.raises(UnsupportedError, match="shorter"), kinks.repeated():
        pass


def test_not_a_number_stays_one():
    kinks = Kinks()
    with kinks:
        assert F.relu(torch.tensor([torch.nan])).isnan().all()


def test_the_step_is_relative_to_the_weights():
    weights = {"a": torch.full((4,), 3.0), "frozen": torch.ones(2)}
    length = step_length({"a": weights["a"]})
    assert float(length) == pytest.approx(2.4e-5 * 6, rel=0.02)
    beside, step = move_weights(weights, {"a": torch.full((4,), -2.0)}, length)
    assert torch.equal(beside["frozen"], weights["frozen"])
    assert float((beside["a"] - weights["a"]).norm()) == pytest.approx(float(length), rel=0.02)
    assert float(step) == pytest.approx(float(length) / 4)
    assert torch.equal(move_weights(weights, {"a": torch.zeros(4)}, length)[0]["a"], weights["a"]), (
        "nothing to match: no step"
    )


class Folded(nn.Module):
    """A kink that nobody knows."""

    def forward(self, x):
        return x.abs()


@pytest.fixture
def compiled(monkeypatch):
    """The ways of differentiating that were handed to the compiler, by name."""
    from lightning_gradaudit.attacks.compilation import evaluation_graph as compilation

    ways = []

    def split_tensors(function):
        ways.append(function.func.__name__)
        raise TypeError("not wanted here")

    monkeypatch.setattr(compilation, "split_tensors", split_tensors)
    return ways


def attack(observed: Snapshot, **settings) -> None:
    with compiled_evaluation(wait=True):
        GradientMatching(**{"optimizer": Adam(signed=True)} | settings)(
            observed.observation, budget=Budget(evaluations=5), generator=torch.Generator().manual_seed(0)
        )


def test_compiled_first_order_attacks_take_differences(compiled):
    attack(observe(network(nn.ReLU())))
    assert compiled == ["take_difference"]


@pytest.mark.parametrize(
    ("activation", "settings"),
    [(Folded(), {}), (nn.ReLU(), {"optimizer": LBFGS()}), (nn.ReLU(), {"exact": True})],
    ids=["unknown kink", "compares gradients", "asked for"],
)
def test_others_differentiate_twice(compiled, activation, settings):
    attack(observe(network(activation)), **settings)
    assert compiled == ["differentiate_twice"]


def test_what_is_clipped_is_no_gradient_of_a_loss(compiled):
    observed = observe(network(nn.ReLU()))
    protocol = replace(observed.observation.protocol, clip=ClipNorm(max_norm=1.0))
    attack(replace(observed, observation=replace(observed.observation, protocol=protocol)))
    assert compiled == ["differentiate_twice"]


def test_eager_attacks_differentiate_twice(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(MatchingProblem, "take_difference", refuse)
    GradientMatching()(
        observe(network(nn.ReLU())).observation, budget=Budget(evaluations=2), generator=torch.Generator()
    )


def test_a_compiled_difference_is_the_eager_one():
    observed = observe(network(nn.ReLU(inplace=True), nn.MaxPool2d(2)))
    evaluation = MatchingProblem(
        observed.observation, SensitivityWeightedError().calibrated([], observed.observation.gradients), exact=False
    )
    images = torch.rand(observed.observation.shape)
    expected = evaluation.take_difference(images, observed.truth.labels, soft=False)
    with compiled_evaluation(wait=True) as compilation:
        found = evaluation(images, observed.truth.labels)
    assert (compilation.evaluations, compilation.reasons) == (1, [])
    assert relative(found.inputs_gradient, expected[1]) < 0.01
    assert not torch.equal(
        found.inputs_gradient, evaluation.differentiate_twice(images, observed.truth.labels, soft=False)[1]
    )
