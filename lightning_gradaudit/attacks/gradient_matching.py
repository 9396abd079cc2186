"""The one optimisation loop: find images whose simulated gradient matches the observed one.

Best-so-far, non-finite values, budgets and restarts are handled here and nowhere else; recipes only compose.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_gradaudit.attacks.base import Attack, check_second_derivatives, input_gradient
from lightning_gradaudit.attacks.labels import LabelEstimate, recover_labels
from lightning_gradaudit.attacks.objectives import CosineDistance, Objective, relative_squared_error
from lightning_gradaudit.attacks.regularizers import Regularizer
from lightning_gradaudit.budget import Budget, Meter
from lightning_gradaudit.defences import Tensors
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.observation import Observation
from lightning_gradaudit.reconstruction import Outcome, Reconstruction

_HOST_READS_EVERY = 50  # evaluations between two looks of the host at device values


class Optimizer(ABC):
    """Settings of a torch optimizer over the candidates."""

    @abstractmethod
    def build(self, variables: list[Tensor]) -> torch.optim.Optimizer:
        """Make the torch optimizer."""

    def learning_rate(self, progress: float) -> float | None:
        """Return the learning rate at a share of the budget in [0, 1]; None: leave it."""
        return None

    def transform(self, gradient: Tensor) -> Tensor:
        """Change a candidate's gradient before the step."""
        return gradient


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam with step decay; with `signed=True` on the sign of the gradient (Geiping et al., arXiv:2003.14053).

    Args:
        lr: Learning rate in units of the model's (normalised) input.
        signed: Feed only the gradient's sign.
        milestones: Shares of the budget at which the rate is multiplied by `gamma`.
        gamma: The factor.
    """

    lr: float = 0.1
    signed: bool = False
    milestones: tuple[float, ...] = (3 / 8, 5 / 8, 7 / 8)
    gamma: float = 0.1

    def build(self, variables: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(variables, lr=self.lr)

    def learning_rate(self, progress: float) -> float:
        return float(self.lr * self.gamma ** sum(progress >= m for m in self.milestones))

    def transform(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.signed else gradient


@dataclass(frozen=True, kw_only=True)
class LBFGS(Optimizer):
    """L-BFGS, up to 20 iterations and 25 evaluations a step (DLG's published setting with lr 1)."""

    lr: float = 1.0
    history: int = 100
    line_search: Literal["strong_wolfe"] | None = None

    def build(self, variables: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            variables, lr=self.lr, history_size=self.history, line_search_fn=self.line_search, max_iter=20
        )


class _BudgetSpentError(Exception):
    """Leaves an optimizer's inner loop exactly at the budget."""


class _SoftLabelsRefusedError(Exception):
    """The loss needs class indices."""


@dataclass
class _Best:
    """The best candidate so far: stored with the loss it had, both before the step that follows it."""

    loss: Tensor
    inputs: Tensor
    label_logits: Tensor | None
    trajectory: list[tuple[int, float]] = field(default_factory=list)

    def offer(self, loss: Tensor, inputs: Tensor, label_logits: Tensor | None) -> None:
        """Keep the candidate if its loss is finite and lower, without a synchronisation with the device."""
        better = loss < self.loss  # false for NaN
        self.loss = torch.where(better, loss, self.loss)
        self.inputs = torch.where(better, inputs, self.inputs)
        if label_logits is not None and self.label_logits is not None:
            self.label_logits = torch.where(better, label_logits, self.label_logits)


@dataclass(frozen=True, kw_only=True)
class GradientMatching(Attack):
    """Minimise objective(simulate(x, y), observed) + Σ regularisers over images x (and soft labels).

    Args:
        objective: Distance between gradients.
        regularizers: Penalties on the images.
        optimizer: Settings of the optimizer.
        labels: Where labels come from when they are not given: "recovered" by counting (see `attacks.labels`),
            or "joint": one soft label per sample optimised along with its image.
        box: Keep pixels in [0, 1] after every step.
        restarts: Independent starts that share the budget; the lowest loss wins.
        tolerance: Stop when the objective falls below it.
        label: Name in tables.
        max_batch: Largest batch the method was published for; beyond it, it does not apply. None: any.
    """

    objective: Objective = CosineDistance()
    regularizers: tuple[Regularizer, ...] = ()
    optimizer: Optimizer = Adam(signed=True)
    labels: Literal["recovered", "joint"] = "recovered"
    box: bool = True
    restarts: int = 1
    tolerance: float = 1e-11
    label: str = "GradientMatching"
    max_batch: int | None = None

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise InvalidInputError(f"restarts must be >= 1, got {self.restarts}.")
        if self.labels not in ("recovered", "joint"):
            raise InvalidInputError(f"labels must be 'recovered' or 'joint', got {self.labels!r}.")

    @property
    def name(self) -> str:
        return self.label

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        if self.max_batch is not None and observation.batch_size > self.max_batch:
            return Reconstruction.not_applicable(
                observation, f"{self.label} is defined for at most {self.max_batch} image(s) a batch"
            )
        meter = Meter(budget)
        estimate = self._labels(observation, generator)
        joint = estimate.labels is None and self.labels == "joint" and estimate.classes > 0
        if estimate.labels is None and not joint:
            return Reconstruction.not_applicable(observation, f"labels unknown: {estimate.reason}")
        leaves = observation.leaves()
        runs: list[_Best] = []
        for restart in range(self.restarts):
            share = math.ceil(meter.remaining / (self.restarts - restart)) if meter.remaining < math.inf else math.inf
            if runs and meter.exhausted:
                break
            try:
                runs.append(self._restart(observation, estimate, joint, meter, share, leaves, generator))
            except _SoftLabelsRefusedError as error:
                return Reconstruction.not_applicable(
                    observation, f"the loss does not accept soft labels ({error})", evaluations=meter.evaluations
                )
        losses = [float(best.loss) for best in runs]
        return self._result(observation, runs[losses.index(min(losses))], estimate, meter, leaves)

    def _labels(self, observation: Observation, generator: torch.Generator) -> LabelEstimate:
        if observation.labels is not None:
            return LabelEstimate(observation.labels)
        estimate = recover_labels(observation, generator=generator)
        return replace(estimate, labels=None) if self.labels == "joint" else estimate

    def _restart(
        self,
        observation: Observation,
        estimate: LabelEstimate,
        joint: bool,
        meter: Meter,
        share: float,
        leaves: Tensors,
        generator: torch.Generator,
    ) -> _Best:
        inputs = _initial(observation, generator)
        variables = [inputs]
        if joint:
            logits = torch.randn((observation.batch_size, estimate.classes), generator=generator)
            variables.append(logits.to(observation.device))
        for variable in variables:
            variable.requires_grad_(True)
        optimizer = self.optimizer.build(variables)
        best = _Best(
            torch.full((), torch.inf, device=observation.device),
            inputs.detach().clone(),
            variables[1].detach().clone() if joint else None,
        )
        first = meter.evaluations
        alive = True

        def closure() -> Tensor:
            if meter.exhausted or meter.evaluations - first >= share:
                raise _BudgetSpentError
            labels = variables[1].softmax(1) if joint else estimate.labels
            assert labels is not None
            meter.spend()
            simulated = self._simulate(observation, inputs, labels, leaves, first=meter.evaluations == 1, joint=joint)
            loss = self.objective(simulated, observation.gradients)
            for regularizer in self.regularizers:
                loss = loss + regularizer(inputs)
            for variable, gradient in zip(variables, input_gradient(loss, variables), strict=True):
                variable.grad = self.optimizer.transform(gradient)
            best.offer(loss.detach(), inputs.detach(), variables[1].detach() if joint else None)
            return loss.detach()

        box = observation.box if self.box else None
        looked = first - _HOST_READS_EVERY
        while alive:
            spent = meter.evaluations - first
            if (rate := self.optimizer.learning_rate(_share_spent(meter, spent, share))) is not None:
                optimizer.param_groups[0]["lr"] = rate
            before = meter.evaluations
            try:
                loss = optimizer.step(closure)  # type: ignore[arg-type]
            except _BudgetSpentError:
                break
            if box is not None:
                with torch.no_grad():
                    torch.minimum(torch.maximum(inputs, box[0]), box[1], out=inputs)
            if meter.evaluations - looked >= _HOST_READS_EVERY:
                looked = meter.evaluations
                best.trajectory.append((meter.evaluations, float(best.loss)))
                alive = math.isfinite(float(loss)) and float(best.loss) > self.tolerance  # type: ignore[arg-type]
            alive = alive and meter.evaluations > before
        best.trajectory.append((meter.evaluations, float(best.loss)))
        return best

    @staticmethod
    def _simulate(
        observation: Observation, inputs: Tensor, labels: Tensor, leaves: Tensors, *, first: bool, joint: bool
    ) -> dict[str, Tensor]:
        if not first:
            return observation.simulate(inputs, labels, leaves)
        try:
            simulated = observation.simulate(inputs, labels, leaves)
        except Exception as error:
            if joint:  # whatever a loss makes of probabilities in place of classes
                raise _SoftLabelsRefusedError(error) from error
            raise
        check_second_derivatives(simulated)
        return simulated

    def _result(
        self, observation: Observation, best: _Best, estimate: LabelEstimate, meter: Meter, leaves: Tensors
    ) -> Reconstruction:
        labels = best.label_logits.softmax(1) if best.label_logits is not None else estimate.labels
        assert labels is not None
        finite = math.isfinite(float(best.loss))
        matching = relative_squared_error(observation.simulate(best.inputs, labels, leaves), observation.gradients)
        outcome = Outcome.CONVERGED if float(best.loss) <= self.tolerance else Outcome.BUDGET_SPENT
        return Reconstruction(
            inputs=best.inputs,
            labels=labels.argmax(1) if best.label_logits is not None else labels,
            matching_loss=float(matching) if finite else math.inf,
            evaluations=meter.evaluations,
            outcome=outcome if finite else Outcome.NONFINITE,
            attack=self.label,
            trajectory=tuple(best.trajectory),
        )


def _share_spent(meter: Meter, spent: int, share: float) -> float:
    by_count = spent / share if math.isfinite(share) else 0.0
    by_time = meter.seconds / meter.budget.seconds if meter.budget.seconds else 0.0
    return min(1.0, max(by_count, by_time))


def _initial(observation: Observation, generator: torch.Generator) -> Tensor:
    """Draw N(0, 1) in normalised units: around the middle of the pixel range where no normalisation is known."""
    noise = torch.randn(observation.shape, generator=generator).to(observation.device)
    if observation.normalization.std != (1.0,):
        return noise
    return observation.normalization.from_pixels(0.5 + 0.25 * noise)
