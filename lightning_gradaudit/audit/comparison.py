"""Architectures or checkpoints compared on the same images: which of them exposes the images, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_gradaudit.analysis.ceiling import Analysis
from lightning_gradaudit.analysis.effort import EXPOSED
from lightning_gradaudit.analysis.jacobian import InPixels, Jacobian
from lightning_gradaudit.analysis.spectrum import effective_rank
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.audit.engine import audit_snapshot
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.summary import measured, of_images
from lightning_gradaudit.errors import GradAuditError, InvalidInputError, described
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.metrics.functional.effort import effort_more_than, effort_quantile
from lightning_gradaudit.simulation.defences import Defence
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.simulation.training_step import Loss
from lightning_gradaudit.utils.formatting import number


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelResult:
    """One model on the images; tensors are (N,) in the order of the images.

    Attributes:
        name: As given.
        parameters: Number of trained parameters.
        effective_rank: Directions of the images that carry the gradient's sensitivity, a mean over batches.
        records: The audits, without images.
        reason: Why a figure is missing.
    """

    name: str
    parameters: int
    effective_rank: float
    records: tuple[AuditRecord, ...]
    reason: str = ""

    @cached_property
    def _published(self) -> list[AuditRecord]:
        return [record.published(EXPOSED) for record in self.records]

    @property
    def exposure(self) -> Tensor:
        """Exposures in [0, 1]; NaN where no attack matched the gradient and nothing was found."""
        return of_images(self._published, "exposure")

    @property
    def ceiling(self) -> Tensor:
        """What any attacker could get, in [0, 1]; NaN where the analysis failed."""
        return of_images(self._published, "ceiling")

    @property
    def effort(self) -> Tensor:
        """Simulated gradients until exposed; infinite where the image never was (see `AuditRecord.effort`)."""
        return of_images(self._published, "effort")

    @property
    def exact_leaks(self) -> int:
        """Images that closed forms recover exactly."""
        return int(sum(record.exact_leaks.sum() for record in self.records))

    @cached_property
    def layers(self) -> dict[str, float]:
        """Mean share of each layer in the leak-R², largest first; empty without an analysis."""
        analysed = [record.leakage for record in self.records if record.leakage is not None]
        shares: dict[str, float] = {}
        for leakage in analysed:
            for layer, share in leakage.layers.items():
                shares[layer] = shares.get(layer, 0.0) + share / len(analysed)
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    @property
    def leaking_layer(self) -> str:
        """The layer with the largest share; "" when unknown."""
        return next(iter(self.layers), "")

    @property
    def typical_effort(self) -> float:
        """Median effort, with what the budget cut off counted as such; infinite when fewer than half were exposed."""
        return float(effort_quantile(self.effort, self._followed))

    @property
    def _followed(self) -> Tensor:
        return torch.cat([torch.full_like(record.exposure, record.followed) for record in self.records])

    @property
    def effort_text(self) -> str:
        """The median effort in words: "> N" where the budget of N ended first, "never" where no budget would do."""
        if math.isfinite(self.typical_effort):
            return f"{self.typical_effort:.0f}"
        least = float(effort_more_than(self.effort, self._followed))
        return f"> {least:.0f}" if math.isfinite(least) else "–" if math.isnan(least) else "never"

    def cells(self) -> list[str]:
        """Return the line of `Comparison.table`."""
        found = measured(self._published, ("exposure", "exposure_max", "ceiling", "psnr"))
        return [
            self.name,
            f"{self.parameters:,}",
            f"{number(found['exposure'])} ({number(found['exposure_max'])})",
            number(found["ceiling"]),
            self.effort_text,
            number(found["psnr"], 1),
            f"{self.exact_leaks}/{sum(record.batch_size for record in self.records)}",
            number(self.effective_rank, 0),
            f"{self.leaking_layer} ({self.layers[self.leaking_layer]:.0%})" if self.layers else "–",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON; what is not finite becomes None."""
        figures = measured(self._published, ("ceiling", "exposure", "exposure_max", "psnr", "noise_to_hide"))
        figures |= {"effort": self.typical_effort, "effective_rank": self.effective_rank}
        return {
            "name": self.name,
            "parameters": self.parameters,
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
            "exact_leaks": self.exact_leaks,
            "leaking_layer": self.leaking_layer,
            "layers": dict(self.layers),
            "reason": self.reason,
            "records": [record.to_dict() for record in self.records],
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Models side by side.

    Attributes:
        contenders: In the order given.
        images: Number of images.
        batch_size: Images behind each gradient.
        settings: What was the same for all.
    """

    contenders: tuple[ModelResult, ...]
    images: int
    batch_size: int
    settings: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "images": self.images,
            "batch_size": self.batch_size,
            "settings": self.settings,
            "models": [contender.to_dict() for contender in self.contenders],
        }

    def table(self) -> list[list[str]]:
        """Return a header and one line of text for each model."""
        header = ["model", "parameters", "exposure (max)", "ceiling", "effort", "PSNR", "exact", "rank"]
        return [[*header, "leaking layer"], *(each.cells() for each in self.contenders)]


def compare(
    models: Mapping[str, nn.Module] | Iterable[tuple[str, nn.Module]],
    images: Tensor,
    labels: Tensor,
    *,
    loss: Loss | None = nn.functional.cross_entropy,
    mean: Any = None,
    std: Any = None,
    mode: Literal["train", "eval", "as_is"] = "eval",
    batch_size: int = 1,
    labels_known: bool = False,
    defences: tuple[Defence, ...] = (),
    attack: Attack | None = None,
    budget: Budget = Budget(evaluations=800),  # noqa: B008 - immutable
    analysis: bool | Analysis = True,
    gallery: Tensor | None = None,
    compile: bool = False,  # noqa: A002 - torch's word
    seed: int = 0,
) -> Comparison:
    """Audit several models on the same images.

    Few images rank models only roughly: look at the single images in `records` before you rely on a difference.

    Args:
        models: By name; or pairs, for models that are loaded one by one. They are left as they are.
        images: (N, C, H, W) in the models' input space.
        labels: (N, ...) as the loss takes them.
        loss, mean, std, mode, labels_known, defences: As in `Snapshot.from_batch`.
        batch_size: Images behind each gradient; N must be a multiple of it.
        attack, budget, analysis, compile, seed: As in `audit_snapshot`; the same for all.
        gallery: (M, C, H, W) other images, in the models' input space: null and identification; None: the null is 0.

    Raises:
        InvalidInputError: When there is no model, or images do not fill batches.

    Example:
        >>> models = {"linear": nn.Sequential(nn.Flatten(), nn.Linear(64, 2))}
        >>> found = compare(models, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), budget=Budget(evaluations=5))
        >>> found.contenders[0].leaking_layer
        '1'
    """
    _check_images(images, labels, batch_size)
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    threat: dict[str, Any] = {"loss": loss, "mean": mean, "std": std, "mode": mode, "labels_known": labels_known}
    settings: dict[str, Any] = {"attack": attack, "budget": budget, "analysis": analysis, "compile": compile}
    found = [
        _compare_one(name, model, batches, gallery, threat | {"defences": defences, "seed": seed}, settings)
        for name, model in (models.items() if isinstance(models, Mapping) else models)
    ]
    if not found:
        raise InvalidInputError("models: expected at least one model, got none.")
    return Comparison(
        contenders=tuple(found),
        images=len(images),
        batch_size=batch_size,
        settings={
            "attack": found[0].records[0].attack, "budget": repr(budget), "mode": mode,
            "labels_known": str(labels_known), "defences": repr(defences),
        },
    )  # fmt: skip


def _check_images(images: Tensor, labels: Tensor, batch_size: int) -> None:
    if len(images) != len(labels) or batch_size < 1 or len(images) < 1 or len(images) % batch_size:
        raise InvalidInputError(
            f"images: expected as many images as labels, a multiple of batch_size={batch_size}, got {len(images)} "
            f"images and {len(labels)} labels."
        )


def _compare_one(
    name: str,
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    gallery: Tensor | None,
    threat: dict[str, Any],
    settings: dict[str, Any],
) -> ModelResult:
    """Audit one model; `threat` goes to `Snapshot.from_batch`, `settings` to `audit_snapshot`."""
    seed = threat["seed"]
    snapshots = [Snapshot.from_batch(model, batch, step=step, **threat) for step, batch in enumerate(batches)]
    baseline = Baseline()
    if gallery is not None:
        baseline.observe(snapshots[0].observation.normalization.to_pixels(gallery).clamp(0, 1))
    records = [audit_snapshot(each, baseline=baseline, seed=seed, **settings) for each in snapshots]
    rank, reason = _effective_rank(snapshots, seed)
    return ModelResult(
        name=name,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        effective_rank=rank,
        records=tuple(record.without_images() for record in records),
        reason=reason,
    )


def _effective_rank(snapshots: list[Snapshot], seed: int) -> tuple[float, str]:
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    try:
        for each in snapshots:
            truth, observation = each.truth, each.observation
            jacobian = Jacobian(observation, truth.inputs, truth.labels)
            pixels = InPixels(jacobian, truth.inputs.shape, observation.normalization, None)
            ranks.append(effective_rank(pixels, probes=4, generator=generator))
    except GradAuditError as error:
        return math.nan, f"no effective rank: {described(error)}"
    return sum(ranks) / len(ranks), ""
