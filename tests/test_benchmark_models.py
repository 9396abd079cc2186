"""The networks of the benchmarks are those that their sources describe, and an attack runs on each of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import models
from benchmarks.quality.generalise import leads
from benchmarks.quality.published import cnn6
from lightning_gradaudit import Budget, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import InvertingGradients


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (partial(models.pool_convnet, 64), 2_904_970),  # breaching's ConvNet
        (cnn6, 154_266),  # R-GAP's network
        (models.lenet, 15_826),  # of deep leakage from gradients
    ],
)
def test_networks_have_the_published_number_of_parameters(build, published):
    assert sum(p.numel() for p in build().parameters()) == published


def test_no_architecture_is_in_both_halves():
    first, other = ({build.__name__ for build in half} for half in (models.FIRST_HALF, models.OTHER_HALF))
    assert len(first) == len(other) == 5
    assert not first & other


@pytest.mark.parametrize("build", models.FIRST_HALF + models.OTHER_HALF, ids=lambda build: build.__name__)
def test_an_attack_runs_on_every_architecture(build):
    torch.manual_seed(0)
    batch = torch.rand(1, 3, 32, 32), torch.tensor([3])
    snapshot = Snapshot.from_batch(build(), batch, loss=nn.functional.cross_entropy, labels_known=True)
    record = audit_snapshot(snapshot, attack=InvertingGradients(), budget=Budget(evaluations=2), closed_forms=False)
    assert record.valid
    assert record.evaluations == 2
    assert torch.isfinite(record.psnr).all()


def test_training_ends_at_the_number_of_steps_asked_for():
    torch.manual_seed(0)
    pixels, labels = torch.rand(100, 3, 32, 32), torch.arange(100) % 10
    counted = []
    model = models.plain_convnet()
    model.register_forward_hook(lambda *_: counted.append(1))
    models.train(model, pixels, labels, epochs=9, seed=0, most_steps=3)
    assert len(counted) == 3


def test_the_lead_counts_against_the_better_rival_of_the_row():
    row = {
        "auto": {"psnr": 20.0, "psnr_per_audit": [[19.0], [21.0]]},
        "ig 1e-2": {"psnr": 15.0, "psnr_per_audit": [[14.0], [16.0]]},
        "ig 1e-1": {"psnr": 18.0, "psnr_per_audit": [[17.0], [19.0]]},
    }
    found = leads(row, seed=0)
    assert found["best_rival"] == "ig 1e-1"
    assert found["lead"] == 2.0
    assert found["lead_interval"] == [2.0, 2.0]
