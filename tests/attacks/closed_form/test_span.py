"""Whole batches from the spans of linear layers: against the true images, at every stage of training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional

from lightning_gradaudit import Budget, GaussianNoise, Outcome, Snapshot
from lightning_gradaudit.attacks import LinearLayerInversion, SpanInversion
from lightning_gradaudit.attacks.closed_form.consecutive_layers import Chain, ChainedSearch
from lightning_gradaudit.attacks.closed_form.row_space import (
    are_unmixed,
    compare_zeros,
    inputs_from_columns,
    row_space,
    sparse_columns,
)
from lightning_gradaudit.errors import InvalidInputError

BUDGET = Budget(evaluations=100)
CROSS_ENTROPY = functional.cross_entropy
CLASSES = 10


def deep(*, activation=nn.ReLU, width=256, pixels=625, bias=True, first=(), seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = [nn.Linear(pixels, width, bias=bias), activation(), nn.Linear(width, width), activation()]
        return nn.Sequential(*first, nn.Flatten(), *hidden, nn.Linear(width, CLASSES))


def shallow(*, width=512, classes=CLASSES, after=nn.ReLU, seed=0):
    """One hidden layer: the span of the head's gradient has at most classes - 1 dimensions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(625, width), after(), nn.Linear(width, classes))


def draw(faces, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return faces[0][torch.randperm(200, generator=generator)[:size]], torch.randint(
        CLASSES, (size,), generator=generator
    )


def attack(snapshot, *, budget=BUDGET, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return SpanInversion(**settings)(snapshot.observation, budget=budget, generator=generator)


def invert(model, batch, **kwargs):
    return attack(Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, **kwargs))


def matched(result, images):
    """PSNR of each reconstruction against the true image it is matched with, and which one that is."""
    error = ((result.inputs[:, None] - images[None]) ** 2).flatten(2).mean(2)
    rows, order = linear_sum_assignment(error.numpy())
    return -10 * error[rows, order].clamp_min(1e-20).log10(), torch.as_tensor(order)


def assert_exact(result, images, labels, *, psnr=60):
    quality, order = matched(result, images)
    assert result.outcome is Outcome.EXACT, result.reason
    assert float(quality.min()) > psnr
    assert bool(result.certified.all())
    assert result.labels.tolist() == labels[order].tolist()
    assert result.matching_loss < 1e-6


def train(model, images, epochs):
    labels = torch.randint(CLASSES, (len(images),), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for part in torch.arange(len(images)).split(20):
            optimizer.zero_grad()
            CROSS_ENTROPY(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("epochs", [0, 1, 20])
@pytest.mark.parametrize("size", [2, 5, 12])
def test_every_image_and_label_of_a_batch_comes_back_at_every_stage_of_training(faces, size, epochs):
    images, labels = draw(faces, size, seed=size)
    result = invert(train(deep(), faces[0], epochs), (images, labels))
    assert_exact(result, images, labels)
    assert result.evaluations <= CLASSES + 2  # the search simulates nothing


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Tanh, nn.GELU, nn.LeakyReLU])
def test_other_activations_between_the_layers_serve_as_well(faces, activation):
    images, labels = draw(faces, 4)
    assert_exact(invert(deep(activation=activation), (images, labels)), images, labels)


def test_an_activation_called_as_a_function_is_found(faces):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([m for m in deep() if isinstance(m, nn.Linear)])

        def forward(self, x):
            x = x.flatten(1)
            for layer in self.layers[:-1]:
                x = functional.relu(layer(x))
            return self.layers[-1](x)

    images, labels = draw(faces, 4)
    assert_exact(invert(Functional(), (images, labels)), images, labels)


def test_a_first_layer_without_a_bias_has_its_scale_from_the_second(faces):
    images, labels = draw(faces, 4)
    assert_exact(invert(deep(bias=False), (images, labels)), images, labels)


def test_a_normalisation_before_the_layer_is_undone():
    images = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 1, 3, 8])
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    assert_exact(invert(deep(pixels=192, first=(norm,)), (images, labels)), images, labels)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zeros_alone_are_enough_where_no_second_layer_helps(faces, size):
    """Behind one hidden layer a frozen head shares nothing: only the zeros of D tell the images apart."""
    model = shallow()
    model[3].weight.requires_grad_(False)
    images, labels = draw(faces, size, seed=1)
    assert_exact(invert(model, (images, labels)), images, labels)


@pytest.mark.parametrize("seed", range(4))
def test_zeros_that_dropout_adds_help_too(faces, seed):
    """Whatever the mask, and in whatever order the images are found: each stands at its place under its own mask."""
    model = shallow(after=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.3)))
    images, labels = draw(faces, 3, seed=1)
    result = invert(model, (images, labels), mode="train", seed=seed)
    quality, _ = matched(result, images)
    assert float(quality.min()) > 60


def test_soft_labels_that_are_known_are_given_to_their_images(faces):
    images, _ = draw(faces, 4)
    soft = torch.rand((4, CLASSES), generator=torch.Generator().manual_seed(2)).softmax(1)
    result = invert(deep(width=256), (images, soft))
    quality, order = matched(result, images)
    assert result.outcome is Outcome.EXACT
    assert float(quality.min()) > 60
    assert bool(result.certified.all())
    assert torch.equal(result.labels, soft[order])
    assert result.matching_loss < 1e-6


def test_a_loss_that_hides_the_labels_does_not_hide_the_images(faces):
    def squared(logits, labels):
        return ((logits - functional.one_hot(labels, CLASSES)) ** 2).mean()

    images, labels = draw(faces, 4)
    result = attack(Snapshot.from_batch(deep(), (images, labels), loss=squared))
    quality, _ = matched(result, images)
    assert result.outcome is Outcome.EXACT
    assert float(quality.min()) > 60
    assert bool(result.certified.all())
    assert result.labels is None


# What must not be certified


def assert_nothing_false(result, images, *, psnr=60):
    if result.certified is not None:
        quality, _ = matched(result, images)
        assert bool((quality[result.certified] > psnr).all())


@pytest.mark.parametrize("defence", [GaussianNoise(relative=1e-3), GaussianNoise(relative=1.0)], ids=repr)
def test_a_noisy_gradient_does_not_apply(faces, defence):
    result = invert(deep(), draw(faces, 4), defences=(defence,))
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "noise" in result.reason


def with_gradients(snapshot, gradients):
    return replace(snapshot, observation=replace(snapshot.observation, gradients=gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_in_reduced_precision_does_not_apply(faces, dtype):
    snapshot = Snapshot.from_batch(deep(), draw(faces, 4), loss=CROSS_ENTROPY)
    rounded = {name: g.to(dtype).float() for name, g in snapshot.observation.gradients.items()}
    result = attack(with_gradients(snapshot, rounded))
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert result.certified is None


def test_a_batch_larger_than_assumed_does_not_apply(faces):
    images, labels = draw(faces, 6)
    large = Snapshot.from_batch(deep(), (images, labels), loss=CROSS_ENTROPY)
    small = Snapshot.from_batch(deep(), (images[:5], labels[:5]), loss=CROSS_ENTROPY)
    result = attack(with_gradients(small, large.observation.gradients))
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "larger batch" in result.reason


def test_a_batch_smaller_than_assumed_is_not_called_exact(faces):
    images, labels = draw(faces, 4)
    small = Snapshot.from_batch(deep(), (images, labels), loss=CROSS_ENTROPY)
    large = Snapshot.from_batch(deep(), draw(faces, 5), loss=CROSS_ENTROPY)
    result = attack(with_gradients(large, small.observation.gradients))
    assert result.outcome is not Outcome.EXACT
    assert "4 different images of 5" in result.reason
    assert int(result.certified.sum()) <= 4
    for image in result.inputs[result.certified]:
        assert float(((image - images) ** 2).flatten(1).mean(1).min()) < 1e-6


def test_an_image_that_is_there_twice_is_found_once_and_said(faces):
    images, labels = draw(faces, 4)
    images[3] = images[2]
    labels[3] = labels[2]
    result = invert(deep(), (images, labels))
    assert result.outcome is not Outcome.EXACT
    assert int(result.certified.sum()) == 3
    assert "3 different images of 4" in result.reason
    assert_nothing_false(result, images)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", [2, 4])
def test_behind_a_small_head_differences_of_columns_are_sparse_too_and_are_not_certified(faces, classes, seed):
    """With two classes d_i / a_i - d_j / a_j vanishes wherever two images switch the same units, on or off."""
    images, labels = draw(faces, 5, seed=seed)
    model = shallow(width=128, classes=classes, seed=seed)
    result = attack(Snapshot.from_batch(model, (images, labels % classes), loss=CROSS_ENTROPY), rounds=4)
    assert_nothing_false(result, images)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("epochs", [1, 20])
def test_images_that_switch_the_same_units_are_not_certified_as_their_mixtures(faces, epochs, seed):
    """In a narrow trained network the features of such mixtures lie in the second span too."""
    images, labels = draw(faces, 5, seed=5 + seed)
    snapshot = Snapshot.from_batch(train(deep(width=96), faces[0], epochs), (images, labels), loss=CROSS_ENTROPY)
    result = attack(snapshot, rounds=4)
    assert_nothing_false(result, images)


def test_zeros_do_not_tell_inputs_apart_whose_columns_share_them():
    """With D = d1 x1 + d2 x2 the inputs x1 and x2 + x1 go with the columns d1 - d2 and d2, as sparse as d1 and d2."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(200)[:, None]
    support = (rows >= torch.tensor([0, 0, 80])) & (rows < torch.tensor([120, 120, 200]))
    d = torch.randn((200, 3), generator=generator, dtype=torch.float64) * support
    mixed = torch.stack([d[:, 0] - d[:, 1], d[:, 1], d[:, 2]], dim=1)
    noise = torch.zeros(3, dtype=torch.float64)
    for columns in (mixed, d):
        assert compare_zeros(columns, noise, d)[0].all()
        assert are_unmixed(columns, noise).tolist() == [False, False, True]
    d[:20, 0] = d[100:120, 1] = 0.0
    assert are_unmixed(d, noise).all()
    mixed[:, 0] = d[:, 0] - d[:, 1]
    mixed[:, 1] = d[:, 1]
    # The second column's own part is in the first, so the second input is x2 + x1; the first input is x1 alone.
    assert are_unmixed(mixed, noise).tolist() == [True, False, True]


def test_features_of_a_mixture_lie_outside_the_second_span(faces):
    images, labels = draw(faces, 4)
    model = deep()
    gradients = Snapshot.from_batch(model, (images, labels), loss=CROSS_ENTROPY).observation.gradients
    generator = torch.Generator().manual_seed(0)
    first, second = (
        row_space(gradients[f"{i}.weight"], gradients[f"{i}.bias"], size=4, generator=generator) for i in (1, 3)
    )
    search = ChainedSearch(Chain(model[1].weight.detach(), model[1].bias.detach(), torch.relu, first, second))
    flat = torch.cat([images.flatten(1), torch.ones(4, 1)], dim=1).double()
    assert float((flat - flat @ first.whole.T @ first.whole).norm() / flat.norm()) < 1e-6
    true = (flat @ first.whole.T - search.origin) @ search.directions.T
    assert float(search.misfit(true).max()) < 10
    assert float(search.error(true).max()) < 1e-3
    for share in (1e-2, 0.3):
        assert float(search.misfit((1 - share) * true[:1] + share * true[1:2])) > 100


def test_sparse_columns_are_those_of_the_gradient_by_hand():
    generator = torch.Generator().manual_seed(0)
    d = torch.randn((200, 5), generator=generator) * (torch.rand((200, 5), generator=generator) < 0.5)
    x = torch.rand((5, 40), generator=generator)
    space = row_space(d @ x, d.sum(1), size=5, generator=generator)
    assert space.rank == 5
    for _, columns in zip(range(10), sparse_columns(space, 128, generator), strict=False):
        if len(columns) == 5:
            break
    found = inputs_from_columns(space, columns) @ space.v
    assert float(torch.cdist(x.double(), found).min(1).values.max()) < 1e-4


# Where it does not apply, and its limits


@pytest.mark.parametrize(
    ("model", "size", "says"),
    [
        (deep, 1, "batches of 2"),
        (lambda: nn.Sequential(nn.AvgPool2d(5), nn.Flatten(), nn.Linear(25, 10)), 4, "no linear layer"),
        (lambda: shallow(after=nn.Sigmoid, classes=2), 4, "could be told from mixtures"),
    ],
)
def test_where_it_does_not_apply_it_says_why(faces, model, size, says):
    images, labels = draw(faces, size)
    result = invert(model(), (images, labels % 2))
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert says in result.reason


def test_the_search_ends_when_its_time_is_over(faces, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr("lightning_gradaudit.attacks.closed_form.span.time.monotonic", lambda: float(next(ticks)))
    images, labels = draw(faces, 4, seed=3)
    snapshot = Snapshot.from_batch(shallow(after=nn.Sigmoid, classes=2), (images, labels % 2), loss=CROSS_ENTROPY)
    attack(snapshot, rounds=10**6, seconds=5.0)
    assert next(ticks) < 20


def test_a_budget_too_small_to_prove_anything_is_kept(faces):
    snapshot = Snapshot.from_batch(deep(), draw(faces, 4), loss=CROSS_ENTROPY)
    result = attack(snapshot, budget=Budget(evaluations=1))
    assert (result.outcome, result.evaluations) == (Outcome.NOT_APPLICABLE, 0)


@pytest.mark.parametrize("name", ["starts", "rounds", "seconds", "max_batch"])
def test_settings_out_of_range_are_refused_by_name(name):
    with pytest.raises(InvalidInputError, match=name):
        SpanInversion(**{name: 0})


def test_it_succeeds_where_rows_of_single_images_do_not(faces):
    images, labels = draw(faces, 8)
    snapshot = Snapshot.from_batch(deep(), (images, labels), loss=CROSS_ENTROPY)
    simple = LinearLayerInversion()(snapshot.observation, budget=BUDGET, generator=torch.Generator().manual_seed(0))
    assert simple.outcome is not Outcome.EXACT
    assert_exact(attack(snapshot), images, labels)
