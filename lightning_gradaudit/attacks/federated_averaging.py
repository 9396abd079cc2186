"""Several local epochs whose order the adversary does not know: each has candidates of its own, which must agree.

A client of federated averaging passes over its images several times and shuffles them in between. Without the order the
adversary cannot simulate which images are in the same batch of the second epoch; but all epochs see the same images.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import advance_share
from lightning_gradaudit.attacks.labels.recovery import known_labels
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.regularizers import Regularizer
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.gradients import relative_squared_error
from lightning_gradaudit.simulation.observation import Observation

_TRIAL_BUDGET_SHARE = 0.5  # that the arrangements of labels are compared for
_DRAWS_PER_ARRANGEMENT = 20  # until there are taken to be no more


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochConsistency(Regularizer):
    """Mean squared distance of each later epoch's candidates to those of the first, after the best matching.

    It does not change when the candidates of an epoch are put in another order together with their labels.

    Args:
        labels: (epochs, B) of the candidates; images are matched with their own class.
        weight: In units of the objective per squared input unit.
    """

    labels: Tensor = field(repr=False)
    weight: float = 1e-2

    def __call__(self, inputs: Tensor) -> Tensor:
        first, *later = inputs.split(self.labels.shape[1])
        orders = self.partners(inputs)[1:]
        distances = [((epoch - first[order]) ** 2).mean() for epoch, order in zip(later, orders, strict=True)]
        return self.weight * torch.stack(distances).mean()

    def partners(self, inputs: Tensor) -> list[Tensor]:
        """Return for the images of each epoch their own partners among the first's, indices (B,)."""
        first, *later = inputs.detach().flatten(1).split(self.labels.shape[1])
        found = [torch.arange(len(first), device=inputs.device)]
        for epoch, labels in zip(later, self.labels[1:], strict=True):
            cost = torch.cdist(epoch, first) ** 2
            cost = cost + (labels[:, None] != self.labels[0]) * (cost.max() * len(cost) + 1)
            _, order = linear_sum_assignment(cost.cpu().numpy())
            found.append(torch.as_tensor(order, device=inputs.device))
        return found


@dataclass(frozen=True, kw_only=True)
class FedAvgMatching(Attack):
    """Match the change of the weights over several local epochs without knowing their order.

    Each epoch gets candidates of its own and is simulated in its own batches; a penalty on what does not depend on
    the order draws the epochs together, and the answer is their mean after one-to-one matching. After Dimitrov et al.
    (arXiv:2206.12395), whose penalty compares means of image features instead of matched images.

    Labels of later epochs are not known by place even where labels are given, and which labels meet in a batch matters
    as much as which images do. Several arrangements are tried for half of the budget, and the best of them goes on.

    Where the order is known, or there is one epoch, whose images may be numbered as they come, `matching` runs alone.

    Args:
        matching: What the candidates of all epochs are found with.
        agreement: Weight of the consistency between epochs.
        guesses: Most arrangements of labels that are tried.
    """

    matching: GradientMatching = GradientMatching()
    agreement: float = 1e-2
    guesses: int = 6

    def __post_init__(self) -> None:
        if self.guesses < 1:
            raise InvalidInputError(f"guesses must be >= 1, got {self.guesses!r}.")
        if not self.agreement >= 0:
            raise InvalidInputError(f"agreement must be >= 0, got {self.agreement!r}.")

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        sizes = [sum(len(each.indices) for each in epoch) for epoch in observation.protocol.epochs]
        if observation.threat_model.order_known or len(sizes) == 1:
            return replace(self.matching(observation, budget=budget, generator=generator), attack=self.name)
        if set(sizes) != {observation.batch_size}:
            return Reconstruction.not_applicable(
                observation, f"epochs of unknown order must be whole: {sizes} of {observation.batch_size} images"
            )
        estimate = known_labels(observation, generator=generator)
        labels = estimate.labels
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            reason = estimate.reason or "soft targets"
            return Reconstruction.not_applicable(observation, f"class labels unknown: {reason}")
        runs = []
        for arranged in _arrange_labels(observation, labels, self.guesses, generator):
            unrolled = replace(
                observation, batch_size=sum(sizes), labels=arranged, protocol=observation.protocol.unrolled()
            )
            consistency = EpochConsistency(labels=arranged.reshape(len(sizes), -1), weight=self.agreement)
            attack = replace(self.matching, regularizers=(*self.matching.regularizers, consistency))
            run = attack.start(unrolled, generator)
            if isinstance(run, Reconstruction):
                return Reconstruction.not_applicable(observation, run.reason)
            runs.append((run, unrolled, consistency))
        meter = Meter(budget)
        tried = []
        for index, (run, _, _) in enumerate(runs if len(runs) > 1 else ()):
            if not meter.exhausted:
                advance_share(run, meter, _TRIAL_BUDGET_SHARE / (len(runs) - _TRIAL_BUDGET_SHARE * index))
                tried.append((run.result().matching_loss, index))
        run, unrolled, consistency = runs[min(tried)[1] if tried else 0]
        if not meter.exhausted:
            advance_share(run, meter, 1.0)
        return replace(_average_epochs(observation, unrolled, run.result(), consistency), evaluations=meter.evaluations)


def _arrange_labels(observation: Observation, labels: Tensor, most: int, generator: torch.Generator) -> list[Tensor]:
    """Return labels of all epochs, (epochs * B,): as the first epoch has them, then in orders that differ by batch."""
    epochs = observation.protocol.epochs
    sizes = [len(each.indices) for each in epochs[0]]
    found: dict[tuple[tuple[int, ...], ...], Tensor] = {}
    for trial in range(_DRAWS_PER_ARRANGEMENT * most):
        orders = [torch.arange(len(labels))]
        for _ in epochs[1:]:
            orders.append(torch.randperm(len(labels), generator=generator) if trial else orders[0])
        arranged = labels[torch.cat(orders).to(labels.device)]
        met = tuple(
            tuple(sorted(part.tolist())) for whole in arranged.split(len(labels)) for part in whole.split(sizes)
        )
        found.setdefault(met, arranged)
        if len(found) == most:
            break
    return list(found.values())


def _average_epochs(
    observation: Observation, unrolled: Observation, result: Reconstruction, consistency: EpochConsistency
) -> Reconstruction:
    """Return the mean over the epochs of matched candidates, and how well it explains what was shared."""
    orders, epochs = consistency.partners(result.inputs), result.inputs.split(observation.batch_size)
    total = torch.zeros_like(epochs[0])
    for order, epoch in zip(orders, epochs, strict=True):
        total = total.index_add(0, order, epoch)
    images = total / len(orders)
    assert unrolled.labels is not None
    simulated = unrolled.simulate(torch.cat([images[order] for order in orders]), unrolled.labels)
    finite = result.outcome is not Outcome.NONFINITE
    return replace(
        result,
        inputs=images,
        labels=unrolled.labels[: len(images)],
        matching_loss=float(relative_squared_error(simulated, observation.gradients)) if finite else torch.inf,
        attack="FedAvgMatching",
    )
