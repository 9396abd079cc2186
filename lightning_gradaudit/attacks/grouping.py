"""Vectors that agree with each other, such as rows of a gradient that hold the same image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def agreeing_groups(agree: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Divide vectors into groups, the largest first; a vector that agrees with no other is in none.

    Args:
        agree: (N, N) whether two vectors agree.

    Yields:
        The vector that all others of a group agree with, and the group's members, (N,) bool.
    """
    left = torch.ones(len(agree), dtype=torch.bool, device=agree.device)
    while len(agree):
        sizes = (agree & left).sum(1) * left
        leader = int(sizes.argmax())
        if int(sizes[leader]) < 2:
            return
        members = agree[leader] & left
        yield leader, members
        left &= ~members
