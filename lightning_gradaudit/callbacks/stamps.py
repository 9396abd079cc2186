"""Stamps: verdict and evidence inside a checkpoint, bound to its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_gradaudit.risk.history import STAMP
from lightning_gradaudit.risk.verdict import Status
from lightning_gradaudit.utils.digests import weights_digest


def bound_weights(checkpoint: Mapping[str, Any], stamp: Mapping[str, Any] | None) -> str | None:
    """Return the digest of a checkpoint's weights; taken from a stamp of the same save where there is one."""
    if stamp and stamp.get("weights"):
        return str(stamp["weights"])
    state = checkpoint.get("state_dict")
    return weights_digest(state) if state else None


def put_stamp(checkpoint: dict[str, Any], make: Callable[[str | None], dict[str, Any]]) -> None:
    """Put a stamp into a checkpoint that is being saved, unless another audit has put a stricter one.

    Args:
        checkpoint: The checkpoint.
        make: Makes the stamp, given the digest of the weights.
    """
    other = checkpoint.get(STAMP)
    checkpoint[STAMP] = {}  # if this fails, the other audit's stamp must not count for both
    stamp = make(bound_weights(checkpoint, other))
    stricter = other and _strictness(other) > _strictness(stamp)
    checkpoint[STAMP] = other if stricter else stamp


def _strictness(stamp: Mapping[str, Any]) -> int:
    return Status(stamp["verdict"]["status"]).strictness


def has_other_weights(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds other weights than those that its stamp was made for."""
    stamp = checkpoint.get(STAMP) or {}
    return bool(stamp.get("weights") != bound_weights(checkpoint, None))
