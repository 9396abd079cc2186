"""Defences that act in training: equal to a loop written by hand, and audited as what leaves."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from support import Classifier, images_and_labels, loader, trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import (
    ApplyDefences,
    AuditSettings,
    Budget,
    ClipLayers,
    ClipNorm,
    GaussianNoise,
    GradAudit,
    LaplaceNoise,
    PruneSmallest,
    Quantise,
    SignOnly,
    Soteria,
    ThreatModel,
    WithholdLayers,
)
from lightning_gradaudit.attacks import InvertingGradients
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.simulation.defences import apply_defences

EACH = [
    (ClipNorm(max_norm=0.1), GaussianNoise(std=0.01)),
    (ClipLayers(max_norm=0.05),),
    (LaplaceNoise(relative=0.5),),
    (PruneSmallest(share=0.9),),
    (SignOnly(),),
    (Quantise(bits=8),),
    (Quantise(bits=4, stochastic=False),),
    (Soteria(layer="net.5.weight", share=0.5),),
    (WithholdLayers(names=("net.0",)), GaussianNoise(relative=0.1)),
]


def fit(*callbacks, steps=6, accumulate=1, **options):
    pl.seed_everything(3, verbose=False)
    module = Classifier(dropout=0.0)
    run = trainer(*callbacks, max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, **options)
    run.fit(module, loader(64, shuffle=False))
    return module


def loop(defences, seed_at, *, steps=6, accumulate=1):
    """Train as `fit` does, in plain torch."""
    pl.seed_everything(3, verbose=False)
    module = Classifier(dropout=0.0)
    optimizer = module.configure_optimizers()
    images, labels = images_and_labels(64)
    batches = list(zip(images.split(4), labels.split(4), strict=True))
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            batch = batches[(step * accumulate + part) % len(batches)]
            (F.cross_entropy(module.net(batch[0]), batch[1]) / accumulate).backward()
        shared = apply_defences(defences, {n: p.grad for n, p in module.named_parameters()}, seed=seed_at(step))
        for name, parameter in module.named_parameters():
            parameter.grad = shared.get(name)
        optimizer.step()
    return module


def audit_of(tmp_path, **options):
    settings = AuditSettings(analysis=False, confirm=0, closed_forms=False, rungs=False)
    attack = InvertingGradients()
    return GradAudit(
        every_n_steps=3, budget=Budget(evaluations=2), executor="inline", dirpath=tmp_path,
        settings=settings, attack=attack, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("defences", "accumulate"), [(d, 1 + i % 2) for i, d in enumerate(EACH)], ids=str)
def test_training_equals_a_loop_by_hand_bit_for_bit(defences, accumulate):
    acting = ApplyDefences(defences, seed=7)
    found = fit(acting, accumulate=accumulate).state_dict()
    expected = loop(defences, acting.seed_at, accumulate=accumulate).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain = fit(accumulate=accumulate).state_dict()
    assert not all(torch.equal(found[name], plain[name]) for name in plain)


def test_without_defences_training_is_untouched():
    plain, found = fit().state_dict(), fit(ApplyDefences([])).state_dict()
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize(("defences", "first"), [(d, i % 2 == 0) for i, d in enumerate(EACH)], ids=str)
def test_the_audit_holds_what_leaves_and_training_is_the_same_with_it(tmp_path, defences, first):
    acting, audit = ApplyDefences(defences, seed=7), audit_of(tmp_path)
    callbacks = (acting, audit) if first else (audit, acting)
    found, expected = fit(*callbacks).state_dict(), loop(defences, acting.seed_at).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [record.step for record in audit.evidence.records] == [0, 3]
    assert not audit.evidence.faults
    for record in audit.evidence.records:
        assert record.valid
        assert record.self_test < 1e-4
        assert record.threat_model["view"] == "update"
        assert record.threat_model["defences"] == [repr(each) for each in defences]
        assert record.threat_model["defences_act"] is True


def test_an_adversary_with_another_seed_does_not_reproduce_the_gradient(tmp_path):
    class Forgetful(ApplyDefences):
        """Forget at each use which seed was used."""

        calls = 0

        def seed_at(self, step):
            self.calls += 1
            return self.calls

    audit = audit_of(tmp_path)
    fit(Forgetful([GaussianNoise(relative=1.0)]), audit)
    assert not any(record.valid for record in audit.evidence.records)


def test_imagined_defences_leave_training_alone_and_are_called_imagined(tmp_path):
    audit = audit_of(tmp_path, threat_model=ThreatModel(defences=[GaussianNoise(relative=1.0)]))
    plain, found = fit().state_dict(), fit(audit).state_dict()
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert audit.evidence.records[0].threat_model["defences_act"] is False


def test_a_seed_that_is_not_given_differs_from_run_to_run_and_is_not_shown():
    one, two = ApplyDefences([SignOnly()]), ApplyDefences([SignOnly()])
    assert one.seed_at(0) != two.seed_at(0)
    assert str(one._seed) not in repr(one)
    assert not one.state_dict()


class ByHand(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class LineSearch(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "callbacks", "options", "error", "named"),
    [
        (Classifier, [ApplyDefences([SignOnly()])], {"gradient_clip_val": 1.0}, InvalidInputError, "ClipNorm"),
        (Classifier, [ApplyDefences([SignOnly()])] * 2, {}, InvalidInputError, "one ApplyDefences"),
        (Classifier, [ApplyDefences([Soteria(layer="head")])], {}, InvalidInputError, "layer="),
        (Classifier, [ApplyDefences([WithholdLayers(names=["net"])])], {}, InvalidInputError, "nothing"),
        (ByHand, [ApplyDefences([SignOnly()])], {}, UnsupportedError, "manual optimization"),
        (LineSearch, [ApplyDefences([SignOnly()])], {}, UnsupportedError, "several times"),
        (Classifier, [ApplyDefences([SignOnly()]), GradAudit(view="reduced")], {}, UnsupportedError, "view='update'"),
        (Classifier, [ApplyDefences([SignOnly()]), GradAudit(view="delta")], {}, UnsupportedError, "view='update'"),
        (
            Classifier,
            [ApplyDefences([SignOnly()]), GradAudit(threat_model=ThreatModel(defences=[SignOnly()]))],
            {},
            InvalidInputError,
            "imagines",
        ),
    ],
)
def test_what_cannot_be_defended_is_refused_before_training(module, callbacks, options, error, named):
    built = module()
    with pytest.raises(error, match=named):
        trainer(*callbacks, max_steps=1, **options).fit(built, loader(8))


@pytest.mark.parametrize("defences", [[GaussianNoise], ["noise"], [SignOnly(), WithholdLayers(names=["net.0"])]])
def test_what_is_no_defence_is_refused(defences):
    with pytest.raises(InvalidInputError, match="defences"):
        ApplyDefences(defences)


def test_the_gradient_before_the_defence_is_still_a_view(tmp_path):
    audit = audit_of(tmp_path, view="local")
    fit(ApplyDefences([GaussianNoise(relative=30.0)], seed=1), audit)
    assert all(record.valid and record.defence_gap < 1e-4 for record in audit.evidence.records)
    assert audit.evidence.records[0].threat_model["defences"] == []


def test_several_processes_are_refused():
    class Two:
        world_size, gradient_clip_val, callbacks, optimizers = 2, None, (), ()

    with pytest.raises(UnsupportedError, match="devices=1"):
        ApplyDefences([SignOnly()]).on_fit_start(Two(), nn.Linear(2, 2))
