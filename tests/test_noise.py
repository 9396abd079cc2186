"""Noise that hides faces from SSIM but not from recognition must not pass; noise that hides both must."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Baseline, Budget, GaussianNoise, RiskGate, Snapshot, Status, audit_snapshot
from lightning_gradaudit.attacks import InvertingGradients
from lightning_gradaudit.cli.demo import FaceDetector, faces


@pytest.fixture(scope="module")
def detector():
    """The demo's network after twenty steps."""
    images, labels = faces()
    torch.manual_seed(0)
    model = FaceDetector().net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        chosen = torch.randperm(200)[:16]
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model


def audited(model, noise, attack=None):
    """Audit forty faces in batches of four, each gradient under fresh noise."""
    images, labels = faces()
    baseline = Baseline()
    baseline.observe(images, labels)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    records = []
    for step, chosen in enumerate(order[:40].split(4)):
        snapshot = Snapshot.from_batch(
            model,
            (images[chosen], labels[chosen]),
            loss=F.cross_entropy,
            defences=(GaussianNoise(relative=noise),),
            seed=step,
            step=step,
        )
        records.append(
            audit_snapshot(snapshot, attack=attack, budget=Budget(evaluations=300), baseline=baseline.frozen())
        )
        baseline.remember(records[-1].pixels, records[-1].truth)
    assert all(record.gallery >= 100 for record in records)
    assert all(record.defence_gap > 0.2 for record in records)
    return records


@pytest.mark.slow
def test_mild_noise_takes_exposure_away_but_not_identification_and_does_not_pass(detector):
    records = audited(detector, 0.3, InvertingGradients())
    exposure = torch.cat([record.exposure for record in records])
    identified = torch.cat([record.identified for record in records])
    assert float(exposure.mean()) < 0.05
    assert float(identified.mean()) > 0.25
    verdict = RiskGate(0.3).verdict(records)
    assert verdict.status is not Status.PASS
    assert verdict.driver == "identification"


@pytest.mark.slow
def test_an_attack_that_knows_images_finds_exposure_where_a_plain_one_finds_none(detector):
    records = audited(detector, 0.3)
    assert float(torch.cat([record.exposure for record in records]).mean()) > 0.08
    assert RiskGate(0.3).verdict(records).status is Status.BLOCK


@pytest.mark.slow
def test_noise_that_drowns_the_gradient_passes(detector):
    records = audited(detector, 30.0)
    verdict = RiskGate(0.3, independent="images").verdict(records, step=20)
    assert verdict.status is Status.PASS
    assert verdict.exposure < 0.05
    assert verdict.images == 40
