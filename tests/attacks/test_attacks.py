"""Attacks beyond their common contract: reconstruction quality, outcomes, portfolios, what an adversary knows."""

from __future__ import annotations

import copy
import math
import re
import time
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import deform_conv2d

from lightning_gradaudit import Budget, GaussianNoise, Outcome, Reconstruction, Snapshot
from lightning_gradaudit.attacks import (
    DLG,
    Attack,
    CosineDistance,
    GradientMatching,
    InvertingGradients,
    LinearLayerInversion,
    PatchEmbeddingInversion,
    Portfolio,
    SquaredError,
    iDLG,
)
from lightning_gradaudit.errors import DoubleBackwardError, InvalidInputError

BUDGET = Budget(evaluations=30)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean().clamp_min(1e-20)))


def test_a_time_budget_ends_an_attack(snap, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    result = InvertingGradients()(
        snap("conv").observation, budget=Budget(seconds=50.0), generator=torch.Generator().manual_seed(0)
    )
    assert 1 <= result.evaluations <= 50


def test_another_seed_gives_another_reconstruction(snap):
    observation = snap("conv").observation
    first, second = (
        InvertingGradients()(observation, budget=BUDGET, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    assert not torch.equal(first.inputs, second.inputs)


def test_an_attack_that_returns_another_shape_is_found_out(snap, generator):
    class Wrong(Attack):
        def run(self, observation, *, budget, generator):
            return Reconstruction(
                inputs=torch.zeros(1), labels=None, matching_loss=0.0, evaluations=0, outcome=Outcome.CONVERGED
            )

    with pytest.raises(InvalidInputError, match=r"Wrong\.run: expected inputs of shape \(1, 1, 8, 8\), got \(1,\)"):
        Wrong()(snap("conv").observation, budget=BUDGET, generator=generator)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: InvertingGradients(restarts=0), "restarts"),
        (lambda: GradientMatching(labels="guessed"), "labels"),
        (lambda: Portfolio(attacks=()), "attacks"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, named):
    with pytest.raises(InvalidInputError, match=named):
        make()


def test_settings_show_in_the_repr():
    assert "restarts=3" in repr(InvertingGradients(restarts=3))
    assert "TotalVariation(weight=0.5" in repr(InvertingGradients(total_variation=0.5))


# Not applicable is an outcome


def squared_loss(logits, labels):
    """A loss on class indices that is no cross-entropy, and refuses soft labels."""
    return ((logits - functional.one_hot(labels, logits.shape[1])) ** 2).mean()


@pytest.mark.parametrize(
    ("attack", "kind", "batch", "loss", "says"),
    [
        (iDLG(), "conv", 2, functional.cross_entropy, "at most 1 image"),
        (InvertingGradients(), "conv", 2, squared_loss, "labels unknown: .*cross-entropy"),
        (DLG(), "conv", 1, squared_loss, "soft labels"),
        (LinearLayerInversion(), "conv", 1, functional.cross_entropy, "no linear layer"),
        (PatchEmbeddingInversion(), "conv", 1, functional.cross_entropy, "learned positions"),
        (PatchEmbeddingInversion(), "conv", 2, functional.cross_entropy, "add up over the images"),
        (LinearLayerInversion(), "mlp", 2, squared_loss, "class labels: .*cross-entropy"),
        (
            Portfolio(attacks=(LinearLayerInversion(), iDLG())),
            "conv",
            2,
            functional.cross_entropy,
            "iDLG: .*at most.*LinearLayerInversion: no linear",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Attack) else None,
)
def test_what_does_not_apply_is_an_outcome_with_a_reason(snap, generator, attack, kind, batch, loss, says):
    observation = snap(kind, batch=batch, loss=loss).observation
    result = attack(observation, budget=BUDGET, generator=generator)
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert result.matching_loss == math.inf
    assert bool((result.inputs == 0.5).all())
    assert re.search(says, f"{result.reason}; {result.details}")


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_a_model_that_takes_no_single_image_in_train_mode_is_no_exception(generator, batch):
    """BatchNorm refuses a batch of one in train mode: candidates must be tried in the size the client used."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)
        )
    images = torch.rand((batch, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    labels = torch.arange(batch)
    snapshot = Snapshot.from_batch(model, (images, labels), loss=functional.cross_entropy, mode="train")
    result = LinearLayerInversion()(snapshot.observation, budget=BUDGET, generator=generator)
    certified = torch.zeros(batch) if result.certified is None else result.certified
    for image in result.inputs[certified.bool()]:
        assert max(psnr(image, true) for true in images) > 40


# Reconstruction quality, against the true image


def test_inverting_gradients_recovers_a_face_through_a_relu_network(faces, build):
    images, labels = faces
    snapshot = Snapshot.from_batch(build("conv"), (images[3:4], labels[3:4]), loss=functional.cross_entropy)
    result = InvertingGradients()(
        snapshot.observation, budget=Budget(evaluations=400), generator=torch.Generator().manual_seed(0)
    )
    assert psnr(result.inputs, images[3:4]) > 25
    assert result.labels.tolist() == [1]


def test_dlg_recovers_a_face_through_a_sigmoid_network(faces, build):
    image = functional.adaptive_avg_pool2d(faces[0][3:4], 16)
    model = build("sigmoid", side=16, classes=10)
    snapshot = Snapshot.from_batch(model, (image, torch.tensor([1])), loss=functional.cross_entropy)
    for seed in range(8):  # about every second start diverges, and which ones depends on the processor's rounding
        generator = torch.Generator().manual_seed(seed)
        result = DLG()(snapshot.observation, budget=Budget(evaluations=500), generator=generator)
        if result.matching_loss < 1e-6:  # an attacker sees that it did not
            break
    assert psnr(result.inputs, image) > 40
    assert result.labels.tolist() == [1]


def test_idlg_recovers_a_colour_image_through_a_sigmoid_network(snap):
    snapshot = snap("sigmoid", channels=3, side=12, classes=10)
    result = iDLG()(snapshot.observation, budget=Budget(evaluations=300), generator=torch.Generator().manual_seed(0))
    assert psnr(result.inputs, snapshot.truth.inputs) > 40


# Objectives against their definitions


@pytest.fixture
def two_gradients():
    random = torch.Generator().manual_seed(0)
    shapes = {"w": (3, 4), "b": (3,)}
    return [{n: torch.randn(s, generator=random) for n, s in shapes.items()} for _ in range(2)]


def test_objectives_equal_their_definitions_on_the_flat_vectors(two_gradients):
    a, b = two_gradients
    flat_a, flat_b = (torch.cat([t.flatten() for t in g.values()]) for g in two_gradients)
    assert float(SquaredError()(a, b)) == pytest.approx(float(((flat_a - flat_b) ** 2).sum()), rel=1e-6)
    assert float(SquaredError(scale=0.1)(a, b)) == pytest.approx(0.1 * float(((flat_a - flat_b) ** 2).sum()), rel=1e-6)
    expected = 1 - functional.cosine_similarity(flat_a, flat_b, dim=0)
    assert float(CosineDistance()(a, b)) == pytest.approx(float(expected), abs=1e-6)
    assert float(CosineDistance()(a, a)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_the_cosine_does_not_depend_on_scale_even_for_vanishing_gradients(two_gradients, scale):
    a, b = two_gradients
    small = [{n: t * scale for n, t in g.items()} for g in (a, b)]
    assert float(CosineDistance()(*small)) == pytest.approx(float(CosineDistance()(a, b)), abs=1e-5)


# Operations without a second derivative


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Custom(nn.Module):
    """An activation whose author forbade a second derivative."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4 * 36, 2)

    def forward(self, x):
        return self.head(OnceDifferentiable.apply(self.conv(x)).flatten(1))


class Deformable(nn.Module):
    """A convolution of torchvision without a second derivative."""

    def __init__(self):
        super().__init__()
        self.offsets = nn.Conv2d(1, 18, 3, padding=1)
        self.weight = nn.Parameter(torch.ones(2, 1, 3, 3))
        self.head = nn.Linear(128, 2)

    def forward(self, x):
        return self.head(deform_conv2d(x, self.offsets(x), self.weight, padding=1).flatten(1))


@pytest.mark.parametrize("attack", [InvertingGradients(), iDLG()], ids=lambda a: a.name)
@pytest.mark.parametrize(
    ("model", "loss", "named"),
    [
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2)),
            functional.multi_margin_loss,
            "multi_margin_loss_backward",
            id="an operation of torch",
        ),
        pytest.param(Deformable, functional.cross_entropy, "deform_conv2d", id="an operation of torchvision"),
        pytest.param(Custom, functional.cross_entropy, "once_differentiable", id="a custom Function"),
    ],
)
def test_an_operation_without_second_derivative_is_named_with_an_alternative(generator, attack, model, loss, named):
    """torch leaves out the forbidden path without a word when the inputs are reached along another one."""
    images = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    snapshot = Snapshot.from_batch(model(), (images, torch.tensor([1])), loss=loss, labels_known=True)
    with pytest.raises(DoubleBackwardError, match=f"(?s){named}.*Replace it"):
        attack(snapshot.observation, budget=BUDGET, generator=generator)


# Portfolio


@dataclass(frozen=True, kw_only=True)
class Stub(Attack):
    """Answer with a fixed image and loss, and note the budget it was given."""

    loss: float
    value: float = 0.5
    spends: int = 1
    outcome: Outcome = Outcome.BUDGET_SPENT
    certified: tuple[bool, ...] | None = None
    budgets: list[Budget]
    label: str = "stub"

    @property
    def name(self) -> str:
        return self.label

    def run(self, observation, *, budget, generator):
        self.budgets.append(budget)
        return Reconstruction(
            inputs=torch.full(observation.shape, self.value),
            labels=torch.zeros(observation.batch_size, dtype=torch.long),
            matching_loss=self.loss,
            evaluations=self.spends,
            outcome=self.outcome,
            certified=None if self.certified is None else torch.tensor(self.certified),
        )


@pytest.mark.parametrize(("losses", "winner"), [((3, 1, 2), 1), ((1, 2, 3), 0), ((math.inf, math.inf, 2), 2)])
def test_a_portfolio_keeps_the_lowest_matching_loss(snap, generator, losses, winner):
    stubs = tuple(Stub(loss=float(x), value=i / 10, budgets=[]) for i, x in enumerate(losses))
    result = Portfolio(attacks=stubs)(snap("conv").observation, budget=BUDGET, generator=generator)
    assert float(result.inputs.mean()) == pytest.approx(winner / 10)
    assert (result.matching_loss, result.evaluations) == (losses[winner], 3)


def test_a_portfolio_stops_at_an_exact_solution_and_shares_its_evaluations(snap, generator):
    budgets: list[Budget] = []
    first = Stub(loss=1.0, spends=4, budgets=budgets)
    exact = Stub(loss=0.0, spends=5, budgets=budgets, outcome=Outcome.EXACT)
    never = Stub(loss=0.0, budgets=budgets)
    result = Portfolio(attacks=(first, exact, never))(snap("conv").observation, budget=BUDGET, generator=generator)
    assert [b.evaluations for b in budgets] == [30, 26]
    assert (result.outcome, result.evaluations) == (Outcome.EXACT, 9)


def test_a_portfolio_shares_its_seconds_too(snap, generator, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    class Slow(Stub):
        def run(self, observation, *, budget, generator):
            nonlocal now
            now += 7.0
            return super().run(observation, budget=budget, generator=generator)

    budgets: list[Budget] = []
    attacks = (Slow(loss=1.0, budgets=budgets), Slow(loss=2.0, budgets=budgets), Slow(loss=3.0, budgets=budgets))
    Portfolio(attacks=attacks)(snap("conv").observation, budget=Budget(seconds=10.0), generator=generator)
    assert [b.seconds for b in budgets] == [10.0, pytest.approx(3.0)]


def test_certified_images_replace_the_nearest_ones_of_the_winner(snap, generator):
    exact = Stub(loss=2.0, value=0.9, certified=(True, False), budgets=[], label="closed form")
    winner = Stub(loss=1.0, value=0.1, budgets=[], label="matching")
    observation = snap("conv", batch=2).observation
    result = Portfolio(attacks=(exact, winner))(observation, budget=BUDGET, generator=generator)
    assert sorted(result.inputs.flatten(1).mean(1).tolist()) == pytest.approx([0.1, 0.9])
    assert result.certified.sum() == 1
    assert float(result.inputs[result.certified].mean()) == pytest.approx(0.9)


def test_an_image_found_without_labels_is_not_thrown_away_for_a_grey_one(snap, generator):
    """One image, a linear first layer, a loss whose labels cannot be read: division needs no label."""
    snapshot = snap("mlp", loss=squared_loss)
    portfolio = Portfolio(attacks=(LinearLayerInversion(), InvertingGradients()))
    result = portfolio(snapshot.observation, budget=BUDGET, generator=generator)
    assert psnr(result.inputs, snapshot.truth.inputs) > 60


# The adversary's knowledge


def test_an_attack_never_reads_the_truth_so_another_truth_changes_nothing(snap):
    snapshot = snap("conv", batch=2)
    swapped = replace(snapshot, truth=copy.deepcopy(snapshot.truth))
    swapped.truth.inputs.zero_()
    results = [
        InvertingGradients()(s.observation, budget=BUDGET, generator=torch.Generator().manual_seed(0))
        for s in (snapshot, swapped)
    ]
    assert torch.equal(results[0].inputs, results[1].inputs)


def test_the_box_keeps_every_pixel_in_the_unit_range_of_a_normalised_image(snap):
    snapshot = snap("conv", mean=0.3, std=0.5)
    result = InvertingGradients()(snapshot.observation, budget=BUDGET, generator=torch.Generator().manual_seed(0))
    pixels = snapshot.observation.normalization.to_pixels(result.inputs)
    first = InvertingGradients()(
        snapshot.observation, budget=Budget(evaluations=1), generator=torch.Generator().manual_seed(0)
    )
    unclipped = snapshot.observation.normalization.to_pixels(first.inputs)
    assert float(unclipped.min()) < 0  # the start is N(0, 1), so the box had something to do
    assert -1e-6 <= float(pixels.min()) <= float(pixels.max()) <= 1 + 1e-6


def test_noise_on_the_gradient_costs_the_attack_its_image(faces, build):
    images, labels = faces
    quality = []
    for relative in (0.0, 3.0):
        snapshot = Snapshot.from_batch(
            build("conv"),
            (images[3:4], labels[3:4]),
            loss=functional.cross_entropy,
            defences=(GaussianNoise(relative=relative),),
        )
        result = InvertingGradients()(
            snapshot.observation, budget=Budget(evaluations=150), generator=torch.Generator().manual_seed(0)
        )
        quality.append(psnr(result.inputs, images[3:4]))
    assert quality[0] > quality[1] + 5
