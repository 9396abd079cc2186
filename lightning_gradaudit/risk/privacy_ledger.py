"""What a run under DP-SGD really did, step by step: the facts that a proof rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.privacy_bounds import Looks

DEFAULT_DELTA = 1e-5


@dataclass
class PrivacyLedger:
    """The private steps of a run, and what was found wrong with its wiring; never an image.

    Attributes:
        delta: δ at which ε is told.
        looks: The steps, alike ones together, in their order.
        faults: Sentences: why the theorem does not describe this run; each once.
        canaries: (correct, guesses, canaries) of one-run audits (see `privacy_bounds.canary_epsilon`).
    """

    delta: float = DEFAULT_DELTA
    looks: list[Looks] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    canaries: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Private steps so far."""
        return sum(look.steps for look in self.looks)

    def add_step(self, noise_multiplier: float, sample_rate: float) -> None:
        """Count a step."""
        if self.looks and self.looks[-1][:2] == (noise_multiplier, sample_rate):
            self.looks[-1] = Looks(noise_multiplier, sample_rate, self.looks[-1].steps + 1)
        else:
            self.looks.append(Looks(noise_multiplier, sample_rate, 1))

    def add_fault(self, sentence: str) -> bool:
        """Note why nothing is proven; return whether it is new."""
        if sentence in self.faults:
            return False
        self.faults.append(sentence)
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "delta": self.delta,
            "looks": [list(look) for look in self.looks],
            "faults": list(self.faults),
            "canaries": [list(each) for each in self.canaries],
        }

    @classmethod
    def from_dict(cls, values: Any) -> PrivacyLedger:
        """Read what `to_dict` wrote.

        Raises:
            InvalidInputError: When a part is missing, or not of its type or range.
        """
        keys = {"delta", "looks", "faults", "canaries"}
        if not isinstance(values, dict) or set(values) != keys:
            raise InvalidInputError(f"privacy: expected {sorted(keys)}, got {str(values)[:80]!r}.")
        delta, looks, faults, canaries = (values[key] for key in ("delta", "looks", "faults", "canaries"))
        texts = isinstance(faults, list) and all(isinstance(each, str) and each for each in faults)
        if not _is_number(delta) or not 0 < delta < 1 or not texts:
            raise InvalidInputError(f"privacy: expected delta in (0, 1) and faults as texts, got {str(values)[:80]!r}.")
        if not _triples(looks) or not all(_is_look(*each) for each in looks):
            raise InvalidInputError(f"privacy: expected noise, sample rate and steps, got {str(looks)[:80]!r}.")
        if not _triples(canaries) or not all(_are_guesses(*each) for each in canaries):
            raise InvalidInputError(f"privacy: expected correct <= guesses <= canaries, got {str(canaries)[:80]!r}.")
        return cls(
            delta=float(delta),
            looks=[Looks(float(noise), float(rate), steps) for noise, rate, steps in looks],
            faults=list(faults),
            canaries=[(correct, guesses, total) for correct, guesses, total in canaries],
        )


def _triples(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, (list, tuple)) and len(each) == 3 for each in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_look(noise: Any, rate: Any, steps: Any) -> bool:
    numbers = _is_number(noise) and _is_number(rate) and type(steps) is int
    return numbers and noise >= 0 and 0 <= rate <= 1 and 1 <= steps <= MOST_STEPS


def _are_guesses(correct: Any, guesses: Any, total: Any) -> bool:
    return (
        all(type(each) is int for each in (correct, guesses, total)) and 0 <= correct <= guesses <= total <= MOST_STEPS
    )


MOST_STEPS = 10**9
"""Most steps, or canaries, that are believed."""
