"""Several attacks as one, the cheapest first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True, kw_only=True)
class Portfolio(Attack):
    """Run attacks in order until a solution is exact; otherwise keep the lowest matching loss.

    Closed forms come first: they cost milliseconds and solve the easy cases. Images that one of them certified
    replace the nearest images of the best result.

    Args:
        attacks: At least one, cheapest first; each gets what is left of the budget.
    """

    attacks: tuple[Attack, ...]

    def __post_init__(self) -> None:
        if not self.attacks:
            raise InvalidInputError("attacks: expected at least one attack, got none.")

    @property
    def name(self) -> str:
        return " > ".join(attack.name for attack in self.attacks)

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        results: list[Reconstruction] = []
        meter = Meter(budget)
        for attack in self.attacks:
            if results and meter.exhausted:
                break
            results.append(attack(observation, budget=meter.left, generator=generator))
            meter.spend(results[-1].evaluations)
            if results[-1].outcome is Outcome.EXACT:
                break
        # Attacks that do not apply rank last: a solution that could not be verified is still better than grey.
        winner = min(reversed(results), key=lambda r: (r.outcome is Outcome.NOT_APPLICABLE, r.matching_loss))
        deciding = winner
        for result in results:
            if result is not winner and result.certified is not None and bool(result.certified.any()):
                winner = _with_certified(winner, result)
        return replace(
            winner,
            evaluations=meter.evaluations,
            reason=f"{deciding.attack}: {deciding.reason or deciding.outcome}",
            details="; ".join(f"{r.attack}: {r.reason or r.outcome}" for r in results if r is not deciding),
        )


def _with_certified(winner: Reconstruction, exact: Reconstruction) -> Reconstruction:
    """Replace the winner's nearest images by those known to be exact."""
    assert exact.certified is not None
    known = exact.inputs[exact.certified].to(winner.inputs)
    cost = torch.cdist(known.flatten(1), winner.inputs.flatten(1))
    _, slots = linear_sum_assignment(cost.cpu().numpy())
    inputs, certified = winner.inputs.clone(), torch.zeros(len(winner.inputs), dtype=torch.bool)
    inputs[slots], certified[slots] = known, True
    return replace(winner, inputs=inputs, certified=certified)
