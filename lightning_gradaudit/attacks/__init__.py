"""Gradient inversion attacks by an honest-but-curious observer."""

from lightning_gradaudit.attacks.auto import Auto
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.decoder import UntrainedDecoder
from lightning_gradaudit.attacks.gallery import GalleryIdentification
from lightning_gradaudit.attacks.gradient_matching import GradientMatching, Lookahead
from lightning_gradaudit.attacks.labels import LabelEstimate, recover_labels
from lightning_gradaudit.attacks.linear import LinearLayerInversion
from lightning_gradaudit.attacks.objectives import (
    CosineDistance,
    LayerwiseError,
    MovedError,
    Objective,
    SquaredError,
    WeightedError,
)
from lightning_gradaudit.attacks.optimizers import LBFGS, Adam, CosineDecay, Optimizer, StepDecay
from lightning_gradaudit.attacks.parametrizations import GreyStart, NoiseStart, Parametrization, Pixels, TiledStart
from lightning_gradaudit.attacks.patches import PatchEmbeddingInversion
from lightning_gradaudit.attacks.portfolio import Portfolio
from lightning_gradaudit.attacks.priors import FittedPrior, MaximumAPosteriori, PowerLawPrior, Whitened
from lightning_gradaudit.attacks.recipes import DLG, InvertingGradients, SeeThroughGradients, iDLG
from lightning_gradaudit.attacks.regularizers import (
    BatchNormStatistics,
    GroupConsistency,
    HeadFeatures,
    Regularizer,
    SquaredNorm,
    TotalVariation,
)

__all__ = [
    "DLG",
    "LBFGS",
    "Adam",
    "Attack",
    "Auto",
    "BatchNormStatistics",
    "CosineDecay",
    "CosineDistance",
    "FittedPrior",
    "GalleryIdentification",
    "GradientMatching",
    "GreyStart",
    "GroupConsistency",
    "HeadFeatures",
    "InvertingGradients",
    "LabelEstimate",
    "LayerwiseError",
    "LinearLayerInversion",
    "Lookahead",
    "MaximumAPosteriori",
    "MovedError",
    "NoiseStart",
    "Objective",
    "Optimizer",
    "Parametrization",
    "PatchEmbeddingInversion",
    "Pixels",
    "Portfolio",
    "PowerLawPrior",
    "Regularizer",
    "SeeThroughGradients",
    "SquaredError",
    "SquaredNorm",
    "StepDecay",
    "TiledStart",
    "TotalVariation",
    "UntrainedDecoder",
    "WeightedError",
    "Whitened",
    "iDLG",
    "recover_labels",
]
