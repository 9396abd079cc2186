"""Architectures or checkpoints side by side on the same images: who gives them away, how, and to whom."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_gradaudit.analysis.bounds import InPixels, effective_rank
from lightning_gradaudit.analysis.ceiling import Analysis
from lightning_gradaudit.analysis.effort import EXPOSED
from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.audit.engine import audit_snapshot
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.errors import GradAuditError, InvalidInputError, described
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.metrics.functional.effort import effort_more_than, effort_quantile
from lightning_gradaudit.simulation.defences import Defence
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.simulation.training_step import Loss


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelResult:
    """One model on the images; tensors are (N,) in the order of the images.

    Attributes:
        name: As given.
        parameters: Number of trained parameters.
        exposure, ceiling: What was got and what could be got, in [0, 1]; the exposure is NaN where no attack matched
            the gradient and nothing was found, the ceiling where the analysis failed.
        effort: Simulated gradients until exposed; infinite where the image never was (see `AuditRecord.effort`).
        psnr: In dB.
        exact_leaks: Images that algebra alone gives away.
        layers: Mean share of each layer in what is given away, largest first; empty without an analysis.
        effective_rank: Directions of the images that carry the gradient's sensitivity, a mean over batches.
        noise_to_hide: Relative noise that would hide the most stubborn image; NaN without an analysis.
        records: The audits, without images.
        reason: Why a figure is missing.
    """

    name: str
    parameters: int
    exposure: Tensor
    ceiling: Tensor
    effort: Tensor
    psnr: Tensor
    exact_leaks: int
    layers: dict[str, float]
    effective_rank: float
    noise_to_hide: float
    records: tuple[AuditRecord, ...]
    reason: str = ""

    @property
    def leaking_layer(self) -> str:
        """The layer that gives most away; "" when unknown."""
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON; what is not finite becomes None."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "ceiling": _number(self.ceiling.nanmean()),
            "exposure": _number(self.exposure.nanmean()),
            "exposure_max": _number(_largest(self.exposure)),
            "psnr": _number(self.psnr.nanmean()),
            "effort": _number(self.typical_effort),
            "exact_leaks": self.exact_leaks,
            "leaking_layer": self.leaking_layer,
            "layers": dict(self.layers),
            "effective_rank": _number(self.effective_rank),
            "noise_to_hide": _number(self.noise_to_hide),
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
        header = [
            "model",
            "parameters",
            "exposure (max)",
            "ceiling",
            "effort",
            "PSNR",
            "exact",
            "rank",
            "leaking layer",
        ]
        rows = [
            [
                each.name,
                f"{each.parameters:,}",
                f"{_text(each.exposure.nanmean())} ({_text(_largest(each.exposure))})",
                _text(each.ceiling.nanmean()),
                each.effort_text,
                _text(each.psnr.nanmean(), 1),
                f"{each.exact_leaks}/{self.images}",
                _text(each.effective_rank, 0),
                f"{each.leaking_layer} ({each.layers[each.leaking_layer]:.0%})" if each.layers else "–",
            ]
            for each in self.contenders
        ]
        return [header, *rows]


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

    Few images rank models roughly at best: look at the single images in `records` before you believe a difference.

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
    if len(images) != len(labels) or batch_size < 1 or len(images) < 1 or len(images) % batch_size:
        raise InvalidInputError(
            f"images: expected as many images as labels, a multiple of batch_size={batch_size}, got {len(images)} "
            f"images and {len(labels)} labels."
        )
    found = []
    for name, model in models.items() if isinstance(models, Mapping) else models:
        snapshots = [
            Snapshot.from_batch(
                model,
                (images[i : i + batch_size], labels[i : i + batch_size]),
                loss=loss,
                mean=mean,
                std=std,
                mode=mode,
                labels_known=labels_known,
                defences=defences,
                seed=seed,
                step=i // batch_size,
            )
            for i in range(0, len(images), batch_size)
        ]
        baseline = Baseline()
        if gallery is not None:
            baseline.observe(snapshots[0].observation.normalization.to_pixels(gallery).clamp(0, 1))
        settings: dict[str, Any] = {"attack": attack, "analysis": analysis, "baseline": baseline, "seed": seed}
        records = [audit_snapshot(each, budget=budget, compile=compile, **settings) for each in snapshots]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found.append(_contender(name, trained, records, snapshots, seed))
    if not found:
        raise InvalidInputError("models: expected at least one model, got none.")
    return Comparison(
        contenders=tuple(found),
        images=len(images),
        batch_size=batch_size,
        settings={
            "attack": found[0].records[0].attack,
            "budget": repr(budget),
            "mode": mode,
            "labels_known": str(labels_known),
            "defences": repr(defences),
        },
    )


def _contender(
    name: str, parameters: int, records: list[AuditRecord], snapshots: list[Snapshot], seed: int
) -> ModelResult:
    rank, reason = _effective_rank(snapshots, seed)
    analysed = [record.leakage for record in records if record.leakage is not None]
    shares: dict[str, float] = {}
    for leakage in analysed:
        for layer, share in leakage.layers.items():
            shares[layer] = shares.get(layer, 0.0) + share / len(analysed)
    missing = torch.full_like(records[0].exposure, math.nan)
    return ModelResult(
        name=name,
        parameters=parameters,
        exposure=torch.cat([record.published(EXPOSED).exposure for record in records]),
        ceiling=torch.cat([missing if record.ceiling is None else record.ceiling for record in records]),
        effort=torch.cat([missing if record.effort is None else record.effort for record in records]),
        psnr=torch.cat([record.published(EXPOSED).psnr for record in records]),
        exact_leaks=int(sum(record.exact_leaks.sum() for record in records)),
        layers=dict(sorted(shares.items(), key=lambda item: -item[1])),
        effective_rank=rank,
        noise_to_hide=max((float(leakage.noise_to_hide.max()) for leakage in analysed), default=math.nan),
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


def _largest(values: Tensor) -> Tensor:
    """Return the largest value that was measured; NaN without one."""
    return torch.where(values.isnan().all(), torch.nan, values.nan_to_num(-math.inf).max())


def _number(value: Tensor | float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _text(value: Tensor | float, digits: int = 2) -> str:
    return f"{float(value):.{digits}f}" if math.isfinite(value) else "–"
