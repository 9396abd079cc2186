"""Confidence bounds of proportions and of exposure statistics, at one look and over all looks of a run."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

import numpy as np
from scipy.special import betaincinv

from lightning_gradaudit.metrics.functional.summary import Statistic

BOOTSTRAP_DRAWS = {"mean": 2000, "p90": 200}
"""Draws of whole audits by statistic; each draw of the 90th percentile sorts all its images."""
BISECTIONS = 30
"""Halvings of [0, 1] in the search for a bound: to 1e-9."""
# (share assumed by the alternative, over the rate; weight of the bet).
STRICT_BETS = ((0.0, 1.0),)
TOLERANT_BETS = ((0.0, 0.7), (0.25, 0.1), (0.5, 0.1), (0.75, 0.1))


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


def log_e_value(shares: np.ndarray, rate: float, *, tolerant: bool = False) -> float:
    """Return the log evidence against the hypothesis that units have a mean share of at least `rate`.

    Each unit (an audit) contributes its share in [0, 1] of images with the property, so that images of one audit may be
    correlated in any way. The value is a product of factors that are linear in the share, with expectation at most 1
    under the hypothesis; by Ville's inequality it exceeds log(1/α) with probability at most α at *any* time of a run,
    however often one looks (Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", 2023).

    Args:
        shares: (N,) in [0, 1], in the order of the audits.
        rate: In (0, 1).
        tolerant: False: bets everything on shares of zero, and bounds a tail of 10 % after 29 clean units, as the exact
            binomial interval does. True: keeps a part of the bet for runs with some findings; 31 units.

    Example:
        >>> [bool(log_e_value(np.zeros(audits), 0.1) >= np.log(20)) for audits in (28, 29)]
        [False, True]
    """
    bets = TOLERANT_BETS if tolerant else STRICT_BETS
    logs = []
    for part, weight in bets:
        ratio = (1 - part * rate) / (1 - rate)
        factors = shares * part + (1 - shares) * ratio
        with np.errstate(divide="ignore"):
            logs.append(float(np.log(factors).sum()) + math.log(weight))
    return float(np.logaddexp.reduce(logs))


def bounds_share(shares: np.ndarray, rate: float, *, confidence: float, tolerant: bool = False) -> bool:
    """Tell whether the mean share is below `rate` with this confidence, at all looks of a run together."""
    return log_e_value(shares, rate, tolerant=tolerant) >= -math.log1p(-confidence)


def upper_share(shares: np.ndarray, *, confidence: float) -> float:
    """Return the smallest rate in [0, 1] that the mean share is bounded by; 1 without units."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS if len(shares) else 0):
        middle = (low + high) / 2
        if bounds_share(shares, middle, confidence=confidence, tolerant=True):
            high = middle
        else:
            low = middle
    return high


def units_until(settled: Callable[[int], bool], most: int) -> int | None:
    """Return the smallest number from 1 to `most` for which a growing condition holds; None: it never does."""
    found = bisect.bisect_left(range(1, most + 1), True, key=settled)
    return found + 1 if found < most else None


def bootstrap_by_audit(batches: list[np.ndarray], statistic: Statistic, confidence: float) -> tuple[float, float]:
    """Bootstrap a statistic by whole audits: images of one batch are not independent."""
    if len(batches) < 2:
        return 0.0, 1.0
    rng = np.random.default_rng(0)
    draws = rng.integers(len(batches), size=(BOOTSTRAP_DRAWS["mean"], len(batches)))
    if statistic == "mean":
        sums, counts = np.array([batch.sum() for batch in batches]), np.array([len(batch) for batch in batches])
        values = sums[draws].sum(1) / counts[draws].sum(1)
    else:
        values = np.array(
            [np.quantile(np.concatenate([batches[i] for i in draw]), 0.9) for draw in draws[: BOOTSTRAP_DRAWS["p90"]]]
        )
    return float(np.quantile(values, 1 - confidence)), float(np.quantile(values, confidence))
