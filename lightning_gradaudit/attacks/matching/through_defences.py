"""Matching through a known defence: what a simulated gradient would look like once defended.

Each defence leaves a mark in the shared gradient that the adversary can read, and a part of the simulated gradient that
it says nothing about. Only what can be compared is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gradaudit.attacks.matching.objectives import CosineDistance, Objective
from lightning_gradaudit.simulation.defences import (
    ClipLayers,
    Defence,
    LaplaceNoise,
    PruneSmallest,
    Quantise,
    SignOnly,
    Soteria,
)
from lightning_gradaudit.utils.tensors import TINY, Tensors, global_norm

_SOFT_SIGN_WIDTH = 0.5  # of a tensor's mean absolute value: a step that still has a slope where most coordinates lie
_LEAST_ABSOLUTE_SHARE = 1e-3  # of a tensor's mean absolute value: below it an absolute value is rounded to a parabola


@dataclass(frozen=True)
class AbsoluteError(Objective):
    """Σ|g' - g| / Σ|g|, the likelihood of Laplace noise; rounded near 0, so that it has a derivative."""

    def __call__(self, simulated: Tensors, observed: Tensors) -> Tensor:
        size = torch.stack([g.abs().sum() for g in observed.values()]).sum().clamp_min(TINY)
        near = _LEAST_ABSOLUTE_SHARE * size / sum(g.numel() for g in observed.values())
        total = [((simulated[n] - g).square() + near**2).sqrt().sum() - near * g.numel() for n, g in observed.items()]
        return torch.stack(total).sum() / size


@dataclass(frozen=True)
class ThroughDefences(Objective):
    """A distance of the observed gradient from the simulated one, defended as far as it can be told.

    - `PruneSmallest`, `Soteria`: coordinates that were not transmitted are left out; the mask is visible.
    - `SignOnly`: a sign with a slope is compared with the sign.
    - `Quantise`: nothing is changed; rounding is noise without bias, so that methods which match vectors apply.
    - `ClipLayers`: each layer has the norm that was observed.

    Args:
        defences: Of the client, in their order.
        inner: The distance.
    """

    defences: tuple[Defence, ...]
    inner: Objective = CosineDistance()

    @property
    def references(self) -> int:
        return self.inner.references

    def calibrated(self, references: Sequence[Tensors], observed: Tensors) -> ThroughDefences:
        known = [self.defended(each, observed) for each in references]
        return replace(self, inner=self.inner.calibrated(known, self.defended(observed, observed)))

    def __call__(self, simulated: Tensors, observed: Tensors) -> Tensor:
        return self.inner(self.defended(simulated, observed), self.defended(observed, observed))

    def defended(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the simulated gradient after the defences; differentiable."""
        shared = dict(simulated)
        for defence in self.defences:
            shared = _defend(defence, shared, observed)
        return shared


def _defend(defence: Defence, gradients: dict[str, Tensor], observed: Tensors) -> dict[str, Tensor]:
    if isinstance(defence, PruneSmallest):
        return {n: g * (observed[n] != 0) for n, g in gradients.items()}
    if isinstance(defence, Soteria):
        own = gradients[defence.layer]
        sent = (observed[defence.layer].transpose(0, 1).flatten(1) != 0).any(1)
        return gradients | {defence.layer: own * sent.view(1, -1, *[1] * (own.ndim - 2))}
    if isinstance(defence, SignOnly):
        return {n: _soft_sign(g, observed[n]) for n, g in gradients.items()}
    if isinstance(defence, ClipLayers):
        return _with_layer_norms(gradients, observed)
    return gradients


def _soft_sign(gradient: Tensor, observed: Tensor) -> Tensor:
    if gradient is observed:
        return observed.sign()
    return torch.tanh(gradient / (_SOFT_SIGN_WIDTH * gradient.detach().abs().mean()).clamp_min(TINY))


def _with_layer_norms(gradients: dict[str, Tensor], observed: Tensors) -> dict[str, Tensor]:
    layers: dict[str, list[str]] = {}
    for name in gradients:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    scaled: dict[str, Tensor] = {}
    for names in layers.values():
        own, seen = ({n: tensors[n] for n in names} for tensors in (gradients, observed))
        factor = global_norm(seen) / global_norm(own).clamp_min(TINY)
        scaled |= {n: g * factor for n, g in own.items()}
    return scaled


def objective_for(defences: Sequence[Defence]) -> Objective | None:
    """Return the objective that an adversary who knows the defences uses; None where directions are all there is.

    The marks of defences that another one follows are blurred, so that the last one alone is matched through.
    """
    if not defences:
        return None
    if isinstance(defences[-1], LaplaceNoise):
        return AbsoluteError() if len(defences) == 1 else None
    known = (PruneSmallest, Soteria, SignOnly, Quantise, ClipLayers)
    return ThroughDefences((defences[-1],)) if isinstance(defences[-1], known) else None
