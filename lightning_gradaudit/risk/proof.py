"""The second leg of a verdict: what differential privacy proves, as far as the theorem describes the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.errors import GradAuditError
from lightning_gradaudit.risk import checks
from lightning_gradaudit.risk.intervals import upper_share
from lightning_gradaudit.risk.privacy_bounds import CANDIDATES, Looks, canary_epsilon, epsilon, one_look, whole_run
from lightning_gradaudit.risk.privacy_ledger import PrivacyLedger
from lightning_gradaudit.risk.statistics import Chance
from lightning_gradaudit.risk.verdict import Status, Verdict

if TYPE_CHECKING:
    from lightning_gradaudit.risk.gate import RiskGate

LEAST_SHARE_OF_NOISE = 0.9
"""Of the declared noise that every audit must measure; an estimate from p weights is off by 1/√(2p)."""
NOT_THIS_RUN = "The proof does not describe this run"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What holds for every attacker and every image, with probability over the run's randomness.

    Attributes:
        reconstruction: Largest probability that an image is reconstructed beyond the limit; NaN: nothing is proven.
        identification: Largest excess identification among `CANDIDATES` images.
        epsilon: ε at the ledger's δ.
        prior: Upper bound of the share of images that guesses without the gradient bring beyond the limit.
        noise_share: Least share of the declared noise that an audit measured, at most 1; the bounds take it off.
        noise_audits: Audits that measured it.
        refusals: Why the theorem does not describe the run; nothing is proven then.
        contradiction: What was demonstrated beyond what the theorem allows, or nothing.
    """

    reconstruction: float = math.nan
    identification: float = math.nan
    epsilon: float = math.nan
    prior: float = math.nan
    noise_share: float = math.nan
    noise_audits: int = 0
    refusals: tuple[str, ...] = ()
    contradiction: str = ""


def join_proof(
    demonstrated: Verdict,
    records: Sequence[AuditRecord],
    ledger: PrivacyLedger,
    gate: RiskGate,
    *,
    step: int | None,
    doubts: Sequence[str] = (),
) -> Verdict:
    """Return a verdict with its second leg.

    What was demonstrated blocks whatever the proof says, and a bound above the limit blocks nothing. Where an attack or
    a canary demonstrates more than the theorem allows, the run is not the one that the theorem is about: UNKNOWN.

    Args:
        demonstrated: What the audits show by themselves.
        records: The run's audits.
        ledger: Its private steps.
        gate: Limit, tail and confidence.
        step: Where training stands; None: unknown, which proves nothing.
        doubts: What speaks against the evidence as a whole.
    """
    try:
        proof = prove(records, ledger, gate, step=step, doubts=doubts)
    except GradAuditError as error:  # also where dp-accounting is missing
        proof = Proof(refusals=(str(error),))
    bounds: dict[str, Any] = {
        "proven_reconstruction": proof.reconstruction,
        "proven_identification": proof.identification,
        "epsilon": proof.epsilon,
    }
    said = describe(proof, ledger, gate)
    joined = replace(demonstrated, **bounds, reasons=(*demonstrated.reasons, said))
    if demonstrated.status is Status.BLOCK:
        return joined
    if proof.contradiction:
        said = f"{NOT_THIS_RUN}: {proof.contradiction}"
        action = "find out where the run leaves its declared mechanism: noise, clipping, sampling, what is shared"
        return replace(
            joined, status=Status.UNKNOWN, basis="", more_audits=None, reasons=(said, *joined.reasons), action=action
        )
    if not holds(proof, gate):
        return joined
    if demonstrated.status is Status.PASS:
        return replace(joined, basis="both")
    kept = (said, "By demonstration alone it would be UNKNOWN:", *demonstrated.reasons)
    return replace(
        joined, status=Status.PASS, basis="proven", reasons=kept, action="", more_audits=None,
        high=min(demonstrated.high, gate.max_risk),
    )  # fmt: skip


def holds(proof: Proof, gate: RiskGate) -> bool:
    """Whether a proof gives what a PASS says: at most a tail of the images exposed, and names not beyond the limit.

    NaN, where nothing is proven, is below no limit.
    """
    return proof.reconstruction <= min(gate.tail, gate.max_risk) and proof.identification <= gate.max_risk


def prove(
    records: Sequence[AuditRecord],
    ledger: PrivacyLedger,
    gate: RiskGate,
    *,
    step: int | None,
    doubts: Sequence[str] = (),
) -> Proof:
    """Return what is proven of a run; see `join_proof` for the arguments.

    Raises:
        UnsupportedError: When `dp_accounting` is not installed.
    """
    kept, broken = checks.sound(records)
    measured = [record for record in kept if record.valid and math.isfinite(record.declared_noise)]
    refusals = [*ledger.faults, *doubts, *map(str, broken), *_wiring(kept, measured, ledger, step, gate)]
    if refusals:
        return Proof(refusals=tuple(dict.fromkeys(refusals)))
    share = min(1.0, *(record.noise / record.declared_noise for record in measured))
    looks = [Looks(share * noise, rate, steps) for noise, rate, steps in ledger.looks]
    prior = null_share(measured, gate)
    run = whole_run(looks)
    total = epsilon(looks, ledger.delta)
    return Proof(
        reconstruction=run.success(prior),
        identification=run.excess(CANDIDATES),
        epsilon=total,
        prior=prior,
        noise_share=share,
        noise_audits=len(measured),
        contradiction=_contradiction(measured, ledger, gate, looks, prior, total),
    )


def _wiring(
    records: Sequence[AuditRecord],
    measured: Sequence[AuditRecord],
    ledger: PrivacyLedger,
    step: int | None,
    gate: RiskGate,
) -> list[str]:
    """Return why the records do not show the mechanism that the ledger tells of."""
    if not ledger.looks or any(noise <= 0 or rate <= 0 for noise, rate, _ in ledger.looks):
        return ["No private step is on record, or one without noise."]
    said = []
    if step is None or ledger.steps not in (step, step + 1):  # the logger's step lags by one inside of a batch
        said.append(f"{ledger.steps} private steps are accounted for, and training stands at step {step}.")
    views = {str(record.threat_model.get("view")) for record in records} - {"update"}
    if views:
        said.append(
            f"Audits were made of view {', '.join(sorted(views))}: a gradient that is shared before the mechanism is "
            "not protected by it."
        )
    if len(measured) < len(records):
        said.append(f"{len(records) - len(measured)} of {len(records)} audits are invalid or measured no noise.")
    if not measured:
        return [*said, "No audit has measured the noise."]
    declared = {noise for noise, _, _ in ledger.looks}
    if any(not any(math.isclose(record.declared_noise, each) for each in declared) for record in measured):
        said.append("The audits tell of another noise multiplier than the accounted steps.")
    least = min(record.noise / record.declared_noise for record in measured)
    if not least >= LEAST_SHARE_OF_NOISE:
        said.append(f"An audit measured {least:.2f} of the declared noise.")
    limit = checks.usual_age(measured) if gate.max_age is None else gate.max_age
    said += map(str, checks.age(max(record.step for record in measured), step, limit))
    return said + list(map(str, checks.ceiling(measured, gate.max_ceiling)))


def null_share(records: Sequence[AuditRecord], gate: RiskGate) -> float:
    """Return the upper bound of the share of images that some guess without the gradient brings beyond the limit.

    Under Poisson sampling the images are independent draws; each counts once, and the bound holds at all looks.
    """
    reached: dict[tuple[str, str], float] = {}
    for record in records:
        names = record.ids or record.digests
        if record.null_exposure is None or not names:
            continue
        session = "" if record.ids else record.session
        for name, value in zip(names, record.null_exposure.tolist(), strict=True):
            if math.isfinite(value):
                reached[session, name] = max(value, reached.get((session, name), 0.0))
    beyond = np.array([value > gate.max_risk for value in reached.values()], dtype=float)
    return upper_share(beyond, confidence=gate.confidence)


def _contradiction(
    records: Sequence[AuditRecord],
    ledger: PrivacyLedger,
    gate: RiskGate,
    looks: Sequence[Looks],
    prior: float,
    total: float,
) -> str:
    """Say what was demonstrated beyond the theorem: of one gradient by attacks, of the run by canaries."""
    for correct, guesses, canaries in ledger.canaries:
        least = canary_epsilon(correct, guesses, canaries, delta=ledger.delta, confidence=gate.confidence)
        if least > total:
            return f"canaries demonstrate an ε of at least {least:.2f}, the theorem allows {total:.2f}."
    look = one_look(min(noise for noise, _, _ in looks))
    chance = Chance.of(records, gate.confidence).high
    attacked = [record for record in records if record.attacked]
    for what, shares, allowed in (
        ("reconstruct", [_mean(record.exposure > gate.max_risk) for record in attacked], look.success(prior)),
        ("name", [_mean(record.identified == 1) for record in attacked], look.success(chance)),
    ):
        least = 1 - upper_share(1 - np.array(shares), confidence=gate.confidence)
        if least > allowed:
            return f"attacks {what} at least {least:.0%} of the images, the theorem allows {allowed:.0%}."
    return ""


def _mean(values: object) -> float:
    return float(np.asarray(values, dtype=float).mean())


def describe(proof: Proof, ledger: PrivacyLedger, gate: RiskGate) -> str:
    """Return what is proven, with what it assumes, as one text."""
    if proof.refusals:
        return f"Nothing is proven: {' '.join(proof.refusals)}"
    rates = ", ".join(f"{rate:.3g}" for rate in sorted({rate for _, rate, _ in ledger.looks}))
    return (
        f"{'Proven' if holds(proof, gate) else 'Proven, but not enough'}: over {ledger.steps} steps any attacker "
        f"reconstructs a given image beyond {gate.max_risk:g} with probability {proof.reconstruction:.3f} at most "
        f"(limit {min(gate.tail, gate.max_risk):g}; guesses alone: {proof.prior:.3f} at most, with "
        f"{gate.confidence:.0%} confidence), and names it among {CANDIDATES} with an excess of "
        f"{proof.identification:.3f} at most (limit {gate.max_risk:g}); ε = {proof.epsilon:.2f} at δ = "
        f"{ledger.delta:g}. It assumes: one image is added or removed, and not all images of a person; the adversary "
        f"sees every update and nothing before it; Poisson sampling at {rates}; noise as {proof.noise_audits} audits "
        f"measured it (at least {proof.noise_share:.2f} of what is declared); initial weights that owe nothing to "
        "these images."
    )
