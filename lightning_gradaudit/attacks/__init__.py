"""Gradient inversion attacks by an honest-but-curious observer, and the manipulations of a dishonest server."""

from lightning_gradaudit.attacks.active.manipulations import (
    CuriousAbandonHonesty,
    DuplicatedHead,
    Fishing,
    IdentityLayers,
    RobbingTheFed,
    ScaledHead,
    SuppressedGradients,
)
from lightning_gradaudit.attacks.adaptive import AdaptiveMatching
from lightning_gradaudit.attacks.auto import Auto
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.closed_form.features import feature_exposure, recover_features
from lightning_gradaudit.attacks.closed_form.imprint import ImprintInversion
from lightning_gradaudit.attacks.closed_form.linear_layer import LinearLayerInversion
from lightning_gradaudit.attacks.closed_form.patch_embedding import PatchEmbeddingInversion
from lightning_gradaudit.attacks.closed_form.span import SpanInversion
from lightning_gradaudit.attacks.compilation.evaluation_graph import Compilation, compiled_evaluation
from lightning_gradaudit.attacks.federated_averaging import EpochConsistency, FedAvgMatching
from lightning_gradaudit.attacks.gallery_identification import GalleryIdentification
from lightning_gradaudit.attacks.labels.recovery import LabelEstimate, recover_labels
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.levenberg_marquardt import LevenbergMarquardt
from lightning_gradaudit.attacks.matching.objectives import (
    CosineDistance,
    Objective,
    SensitivityWeightedError,
    SquaredError,
)
from lightning_gradaudit.attacks.matching.optimizers import LBFGS, Adam, CosineDecay, Optimizer, StepDecay
from lightning_gradaudit.attacks.matching.parametrizations import (
    GreyStart,
    NoiseStart,
    Parametrization,
    Pixels,
    TiledStart,
)
from lightning_gradaudit.attacks.matching.priors import FittedPrior, PowerLawPrior, Whitened
from lightning_gradaudit.attacks.matching.recipes import (
    DLG,
    ClientPrivacyLeakage,
    InvertingGradients,
    Modern,
    SeeThroughGradients,
    WhitenedMatching,
    iDLG,
)
from lightning_gradaudit.attacks.matching.regularizers import (
    BatchNormStatistics,
    GroupConsistency,
    HeadFeatures,
    KnownFeatures,
    LabelAgreement,
    Regularizer,
    SquaredNorm,
    TotalVariation,
)
from lightning_gradaudit.attacks.matching.shared_statistics import SharedStatistics
from lightning_gradaudit.attacks.maximum_a_posteriori import MaximumAPosteriori
from lightning_gradaudit.attacks.portfolio import Portfolio
from lightning_gradaudit.attacks.recursive.recursive_inversion import RecursiveInversion
from lightning_gradaudit.attacks.sequence import SequentialAttack
from lightning_gradaudit.attacks.span_matching import SpanMatching

__all__ = [
    "DLG",
    "LBFGS",
    "Adam",
    "AdaptiveMatching",
    "Attack",
    "Auto",
    "BatchNormStatistics",
    "ClientPrivacyLeakage",
    "Compilation",
    "CosineDecay",
    "CosineDistance",
    "CuriousAbandonHonesty",
    "DuplicatedHead",
    "EpochConsistency",
    "FedAvgMatching",
    "Fishing",
    "FittedPrior",
    "GalleryIdentification",
    "GradientMatching",
    "GreyStart",
    "GroupConsistency",
    "HeadFeatures",
    "IdentityLayers",
    "ImprintInversion",
    "InvertingGradients",
    "KnownFeatures",
    "LabelAgreement",
    "LabelEstimate",
    "LevenbergMarquardt",
    "LinearLayerInversion",
    "MaximumAPosteriori",
    "Modern",
    "NoiseStart",
    "Objective",
    "Optimizer",
    "Parametrization",
    "PatchEmbeddingInversion",
    "Pixels",
    "Portfolio",
    "PowerLawPrior",
    "RecursiveInversion",
    "Regularizer",
    "RobbingTheFed",
    "ScaledHead",
    "SeeThroughGradients",
    "SensitivityWeightedError",
    "SequentialAttack",
    "SharedStatistics",
    "SpanInversion",
    "SpanMatching",
    "SquaredError",
    "SquaredNorm",
    "StepDecay",
    "SuppressedGradients",
    "TiledStart",
    "TotalVariation",
    "Whitened",
    "WhitenedMatching",
    "compiled_evaluation",
    "feature_exposure",
    "iDLG",
    "recover_features",
    "recover_labels",
]
