"""The verdict of a gate."""

from __future__ import annotations

import enum
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_gradaudit.risk.actions import for_unnamed
from lightning_gradaudit.utils.formatting import sentences


class Status(str, enum.Enum):
    """PASS, BLOCK or UNKNOWN."""

    PASS = "PASS"
    BLOCK = "BLOCK"
    UNKNOWN = "UNKNOWN"

    def __str__(self) -> str:
        return self.value

    @property
    def exit_code(self) -> int:
        """Exit status for release pipelines: 0 pass, 1 block, 2 unknown."""
        return {Status.PASS: 0, Status.BLOCK: 1, Status.UNKNOWN: 2}[self]

    @property
    def strictness(self) -> int:
        """Order in which one verdict outweighs another: 0 pass, 1 unknown, 2 block."""
        return {Status.PASS: 0, Status.UNKNOWN: 1, Status.BLOCK: 2}[self]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A decision and its evidence.

    Attributes:
        status: PASS, BLOCK or UNKNOWN.
        risk: max(exposure statistic, excess identification), in [0, 1]; NaN without evidence.
        low, high: 95% bounds of the risk, in [0, 1]. A worst case that was demonstrated is its own lower bound;
            `high` bounds the exposure of all but a tail of the images, and the excess identification.
        limit: What the risk was compared with.
        driver: "exposure" or "identification", whichever is larger.
        exposure: The exposure statistic.
        excess_identification: Identification rate beyond the measured chance; NaN when it was not measured.
        chance: Measured identification rate of mismatched reconstructions.
        images: Distinct images that count as evidence.
        audits: Audits that contributed at least one of them.
        newest_step: Step of the newest audit that counts; None without one.
        dropped_share: Share of the due samples that were dropped, in [0, 1].
        more_audits: How many more audits of new images without a finding would settle an UNKNOWN; None: more audits
            alone would not.
        reasons: Sentences, first what decided.
        action: What would settle an UNKNOWN soonest, as a phrase; empty for PASS and BLOCK. A gate that names none gets
            what follows from `more_audits`.
        basis: What a PASS or BLOCK stands on: "demonstrated" by attacks, "proven" by differential privacy, or "both";
            empty for UNKNOWN.
        proven_reconstruction: Largest probability that any attacker reconstructs an image beyond the limit; NaN where
            nothing is proven.
        proven_identification: Largest excess identification by any attacker; NaN where nothing is proven.
        epsilon: ε of the run; NaN where it is not accounted for.
    """

    status: Status
    risk: float
    low: float
    high: float
    limit: float
    driver: str
    exposure: float
    excess_identification: float
    chance: float
    images: int
    audits: int
    newest_step: int | None
    dropped_share: float = 0.0
    more_audits: int | None = None
    reasons: tuple[str, ...] = field(default=())
    action: str = ""
    basis: str = ""
    proven_reconstruction: float = math.nan
    proven_identification: float = math.nan
    epsilon: float = math.nan

    def __post_init__(self) -> None:
        if self.status is Status.UNKNOWN and not self.action:
            object.__setattr__(self, "action", for_unnamed(self.more_audits))

    @classmethod
    def unknown(cls, *reasons: str, limit: float, more_audits: int | None = None, action: str = "") -> Verdict:
        """Return the verdict where nothing can be judged."""
        nan = math.nan
        return cls(
            status=Status.UNKNOWN, risk=nan, low=0.0, high=1.0, limit=limit, driver="exposure", exposure=nan,
            excess_identification=nan, chance=nan, images=0, audits=0, newest_step=None, more_audits=more_audits,
            reasons=reasons, action=action,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON; NaN becomes None."""
        values = asdict(self) | {"status": str(self.status), "reasons": list(self.reasons)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        return sentences(self.to_dict())
