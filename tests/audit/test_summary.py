"""The table of measured values, against figures by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support import record

from lightning_gradaudit.audit.summary import MEASURES, measured, of_images

NAN = math.nan
TWO = {"ceiling": torch.tensor([0.4, 0.9]), "effort": torch.tensor([math.inf, 30.0])}


def test_images_are_averaged_and_the_worst_and_the_first_stand_out():
    found = measured(record(0, (0.1, 0.5), **TWO, seconds=3.0))
    expected = {"exposure": 0.3, "exposure_max": 0.5, "psnr": 10.0, "ceiling": 0.65, "effort": 30.0, "seconds": 3.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert list(found) == list(MEASURES)
    assert {name for name, value in found.items() if math.isnan(value)} == {"confirmed", "reach", "noise_to_hide"}


def test_what_was_not_measured_is_left_out_and_never_exposed_is_a_gap():
    part = record(0, (0.2, 0.4), identified=torch.tensor([NAN, 1.0]), effort=torch.tensor([math.inf, math.inf]))
    assert MEASURES["identified"].of(part) == 1.0
    assert math.isnan(MEASURES["effort"].of(part))
    nothing = record(0, (NAN, NAN), psnr=torch.tensor([NAN, NAN]))
    assert all(math.isnan(MEASURES[name].of(nothing)) for name in ("exposure", "exposure_max", "psnr"))


def test_several_records_count_by_their_images():
    several = [record(0, (0.1, 0.2, 0.3), ceiling=torch.tensor([0.1, 0.1, 0.1])), record(1, (0.6,))]
    assert measured(several, ("exposure", "exposure_max")) == pytest.approx({"exposure": 0.3, "exposure_max": 0.6})
    ceilings = of_images(several, "ceiling")
    torch.testing.assert_close(ceilings, torch.tensor([0.1, 0.1, 0.1, NAN]), equal_nan=True)
