"""Published attacks as settings of the one loop (`GradientMatching`).

They are functions and not subclasses: what an attack does is all in the repr of what they return.
"""

from __future__ import annotations

from lightning_gradaudit.attacks.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.objectives import CosineDistance, SquaredError
from lightning_gradaudit.attacks.optimizers import LBFGS, Adam, CosineDecay
from lightning_gradaudit.attacks.parametrizations import Pixels
from lightning_gradaudit.attacks.regularizers import BatchNormStatistics, GroupConsistency, SquaredNorm, TotalVariation


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
        line_search: Strong Wolfe line search: not in the paper, and it saves starts that plain L-BFGS loses.
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
    """DLG with the label read off the head's gradient, one image (Zhao et al., arXiv:2001.02610); see `DLG`."""
    return GradientMatching(
        objective=SquaredError(),
        optimizer=LBFGS(lr=lr, line_search="strong_wolfe" if line_search else None),
        parametrization=Pixels(box=False),
        restarts=restarts,
        label="iDLG",
        max_batch=1,
    )


def SeeThroughGradients(*, restarts: int = 4) -> GradientMatching:  # noqa: N802
    """Squared error with image, BatchNorm and group penalties: GradInversion (Yin et al., arXiv:2104.07586).

    Published weights; the 20 000 steps are scaled to the budget, the images are not registered before they are
    averaged, and there is no Langevin noise.

    Args:
        restarts: Starts that run side by side and are drawn to their mean; 1 leaves the group penalty out.
    """
    return GradientMatching(
        objective=SquaredError(scale=0.5e-4),
        regularizers=(TotalVariation(weight=1e-4), SquaredNorm(weight=1e-6), BatchNormStatistics()),
        optimizer=Adam(lr=0.1, schedule=CosineDecay(warmup=50 / 20_000)),
        consensus=GroupConsistency() if restarts > 1 else None,
        restarts=restarts,
        label="SeeThroughGradients",
    )
