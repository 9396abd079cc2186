"""Functional forms of the leakage metrics."""

from lightning_gradaudit.metrics.functional.bracket import bracket_gap, ceiling, noise_to_hide
from lightning_gradaudit.metrics.functional.correlation import gradient_data_correlation
from lightning_gradaudit.metrics.functional.effort import effort_more_than, effort_quantile
from lightning_gradaudit.metrics.functional.exposure import exposure
from lightning_gradaudit.metrics.functional.gradients import gradient_similarity, label_multiset_accuracy
from lightning_gradaudit.metrics.functional.identification import excess_over_chance, identification
from lightning_gradaudit.metrics.functional.similarity import assign, pairwise_similarity, psnr
from lightning_gradaudit.metrics.functional.summary import summary

__all__ = [
    "assign",
    "bracket_gap",
    "ceiling",
    "effort_more_than",
    "effort_quantile",
    "excess_over_chance",
    "exposure",
    "gradient_data_correlation",
    "gradient_similarity",
    "identification",
    "label_multiset_accuracy",
    "noise_to_hide",
    "pairwise_similarity",
    "psnr",
    "summary",
]
