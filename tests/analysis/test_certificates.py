"""The structural certificate, against per-sample gradients computed one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_gradaudit import GaussianNoise, Snapshot
from lightning_gradaudit.analysis import exact_leaks

CROSS_ENTROPY = functional.cross_entropy


def mlp(width=64, seed=0, classes=2):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(625, width), nn.ReLU(), nn.Linear(width, classes))


def leaks(model, batch, **kwargs):
    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, **kwargs)
    return exact_leaks(snapshot, generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("width", [8, 32])
def test_an_image_leaks_exactly_when_it_activates_a_row_alone(faces, size, width):
    images, labels = faces
    model = mlp(width=width, seed=size)
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(width))[:size]
    active = []
    for i in chosen:  # one backward pass per image: which rows of the first layer does it reach?
        model.zero_grad()
        CROSS_ENTROPY(model(images[i : i + 1]), labels[i : i + 1]).backward()
        active.append(model[1].bias.grad.abs() > 1e-8)
    active = torch.stack(active)
    alone = (active & (active.sum(0) == 1)).any(1)
    assert leaks(model, (images[chosen], labels[chosen])) == alone.tolist()


def test_one_image_leaks_at_every_stage_of_training(faces):
    images, labels = faces
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(15):
        assert leaks(model, (images[:1], labels[:1])) == [True]
        optimizer.zero_grad()
        CROSS_ENTROPY(model(images), labels).backward()
        optimizer.step()


def frozen(model):
    model[1].requires_grad_(False)
    return model


def frozen_bias(model):
    model[1].bias.requires_grad_(False)
    return model


def test_a_bias_that_is_not_shared_hides_only_the_scale(faces):
    images, labels = faces
    assert leaks(frozen_bias(mlp()), (images[:1], labels[:1])) == [True]


@pytest.mark.parametrize(
    ("model", "defences"),
    [
        pytest.param(mlp, (GaussianNoise(relative=10.0),), id="strong noise"),
        pytest.param(lambda: frozen(mlp()), (), id="frozen first layer"),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(1, 4, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(484, 2)),
            (),
            id="conv",
        ),
    ],
)
def test_where_algebra_does_not_give_the_image_back_nothing_is_certified(faces, model, defences):
    images, labels = faces
    assert leaks(model(), (images[:1], labels[:1]), defences=defences) == [False]


def test_noise_too_weak_to_hide_the_image_does_not_hide_the_leak(faces):
    images, labels = faces
    assert leaks(mlp(), (images[:1], labels[:1]), defences=(GaussianNoise(relative=1e-3),)) == [True]


def test_a_wide_layer_gives_away_single_images_of_a_batch_but_not_all_of_a_large_one(faces):
    images, labels = faces
    few = leaks(mlp(width=1024), (images[:2], labels[:2]))
    many = leaks(mlp(width=16), (images[:64], labels[:64]))
    assert few == [True, True]
    assert many.count(True) < 16


class ChannelsLast(nn.Module):
    """Flattens height, width, channel: the linear layer sees every pixel, in another order."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(192, 64)
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        return self.head(torch.relu(self.first(x.permute(0, 2, 3, 1).flatten(1))))


def test_a_layer_that_sees_the_pixels_in_another_order_is_certified_too():
    """The quotient of its gradients is the image, reordered: a missed certificate would let a failed attack pass."""
    images = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    model = ChannelsLast()
    snapshot = Snapshot.from_batch(model, (images, torch.tensor([1])), loss=CROSS_ENTROPY)
    weight, bias = (snapshot.observation.gradients[f"first.{n}"] for n in ("weight", "bias"))
    row = int(bias.abs().argmax())
    by_hand = (weight[row] / bias[row]).reshape(1, 8, 8, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(by_hand, images, rtol=0, atol=1e-4)
    assert exact_leaks(snapshot, generator=torch.Generator().manual_seed(0)).tolist() == [True]
