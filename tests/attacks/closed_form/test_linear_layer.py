"""Exact inversion of a linear layer: against the true images, and against division done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_gradaudit import Budget, GaussianNoise, Outcome, Snapshot
from lightning_gradaudit.attacks import LinearLayerInversion
from lightning_gradaudit.attacks.closed_form.image_layer import image_layers

BUDGET = Budget(evaluations=50)
CROSS_ENTROPY = functional.cross_entropy


def mlp(*first, width=64, classes=2, pixels=625, bias=True, seed=0):
    """Layers in `first`, then flatten and a two-layer perceptron."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *first, nn.Flatten(), nn.Linear(pixels, width, bias=bias), nn.ReLU(), nn.Linear(width, classes)
        )


def invert(model, batch, *, loss=CROSS_ENTROPY, budget=BUDGET, **kwargs):
    snapshot = Snapshot.from_batch(model, batch, loss=loss, **kwargs)
    return LinearLayerInversion()(snapshot.observation, budget=budget, generator=torch.Generator().manual_seed(0))


def psnr(a, b):
    return float(-10 * torch.log10(((a - b) ** 2).mean().clamp_min(1e-20)))


def best_psnr(image, images):
    return max(psnr(image, other) for other in images)


def train(model, images, labels, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for part in torch.arange(len(images)).split(20):
            optimizer.zero_grad()
            CROSS_ENTROPY(model(images[part]), labels[part]).backward()
            optimizer.step()


@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_one_image_comes_back_exactly_at_every_stage_of_training(faces, epochs):
    images, labels = faces
    model = mlp()
    train(model, images, labels, epochs)
    for i in (0, 7, 120):
        result = invert(model, (images[i : i + 1], labels[i : i + 1]))
        assert psnr(result.inputs, images[i : i + 1]) > 100
        assert result.outcome is Outcome.EXACT
        assert result.certified.tolist() == [True]
        assert result.labels.tolist() == [int(labels[i])]
        assert result.matching_loss < 1e-6


def test_the_image_is_the_quotient_of_the_two_gradients(faces):
    images, labels = faces
    snapshot = Snapshot.from_batch(mlp(), (images[:1], labels[:1]), loss=CROSS_ENTROPY)
    weight, bias = (snapshot.observation.gradients[n] for n in ("1.weight", "1.bias"))
    row = int(bias.abs().argmax())
    by_hand = (weight[row] / bias[row]).reshape(1, 1, 25, 25)
    got = LinearLayerInversion()(snapshot.observation, budget=BUDGET, generator=torch.Generator()).inputs
    torch.testing.assert_close(got, by_hand.clamp(0, 1), rtol=0, atol=1e-5)


class Normalize(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


def batchnorm(channels):
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    return layer


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(lambda: Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.1]), id="normalisation"),
        pytest.param(lambda: batchnorm(3), id="BatchNorm in eval mode"),
        pytest.param(lambda: nn.Sequential(Normalize([0.1] * 3, [0.5] * 3), batchnorm(3)), id="both"),
        pytest.param(lambda: nn.Dropout(0.5), id="dropout in eval mode"),
        pytest.param(nn.Identity, id="nothing"),
    ],
)
@pytest.mark.parametrize("mean", [None, [0.3, 0.4, 0.5]], ids=["pixels", "normalised inputs"])
def test_an_elementwise_layer_before_the_linear_one_is_undone(first, mean):
    pixels = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    std = None if mean is None else [0.2, 0.25, 0.3]
    inputs = pixels if mean is None else (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    result = invert(mlp(first(), pixels=192), (inputs, torch.tensor([1])), mean=mean, std=std)
    assert result.outcome is Outcome.EXACT
    assert psnr(result.inputs, inputs) > 80


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1)) + self.layer(x.flatten(1) ** 2))


def frozen(model):
    model[1].requires_grad_(False)
    return model


@pytest.mark.parametrize("normalised", [False, True])
def test_without_a_bias_one_image_is_found_by_direction_and_scale(normalised):
    """dL/dW = δ xᵀ holds the image up to a factor: calling that safe would be false."""
    images = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    first = nn.BatchNorm2d(1).requires_grad_(False) if normalised else nn.Identity()
    if normalised:
        first.running_mean.fill_(0.4)
        first.running_var.fill_(0.05)
    model = nn.Sequential(first, *mlp(pixels=64, bias=False))
    result = invert(model, (images, torch.tensor([1])))
    assert result.outcome is Outcome.EXACT
    torch.testing.assert_close(result.inputs, images, atol=1e-3, rtol=0)  # 60 dB: a minimum is flat in fp32


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), id="conv"),
        pytest.param(lambda: mlp(nn.AvgPool2d(2), pixels=16), id="pooled"),
        pytest.param(lambda: mlp(nn.Sigmoid(), pixels=64), id="sigmoid first"),
        pytest.param(lambda: mlp(nn.Conv2d(1, 1, 3, padding=1), pixels=64), id="convolution of the image's shape"),
        pytest.param(lambda: frozen(mlp(pixels=64)), id="frozen"),
        pytest.param(Twice, id="a layer that runs twice"),
    ],
)
def test_other_networks_are_not_applicable_and_say_why(model):
    images = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    result = invert(model(), (images, torch.tensor([1])))
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "no linear layer that shares its gradient" in result.reason
    assert result.certified is None


def test_the_layer_that_sees_the_image_is_found_by_name(faces):
    images, labels = faces
    snapshot = Snapshot.from_batch(mlp(), (images[:2], labels[:2]), loss=CROSS_ENTROPY)
    (layer,) = image_layers(snapshot.observation, torch.Generator())
    assert (layer.weight, layer.bias) == ("1.weight", "1.bias")
    assert torch.allclose(layer.scale, torch.ones(625), atol=1e-4)
    assert torch.allclose(layer.shift, torch.zeros(625), atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("epochs", [0, 3])
def test_on_two_classes_no_mixture_of_images_is_certified(faces, seed, epochs):
    """All rows that the same set of images activates agree on their mixture: agreement alone proves nothing."""
    images, labels = faces
    model = mlp(seed=seed, width=128)
    train(model, images, labels, epochs)
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:4]
    result = invert(model, (images[chosen], labels[chosen]))
    if result.outcome is Outcome.NOT_APPLICABLE:
        assert result.certified is None
        return
    for image, label in zip(result.inputs[result.certified], result.labels[result.certified], strict=True):
        assert best_psnr(image, images[chosen]) > 40
        owner = max(range(4), key=lambda i: psnr(image, images[chosen][i]))
        assert int(label) == int(labels[chosen][owner])


@pytest.mark.parametrize("seed", range(4))
def test_images_that_activate_rows_alone_come_back_with_their_label(faces, seed):
    images = faces[0][torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:3]]
    labels = torch.tensor([7, 2, 7])
    result = invert(mlp(width=1024, classes=10, seed=seed), (images, labels))
    assert bool(result.certified.any())
    for image, label in zip(result.inputs[result.certified], result.labels[result.certified], strict=True):
        assert best_psnr(image, images) > 60
        owner = max(range(3), key=lambda i: psnr(image, images[i]))
        assert int(label) == int(labels[owner])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("defence", [GaussianNoise(relative=0.1), GaussianNoise(relative=10.0)], ids=repr)
def test_a_noisy_gradient_is_never_called_exact(faces, size, defence):
    images, labels = faces
    result = invert(mlp(width=512), (images[:size], labels[:size]), defences=(defence,))
    assert result.outcome is not Outcome.EXACT
    certified = torch.zeros(size, dtype=torch.bool) if result.certified is None else result.certified
    for image in result.inputs[certified]:
        assert best_psnr(image, images[:size]) > 30


def test_mild_noise_still_leaves_one_image_recognisable(faces):
    """The noise averages out over the rows: the least-squares quotient uses them all."""
    images, labels = faces
    result = invert(mlp(width=512), (images[:1], labels[:1]), defences=(GaussianNoise(relative=0.1),))
    assert psnr(result.inputs, images[:1]) > 20


def test_more_than_the_images_and_labels_in_the_batch_does_not_break_the_closed_form(faces):
    """Candidates are tried in other numbers than the batch has; what else the step reads has the batch's size."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(width=1024, classes=10)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            losses = functional.cross_entropy(self.net(batch["image"]), batch["label"], reduction="none")
            return (losses * (1 + batch["hardness"])).mean()

    batch = {"image": faces[0][:3], "label": torch.tensor([7, 2, 7]), "hardness": torch.zeros(3)}
    result = invert(Weighted(), batch, loss=None)
    assert bool(result.certified.any())
    for image in result.inputs[result.certified]:
        assert best_psnr(image, faces[0][:3]) > 60


def test_a_budget_too_small_to_verify_a_batch_is_said_and_kept(faces):
    images, labels = faces
    result = invert(mlp(), (images[98:102], labels[98:102]), budget=Budget(evaluations=1))
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "budget" in result.reason
    assert result.evaluations == 0
