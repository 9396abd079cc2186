"""Several looks at the same images, against the looks one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_gradaudit import Budget, Snapshot, audit_looks
from lightning_gradaudit.attacks import GradientMatching
from lightning_gradaudit.attacks.matching.objectives import SquaredError
from lightning_gradaudit.attacks.matching.problem import MatchingProblem
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.looks import Looks, SnapshotOfLooks


def rounds(build, count, *, images=None, mode="train", kind="batchnorm"):
    """The gradients of a client that takes a step on one batch in every round."""
    model = build(kind, channels=1, side=8)
    if images is None:
        images = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    labels, found = torch.tensor([0, 1, 1]), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(count):
        batch = images[step] if images.ndim == 5 else images
        found.append(
            Snapshot.from_batch(
                copy.deepcopy(model), (batch, labels), loss=functional.cross_entropy, mode=mode, labels_known=True,
                step=step,
            )
        )  # fmt: skip
        optimizer.zero_grad()
        functional.cross_entropy(model.train()(batch), labels).backward()
        optimizer.step()
    return found


def test_the_loss_over_looks_is_the_sum_of_their_losses_and_so_is_its_derivative(build):
    snapshots = rounds(build, 3)
    looks = Looks.of([s.observation for s in snapshots])
    candidate = torch.rand(looks.shape, generator=torch.Generator().manual_seed(6))
    labels = snapshots[0].truth.labels
    joint = MatchingProblem(looks, SquaredError())(candidate, labels)
    single = [MatchingProblem(s.observation, SquaredError())(candidate, labels) for s in snapshots]
    assert float(joint.loss) == pytest.approx(sum(float(each.loss) for each in single), rel=1e-5)
    expected = sum(each.inputs_gradient for each in single)
    assert torch.allclose(joint.inputs_gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_truth_explains_all_looks(build):
    joint = SnapshotOfLooks.of(rounds(build, 3))
    assert joint.self_test().error < 1e-5
    simulated = joint.observation.simulate(joint.truth.inputs, joint.truth.labels)
    assert joint.observation.relative_error(simulated) < 1e-5
    assert len(simulated) == 3 * len(joint.snapshots[0].observation.gradients)


def test_records_say_how_many_looks_they_are_of(build):
    records = audit_looks(rounds(build, 3), attack=GradientMatching(), budget=Budget(evaluations=5), closed_forms=False)
    assert [record.threat_model["looks"] for record in records] == [1, 2, 3]
    assert all(record.valid and record.evaluations == 5 for record in records)


def test_other_images_are_refused(build):
    images = torch.rand((2, 3, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    with pytest.raises(InvalidInputError, match="same images"):
        audit_looks(rounds(build, 2, images=images))
    with pytest.raises(InvalidInputError, match="counts"):
        audit_looks(rounds(build, 2), counts=[3])
    with pytest.raises(InvalidInputError, match="single looks"):
        audit_looks(rounds(build, 1), analysis=True)


def test_a_look_without_enough_equations_is_completed_by_others(build):
    """One unit of a linear layer sees one number of the image; four looks with other weights see four."""
    generator = torch.Generator().manual_seed(0)
    image, label = torch.rand((1, 1, 2, 2), generator=generator), torch.tensor([[0.3]])
    snapshots = []
    for step in range(5):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
        with torch.no_grad():
            model[1].weight.copy_(torch.randn((1, 4), generator=generator))
        model[1].weight.requires_grad_(requires_grad=False)  # only the bias is trained: its gradient is one number
        snapshots.append(Snapshot.from_batch(model, (image, label), loss=functional.mse_loss, step=step))
    attack = GradientMatching(objective=SquaredError())
    records = audit_looks(snapshots, attack=attack, budget=Budget(evaluations=300), counts=[1, 5], closed_forms=False)
    assert float(records[1].psnr) > float(records[0].psnr) + 5
