"""The ceiling in an audit's record and in the gate."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from exact import dense, resolved_exactly
from test_gate import clean, verdict
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import AuditRecord, Budget, GaussianNoise, RiskGate, Snapshot, Status, audit_snapshot
from lightning_gradaudit.analysis import Analysis, NaturalImages, analyse
from lightning_gradaudit.analysis.first_step import SETTINGS
from lightning_gradaudit.analysis.jacobian import InPixels, Jacobian
from lightning_gradaudit.attacks import LinearLayerInversion
from lightning_gradaudit.errors import DoubleBackwardError, InvalidInputError, UnsupportedError
from lightning_gradaudit.simulation.normalization import Normalization

BUDGET = Budget(evaluations=5)


def test_the_ceiling_is_never_below_what_was_reached_or_is_given_away(snap):
    record = audit_snapshot(snap("mlp"), budget=BUDGET, analysis=Analysis(steps=5))
    assert record.ceiling.shape == record.exposure.shape
    assert bool((record.ceiling >= record.exposure.clamp(0, 1)).all())
    assert bool((record.ceiling <= 1).all())
    assert bool((record.ceiling[record.exact_leaks.bool()] == 1).all())


def test_without_analysis_there_is_no_ceiling(snap):
    assert audit_snapshot(snap("mlp"), budget=BUDGET).ceiling is None


def test_a_failed_analysis_leaves_the_audit_and_says_why(snap, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("lightning_gradaudit.audit.engine.analyse", fail)
    record = audit_snapshot(snap("mlp"), budget=BUDGET, analysis=True)
    assert record.ceiling is None
    assert "no memory left" in record.reason
    assert record.valid


@pytest.mark.parametrize(("ceiling", "status"), [(0.2, "PASS"), (0.8, "UNKNOWN"), (None, "UNKNOWN")])
def test_a_high_or_missing_ceiling_turns_pass_into_unknown(ceiling, status):
    records = [replace(r, ceiling=None if ceiling is None else torch.tensor([ceiling])) for r in clean(40)]
    assert verdict(records).status is Status.PASS
    found = verdict(records, RiskGate(max_ceiling=0.5))
    assert found.status == Status(status)
    assert status == "PASS" or "ceiling" in " ".join(found.reasons)


def test_a_ceiling_outside_its_range_is_refused():
    with pytest.raises(InvalidInputError, match="max_ceiling"):
        RiskGate(max_ceiling=1.5)


def found(snapshot, **settings):
    return analyse(snapshot, Analysis(**settings), generator=torch.Generator().manual_seed(0))


def of_faces(faces, model, chosen=(0,), **kwargs):
    images, labels = faces
    chosen = list(chosen)
    return Snapshot.from_batch(model, (images[chosen], labels[chosen]), loss=F.cross_entropy, **kwargs)


def test_a_run_ends_when_its_bounds_meet_and_says_what_it_cost(faces, build):
    snapshot = of_faces(faces, build("conv"), (0, 150))
    quick, whole = found(snapshot, precision=1e-2), found(snapshot, precision=1e-2, tolerance=0.0)
    # Two for the adjoint, one for the layers' shares, three for the rays; the first step's slope and its solve.
    besides = 6 + 1 + 2 * SETTINGS.krylov_steps
    assert whole.products == 2 * 40 + besides
    assert quick.products < whole.products
    assert float((quick.leak_r2 - quick.leak_r2_low).mean()) <= 0.02
    assert float(whole.leak_r2_low.mean()) >= float(quick.leak_r2_low.mean()) - 1e-6
    assert float(whole.leak_r2.mean()) <= float(quick.leak_r2.mean()) + 1e-6
    assert f"{(quick.products - besides) // 2}" in " ".join(quick.assumptions)


def test_a_record_keeps_the_bracket_and_its_curve_through_json(snap):
    record = audit_snapshot(snap("conv", batch=2), budget=BUDGET, analysis=True)
    restored = AuditRecord.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))
    torch.testing.assert_close(restored.bracket, record.bracket)
    assert restored.bracket.shape == (2, 2)
    assert bool((restored.bracket[:, 0] <= restored.bracket[:, 1]).all())
    assert restored.leakage.curve == record.leakage.curve
    precisions, high, low = zip(*restored.leakage.curve, strict=True)
    assert precisions == (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    assert list(high) == sorted(high)  # the more precise, the more
    assert all(above >= below - 1e-6 for above, below in zip(high, low, strict=True))
    assert restored.leakage.layers == record.leakage.layers
    assert restored.leakage.training_steps > 0
    assert AuditRecord.from_dict(audit_snapshot(snap("mlp"), budget=BUDGET).to_dict()).leakage is None


def test_noise_lowers_the_ceiling_and_so_does_freezing_the_layer_that_leaks(faces, build):
    values = []
    for defences in ((), (GaussianNoise(relative=1.0),), (GaussianNoise(relative=10.0),)):
        record = audit_snapshot(of_faces(faces, build("conv"), defences=defences), budget=BUDGET, analysis=True)
        values.append(float(record.ceiling))
    assert values[0] > values[1] + 0.05 > values[2] + 0.1
    model = build("mlp")
    leaky = audit_snapshot(of_faces(faces, model), budget=BUDGET, analysis=True)
    model.get_submodule(leaky.leakage.leaking_layer).requires_grad_(False)
    frozen = audit_snapshot(of_faces(faces, model), budget=BUDGET, analysis=True)
    assert leaky.leakage.leaking_layer not in frozen.leakage.layers
    assert float(frozen.leakage.leak_r2) < float(leaky.leakage.leak_r2_low)
    assert float(frozen.ceiling) < float(leaky.ceiling) == 1
    assert float(leaky.effort) < float(frozen.effort)


def test_of_a_duplicate_only_the_sum_is_seen(snap):
    """The gradient of two equal images is (g(x₁) + g(x₂))/2: half of their variance cannot be told, noise counts √2."""
    single = snap("sigmoid")
    truth = single.truth
    labels = truth.labels.repeat(2)
    twice = Jacobian(single.observation, truth.inputs.repeat(2, 1, 1, 1), labels, double=True)
    once = Jacobian(single.observation, truth.inputs, truth.labels, double=True)

    def leak(jacobian, batch, sigma):
        linear = InPixels(jacobian, torch.Size((batch, 1, 8, 8)), Normalization(), NaturalImages())
        resolution = resolved_exactly(linear, blocks=batch)
        return resolution.leak_r2(sigma)

    sigma = 1e-2 * float(once.gradient.norm())
    expected = leak(once, 1, 2**0.5 * sigma) / 2
    assert 0.05 < float(expected) < 0.45
    torch.testing.assert_close(leak(twice, 2, sigma), expected.expand(2), rtol=1e-8, atol=1e-10)


class Flash(nn.Module):
    """Calls an attention kernel by its internal name, where no definition can take its place."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x):
        features = self.first(x.flatten(1)).reshape(x.shape)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return self.head(kernel(features, features, features)[0].flatten(1))


class Attentive(nn.Module):
    """Calls the fused attention kernel, which has no second derivative."""

    def __init__(self):
        super().__init__()
        self.project, self.head = nn.Linear(8, 24), nn.Linear(64, 2)

    def forward(self, x):
        q, k, v = self.project(x[:, 0]).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1))


def random_batch(model, dtype=torch.float32):
    images = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(3)).to(dtype)
    return Snapshot.from_batch(model, (images, torch.tensor([1])), loss=F.cross_entropy)


def test_an_operation_without_a_second_derivative_is_named_and_leaves_the_audit():
    record = audit_snapshot(random_batch(Flash()), attack=LinearLayerInversion(), budget=BUDGET, analysis=True)
    assert record.ceiling is None
    assert record.leakage is None
    assert "flash_attention" in record.reason
    with pytest.raises(DoubleBackwardError, match="flash_attention"):
        found(random_batch(Flash()))


def test_fused_attention_is_analysed_as_its_definition():
    torch.manual_seed(0)
    fused = Attentive()
    snapshot = random_batch(fused)
    jacobian = Jacobian(snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels, double=True)

    def by_definition(x):
        q, k, v = F.linear(x[:, 0], *leaves[:2]).chunk(3, dim=-1)
        attended = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
        loss = F.cross_entropy(F.linear(attended.flatten(1), *leaves[2:]), torch.tensor([1]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, create_graph=True)])

    leaves = [p.detach().double().requires_grad_() for p in fused.parameters()]
    expected = torch.autograd.functional.jacobian(by_definition, snapshot.truth.inputs.double()).flatten(1)
    torch.testing.assert_close(dense(jacobian), expected, rtol=1e-9, atol=1e-12)
    assert 0 < float(found(snapshot).leak_r2) <= 1


def test_too_large_a_batch_is_refused_with_what_would_fit(snap, monkeypatch):
    monkeypatch.setattr("lightning_gradaudit.analysis.ceiling.MAX_BASIS", 64 * 10)
    with pytest.raises(UnsupportedError, match="at most 9"):
        found(snap("conv"))
    assert float(found(snap("conv"), steps=9).leak_r2) > 0
    record = audit_snapshot(snap("conv"), budget=BUDGET, analysis=True)
    assert record.ceiling is None
    assert "at most 9" in record.reason


def test_integer_images_are_analysed_as_the_numbers_that_they_are_converted_to(build):
    pixels = torch.randint(0, 255, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = build("sigmoid", side=8)
    as_bytes, as_numbers = (
        found(Snapshot.from_batch(model, (x, torch.tensor([1])), loss=F.cross_entropy, mean=0.0, std=1 / 255))
        for x in (pixels, pixels.float())
    )
    assert torch.equal(as_bytes.leak_r2, as_numbers.leak_r2)


def test_a_bfloat16_model_is_analysed_in_float32_and_the_record_says_so(build):
    model = build("sigmoid", side=8)
    wide = found(random_batch(model.bfloat16().float()))
    record = audit_snapshot(random_batch(model.bfloat16(), torch.bfloat16), budget=BUDGET, analysis=True)
    assert any("bfloat16" in text for text in record.leakage.assumptions)
    assert float(record.leakage.leak_r2) == pytest.approx(float(wide.leak_r2), abs=0.05)


@pytest.mark.parametrize("shared", ["5.bias", "0.bias"])
def test_a_gradient_of_few_numbers_has_a_finite_ceiling(snap, shared):
    """Two or twelve rows for 64 pixels: J has a large null space."""
    snapshot = snap("conv")
    few = {shared: snapshot.observation.gradients[shared]}
    leakage = found(replace(snapshot, observation=replace(snapshot.observation, gradients=few)))
    assert 0 <= float(leakage.leak_r2_low) <= float(leakage.leak_r2) + 1e-6 < 0.9
    assert bool(torch.isfinite(leakage.noise_to_hide).all())


@pytest.mark.parametrize("settings", [{"tolerance": -0.1}, {"tolerance": 1.0}, {"precision": 0.0}, {"steps": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidInputError, match=next(iter(settings))):
        Analysis(**settings)
