"""Weights that a dishonest server sends so that an honest step leaks, written from the papers' mathematics.

Each manipulation maps a model to a changed copy; the model itself is never touched. To see what an active server would
get, audit a snapshot of the copy::

    snapshot = Snapshot.from_batch(RobbingTheFed()(model, public), batch, loss=loss)
    record = audit_snapshot(snapshot, attack=ImprintInversion())
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import InvalidInputError

SCALES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.94, 0.96, 0.98, 0.99, 0.995)
"""Scales that `CuriousAbandonHonesty` tries."""


class ImageBlock(nn.Module):
    """A block before a model: image + spread(relu(rows(image))).

    The sum keeps the model's own function nearly as it was, and passes the loss gradient on to the rows.

    Args:
        shape: (C, H, W) of the images.
        rows: Units of the linear layer that sees the image.
        gain: Norm of the column by which a unit changes the image.
        equal_columns: Whether all units change the image alike; then all units that an image activates have the same
            gradient of the loss.
        generator: Draws the columns.
    """

    def __init__(
        self, shape: torch.Size, rows: int, *, gain: float, equal_columns: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        pixels = shape.numel()
        self.rows = nn.Linear(pixels, rows)
        self.spread = nn.Linear(rows, pixels, bias=False)
        columns = torch.randn((pixels, 1 if equal_columns else rows), generator=generator)
        with torch.no_grad():
            self.spread.weight.copy_(gain * columns / pixels**0.5)

    def forward(self, images: Tensor) -> Tensor:
        changed: Tensor = images + self.spread(torch.relu(self.rows(images.flatten(1)))).view_as(images)
        return changed


@dataclass(frozen=True, kw_only=True)
class RobbingTheFed:
    """Put an imprint module before a model: bins of a linear measurement of the image (Fowl et al., arXiv:2110.13057).

    All rows of its first layer measure the mean brightness h(x); bias i is the negative i-th quantile of h. An image
    activates the rows up to its own bin, so the gradients of neighbouring rows differ by the images of one bin.

    Args:
        bins: Rows of the module, >= 2.
        gain: Norm of the column by which a row changes the image.
        seed: Of the column.
    """

    bins: int = 512
    gain: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise InvalidInputError(f"bins: expected at least 2, got {self.bins!r}.")

    def __call__(self, model: nn.Module, images: Tensor) -> nn.Sequential:
        """Return the module and a copy of the model behind it.

        Args:
            model: Maps images to logits.
            images: The server's own, (N, C, H, W) in the model's input space, N >= 2: mean and spread of h.
        """
        _check_images(images)
        block = ImageBlock(
            images.shape[1:], self.bins, gain=self.gain, equal_columns=True, generator=_seeded(self.seed)
        )
        brightness = images.flatten(1).mean(1)
        levels = torch.arange(self.bins).add(0.5).div(self.bins)
        thresholds = brightness.mean() + brightness.std().clamp_min(1e-6) * torch.special.ndtri(levels).to(images)
        with torch.no_grad():
            block.rows.weight.fill_(1 / images.shape[1:].numel())
            block.rows.bias.copy_(-thresholds)
        return _before(block, model)


@dataclass(frozen=True, kw_only=True)
class CuriousAbandonHonesty:
    """Trap weights: rows that fire for few images (Boenisch et al., arXiv:2112.02918).

    Half of the entries of a row, at random, are negative; the others are the same magnitudes in another order, times a
    scale below 1. A row that one image of the batch activates alone gives that image exactly. The rows are those of
    the model's first linear layer where it sees the image, else of a block before the model.

    Args:
        rows: Of the block, where one is needed.
        share: Of the rows that are trapped, in (0, 1].
        scale: In (0, 1); None: the best of `SCALES` on the server's images.
        mirrored: Whether the positive entries have the magnitudes of the negative ones, as in the paper. Drawn anew
            they give nearly as much away, and are harder to see.
        batch_size: That the scale is chosen for.
        gain: Norm of the column by which a row of the block changes the image.
        seed: Of the weights.
    """

    rows: int = 512
    share: float = 1.0
    scale: float | None = None
    mirrored: bool = True
    batch_size: int = 32
    gain: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or (self.scale is not None and not 0 < self.scale < 1):
            raise InvalidInputError(
                f"CuriousAbandonHonesty: expected share in (0, 1] and scale in (0, 1), got {self.share}, {self.scale}."
            )

    def __call__(self, model: nn.Module, images: Tensor) -> nn.Module:
        """Return a copy of the model with trapped rows.

        Args:
            model: Maps images to logits.
            images: The server's own, (N, C, H, W) in the model's input space; their smallest value counts as black.
        """
        _check_images(images)
        changed, layer = copy.deepcopy(model), None
        linear = [each for each in changed.modules() if isinstance(each, nn.Linear)]
        if linear and linear[0].in_features == images.shape[1:].numel():
            layer = linear[0]
        else:
            block = ImageBlock(
                images.shape[1:], self.rows, gain=self.gain, equal_columns=False, generator=_seeded(self.seed)
            )
            changed, layer = _before(block, model), block.rows
        scale = self._best_scale(images) if self.scale is None else self.scale
        count = max(1, round(self.share * layer.out_features))
        rows = self._trap_rows(count, layer.in_features, scale)
        lengths = layer.weight.detach()[:count].norm(dim=1, keepdim=True)
        rows = rows.to(layer.weight) / rows.norm(dim=1, keepdim=True).to(layer.weight) * lengths
        with torch.no_grad():
            layer.weight[:count] = rows
            if layer.bias is not None:
                layer.bias[:count] = -rows.sum(1) * images.min().to(rows)
        return changed

    def _trap_rows(self, count: int, pixels: int, scale: float) -> Tensor:
        generator = _seeded(self.seed + 1)
        size = torch.randn((count, pixels // 2), generator=generator).abs()
        other = size if self.mirrored else torch.randn(size.shape, generator=generator).abs()
        values = torch.cat([-size, scale * other], dim=1)
        if pixels % 2:
            values = torch.cat([values, torch.zeros((count, 1))], dim=1)
        order = torch.rand((count, pixels), generator=generator).argsort(1)
        return values.gather(1, order)

    def _best_scale(self, images: Tensor) -> float:
        """Return the scale for which most rows fire for one of `batch_size` images alone."""
        light = (images - images.min()).flatten(1).cpu().float()
        batches = light[: max(1, len(light) // self.batch_size) * self.batch_size].split(self.batch_size)
        shares = []
        for scale in SCALES:
            rows = self._trap_rows(min(128, self.rows), light.shape[1], scale)
            alone = [((batch @ rows.T > 0).sum(0) == 1).float().mean() for batch in batches]
            shares.append((float(torch.stack(alone).mean()), scale))
        return max(shares)[1]


@dataclass(frozen=True, kw_only=True)
class Fishing:
    """Let one class, or one image of a class, make the gradient (Wen et al., arXiv:2202.00580).

    Class fishing: the head keeps the row of the target class; all other rows are zero and their biases large. Images of
    other classes then send no gradient to the layers below, those of the target class a large one. Feature fishing
    (`feature`) is for batches of one class: the row of the class looks at one feature, and its images above a threshold
    are classified with certainty, so that only those below it send a gradient.

    Args:
        target: The class.
        boost: Bias of the other classes.
        feature: Index of a feature of the head; None: class fishing.
        threshold: Of the feature.
        slope: Weight of the feature.
    """

    target: int
    boost: float = 1000.0
    feature: int | None = None
    threshold: float = 0.0
    slope: float = 1000.0

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with the changed head, which is its last linear layer.

        Raises:
            InvalidInputError: When the head has no bias, or no such class or feature.
        """
        changed, head = _with_head(model)
        if head.bias is None or not 0 <= self.target < head.out_features:
            raise InvalidInputError(
                f"target: expected a class below {head.out_features} of a head with a bias, got {self.target!r}."
            )
        if self.feature is not None and not 0 <= self.feature < head.in_features:
            raise InvalidInputError(f"feature: expected an index below {head.in_features}, got {self.feature!r}.")
        with torch.no_grad():
            others = torch.arange(head.out_features, device=head.weight.device) != self.target
            head.weight[others] = 0.0
            head.bias[others] = self.boost
            if self.feature is not None:
                head.weight[self.target] = 0.0
                head.weight[self.target, self.feature] = self.slope
                head.bias[self.target] = self.boost - self.slope * self.threshold
        return changed


@dataclass(frozen=True, kw_only=True)
class SuppressedGradients:
    """Kill the ReLUs of all clients but one, whose gradient then is the sum (Pasquini et al., arXiv:2111.07380).

    Args:
        shift: Subtracted from every bias before the head, those of norms included.
    """

    shift: float = 100.0

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model whose hidden units are off, as the other clients get it."""
        changed, head = _with_head(model)
        with torch.no_grad():
            for module in changed.modules():
                bias = getattr(module, "bias", None)
                if module is not head and isinstance(bias, nn.Parameter):
                    bias.sub_(self.shift)
        return changed


@dataclass(frozen=True, kw_only=True)
class ScaledHead:
    """Multiply weights and biases of the head, so that few images make the gradient.

    Args:
        factor: Of the scaling.
    """

    factor: float = 100.0

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with the scaled head."""
        changed, head = _with_head(model)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(self.factor)
        return changed


@dataclass(frozen=True, kw_only=True)
class DuplicatedHead:
    """Make rows of the head copies of its first one.

    Args:
        share: Of the other rows, in (0, 1]; at least one.
    """

    share: float = 1.0

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with the duplicated rows."""
        changed, head = _with_head(model)
        copies = max(1, round(self.share * (head.out_features - 1)))
        with torch.no_grad():
            head.weight[1 : copies + 1] = head.weight[0].clone()
        return changed


@dataclass(frozen=True, kw_only=True)
class IdentityLayers:
    """Let convolutions pass their input on, as is done between the image and an imprint deeper in the network.

    Args:
        share: Of the output channels of each convolution, in (0, 1]; at least one.
    """

    share: float = 1.0

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with convolutions of which channels copy an input channel."""
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for module in changed.modules():
                if isinstance(module, nn.Conv2d) and module.groups == 1:
                    count = max(1, round(self.share * module.out_channels))
                    kernel = torch.zeros_like(module.weight)
                    kernel = nn.init.dirac_(kernel)
                    repeats = [i % min(module.in_channels, module.out_channels) for i in range(count)]
                    module.weight[:count] = kernel[repeats]
        return changed


def _with_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    changed = copy.deepcopy(model)
    linear = [each for each in changed.modules() if isinstance(each, nn.Linear)]
    if not linear:
        raise InvalidInputError("model: expected a linear layer as its head, found none.")
    return changed, linear[-1]


def _before(block: ImageBlock, model: nn.Module) -> nn.Sequential:
    like = next(model.parameters())
    return nn.Sequential(block.to(like), copy.deepcopy(model)).train(model.training)


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) < 2 or not images.is_floating_point():
        got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise InvalidInputError(
            f"images: expected at least two images of the server's own, (N, C, H, W) floating point, got {got}."
        )


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
