"""A check of the engine itself: does an audit find an image that is known to leak?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.closed_form.linear_layer import LinearLayerInversion
from lightning_gradaudit.attacks.defaults import full_attack
from lightning_gradaudit.audit.record import COPY_PSNR
from lightning_gradaudit.simulation.snapshot import Snapshot


@dataclass(frozen=True)
class EngineCheck:
    """Whether the attacks recover a leaky reference in this environment, with this budget.

    Attributes:
        passed: Both closed form and attack reached `REFERENCE_PSNR`.
        psnr: What each reached, in dB.
    """

    passed: bool
    psnr: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {"passed": self.passed, "psnr": {k: v if math.isfinite(v) else 0.0 for k, v in self.psnr.items()}}

    def __str__(self) -> str:
        reached = ", ".join(f"{name} {value:.1f} dB" for name, value in self.psnr.items())
        return f"engine check {'passed' if self.passed else 'FAILED'}: {reached} (needs {REFERENCE_PSNR:.0f} dB)"


REFERENCE_PSNR = COPY_PSNR
"""dB that every attack must reach on the built-in reference: on so easy a case anything less than a copy is failure."""


def reference_snapshot(*, turned: bool = False) -> Snapshot:
    """Return a step that leaks by construction: one image through a small smooth network that keeps it whole.

    Args:
        turned: Turn the image by a fixed rotation of its pixel space first: as leaky, but no layer that shares its
            gradient is fed by the pixels themselves, so that an attack has to search.
    """
    side = torch.linspace(-1, 1, 16)
    y, x = torch.meshgrid(side, side, indexing="ij")
    disc = torch.sigmoid(12 * (0.6 - (x**2 + (y - 0.1) ** 2).sqrt()))
    image = (0.2 + 0.5 * disc + 0.2 * x.clamp_min(0)).clamp(0, 1)[None, None]
    with torch.device("meta"):  # initialising real layers here would consume training's random numbers
        turn = [nn.Linear(256, 256, bias=False)] if turned else []
        model = nn.Sequential(nn.Flatten(), *turn, nn.Linear(256, 128), nn.Softplus(), nn.Linear(128, 4))
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        if turned:
            weight = model.get_parameter("1.weight")
            weight.copy_(torch.linalg.qr(weight)[0])
            weight.requires_grad_(False)
    return Snapshot.from_batch(model, (image, torch.tensor([1])), loss=nn.functional.cross_entropy)


def check_engine(attack: Attack | None, budget: Budget, *, closed_forms: bool = True) -> EngineCheck:
    """Attack the built-in leaky reference with each configured attack alone.

    An attack that fails here, because of a small budget or a fault, proves nothing about the user's
    model, and the gate must not pass on it.
    """
    attack = full_attack(attack, closed_forms=False)
    attacks: Iterable[Attack] = (LinearLayerInversion(), attack) if closed_forms else (attack,)
    reached = {}
    for each in attacks:
        snapshot = reference_snapshot(turned=each is attack)
        result = each(snapshot.observation, budget=budget, generator=torch.Generator().manual_seed(0))
        error = ((result.inputs.clamp(0, 1) - snapshot.truth.inputs) ** 2).mean().clamp_min(1e-10)
        decibels = float(-10 * torch.log10(error))
        reached[each.name] = decibels if math.isfinite(decibels) else 0.0  # a diverged attack reached nothing
    return EngineCheck(all(value >= REFERENCE_PSNR for value in reached.values()), reached)
