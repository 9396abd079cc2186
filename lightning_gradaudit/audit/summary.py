"""The measured values of an audit, each with how it is read from a record.

Curves, reports and comparisons read this table: a new value is a field of `AuditRecord` and a line here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradaudit.audit.record import AuditRecord


def mean(values: Tensor) -> Tensor:
    """Return the mean of the values that were measured; NaN without one."""
    return values[~values.isnan()].mean()


def largest(values: Tensor) -> Tensor:
    """Return the largest value that was measured; NaN without one."""
    return torch.where(values.isnan().all(), torch.nan, values.nan_to_num(-math.inf, posinf=math.inf).max())


def earliest(values: Tensor) -> Tensor:
    """Return the smallest finite value; NaN without one."""
    return torch.where(values.isfinite().any(), values.nan_to_num(math.inf, posinf=math.inf).min(), torch.nan)


class Measure(NamedTuple):
    """A measured value.

    Attributes:
        title: Of a column.
        values: (B,) values of the images, or one of the audit; None where it was not measured.
        reduce: One figure from the images' values.
        digits: Behind the decimal point, in tables.
    """

    title: str
    values: Callable[[AuditRecord], Tensor | float | None]
    reduce: Callable[[Tensor], Tensor] = mean
    digits: int = 2

    def of(self, *records: AuditRecord) -> float:
        """Return the figure over all images of one or several records; NaN where nothing was measured."""
        found = [_vector(value) for each in records if (value := self.values(each)) is not None]
        return float(self.reduce(torch.cat(found))) if found else math.nan


def _vector(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor([value], dtype=torch.float64)


def _analysed(name: str) -> Callable[[AuditRecord], Tensor | None]:
    return lambda record: None if record.leakage is None else getattr(record.leakage, name)


MEASURES: dict[str, Measure] = {
    "exposure": Measure("exposure", attrgetter("exposure")),
    "exposure_max": Measure("worst", attrgetter("exposure"), largest),
    "psnr": Measure("PSNR dB", attrgetter("psnr"), digits=1),
    "ssim": Measure("SSIM", attrgetter("ssim")),
    "mse": Measure("MSE", attrgetter("mse"), digits=4),
    "null": Measure("null", attrgetter("null")),
    "identified": Measure("identified", attrgetter("identified")),
    "confirmed": Measure("confirmed", attrgetter("confirmed")),
    "label_accuracy": Measure("labels", attrgetter("label_accuracy")),
    "matching_loss": Measure("matching loss", attrgetter("matching_loss")),
    "gradient_similarity": Measure("gradient cosine", attrgetter("gradient_similarity")),
    "ceiling": Measure("ceiling", attrgetter("ceiling")),
    "reach": Measure("reach", _analysed("reach"), Tensor.mean),
    "noise_to_hide": Measure("noise to hide", _analysed("noise_to_hide"), largest),
    "effort": Measure("effort", attrgetter("effort"), earliest, digits=0),
    "self_test": Measure("self-test error", attrgetter("self_test"), digits=6),
    "defence_gap": Measure("defence gap", attrgetter("defence_gap")),
    "evaluations": Measure("evaluations", attrgetter("evaluations"), digits=0),
    "seconds": Measure("seconds", attrgetter("seconds"), digits=1),
}
"""By the name of its curve. `ceiling` and `reach` are means over the batch; `noise_to_hide` would hide its most exposed
image; `effort` is that of the image that was exposed first, NaN where none was."""


def measured(records: AuditRecord | Sequence[AuditRecord], names: Iterable[str] = MEASURES) -> dict[str, float]:
    """Return the named figures of a record, or over all images of several."""
    several = (records,) if isinstance(records, AuditRecord) else records
    return {name: MEASURES[name].of(*several) for name in names}


def of_images(records: Sequence[AuditRecord], name: str) -> Tensor:
    """Return a value of all images of the records, (N,); NaN where it was not measured."""
    found = [(MEASURES[name].values(record), record.exposure) for record in records]
    return torch.cat([torch.full_like(like, math.nan) if v is None else _vector(v) for v, like in found])
