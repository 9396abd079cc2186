"""Which images of a batch an adversary with candidate photographs could name: `AuditRecord.confirmed`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.gallery_identification import GalleryIdentification
from lightning_gradaudit.attacks.reconstruction import Outcome
from lightning_gradaudit.metrics.baseline import Baseline, near_copies
from lightning_gradaudit.simulation.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Confirmation:
    """What `GalleryIdentification` named.

    Attributes:
        named: (B,) 1.0 for each true image among the B candidates named, else 0.0.
        chance: B/K, the share that naming at random reaches.
        evaluations: Simulated gradients spent.
    """

    named: Tensor
    chance: float
    evaluations: int


def confirm(
    snapshot: Snapshot, baseline: Baseline, *, candidates: int, generator: torch.Generator
) -> Confirmation | str:
    """Mix the true images with others of the gallery, and let the attack name B of all; or return why it cannot.

    Candidates come with their labels where the gallery has any: who has photographs mostly knows their
    classes.

    Args:
        snapshot: The audited step.
        baseline: Its gallery gives the others, less near copies of the true images.
        candidates: K, true images included.
        generator: Chooses and shuffles.
    """
    truth, size = snapshot.truth_pixels.cpu(), len(snapshot.truth.inputs)
    if size >= candidates:
        return f"{candidates} candidates, and {size} images in the batch"
    if baseline.gallery is None or baseline.gallery_labels is None or baseline.gallery.shape[1:] != truth.shape[1:]:
        return "no gallery of the model's image size"
    others = (~near_copies(baseline.gallery, truth).any(1)).nonzero().flatten()
    if len(others) < candidates - size:
        return f"the gallery has only {len(others)} other images, {candidates - size} are needed"
    others = others[torch.randperm(len(others), generator=generator)[: candidates - size]]
    pixels, labels = torch.cat([truth, baseline.gallery[others]]), None
    known = baseline.gallery_labels[others]
    if snapshot.truth.labels.ndim == 1 and not snapshot.truth.labels.is_floating_point() and bool((known >= 0).all()):
        labels = torch.cat([snapshot.truth.labels.cpu().long(), known])
    order = torch.randperm(candidates, generator=generator)
    attack = GalleryIdentification(candidates=pixels[order], labels=None if labels is None else labels[order])
    ample = Budget(evaluations=4 * candidates * size)
    result = attack(snapshot.observation, budget=ample, generator=generator)
    if result.outcome is Outcome.NOT_APPLICABLE:
        return result.reason
    named = snapshot.observation.normalization.to_pixels(result.inputs).cpu()
    return Confirmation(near_copies(named, truth).any(0).float(), size / candidates, result.evaluations)
