"""The most probable image given a gradient with Gaussian noise of known strength.

It minimises the squared error over twice the noise's variance plus the negative log-prior (Balunović et al.,
arXiv:2111.04706). How rough images are is not known in advance and matters as much as the attack: a prior too rough
leaves noise in the image, one too smooth removes detail. The noisy gradient itself selects the prior (`choose_prior`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, part_of, with_labels
from lightning_gradaudit.attacks.matching.finite_differences import has_kinks
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.objectives import SquaredError
from lightning_gradaudit.attacks.matching.optimizers import LBFGS, Adam, CosineDecay, Optimizer
from lightning_gradaudit.attacks.matching.priors import FORMULAS, FittedPrior, ImagePrior, PowerLawPrior, Whitened
from lightning_gradaudit.attacks.matching.recipes import Modern
from lightning_gradaudit.attacks.matching.regularizers import TotalVariation
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.defences import GaussianNoise
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.tensors import Tensors, global_norm


@dataclass(frozen=True, kw_only=True)
class PosteriorSettings:
    """How a prior is chosen, and how large edges and noise are taken to be.

    Attributes:
        public_images: Public images from which on a prior is fitted to them.
        choice_budget_share: Largest share of the budget for the choice among formulas.
        trial_evaluations: Evaluations of one trial of a formula.
        grey_correlation: Correlation of channels that are nearly equal.
        better_deviations: Standard deviations by which a formula must predict better than the one before it.
        thinning_noise_ratio: Noise added to the gradient that trials see, over the noise that it has.
        edge_difference: Mean difference of neighbouring pixels, in [0, 1].
        edge_rounding: Difference up to which the edges' penalty is quadratic, in [0, 1].
        approach_edges_weight: Weight of the edges in the approach, where nothing else is known of images.
        drowning_noise_ratio: Noise over the gradient above which its direction holds no information.
    """

    public_images: int = 16
    choice_budget_share: float = 0.4
    trial_evaluations: int = 40
    grey_correlation: float = 0.99
    better_deviations: float = 1.0
    thinning_noise_ratio: float = 0.5
    edge_difference: float = 0.05
    edge_rounding: float = 0.02
    approach_edges_weight: float = 0.15
    drowning_noise_ratio: float = 5.0


SETTINGS = PosteriorSettings()
_OPTIMIZER, _OPTIMIZER_WITH_KINKS = LBFGS(line_search="strong_wolfe"), Adam(lr=0.1, schedule=CosineDecay())


@dataclass(frozen=True, kw_only=True)
class MaximumAPosteriori(IterativeAttack):
    """Minimise ‖g' - g‖²/2σ² plus the negative logarithm of an image prior (arXiv:2111.04706).

    The prior is Gaussian, ½‖w‖² in whitened coordinates, times a prior of edges: differences of neighbouring pixels
    follow a Laplace distribution of mean size 0.05. The two overlap, so neither has its full weight. Unless a start is
    given, the attack first approaches by the cosine distance with edges alone (as `Modern` does, but with a weight that
    depends on the noise): on trained networks with kinks the posterior's own descent rarely succeeds from afar. The
    approach is left out where noise drowns the gradient: then the prior's mean is the better start.

    Applies where the gradient carries Gaussian noise whose strength is known: declared in the threat model, or given.

    Args:
        prior: Gaussian prior of images. None: as `choose_prior` finds it.
        noise: Standard deviation per coordinate, in units of the gradient; None: as `known_noise` finds it.
        weight, edges: Of the Gaussian's and of the edges' negative log-density.
        approach: Share of the budget for the first approach, in [0, 1).
        optimizer: Of w. None: L-BFGS, or Adam in networks with kinks.
    """

    prior: ImagePrior | None = None
    noise: float | None = None
    weight: float = 0.7
    edges: float = 0.03
    approach: float = 0.5
    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        if self.noise is not None and not self.noise > 0:
            raise InvalidInputError(f"noise must be > 0 or None, got {self.noise!r}.")
        if not 0 <= self.approach < 1:
            raise InvalidInputError(f"approach must be in [0, 1), got {self.approach!r}.")

    def start(
        self, observation: Observation, generator: torch.Generator, *, at: Tensor | None = None
    ) -> Run | Reconstruction:
        # A gradient that was scaled or limited differs from its simulation, so that squared errors mean nothing.
        if others := [d for d in observation.threat_model.defences if not isinstance(d, GaussianNoise)]:
            return Reconstruction.not_applicable(observation, f"simulated gradients lack {others[0]!r}")
        sigma = known_noise(observation) if self.noise is None else self.noise
        if sigma is None:
            return Reconstruction.not_applicable(observation, "no Gaussian noise of known strength on the gradient")
        observation = with_labels(observation, generator)  # once for all stages
        known = replace(self, noise=sigma)
        matching = known._matching(observation).start(observation, generator, at=at)
        if isinstance(matching, Reconstruction) or (at is not None and self.prior is not None):
            return matching
        return _PosteriorRun(known, observation, generator, at)

    def _matching(self, observation: Observation) -> GradientMatching:
        """Return the descent itself."""
        assert self.noise is not None
        optimizer = self.optimizer or (_OPTIMIZER_WITH_KINKS if has_kinks(observation) else _OPTIMIZER)
        edges = _edges(observation, self.edges)
        return GradientMatching(
            objective=SquaredError(scale=_as_tensor(1 / (2 * self.noise**2), observation)),
            parametrization=Whitened(prior=PowerLawPrior() if self.prior is None else self.prior, weight=self.weight),
            regularizers=(replace(edges, rounding=SETTINGS.edge_rounding * _unit(observation)),) if self.edges else (),
            optimizer=optimizer,
            label=self.name,
        )

    def _approach(self, observation: Observation) -> GradientMatching:
        """Return the approach: near the truth a cosine distance is ‖g' - g‖²/2‖g‖²."""
        assert self.noise is not None
        factor = (self.noise / max(float(global_norm(observation.gradients)), 1e-30)) ** 2
        modern = Modern()
        _, *others = modern.regularizers
        return replace(modern, regularizers=(_edges(observation, SETTINGS.approach_edges_weight * factor), *others))


def _is_drowned(observation: Observation, noise: float) -> bool:
    """Tell whether noise of a deviation per coordinate is, by its expected norm, too large for the approach."""
    expected = noise**2 * sum(g.numel() for g in observation.gradients.values())
    return float(global_norm(observation.gradients)) ** 2 < expected * (1 + 1 / SETTINGS.drowning_noise_ratio**2)


def _unit(observation: Observation) -> float:
    """Return how many input units a pixel's range from 0 to 1 is, a mean over channels."""
    return float(torch.tensor([1 / s for s in observation.normalization.std]).mean())


def _edges(observation: Observation, weight: float) -> TotalVariation:
    """Return the negative log-density of Laplacian differences times a weight, for a variation that is a mean."""
    of_mean = weight * math.prod(observation.shape) / (SETTINGS.edge_difference * _unit(observation))
    return TotalVariation(weight=_as_tensor(of_mean, observation), colours=True)


def _as_tensor(number: float, observation: Observation) -> float:
    """Return a setting that differs between audits as a tensor, so that one compiled evaluation serves all audits."""
    return cast(float, torch.tensor(number, device=observation.device))


class _PosteriorRun:
    """The choice of a prior and the approach in the first cycle, then the descent."""

    def __init__(
        self, attack: MaximumAPosteriori, observation: Observation, generator: torch.Generator, at: Tensor | None
    ) -> None:
        self.attack, self.observation, self.generator, self.at = attack, observation, generator, at
        self.run: Run | None = None
        self.approached: Reconstruction | None = None
        self.cost = 0
        self.path: list[tuple[int, Tensor]] = []

    @property
    def evaluations(self) -> int:
        return self.cost + (0 if self.run is None else self.run.evaluations)

    @property
    def finished(self) -> bool:
        return self.run is not None and self.run.finished

    def advance(self, budget: Budget) -> None:
        meter = Meter(budget)
        if self.run is None:
            self._prepare(meter)
        if self.run is not None and not meter.exhausted:
            self.run.advance(part_of(meter, 1.0))

    def _prepare(self, meter: Meter) -> None:
        attack, at, noise = self.attack, self.at, self.attack.noise
        assert noise is not None
        if attack.prior is None:
            prior, cost = choose_prior(
                self.observation, noise, budget=meter.budget, generator=self.generator, by=attack
            )
            meter.spend(cost)
            attack = replace(attack, prior=prior)
        wanted = at is None and attack.approach and not _is_drowned(self.observation, noise)
        if wanted and meter.remaining > 1 and not meter.exhausted:
            first = attack._approach(self.observation)
            found = first(self.observation, budget=part_of(meter, attack.approach), generator=self.generator)
            self.path = [(meter.evaluations + spent, images) for spent, images in found.path]
            meter.spend(found.evaluations)
            self.approached, at = found, found.inputs
        self.cost = meter.evaluations
        started = attack._matching(self.observation).start(self.observation, self.generator, at=at)
        assert not isinstance(started, Reconstruction)  # one was started before
        self.run = started

    def result(self) -> Reconstruction:
        assert self.run is not None
        if self.approached is not None and not self.run.evaluations:  # no time was left for the descent
            return replace(
                self.approached, attack=self.attack.name, evaluations=self.evaluations, path=tuple(self.path)
            )
        found = self.run.result()
        path = (*self.path, *((self.cost + spent, images) for spent, images in found.path))
        return replace(found, evaluations=self.evaluations, path=path)


def choose_prior(
    observation: Observation, noise: float, *, budget: Budget, generator: torch.Generator, by: MaximumAPosteriori
) -> tuple[ImagePrior, int]:
    """Return `FittedPrior.fit` of the public images, 16 or more, otherwise a formula; and what the choice cost.

    The formula is the one whose image, found on one part of the information, predicts the other part best.

    For ε drawn as the noise was, g + t ε and g - ε / t carry independent noise (Gaussian thinning; Leiner et al.,
    arXiv:2112.11079). Each formula's image is found on the first and judged by the squared error to the second. This
    needs no truth, and penalises both a prior that lets noise into the image and one that smooths detail away.
    Formulas are tried from rough to smooth, and one must predict better than noise explains to replace the one before
    it; then the best is tried with channels that are nearly equal.

    Args:
        observation: What the adversary knows.
        noise: Standard deviation per coordinate.
        budget: Of the attack; the choice takes two fifths at most, and tries fewer formulas where that is little.
        generator: Draws ε and the starts.
        by: The attack that finds the images.
    """
    if isinstance(first := prior_of(observation), FittedPrior):
        return first, 0
    formulas = [formula for formula in FORMULAS if formula.colour == PowerLawPrior.colour]
    if budget.evaluations is not None:
        affordable = SETTINGS.choice_budget_share * budget.evaluations / SETTINGS.trial_evaluations - 1
        formulas = formulas[: int(min(len(formulas), affordable))]
    observation = with_labels(observation, generator)
    if len(formulas) < 2 or observation.labels is None:
        return first, 0
    trials = _Trials(observation, noise, Meter(budget), len(formulas) + 1, generator, by)
    best = formulas[0]
    predicted = trials.predict(best)
    for formula in formulas[1:]:
        other = trials.predict(formula)
        if trials.is_better(other, predicted):
            best, predicted = formula, other
    if observation.input_shape[0] > 1:  # roughness first, then colour
        grey = replace(best, colour=SETTINGS.grey_correlation)
        if trials.is_better(trials.predict(grey), predicted):
            best = grey
    return best, trials.meter.evaluations


class _Trials:
    """Short attacks under one prior each, on a gradient with more noise; they predict the gradient that was kept."""

    def __init__(
        self,
        observation: Observation,
        noise: float,
        meter: Meter,
        most: int,
        generator: torch.Generator,
        by: MaximumAPosteriori,
    ) -> None:
        self.observation, self.noise, self.meter, self.generator = observation, noise, meter, generator
        self.seen, self.kept = _thin(observation, noise, generator)
        deviation = noise * math.sqrt(1 + SETTINGS.thinning_noise_ratio**2)
        # Trials are short, and judge the Gaussian part alone.
        optimizer = by.optimizer or _OPTIMIZER
        self.attack = replace(by, noise=deviation, weight=1.0, edges=0.0, approach=0.0, optimizer=optimizer)
        evaluations = math.inf if meter.budget.evaluations is None else meter.budget.evaluations
        self.share = min(SETTINGS.choice_budget_share / most, SETTINGS.trial_evaluations / evaluations)
        self.made = 0

    def predict(self, prior: ImagePrior) -> dict[str, Tensor]:
        """Return the gradient of the image that is found under a prior."""
        budget = part_of(self.meter, self.share / (1 - self.made * self.share))
        found = replace(self.attack, prior=prior)(self.seen, budget=budget, generator=self.generator)
        self.made += 1
        self.meter.spend(found.evaluations)
        assert found.labels is not None
        return self.observation.simulate(found.inputs.to(self.observation.input_dtype), found.labels)

    def is_better(self, one: Tensors, other: Tensors) -> bool:
        """Tell whether a prediction is better than another by more than noise explains."""
        return _predicts_better(one, other, self.kept, self.noise)


def _predicts_better(one: Tensors, other: Tensors, kept: Observation, noise: float) -> bool:
    """Tell whether a prediction of the kept gradient beats another by more than its noise explains.

    The difference of their squared errors has the standard deviation 2 s ‖one - other‖ for noise of deviation s.
    """
    gain = float(SquaredError()(other, kept.gradients) - SquaredError()(one, kept.gradients))
    distance = float(SquaredError()(one, dict(other))) ** 0.5
    return (
        gain > SETTINGS.better_deviations * 2 * noise * math.sqrt(1 + 1 / SETTINGS.thinning_noise_ratio**2) * distance
    )


def _thin(observation: Observation, noise: float, generator: torch.Generator) -> tuple[Observation, Observation]:
    """Return the gradient twice, with independent noise of √(1 + t²) and of √(1 + 1/t²) times what it has."""
    ratio = SETTINGS.thinning_noise_ratio
    drawn = {name: noise * torch.randn(g.shape, generator=generator).to(g) for name, g in observation.gradients.items()}
    seen, kept = (
        replace(observation, gradients={name: g + factor * drawn[name] for name, g in observation.gradients.items()})
        for factor in (ratio, -1 / ratio)
    )
    return seen, kept


def _misfit(found: Reconstruction, observation: Observation) -> float:
    if found.labels is None or not math.isfinite(found.matching_loss):
        return math.inf
    simulated = observation.simulate(found.inputs.to(observation.input_dtype), found.labels)
    return float(SquaredError()(simulated, observation.gradients))


def energy(observation: Observation, found: Reconstruction, *, prior: ImagePrior, noise: float) -> float:
    """Return the negative log-posterior of a reconstruction, up to a constant: lower is more probable."""
    white = prior.white(observation.normalization.to_pixels(found.inputs.float()))
    return _misfit(found, observation) / (2 * noise**2) + 0.5 * float((white**2).sum())


def prior_of(observation: Observation) -> ImagePrior:
    """Return the prior that the adversary knows: fitted to public images if they hold enough, otherwise a formula."""
    public = observation.public_images
    if public is None or len(public) < SETTINGS.public_images:
        return PowerLawPrior()
    return FittedPrior.fit(public.to(observation.device))


def known_noise(observation: Observation) -> float | None:
    """Return the standard deviation per coordinate of the Gaussian noise that the adversary knows of, or None.

    The strength of relative noise refers to the clean gradient; independent noise adds in squares, so the clean norm
    follows from that of the shared one.
    """
    coordinates = sum(g.numel() for g in observation.gradients.values())
    square = float(global_norm(observation.gradients)) ** 2
    variance = observation.noise_std**2
    for defence in reversed(observation.threat_model.defences):  # in reverse: the last one acted last
        if not isinstance(defence, GaussianNoise):
            return None
        if defence.std is not None:
            added = defence.std**2 * coordinates
        else:
            assert defence.relative is not None
            added = square * defence.relative**2 / (1 + defence.relative**2)
            variance += added / coordinates
        square = max(square - added, 0.0)
    return math.sqrt(variance) if variance > 0 else None
