"""Effort, knowledge and basin, against hand-made paths and models whose gradient is known in closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_gradaudit import Budget, GaussianNoise, Snapshot, audit_snapshot
from lightning_gradaudit.analysis import basin, descent_alignment, effort_curve, knowledge_levels, knowledge_sweep
from lightning_gradaudit.analysis.basin import WarmStart
from lightning_gradaudit.attacks import Auto, InvertingGradients, SquaredError
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def face(faces, build):
    images, labels = faces
    return lambda kind="conv", count=1, **kwargs: Snapshot.from_batch(
        build(kind), (images[:count], labels[:count]), loss=F.cross_entropy, **kwargs
    )


def ssim(a, b):
    return float(structural_similarity_index_measure(a, b, data_range=1.0))


def test_effort_is_the_first_point_of_a_path_that_is_exposed(face):
    snapshot = face(count=2)
    truth, noise = snapshot.truth_pixels, torch.rand((2, 1, 25, 25), generator=seeded())
    mixed = [torch.lerp(noise, truth, share) for share in (0.0, 0.6, 0.9)]
    swapped = mixed[1].flip(0)  # the order of a reconstruction is arbitrary
    found = Reconstruction(
        inputs=mixed[2],
        labels=None,
        matching_loss=0.1,
        evaluations=130,  # 30 were spent by somebody else
        outcome=Outcome.BUDGET_SPENT,
        path=((1, mixed[0]), (40, swapped), (100, mixed[2])),
    )
    null = torch.tensor([0.2, 0.4])
    curve = effort_curve(found, snapshot, null=null)
    assert curve.evaluations == (31, 70, 130)
    for row, images in zip(curve.exposure, mixed, strict=True):
        for i in range(2):
            reached = max(0.0, ssim(images[i : i + 1], truth[i : i + 1]))
            assert float(row[i]) == pytest.approx(max(0.0, float((reached - null[i]) / (1 - null[i]))), abs=1e-5)
    level = float(curve.exposure[1].amin())
    assert curve.effort(level).tolist() == [70, 70]
    assert curve.effort(1.0).tolist() == [math.inf, math.inf]


def test_a_path_is_short_ends_at_the_result_and_costs_nothing(face):
    snapshot = face()
    result = InvertingGradients()(snapshot.observation, budget=Budget(evaluations=333), generator=seeded())
    spent = [evaluations for evaluations, _ in result.path]
    assert spent == sorted(set(spent))
    assert spent[-1] == result.evaluations == 333
    assert len(spent) <= 1 + math.log(333) / math.log(1.3)
    torch.testing.assert_close(result.path[-1][1], result.inputs)


def test_noise_raises_the_effort_and_a_closed_form_needs_one_evaluation(face):
    budget = Budget(evaluations=200)
    clean = audit_snapshot(face(), budget=budget)
    noisy = audit_snapshot(face(defences=(GaussianNoise(relative=3.0),)), budget=budget)
    assert float(clean.effort) < float(noisy.effort) == math.inf
    exact = audit_snapshot(face("mlp"), budget=budget)
    assert float(exact.effort) == exact.evaluations < 10
    restored = type(noisy).from_dict(noisy.to_dict())
    assert restored.effort.tolist() == [math.inf]


def test_knowledge_grows_from_a_wrong_simulation_to_the_exact_one(faces, build):
    images, labels = faces
    model = build("batchnorm")
    snapshot = Snapshot.from_batch(model, (images[:4], labels[98:102]), loss=F.cross_entropy, mode="train")
    levels = knowledge_levels(snapshot)
    assert list(levels) == ["nothing", "+ labels", "+ BatchNorm statistics", "+ mode"]
    assert levels["nothing"].labels is None
    truth = snapshot.truth.inputs, snapshot.truth.labels
    errors = [level.relative_error(level.simulate(*truth)) for level in levels.values()]
    assert errors[0] == errors[1] > errors[2] > 1e-3
    assert errors[3] < 1e-6
    # Given the batch's statistics, eval mode computes the very loss of train mode.
    expected = F.cross_entropy(model.train()(images[:4]), labels[98:102])
    assert float(levels["+ BatchNorm statistics"].loss(*truth).detach()) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )
    assert not model.training or snapshot.observation.client.module.training  # the snapshot's own replica is untouched
    assert snapshot.self_test().error < 1e-5


def test_a_step_without_batchnorm_in_train_mode_has_two_levels(face):
    assert list(knowledge_levels(face("batchnorm"))) == ["nothing", "+ labels"]


def test_a_ladder_runs_every_level_and_number_of_starts_on_one_budget(face):
    budget = Budget(evaluations=60)
    rungs = knowledge_sweep(face(), attack=InvertingGradients(), budget=budget, restarts=(1, 2))
    assert [(r.knowledge, r.restarts) for r in rungs] == [
        (knowledge, starts) for knowledge in ("nothing", "+ labels") for starts in (1, 2)
    ]
    assert all(r.curve.evaluations[-1] == 60 for r in rungs)
    with pytest.raises(InvalidInputError, match="restarts"):
        knowledge_sweep(face(), attack=Auto(), budget=budget, restarts=(2,))


def test_a_warm_start_goes_from_the_truth_to_noise(face):
    snapshot = face()
    truth = snapshot.truth_pixels
    starts = [WarmStart(pixels=truth, amount=a)(snapshot.observation, seeded()).flatten() for a in (0.0, 0.5, 0.9, 1.0)]
    torch.testing.assert_close(starts[0], truth.flatten())
    correlations = [float(torch.corrcoef(torch.stack([s, truth.flatten()]))[0, 1]) for s in starts]
    assert correlations == sorted(correlations, reverse=True)
    assert abs(correlations[-1]) < 0.15  # 625 independent pixels
    with pytest.raises(InvalidInputError, match="amount"):
        WarmStart(pixels=truth, amount=1.1)


def test_a_basin_gains_where_the_gradient_leads_and_nothing_where_it_is_blind(face):
    leaky = basin(face(), amounts=(0.9,))
    assert float(leaky.gain) > 0.1
    assert leaky.evaluations == 100
    blind = face()
    bias = {"5.bias": blind.observation.gradients["5.bias"]}
    blind = replace(blind, observation=replace(blind.observation, gradients=bias))
    assert float(basin(blind, amounts=(0.9,)).gain) < 0.05
    assert leaky.reach(0.0) == 0.9
    assert leaky.reach(1.0) == 0.0


def test_a_basin_needs_a_search_over_pixels(face):
    with pytest.raises(InvalidInputError, match="Pixels"):
        basin(face(), attack=Auto())


class Dot(nn.Module):
    """⟨w, x⟩: with the loss itself as output its gradient is the image."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(625))

    def forward(self, x):
        return x.flatten(1) @ self.w


def test_the_way_back_in_a_model_whose_gradient_is_the_image(faces):
    images, labels = faces
    snapshot = Snapshot.from_batch(Dot(), (images[:1], labels[:1]), loss=lambda out, y: out.sum())
    found = descent_alignment(snapshot, objective=SquaredError(), amounts=(0.5,))
    start = WarmStart(pixels=images[:1], amount=0.5)(snapshot.observation, seeded())
    way = (images[:1] - start).flatten()
    assert found.linearity == pytest.approx(1, abs=1e-5)
    assert found.cosine == pytest.approx(float(way.abs().sum() / (625**0.5 * way.norm())), abs=1e-4)
    assert found.score == pytest.approx(found.cosine, abs=1e-5)
