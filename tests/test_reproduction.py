"""The case that reproducers of gradient inversion report, and what a tool must not conclude from it.

A multilayer perceptron gives its image away untrained and, under plain gradient matching, no longer after one epoch.
The attack failed; the information is there: the first layer is linear with a bias, so a row of its gradient over that
of the bias is the image at every epoch (methods in the docstring of `attacks.linear`).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Budget, RiskGate, Snapshot, Status, audit_snapshot
from lightning_gradaudit.attacks import Adam, GradientMatching, SquaredError
from lightning_gradaudit.attacks.reconstruction import Outcome

PLAIN = GradientMatching(objective=SquaredError(), optimizer=Adam(lr=0.1), label="plain matching")
BUDGET = Budget(evaluations=200)


@pytest.fixture(scope="module")
def states(faces):
    """The same network before and after one epoch, with one face's gradient."""
    images, labels = faces
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(625, 64), nn.ReLU(), nn.Linear(64, 2))
        snapshots = []
        for epoch in range(2):
            if epoch:
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
                for chosen in torch.randperm(200).split(20):
                    optimizer.zero_grad()
                    F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                    optimizer.step()
            batch = images[:1], labels[:1]
            snapshots.append(Snapshot.from_batch(model, batch, loss=F.cross_entropy, labels_known=True))
    return snapshots


def test_plain_matching_copies_the_image_before_training_and_gets_nothing_after_one_epoch(states):
    untrained, trained = (
        audit_snapshot(each, attack=PLAIN, closed_forms=False, budget=BUDGET, analysis=True) for each in states
    )
    assert float(untrained.psnr) > 30
    assert float(trained.psnr) < 13
    assert float(trained.exposure) < 0.1
    # What the record says beside the failure:
    assert bool((trained.leakage.leak_r2_low > 0.98).all())  # without help from the certificate
    assert trained.ceiling.tolist() == [1.0]
    assert trained.exact_leaks.tolist() == [True]
    assert trained.uncopied_leaks == 1
    assert trained.bracket.tolist() == [[pytest.approx(float(trained.exposure)), 1.0]]
    assert RiskGate().verdict([trained] * 40).status is not Status.PASS


def test_closed_forms_recover_it_exactly_at_both_times(states):
    for each in states:
        record = audit_snapshot(each, attack=PLAIN, budget=BUDGET)
        assert record.outcome is Outcome.EXACT
        assert float(record.psnr) > 60
        assert record.evaluations < 10
