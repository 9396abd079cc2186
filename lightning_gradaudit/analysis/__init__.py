"""What a gradient gives away whatever the attack, and what attacks of a given capacity recover from it."""

from lightning_gradaudit.analysis.basin import Basin, DescentAlignment, basin, descent_alignment
from lightning_gradaudit.analysis.ceiling import Analysis, Leakage, analyse
from lightning_gradaudit.analysis.certificates import exact_leaks
from lightning_gradaudit.analysis.effort import (
    EffortCurve,
    KnowledgeLevel,
    effort_curve,
    knowledge_levels,
    knowledge_sweep,
)
from lightning_gradaudit.analysis.gradient_similarity import (
    Association,
    Measured,
    SimilarityRelation,
    similarity_relation,
)
from lightning_gradaudit.analysis.image_covariance import NaturalImages, WhitePixels
from lightning_gradaudit.analysis.round_statistics import RoundStatistics
from lightning_gradaudit.analysis.server_check import Finding, ServerReport, check_server, judge_round

__all__ = [
    "Analysis",
    "Association",
    "Basin",
    "DescentAlignment",
    "EffortCurve",
    "Finding",
    "KnowledgeLevel",
    "Leakage",
    "Measured",
    "NaturalImages",
    "RoundStatistics",
    "ServerReport",
    "SimilarityRelation",
    "WhitePixels",
    "analyse",
    "basin",
    "check_server",
    "descent_alignment",
    "effort_curve",
    "exact_leaks",
    "judge_round",
    "knowledge_levels",
    "knowledge_sweep",
    "similarity_relation",
]
