"""Exact counterparts of the Krylov estimates, from the matrix itself."""

from __future__ import annotations

import torch

from lightning_gradaudit.analysis.resolution import Resolved
from lightning_gradaudit.analysis.spectrum import SpectralMeasure


def dense(linear):
    """The matrix itself, one product for each column."""
    unit = torch.eye(linear.columns, dtype=linear.dtype, device=linear.device)
    return torch.stack([linear.matvec(column) for column in unit], dim=1)


def resolved_exactly(linear, *, blocks):
    """What a gradient resolves: the measure of tr(S_b h(AᵀA) S_bᵀ) / tr Σ_b for each image b."""
    unit = torch.eye(linear.columns, dtype=linear.dtype, device=linear.device)
    root = torch.stack([linear.root(column) for column in unit]).double().cpu()
    _, singular, transposed = torch.linalg.svd(dense(linear).double().cpu(), full_matrices=True)
    nodes = torch.zeros(linear.columns, dtype=torch.float64)
    nodes[: len(singular)] = singular**2
    energy = ((transposed @ root) ** 2).reshape(linear.columns, blocks, -1).sum(2).T
    measure = SpectralMeasure(nodes, energy / energy.sum(1, keepdim=True))
    return Resolved(upper=measure, lower=measure)
