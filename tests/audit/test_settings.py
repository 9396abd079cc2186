"""`AuditSettings`: one object for the callback, the queue and a single audit."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from lightning_gradaudit import Auditor, AuditSettings, Budget, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import DLG
from lightning_gradaudit.audit.settings import SettingsChanges
from lightning_gradaudit.errors import InvalidInputError

SMALL = Budget(evaluations=5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attack", "dlg"),
        ("attack", DLG),
        ("budget", 800),
        ("analysis", "yes"),
        ("confirm", -1),
        ("confirm", True),
        ("seed", 0.5),
        ("device", "gpu:a"),
    ],
)
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(InvalidInputError, match=field):
        AuditSettings(**{field: value})


def test_an_unknown_keyword_is_named_with_those_that_exist(snap):
    for call in (lambda **given: audit_snapshot(snap("mlp"), **given), Auditor):
        with pytest.raises(TypeError, match=r"'atack'.* attack, budget"):
            call(atack=DLG())


def test_the_typed_keywords_are_the_fields():
    assert list(SettingsChanges.__annotations__) == [field.name for field in fields(AuditSettings)]
    assert {field.name: str(field.type) for field in fields(AuditSettings)} == {
        name: given.__forward_arg__ for name, given in SettingsChanges.__annotations__.items()
    }


def test_keywords_change_the_settings_given(snap):
    settings = AuditSettings(attack=DLG(), closed_forms=False, budget=Budget(evaluations=9), seed=3)
    given = audit_snapshot(snap("conv"), settings, budget=SMALL)
    named = audit_snapshot(snap("conv"), attack=DLG(), closed_forms=False, budget=SMALL, seed=3)
    assert given.attack == named.attack == "DLG"
    assert given.evaluations == named.evaluations == 5
    assert torch.equal(given.exposure, named.exposure)
    assert settings.budget == Budget(evaluations=9)


def test_the_caller_decides_about_analysis_and_confirmation_unless_told(snap):
    assert audit_snapshot(snap("mlp"), budget=SMALL).ceiling is None
    auditor = Auditor(AuditSettings(analysis=True), budget=SMALL)
    assert (auditor.settings.analysis, auditor.settings.confirm, auditor.settings.budget) == (True, 0, SMALL)
    auditor = Auditor()
    assert (auditor.settings.analysis, auditor.settings.confirm) == (False, 0)


def test_the_device_is_where_the_attack_runs(snap, monkeypatch):
    moved = []
    monkeypatch.setattr(Snapshot, "to", lambda snapshot, device: moved.append(device) or snapshot)
    audit_snapshot(snap("mlp"), budget=SMALL)
    assert moved == []
    audit_snapshot(snap("mlp"), budget=SMALL, device="cuda:1")
    assert moved == ["cuda:1"]
