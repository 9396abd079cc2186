"""The attacker's capacity: how much work, knowledge and luck a reconstruction takes.

Equal work means equal numbers of simulated gradients: one outer step of L-BFGS is up to 25 of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_gradaudit.attacks.base import Attack, input_gradient
from lightning_gradaudit.attacks.objectives import CosineDistance
from lightning_gradaudit.baseline import Baseline
from lightning_gradaudit.budget import Budget
from lightning_gradaudit.client import Client
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.similarity import similarity, usable_similarity
from lightning_gradaudit.observation import Observation
from lightning_gradaudit.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.snapshot import Snapshot

TARGET_EXPOSURE = 0.3
"""Exposure at which effort is read off: the gate's default limit."""
BUDGETS = (25, 50, 100, 200, 400)
_DESCENT = 0.95
_NOISE_STD = 0.25  # of the pixels a start is blurred with: as large as the variation of natural images


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Evaluations an attacker needs to reach an exposure.

    Attributes:
        evaluations: The number; when censored, the largest that was tried, which did not suffice.
        censored: Whether the exposure was never reached.
    """

    evaluations: int
    censored: bool

    @property
    def log10(self) -> float:
        """Logarithm of the evaluations to base 10; infinite when censored."""
        return math.inf if self.censored else math.log10(max(1, self.evaluations))


@dataclass(frozen=True, kw_only=True, eq=False)
class EffortPoint:
    """What one budget reached.

    Attributes:
        evaluations: Spent.
        exposure: (B,) in [0, 1].
        reconstruction: The attack's answer.
    """

    evaluations: int
    exposure: Tensor
    reconstruction: Reconstruction


def effort_of(trajectory: Sequence[tuple[int, float]], exposure: float, *, target: float = TARGET_EXPOSURE) -> Effort:
    """Read the effort of one finished attack off its trajectory, at no cost.

    Exposure is known at the end alone. When it reached the target, effort is where the objective had made 95% of its
    descent: the first recorded point from which on only polish followed. `effort_curve` measures it directly.

    Args:
        trajectory: (evaluations, objective) of the best run (`Reconstruction.trajectory`).
        exposure: What the attack reached.

    Raises:
        InvalidInputError: On an empty trajectory.
    """
    if not trajectory:
        raise InvalidInputError("trajectory: it is empty; closed forms have none.")
    if not exposure >= target:
        return Effort(evaluations=trajectory[-1][0], censored=True)
    first, last = trajectory[0][1], trajectory[-1][1]
    goal = first - _DESCENT * (first - last)
    return Effort(evaluations=next(spent for spent, loss in trajectory if loss <= goal), censored=False)


def effort_curve(
    snapshot: Snapshot,
    attack: Attack,
    *,
    budgets: Sequence[int] = BUDGETS,
    baseline: Baseline | None = None,
    seed: int = 0,
) -> list[EffortPoint]:
    """Run an attack afresh at growing budgets: its schedule depends on the budget, so one run cannot tell.

    Args:
        budgets: Evaluations, ascending; the sum is spent.
        baseline: Gallery and null; None: an empty one.
    """
    points = []
    for budget in budgets:
        result = attack(
            snapshot.observation,
            budget=Budget(evaluations=budget),
            generator=torch.Generator().manual_seed(seed),
        )
        points.append(
            EffortPoint(
                evaluations=result.evaluations,
                exposure=_exposure(snapshot, result, baseline),
                reconstruction=result,
            )
        )
    return points


def effort_to_reach(points: Sequence[EffortPoint], target: float = TARGET_EXPOSURE) -> Effort:
    """Return the least effort whose worst image reached the target; censored when none did."""
    if not points:
        raise InvalidInputError("points: expected at least one point of an effort curve.")
    reached = [point.evaluations for point in points if float(point.exposure.max()) >= target]
    most = max(point.evaluations for point in points)
    return Effort(evaluations=min(reached), censored=False) if reached else Effort(evaluations=most, censored=True)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One level of knowledge on the ladder.

    Attributes:
        knowledge: What the attacker has beyond the rung below.
        exposure: Mean over the batch, best of the restarts by matching loss, in [0, 1].
        restarts: The same for each restart.
        outcome: Of the best.
    """

    knowledge: str
    exposure: float
    restarts: tuple[float, ...]
    outcome: Outcome


def knowledge_ladder(
    snapshot: Snapshot,
    attack: Attack,
    *,
    budget: Budget,
    restarts: int = 1,
    baseline: Baseline | None = None,
    seed: int = 0,
) -> list[Rung]:
    """Attack with growing knowledge: nothing; the BatchNorm statistics; the mode; the labels.

    Without the statistics the attacker assumes mean 0 and variance 1, without the mode the other one of train and
    eval. Rungs that change nothing for this model (no BatchNorm, no layer that heeds the mode) are left out.
    """
    rungs = []
    for knowledge, observation in _ladder(snapshot):
        results = [
            attack(observation, budget=budget, generator=torch.Generator().manual_seed(seed + restart))
            for restart in range(restarts)
        ]
        exposures = [float(_exposure(snapshot, result, baseline).mean()) for result in results]
        best = min(range(restarts), key=lambda index: results[index].matching_loss)
        rungs.append(
            Rung(
                knowledge=knowledge,
                exposure=exposures[best],
                restarts=tuple(exposures),
                outcome=results[best].outcome,
            )
        )
    return rungs


def _ladder(snapshot: Snapshot) -> list[tuple[str, Observation]]:
    """Return what the attacker holds on each rung, least first."""
    full = replace(
        snapshot.observation,
        labels=snapshot.truth.labels,
        threat_model=replace(snapshot.observation.threat_model, labels_known=True),
    )
    without_labels = replace(full, labels=None, threat_model=replace(full.threat_model, labels_known=False))
    rungs = [("labels", full)]
    countable = snapshot.truth.labels.ndim == 1 and not snapshot.truth.labels.is_floating_point()
    below = without_labels if countable else full
    if _heeds_mode(below.client.module):
        rungs.append(("mode", below))
        below = replace(below, client=_other_mode(below))
    if any(name.endswith("running_mean") for name in below.buffers):
        rungs.append(("BatchNorm statistics", below))
        below = replace(below, buffers=_blank_statistics(below))
    rungs.append(("nothing", below))
    return rungs[::-1]


def _heeds_mode(module: nn.Module) -> bool:
    heeding = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return any(isinstance(each, heeding) for each in module.modules())


def _other_mode(observation: Observation) -> Client:
    client = copy.copy(observation.client)
    client.module = copy.deepcopy(observation.client.module)
    client.module.train(not any(each.training for each in client.module.modules() if _heeds_mode(each)))
    return client


def _blank_statistics(observation: Observation) -> dict[str, Tensor]:
    blank = {"running_mean": torch.zeros_like, "running_var": torch.ones_like}
    return {
        name: blank[name.rpartition(".")[2]](buffer) if name.rpartition(".")[2] in blank else buffer
        for name, buffer in observation.buffers.items()
    }


def _exposure(snapshot: Snapshot, result: Reconstruction, baseline: Baseline | None) -> Tensor:
    pixels = snapshot.observation.normalization.to_pixels(result.inputs.float()).clamp(0, 1).nan_to_num(0.5)
    scores = (baseline or Baseline()).score(pixels, snapshot.truth_pixels, snapshot.truth.labels)
    return scores.exposure


# How good a prior the attacker needs


@dataclass(frozen=True, kw_only=True)
class BasinPoint:
    """What matching makes of a start near the truth.

    Attributes:
        amount: a: the start is sqrt(1 - a²) of the truth's deviation from grey plus a of noise's.
        start, end: Mean similarity to the truth before and after, in [0, 1].
    """

    amount: float
    start: float
    end: float

    @property
    def gain(self) -> float:
        """How far the match pulls a start towards the truth, in [-1, 1]; below 0 it drives it away."""
        return self.end - self.start


def basin(
    snapshot: Snapshot,
    *,
    amounts: Sequence[float] = (0.3, 0.5, 0.7, 0.9),
    evaluations: int = 60,
    lr: float = 0.02,
    generator: torch.Generator,
) -> list[BasinPoint]:
    """Start the match from blurred truths: the gain tells how good a prior the attacker would need.

    It needs the truth, so it is an auditor's instrument and not an attack. Cosine distance, Adam on the gradient's
    sign, pixels kept in [0, 1]; similarity is SSIM (1 - NMSE below 8 pixels a side).

    Args:
        amounts: a in [0, 1] for each start.
        evaluations: Simulated gradients from each start.
        lr: First step in pixels, falling linearly to 0.
    """
    observation, truth = snapshot.observation, snapshot.truth_pixels
    measure = usable_similarity("ssim", *truth.shape[-2:])
    leaves = observation.leaves()
    points = []
    for amount in amounts:
        noise = _NOISE_STD * torch.randn(truth.shape, generator=generator).to(truth)
        start = (0.5 + math.sqrt(1 - amount**2) * (truth - 0.5) + amount * noise).clamp(0, 1)
        pixels = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([pixels], lr=lr)
        for step in range(evaluations):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / evaluations)
            pixels.grad = _descent(observation, pixels, snapshot.truth.labels, leaves).sign()
            optimizer.step()
            with torch.no_grad():
                pixels.clamp_(0, 1)
        points.append(
            BasinPoint(
                amount=amount,
                start=float(similarity(start.cpu(), truth.cpu(), measure).mean()),
                end=float(similarity(pixels.detach().cpu(), truth.cpu(), measure).mean()),
            )
        )
    return points


def pull(snapshot: Snapshot, *, radius: float = 0.03, draws: int = 4, generator: torch.Generator) -> float:
    """Return how well an attacker's step points to the truth from a little beside it, a mean cosine in [-1, 1].

    From x + δ with δ independent normal pixels, the cosine between δ and the sign of the matching loss' gradient. For
    a quadratic loss it falls with the condition of JᵀJ, beyond it with curvature and kinks: where the linearised
    analysis ends because the network is not linear, this ends too. An auditor's instrument.

    Args:
        radius: Standard deviation of δ, in pixels of [0, 1].
        draws: Simulated gradients to spend.
    """
    observation = snapshot.observation
    pixels = observation.normalization.to_pixels(snapshot.truth.inputs.to(observation.input_dtype))
    leaves = observation.leaves()
    cosines = []
    for _ in range(draws):
        moved = radius * torch.randn(pixels.shape, generator=generator).to(pixels)
        step = _descent(observation, (pixels + moved).requires_grad_(True), snapshot.truth.labels, leaves).sign()
        cosines.append(torch.cosine_similarity(step.flatten(), moved.flatten(), dim=0))
    return float(torch.stack(cosines).mean())


def _descent(observation: Observation, pixels: Tensor, labels: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    inputs = observation.normalization.from_pixels(pixels)
    distance = CosineDistance()(observation.simulate(inputs, labels, leaves), observation.gradients)
    return input_gradient(distance, [pixels])[0]
