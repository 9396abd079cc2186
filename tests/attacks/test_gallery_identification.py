"""Naming a batch among candidates: against the batch itself, brute force, and NNLS on the explicit gradients."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from support import Classifier, RecordingLogger, images_and_labels, loader, trainer
from support import record as audit_record
from torch.nn import functional

from lightning_gradaudit import (
    AuditRecord,
    AuditSettings,
    Baseline,
    Budget,
    GaussianNoise,
    GradAudit,
    Outcome,
    RiskGate,
    Snapshot,
    audit_snapshot,
)
from lightning_gradaudit.attacks import GalleryIdentification
from lightning_gradaudit.attacks import gallery_identification as gallery
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.local_optimizer import LocalOptimizer
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.sharing import PrivateSum, SharingProtocol

CROSS_ENTROPY = functional.cross_entropy
AMPLE = Budget(evaluations=10_000)
SMALL = Budget(evaluations=3)


@pytest.fixture
def photographs(faces):
    """60 faces (60, 1, 25, 25) in [0, 1] in three classes."""
    return faces[0][:60], torch.arange(60) % 3


def identify(snapshot, candidates, labels=None, budget=AMPLE):
    attack = GalleryIdentification(candidates=candidates, labels=labels)
    return attack(snapshot.observation, budget=budget, generator=torch.Generator().manual_seed(0))


def share(result, snapshot):
    """Share of the true images that are among those named."""
    distance = torch.cdist(result.inputs.flatten(1), snapshot.truth.inputs.flatten(1))
    return float((distance.min(0).values < 1e-3).float().mean())


def gradients_of(snapshot, candidates, labels):
    rows = [snapshot.observation.simulate(x[None], y[None]) for x, y in zip(candidates, labels, strict=True)]
    return torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows]).double().numpy()


def take(build, photographs, chosen, *, kind="conv", loss=CROSS_ENTROPY, **kwargs):
    images, labels = photographs
    mean, std = kwargs.get("mean", 0.0), kwargs.get("std", 1.0)
    batch = (images[chosen] - mean) / std, labels[chosen]
    return Snapshot.from_batch(build(kind, classes=3), batch, loss=loss, **kwargs)


@pytest.mark.parametrize("known", ["candidates' labels", "the batch's labels", "nothing"])
@pytest.mark.parametrize("chosen", [[7], [3, 50, 21, 6], list(range(0, 60, 4))], ids=len)
def test_a_batch_is_named_whatever_is_known_of_the_labels(build, photographs, chosen, known):
    snapshot = take(build, photographs, chosen, labels_known=known == "the batch's labels", mean=0.4, std=0.3)
    result = identify(snapshot, photographs[0], photographs[1] if known == "candidates' labels" else None)
    assert share(result, snapshot) == 1
    assert sorted(result.labels.tolist()) == sorted(photographs[1][chosen].tolist())
    assert result.matching_loss < 1e-9
    assert result.outcome is Outcome.CONVERGED


def test_weights_from_inner_products_are_those_of_least_squares_on_the_gradients(build, photographs):
    snapshot = take(build, photographs, [1, 2, 3], defences=(GaussianNoise(relative=0.5),))
    table = gradients_of(snapshot, *photographs)
    shared = torch.cat([g.flatten() for g in snapshot.observation.gradients.values()]).double().numpy()
    expected, _ = scipy.optimize.nnls(table.T, shared)
    np.testing.assert_allclose(gallery.nonnegative_weights(table @ table.T, table @ shared), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_under_noise_the_named_pair_is_the_best_of_all_pairs(build, photographs, seed):
    """Brute force: the pair whose summed gradients point most nearly along the shared one."""
    candidates, labels = photographs[0][:12], photographs[1][:12]
    snapshot = take(build, photographs, [2, 9], defences=(GaussianNoise(relative=8.0),), seed=seed)
    table = gradients_of(snapshot, candidates, labels)
    shared = torch.cat([g.flatten() for g in snapshot.observation.gradients.values()]).double().numpy()

    def cosine(pair):
        total = table[list(pair)].sum(0)
        return total @ shared / np.linalg.norm(total)

    best = max(itertools.combinations(range(12), 2), key=cosine)
    named = identify(snapshot, candidates, labels).inputs
    assert {int((candidates - x).abs().flatten(1).sum(1).argmin()) for x in named} == set(best)


def test_noise_costs_names_in_the_end(build, photographs):
    shares = []
    for relative in (1.0, 1000.0):
        drawn = [
            take(build, photographs, [i, i + 20, i + 40], defences=(GaussianNoise(relative=relative),), seed=i)
            for i in range(10)
        ]
        shares.append(sum(share(identify(s, *photographs), s) for s in drawn) / 10)
    assert shares[0] > 0.8
    assert shares[1] < 0.3  # chance is 5 %


def test_gradients_too_large_to_hold_are_sketched_without_losing_the_names(build, photographs, monkeypatch):
    monkeypatch.setattr(gallery, "SETTINGS", replace(gallery.SETTINGS, most_held_floats=0, sketch_floats=1009))
    snapshot = take(build, photographs, [3, 50, 21, 6])
    reduce = gallery.make_reduction(snapshot.observation.gradients, 60, torch.Generator().manual_seed(0))
    one, other = (snapshot.observation.simulate(photographs[0][i : i + 1], photographs[1][i : i + 1]) for i in (0, 9))
    sketched = [reduce(each) for each in (one, other)]
    flat = [torch.cat([g.flatten() for g in each.values()]) for each in (one, other)]
    assert sketched[0].shape == (1009,)
    scale = float(flat[0].norm() * flat[1].norm())
    assert abs(float(sketched[0] @ sketched[1]) - float(flat[0] @ flat[1])) < 4 * (2 / 1009) ** 0.5 * scale
    assert share(identify(snapshot, *photographs), snapshot) == 1


def test_the_regression_over_random_batches_agrees_with_single_images_where_images_do_not_interact(
    build, photographs, monkeypatch
):
    snapshot = take(build, photographs, [3, 50, 21, 6])
    alone = identify(snapshot, *photographs)
    monkeypatch.setattr(gallery, "has_coupled_images", lambda _: True)
    together = identify(snapshot, *photographs)
    assert share(together, snapshot) == share(alone, snapshot) == 1
    assert (alone.evaluations, together.evaluations) == (61, 121)


def test_under_train_mode_batchnorm_most_are_named_and_no_mode_is_changed(build, photographs):
    shares = []
    for i in range(6):
        snapshot = take(build, photographs, [i, i + 13, i + 26, i + 39], kind="batchnorm", mode="train")
        modes = [m.training for m in snapshot.observation.client.module.modules()]
        shares.append(share(identify(snapshot, *photographs), snapshot))
        assert [m.training for m in snapshot.observation.client.module.modules()] == modes
    assert sum(shares) / 6 > 0.5  # chance is 7 %


def local_sgd(snapshot, kind=torch.optim.SGD):
    names = tuple(snapshot.observation.parameters)
    settings = (({"lr": 0.01},),) * 2
    optimizer = LocalOptimizer(kind=kind, groups=(names,), settings=settings, state={})
    (step,) = SharingProtocol.one_batch(len(snapshot.truth.inputs)).steps
    return SharingProtocol(steps=(step, step), optimizer=optimizer)


def private(snapshot):
    return replace(
        SharingProtocol.one_batch(len(snapshot.truth.inputs)),
        private=PrivateSum(max_norm=0.5, noise_multiplier=0.0, divisor=4.0),
    )


@pytest.mark.parametrize("protocol", [local_sgd, private])
def test_local_steps_and_clipped_gradients_are_sums_over_images_too(build, photographs, protocol):
    snapshot = take(build, photographs, [3, 50, 21, 6])
    observation = replace(snapshot.observation, protocol=protocol(snapshot))
    shared = observation.simulate(snapshot.truth.inputs, snapshot.truth.labels)
    snapshot = replace(snapshot, observation=replace(observation, gradients=shared))
    assert share(identify(snapshot, *photographs), snapshot) == 1


def squared_loss(logits, labels):
    return ((logits - functional.one_hot(labels, 3)) ** 2).mean()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"candidates": torch.rand(9, 1, 24, 25)}, r"candidates of shape \(1, 24, 25\)", id="another size"),
        pytest.param({"candidates": torch.rand(1, 1, 25, 25)}, "1 candidates are fewer than the 2", id="too few"),
        pytest.param({"budget": Budget(evaluations=60)}, "61 evaluations are needed", id="budget"),
        pytest.param({"loss": squared_loss, "labels": None}, "labels of the candidates are not known", id="labels"),
        pytest.param({"kind": torch.optim.Adam}, "Adam is no sum over images", id="adaptive optimizer"),
    ],
)
def test_what_does_not_apply_is_an_outcome_with_a_reason(build, photographs, change, says):
    snapshot = take(build, photographs, [1, 2], loss=change.get("loss", CROSS_ENTROPY))
    if "kind" in change:
        protocol = local_sgd(snapshot, change["kind"])
        snapshot = replace(snapshot, observation=replace(snapshot.observation, protocol=protocol))
    candidates = change.get("candidates", photographs[0])
    labels = None if "labels" in change else torch.zeros(len(candidates), dtype=torch.long)
    result = identify(snapshot, candidates, labels, budget=change.get("budget", AMPLE))
    assert (result.outcome, result.evaluations) == (Outcome.NOT_APPLICABLE, 0)
    assert re.search(says, result.reason)


def test_the_evaluations_are_counted(build, photographs, monkeypatch):
    calls = []
    simulate = Observation.simulate
    snapshot = take(build, photographs, [1, 2])
    monkeypatch.setattr(Observation, "simulate", lambda self, *a: calls.append(1) or simulate(self, *a))
    result = identify(snapshot, *photographs, budget=Budget(evaluations=61))
    assert result.evaluations == len(calls) == 61


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"candidates": torch.zeros(3, 25, 25)}, "candidates"),
        ({"candidates": torch.zeros(3, 1, 5, 5, dtype=torch.uint8)}, "candidates"),
        ({"candidates": torch.zeros(3, 1, 5, 5), "labels": torch.zeros(2)}, "labels"),
    ],
)
def test_misuse_is_refused_by_name(arguments, named):
    with pytest.raises(InvalidInputError, match=named):
        GalleryIdentification(**arguments)


# The arm of the audit


def with_gallery(images, labels=None):
    baseline = Baseline()
    baseline.observe(images, labels)
    return baseline


@pytest.mark.parametrize("labelled", [True, False])
def test_an_audit_says_whom_the_candidates_confirm(build, photographs, labelled):
    """The gallery holds the batch too: near copies must go, or there would be two of each."""
    snapshot = take(build, photographs, [3, 50, 21])
    baseline = with_gallery(photographs[0], photographs[1] if labelled else None)
    record = audit_snapshot(snapshot, budget=SMALL, baseline=baseline, confirm=40)
    assert record.confirmed.tolist() == [1, 1, 1]
    assert record.confirmed_chance == pytest.approx(3 / 40)
    assert record.evaluations <= 3  # the attack's own effort
    noisy = take(build, photographs, [3, 50, 21], defences=(GaussianNoise(relative=1000.0),))
    missed = audit_snapshot(noisy, budget=SMALL, baseline=baseline, confirm=40)
    assert missed.confirmed.sum() < 3


@pytest.mark.parametrize(
    ("candidates", "count", "says"),
    [(0, 60, None), (40, 30, "only 27 other images, 37 are needed"), (3, 60, "3 candidates, and 3 images")],
)
def test_an_audit_that_cannot_confirm_says_why(build, photographs, candidates, count, says):
    baseline = with_gallery(photographs[0][:count], photographs[1][:count])
    snapshot = take(build, photographs, [3, 20, 21])
    record = audit_snapshot(snapshot, budget=SMALL, baseline=baseline, confirm=candidates)
    assert record.confirmed is None
    assert record.confirmed_chance != record.confirmed_chance
    assert ("not confirmed" in record.reason) == (says is not None)
    assert says is None or says in record.reason


def test_a_gallery_of_another_size_confirms_nobody(build, photographs):
    baseline = with_gallery(functional.interpolate(photographs[0], (20, 20)), photographs[1])
    record = audit_snapshot(take(build, photographs, [3]), budget=SMALL, baseline=baseline, confirm=40)
    assert record.confirmed is None
    assert "the model's image size" in record.reason


@pytest.mark.parametrize("confirmed", [None, torch.tensor([1.0, 0.0, 1.0, 1.0])])
def test_it_survives_json_and_is_no_part_of_the_risk(confirmed):
    record = audit_record(confirmed=confirmed, confirmed_chance=0.04)
    restored = AuditRecord.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))
    assert (restored.confirmed is None) == (confirmed is None)
    assert confirmed is None or torch.equal(restored.confirmed, confirmed)
    assert restored.confirmed_chance == 0.04
    assert RiskGate().verdict([restored]) == RiskGate().verdict([replace(record, confirmed=None)])


def test_training_logs_the_curve(tmp_path):
    images, labels = images_and_labels(40, seed=3)
    logger = RecordingLogger()
    audit = GradAudit(
        every_n_steps=4, budget=SMALL, executor="inline", gallery=(images, labels),
        settings=AuditSettings(confirm=30),
        dirpath=tmp_path,
    )  # fmt: skip
    trainer(audit, logger=logger).fit(Classifier(dropout=0.0), loader(32))
    values = [row["gradaudit/confirmed"] for _, row in logger.of_the_audit()]
    assert values == [float(record.confirmed.mean()) for record in audit.evidence.records]
    assert len(values) == 2
    assert sum(values) / 2 > 4 / 30


@pytest.mark.parametrize("confirm", [-1, True])
def test_a_number_of_candidates_that_is_none_is_refused(confirm):
    with pytest.raises(InvalidInputError, match="confirm"):
        AuditSettings(confirm=confirm)
