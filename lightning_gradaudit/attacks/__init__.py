"""Gradient inversion attacks by an honest-but-curious observer."""

from lightning_gradaudit.attacks.auto import Auto
from lightning_gradaudit.attacks.averaging import EpochAgreement, OrderFree
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.compilation import Compilation, compiled_evaluation
from lightning_gradaudit.attacks.decoder import UntrainedDecoder
from lightning_gradaudit.attacks.features import feature_exposure, recover_features
from lightning_gradaudit.attacks.gallery import GalleryIdentification
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
from lightning_gradaudit.attacks.patches import PatchEmbeddingInversion
from lightning_gradaudit.attacks.peeling import LayerPeeling
from lightning_gradaudit.attacks.portfolio import Portfolio
from lightning_gradaudit.attacks.posterior import MaximumAPosteriori
from lightning_gradaudit.attacks.priors import FittedPrior, PowerLawPrior, Whitened
from lightning_gradaudit.attacks.recipes import (
    DLG,
    TAG,
    ClientPrivacyLeakage,
    FedLeak,
    InvertingGradients,
    Modern,
    NetworkPrior,
    SeeThroughGradients,
    WhitenedMatching,
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
from lightning_gradaudit.attacks.relay import Relay
from lightning_gradaudit.attacks.span import SpanInversion
from lightning_gradaudit.attacks.span_matching import SpanMatching

__all__ = [
    "DLG",
    "LBFGS",
    "TAG",
    "Adam",
    "Attack",
    "Auto",
    "BatchNormStatistics",
    "ClientPrivacyLeakage",
    "Compilation",
    "CosineDecay",
    "CosineDistance",
    "EpochAgreement",
    "FedLeak",
    "FittedPrior",
    "GalleryIdentification",
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
    "NetworkPrior",
    "NoiseStart",
    "Objective",
    "Optimizer",
    "OrderFree",
    "Parametrization",
    "PatchEmbeddingInversion",
    "Pixels",
    "Portfolio",
    "PowerLawPrior",
    "Regularizer",
    "Relay",
    "SeeThroughGradients",
    "SpanInversion",
    "SpanMatching",
    "SquaredError",
    "SquaredNorm",
    "StepDecay",
    "TiledStart",
    "TotalVariation",
    "UntrainedDecoder",
    "WeightedError",
    "Whitened",
    "WhitenedMatching",
    "compiled_evaluation",
    "feature_exposure",
    "iDLG",
    "recover_features",
    "recover_labels",
]
