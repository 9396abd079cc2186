"""Gradient inversion attacks by an honest-but-curious observer."""

from lightning_gradaudit.attacks.auto import Auto
from lightning_gradaudit.attacks.averaging import EpochAgreement, OrderFree
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.decoder import UntrainedDecoder
from lightning_gradaudit.attacks.gradient_matching import GradientMatching, Lookahead
from lightning_gradaudit.attacks.labels import LabelEstimate, recover_labels
from lightning_gradaudit.attacks.least_squares import LevenbergMarquardt
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
from lightning_gradaudit.attacks.peeling import LayerPeeling
from lightning_gradaudit.attacks.portfolio import Portfolio
from lightning_gradaudit.attacks.priors import FittedPrior, MaximumAPosteriori, PowerLawPrior, Whitened
from lightning_gradaudit.attacks.recipes import (
    DLG,
    TAG,
    ClientPrivacyLeakage,
    FedLeak,
    InvertingGradients,
    Modern,
    SeeThroughGradients,
    iDLG,
)
from lightning_gradaudit.attacks.regularizers import (
    BatchNormStatistics,
    GroupConsistency,
    HeadFeatures,
    KnownFeatures,
    LabelAgreement,
    Regularizer,
    SquaredNorm,
    TotalVariation,
)

__all__ = [
    "DLG",
    "LBFGS",
    "TAG",
    "Adam",
    "Attack",
    "Auto",
    "BatchNormStatistics",
    "ClientPrivacyLeakage",
    "CosineDecay",
    "CosineDistance",
    "EpochAgreement",
    "FedLeak",
    "FittedPrior",
    "GradientMatching",
    "GreyStart",
    "GroupConsistency",
    "HeadFeatures",
    "InvertingGradients",
    "KnownFeatures",
    "LabelAgreement",
    "LabelEstimate",
    "LayerPeeling",
    "LayerwiseError",
    "LevenbergMarquardt",
    "LinearLayerInversion",
    "Lookahead",
    "MaximumAPosteriori",
    "Modern",
    "MovedError",
    "NoiseStart",
    "Objective",
    "Optimizer",
    "OrderFree",
    "Parametrization",
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
