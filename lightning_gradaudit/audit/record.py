"""What is kept of one audited step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_gradaudit.analysis.ceiling import Leakage
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.similarity import Similarity
from lightning_gradaudit.utils.formatting import html_table, number

COPY_PSNR = 30.0
"""dB from which a reconstruction counts as a copy."""

_MATCHED = 0.5  # under noise attacks match better than the truth does; failed ones stay far below it
_NOISE_LEVEL = 1.01  # a sum of squares over ten thousand coordinates of noise varies by about a hundredth
_IMAGE_FIELDS = ("exposure", "psnr", "ssim", "mse", "identified", "null", "exact_leaks", "copied")
_OPTIONAL_FIELDS = ("ceiling", "effort", "confirmed")
_SCORES = ("exposure", "psnr", "ssim", "mse", "identified")  # what a reconstruction is worth
_SLACK = 1e-4  # what rounding may add to a bound of float32 scores
_INF = math.inf
LARGEST_TOLERANCE = 5e-2
"""Largest error of the simulated gradient that any precision may call rounding."""
# Least and largest value of each field; NaN says "not measured" where the third entry allows it.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "exposure": (0, 1, True), "psnr": (0, 200, True), "ssim": (-1, 1, True), "mse": (0, 1, True),
    "identified": (0, 1, True), "null": (0, 1, True), "exact_leaks": (0, 1, False), "copied": (0, 1, False),
    "ceiling": (0, 1, True), "effort": (0, _INF, True), "confirmed": (0, 1, True),
    "step": (0, _INF, False), "rank": (0, _INF, False), "gallery": (0, _INF, False),
    "evaluations": (0, _INF, False), "chance_trials": (0, _INF, False), "chance_hits": (0, 1e18, False),
    "seconds": (0, _INF, True), "label_accuracy": (0, 1, True), "matching_loss": (0, _INF, True),
    "gradient_similarity": (-1, 1, True), "truth_similarity": (-1, 1, True), "self_test": (0, _INF, True),
    "self_test_tolerance": (0, LARGEST_TOLERANCE, False), "defence_gap": (0, _INF, True),
    "noise": (0, _INF, True), "declared_noise": (0, _INF, True), "effort_exposure": (0, 1, True),
    "confirmed_chance": (0, 1, True),
}  # fmt: skip
_WHOLE = ("step", "rank", "gallery", "evaluations", "chance_trials")
_FLAGS = ("identified", "exact_leaks", "copied", "confirmed")
_TEXTS = ("attack", "measure", "reason", "session")


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditRecord:
    """One audited step; tensors are (B,) in the order of the true batch.

    Attributes:
        step: The logger's step at capture.
        attack: What ran.
        outcome: How the attack ended.
        exposure: In [0, 1], against the null baseline.
        psnr, ssim, mse: In pixel space with data range 1; PSNR in dB, capped at 100.
        identified: 1, 0 or NaN (gallery too small).
        null: Similarity that a guess without the gradient reaches, in [0, 1].
        exact_leaks: Whether algebra alone gives the image away (`analysis.exact_leaks`).
        copied: Whether the reconstruction is a copy (>= 30 dB).
        gallery: Fewest candidates an image was compared with.
        chance_hits, chance_trials: Identification by mismatched reconstructions.
        null_complete: Whether the null's reservoir was full.
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
        threat_model: Who sees what, as plain JSON.
        measure: Similarity behind `exposure` and `null`: "ssim" or "nmse".
        rank: Process that captured it.
        reason: What the attacks had to say.
        features: By linear layer inside the network, the share in [0, 1] of the batch's inputs to it that division
            gives away exactly. Exposure of features, not of images: it does not enter the risk.
        ceiling: (B,) in [0, 1], what any attacker could get, by a local estimate; None: not analysed, see `reason`.
        leakage: The analysis behind the ceiling: its curve over the attacker's precision, the noise that would hide the
            images, each layer's share, its cost and assumptions; None: not analysed.
        effort: (B,) simulated gradients after which the image was exposed beyond `effort_exposure`; infinite where it
            never was within the budget (censored). Of the run that won; what lost before it counts as spent before.
        effort_exposure: That exposure.
        confirmed: (B,) 1 where the image was named among candidate photographs (`confirmation.confirm`), else 0; None:
            not tried. No part of the risk: it presumes the photographs.
        confirmed_chance: Share that naming at random reaches; NaN when not tried.
        ids: (B,) the user's own names of the images (`sample_id=`), or none.
        digests: (B,) keyed digests that tell the images of one session apart (`digests.ImageKey`), or none.
        session: Which key they were made with.
        reconstruction: What the attack returned; private data.
        pixels, truth: (B, C, H, W) in [0, 1], reconstruction in the order of the truth; private data.
    """

    step: int
    attack: str
    outcome: Outcome
    exposure: Tensor
    psnr: Tensor
    ssim: Tensor
    mse: Tensor
    identified: Tensor
    null: Tensor
    exact_leaks: Tensor
    copied: Tensor
    gallery: int
    chance_hits: float
    chance_trials: int
    null_complete: bool
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
    measure: str
    noise: float = math.nan
    declared_noise: float = math.nan
    rank: int = 0
    reason: str = ""
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
    reconstruction: Reconstruction | None = field(default=None, repr=False)
    pixels: Tensor | None = field(default=None, repr=False)
    truth: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Make sure that every field is of its type, length and range.

        Raises:
            InvalidInputError: Naming the first that is not.
        """
        if not isinstance(self.outcome, Outcome):
            raise InvalidInputError(f"record: outcome must be an Outcome, got {self.outcome!r}.")
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise InvalidInputError(f"record: {name} must be text, got {getattr(self, name)!r}.")
        for name in ("threat_model", "features"):
            if not isinstance(getattr(self, name), dict):
                raise InvalidInputError(f"record: {name} must be a dictionary, got {getattr(self, name)!r}.")
        if not isinstance(self.null_complete, bool) or self.measure not in get_args(Similarity):
            raise InvalidInputError(
                f"record: null_complete must be True or False and measure one of {get_args(Similarity)}, got "
                f"{self.null_complete!r} and {self.measure!r}."
            )
        for name, share in self.features.items():
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not isinstance(name, str) or not number or not -_SLACK <= share <= 1 + _SLACK:
                raise InvalidInputError(f"record: features must be shares in [0, 1] by layer, got {name!r}: {share!r}.")
        for name, (low, high, may_miss) in _RANGES.items():
            self._check_range(name, low, high, may_miss)
        for name in ("ids", "digests"):
            entries = getattr(self, name)
            texts = isinstance(entries, tuple) and all(isinstance(each, str) for each in entries)
            if not texts or len(entries) not in (0, self.batch_size):
                raise InvalidInputError(f"record: {name} must hold {self.batch_size} texts or none, got {entries!r}.")
        if self.chance_hits > self.chance_trials:
            raise InvalidInputError(
                f"record: chance_hits must be at most chance_trials, got {self.chance_hits} of {self.chance_trials}."
            )

    def _check_range(self, name: str, low: float, high: float, may_miss: bool) -> None:
        value = getattr(self, name)
        if name in _OPTIONAL_FIELDS and value is None:
            return
        if name in (*_IMAGE_FIELDS, *_OPTIONAL_FIELDS):
            if not isinstance(value, Tensor) or value.ndim != 1 or not 0 < len(value) == len(self.exposure):
                raise InvalidInputError(
                    f"record: {name} must be a tensor of one value for each image of a batch, got {value!r}."
                )
            values = value.tolist()
        else:
            whole = isinstance(value, int) if name in _WHOLE else isinstance(value, (int, float))
            if not whole or isinstance(value, bool):
                kind = "a whole number" if name in _WHOLE else "a number"
                raise InvalidInputError(f"record: {name} must be {kind}, got {value!r}.")
            values = [value]
        if not all(low - _SLACK <= v <= high + _SLACK or (may_miss and math.isnan(v)) for v in values):
            raise InvalidInputError(
                f"record: {name} must lie between {low:g} and {high:g}{' or be NaN' if may_miss else ''}, got "
                f"{values if len(values) > 1 else values[0]}."
            )
        if name in _FLAGS and not all(v in (0, 1) or math.isnan(v) for v in values):
            raise InvalidInputError(f"record: {name} must be 0 or 1, got {values}.")

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

    @cached_property
    def conclusive(self) -> bool:
        """Whether a low exposure here is evidence: the audit is valid, an attack ran, and it matched the gradient.

        What any audit found is evidence of a leak, conclusive or not.
        """
        return self.valid and self.attacked and not self.unmatched

    @property
    def bracket(self) -> Tensor | None:
        """What was got and what could be got: (B, 2) exposure and ceiling, both in [0, 1]; None: not analysed."""
        return None if self.ceiling is None else torch.stack([self.exposure.to(self.ceiling), self.ceiling], dim=1)

    @property
    def followed(self) -> float:
        """Evaluations up to which an image that was never exposed is known to withstand this attack.

        Infinite where the attack ended by itself: more budget would change nothing.
        """
        return float(self.evaluations) if self.outcome is Outcome.BUDGET_SPENT else math.inf

    @cached_property
    def uncopied_leaks(self) -> int:
        """Images that algebra gives away but the attacks did not turn into a copy: evidence of a weak attack."""
        return int((self.exact_leaks.bool() & ~self.copied.bool()).sum())

    @cached_property
    def unmatched(self) -> bool:
        """Whether the attack did not even match the gradient half as well as the truth does: it failed, that is all.

        Not so where its residual is no larger than what noise leaves at the truth: then the likeliest image under a
        prior may well match worse than the truth, and nothing more can be asked of a match.
        """
        left_at_truth = 1 - min(1.0, abs(self.truth_similarity)) ** 2
        explained = self.matching_loss <= _NOISE_LEVEL * left_at_truth
        matched = self.gradient_similarity >= _MATCHED * self.truth_similarity  # False where either was not measured
        return not matched and not explained

    def published(self, limit: float) -> AuditRecord:
        """Return the record as curves and tables may show it.

        Scores of an audit that is no evidence are not shown, for they would read as safety, unless they exceed the
        limit: what was found was found.
        """
        if self.conclusive or bool((self.exposure > limit).any()):
            return self
        missing: dict[str, Any] = dict.fromkeys(_SCORES, torch.full_like(self.exposure, math.nan))
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
        trust = "" if self.conclusive else "NO EVIDENCE (no attack matched the gradient): "
        trust = trust if self.valid else "INVALID (the simulator does not describe the step): "
        return (
            f"{trust}step {self.step}, {self.attack}: worst exposure {number(float(self.exposure.max()))} of "
            f"{self.batch_size} images after {self.evaluations} simulated gradients, {self.seconds:.1f} s "
            f"({self.outcome})"
        )

    def _repr_html_(self) -> str:
        """Show scores in a notebook; never images, which notebooks keep."""
        return html_table(self.table(), caption=self.summary)

    def without_images(self) -> AuditRecord:
        """Return the record without private data."""
        return replace(self, reconstruction=None, pixels=None, truth=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, without images; NaN and infinity become None."""
        skipped = ("reconstruction", "pixels", "truth")
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in skipped}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AuditRecord:
        """Read what `to_dict` wrote.

        Raises:
            InvalidInputError: When a field is missing, or not of its type, length or range.
        """
        known = {f.name: f for f in fields(cls) if f.name not in ("reconstruction", "pixels", "truth")}
        try:
            restored: dict[str, Any] = {name: _tensor(values[name]) for name in _IMAGE_FIELDS}
            for name in _OPTIONAL_FIELDS:
                restored[name] = None if values.get(name) is None else _tensor(values[name])
            if restored["effort"] is not None:  # only what is infinite was written as None
                restored["effort"] = restored["effort"].nan_to_num(math.inf)
            restored["leakage"] = None if values.get("leakage") is None else Leakage.from_dict(values["leakage"])
            for name, value in values.items():
                if name in known and name not in restored:
                    restored[name] = math.nan if value is None else value
            restored["outcome"] = Outcome(values["outcome"])
            for name in ("ids", "digests"):
                restored[name] = _listed(values.get(name) or [])
            return cls(**restored)
        except InvalidInputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"record: not an audit record of this version ({error!r}).") from error


def _listed(values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list, got {str(values)[:80]}")
    return tuple(values)


def _tensor(values: list[float | None]) -> Tensor:
    if not isinstance(values, list) or any(isinstance(value, str) for value in values):
        raise TypeError(f"expected a list of numbers, got {str(values)[:80]}")
    return torch.tensor([math.nan if value is None else float(value) for value in values])


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, Outcome):
        return str(value)
    if isinstance(value, Leakage):
        return _plain(value.to_dict())
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
