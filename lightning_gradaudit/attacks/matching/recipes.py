"""Published attacks as settings of the one loop (`GradientMatching`).

They are functions and not subclasses: the repr of what they return shows everything that the attack does.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.objectives import (
    CosineDistance,
    SensitivityWeightedError,
    SquaredError,
)
from lightning_gradaudit.attacks.matching.optimizers import LBFGS, Adam, CosineDecay
from lightning_gradaudit.attacks.matching.parametrizations import Pixels, TiledStart
from lightning_gradaudit.attacks.matching.priors import Whitened
from lightning_gradaudit.attacks.matching.regularizers import (
    BatchNormStatistics,
    GroupConsistency,
    HeadFeatures,
    LabelAgreement,
    SquaredNorm,
    TotalVariation,
)


def InvertingGradients(  # noqa: N802 - named as the paper and the public interface name it
    *, lr: float = 0.1, total_variation: float = 1e-2, restarts: int = 1
) -> GradientMatching:
    """Cosine distance, Adam on the gradient's sign, total variation, box (Geiping et al., arXiv:2003.14053).

    Args:
        lr: Learning rate in normalised input units; decays by 0.1 at 3/8, 5/8 and 7/8 of the budget.
        total_variation: Weight of the total variation (published: 1e-6 to 1e-1).
        restarts: Independent starts that share the budget.
    """
    return GradientMatching(
        objective=CosineDistance(),
        regularizers=(TotalVariation(weight=total_variation),) if total_variation else (),
        optimizer=Adam(lr=lr, signed=True),
        restarts=restarts,
        label="InvertingGradients",
    )


def DLG(*, lr: float = 1.0, restarts: int = 1, line_search: bool = False) -> GradientMatching:  # noqa: N802
    """Squared error, joint soft labels, L-BFGS, no box: deep leakage from gradients (Zhu et al., arXiv:1906.08935).

    Args:
        lr: Step of L-BFGS; 1 as published.
        restarts: Independent starts that share the budget.
        line_search: Strong Wolfe line search: not in the paper; fewer starts diverge with it.
    """
    return GradientMatching(
        objective=SquaredError(),
        optimizer=LBFGS(lr=lr, line_search="strong_wolfe" if line_search else None),
        labels="joint",
        parametrization=Pixels(box=False),
        restarts=restarts,
        label="DLG",
    )


def iDLG(*, lr: float = 1.0, restarts: int = 1, line_search: bool = False) -> GradientMatching:  # noqa: N802
    """DLG with the label recovered from the head's gradient, one image (Zhao et al., arXiv:2001.02610); see `DLG`."""
    dlg = DLG(lr=lr, restarts=restarts, line_search=line_search)
    return replace(dlg, labels="recovered", label="iDLG", max_batch=1)


def SeeThroughGradients(*, restarts: int = 4) -> GradientMatching:  # noqa: N802
    """Squared error with image, BatchNorm and group penalties: GradInversion (Yin et al., arXiv:2104.07586).

    Published weights. What differs: the 20 000 steps are scaled to the budget, images are registered by whole pixels
    and not by keypoints before they are averaged, labels are counted (`recover_labels`) instead of taken from the
    smallest entries, which finds each class at most once, and there is no Langevin noise.

    Args:
        restarts: Starts that take turns and are pulled towards their mean; 1: no group penalty.
    """
    return GradientMatching(
        objective=SquaredError(scale=0.5e-4),
        regularizers=(TotalVariation(weight=1e-4), SquaredNorm(weight=1e-6), BatchNormStatistics()),
        optimizer=Adam(lr=0.1, schedule=CosineDecay(warmup=50 / 20_000)),
        consensus=GroupConsistency() if restarts > 1 else None,
        restarts=restarts,
        label="SeeThroughGradients",
    )


def Modern(*, total_variation: float = 0.1, features: float = 0.1, restarts: int = 1) -> GradientMatching:  # noqa: N802
    """Inverting Gradients with additions of later work: soft signs, warm-up, tiles, colours, head features.

    Published for 5 000 steps of which 50 warm up; both are scaled to the budget. What differs: the total variation is
    the anisotropic one.

    Args:
        total_variation: Weight of the total variation of the images and of the differences of their channels.
        features: Weight of the distance to the head's features that the gradient reveals; 0: none.
        restarts: Independent starts that share the budget.
    """
    tie = (HeadFeatures(weight=features),) if features else ()
    return GradientMatching(
        objective=CosineDistance(),
        regularizers=(TotalVariation(weight=total_variation, colours=True), *tie),
        optimizer=Adam(lr=0.1, signed="soft", schedule=CosineDecay(warmup=50 / 5_000)),
        parametrization=Pixels(initial=TiledStart(side=4)),
        restarts=restarts,
        label="Modern",
    )


def ClientPrivacyLeakage(*, side: int = 4, agreement: float = 1e-4, restarts: int = 1) -> GradientMatching:  # noqa: N802
    """Half the squared error, a label term, L-BFGS from tiles, box: CPL (Wei et al., arXiv:2004.10397).

    Published for 300 iterations. The weight of the label term is ours: so small that it only decides between
    candidates of equal error.

    Args:
        side: Side of the random patch that the first candidate repeats.
        agreement: Weight of `LabelAgreement`; 0: none.
        restarts: Independent starts that share the budget.
    """
    return GradientMatching(
        objective=SquaredError(scale=0.5),
        regularizers=(LabelAgreement(weight=agreement),) if agreement else (),
        optimizer=LBFGS(),
        parametrization=Pixels(initial=TiledStart(side=side)),
        restarts=restarts,
        label="ClientPrivacyLeakage",
    )


def WhitenedMatching(*, lr: float = 0.1, weight: float = 1e-5, restarts: int = 1) -> GradientMatching:  # noqa: N802
    """Match in the whitened coordinates of natural images, tensors weighted by how much they depend on the images.

    Steps of equal length are equally plausible there in every direction, so coarse structure converges first. The
    weights (`SensitivityWeightedError`) are small for large tensors that depend on the label alone. This is our own
    combination, not a published attack.

    Args:
        lr: Learning rate of Adam in whitened coordinates; falls along half a cosine.
        weight: Of the prior; noise images cost about 1 by the objective.
        restarts: Independent starts that share the budget.
    """
    return GradientMatching(
        objective=SensitivityWeightedError(),
        parametrization=Whitened(weight=weight),
        optimizer=Adam(lr=lr, schedule=CosineDecay()),
        restarts=restarts,
        label="WhitenedMatching",
    )
