"""The engine: audit one snapshot, and check that the attacks work at all. Knows nothing of Lightning."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradaudit.analysis.ceiling import Analysis, Leakage, analyse
from lightning_gradaudit.analysis.certificates import exact_leaks
from lightning_gradaudit.analysis.effort import EXPOSED, effort_curve
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.closed_form.features import feature_exposure, recover_features, true_features
from lightning_gradaudit.attacks.compilation.evaluation_graph import Compilation, compiled_evaluation
from lightning_gradaudit.attacks.defaults import full_attack
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.audit.confirmation import confirm as confirm_among
from lightning_gradaudit.audit.record import COPY_PSNR, AuditRecord
from lightning_gradaudit.audit.self_test import self_test_tolerance
from lightning_gradaudit.errors import NonFiniteGradientError, described
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.metrics.functional.gradients import gradient_similarity, label_multiset_accuracy
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.utils.digests import PROCESS_KEY, ImageKey
from lightning_gradaudit.utils.tensors import global_norm


def audit_snapshot(
    snapshot: Snapshot,
    *,
    attack: Attack | None = None,
    budget: Budget = Budget(evaluations=800),  # noqa: B008 - immutable
    closed_forms: bool = True,
    baseline: Baseline | None = None,
    analysis: bool | Analysis = False,
    confirm: int = 0,
    compile: bool = False,  # noqa: A002 - torch's word
    seed: int = 0,
    image_key: ImageKey | None = None,
) -> AuditRecord:
    """Audit one step: self-test, structural certificate, attack, score against truth and null.

    Args:
        snapshot: The step; only its `observation` reaches the attack.
        attack: Matching attack; None: `attacks.Auto`, which picks by what is known and by a race.
        budget: Largest effort of all attacks together.
        closed_forms: Try exact solutions first. Turning them off is for studies, not for audits.
        baseline: Gallery and null; None: an empty one (the null is 0, nobody can be identified).
        analysis: Also estimate what any attacker could get (`AuditRecord.ceiling` and `leakage`): True or settings.
            It costs at most two products with the gradient's Jacobian for each of `Analysis.steps` and a few more.
            Where it fails the ceiling is None and `reason` says why.
        confirm: Also ask whether somebody who has this many candidate photographs, the batch's among them, could name
            it (`AuditRecord.confirmed`); 0: do not. It costs one gradient of a single image for each, or two of a whole
            batch under train-mode BatchNorm, and needs a gallery of images as large as the model's, with labels or
            for classes that can be recovered. Where it fails `reason` says why.
        compile: Compile gradient matching in the background (see `attacks.compiled_evaluation`). Where that is
            impossible the attack goes on eagerly and `reason` says why.
        seed: Seeds the attack, together with the step.
        image_key: Tells the images of a run apart without showing them; None: one key for all audits of this process.

    Raises:
        NonFiniteGradientError: When the gradient holds NaN or infinity.
        DoubleBackwardError: When the model has an operation without a second derivative.
        ReplayError: When the training step cannot be simulated.
    """
    start = time.monotonic()
    attack = full_attack(attack, closed_forms=closed_forms)
    observation = snapshot.observation
    if not torch.isfinite(global_norm(observation.gradients)):
        raise NonFiniteGradientError(f"gradients: step {snapshot.step} has NaN or infinite values; not audited.")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + snapshot.step) % 2**63)
    self_test = snapshot.self_test()
    if observation.threat_model.batch_size is not None:
        snapshot = snapshot.with_batch_size(observation.threat_model.batch_size)
        observation = snapshot.observation
    leaks = exact_leaks(snapshot, generator=generator)
    with compiled_evaluation() if compile else nullcontext(Compilation()) as compilation:
        reconstruction = attack(observation, budget=budget, generator=generator)
    pixels = observation.normalization.to_pixels(reconstruction.inputs.float()).clamp(0, 1).nan_to_num(0.5)
    scores = (baseline or Baseline()).score(pixels, snapshot.truth_pixels, snapshot.truth.labels)
    attacked = reconstruction.outcome not in (Outcome.NOT_APPLICABLE, Outcome.NONFINITE)
    if not attacked:
        scores = scores.unmeasured()  # no attack made these images: their scores would read as safety
    key = PROCESS_KEY if image_key is None else image_key
    curve = effort_curve(reconstruction, snapshot, null=scores.null, measure=scores.measure) if attacked else None
    similarity, matching_loss = _match(reconstruction, snapshot)
    leakage, failure = _leakage(snapshot, analysis, leaks, generator)
    confirmed, chance, unconfirmed = _confirmed(snapshot, baseline, confirm, generator)
    return AuditRecord(
        step=snapshot.step,
        attack=attack.name,
        outcome=reconstruction.outcome,
        exposure=scores.exposure,
        psnr=scores.psnr,
        ssim=scores.ssim,
        mse=scores.mse,
        identified=scores.identified,
        null=scores.null,
        exact_leaks=leaks,
        copied=scores.psnr >= COPY_PSNR,  # False where nothing was measured
        gallery=int(scores.gallery.min()),
        chance_hits=scores.chance_hits,
        chance_trials=scores.chance_trials,
        null_complete=scores.null_complete,
        label_accuracy=_label_accuracy(reconstruction, snapshot),
        matching_loss=matching_loss,
        gradient_similarity=similarity,
        truth_similarity=self_test.similarity,
        self_test=self_test.error,
        self_test_tolerance=self_test_tolerance(observation),
        defence_gap=self_test.defence_gap,
        noise=self_test.noise,
        declared_noise=self_test.declared_noise,
        evaluations=reconstruction.evaluations,
        seconds=time.monotonic() - start,
        threat_model=observation.threat_model.to_dict() | observation.protocol.to_dict(),
        measure=scores.measure,
        reason="; ".join(filter(None, (reconstruction.reason, *compilation.reasons, failure, unconfirmed))),
        ceiling=None if leakage is None else _ceiling(leakage, scores.exposure, leaks),
        leakage=leakage,
        effort=None if curve is None else curve.effort(EXPOSED),
        effort_exposure=EXPOSED,
        features=_features(snapshot, generator),
        confirmed=confirmed,
        confirmed_chance=chance,
        ids=snapshot.truth.ids,
        digests=key.digests(snapshot.truth_pixels),
        session=key.session,
        reconstruction=reconstruction,
        pixels=pixels.cpu()[scores.order],
        truth=snapshot.truth_pixels.cpu(),
    )


def _leakage(
    snapshot: Snapshot, analysis: bool | Analysis, leaks: Tensor, generator: torch.Generator
) -> tuple[Leakage | None, str]:
    """Return the analysis of a step, or None and why there is none. What algebra gives away needs no search."""
    if not analysis:
        return None, ""
    try:
        found = analyse(snapshot, Analysis() if analysis is True else analysis, generator=generator)
    except Exception as error:  # an audit must not fail because of what is measured besides
        return None, f"no ceiling: {described(error)}"
    if not bool(torch.isfinite(found.leak_r2).all()):
        return None, "no ceiling: the analysis was not finite"
    return replace(found, reach=torch.where(leaks.cpu().bool(), 1.0, found.reach)), ""


def _ceiling(leakage: Leakage, exposure: Tensor, leaks: Tensor) -> Tensor:
    """Return what any attacker could get of each image, (B,) in [0, 1].

    What was reached, or is given away by algebra, is possible whatever a local estimate says.
    """
    best = torch.fmax(leakage.leak_r2, exposure.cpu().to(leakage.leak_r2))
    return torch.where(leaks.cpu().bool(), torch.ones_like(best), best).clamp(0, 1)


def _features(snapshot: Snapshot, generator: torch.Generator) -> dict[str, float]:
    recovered = recover_features(snapshot.observation, generator=generator, search=False)
    if not recovered:
        return {}
    truth = true_features(snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels)
    return feature_exposure(recovered, truth)


def _confirmed(
    snapshot: Snapshot, baseline: Baseline | None, candidates: int, generator: torch.Generator
) -> tuple[Tensor | None, float, str]:
    """Return which images were named among candidates, (B,), the chance of that, and why there is no answer."""
    if not candidates:
        return None, math.nan, ""
    try:
        found = confirm_among(snapshot, baseline or Baseline(), candidates=candidates, generator=generator)
    except Exception as error:  # an audit must not fail because of what is measured besides
        found = described(error)
    if isinstance(found, str):
        return None, math.nan, f"not confirmed: {found}"
    return found.named, found.chance, ""


def _label_accuracy(reconstruction: Reconstruction, snapshot: Snapshot) -> float:
    labels, truth = reconstruction.labels, snapshot.truth.labels
    if labels is None or truth.is_floating_point() or truth.ndim != 1:
        return math.nan
    return float(label_multiset_accuracy(labels.to(truth), truth))


def _match(reconstruction: Reconstruction, snapshot: Snapshot) -> tuple[float, float]:
    """Return cosine and relative squared error of the gradient at a reconstruction; NaN where it has none.

    Simulated here, once more: whether an attack matched is not for the attack to say.
    """
    if reconstruction.outcome in (Outcome.NOT_APPLICABLE, Outcome.NONFINITE):
        return math.nan, math.inf
    if reconstruction.labels is None:
        return math.nan, math.nan
    observation = snapshot.observation
    simulated = observation.simulate(reconstruction.inputs, reconstruction.labels)
    return float(gradient_similarity(simulated, observation.gradients)), observation.relative_error(simulated) ** 2
