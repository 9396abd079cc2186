"""Identify the images of a batch among candidate photographs, by a comparison of gradients without reconstruction.

The gradient of a batch is the mean of its images' gradients, so non-negative least squares of the shared gradient on
the candidates' own gradients gives the members weight 1/B and all others 0. It uses gradient similarity as data
similarity, and needs the photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.closed_form.verification import simulated_error
from lightning_gradaudit.attacks.labels.recovery import known_labels
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.sharing import SharingProtocol
from lightning_gradaudit.utils.tensors import Tensors


@dataclass(frozen=True)
class GallerySettings:
    """Settings of `GalleryIdentification`."""

    most_held_floats: int = 2**26  # of single-image gradients held at once (256 MiB)
    sketch_floats: int = 65_521  # that a gradient is reduced to beyond that; a prime, so no layer's shape divides it
    batches_per_candidate: int = 2  # random batches, where the gradients of a batch depend on each other
    ridge: float = 0.3  # added to the normal equations that separate candidates, relative to their mean diagonal
    coordinates_per_chunk: int = 2**16  # turned to double precision at once
    steps_per_unknown: int = 30  # of non-negative least squares
    dependent_energy: float = 1e-10  # eigenvalues of the Gram matrix below this share of the largest are ignored


SETTINGS = GallerySettings()


@dataclass(frozen=True, kw_only=True, eq=False)
class GalleryIdentification(Attack):
    """Tell which of K candidate photographs were in the batch, by non-negative least squares of gradients.

    The B candidates of the largest weights are exchanged one by one while that brings the sum of their gradients
    closer in direction to the shared one: the weights are known to be equal, up to the factor that clipping hides. The
    reconstruction returned consists of the candidates named. Gaussian noise needs nothing special: least squares is
    the likelihood.

    It costs K simulated gradients of single images when the candidates' labels are known, else K times the number of
    distinct labels in the batch, given or recovered (`recover_labels`), and one more to state the matching loss. Up to
    2^26 numbers, gradients are held as they are; beyond that each is reduced to 65 521 by random signs and sums, which
    leaves inner products unbiased, with a standard deviation of about 0.6 % of the product of the norms.

    Train-mode BatchNorm makes an image's gradient depend on its batch. Then twice as many random batches of candidates
    are simulated, of the batch's size, and a regression tells what each candidate adds to a batch on average; what
    certain candidates do only together stays noise. (Share of 100 faces named by it, B = 4 / 16, eight
    convolutions with BatchNorm after 20 steps: 84 / 91 %; tried with images alone in their batches: 62 / 62 %, with
    the running statistics: 25 / 22 %.)

    Dropout masks that depend on the place in the batch are not repeated. Over several local steps ("delta") gradients
    are taken at the weights of the first; adaptive optimizers do not apply.

    Args:
        candidates: (K, C, H, W) pixels in [0, 1], K >= B.
        labels: (K,) class indices, where the adversary knows them. Recovered ones can be wrong under strong noise, and
            names are lost with them.
    """

    candidates: Tensor = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.candidates.ndim != 4 or not self.candidates.is_floating_point():
            raise InvalidInputError(
                f"candidates: expected floating-point pixels (K, C, H, W) in [0, 1], got "
                f"{tuple(self.candidates.shape)} {self.candidates.dtype}."
            )
        if self.labels is not None and len(self.labels) != len(self.candidates):
            raise InvalidInputError(
                f"labels: expected one for each of {len(self.candidates)} candidates, got {len(self.labels)}."
            )

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        meter = Meter(budget)
        refusal = self._refusal(observation)
        labels_to_try = None if refusal else self._candidate_labels(observation, generator)
        if labels_to_try is None:
            return Reconstruction.not_applicable(observation, refusal or "the labels of the candidates are not known")
        owner = torch.arange(len(self.candidates)).repeat_interleave(labels_to_try.shape[1])
        coupled = has_coupled_images(observation)
        if coupled:
            client, sign, batches = observation, 1.0, _draw_batches(len(owner), observation.batch_size, generator)
        else:
            (client, sign), batches = _with_single_images(observation), torch.arange(len(owner))[:, None]
        if meter.remaining < len(batches) + 1:
            return Reconstruction.not_applicable(
                observation, f"{len(batches) + 1} evaluations are needed, {budget!r} allows fewer"
            )
        images = observation.normalization.from_pixels(self.candidates.to(observation.device, torch.float32))
        gram, products = _inner_products(client, images, labels_to_try, batches, generator)
        meter.spend(len(batches))
        if coupled:
            gram, products = _separate_candidates(gram, products, batches, len(owner))
        chosen = torch.from_numpy(_choose_members(gram, sign * products, owner.numpy(), observation.batch_size))
        inputs, labels = images[owner[chosen]], labels_to_try.flatten()[chosen]
        error = simulated_error(observation, inputs, labels, meter)
        return Reconstruction(
            inputs=inputs,
            labels=labels,
            matching_loss=error,
            evaluations=meter.evaluations,
            outcome=Outcome.CONVERGED,
            reason=f"named among {len(self.candidates)} candidates with {labels_to_try.shape[1]} label(s) each",
        )

    def _refusal(self, observation: Observation) -> str:
        """Return why it cannot run here, or nothing."""
        local = observation.protocol.optimizer
        if self.candidates.shape[1:] != observation.input_shape:
            return f"candidates of shape {tuple(self.candidates.shape[1:])}, images {tuple(observation.input_shape)}"
        if len(self.candidates) < observation.batch_size:
            return f"{len(self.candidates)} candidates are fewer than the {observation.batch_size} images of the batch"
        if local is not None and local.kind is not torch.optim.SGD:
            return f"the update of {local.kind.__name__} is no sum over images"
        return ""

    def _candidate_labels(self, observation: Observation, generator: torch.Generator) -> Tensor | None:
        """Return the labels to try for each candidate, (K, L)."""
        if self.labels is not None:
            return self.labels.to(observation.device, observation.label_dtype)[:, None]
        labels = known_labels(observation, generator=generator).labels
        if labels is None or labels.ndim != 1:
            return None
        return labels.unique().to(observation.label_dtype).expand(len(self.candidates), -1)


def has_coupled_images(observation: Observation) -> bool:
    """Tell whether an image's gradient depends on the rest of its batch."""
    layers = [m for m in observation.client.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return observation.batch_size > 1 and any(layer.training for layer in layers)


def _with_single_images(observation: Observation) -> tuple[Observation, float]:
    """Return the client with one image per batch, and the sign that its gradients have in what is shared.

    What accumulation, clipping of the sum and local steps do to the whole batch is left out; per-sample clipping stays.
    """
    state = observation.protocol.micro_batches[0].rng_state if observation.batch_size == 1 else None
    protocol = replace(SharingProtocol.one_batch(1, state), private=observation.protocol.private)
    sign = 1.0 if observation.protocol.optimizer is None else -1.0  # weights move against the gradient
    return replace(observation, batch_size=1, labels=None, protocol=protocol), sign


def _draw_batches(entries: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw batches of `size` entries, (R, size), in which all entries occur about equally often."""
    batches: list[Tensor] = []
    while len(batches) < SETTINGS.batches_per_candidate * entries:
        shuffled = torch.randperm(entries, generator=generator)
        batches += shuffled[: entries - entries % size].split(size)
    return torch.stack(batches[: SETTINGS.batches_per_candidate * entries])


def _inner_products(
    observation: Observation, images: Tensor, labels_to_try: Tensor, batches: Tensor, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gram matrix of the gradients of some batches, and their products with the shared gradient.

    Args:
        images: (K, C, H, W) in the model's input space.
        labels_to_try: (K, L) labels; each image with each of its labels is an entry.
        batches: (R, B) indices of entries.

    Returns:
        (R, R) and (R,).
    """
    reduce = make_reduction(observation.gradients, len(batches), generator)
    shared, leaves = reduce(observation.gradients), observation.leaves()
    table = shared.new_empty((len(batches), len(shared)))
    for row, members in enumerate(batches.to(images.device)):
        inputs, labels = images[members // labels_to_try.shape[1]], labels_to_try.flatten()[members]
        table[row] = reduce(observation.simulate(inputs, labels, leaves))
    gram = torch.zeros((len(table), len(table)), dtype=torch.float64, device=table.device)
    products = gram.new_zeros(len(table))
    chunk = SETTINGS.coordinates_per_chunk
    for block, part in zip(table.split(chunk, dim=1), shared.split(chunk), strict=True):
        columns = block.double()
        gram += columns @ columns.T
        products += columns @ part.double()
    return gram.cpu().numpy(), products.cpu().numpy()


def _separate_candidates(
    gram: np.ndarray, products: np.ndarray, batches: Tensor, entries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turn inner products of batches into those of what each entry adds to a batch on average, by ridge regression."""
    design = np.zeros((len(batches), entries))
    np.put_along_axis(design, batches.numpy(), 1.0, axis=1)
    normal = design.T @ design
    weights = np.linalg.solve(normal + SETTINGS.ridge * normal.diagonal().mean() * np.eye(entries), design.T)
    return weights @ gram @ weights.T, weights @ products


def make_reduction(gradients: Tensors, rows: int, generator: torch.Generator) -> Callable[[Tensors], Tensor]:
    """Return a map of gradients to vectors that keeps inner products: all coordinates, or a sketch where p is large."""

    def flat(tensors: Tensors) -> Tensor:
        return torch.cat([tensors[name].flatten().float() for name in gradients])

    size = sum(g.numel() for g in gradients.values())
    if rows * size <= SETTINGS.most_held_floats or size <= SETTINGS.sketch_floats:
        return flat
    device = next(iter(gradients.values())).device
    signs = torch.randint(2, (size,), generator=generator, dtype=torch.int8).to(device) * 2 - 1
    padding = -size % SETTINGS.sketch_floats
    return lambda tensors: F.pad(flat(tensors) * signs, (0, padding)).reshape(-1, SETTINGS.sketch_floats).sum(0)


def nonnegative_weights(gram: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Minimise ‖Σ_k w_k g_k - g‖² over w >= 0, (n,), from inner products alone."""
    norms = np.sqrt(np.maximum(gram.diagonal(), 1e-300))
    energy, basis = np.linalg.eigh(gram / np.outer(norms, norms))
    kept = energy > SETTINGS.dependent_energy * energy[-1]
    root = np.sqrt(energy[kept])
    target = basis[:, kept].T @ (products / norms) / root
    try:
        weights, _ = nnls(root[:, None] * basis[:, kept].T, target, maxiter=SETTINGS.steps_per_unknown * len(products))
    except RuntimeError:  # nearly parallel gradients can keep it from converging: use the correlations instead
        weights = products / norms
    return weights / norms


def _choose_members(gram: np.ndarray, products: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    """Choose one row of each of `size` candidates: the largest weights of non-negative least squares, then exchanges.

    Args:
        gram: (n, n) inner products of the rows.
        products: (n,) with the shared gradient.
        owner: (n,) which candidate a row belongs to.
    """
    order = np.argsort(-nonnegative_weights(gram, products), kind="stable")
    _, first = np.unique(owner[order], return_index=True)
    chosen = order[np.sort(first)[:size]]

    def cosine(product: np.ndarray, square: np.ndarray) -> np.ndarray:
        return product / np.sqrt(np.maximum(square, 1e-300))

    best = cosine(products[chosen].sum(), gram[np.ix_(chosen, chosen)].sum())
    while True:
        tried = np.full((size, len(products)), -np.inf)
        for place in range(size):
            rest = np.delete(chosen, place)
            square = gram[np.ix_(rest, rest)].sum() + 2 * gram[rest].sum(0) + gram.diagonal()
            tried[place] = cosine(products[rest].sum() + products, square)
            tried[place, np.isin(owner, owner[rest])] = -np.inf
        place, row = divmod(int(tried.argmax()), len(products))
        if not tried[place, row] > best + 1e-13:
            return chosen
        best, chosen[place] = tried[place, row], row
