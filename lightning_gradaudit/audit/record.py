"""The record of one audited step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.analysis.ceiling import Leakage
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.audit.record_checks import RULES, check_record
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.baseline import RECONSTRUCTION_SCORES, Scores
from lightning_gradaudit.utils.formatting import html_table, number
from lightning_gradaudit.utils.tensors import plain_json

COPY_PSNR = 30.0
"""dB from which a reconstruction counts as a copy."""
MATCHED_SHARE = 0.5
"""Cosine at the reconstruction, relative to that at the truth, from which an attack matched the gradient: under noise
attacks match better than the truth does; failed ones stay far below it."""
NOISE_TOLERANCE = 1.01
"""Matching loss relative to that at the truth that noise explains: a sum of squares over ten thousand coordinates of
noise varies by about a hundredth."""
PRIVATE_FIELDS = ("reconstruction", "pixels", "truth")
"""What is never written: it shows the images."""
RUNG_FIELDS = ("rung", "rungs", "audit")
"""What is written of audits in rungs alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditRecord(Scores):
    """One audited step: its scores and what else was measured; tensors are (B,) in the order of the true batch.

    `record_checks.RULES` says what each number may be. NaN stands for what was not measured.

    Attributes:
        step: The logger's step at capture.
        attack: What ran.
        outcome: How the attack ended.
        exact_leaks: Whether a closed form recovers the image exactly (`analysis.exact_leaks`).
        copied: Whether the reconstruction is a copy (>= 30 dB).
        label_accuracy: Share of the labels recovered as a multiset; NaN when not applicable.
        matching_loss: Relative squared error of the gradient at the reconstruction.
        gradient_similarity: Cosine between its gradient and the observed one.
        truth_similarity: The same at the truth: below 1 when a defence changed the gradient.
        self_test: Relative error of the simulated gradient of the truth; about 0, or the audit is invalid.
        self_test_tolerance: What still counts as about 0 in this precision.
        defence_gap: The same without the declared defences, clipping and noise.
        noise: Noise multiplier measured in the observed gradient; NaN without DP-SGD.
        declared_noise: Noise multiplier that DP-SGD was set to; NaN without.
        evaluations: Simulated gradients spent.
        seconds: Wall-clock time of the audit.
        threat_model: What the adversary sees and knows, as plain JSON.
        rank: Process that captured it.
        reason: What decided, first; then what is assumed, and why a figure is missing.
        details: What the other attacks did, or why they do not apply.
        features: By linear layer inside the network, the share in [0, 1] of the batch's inputs to it that division
            gives away exactly. Exposure of features, not of images: it does not enter the risk.
        ceiling: (B,) in [0, 1], what any attacker could get, by a local estimate; None: not analysed, see `reason`.
        leakage: The analysis behind the ceiling: its curve over the attacker's precision, the noise that would hide the
            images, each layer's share, its cost and assumptions; None: not analysed.
        effort: (B,) simulated gradients after which the image was exposed beyond `effort_exposure`; infinite where it
            never was within the budget (censored). Measured on the run that won; what the other attacks spent counts
            as spent before it.
        effort_exposure: That exposure.
        confirmed: (B,) 1 where the image was named among candidate photographs (`confirmation.confirm`), else 0; None:
            not tried. No part of the risk: it presumes that the adversary has the photographs.
        confirmed_chance: Share that naming at random reaches; NaN when not tried.
        ids: (B,) the user's own names of the images (`sample_id=`), or none.
        digests: (B,) keyed digests that tell the images of one session apart (`digests.ImageKey`), or none.
        session: Which key they were made with.
        rung, rungs: Which of how many rungs ended last (`AuditSettings.rungs`).
        audit: Number of the audit in its session; it tells what a further rung updates.
        reconstruction: What the attack returned; private data.
        pixels, truth: (B, C, H, W) in [0, 1], reconstruction in the order of the truth; private data.
    """

    step: int
    attack: str
    outcome: Outcome
    exact_leaks: Tensor
    copied: Tensor
    label_accuracy: float
    matching_loss: float
    gradient_similarity: float
    truth_similarity: float
    self_test: float
    self_test_tolerance: float
    defence_gap: float
    evaluations: int
    seconds: float
    threat_model: dict[str, Any]
    noise: float = math.nan
    declared_noise: float = math.nan
    rank: int = 0
    reason: str = ""
    details: str = ""
    features: dict[str, float] = field(default_factory=dict)
    ceiling: Tensor | None = None
    leakage: Leakage | None = None
    effort: Tensor | None = None
    effort_exposure: float = math.nan
    confirmed: Tensor | None = None
    confirmed_chance: float = math.nan
    ids: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    session: str = ""
    rung: int = 1
    rungs: int = 1
    audit: int = 0
    reconstruction: Reconstruction | None = field(default=None, repr=False)
    pixels: Tensor | None = field(default=None, repr=False)
    truth: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_record(self)

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return len(self.exposure)

    @property
    def attacked(self) -> bool:
        """Whether an attack ran and returned images."""
        return self.outcome not in (Outcome.NOT_APPLICABLE, Outcome.NONFINITE)

    @cached_property
    def valid(self) -> bool:
        """Whether the simulator describes the training step, and what an attack returned is finite.

        It says nothing about an attack's success, nor whether one ran: see `conclusive`.
        """
        finite = not self.attacked or bool(torch.isfinite(self.exposure).all())
        return self.self_test <= self.self_test_tolerance and self.outcome is not Outcome.NONFINITE and finite

    @property
    def finished(self) -> bool:
        """Whether the last rung ended, so that the attack had its whole budget."""
        return self.rung >= self.rungs

    @cached_property
    def conclusive(self) -> bool:
        """Whether a low exposure here is evidence: the audit is valid and finished, an attack ran and matched.

        What any audit found is evidence of a leak, conclusive or not.
        """
        return self.finished and self._matched

    @property
    def _matched(self) -> bool:
        return self.valid and self.attacked and not self.unmatched

    @property
    def bracket(self) -> Tensor | None:
        """What was recovered and what could be: (B, 2) exposure and ceiling, both in [0, 1]; None: not analysed."""
        return None if self.ceiling is None else torch.stack([self.exposure.to(self.ceiling), self.ceiling], dim=1)

    @property
    def followed(self) -> float:
        """Evaluations up to which an image that was never exposed is known to withstand this attack.

        Infinite where the attack ended by itself: more budget would change nothing.
        """
        return float(self.evaluations) if self.outcome is Outcome.BUDGET_SPENT else math.inf

    @cached_property
    def uncopied_leaks(self) -> int:
        """Images that a closed form recovers exactly but the attacks did not copy: evidence of a weak attack."""
        return int((self.exact_leaks.bool() & ~self.copied.bool()).sum())

    @cached_property
    def unmatched(self) -> bool:
        """Whether the attack failed: its gradient matches the observed one less than half as well as the truth's does.

        Not so where its residual is no larger than what noise leaves at the truth: then the likeliest image under a
        prior may match worse than the truth.
        """
        left_at_truth = 1 - min(1.0, abs(self.truth_similarity)) ** 2
        explained = self.matching_loss <= NOISE_TOLERANCE * left_at_truth
        matched = (
            self.gradient_similarity >= MATCHED_SHARE * self.truth_similarity
        )  # False where either was not measured
        return not matched and not explained

    def published(self, limit: float) -> AuditRecord:
        """Return the record as curves and tables may show it.

        Low scores of an audit that is no evidence would read as safety, so its scores are NaN here, unless one of them
        exceeds the limit.
        """
        if self._matched or bool((self.exposure > limit).any()):
            return self
        missing: dict[str, Any] = dict.fromkeys(RECONSTRUCTION_SCORES, torch.full_like(self.exposure, math.nan))
        return replace(self, **missing, pixels=None)

    def table(self) -> list[list[str]]:
        """Return a header and one line of text for each image."""
        header = ["image", "id", "exposure", "null", "PSNR dB", "SSIM", "identified", "ceiling", "effort"]
        lines = [header]
        for at in range(self.batch_size):
            measured = [
                (self.exposure, 2), (self.null, 2), (self.psnr, 1), (self.ssim, 2), (self.identified, 0),
                (self.ceiling, 2),
            ]  # fmt: skip
            cells = [number(None if values is None else float(values[at]), digits) for values, digits in measured]
            lines.append([str(at), self.ids[at] if self.ids else "–", *cells, self._effort_text(at)])
        return lines

    def _effort_text(self, at: int) -> str:
        if self.effort is None:
            return "–"
        effort = float(self.effort[at])
        if math.isfinite(effort):
            return f"{effort:.0f}"
        return f"> {self.followed:.0f}" if math.isfinite(self.followed) else "never"

    @property
    def summary(self) -> str:
        """The audit in one line."""
        trust = "" if self._matched else "NO EVIDENCE (no attack matched the gradient): "
        trust = trust if self.valid else "INVALID (the simulator does not describe the step): "
        return (
            f"{trust}step {self.step}, {self.attack}: worst exposure {number(float(self.exposure.max()))} of "
            f"{self.batch_size} images after {self.evaluations} simulated gradients, {self.seconds:.1f} s "
            f"({self.outcome}{'' if self.finished else f', rung {self.rung} of {self.rungs}'})"
        )

    def _repr_html_(self) -> str:
        """Show scores in a notebook; never images, which notebooks keep."""
        return html_table(self.table(), caption=self.summary)

    def without_images(self) -> AuditRecord:
        """Return the record without private data."""
        return replace(self, reconstruction=None, pixels=None, truth=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, without images; NaN and infinity become None."""
        left_out = PRIVATE_FIELDS if self.rungs > 1 else (*PRIVATE_FIELDS, *RUNG_FIELDS)
        return {f.name: plain_json(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AuditRecord:
        """Read what `to_dict` wrote.

        Raises:
            InvalidInputError: When a field is missing, or not of its type, length or range.
        """
        readers: dict[str, Callable[[Any], Any]] = {
            "leakage": Leakage.from_dict,
            "outcome": Outcome,
            "ids": _texts,
            "digests": _texts,
        }
        readers |= {name: _tensor for name, rule in RULES.items() if rule.images}
        try:
            known = {f.name: values[f.name] for f in fields(cls) if f.name in values and f.name not in PRIVATE_FIELDS}
            restored: dict[str, Any] = {
                name: _missing(name) if value is None else readers.get(name, _same)(value)
                for name, value in known.items()
            }
            if restored.get("effort") is not None:  # only what is infinite was written as None
                restored["effort"] = restored["effort"].nan_to_num(math.inf)
            return cls(**restored)
        except InvalidInputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"record: not an audit record of this version ({error!r}).") from error


def _missing(name: str) -> Any:
    """Return what None stands for in JSON: NaN, an empty tuple or nothing."""
    if name in ("ids", "digests"):
        return ()
    return None if name == "leakage" or (name in RULES and RULES[name].optional) else math.nan


def _same(value: Any) -> Any:
    return value


def _texts(values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list, got {str(values)[:80]}")
    return tuple(values)


def _tensor(values: list[float | None]) -> Tensor:
    if not isinstance(values, list) or any(isinstance(value, str) for value in values):
        raise TypeError(f"expected a list of numbers, got {str(values)[:80]}")
    return torch.tensor([math.nan if value is None else float(value) for value in values])
