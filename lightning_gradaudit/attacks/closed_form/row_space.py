"""The span of a batch in the gradient of a linear layer, and the sparse columns that separate its inputs.

For Z = W X + b the gradient is dL/dW = D Xᵀ with one column of D and one of X per image. It has rank B, and every
layer input of the batch is a combination of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RANK_ONE_MISFIT = 1e-3
"""Relative misfit of dL/dW = dL/db xᵀ up to which one input is proven."""


@dataclass(frozen=True)
class RowSpaceSettings:
    """Settings of the span of a gradient's rows."""

    most_rows: int = 2048  # looked at, those with the largest norm
    least_relative_norm: float = 1e-6  # of a row: below this share of the largest it carries no information
    extra_directions: int = 8  # sketched beyond the batch size, to see that the spectrum ends
    least_signal_to_noise: float = 30.0  # of a singular value
    most_relative_noise: float = 1e-5  # of the gradient's entries: above it nothing exact can be said


@dataclass(frozen=True)
class SparseColumnSettings:
    """Settings of the search for sparse columns."""

    reweightings: int = 30
    norm_exponent: float = 0.5  # of the measure of sparsity Σ|d|^p
    nearly_zero: float = 1e-3  # an entry, relative to its column's root mean square
    extra_zeros: int = 4  # rows beyond those that some vector is always orthogonal to
    start_noise: float = 0.5  # of a start, relative to its length
    least_new_part: float = 1e-2  # of a new column: its part outside the span of the others


@dataclass(frozen=True)
class ZeroPatternSettings:
    """Settings of the comparison of zeros in D."""

    noise_factor: float = 1e3  # the rounding of fp32 gradients differs widely over the entries of D
    zero_share: float = 1e-5  # of a column's root mean square: below it an entry is zero
    nonzero_factor: float = 10.0  # times the limit of a zero: above it an entry is not zero
    most_wrong_share: float = 0.02  # of a column's zeros, which may be tiny in truth, before its image is refuted
    least_decided_share: float = 0.9  # of a column's entries
    least_entries: int = 8  # zeros, and other entries, that are evidence for an image


SPACE, SPARSE, ZEROS = RowSpaceSettings(), SparseColumnSettings(), ZeroPatternSettings()


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


def divide_by_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """Solve dL/dW = dL/db xᵀ, which holds for one sample, for the layer's input x (d,) by least squares."""
    return bias @ weight / (bias @ bias).clamp_min(torch.finfo(bias.dtype).tiny)


def outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the outer product of each row of left (m, a) with that of right (m, b), (m, a * b)."""
    return (left[:, :, None] * right[:, None, :]).reshape(len(left), -1)


def solve_damped(normal: Tensor, right: Tensor, *, damping: float) -> Tensor:
    """Solve normal equations (N, r, r) for right-hand sides (N, r), with a multiple of their trace on the diagonal."""
    trace = normal.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)
    normal = normal + (damping * trace)[:, None, None] * torch.eye(normal.shape[1]).to(normal)
    return torch.linalg.solve_ex(normal, right[:, :, None]).result[:, :, 0]


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
    rows = norms.topk(min(SPACE.most_rows, len(norms))).indices
    rows = rows[norms[rows] > SPACE.least_relative_norm * norms.max()].sort().values
    if not len(rows):
        return None
    norms = norms[rows]
    scaled = gradient[rows].double() / norms[:, None]
    width = min(size + SPACE.extra_directions, *scaled.shape)
    sketch = torch.randn((scaled.shape[1], width), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(scaled @ sketch.to(scaled.device)).Q
    basis = torch.linalg.qr(scaled @ (scaled.T @ basis)).Q
    left, s, v = torch.linalg.svd(basis.T @ scaled, full_matrices=False)
    m, n = scaled.shape
    u = basis @ left
    spread = m**0.5 + n**0.5  # the largest singular value of m x n noise of unit variance
    rank = min(size, len(s))
    while True:
        noise = float((scaled - (u[:, :rank] * s[:rank]) @ v[:rank]).square().mean().sqrt())
        kept = int((s[:rank] > SPACE.least_signal_to_noise * spread * noise).sum())
        if kept == rank:
            break
        rank = kept
    relative = noise * n**0.5
    if rank == 0 or relative > SPACE.most_relative_noise:
        return None
    ones = None if bias is None else v[:rank, -1]
    v = v[:rank] if bias is None else v[:rank, :-1]
    return RowSpace(rows, norms, u[:, :rank], s[:rank], v, ones, noise, relative)


def sparse_columns(space: RowSpace, starts: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Search for vectors q for which u q has many zeros, by reweighted least squares from rows as starts.

    A ReLU that is off makes an entry of D vanish, so the columns of D are the sparsest vectors in the span of u
    (SPEAR, Dimitrov et al., arXiv:2403.03945, samples rows for them; a descent from rows needs far fewer trials).

    Yields:
        After each round the sparsest independent q found so far, (K, r) of unit length, K <= r.
    """
    u = space.u
    m, r = u.shape
    squares = outer_products(u, u)
    kept = u[:0]
    zeros: list[int] = []
    while True:
        q = u[torch.randint(m, (starts,), generator=generator).to(u.device)]
        noise = torch.randn(q.shape, generator=generator).to(q)
        q = q + q.norm(dim=1, keepdim=True) * noise * (SPARSE.start_noise / r**0.5)
        # Half of the starts keep away from some of what was found.
        basis = torch.linalg.qr(kept[torch.rand(len(kept), generator=generator) < 0.5].T).Q
        q[::2] -= q[::2] @ basis @ basis.T
        for step in range(SPARSE.reweightings):
            floor = 10.0 ** (-0.5 - 5 * step / (SPARSE.reweightings - 1)) / m**0.5
            weights = ((q @ u.T).square() + floor**2) ** (SPARSE.norm_exponent / 2 - 1)
            weights = weights / weights.max(1, keepdim=True).values
            q = solve_damped((weights @ squares).reshape(-1, r, r), q, damping=1e-14)
            q = q / q.norm(dim=1, keepdim=True).clamp_min(1e-300)
        near = (q @ u.T).abs() < SPARSE.nearly_zero / m**0.5
        for each, off in zip(q, near, strict=True):
            count = int(off.sum())
            if count < r - 1 + SPARSE.extra_zeros or (len(kept) and float((kept @ each).abs().max()) > 1 - 1e-6):
                continue
            kept = torch.cat([kept, torch.linalg.svd(u[off]).Vh[-1:]])
            zeros.append(count)
        chosen: list[int] = []
        for index in sorted(range(len(kept)), key=lambda index: -zeros[index]):
            basis = torch.linalg.qr(kept[chosen].T).Q
            if float((kept[index] - basis @ (basis.T @ kept[index])).norm()) > SPARSE.least_new_part:
                chosen.append(index)
        kept, zeros = kept[chosen], [zeros[index] for index in chosen]
        yield kept


def inputs_from_columns(space: RowSpace, columns: Tensor) -> Tensor | None:
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


def compare_zeros(columns: Tensor, noise: Tensor, simulated: Tensor) -> tuple[Tensor, bool]:
    """Compare the zeros of D (m, K) with those that the network gives.

    Entries that noise leaves undecided are ignored.

    Returns:
        Which columns agree, (K,), and whether any column is refuted.
    """
    zero, other = _zeros_and_others(columns, noise)
    off = simulated == 0
    wrong = (zero & ~off) | (other & off)
    enough = (zero.sum(0) >= ZEROS.least_entries) & (other.sum(0) >= ZEROS.least_entries)
    decided = (zero | other).double().mean(0) >= ZEROS.least_decided_share
    return enough & decided & ~wrong.any(0), bool((wrong.double().mean(0) > ZEROS.most_wrong_share).any())


def are_unmixed(columns: Tensor, noise: Tensor) -> Tensor:
    """Tell which inputs (K,) are no mixtures, by the zeros of D (m, K): no other column contains a part of theirs.

    A column that did would have no zeros where theirs has none. Images that switch the same units have no such places.
    """
    zero, other = _zeros_and_others(columns, noise)
    places = zero.double().T @ other.double()  # (j, k): how often column j is zero where k is not
    return ((places >= ZEROS.least_entries) | torch.eye(len(places), dtype=torch.bool, device=places.device)).all(0)


def _zeros_and_others(columns: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return which entries of D (m, K) are certainly zero, and which are certainly not."""
    size = columns.abs()
    floor = torch.maximum(ZEROS.noise_factor * noise, ZEROS.zero_share * columns.square().mean(0).sqrt())
    return size < floor, size > ZEROS.nonzero_factor * floor
