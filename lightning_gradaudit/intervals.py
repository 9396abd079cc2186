"""Confidence bounds of proportions and of exposure statistics."""

from __future__ import annotations

import numpy as np
from scipy.special import betaincinv

from lightning_gradaudit.metrics.exposure import Statistic

_BOOTSTRAPS = 2000


def clopper_pearson(successes: float, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return one-sided exact bounds of a proportion: each holds with the given confidence.

    Example:
        >>> low, high = clopper_pearson(0, 29)
        >>> low, round(high, 3)
        (0.0, 0.098)
    """
    if trials == 0:
        return 0.0, 1.0
    # Quantiles of beta distributions; `betaincinv` is what scipy.stats.beta.ppf computes, a hundred times faster.
    low = 0.0 if successes <= 0 else float(betaincinv(successes, trials - successes + 1, 1 - confidence))
    high = 1.0 if successes >= trials else float(betaincinv(successes + 1, trials - successes, confidence))
    return low, high


def bootstrap_by_audit(batches: list[np.ndarray], statistic: Statistic, confidence: float) -> tuple[float, float]:
    """Bootstrap a statistic by whole audits: images of one batch are not independent."""
    if len(batches) < 2:
        return 0.0, 1.0
    rng = np.random.default_rng(0)
    draws = rng.integers(len(batches), size=(_BOOTSTRAPS, len(batches)))
    if statistic == "mean":
        sums, counts = np.array([batch.sum() for batch in batches]), np.array([len(batch) for batch in batches])
        values = sums[draws].sum(1) / counts[draws].sum(1)
    else:
        values = np.array([np.quantile(np.concatenate([batches[i] for i in draw]), 0.9) for draw in draws[:200]])
    return float(np.quantile(values, 1 - confidence)), float(np.quantile(values, confidence))
