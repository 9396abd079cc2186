"""The attack that an audit runs: the closed forms first, then the attack given or `Auto`."""

from __future__ import annotations

from lightning_gradaudit.attacks.auto import Auto
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.closed_form.linear_layer import LinearLayerInversion
from lightning_gradaudit.attacks.closed_form.patch_embedding import PatchEmbeddingInversion
from lightning_gradaudit.attacks.closed_form.span import SpanInversion
from lightning_gradaudit.attacks.portfolio import Portfolio
from lightning_gradaudit.errors import InvalidInputError


def default_attack() -> Attack:
    """Return the matching attack used when none is given."""
    return Auto()


def full_attack(attack: Attack | None, *, closed_forms: bool) -> Attack:
    """Return a portfolio of the closed forms and then the attack: they are cheap, and exact where they apply."""
    attack = default_attack() if attack is None else attack
    if not isinstance(attack, Attack):
        raise InvalidInputError(
            f"attack: expected an Attack such as InvertingGradients(), got {attack!r}. "
            "Pass an instance, not a class or a name."
        )
    if not closed_forms:
        return attack
    return Portfolio(attacks=(LinearLayerInversion(), SpanInversion(), PatchEmbeddingInversion(), attack))
