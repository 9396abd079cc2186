"""Attackers who know the defence: better than those who do not, on faces."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from lightning_gradaudit import (
    Budget,
    ClipLayers,
    ClipNorm,
    LaplaceNoise,
    Outcome,
    PruneSmallest,
    Quantise,
    SignOnly,
    Snapshot,
    Soteria,
)
from lightning_gradaudit.attacks import AdaptiveMatching, Auto
from lightning_gradaudit.attacks.matching.through_defences import AbsoluteError, ThroughDefences, objective_for

HEAD = "5.weight"
EACH = [
    PruneSmallest(share=0.9),
    SignOnly(),
    Quantise(bits=8, stochastic=False),
    Soteria(layer=HEAD),
    ClipLayers(max_norm=0.01),
]


def observe(faces, index, *defences):
    torch.manual_seed(100 + index)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 2),
    )  # fmt: skip
    batch = faces[0][7 * index : 7 * index + 1], faces[1][7 * index : 7 * index + 1]
    snapshot = Snapshot.from_batch(model, batch, loss=F.cross_entropy, labels_known=True, defences=defences, seed=index)
    return snapshot.observation, snapshot.truth


def attack(which, observation, evaluations, seed=0):
    return which(observation, budget=Budget(evaluations=evaluations), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("defence", [EACH[0], EACH[1], EACH[3]], ids=repr)
def test_who_knows_the_defence_gets_more_and_the_default_attack_is_one_of_them(faces, defence):
    gains = []
    for index in (0, 1):
        observation, truth = observe(faces, index, defence)
        plain, adaptive = attack(AdaptiveMatching().plain, observation, 100), attack(Auto(), observation, 100)
        assert adaptive.evaluations <= 100
        assert "AdaptiveMatching" in adaptive.reason
        gains.append([float(ssim(each.inputs, truth.inputs, data_range=1.0)) for each in (plain, adaptive)])
    assert all(after > before + 0.15 for before, after in gains), gains


@pytest.mark.parametrize("defence", EACH, ids=repr)
def test_the_true_gradient_is_nearest_through_the_defence(faces, defence):
    """The undefended true gradient explains what is shared better than another image's does."""
    observation, truth = observe(faces, 0, defence)
    objective = objective_for((defence,))
    assert isinstance(objective, ThroughDefences)
    right = objective(observation.simulate(truth.inputs, truth.labels), observation.gradients)
    wrong = objective(observation.simulate(faces[0][3:4], truth.labels), observation.gradients)
    assert right < (0.5 if isinstance(defence, SignOnly) else 0.2) * wrong
    if isinstance(defence, (PruneSmallest, Soteria, ClipLayers)):
        assert right < 1e-6, "nothing that the defence did is counted against the truth"


@pytest.mark.parametrize("defence", EACH, ids=repr)
def test_the_derivative_is_that_of_the_distance(faces, defence):
    observation, truth = observe(faces, 0, defence)
    observed = {n: g.double() for n, g in observation.gradients.items()}
    simulated = {n: g.double() for n, g in observation.simulate(faces[0][3:4], truth.labels).items()}
    objective = objective_for((defence,))
    _, gradient = objective.value_and_gradient(simulated, observed)
    along = {n: torch.randn(g.shape, dtype=torch.float64) * g.abs() for n, g in simulated.items()}
    step = 1e-5
    if isinstance(defence, SignOnly):  # its width follows the gradient and has no derivative of its own
        along = {
            n: d - d.mul(g.sign()).sum() / g.count_nonzero().clamp_min(1) * g.sign()
            for (n, g), d in zip(simulated.items(), along.values(), strict=True)
        }
    beside = [objective({n: g + s * along[n] for n, g in simulated.items()}, observed) for s in (step, -step)]
    slope = float(beside[0] - beside[1]) / (2 * step)
    assert slope == pytest.approx(sum(float((gradient[n] * along[n]).sum()) for n in along), rel=1e-3)


def test_laplace_noise_is_matched_by_absolute_errors(faces):
    assert objective_for((LaplaceNoise(relative=0.1),)) == AbsoluteError()
    one, other = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([2.0, -2.0])}
    assert float(AbsoluteError()(one, other)) == pytest.approx(0.25, rel=1e-2)


def test_where_no_defence_leaves_a_mark_directions_are_compared(faces):
    observation, _ = observe(faces, 0, ClipNorm(max_norm=0.01))
    assert objective_for((ClipNorm(max_norm=0.01),)) is None
    assert "only directions compare" in attack(Auto(), observation, 4).reason
    assert attack(AdaptiveMatching(), observation, 4).outcome is Outcome.NOT_APPLICABLE
