"""The span of a batch in the gradient of a linear layer, and the sparse columns that single its inputs out.

For Z = W X + b the gradient is dL/dW = D Xᵀ with one column of D and one of X per image. It has rank B, and every
layer input of the batch is a combination of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 2048  # rows of a gradient looked at, those with the largest norm
_LIVE = 1e-6  # rows below this share of the largest norm say nothing
_SPARE = 8  # directions sketched beyond the batch size, to see that the spectrum ends
_CLIFF = 30.0  # a singular value this many times above the noise is signal
FULL_PRECISION = 1e-5  # relative noise of the gradient's entries above which nothing exact can be said
_REWEIGHTINGS = 30
_POWER = 0.5  # of the measure of sparsity Σ|d|^p
NEARLY_ZERO = 1e-3  # of a column's root mean square
_EXTRA_ZEROS = 4  # rows beyond those that some vector is always orthogonal to
_BLUR = 1e3  # times the noise: rounding of fp32 gradients is far from equal over the entries of D
_ZERO, _SURE = 1e-5, 10.0  # an entry of D is zero below this share of its column, and is not above that times more
_SLIPS = 0.02  # share of a column's zeros that may be tiny in truth before its image is refused
_DECIDED = 0.9  # share of a column's entries that must be decided
_EVIDENCE = 8  # least number of zeros, and of other entries, that speak for an image
_JITTER = 0.5  # of a start, relative
_DISTINCT = 1e-2  # smallest part of a new column outside the span of the others


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


def sparse_columns(space: RowSpace, starts: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Search for vectors q for which u q has many zeros, by reweighted least squares from rows as starts.

    A ReLU that is off makes an entry of D vanish, so the columns of D are the sparsest vectors in the span of u
    (SPEAR, Dimitrov et al., arXiv:2403.03945, samples rows for that; descending from rows needs far fewer tries).

    Yields:
        After each round the sparsest independent q found so far, (K, r) of unit length, K <= r.
    """
    u = space.u
    m, r = u.shape
    squares = (u[:, :, None] * u[:, None, :]).reshape(m, r * r)
    kept = u[:0]
    zeros: list[int] = []
    while True:
        q = u[torch.randint(m, (starts,), generator=generator).to(u.device)]
        q = q + q.norm(dim=1, keepdim=True) * torch.randn(q.shape, generator=generator).to(q) * (_JITTER / r**0.5)
        # Half of the starts keep away from some of what was found.
        basis = torch.linalg.qr(kept[torch.rand(len(kept), generator=generator) < 0.5].T).Q
        q[::2] -= q[::2] @ basis @ basis.T
        for step in range(_REWEIGHTINGS):
            floor = 10.0 ** (-0.5 - 5 * step / (_REWEIGHTINGS - 1)) / m**0.5
            weights = ((q @ u.T).square() + floor**2) ** (_POWER / 2 - 1)
            weights = weights / weights.max(1, keepdim=True).values
            normal = (weights @ squares).reshape(-1, r, r)
            damping = 1e-14 * normal.diagonal(dim1=1, dim2=2).sum(1)
            normal = normal + damping[:, None, None] * torch.eye(r).to(u)
            q = torch.linalg.solve_ex(normal, q[:, :, None]).result[:, :, 0]
            q = q / q.norm(dim=1, keepdim=True).clamp_min(1e-300)
        near = (q @ u.T).abs() < NEARLY_ZERO / m**0.5
        for each, off in zip(q, near, strict=True):
            count = int(off.sum())
            if count < r - 1 + _EXTRA_ZEROS or (len(kept) and float((kept @ each).abs().max()) > 1 - 1e-6):
                continue
            exact = torch.linalg.svd(u[off]).Vh[-1]
            at = sum(other >= count for other in zeros)
            kept = torch.cat([kept[:at], exact[None], kept[at:]])
            zeros.insert(at, count)
        chosen: list[int] = []
        for index in range(len(kept)):
            basis = torch.linalg.qr(kept[chosen].T).Q
            if float((kept[index] - basis @ (basis.T @ kept[index])).norm()) > _DISTINCT:
                chosen.append(index)
        kept, zeros = kept[chosen], [zeros[index] for index in chosen]
        yield kept


def inputs_of(space: RowSpace, columns: Tensor) -> Tensor | None:
    """Return the inputs (r, r), in terms of the rows of `space.v`, that make u q the columns of D for q in `columns`.

    The bias gradient sets their scale; None without one.
    """
    if space.ones is None:
        return None
    inputs = torch.linalg.solve(columns.T, torch.diag(space.s))
    return inputs / (inputs @ space.ones)[:, None]


def implied_columns(space: RowSpace, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the columns of D (m, r), of rows of length one, that inputs (K, r) imply, and the noise of each (r,).

    None unless there are as many independent inputs as the span has dimensions: a mixture among them spoils the
    columns of the images it is mixed of.
    """
    if len(inputs) != space.rank:
        return None
    inverse, failed = torch.linalg.inv_ex(inputs)
    if bool(failed) or not bool(inverse.isfinite().all()):
        return None
    return (space.u * space.s) @ inverse, space.noise * inverse.norm(dim=0)


def zeros_agree(columns: Tensor, noise: Tensor, simulated: Tensor) -> tuple[Tensor, bool]:
    """Compare the zeros of D (m, K) with those the network gives: who agrees (K,), and is anybody refuted?

    Entries that noise leaves undecided count for nothing.
    """
    zero, other = _decided(columns, noise)
    off = simulated == 0
    wrong = (zero & ~off) | (other & off)
    enough = (zero.sum(0) >= _EVIDENCE) & (other.sum(0) >= _EVIDENCE)
    decided = (zero | other).double().mean(0) >= _DECIDED
    return enough & decided & ~wrong.any(0), bool((wrong.double().mean(0) > _SLIPS).any())


def told_apart(columns: Tensor, noise: Tensor) -> Tensor:
    """Tell whose input (K,) is no mixture, by the zeros of D (m, K): no other column holds a part of theirs.

    A column that did would have no zeros where theirs has none. Images that switch the same units have no such places.
    """
    zero, other = _decided(columns, noise)
    places = zero.double().T @ other.double()  # (j, k): how often column j is zero where k is not
    return ((places >= _EVIDENCE) | torch.eye(len(places), dtype=torch.bool, device=places.device)).all(0)


def _decided(columns: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return which entries of D (m, K) are zero for sure, and which are not for sure."""
    size = columns.abs()
    floor = torch.maximum(_BLUR * noise, _ZERO * columns.square().mean(0).sqrt())
    return size < floor, size > _SURE * floor
