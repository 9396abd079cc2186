"""The known defects of other implementations, each pinned by a test named for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional

from lightning_gradaudit import Budget, Outcome
from lightning_gradaudit.attacks import (
    DLG,
    Adam,
    BatchNormStatistics,
    CosineDistance,
    GradientMatching,
    GroupConsistency,
    HeadFeatures,
    InvertingGradients,
    LabelAgreement,
    Objective,
    Pixels,
    SquaredNorm,
    StepDecay,
    TotalVariation,
    recover_labels,
)
from lightning_gradaudit.attacks.maximum_a_posteriori import known_noise
from lightning_gradaudit.simulation.sharing import PrivateSum

BUDGET = Budget(evaluations=30)


def test_the_result_is_stored_with_the_loss_it_had_and_not_with_that_of_the_step_after(snap):
    """Peers keep the image after the optimizer's step beside the loss from before it."""
    snapshot = snap("conv")
    attack = GradientMatching(
        optimizer=Adam(lr=3.0, schedule=StepDecay(milestones=())), parametrization=Pixels(box=False)
    )  # so large a step always overshoots
    result = attack(snapshot.observation, budget=Budget(evaluations=20), generator=torch.Generator().manual_seed(1))
    simulated = snapshot.observation.simulate(result.inputs, result.labels)
    observed = snapshot.observation.gradients
    flat, wanted = (torch.cat([t[n].flatten() for n in observed]) for t in (simulated, observed))
    cosine = 1 - functional.cosine_similarity(flat, wanted, dim=0)
    assert result.trajectory[-1] == (20, pytest.approx(float(cosine), abs=1e-6))
    assert result.matching_loss == pytest.approx(float((flat - wanted).norm() ** 2 / wanted.norm() ** 2), rel=1e-4)


@dataclass(frozen=True)
class Scripted(Objective):
    """Cosine distance plus an offset per evaluation, noting each candidate's value."""

    offsets: tuple[float, ...]
    seen: list[float]

    def __call__(self, simulated, observed):
        value = CosineDistance()(simulated, observed) + self.offsets[len(self.seen)]
        self.seen.append(float(value.detach()))
        return value


NAN = math.nan


@pytest.mark.parametrize(
    ("offsets", "best"),
    [
        # A restart that is not finite ends after its first evaluation; the others share what is left.
        pytest.param((NAN, 1, 1, 1, 5, 5), (1, 2, 3), id="the first restart is not finite"),
        pytest.param((5, 5, NAN, 1, 1, 1), (3, 4, 5), id="a restart in the middle is not finite"),
        pytest.param((5, 5, 1, 1, NAN), (2, 3), id="the last restart is not finite"),
        pytest.param((math.inf, 5, 5, 5, 1, 1), (4, 5), id="infinite"),
        pytest.param((1, NAN, 5, 5, 9, 9), (0,), id="a candidate in a good restart is not finite"),
    ],
)
def test_a_restart_that_is_not_finite_does_not_shift_the_choice(snap, offsets, best):
    """Peers filter the losses and then index the unfiltered list of images."""
    seen: list[float] = []
    objective = Scripted(tuple(map(float, offsets)), seen)
    attack = GradientMatching(objective=objective, restarts=3)
    observation = snap("conv").observation
    result = attack(observation, budget=Budget(evaluations=6), generator=torch.Generator().manual_seed(0))
    assert result.evaluations == len(seen) == len(offsets)
    assert result.outcome is Outcome.BUDGET_SPENT
    simulated = observation.simulate(result.inputs, result.labels)
    expected = min(seen[i] for i in best)
    offset = offsets[seen.index(expected)]
    assert float(CosineDistance()(simulated, observation.gradients)) + offset == pytest.approx(expected, abs=1e-5)


def test_an_attack_that_never_sees_a_finite_loss_says_so(snap, generator):
    attack = GradientMatching(objective=Scripted((NAN,) * 5, []))
    result = attack(snap("conv").observation, budget=Budget(evaluations=5), generator=generator)
    assert result.outcome is Outcome.NONFINITE
    assert result.matching_loss == math.inf
    assert bool(result.inputs.isfinite().all())


def test_soft_labels_are_one_row_per_image(snap):
    """Peers optimise one label vector for a whole batch."""
    snapshot = snap("sigmoid", batch=2, classes=4)
    result = DLG()(snapshot.observation, budget=Budget(evaluations=600), generator=torch.Generator().manual_seed(0))
    assert sorted(result.labels.tolist()) == [0, 1]


def test_optimised_labels_are_returned_and_not_those_of_the_start(snap):
    """Peers return the labels of the random initialisation."""
    returned = []
    for seed in range(3):
        snapshot = snap("sigmoid", classes=10)
        generator = torch.Generator().manual_seed(seed)
        result = DLG()(snapshot.observation, budget=Budget(evaluations=200), generator=generator)
        returned.append(result.labels.item())
    assert returned == [0, 0, 0]


def test_given_labels_are_used_as_they_are_duplicates_included(snap):
    snapshot = snap("conv", batch=3, labels_known=True)
    labels = torch.tensor([1, 1, 1])
    observation = replace(snapshot.observation, labels=labels)
    result = InvertingGradients()(observation, budget=BUDGET, generator=torch.Generator().manual_seed(0))
    assert torch.equal(result.labels, labels)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_total_variation_works_for_any_number_of_channels(channels):
    """Peers hard-code three channels. Oracle: NumPy's differences."""
    images = torch.rand((2, channels, 5, 7), generator=torch.Generator().manual_seed(0))
    array = images.double().numpy()
    expected = abs(array[:, :, 1:] - array[:, :, :-1]).mean() + abs(array[..., 1:] - array[..., :-1]).mean()
    assert float(TotalVariation(weight=0.3)(images)) == pytest.approx(0.3 * expected, rel=1e-5)
    assert float(TotalVariation(weight=0.3)(torch.ones_like(images))) == 0
    down, across = images.double().diff(dim=2).numpy(), images.double().diff(dim=3).numpy()
    rounded = sum(((d**2 + 0.04) ** 0.5 - 0.2).mean() for d in (down, across))
    assert float(TotalVariation(weight=0.3, rounding=0.2)(images)) == pytest.approx(0.3 * rounded, rel=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("kind", ["SquaredNorm", "GroupConsistency", "colours"])
def test_no_regularizer_is_typed_for_three_channels(kind, channels):
    """Each by its formula on the flat array; colours of one channel cost nothing beyond the plain variation."""
    images = torch.rand((2, channels, 5, 7), generator=torch.Generator().manual_seed(0))
    array = images.double().numpy()
    if kind == "SquaredNorm":
        assert float(SquaredNorm(weight=0.3)(images)) == pytest.approx(0.3 * 0.5 * (array**2).sum() / 2, rel=1e-5)
    elif kind == "GroupConsistency":
        found = float(GroupConsistency(weight=0.3)(images, torch.ones_like(images)))
        assert found == pytest.approx(0.3 * 0.5 * ((array - 1) ** 2).sum() / 2, rel=1e-5)
    else:
        plain, colours = (float(TotalVariation(weight=1.0, colours=c)(images)) for c in (False, True))
        assert colours == plain if channels == 1 else colours > plain


def test_hooks_do_not_leak_one_per_trial(snap):
    observation = snap("batchnorm", batch=2, channels=3, mode="train").observation
    attack = GradientMatching(regularizers=(BatchNormStatistics(), HeadFeatures(), LabelAgreement()), restarts=4)

    def hooks():
        modules = list(observation.client.module.modules())
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return [len(getattr(module, kind)) for module in modules for kind in kinds]

    before = hooks()
    attack(observation, budget=Budget(evaluations=12), generator=torch.Generator().manual_seed(0))
    assert hooks() == before
    assert sum(before) == 0


def test_a_label_rule_can_return_a_class_more_than_once(snap):
    snapshot = snap("conv", batch=6, classes=10, side=16)
    labels = torch.tensor([4, 4, 4, 4, 7, 7])
    observation = replace(snapshot.observation, gradients=snapshot.observation.simulate(snapshot.truth.inputs, labels))
    assert recover_labels(observation, generator=torch.Generator().manual_seed(0)).labels.tolist() == labels.tolist()


def test_the_noise_of_dp_sgd_is_scaled_by_the_norm_over_the_batch(snap):
    """The sum gets noise σC, what is shared is that sum over B: σC/B in every coordinate, and not σ."""
    observation = snap("conv", batch=4).observation
    private = PrivateSum(max_norm=2.0, noise_multiplier=0.5, divisor=4.0)
    noisy = replace(observation, protocol=replace(observation.protocol, private=private))
    assert noisy.noise_std == pytest.approx(0.5 * 2.0 / 4.0)
    assert known_noise(noisy) == pytest.approx(0.25)
    # and C/B bounds what one image adds
    alone = {n: torch.full_like(g, 100.0) for n, g in observation.gradients.items()}
    added = private.add({n: torch.zeros_like(g) for n, g in alone.items()}, alone)
    assert float(torch.stack([(g**2).sum() for g in added.values()]).sum().sqrt()) == pytest.approx(2.0 / 4.0, rel=1e-5)
