"""Who sees what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.defences import Defence, apply_defences, check_defences
from lightning_gradaudit.utils.tensors import Tensors

View = Literal["local", "step", "reduced", "update", "delta"]


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """Who sees what. The batch size, the architecture, the weights and the train/eval mode are always known.

    Attributes:
        view: What the adversary holds.
            "local": the gradient of one process and one micro-batch, before any accumulation, reduction or clipping
            (what a FedSGD client sends).
            "step": the sum of one process over the micro-batches of an optimizer step (what a data-parallel worker
            sends into the reduction; with two workers also what a peer gets that subtracts its own).
            "reduced": the mean over all processes (what every data-parallel peer receives).
            "update": what the optimizer is given, after clipping or DP-SGD (what leaves a private client).
            "delta": the change of the weights over several local steps (what a FedAvg client sends).
        labels_known: Whether the labels are given. Otherwise attacks must recover them.
        dropout_known: Whether the adversary can repeat the random numbers of the forward pass (a shared seed).
            True is the stronger adversary, hence the default.
        precision: Arithmetic of the training step, by Lightning's name; in a run it is read from the Trainer.
        defences: What if the client did this to the gradient before it leaves? They act on audited copies alone, and
            training goes on with the clean gradient; for defences that act in training see `ApplyDefences`. The
            adversary knows kind and strength.
        batch_size: What if the client had used this many of the batch's images? Its gradient is recomputed on a
            replica. None: the batch as it was.
        order_known: Whether the adversary knows which image was in which micro-batch of which local epoch. Without it,
            the number and size of batches and epochs are still known. One epoch alone has no order to know: its
            images may be numbered as they came.
        known: Names of the entries of a batch, beside images and labels, whose content is known: keys or indices
            ("weights", "2", nested ones with dots between). None: all of them, the stronger adversary.
        public_images: How many images of the same kind, none of them audited, the adversary holds (see `Observation`).
            For a run give the images themselves, (M, C, H, W) pixels in [0, 1]; they help to recover labels.
        local_steps: For view="delta" in a run: optimizer steps before the client shares; None: the whole fit, whose
            batches are all kept until its end.
        buffers_shared: Whether they also hold the buffers as they are after the step: a client that sends its
            `state_dict` sends BatchNorm's running statistics with it, and the batch's own follow by algebra. None: yes
            for view="delta", no for the others, where only gradients travel.
        optimizer: Index of the optimizer whose gradient is shared, in a run whose module optimizes by hand; None: the
            first whose gradient depends on the images.
        defences_act: Whether training itself went on with the defended gradient. Set by `GradAudit` where an
            `ApplyDefences` acts.
        held_images: The images given as `public_images`. Set by it, and no part of equality, `repr` or JSON.

    Raises:
        InvalidInputError: When an argument is out of range.
    """

    view: View = "local"
    labels_known: bool = False
    dropout_known: bool = True
    precision: str = "32-true"
    defences: tuple[Defence, ...] = ()
    batch_size: int | None = None
    order_known: bool = True
    known: tuple[str, ...] | None = None
    public_images: int | Tensor = 0
    local_steps: int | None = None
    buffers_shared: bool | None = None
    optimizer: int | None = None
    defences_act: bool = False
    held_images: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "defences", tuple(self.defences))
        check_defences(self.defences)
        if not isinstance(self.public_images, int):
            check_public_images(self.public_images)
            object.__setattr__(self, "held_images", self.public_images)
            object.__setattr__(self, "public_images", len(self.public_images))
        if self.view not in get_args(View):
            raise InvalidInputError(f"view: expected one of {get_args(View)}, got {self.view!r}.")
        if self.batch_size is not None and (self.batch_size < 1 or self.view != "local"):
            raise InvalidInputError(
                f"batch_size: what-if batches must be >= 1 and need view='local', got {self.batch_size!r} with "
                f"view={self.view!r}."
            )
        if self.local_steps is not None and self.local_steps < 1:
            raise InvalidInputError(f"local_steps must be >= 1 or None, got {self.local_steps!r}.")
        if self.optimizer is not None and self.optimizer < 0:
            raise InvalidInputError(f"optimizer: expected an index >= 0 or None, got {self.optimizer!r}.")

    @property
    def shares_buffers(self) -> bool:
        """Whether the adversary holds the buffers after the step; `buffers_shared` with its default filled in."""
        return self.view == "delta" if self.buffers_shared is None else self.buffers_shared

    def defend(self, gradients: Tensors, *, seed: int) -> Tensors:
        """Return what leaves of a captured gradient: itself, where defences acted on it in training."""
        return gradients if self.defences_act else apply_defences(self.defences, gradients, seed=seed)

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON."""
        return {
            "view": self.view,
            "labels_known": self.labels_known,
            "dropout_known": self.dropout_known,
            "precision": self.precision,
            "defences": [repr(defence) for defence in self.defences],
            "defences_act": self.defences_act,
            "what_if_batch_size": self.batch_size,
            "order_known": self.order_known,
            "known": None if self.known is None else list(self.known),
            "public_images": self.public_images,
            "buffers_shared": self.shares_buffers,
        }


def check_public_images(images: Tensor, shape: torch.Size | None = None) -> None:
    """Check images that are given as public.

    Raises:
        InvalidInputError: When they are not pixels in [0, 1], or not of the shape of the audited images.
    """
    floating = isinstance(images, Tensor) and images.is_floating_point()
    if not floating or images.ndim != 4 or not len(images) or (shape is not None and images.shape[1:] != shape):
        expected = "(M, C, H, W)" if shape is None else f"(M, {', '.join(map(str, shape))})"
        got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise InvalidInputError(f"public_images: expected floating-point pixels {expected}, got {got}.")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise InvalidInputError(
            f"public_images: pixels must lie in [0, 1], these span [{low:.2f}, {high:.2f}]. Undo their normalisation."
        )
