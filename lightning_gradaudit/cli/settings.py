"""Defaults that the help shows, apart from the code that needs torch."""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = ("mlp", "lenet", "convnet", "convnet_bn", "resnet", "vit")
"""Built-in networks of `gradaudit compare`."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How long the demo takes.

    Attributes:
        epochs: Of 100 steps each.
        audits: Audited steps of the defended run. The other has a third of them: a single exposed image blocks it.
        evaluations: Budget of an audit.
        seed: Of everything.
    """

    epochs: int = 10
    audits: int = 40
    evaluations: int = 300
    seed: int = 1
