"""What a gradient gives away whatever the attacker does."""

from lightning_gradaudit.analysis.bounds import (
    Estimate,
    InPixels,
    Resolved,
    dfil,
    effective_rank,
    fil,
    i2f,
    i2f_bound,
    lavp,
    leakage_bits,
    resolved,
    tensor_energies,
)
from lightning_gradaudit.analysis.ceiling import Analysis, Leakage, analyse
from lightning_gradaudit.analysis.effort import (
    Effort,
    basin,
    effort_curve,
    effort_of,
    effort_to_reach,
    knowledge_ladder,
    pull,
)
from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.analysis.layers import exact_leaks
from lightning_gradaudit.analysis.priors import NaturalImages, Prior, WhitePixels
from lightning_gradaudit.analysis.similarity import along_attack, along_rays, over_pairs, relation
from lightning_gradaudit.analysis.structure import d_snr, numerical_ranks, sole_activation_shares, transmit_snr

__all__ = [
    "Analysis",
    "Effort",
    "Estimate",
    "InPixels",
    "Jacobian",
    "Leakage",
    "NaturalImages",
    "Prior",
    "Resolved",
    "WhitePixels",
    "along_attack",
    "along_rays",
    "analyse",
    "basin",
    "d_snr",
    "dfil",
    "effective_rank",
    "effort_curve",
    "effort_of",
    "effort_to_reach",
    "exact_leaks",
    "fil",
    "i2f",
    "i2f_bound",
    "knowledge_ladder",
    "lavp",
    "leakage_bits",
    "numerical_ranks",
    "over_pairs",
    "pull",
    "relation",
    "resolved",
    "sole_activation_shares",
    "tensor_energies",
    "transmit_snr",
]
