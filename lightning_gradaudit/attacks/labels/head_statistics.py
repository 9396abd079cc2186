"""Count the classes of a batch by statistics of its head's gradient that are quadratic.

How often class c occurs is n_c = Σ_i p_ic - Σ_i e_ic with the softmax outputs p_i and e_i = p_i - onehot_i. The head's
gradient holds Σ_i e_ic itself, but of Σ_i p_ic only what the images' distribution says. No linear function of the
gradient says more where the network's outputs are the probabilities of the labels: E[e_i | image i] is then zero, so
it is uncorrelated with every function of the images alone. Quadratic ones do: with whitened features f_i, nearly
orthogonal, (Σ_i e_i f_iᵀ)(Σ_i e_i f_iᵀ)ᵀ is about d Σ_i e_i e_iᵀ, whose mean given the images is
d Σ_i (diag p_i - p_i p_iᵀ): how sure the network was of the images in the batch. What the sums imply is learnt by ridge
regression on batches that are simulated from public images and from labels as the network expects them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class QuadraticCountSettings:
    """Settings of `QuadraticCounts`."""

    least_images: int = 32  # public ones: fewer tell too little of how features vary
    most_images: int = 1024  # more cost more than they improve
    most_classes: int = 100  # more make more statistics than simulated batches can weigh
    most_paired_classes: int = 20  # up to which statistics of two classes are used beside those of one
    most_directions: int = 64  # whitened features
    images_per_direction: int = 4  # at least, so that images which were not whitened by look alike
    simulated_batches: int = 4000
    batches_per_chunk: int = 500  # simulated at once
    ridge: float = 0.01  # relative to the statistics' variance
    most_deviations: float = 6.0  # standard deviations from the simulated mean, beyond which a statistic is cut off
    feature_rounding: float = 1e-4  # of the features' length: directions that vary less are lost in single precision


SETTINGS = QuadraticCountSettings()


@dataclass(frozen=True, kw_only=True)
class HeadOutputs:
    """What a classification head takes and gives on public images.

    Attributes:
        features: (M, d) its inputs.
        logits: (M, classes) its outputs.
        weight: (classes, d) of the head.
        unit: (d,) the vector whose product with the weight's gradient replaces the bias's; None: it has a bias.
    """

    features: Tensor = field(repr=False)
    logits: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)
    unit: Tensor | None = field(default=None, repr=False)

    @property
    def tell_enough(self) -> bool:
        """Whether there are enough images for this number of classes."""
        return len(self.features) >= SETTINGS.least_images and self.logits.shape[1] <= SETTINGS.most_classes


class QuadraticCounts:
    """Expected class counts of batches of one size, learnt by simulation.

    Args:
        head: On public images.
        size: Images in a batch.
        generator: Draws the simulated batches, on the CPU.
    """

    def __init__(self, head: HeadOutputs, size: int, generator: torch.Generator) -> None:
        features, logits = head.features[: SETTINGS.most_images].cpu(), head.logits[: SETTINGS.most_images].cpu()
        self._size, self._mean = size, features.mean(0)
        self._outputs = logits.softmax(1)
        self._classes = self._outputs.shape[1]
        self._map = torch.cat([_whitening(features), head.weight.cpu().T], 1)  # (d, k + classes)
        mapped = (features - self._mean) @ self._map
        ones = torch.ones(len(features)) if head.unit is None else features @ head.unit.cpu()
        self._mean_mapped = self._mean @ self._map
        chunks = SETTINGS.simulated_batches // SETTINGS.batches_per_chunk
        simulated = [self._simulate(mapped, ones, generator) for _ in range(chunks)]
        statistics, missing = (torch.cat(parts).double() for parts in zip(*simulated, strict=True))
        self._centre, self._scale = statistics.mean(0), statistics.std(0).clamp_min(1e-9)
        self._offset = missing.mean(0)
        standard = self._standardise(statistics)
        gram = standard.T @ standard + SETTINGS.ridge * len(standard) * torch.eye(standard.shape[1], dtype=torch.double)
        self._slope = torch.linalg.solve(gram, standard.T @ (missing - self._offset))

    def __call__(self, residual: Tensor, gradient: Tensor) -> Tensor:
        """Return expected counts (classes,), which need not add up nor be >= 0.

        Args:
            residual: (classes,) mean_i e_i.
            gradient: (classes, d) of the head's weight, mean_i e_i f_iᵀ.
        """
        sums = self._size * residual.cpu()
        moments = (self._size * gradient.cpu() - sums[:, None] * self._mean) @ self._map
        standard = self._standardise(self._statistics(sums[None], moments[None]).double())
        missing = self._offset + (standard @ self._slope)[0]
        return (self._plain_counts(sums) + missing).to(residual)

    def _standardise(self, statistics: Tensor) -> Tensor:
        return ((statistics - self._centre) / self._scale).clamp(-SETTINGS.most_deviations, SETTINGS.most_deviations)

    def _plain_counts(self, sums: Tensor) -> Tensor:
        return self._size * self._outputs.mean(0) - sums

    def _simulate(self, mapped: Tensor, ones: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return statistics (N, S) of simulated batches, and the errors of the plain counts (N, classes)."""
        chosen = torch.randint(len(mapped), (SETTINGS.batches_per_chunk, self._size), generator=generator)
        outputs = self._outputs[chosen]
        labels = one_hot(torch.multinomial(outputs.flatten(0, 1), 1, generator=generator)[:, 0], self._classes)
        labels = labels.reshape(outputs.shape)
        errors = outputs - labels
        sums = torch.einsum("nbc,nb->nc", errors, ones[chosen])
        moments = errors.transpose(1, 2) @ mapped[chosen] + (errors.sum(1) - sums)[..., None] * self._mean_mapped
        return self._statistics(sums, moments), labels.sum(1) - self._plain_counts(sums)

    def _statistics(self, sums: Tensor, moments: Tensor) -> Tensor:
        """Return (N, S) of Σ_i e_i, (N, classes), and the sums Σ_i e_i φ_iᵀ, (N, classes, k + classes).

        Twice: as they are, and with each class's errors scaled to one root mean square.
        """
        white = moments.shape[2] - self._classes
        spread = moments[..., :white].square().mean(2).sqrt().clamp_min(1e-6)
        scaled = self._products(sums / spread, moments / spread[..., None], white)
        return torch.cat([*self._products(sums, moments, white), *scaled, spread.log()], 1)

    def _products(self, sums: Tensor, moments: Tensor, white: int) -> list[Tensor]:
        features, logits = moments[..., :white], moments[..., white:]
        rows, columns = self._pairs()
        second = features @ features.transpose(1, 2) / white
        return [
            sums,
            second[:, rows, columns],
            sums[:, rows] * sums[:, columns],
            logits.flatten(1) if self._paired else logits.diagonal(dim1=1, dim2=2),
        ]

    @property
    def _paired(self) -> bool:
        return self._classes <= SETTINGS.most_paired_classes

    def _pairs(self) -> tuple[Tensor, Tensor]:
        if self._paired:
            rows, columns = torch.triu_indices(self._classes, self._classes)
            return rows, columns
        every = torch.arange(self._classes)
        return every, every


def _whitening(features: Tensor) -> Tensor:
    """Return (d, k): the principal directions of features (M, d), each divided by its standard deviation."""
    count = max(1, min(SETTINGS.most_directions, len(features) // SETTINGS.images_per_direction))
    centred = (features - features.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values[-count:].clamp_min(0), vectors[:, -count:]
    lost = SETTINGS.feature_rounding**2 * float(features.double().square().sum())
    return (centred.T @ (vectors / (values + lost + 1e-30) * len(centred) ** 0.5)).to(features.dtype)
