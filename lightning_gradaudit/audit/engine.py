"""The engine: audit one snapshot, without Lightning."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradaudit.analysis.ceiling import Analysis, Leakage, analyse
from lightning_gradaudit.analysis.certificates import exact_leaks
from lightning_gradaudit.analysis.effort import EXPOSED, effort_curve
from lightning_gradaudit.attacks.closed_form.features import feature_exposure, recover_features, true_features
from lightning_gradaudit.attacks.compilation.evaluation_graph import Compilation, compiled_evaluation
from lightning_gradaudit.attacks.defaults import full_attack
from lightning_gradaudit.attacks.labels.recovery import recover_labels
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.audit.confirmation import confirm as confirm_among
from lightning_gradaudit.audit.record import COPY_PSNR, AuditRecord
from lightning_gradaudit.audit.self_test import self_test_tolerance, why_self_test_failed
from lightning_gradaudit.audit.settings import AuditSettings, SettingsChanges, changed_settings
from lightning_gradaudit.errors import NonFiniteGradientError, described
from lightning_gradaudit.metrics.baseline import AssignedScores, Baseline
from lightning_gradaudit.metrics.functional.gradients import gradient_similarity, label_multiset_accuracy
from lightning_gradaudit.simulation.snapshot import SelfTest, Snapshot
from lightning_gradaudit.utils.digests import PROCESS_KEY, ImageKey
from lightning_gradaudit.utils.tensors import global_norm
from lightning_gradaudit.utils.time_limit import limited_time, time_left

if TYPE_CHECKING:
    from typing_extensions import Unpack

ANALYSIS_SHARE, ATTACK_SHARE = 0.5, 0.85
"""Of the time that an audit has left, what the analysis may take, and then the attacks; scores need the rest."""


def audit_snapshot(
    snapshot: Snapshot,
    settings: AuditSettings | None = None,
    *,
    baseline: Baseline | None = None,
    image_key: ImageKey | None = None,
    **changes: Unpack[SettingsChanges],
) -> AuditRecord:
    """Audit one step: self-test, structural certificate, attack, score against truth and null.

    Args:
        snapshot: The step; only its `observation` reaches the attack.
        settings: How to audit it; None: `AuditSettings()`.
        baseline: Gallery and null; None: an empty one (the null is 0, no image can be identified).
        image_key: Tells the images of a run apart without showing them; None: one key for all audits of this process.
        changes: Fields of `AuditSettings` by name, in place of those of `settings`: `attack=`, `budget=`, `analysis=`,
            `confirm=`, `compile=`, `closed_forms=`, `seed=`, `device=`.

    Raises:
        NonFiniteGradientError: When the gradient holds NaN or infinity.
        DoubleBackwardError: When the model has an operation without a second derivative.
        ReplayError: When the training step cannot be simulated.
        TypeError: When a keyword is no field of `AuditSettings`.
    """
    settings = changed_settings(settings, changes, caller="audit_snapshot()")
    with limited_time(settings.budget.seconds):
        return _audit(
            snapshot,
            settings.with_defaults(analysis=False, confirm=0),
            Baseline() if baseline is None else baseline,
            PROCESS_KEY if image_key is None else image_key,
        )


def _audit(snapshot: Snapshot, settings: AuditSettings, baseline: Baseline, image_key: ImageKey) -> AuditRecord:
    start = time.monotonic()
    snapshot = _prepare(snapshot, settings.device)
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + snapshot.step) % 2**63)
    begun = time.monotonic()
    self_test = snapshot.self_test()
    gradient_seconds = time.monotonic() - begun
    unlike = why_self_test_failed(snapshot.observation, self_test)
    what_if = snapshot.observation.threat_model.batch_size
    if what_if is not None:
        snapshot = snapshot.with_batch_size(what_if)
    snapshot, assumed = _with_assumed_labels(snapshot)
    leaks = exact_leaks(snapshot, generator=generator)
    hurried = math.isfinite(time_left())  # then the attacks take what the analysis leaves
    if hurried:
        with limited_time(ANALYSIS_SHARE * time_left()):
            leakage, no_ceiling = _leakage(snapshot, settings.analysis, leaks, generator)
    result = _attack(snapshot, settings, baseline, generator)
    if not hurried:
        leakage, no_ceiling = _leakage(snapshot, settings.analysis, leaks, generator)
    confirmed, chance, unconfirmed = _confirmed(snapshot, baseline, settings.confirm or 0, gradient_seconds, generator)
    return AuditRecord(
        **_describe_step(snapshot, self_test, image_key),
        **_describe_result(result, snapshot, labels_recovered=not assumed),
        exact_leaks=leaks,
        reason="; ".join(filter(None, (unlike, result.reason, assumed, no_ceiling, unconfirmed))),
        details=result.reconstruction.details,
        ceiling=None if leakage is None else _ceiling(leakage, result.scores.exposure, leaks),
        leakage=leakage,
        confirmed=confirmed,
        confirmed_chance=chance,
        features=_features(snapshot, generator),
        seconds=time.monotonic() - start,
    )


def _prepare(snapshot: Snapshot, device: str | None) -> Snapshot:
    """Move a snapshot to where it is attacked, and refuse a gradient that is not finite."""
    if device is not None:
        snapshot = snapshot.to(device)
    if not torch.isfinite(global_norm(snapshot.observation.gradients)):
        raise NonFiniteGradientError(f"gradients: step {snapshot.step} has NaN or infinite values; not audited.")
    return snapshot


def _with_assumed_labels(snapshot: Snapshot) -> tuple[Snapshot, str]:
    """Give the adversary labels that cannot be recovered: without labels hardly any attack runs.

    Returns:
        The step with the stronger adversary, and the sentence that says so; the step as it is where labels are known
        or can be recovered.
    """
    observation = snapshot.observation
    if observation.labels is not None:
        return snapshot, ""
    estimate = recover_labels(observation, generator=torch.Generator().manual_seed(0))
    if estimate.labels is not None:
        return snapshot, ""
    threat_model = replace(observation.threat_model, labels_known=True)
    observation = replace(observation, labels=snapshot.truth.labels, threat_model=threat_model)
    return replace(snapshot, observation=observation), (
        f"the adversary is assumed to know the labels, which cannot be recovered ({estimate.reason})"
    )


@dataclass(frozen=True)
class _AttackResult:
    """What an attack made of a step.

    Attributes:
        attack: Its name.
        reconstruction: What it returned.
        pixels: The reconstructed images in [0, 1], in the attack's order.
        scores: How near they are; unmeasured where no attack made them.
        reason: Why the attack, or its compilation, ended as it did.
    """

    attack: str
    reconstruction: Reconstruction
    pixels: Tensor
    scores: AssignedScores
    reason: str


def _attack(
    snapshot: Snapshot, settings: AuditSettings, baseline: Baseline, generator: torch.Generator
) -> _AttackResult:
    """Attack the observation of a step, and score its reconstruction."""
    attack = full_attack(settings.attack, closed_forms=settings.closed_forms)
    observation = snapshot.observation
    left = max(1e-3, ATTACK_SHARE * time_left())
    budget = replace(settings.budget, seconds=left if math.isfinite(left) else None)
    with compiled_evaluation() if settings.compile else nullcontext(Compilation()) as compilation:
        found = attack(observation, budget=budget, generator=generator)
    pixels = observation.normalization.to_pixels(found.inputs.float()).clamp(0, 1).nan_to_num(0.5)
    scores = baseline.score(pixels, snapshot.truth_pixels, snapshot.truth.labels)
    if not _made_images(found):  # scores of these images would read as safety
        scores = scores.unmeasured()
    return _AttackResult(
        attack.name, found, pixels, scores, "; ".join(filter(None, (found.reason, *compilation.reasons)))
    )


def _made_images(reconstruction: Reconstruction) -> bool:
    """Whether an attack applied and stayed finite, so that its images are its own."""
    return reconstruction.outcome not in (Outcome.NOT_APPLICABLE, Outcome.NONFINITE)


def _describe_step(snapshot: Snapshot, self_test: SelfTest, key: ImageKey) -> dict[str, Any]:
    """Return the fields of a record that tell which step was audited, and whether the simulator describes it."""
    observation = snapshot.observation
    return {
        "step": snapshot.step,
        "truth_similarity": self_test.similarity,
        "self_test": self_test.worst,
        "self_test_tolerance": self_test_tolerance(observation),
        "defence_gap": self_test.defence_gap,
        "noise": self_test.noise,
        "declared_noise": self_test.declared_noise,
        "threat_model": observation.threat_model.to_dict()
        | observation.protocol.to_dict()
        | {"layers_with_batch_statistics": len(observation.statistics)},
        "ids": snapshot.truth.ids,
        "digests": key.digests(snapshot.truth_pixels),
        "session": key.session,
        "truth": snapshot.truth_pixels.cpu(),
    }


def _describe_result(result: _AttackResult, snapshot: Snapshot, *, labels_recovered: bool) -> dict[str, Any]:
    """Return the fields of a record that tell what the attack found, how near it came, and at what effort."""
    scores, found = result.scores, result.reconstruction
    effort = None
    if _made_images(found):
        curve = effort_curve(found, snapshot, null=scores.null, measure=scores.measure)
        effort = curve.effort(EXPOSED)
    similarity, matching_loss = _match(found, snapshot)
    return {
        "attack": result.attack,
        "outcome": found.outcome,
        **scores.as_fields(),
        "copied": scores.psnr >= COPY_PSNR,  # False where nothing was measured
        "label_accuracy": _label_accuracy(found, snapshot) if labels_recovered else math.nan,
        "matching_loss": matching_loss,
        "gradient_similarity": similarity,
        "evaluations": found.evaluations,
        "effort": effort,
        "effort_exposure": EXPOSED,
        "reconstruction": found,
        "pixels": result.pixels.cpu()[scores.order],
    }


def _leakage(
    snapshot: Snapshot, analysis: bool | Analysis | None, leaks: Tensor, generator: torch.Generator
) -> tuple[Leakage | None, str]:
    """Return the analysis of a step, or None and the reason. Images that closed forms recover have reach 1."""
    if not analysis:
        return None, ""
    try:
        found = analyse(snapshot, Analysis() if analysis is True else analysis, generator=generator)
    except Exception as error:  # a further measurement must not fail the audit
        return None, f"no ceiling: {described(error)}"
    if not bool(torch.isfinite(found.leak_r2).all()):
        return None, "no ceiling: the analysis was not finite"
    return replace(found, reach=torch.where(leaks.cpu().bool(), 1.0, found.reach)), ""


def _ceiling(leakage: Leakage, exposure: Tensor, leaks: Tensor) -> Tensor:
    """Return what any attacker could get of each image, (B,) in [0, 1].

    Not less than what the attack reached, and 1 where a closed form recovers the image, whatever the estimate says.
    """
    best = torch.fmax(leakage.leak_r2, exposure.cpu().to(leakage.leak_r2))
    return torch.where(leaks.cpu().bool(), torch.ones_like(best), best).clamp(0, 1)


def _features(snapshot: Snapshot, generator: torch.Generator) -> dict[str, float]:
    recovered = recover_features(snapshot.observation, generator=generator)
    if not recovered:
        return {}
    truth = true_features(snapshot.observation, snapshot.truth.inputs, snapshot.truth.labels)
    return feature_exposure(recovered, truth)


def _confirmed(
    snapshot: Snapshot, baseline: Baseline, candidates: int, gradient_seconds: float, generator: torch.Generator
) -> tuple[Tensor | None, float, str]:
    """Return which images were named among candidates, (B,), the chance of that, and why there is no answer."""
    if not candidates:
        return None, math.nan, ""
    if time_left() < candidates * gradient_seconds:
        return None, math.nan, "not confirmed: there was no time"
    try:
        found = confirm_among(snapshot, baseline, candidates=candidates, generator=generator)
    except Exception as error:  # a further measurement must not fail the audit
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

    Simulated here once more, so that an attack does not judge itself.
    """
    if not _made_images(reconstruction):
        return math.nan, math.inf
    if reconstruction.labels is None:
        return math.nan, math.nan
    observation = snapshot.observation
    simulated = observation.simulate(reconstruction.inputs, reconstruction.labels)
    return float(gradient_similarity(simulated, observation.gradients)), observation.relative_error(simulated) ** 2
