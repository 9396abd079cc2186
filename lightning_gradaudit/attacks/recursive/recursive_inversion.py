"""The attack by recursion: features solved from the head down, then a match of the image to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, part_of
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.levenberg_marquardt import LevenbergMarquardt
from lightning_gradaudit.attacks.matching.objectives import SensitivityWeightedError
from lightning_gradaudit.attacks.matching.optimizers import Adam, CosineDecay
from lightning_gradaudit.attacks.matching.priors import Whitened
from lightning_gradaudit.attacks.matching.regularizers import KnownFeatures
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.attacks.recursive.layer_peeling import Peeled, peel
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.observation import Observation

_EVALUATIONS_WITHOUT_LIMIT = 500  # spent on equations at most where only time is limited


@dataclass(frozen=True, kw_only=True)
class RecursiveInversion(IterativeAttack):
    """Recover the inputs of the upper layers exactly (`peel`), then match the rest of the network to them.

    For one image and a chain of layers: fully connected, convolutional, ReLU, leaky ReLU, sigmoid, tanh, BatchNorm in
    eval mode, flattening. Where the equations reach the image, matching only polishes it; where they end before,
    what they gave is a target inside the network, close to the image and without the non-convexity of what lies above.
    Layers of high resolution behind a stride leave more unknowns than equations and are where it usually ends.

    Args:
        matching: How the image is found once the features are known.
        polish: What refines an image that the equations reached.
        share: Largest part of the first budget spent on the equations; their arithmetic is counted in evaluations.
        weight: Of the distance to the features, which is relative to how much they vary from place to place.
    """

    matching: GradientMatching = GradientMatching(
        objective=SensitivityWeightedError(),
        parametrization=Whitened(weight=1e-6),
        optimizer=Adam(lr=0.1, schedule=CosineDecay()),
    )
    polish: LevenbergMarquardt = LevenbergMarquardt()
    share: float = 0.6
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not self.weight > 0:
            raise InvalidInputError(f"RecursiveInversion needs share in (0, 1) and weight > 0, got {self!r}.")

    def start(
        self, observation: Observation, generator: torch.Generator, *, at: Tensor | None = None
    ) -> Run | Reconstruction:
        # The equations that cost almost nothing tell whether there is anything to gain.
        tried = peel(observation, budget=0.0, generator=generator)
        if not tried.unfinished and not _gains(tried):
            return Reconstruction.not_applicable(observation, tried.reason)
        return _RecursiveRun(self, observation, generator)


def _gains(peeled: Peeled) -> bool:
    """Tell whether more is known than the head's input, which says no more than its gradient."""
    return peeled.image is not None or len(peeled.features) > 1


class _RecursiveRun:
    """The equations in the first cycle, matching in all."""

    def __init__(self, attack: RecursiveInversion, observation: Observation, generator: torch.Generator) -> None:
        self.attack, self.observation, self.generator = attack, observation, generator
        self.peeled: Peeled | None = None
        self.matching: Run | Reconstruction | None = None
        self.cost = 0

    @property
    def evaluations(self) -> int:
        return self.cost + (0 if self.matching is None else self.matching.evaluations)

    @property
    def finished(self) -> bool:
        return isinstance(self.matching, Reconstruction) or (self.matching is not None and self.matching.finished)

    def advance(self, budget: Budget) -> None:
        meter = Meter(budget)
        if self.peeled is None:
            share = self.attack.share
            most = _EVALUATIONS_WITHOUT_LIMIT if budget.evaluations is None else math.floor(share * budget.evaluations)
            seconds = math.inf if budget.seconds is None else share * budget.seconds
            self.peeled = peel(self.observation, budget=most, generator=self.generator, seconds=seconds)
            self.cost = math.ceil(self.peeled.cost)
            meter.spend(self.cost)
            self.matching = self._matching(self.peeled)
        if not isinstance(self.matching, Reconstruction) and not self.finished and not meter.exhausted:
            assert self.matching is not None
            self.matching.advance(part_of(meter, 1.0))

    def _matching(self, peeled: Peeled) -> Run | Reconstruction:
        if not _gains(peeled):
            return Reconstruction.not_applicable(self.observation, peeled.reason)
        if peeled.image is not None:
            low, high = self.observation.box
            image = peeled.image.clamp(low, high)
            polish = self.attack.polish.start(self.observation, self.generator, at=image)
            if isinstance(polish, Reconstruction):  # it needs labels, the equations do not
                return replace(polish, inputs=image, outcome=Outcome.CONVERGED)
            return polish
        name, deepest = list(peeled.features.items())[-1]
        features = KnownFeatures(features={name: deepest}, weight=self.attack.weight)
        matching = self.attack.matching
        return replace(matching, regularizers=(*matching.regularizers, features)).start(
            self.observation, self.generator
        )

    def result(self) -> Reconstruction:
        assert self.matching is not None
        assert self.peeled is not None
        reason = f"{len(self.peeled.features)} layer(s) peeled, {self.peeled.reason}"
        if isinstance(self.matching, Reconstruction):
            result = self.matching
        elif not self.matching.evaluations:
            result = Reconstruction.not_applicable(self.observation, "the equations took all of the time")
            reason = f"{result.reason}: {reason}"
        else:
            result = self.matching.result()
        return replace(result, attack=self.attack.name, evaluations=self.evaluations, reason=reason)
