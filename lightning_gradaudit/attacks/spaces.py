"""Row spaces of linear layers' gradients, and searches for the batch in them.

For Z = W X + b the gradient dL/dW = D Xᵀ has rank B: every layer input of the batch lies in the span of its rows. What
singles the inputs out of that span is

- the next layer: its own inputs f(Wx + b) must lie in the span of *its* gradient's rows (`chained_inputs`);
- zeros: a ReLU makes about half of every column of D vanish (`sparse_inputs`), as in SPEAR (arXiv:2403.03945).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 2048  # rows of a gradient looked at, those with the largest norm
_LIVE = 1e-6  # rows below this share of the largest norm say nothing
_SPARE = 8  # directions sketched beyond the batch size, to see that the spectrum ends
_CLIFF = 30.0  # a singular value this many times above the noise is signal
FULL_PRECISION = 1e-5  # relative noise of the gradient's entries above which nothing exact can be said
_STEPS = 25  # Gauss-Newton steps from each start
_ROUNDING = 2e-7  # of features in fp32, relative
_SIGMAS = 10.0  # noise this many times over is not noise
_SAME = 1e-3  # relative distance below which two inputs are one
_NORM = 0.5  # root mean square of a start's entries where nothing gives its scale
_FRESH = 0.25  # share of the starts that ignore what was found
_REWEIGHTINGS = 30
_POWER = 0.5  # of the sparsity measure Σ|d|^p
_NEARLY_ZERO = 1e-3  # of a column's root mean square
_EXTRA_ZEROS = 4  # rows beyond those that any vector can be orthogonal to


@dataclass(frozen=True)
class RowSpace:
    """The span of the rows of [dL/dW, dL/db], each row scaled to length one: u s v up to noise.

    Attributes:
        rows: (m,) which rows of the gradient are kept.
        norms: (m,) their lengths.
        u: (m, r) orthonormal columns.
        s: (r,) descending singular values.
        v: (r, d) orthonormal rows; layer inputs are combinations of them.
        ones: (r,) the same for the bias, whose input is always 1; None without a bias.
        noise: Root mean square of what the r directions leave unexplained, per entry.
        relative_noise: `noise` over the root mean square of an entry.
    """

    rows: Tensor
    norms: Tensor
    u: Tensor
    s: Tensor
    v: Tensor
    ones: Tensor | None
    noise: float
    relative_noise: float

    @property
    def rank(self) -> int:
        """Number of independent inputs, >= 0."""
        return len(self.s)

    @property
    def whole(self) -> Tensor:
        """(r, d) or (r, d + 1) orthonormal rows, bias included."""
        return self.v if self.ones is None else torch.cat([self.v, self.ones[:, None]], dim=1)


def row_space(weight: Tensor, bias: Tensor | None, *, size: int, generator: torch.Generator) -> RowSpace | None:
    """Find the span of a gradient's rows by a random sketch, in float64.

    Args:
        weight: (rows, d) gradient of the weight.
        bias: (rows,) gradient of the bias.
        size: Largest rank to expect, the batch size.
        generator: Draws the sketch.

    Returns:
        None when the rank exceeds `size` (or noise hides it) or no row is left.
    """
    gradient = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    norms = gradient.double().norm(dim=1)
    rows = norms.topk(min(_ROWS, len(norms))).indices
    rows = rows[norms[rows] > _LIVE * norms.max()].sort().values
    if not len(rows):
        return None
    norms = norms[rows]
    scaled = gradient[rows].double() / norms[:, None]
    sketch = torch.randn((scaled.shape[1], min(size + _SPARE, *scaled.shape)), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(scaled @ sketch.to(scaled.device)).Q
    basis = torch.linalg.qr(scaled @ (scaled.T @ basis)).Q
    left, s, v = torch.linalg.svd(basis.T @ scaled, full_matrices=False)
    m, n = scaled.shape
    u = basis @ left
    spread = m**0.5 + n**0.5  # the largest singular value of m x n noise of unit variance
    rank = min(size, len(s))
    while True:
        noise = float((scaled - (u[:, :rank] * s[:rank]) @ v[:rank]).square().mean().sqrt())
        kept = int((s[:rank] > _CLIFF * spread * noise).sum())
        if kept == rank:
            break
        rank = kept
    relative = noise * n**0.5
    if rank == 0 or relative > FULL_PRECISION:
        return None
    ones = None if bias is None else v[:rank, -1]
    v = v[:rank] if bias is None else v[:rank, :-1]
    return RowSpace(rows, norms, u[:, :rank], s[:rank], v, ones, noise, relative)


@dataclass(frozen=True)
class Chain:
    """Two linear layers with a known function of each unit between them.

    Attributes:
        weight, bias: (m, d), (m,) or None: the first layer's.
        activation: Elementwise, (N, m) to (N, m).
        first: Span of the inputs.
        second: Span of the inputs of the second layer.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor]
    first: RowSpace
    second: RowSpace


class ChainedSearch:
    """Gauss-Newton for inputs x in the span of the first gradient whose features lie in that of the second.

    With x = x0 + y T the features f(W x + b) must have nothing outside the second span: far more equations than
    unknowns for each image alone, linear in y as long as no unit of a ReLU switches.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        space = chain.first
        if space.ones is None:
            self.origin, self.directions = torch.zeros_like(space.s), torch.eye(space.rank).to(space.s)
        else:  # inputs whose entry for the bias is 1
            self.origin = space.ones / space.ones.square().sum()
            self.directions = torch.linalg.svd(space.ones[None]).Vh[1:]
        weight = chain.weight.double()
        self._slope = weight @ (self.directions @ space.v).T
        self._offset = weight @ (self.origin @ space.v) + (0 if chain.bias is None else chain.bias.double())
        second = chain.second
        self._span = second.v
        m, d = self._slope.shape
        self._squares = (self._slope[:, :, None] * self._slope[:, None, :]).reshape(m, d * d)
        self._cross = (self._span.T[:, :, None] * self._slope[:, None, :]).reshape(m, -1)

    def starts(self, number: int, generator: torch.Generator) -> Tensor:
        """Draw rows of the gradient, which are mixtures of few images, as starts (number, d)."""
        space = self.chain.first
        rows = space.u * space.s
        chosen = rows[torch.randint(len(rows), (number,), generator=generator).to(rows.device)]
        if space.ones is None:
            sign = torch.randint(2, (number, 1), generator=generator).to(rows) * 2 - 1
            chosen = chosen / chosen.norm(dim=1, keepdim=True) * sign * _NORM * space.v.shape[1] ** 0.5
        else:
            ones = chosen @ space.ones
            chosen = chosen / torch.where(ones.abs() < 1e-9, torch.ones_like(ones), ones)[:, None]
        return (chosen - self.origin) @ self.directions.T

    def away_from(self, found: Tensor, starts: Tensor, generator: torch.Generator) -> Tensor:
        """Move starts into directions that the inputs found so far leave free."""
        centre = found.mean(0)
        spread = (found - centre).norm(dim=1).mean() if len(found) > 1 else (starts.median(0).values - centre).norm()
        basis = torch.linalg.svd(found - centre, full_matrices=False).Vh[: len(found) - 1]
        free = starts - centre
        free = free - free @ basis.T @ basis
        free = free / free.norm(dim=1, keepdim=True).clamp_min(1e-30)
        mixture = torch.rand((len(starts), len(found)), generator=generator).to(found).log().neg()
        mixture = mixture / mixture.sum(1, keepdim=True)
        length = 4 * torch.rand((len(starts), 1), generator=generator).to(found) - 2
        fresh = torch.rand((len(starts), 1), generator=generator).to(found) < _FRESH
        return torch.where(fresh, starts, mixture @ found + spread * length * free)

    def descend(self, y: Tensor) -> Tensor:
        """Take Gauss-Newton steps from each start (N, d)."""
        for _ in range(_STEPS):
            y = self._step(y)
        return y

    def _step(self, y: Tensor) -> Tensor:
        z = self._offset + y @ self._slope.T
        f, df = self._activation(z)
        d, r = self._slope.shape[1], len(self._span)
        cross = (df @ self._cross).reshape(-1, r, d)
        normal = (df.square() @ self._squares).reshape(-1, d, d) - cross.transpose(1, 2) @ cross
        rest = f - df * (y @ self._slope.T)
        inside = rest @ self._span.T
        if self.chain.second.ones is not None:
            inside = inside + self.chain.second.ones
        right = (inside[:, None] @ cross)[:, 0] - (df * rest) @ self._slope
        damping = 1e-12 * normal.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)
        normal = normal + damping[:, None, None] * torch.eye(d).to(normal)
        moved = torch.linalg.solve_ex(normal, right[:, :, None]).result[:, :, 0]
        return torch.where(moved.isfinite().all(1, keepdim=True), moved, y)

    def _activation(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            f = self.chain.activation(z)
            (df,) = torch.autograd.grad(f.sum(), z)
        return f.detach(), df

    def misfit(self, y: Tensor) -> Tensor:
        """Return the share of each input's features outside the second span, in units of what rounding explains."""
        second = self.chain.second
        f, _ = self._activation(self._offset + y @ self._slope.T)
        if second.ones is not None:
            f = torch.cat([f, torch.ones_like(f[:, :1])], dim=1)
        inside = f @ second.whole.T
        outside = (f - inside @ second.whole).norm(dim=1)
        # Noise turns the span by noise / s in each direction.
        turned = second.noise * f.shape[1] ** 0.5 * (inside / second.s).norm(dim=1)
        return outside / (turned + _ROUNDING * f.norm(dim=1))

    def coordinates(self, y: Tensor) -> Tensor:
        """Return the inputs in terms of the rows of `RowSpace.v`, (N, r)."""
        return self.origin + y @ self.directions
