"""Features that inner linear layers give away: against what really went into them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_gradaudit import Budget, GaussianNoise, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import feature_exposure, recover_features
from lightning_gradaudit.attacks.closed_form.features import feature_errors, true_features
from lightning_gradaudit.audit.record import AuditRecord

CROSS_ENTROPY = functional.cross_entropy


def network(*, width=256, classes=10, head_bias=True):
    """A convolution no closed form inverts, and two linear layers behind it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 13 * 13, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, classes, bias=head_bias),
        )


def snapshot_of(faces, size, *, model=None, **kwargs):
    generator = torch.Generator().manual_seed(size)
    images = faces[0][torch.randperm(200, generator=generator)[:size]]
    labels = torch.randint(10, (size,), generator=generator)
    return Snapshot.from_batch(model or network(), (images, labels), loss=CROSS_ENTROPY, **kwargs)


def recover(snapshot):
    return recover_features(snapshot.observation, generator=torch.Generator().manual_seed(0))


def truth_of(snapshot):
    return true_features(snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels)


def test_the_truth_is_what_the_layers_really_see(faces):
    snapshot, model = snapshot_of(faces, 3), network()
    with torch.no_grad():
        torch.testing.assert_close(truth_of(snapshot)["5"], model[:5](snapshot.truth.inputs))


def test_one_image_gives_away_the_input_of_every_linear_layer(faces):
    snapshot = snapshot_of(faces, 1)
    truth, found = truth_of(snapshot), recover(snapshot)
    assert set(found) == set(truth) == {"3", "5", "7"}
    for name, features in found.items():
        torch.testing.assert_close(features, truth[name], rtol=1e-3, atol=1e-5)
    assert feature_exposure(found, truth) == {"3": 1.0, "5": 1.0, "7": 1.0}


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_one_image_give_its_features_and_nothing_else(faces, size):
    snapshot = snapshot_of(faces, size)
    found, truth = recover(snapshot), truth_of(snapshot)
    assert "3" in found
    for name, features in found.items():
        distance = torch.cdist(features, truth[name]) / truth[name].norm(dim=1)
        assert float(distance.min(1).values.max()) < 1e-3


def test_layers_fed_by_the_image_are_left_to_the_image_attacks(faces):
    model = nn.Sequential(nn.Flatten(), nn.Linear(625, 32), nn.ReLU(), nn.Linear(32, 10))
    assert set(recover(snapshot_of(faces, 1, model=model))) == {"3"}


def test_a_layer_without_a_bias_tells_no_scale_and_is_absent(faces):
    assert set(recover(snapshot_of(faces, 1, model=network(head_bias=False)))) == {"3", "5"}


@pytest.mark.parametrize("size", [1, 3])
def test_noise_leaves_nothing_exact(faces, size):
    assert recover(snapshot_of(faces, size, defences=(GaussianNoise(relative=0.1),))) == {}


def test_errors_are_matched_one_to_one():
    truth = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 2.0]])
    recovered = torch.tensor([[1.0, 0.1], [0.0, 1.0]])  # the first is near two of them and may serve only one
    errors = feature_errors(recovered, truth)
    assert errors.tolist() == [float("inf"), 0.0, pytest.approx(0.5)]
    assert feature_exposure({"layer": recovered}, {"layer": truth}) == {"layer": pytest.approx(1 / 3)}


def test_an_audit_reports_features_beside_the_images_and_not_as_their_risk(faces):
    record = audit_snapshot(snapshot_of(faces, 1), budget=Budget(evaluations=2))
    assert record.features == {"3": 1.0, "5": 1.0, "7": 1.0}
    assert float(record.exposure.max()) < 0.5  # two evaluations show nothing of the image
    assert not bool(record.exact_leaks.any())
    assert AuditRecord.from_dict(record.to_dict()).features == record.features
