"""What a gradient gives away whatever the attacker does."""

from lightning_gradaudit.analysis.ceiling import Analysis, Leakage, analyse
from lightning_gradaudit.analysis.layers import exact_leaks
from lightning_gradaudit.analysis.priors import NaturalImages, WhitePixels

__all__ = ["Analysis", "Leakage", "NaturalImages", "WhitePixels", "analyse", "exact_leaks"]
