"""One start of gradient matching: its variables, its optimizer, and the best point so far."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import progress_of
from lightning_gradaudit.attacks.matching.optimizers import Optimizer
from lightning_gradaudit.attacks.matching.parametrizations import Parametrization
from lightning_gradaudit.attacks.matching.problem import LossAndGradient, MatchingProblem, SoftLabelsRefusedError
from lightning_gradaudit.errors import described
from lightning_gradaudit.simulation.observation import Observation

_EVALUATIONS_BETWEEN_HOST_READS = 50  # reading a value waits for the device
_PATH_GROWTH_RATIO = 1.3  # of the evaluations at two images that are kept: a long run keeps a few dozen


class _BudgetSpentError(Exception):
    """Leaves an optimizer's inner loop exactly at the budget."""


class Candidate:
    """The variables of one start, and the best of them so far.

    Args:
        observation: What is matched; it has labels unless they are optimised.
        problem: Evaluates images and labels.
        parametrization: Maps variables to images.
        optimizer: Settings of the optimizer.
        tolerance: Loss at which the search ends.
        soft_classes: Number of classes where soft labels are optimised; 0: the labels are given.
        generator: Draws the start.
        at: Images (B, C, H, W) to start from; None: draw them.

    Attributes:
        pull: A penalty on the images that the other starts set; None: there is none.
        best: The variables of the lowest loss, and `loss` that loss, infinite at first.
        refusal: Why the search cannot run; empty: it can.
    """

    def __init__(
        self,
        observation: Observation,
        problem: MatchingProblem,
        *,
        parametrization: Parametrization,
        optimizer: Optimizer,
        tolerance: float,
        soft_classes: int,
        generator: torch.Generator,
        at: Tensor | None,
    ) -> None:
        self.observation, self.problem = observation, problem
        self.parametrization, self.settings, self.tolerance = parametrization, optimizer, tolerance
        given = None if at is None else parametrization.variables(at, observation)
        drawn = parametrization.start(observation, generator) if given is None else given
        self.best = [v.detach().clone() for v in drawn]
        self.soft = soft_classes > 0
        if self.soft:
            logits = torch.randn((observation.batch_size, soft_classes), generator=generator)
            self.best.append(logits.to(observation.device))
        self.variables = self.best
        self.loss = torch.full((), torch.inf, device=observation.device)
        self.evaluations, self.finished, self.refusal = 0, False, ""
        self.trajectory: list[tuple[int, float]] = []
        self.path: list[tuple[int, Tensor]] = []
        self.pull: Callable[[Tensor], Tensor] | None = None

    def images(self, variables: list[Tensor]) -> Tensor:
        """Return the images (B, C, H, W) of variables."""
        return self.parametrization.images(self._of_images(variables), self.observation)

    def labels(self, variables: list[Tensor]) -> Tensor:
        """Return the labels as they were given, or (B, classes) probabilities where they are optimised."""
        if self.soft:
            return variables[-1].softmax(1)
        assert self.observation.labels is not None
        return self.observation.labels

    def _of_images(self, variables: list[Tensor]) -> list[Tensor]:
        return variables[:-1] if self.soft else variables

    def begin(self, budget: Budget) -> None:
        """Prepare a cycle of the schedule from the best point so far."""
        self.meter = Meter(budget)
        self.variables = [v.detach().clone().requires_grad_() for v in self.best]
        self.optimizer = self.settings.build(self.variables)
        self.loss_factor: Tensor | None = None
        self._last_read = -_EVALUATIONS_BETWEEN_HOST_READS

    def advance(self, budget: Budget) -> None:
        """Spend a budget on one cycle of the schedule."""

        def closure() -> Tensor:
            if self.meter.exhausted:
                raise _BudgetSpentError
            return self.evaluate()

        self.begin(budget)
        while not self.finished:
            if (rate := self.settings.learning_rate(progress_of(self.meter))) is not None:
                self.optimizer.param_groups[0]["lr"] = rate
            before = self.meter.evaluations
            try:
                loss = self.optimizer.step(closure)  # type: ignore[arg-type]
            except _BudgetSpentError:
                break
            except SoftLabelsRefusedError as error:
                self.refusal, self.finished = f"the loss does not accept soft labels ({described(error)})", True
                break
            self._after_step(loss, self.meter.evaluations - before)  # type: ignore[arg-type]
        self._note_progress(final=True)

    def _after_step(self, loss: Tensor, evaluations: int) -> None:
        self.parametrization.project(self._of_images(self.variables), self.observation)
        if self.meter.evaluations - self._last_read >= _EVALUATIONS_BETWEEN_HOST_READS:
            self._last_read = self.meter.evaluations
            self._note_progress()
            self.finished = not math.isfinite(float(loss)) or float(self.loss) <= self.tolerance
        self.finished = self.finished or self.settings.stalled(evaluations)

    def _note_progress(self, *, final: bool = False) -> None:
        """Append to the trajectory; append to the path at distances that grow, so that it stays short."""
        self.trajectory.append((self.evaluations, float(self.loss)))
        last = self.path[-1][0] if self.path else 0
        if self.evaluations > last and (final or self.evaluations >= _PATH_GROWTH_RATIO * last):
            with torch.no_grad():
                self.path.append((self.evaluations, self.images(self.best).detach().cpu().clone()))

    def evaluate(self) -> Tensor:
        """Evaluate the variables, set their gradients, and keep them if they are the best so far."""
        images, labels = self.images(self.variables), self.labels(self.variables)
        found = self.problem(images, labels, soft=self.soft)
        self.meter.spend()
        self.evaluations += 1
        loss, gradients = self._differentiate(images, labels, found)
        self._keep_if_better(loss)
        if self.loss_factor is None:
            factor = self.settings.scale(gradients)
            self.loss_factor = torch.ones_like(loss) if factor is None else factor
        progress = progress_of(self.meter)
        for variable, gradient in zip(self.variables, gradients, strict=True):
            transformed = self.settings.transform(self.loss_factor * gradient, progress)
            # In the variable's memory layout: layers in channels_last return gradients in theirs, and fused
            # optimizers assume that both are the same.
            variable.grad = torch.empty_like(variable).copy_(transformed)
        return self.loss_factor * loss

    def _differentiate(self, images: Tensor, labels: Tensor, found: LossAndGradient) -> tuple[Tensor, list[Tensor]]:
        """Return the loss plus penalties on the variables, and its derivatives with respect to them."""
        loss, outputs, weights = found.loss, [images], [found.inputs_gradient]
        if found.labels_gradient is not None:
            outputs, weights = [*outputs, labels], [*weights, found.labels_gradient]
        pulled = None if self.pull is None else self.pull(images)
        for penalty in (self.parametrization.penalty(self._of_images(self.variables)), pulled):
            if penalty is not None:
                loss = loss + penalty.detach()
                outputs, weights = [*outputs, penalty], [*weights, torch.ones_like(penalty)]
        return loss, list(torch.autograd.grad(outputs, self.variables, weights))

    def _keep_if_better(self, loss: Tensor) -> None:
        """Keep the variables if their loss is finite and lower, without waiting for the device."""
        better = loss < self.loss  # false for NaN
        self.loss = torch.where(better, loss, self.loss)
        self.best = [torch.where(better, new.detach(), old) for new, old in zip(self.variables, self.best, strict=True)]
