"""Label recovery from the gradient of a classification head.

For the mean cross-entropy of a linear head with a bias, dL/db[c] = mean_i p_i[c] - n_c / B, hence
n_c = B (p̄_c - dL/db[c]): how often each class occurs follows from the head's gradient and the mean softmax output,
which the adversary estimates by running the network on public images, or on noise where there are none. Public images
also show how the counts depend on quadratic statistics of the head's gradient (`head_statistics`). Without a bias the
weight's gradient takes its place, multiplied by a vector whose product with every feature is about 1. For one sample
the sign alone decides (iDLG, Zhao et al., arXiv:2001.02610).

Features behind a ReLU say more, and exactly: column j of the weight's gradient is mean_i f_ij (p_i - onehot_i)
with f_ij >= 0, and only samples of class c are negative at c. So a negative entry proves its class, and columns that
one sample alone activates are parallel to its p_i - onehot_i: each such direction is a sample of its own. This counts
small batches exactly even late in training, when p̄ of one batch is far from that of any other. Whether it works for a
network and a batch size is tested on simulated batches first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle

import torch
from torch import Tensor

from lightning_gradaudit.attacks.grouping import agreeing_groups
from lightning_gradaudit.attacks.labels.head import call_of, find_head, placeholder_labels
from lightning_gradaudit.attacks.labels.head_statistics import HeadOutputs, QuadraticCounts
from lightning_gradaudit.simulation.defences import ClipNorm
from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True)
class LabelRecoverySettings:
    """Settings of `recover_labels`."""

    noise_batches: int = 8  # for the mean softmax output where there are no public images
    most_public_batches: int = 128  # of the client's size: more would cost more than they improve
    residual_imbalance: float = 1e-2  # relative sum of the residual up to which the loss is a cross-entropy
    softmax_rounding: float = 1e-6  # absolute: what fp32 leaves of a saturated softmax
    unit_ridge: float = 1e-3  # of the vector in place of the bias, relative to the features' mean square
    least_trials: int = 16  # simulated batches,
    least_trial_labels: int = 128  # with this many labels together where batches are small
    compared_columns: int = 512  # of the head's gradient, the largest
    visible_norm: float = 1e-4  # of a column, relative to the largest: above it rounding does not change its direction
    negative_share: float = 1e-3  # of a column's norm: a negative entry
    parallel_distance: float = 1e-4  # of two unit vectors
    neighbour_factor: float = 10.0  # times that distance: the neighbourhood in which mixtures show


SETTINGS = LabelRecoverySettings()


@dataclass(frozen=True)
class LabelEstimate:
    """Recovered labels.

    Attributes:
        labels: (B,) class indices, sorted; None when recovery does not apply.
        classes: Number of outputs of the head; 0 when no head was found.
        reason: Why recovery does not apply.
    """

    labels: Tensor | None
    classes: int = 0
    reason: str = ""


def noise_images(observation: Observation, generator: torch.Generator) -> Tensor:
    """Return images of uncorrelated noise around mid-grey, (B, C, H, W) in the model's input space."""
    pixels = (0.5 + 0.25 * torch.randn(observation.shape, generator=generator)).clamp(0, 1)
    return observation.normalization.from_pixels(pixels.to(observation.device))


def known_labels(observation: Observation, *, generator: torch.Generator) -> LabelEstimate:
    """Return the labels that the adversary was given, or recover them."""
    if observation.labels is not None:
        return LabelEstimate(observation.labels)
    return recover_labels(observation, generator=generator)


def recover_labels(observation: Observation, *, generator: torch.Generator) -> LabelEstimate:
    """Recover the class counts of the batch from the gradient of the head.

    Exact for one sample. In a batch the mean softmax output is an estimate, so late in training, when it differs from
    batch to batch, some labels of batches of more than about ten images are wrong. `public_images` make them fewer.

    Args:
        observation: Only its gradient, weights, shapes and public images are used.
        generator: Draws noise images where there are no public ones.
    """
    if observation.label_dtype.is_floating_point or len(observation.label_shape) > 0:
        return LabelEstimate(None, reason="the targets are not class indices")
    probes = probe_images(observation, generator)
    head = find_head(observation, probes[0], convolutions=True)
    if head is None:
        return LabelEstimate(None, reason="the last layer is not a classification head")
    with torch.no_grad():
        labels = placeholder_labels(observation)
        heads = [call_of(head, observation, images, labels) for images in probes]
    classes, size = head.outputs.shape[1], observation.batch_size
    batches = [(h.inputs.float(), h.outputs.float()) for h in heads]
    features, logits = torch.cat([f for f, _ in batches]), torch.cat([z for _, z in batches])
    local = observation.protocol.optimizer
    if local is not None and local.kind is not torch.optim.SGD:
        return LabelEstimate(None, classes, reason=f"{local.kind.__name__} hides the size of the head's gradient")
    residual = _mean_residual(observation, head, features)
    if residual is None:
        return LabelEstimate(None, classes, reason=f"the gradient of the head {head.name!r} was not shared")
    # Softmax and target both add up to 1, so the residual adds up to 0 (noise of a defence would hide that).
    imbalance = residual.sum().abs() > SETTINGS.residual_imbalance * residual.abs().sum() + SETTINGS.softmax_rounding
    if imbalance and not observation.threat_model.defences and not observation.noise_std:
        return LabelEstimate(None, classes, reason="the loss is not a mean cross-entropy over a softmax")
    if local is not None:
        residual = -residual  # weights move against the gradient
    if not _has_known_scale(observation):
        residual = residual / _estimate_scale(residual, logits.softmax(1).mean(0))
    if size == 1:
        counts = torch.nn.functional.one_hot(residual.argmin(), classes)
    else:
        rule = _Rule(lambda at: size * (logits.softmax(1).mean(0) - at.residual))
        gradient = observation.gradients.get(head.weight, features.new_zeros((classes, 0))).float().flatten(1)
        if _is_mean_over_samples(observation, head):
            rule = _best_rule(rule, observation, head, batches, generator)
        counts = rule(_HeadGradient(residual, gradient), size)
    return LabelEstimate(torch.repeat_interleave(torch.arange(classes, device=counts.device), counts), classes)


def probe_images(observation: Observation, generator: torch.Generator) -> list[Tensor]:
    """Return batches of the client's size, so that BatchNorm in train mode sees what the client's saw."""
    if observation.public_images is None:
        return [noise_images(observation, generator) for _ in range(SETTINGS.noise_batches)]
    images = observation.normalization.from_pixels(observation.public_images.to(observation.device))
    size = observation.batch_size
    batches = min(-(-len(images) // size), SETTINGS.most_public_batches)
    cyclic = torch.arange(batches * size, device=images.device) % len(images)
    return list(images[cyclic].split(size))


def _mean_residual(observation: Observation, head: LayerCall, features: Tensor) -> Tensor | None:
    """Return an estimate of mean_i (p_i - onehot_i), (classes,)."""
    if head.bias in observation.gradients:
        return observation.gradients[head.bias].float()
    if head.weight in observation.gradients:
        return observation.gradients[head.weight].float().flatten(1) @ _unit_vector(features)
    return None


def _unit_vector(features: Tensor) -> Tensor:
    """Return v, (d,), with f·v about 1 for every row f of features (M, d), in place of a bias."""
    gram = (features @ features.T).double()
    ridge = SETTINGS.unit_ridge * gram.diagonal().mean() + 1e-12
    weights = torch.linalg.solve(
        gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), torch.ones_like(gram[0])
    )
    return features.T @ weights.to(features.dtype)


def _is_mean_over_samples(observation: Observation, head: LayerCall) -> bool:
    """Tell whether the gradient of the head's weight is mean_i (p_i - onehot_i) f_iᵀ, with nothing added or lost."""
    changed = observation.threat_model.defences or observation.noise_std or not _has_known_scale(observation)
    if changed or head.weight not in observation.gradients:
        return False
    # Label smoothing, class weights or a layer behind the head would show here.
    classes = head.outputs.shape[1]
    labels = torch.arange(observation.batch_size, device=observation.device) % classes
    images = noise_images(observation, torch.Generator().manual_seed(0))
    call = call_of(head, observation, images, labels.to(observation.label_dtype), gradients=True)
    assert call.outputs_gradient is not None
    expected = call.outputs.float().softmax(1) - torch.nn.functional.one_hot(labels, classes)
    cosine = torch.nn.functional.cosine_similarity(expected.flatten(), call.outputs_gradient.float().flatten(), dim=0)
    return float(cosine) > 1 - SETTINGS.parallel_distance


@dataclass(frozen=True)
class _HeadGradient:
    """The gradient of a head: mean_i (p_i - onehot_i), (classes,), and the weight's, (classes, d)."""

    residual: Tensor
    gradient: Tensor

    @cached_property
    def seen(self) -> Tensor:
        return count_samples_in_columns(self.gradient)


@dataclass(frozen=True)
class _Rule:
    """How a head's gradient is counted.

    Attributes:
        expected: Returns the expected counts (classes,).
        proves: A class occurs at least as often as columns show it.
        excludes: A class that no column shows does not occur.
    """

    expected: Callable[[_HeadGradient], Tensor]
    proves: bool = False
    excludes: bool = False

    def __call__(self, at: _HeadGradient, size: int) -> Tensor:
        """Return counts (classes,) that add up to `size`."""
        expected, least = self.expected(at), (at.residual < 0).long()
        if self.excludes:
            expected = expected.masked_fill((at.seen == 0) & (at.residual >= 0), -torch.inf)
        return largest_remainder(expected, size, certain=torch.maximum(least, at.seen) if self.proves else least)


def _best_rule(
    plain: _Rule,
    observation: Observation,
    head: LayerCall,
    batches: list[tuple[Tensor, Tensor]],
    generator: torch.Generator,
) -> _Rule:
    """Return the rule that counts simulated batches best, the most careful one of equals.

    Quadratic statistics take images for independent, which BatchNorm in train mode undoes. Features that are sparse
    show small batches sample by sample; those that are never 0 show mixtures alone.

    Args:
        plain: By the mean softmax output.
        batches: Features (B, d) and outputs (B, classes) of the head.
        generator: Draws labels as the network expects them.
    """
    trials = _trials(batches, generator)
    features, logits = torch.cat([f for f, _ in batches]), torch.cat([z for _, z in batches])
    best = plain
    if observation.public_images is not None:
        outputs = HeadOutputs(
            features=features,
            logits=logits,
            weight=observation.parameters[head.weight].detach().float().flatten(1),
            unit=None if head.bias in observation.gradients else _unit_vector(features),
        )
        if outputs.tell_enough:
            quadratic = QuadraticCounts(outputs, observation.batch_size, generator)
            best = _most_accurate([plain, _Rule(lambda at: quadratic(at.residual, at.gradient))], trials)
    if observation.threat_model.precision in {"32-true", "64-true"} and float(features.min()) >= 0:
        uses = [replace(best, proves=p, excludes=e) for e in (False, True) for p in (False, True)]
        best = _most_accurate(uses, trials)
    return best


def _trials(batches: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> list[tuple[_HeadGradient, Tensor]]:
    """Draw labels for batches; return the gradient of the head and the counts (classes,) of each."""
    size = len(batches[0][0])
    trials = []
    count = max(SETTINGS.least_trials, SETTINGS.least_trial_labels // size)
    for _, (features, logits) in zip(range(count), cycle(batches), strict=False):
        outputs = logits.softmax(1)
        labels = torch.multinomial(outputs.cpu(), 1, generator=generator)[:, 0].to(features.device)
        onehot = torch.nn.functional.one_hot(labels, logits.shape[1])
        error = outputs - onehot
        trials.append((_HeadGradient(error.mean(0), error.T @ features / size), onehot.sum(0)))
    return trials


def _most_accurate(rules: list[_Rule], trials: list[tuple[_HeadGradient, Tensor]]) -> _Rule:
    """Return the rule that gets most labels of all trials right, the first of equals."""
    right = [sum(int(torch.minimum(rule(at, int(n.sum())), n).sum()) for at, n in trials) for rule in rules]
    return rules[right.index(max(right))]


def count_samples_in_columns(gradient: Tensor) -> Tensor:
    """Count the samples of each class that columns of the head's gradient (classes, d) show.

    A class that is 0 here has no negative entry anywhere: no sample of it activated a feature by itself.
    """
    norms = gradient.norm(dim=0)
    visible = norms > SETTINGS.visible_norm * norms.max()
    columns = (gradient[:, visible] / norms[visible]).T
    negative = columns < -SETTINGS.negative_share
    counts = negative.any(0).long()
    single = negative.sum(1) == 1
    order = norms[visible][single].topk(min(SETTINGS.compared_columns, int(single.sum()))).indices
    columns = columns[single][order]
    distances = torch.cdist(columns, columns, compute_mode="donot_use_mm_for_euclid_dist")
    nearby = (distances < SETTINGS.neighbour_factor * SETTINGS.parallel_distance).sum(1)
    found = torch.zeros_like(counts)
    for leader, members in agreeing_groups(distances < SETTINGS.parallel_distance):
        # Mixtures that are parallel by chance, where directions lie dense, have more neighbours a little further away.
        found[columns[leader].argmin()] += int(nearby[leader] < 2 * members.sum())
    return torch.maximum(counts, found)


def _has_known_scale(observation: Observation) -> bool:
    protocol = observation.protocol
    clipped = any(isinstance(defence, ClipNorm) for defence in observation.threat_model.defences)
    return protocol.clip is None and protocol.private is None and protocol.optimizer is None and not clipped


def _estimate_scale(residual: Tensor, probabilities: Tensor) -> Tensor:
    """Estimate the unknown positive factor of a residual s(p̄ - n/B): it is r/p̄ for a class that does not occur.

    For all others r/p̄ is smaller, so the largest one is it, unless every class occurs.
    """
    return (residual / probabilities.clamp_min(1e-12)).max().clamp_min(1e-30)


LARGEST_SHARE = 1e12
"""Largest expected count of a class; whole numbers beyond 2⁵³ are not told apart."""


def largest_remainder(expected: Tensor, total: int, *, certain: Tensor | None = None) -> Tensor:
    """Round non-negative shares to integers that add up to `total`.

    Args:
        expected: (classes,) expected counts, not necessarily adding up.
        total: What the counts must add up to.
        certain: (classes,) how often each class occurs at least; where that is more than `total`, once each.

    Example:
        >>> largest_remainder(torch.tensor([1.6, 0.1, 2.3]), 4).tolist()
        [2, 0, 2]
    """
    floor = torch.zeros_like(expected) if certain is None else certain.to(expected.dtype)
    if floor.sum() > total:
        floor = floor.clamp(max=1)
    if floor.sum() > total:  # noise made more classes negative than there are samples: keep the likeliest
        keep = expected.masked_fill(floor == 0, -torch.inf).topk(total).indices
        floor = torch.zeros_like(expected).index_fill_(0, keep, 1)
    # Strong noise makes shares so large that single steps would never end: whole rounds are taken off at once.
    expected, floor = expected.double().nan_to_num(0.0).clamp(max=LARGEST_SHARE), floor.double()
    counts = expected.floor().clamp_min(0).maximum(floor)
    while (rounds := (counts.sum() - total).div(max(1, int((counts > floor).sum())), rounding_mode="floor")) >= 1:
        above = counts > floor
        counts = torch.where(above, counts - torch.minimum(rounds, (counts - floor)[above].min()), counts)
    while counts.sum() > total:
        surplus = (counts - expected).masked_fill(counts <= floor, -torch.inf)
        counts[surplus.argmax()] -= 1
    while counts.sum() < total:
        counts[(expected - counts).argmax()] += 1
    return counts.long()
