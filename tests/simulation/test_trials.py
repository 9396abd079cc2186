"""What a step does with integer images, and in which units images are attacked."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Snapshot
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.normalization import Normalization

LABELS = torch.tensor([0, 1])


class Converts(nn.Module):
    """A net that converts its images by a function first."""

    def __init__(self, convert):
        super().__init__()
        torch.manual_seed(0)
        self.convert = convert
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))

    def forward(self, images):
        return self.net(self.convert(images))


def pixels(dtype=torch.uint8):
    high = min(torch.iinfo(dtype).max, 255)
    return torch.randint(0, high + 1, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize(
    ("convert", "divisor"),
    [
        (lambda x: x.float() / 255, 1),
        (lambda x: x / 255 if x.dtype == torch.uint8 else x, 255),
        (lambda x: x.float(), 1),
    ],
)
def test_the_replay_feeds_floats_on_which_the_step_computes_what_it_does_on_bytes(convert, divisor, zero_head):
    module, batch = Converts(convert), (pixels(), LABELS)
    if zero_head:  # no loss depends on the images
        nn.init.zeros_(module.net[1].weight)
        nn.init.zeros_(module.net[1].bias)
    F.cross_entropy(module(batch[0]), LABELS).backward()
    state = torch.get_rng_state()
    snapshot = Snapshot.from_batch(module, batch, loss=F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot.observation.client.layout.images[0].divisor == divisor
    for name, p in module.named_parameters():
        torch.testing.assert_close(snapshot.observation.gradients[name], p.grad)
    assert torch.allclose(snapshot.truth_pixels, batch[0] / 255)
    assert snapshot.truth.inputs.max() <= 1  # attacked in units that attacks are made for
    assert snapshot.self_test().error < 1e-6


@pytest.mark.parametrize("convert", [lambda x: (x >> 2).float(), lambda x: (x if x.dtype == torch.uint8 else -x) / 255])
def test_bytes_that_no_floats_replace_are_refused_with_the_way_round(convert):
    with pytest.raises(InvalidInputError, match=r"torch.uint8 in 0, .* Convert them to floats in the data set or in"):
        Snapshot.from_batch(Converts(convert), (pixels(), LABELS), loss=F.cross_entropy)


@pytest.mark.parametrize(("std", "unit"), [(1.0, 1), (0.2, 1), (1 / 255, 256), (1 / 65535, 65536), (100.0, 1 / 128)])
def test_units_are_powers_of_two_that_change_no_digit(std, unit):
    normalization = Normalization.of(0.0, std)
    assert normalization.unit == unit
    images = torch.rand(2, 1, 4, 4) / std
    assert torch.equal(images / unit * unit, images)
    assert torch.allclose(normalization.in_units(unit).to_pixels(images / unit), normalization.to_pixels(images))


def test_images_in_0_to_255_are_attacked_as_those_in_0_to_1():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for factor in (1.0, 256.0):  # a power of two, so that both are the same to the last digit
        module = Converts(lambda x, factor=factor: x / factor)
        snapshot = Snapshot.from_batch(module, (images * factor, LABELS), loss=F.cross_entropy, std=1 / factor)
        found.append(snapshot.observation)
    assert torch.equal(found[0].box[1], found[1].box[1])
    for name, g in found[0].gradients.items():
        assert torch.equal(found[1].gradients[name], g)
    one, other = (each.simulate(images.flip(0), LABELS) for each in found)
    assert all(torch.equal(one[name], other[name]) for name in one)
