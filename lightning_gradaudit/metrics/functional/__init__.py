"""Functional forms of the leakage metrics."""

from lightning_gradaudit.metrics.functional.effort import effort_more_than, effort_quantile
from lightning_gradaudit.metrics.functional.exposure import exposure
from lightning_gradaudit.metrics.functional.gradients import gradient_similarity, label_multiset_accuracy
from lightning_gradaudit.metrics.functional.identification import excess_over_chance, identification
from lightning_gradaudit.metrics.functional.similarity import assign, pairwise_similarity, psnr
from lightning_gradaudit.metrics.functional.summary import summary

__all__ = [
    "assign",
    "effort_more_than",
    "effort_quantile",
    "excess_over_chance",
    "exposure",
    "gradient_similarity",
    "identification",
    "label_multiset_accuracy",
    "pairwise_similarity",
    "psnr",
    "summary",
]
