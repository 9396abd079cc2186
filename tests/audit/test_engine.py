"""The engine: one audit, the engine check, and the queue, driven by an executor that the test completes by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import HandDriven
from torch import nn
from torch.nn import functional

from lightning_gradaudit import (
    Auditor,
    Baseline,
    Budget,
    GaussianNoise,
    Outcome,
    RiskGate,
    Snapshot,
    Status,
    audit_snapshot,
)
from lightning_gradaudit.attacks import DLG, InvertingGradients, LinearLayerInversion
from lightning_gradaudit.audit.engine_check import check_engine, reference_snapshot
from lightning_gradaudit.errors import AuditLostError, DoubleBackwardError, InvalidInputError, NonFiniteGradientError

SMALL = Budget(evaluations=3)
CROSS_ENTROPY = functional.cross_entropy


# One audit


def test_a_record_holds_the_scores_of_the_reconstruction_against_the_truth(snap):
    snapshot = snap("conv", batch=3, side=16, step=7)
    record = audit_snapshot(snapshot, budget=Budget(evaluations=40))
    pixels = record.reconstruction.inputs.clamp(0, 1)
    mse = ((pixels[:, None] - snapshot.truth.inputs[None]) ** 2).flatten(2).mean(2)
    order = [int(mse[:, i].argmin()) if record.mse[i] == mse[:, i].min() else None for i in range(3)]
    for i in range(3):
        assert any(float(record.mse[i]) == pytest.approx(float(m), rel=1e-4) for m in mse[:, i]), order
    torch.testing.assert_close(record.psnr, -10 * record.mse.log10(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(((record.pixels - record.truth) ** 2).flatten(1).mean(1), record.mse)
    assert (record.step, record.batch_size, record.valid) == (7, 3, True)
    assert record.self_test < 1e-6
    assert (record.label_accuracy, record.evaluations) == (1.0, 40)
    simulated = snapshot.observation.simulate(record.reconstruction.inputs, record.reconstruction.labels)
    a, b = (torch.cat([t[n].flatten() for n in simulated]) for t in (simulated, snapshot.observation.gradients))
    assert record.gradient_similarity == pytest.approx(float(functional.cosine_similarity(a, b, dim=0)), abs=1e-5)


def test_the_same_seed_and_step_give_the_same_audit_and_others_another(snap):
    first, again = (audit_snapshot(snap("conv"), budget=SMALL) for _ in range(2))
    other_step = audit_snapshot(snap("conv", step=1), budget=SMALL)
    other_seed = audit_snapshot(snap("conv"), budget=SMALL, seed=1)
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, other_step.pixels)
    assert not torch.equal(first.pixels, other_seed.pixels)


def test_an_audit_moves_no_global_random_state(snap):
    snapshot = snap("dropout", mode="train")
    before = torch.get_rng_state()
    audit_snapshot(snapshot, budget=SMALL)
    check_engine(None, SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gradient_that_is_not_finite_is_an_error_of_its_own(snap):
    snapshot = snap("conv", step=5)
    gradients = dict(snapshot.observation.gradients)
    gradients["0.bias"] = torch.full_like(gradients["0.bias"], torch.inf)
    broken = replace(snapshot, observation=replace(snapshot.observation, gradients=gradients))
    with pytest.raises(NonFiniteGradientError, match="step 5"):
        audit_snapshot(broken)


@pytest.mark.parametrize("attack", ["InvertingGradients", InvertingGradients, 3])
def test_an_attack_that_is_none_is_refused_by_name(snap, attack):
    with pytest.raises(InvalidInputError, match="attack: expected an Attack"):
        audit_snapshot(snap("conv"), attack=attack)


def test_a_simulator_that_does_not_describe_the_step_makes_the_audit_invalid(snap):
    snapshot = snap("batchnorm", batch=2, mode="train")
    snapshot.observation.client.module.eval()
    record = audit_snapshot(snapshot, budget=SMALL)
    assert record.self_test > record.self_test_tolerance
    assert not record.valid


def test_declared_noise_is_valid_and_its_gap_is_recorded(snap):
    record = audit_snapshot(snap("conv", defences=(GaussianNoise(relative=3.0),)), budget=SMALL)
    assert record.valid
    assert record.defence_gap > 0.5
    assert record.threat_model["defences"] == ["GaussianNoise(relative=3.0, std=None)"]


# The engine check


@pytest.mark.parametrize("attack", [None, InvertingGradients(), DLG()], ids=["default", "InvertingGradients", "DLG"])
def test_the_engine_check_passes_with_a_working_budget(attack):
    result = check_engine(attack, Budget(evaluations=400))
    assert result.passed
    assert set(result.psnr) == {"LinearLayerInversion", "Auto" if attack is None else attack.name}
    assert min(result.psnr.values()) >= 18


@pytest.mark.parametrize("attack", [InvertingGradients(), DLG()], ids=lambda a: a.name)
def test_the_engine_check_fails_when_the_attack_is_starved(attack):
    result = check_engine(attack, Budget(evaluations=2))
    assert not result.passed
    assert result.psnr[attack.name] < 18
    assert "FAILED" in str(result)


def test_the_engine_check_is_about_each_attack_and_not_about_the_best():
    """The closed form solves the reference alone; a broken matching attack must not hide behind it."""
    result = check_engine(InvertingGradients(), Budget(evaluations=2))
    assert result.psnr["LinearLayerInversion"] > 60
    assert not result.passed


def test_the_reference_leaks_by_hand():
    snapshot = reference_snapshot()
    gradients = snapshot.observation.gradients
    image = (gradients["1.weight"][0] / gradients["1.bias"][0]).reshape(1, 1, 16, 16)
    torch.testing.assert_close(image, snapshot.truth.inputs, rtol=0, atol=1e-3)


# The trap


@pytest.fixture(scope="module")
def trained_mlp(faces):
    """An MLP that no longer yields to plain gradient matching, though its first layer gives the image away."""
    images, labels = faces
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(625, 128), nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        for part in torch.arange(200).split(20):
            optimizer.zero_grad()
            CROSS_ENTROPY(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model


def test_the_trap_an_mlp_that_resists_matching_is_blocked(faces, trained_mlp):
    images, labels = faces
    baseline = Baseline()
    baseline.observe(images)
    snapshot = Snapshot.from_batch(trained_mlp, (images[:1], labels[:1]), loss=CROSS_ENTROPY)
    record = audit_snapshot(snapshot, baseline=baseline)
    assert float(record.psnr) > 60
    assert record.outcome is Outcome.EXACT
    assert record.copied.tolist() == [True]
    verdict = RiskGate().verdict([record])
    assert (verdict.status, verdict.risk) == (Status.BLOCK, pytest.approx(1.0, abs=1e-4))


def test_the_trap_a_failed_attack_against_a_certificate_is_unknown_and_never_safe(faces, trained_mlp):
    images, labels = faces
    baseline = Baseline()
    baseline.observe(images)
    baseline.remember(images[100:164], images[100:164])
    snapshot = Snapshot.from_batch(trained_mlp, (images[:1], labels[:1]), loss=CROSS_ENTROPY)
    failed = audit_snapshot(
        snapshot, attack=InvertingGradients(), baseline=baseline, closed_forms=False, budget=Budget(evaluations=2)
    )
    assert (failed.exact_leaks.tolist(), failed.copied.tolist()) == ([True], [False])
    assert failed.valid
    # Everything else is as clean as can be: only the certificate stands in the way of a PASS.
    calm = replace(
        failed,
        gradient_similarity=1.0,
        exposure=torch.zeros(1),
        identified=torch.zeros(1),
        chance_hits=0.0,
        chance_trials=64,
    )
    ignorant = [replace(calm, exact_leaks=torch.tensor([False]), step=i, digests=(f"{i}",)) for i in range(40)]
    engine = check_engine(None, Budget(evaluations=400))
    gate = RiskGate()
    assert gate.verdict(ignorant, step=40, engine=engine, engine_required=True).status is Status.PASS
    verdict = gate.verdict([*ignorant, replace(calm, step=40)], step=40, engine=engine, engine_required=True)
    assert verdict.status is Status.UNKNOWN
    assert "the gradient holds the images" in str(verdict)


def test_a_leak_found_without_labels_is_reported_as_the_copy_it_is(faces, trained_mlp):
    """The closed form needs no label for one image; a loss without label recovery must not discard it."""
    images, labels = faces
    squared = lambda z, y: ((z - functional.one_hot(y, 2)) ** 2).mean()
    snapshot = Snapshot.from_batch(trained_mlp, (images[:1], labels[:1]), loss=squared)
    record = audit_snapshot(snapshot, budget=SMALL)
    assert record.exact_leaks.tolist() == [True]
    assert float(record.psnr) > 60


# The queue


@pytest.fixture
def executor():
    return HandDriven()


@pytest.fixture
def auditor(executor):
    return Auditor(executor=executor, budget=SMALL, queue_size=3, engine_check=False)


@pytest.fixture(scope="module")
def steps(snap):
    return [snap("conv", step=step) for step in range(6)]


def test_the_queue_is_bounded_and_counts_what_it_drops(auditor, executor, steps):
    assert [auditor.submit(s) for s in steps] == [True, True, True, False, False, False]
    assert (auditor.submitted, auditor.dropped, auditor.pending) == (3, 3, 3)
    assert len(executor.work) == 3
    executor.run(0)
    assert len(auditor.collect()) == 1
    assert auditor.submit(steps[3])


def test_records_come_first_in_first_out_whatever_finishes_first(auditor, executor, steps):
    for snapshot in steps[:3]:
        auditor.submit(snapshot)
    executor.run(2)
    assert auditor.collect() == []
    executor.run(0)
    assert [r.step for r in auditor.collect()] == [0]
    executor.run(1)
    assert [r.step for r in auditor.collect()] == [1, 2]
    assert (auditor.completed, auditor.failed, auditor.pending) == (3, 0, 0)
    assert auditor.collect(wait=0.01) == []


def test_a_workers_error_is_raised_once_and_costs_no_other_audit(auditor, executor, steps):
    for snapshot in steps[:3]:
        auditor.submit(snapshot)
    executor.run(0)
    executor.fail(1, DoubleBackwardError("no second derivative"))
    executor.run(2)
    assert [r.step for r in auditor.collect()] == [0]
    with pytest.raises(DoubleBackwardError, match="no second derivative"):
        auditor.collect()
    assert [r.step for r in auditor.collect()] == [2]
    assert auditor.collect() == []
    assert (auditor.completed, auditor.failed) == (2, 1)


def test_a_cancelled_audit_is_raised_once_and_costs_no_other_audit(auditor, executor, steps):
    """Executors cancel what has not begun when they are shut down; the queue must not stick on it."""
    for snapshot in steps[:3]:
        auditor.submit(snapshot)
    executor.run(0)
    executor.work[1][0].cancel()
    executor.run(2)
    seen, errors = [], 0
    for _ in range(5):
        try:
            seen += [r.step for r in auditor.collect()]
        except AuditLostError:
            errors += 1
    assert (seen, errors, auditor.pending) == ([0, 2], 1, 0)


def test_finished_audits_feed_the_null_of_later_ones(auditor, executor, steps):
    auditor.submit(steps[0])
    executor.run(0)
    assert auditor.baseline.guesses == 0  # not before it is collected
    (first,) = auditor.collect()
    assert auditor.baseline.guesses == 1
    auditor.submit(steps[1])
    executor.run(1)
    assert not first.null_complete
    assert len(auditor.collect()) == 1
    assert auditor.baseline.guesses == 2


def test_an_audit_is_scored_against_the_baseline_as_it_was_at_submission(auditor, executor, snap):
    """Its own class of image, seen meanwhile, must not change a result that is under way."""
    auditor.submit(snap("conv"))
    auditor.baseline.remember(torch.rand(64, 1, 8, 8), torch.rand(64, 1, 8, 8))
    executor.run(0)
    (record,) = auditor.collect()
    assert record.null.tolist() == [0.0]
    assert not record.null_complete


def test_the_engine_check_runs_before_the_first_audit_and_once(executor, steps):
    auditor = Auditor(executor=executor, budget=SMALL)
    auditor.submit(steps[0])
    auditor.submit(steps[1])
    assert len(executor.work) == 3
    assert auditor.engine is None
    executor.run(0)
    auditor.collect()
    assert auditor.engine == check_engine(None, SMALL)
    assert not auditor.engine.passed


def test_an_engine_check_that_breaks_is_raised_once_and_leaves_the_engine_unknown(executor, steps):
    auditor = Auditor(executor=executor, budget=SMALL)
    auditor.submit(steps[0])
    executor.fail(0, RuntimeError("no memory"))
    executor.run(1)
    with pytest.raises(RuntimeError, match="no memory"):
        auditor.collect()
    assert auditor.engine is None
    assert [r.step for r in auditor.collect()] == [0]


def test_a_foreign_executor_is_not_shut_down_and_closing_twice_is_safe(auditor, executor, steps, monkeypatch):
    closed = []
    monkeypatch.setattr(executor, "shutdown", lambda *a, **k: closed.append(1))
    auditor.submit(steps[0])
    auditor.close()
    auditor.close()
    assert (closed, auditor.pending) == ([], 0)


@pytest.mark.parametrize("name", ["inline", "thread"])
def test_the_built_in_executors_give_the_record_of_a_plain_call(name, steps):
    auditor = Auditor(executor=name, budget=SMALL)
    auditor.submit(steps[2])
    (record,) = auditor.collect(wait=60)
    expected = audit_snapshot(steps[2], budget=SMALL)
    auditor.close()
    assert torch.equal(record.pixels, expected.pixels)
    assert record.matching_loss == expected.matching_loss
    assert auditor.engine == check_engine(None, SMALL)


def test_another_process_gives_the_same_record_and_gets_a_class_that_cannot_be_imported(steps):
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 2)

        def forward(self, x):
            return self.head(x.flatten(1))

    images = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    snapshot = Snapshot.from_batch(Local(), (images, torch.tensor([1])), loss=CROSS_ENTROPY)
    auditor = Auditor(executor="process", budget=SMALL, engine_check=False)
    auditor.submit(snapshot)
    (record,) = auditor.collect(wait=120)
    auditor.close()
    assert record.outcome is Outcome.EXACT
    torch.testing.assert_close(record.pixels, images, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"queue_size": 0}, "queue_size"),
        ({"executor": "processes"}, "executor"),
        ({"executor": None}, "executor"),
        ({"attack": "DLG"}, "attack"),
    ],
)
def test_an_auditor_refuses_misuse_by_name(arguments, named):
    with pytest.raises(InvalidInputError, match=named):
        Auditor(**arguments)


def test_a_small_image_is_scored_without_ssim_and_says_so():
    images = torch.rand((1, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    record = audit_snapshot(Snapshot.from_batch(model, (images, torch.tensor([0])), loss=CROSS_ENTROPY), budget=SMALL)
    assert record.measure == "nmse"
    assert math.isnan(float(record.ssim))
    assert float(record.exposure) == pytest.approx(1, abs=1e-3)


def test_closed_forms_go_before_the_configured_attack_unless_turned_off(snap):
    with_closed = audit_snapshot(snap("mlp"), attack=DLG(), budget=SMALL)
    without = audit_snapshot(snap("mlp"), attack=DLG(), budget=SMALL, closed_forms=False)
    names = "LinearLayerInversion > SpanInversion > PatchEmbeddingInversion > DLG"
    assert (with_closed.attack, without.attack) == (names, "DLG")
    assert (with_closed.outcome, without.outcome) == (Outcome.EXACT, Outcome.BUDGET_SPENT)
    assert with_closed.reconstruction.attack == LinearLayerInversion().name


def test_an_attack_that_failed_to_match_is_told_from_one_that_noise_defeated():
    """Beyond the noise the attack matches better than the truth does; on a hard network it stays far below it."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand((4, 1, 12, 12), generator=generator), torch.tensor([0, 1, 2, 1])
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.LazyConv2d(12, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU())]
    deep = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    deep(images)
    hard = Snapshot.from_batch(deep, (images, labels), loss=CROSS_ENTROPY, mode="train")
    failed = audit_snapshot(hard, budget=Budget(evaluations=10))
    assert failed.valid
    assert failed.truth_similarity == pytest.approx(1, abs=1e-4)
    assert failed.unmatched

    shallow = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    noisy = Snapshot.from_batch(shallow, (images, labels), loss=CROSS_ENTROPY, defences=(GaussianNoise(relative=30.0),))
    defeated = audit_snapshot(noisy, budget=Budget(evaluations=150))
    assert defeated.truth_similarity < 0.2
    assert not defeated.unmatched


def test_labels_that_the_loss_ignores_do_not_break_the_audit():
    """-100 is the label that PyTorch's cross-entropy leaves out."""
    images = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    snapshot = Snapshot.from_batch(model, (images, torch.tensor([1, -100, 0])), loss=CROSS_ENTROPY)
    record = audit_snapshot(snapshot, budget=SMALL)
    assert record.valid
    assert not record.label_accuracy > 2 / 3 + 1e-6


@pytest.mark.parametrize(
    ("similarity", "truth", "loss", "unmatched"),
    [
        (0.3, 1.0, 0.91, True),  # no noise: nothing excuses a bad match
        (0.1, 0.7, 1.0, True),  # noise of the gradient's own norm leaves half of it at the truth
        (0.1, 0.7, 0.51, False),
        (-0.01, 0.03, 1.0002, False),  # noise that leaves nothing: the likeliest image is a guess
        (0.01, 0.03, 1.2, True),  # but not a search that went astray
    ],
)
def test_what_noise_leaves_is_no_failure_of_the_attack(snap, similarity, truth, loss, unmatched):
    record = audit_snapshot(snap("mlp"), budget=SMALL)
    changed = replace(record, gradient_similarity=similarity, truth_similarity=truth, matching_loss=loss)
    assert changed.unmatched is unmatched
