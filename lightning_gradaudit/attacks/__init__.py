"""Gradient inversion attacks by an honest-but-curious observer."""

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.labels import LabelEstimate, recover_labels
from lightning_gradaudit.attacks.linear import LinearLayerInversion
from lightning_gradaudit.attacks.objectives import CosineDistance, Objective, SquaredError
from lightning_gradaudit.attacks.optimizers import LBFGS, Adam, Optimizer, StepDecay
from lightning_gradaudit.attacks.parametrizations import Pixels
from lightning_gradaudit.attacks.portfolio import Portfolio
from lightning_gradaudit.attacks.recipes import DLG, InvertingGradients, iDLG
from lightning_gradaudit.attacks.regularizers import Regularizer, TotalVariation

__all__ = [
    "DLG",
    "LBFGS",
    "Adam",
    "Attack",
    "CosineDistance",
    "GradientMatching",
    "InvertingGradients",
    "LabelEstimate",
    "LinearLayerInversion",
    "Objective",
    "Optimizer",
    "Pixels",
    "Portfolio",
    "Regularizer",
    "SquaredError",
    "StepDecay",
    "TotalVariation",
    "iDLG",
    "recover_labels",
]
