"""What a gradient gives away whatever the attacker does, and what attackers of a given capacity make of it."""

from lightning_gradaudit.analysis.basin import Basin, WayBack, basin, way_back
from lightning_gradaudit.analysis.ceiling import Analysis, Leakage, analyse
from lightning_gradaudit.analysis.certificates import exact_leaks
from lightning_gradaudit.analysis.effort import EffortCurve, Rung, effort_curve, knowledge_levels, ladder
from lightning_gradaudit.analysis.gradient_similarity import Association, Measured, Relation, relate
from lightning_gradaudit.analysis.image_covariance import NaturalImages, WhitePixels

__all__ = [
    "Analysis",
    "Association",
    "Basin",
    "EffortCurve",
    "Leakage",
    "Measured",
    "NaturalImages",
    "Relation",
    "Rung",
    "WayBack",
    "WhitePixels",
    "analyse",
    "basin",
    "effort_curve",
    "exact_leaks",
    "knowledge_levels",
    "ladder",
    "relate",
    "way_back",
]
