"""Label recovery: rounding against brute force, recovery against the true labels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_gradaudit import ClipNorm, GaussianNoise, GradAudit, Snapshot, ThreatModel
from lightning_gradaudit.attacks import recover_labels
from lightning_gradaudit.attacks.labels.head_statistics import HeadOutputs, QuadraticCounts
from lightning_gradaudit.attacks.labels.recovery import count_samples_in_columns, largest_remainder, probe_images
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.local_optimizer import LocalOptimizer
from lightning_gradaudit.simulation.sharing import PrivateSum

CLASSES = 10


def network(*, head_bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(12, 24, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * 49, CLASSES, bias=head_bias),
        )


def draw(faces, size, seed, classes=CLASSES):
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(200, generator=random)[:size]
    return faces[0][chosen], torch.randint(classes, (size,), generator=random)


def recovered(model, batch, *, loss=functional.cross_entropy, seed=0, **kwargs):
    observation = Snapshot.from_batch(model, batch, loss=loss, **kwargs).observation
    return recover_labels(observation, generator=torch.Generator().manual_seed(seed))


def multiset_accuracy(a, b):
    return sum((np.bincount(a, minlength=CLASSES) - np.bincount(b, minlength=CLASSES)).clip(max=0)) / len(b) + 1


# Rounding


def by_hand(expected, total):
    """Hamilton's method: round down, then one more for the largest remainders."""
    counts = np.floor(expected).astype(int)
    for index in np.argsort(-(expected - counts), kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    return counts.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_rounding_equals_hamiltons_method_where_that_is_defined(seed):
    random = np.random.default_rng(seed)
    total = int(random.integers(1, 40))
    expected = random.dirichlet(np.full(CLASSES, 0.5)) * total
    assert largest_remainder(torch.from_numpy(expected), total).tolist() == by_hand(expected, total)


@pytest.mark.parametrize("seed", range(12))
def test_rounding_is_the_nearest_allowed_count_of_all(seed):
    """Brute force over every way to distribute the labels, for estimates that do not add up, or are negative."""
    random = np.random.default_rng(100 + seed)
    total = int(random.integers(1, 6))
    expected = random.normal(total / 3, 1.5, size=3)
    certain = random.random(3) < 0.3
    counts = np.array(largest_remainder(torch.from_numpy(expected), total, certain=torch.from_numpy(certain)).tolist())
    allowed = [
        np.array(c)
        for c in itertools.product(range(total + 1), repeat=3)
        if sum(c) == total and (np.array(c) >= certain).all()
    ]
    assert counts.sum() == total
    if allowed:
        assert (counts >= certain).all()
        best = min(((c - expected) ** 2).sum() for c in allowed)
        assert ((counts - expected) ** 2).sum() == pytest.approx(best)


def test_more_certain_classes_than_samples_keeps_the_likeliest():
    counts = largest_remainder(torch.tensor([0.9, 0.2, 0.8, 0.1]), 2, certain=torch.tensor([True] * 4))
    assert counts.tolist() == [1, 0, 1, 0]


# Recovery


@pytest.mark.parametrize("head_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_labels_of_an_untrained_network_come_back_as_a_multiset(faces, head_bias, size):
    accuracies = []
    for seed in range(4):
        images, labels = draw(faces, size, seed)
        estimate = recovered(network(head_bias=head_bias, seed=seed), (images, labels))
        assert (len(estimate.labels), estimate.classes, estimate.reason) == (size, CLASSES, "")
        accuracies.append(multiset_accuracy(estimate.labels.numpy(), labels.numpy()))
    assert np.mean(accuracies) >= (1.0 if size == 1 else 0.95 if head_bias else 0.85)


@pytest.mark.parametrize("counts", [[8], [0, 7, 1], [0, 0, 0, 4, 4], [1] * 8])
def test_duplicates_of_a_class_are_counted(faces, counts):
    """A known defect elsewhere: rules that return each class at most once."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = faces[0][: len(labels)]
    assert recovered(network(), (images, labels)).labels.tolist() == labels.tolist()


@pytest.mark.parametrize("head_bias", [True, False], ids=["bias", "no bias"])
def test_one_label_is_read_off_a_trained_network(faces, head_bias):
    model = network(head_bias=head_bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels = draw(faces, 32, 0)
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for i in range(6):
        assert recovered(model, (images[i : i + 1], labels[i : i + 1])).labels.tolist() == [int(labels[i])]


def test_one_label_survives_noise_that_is_mild(faces):
    for seed in range(4):
        images, labels = draw(faces, 1, seed)
        estimate = recovered(network(), (images, labels), defences=(GaussianNoise(relative=0.3),), seed=seed)
        assert len(estimate.labels) == 1
        assert estimate.labels.tolist() == labels.tolist()


def squared(logits, labels):
    return ((logits - functional.one_hot(labels, logits.shape[1])) ** 2).mean()


def frozen_head(model):
    model[-1].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "loss", "size", "says"),
    [
        pytest.param(network, squared, 4, "not a mean cross-entropy", id="squared error"),
        pytest.param(network, squared, 1, "not a mean cross-entropy", id="squared error, one image"),
        pytest.param(
            network,
            lambda z, y: functional.cross_entropy(z, y) + (z**2).mean(),
            4,
            "not a mean cross-entropy",
            id="plus",
        ),
        pytest.param(lambda: frozen_head(network()), functional.cross_entropy, 4, "was not shared", id="frozen head"),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(1, 10, 25), nn.Flatten()),
            functional.cross_entropy,
            4,
            "not a classification head",
            id="convolutional head",
        ),
    ],
)
def test_where_the_rule_does_not_hold_a_reason_comes_back(faces, model, loss, size, says):
    estimate = recovered(model(), draw(faces, size, 0), loss=loss)
    assert estimate.labels is None
    assert says in estimate.reason


def test_targets_that_are_no_classes_are_not_counted(faces):
    images, labels = draw(faces, 4, 0)
    estimate = recovered(network(), (images, functional.one_hot(labels, CLASSES).float()))
    assert estimate.labels is None
    assert "not class indices" in estimate.reason


def test_a_linear_layer_after_the_head_is_not_mistaken_for_it(faces):
    """A layer whose outputs the loss does not depend on is no head, wherever it runs."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()
            self.extra = nn.Linear(1, 1)

        def forward(self, x):
            logits = self.body(x)
            return logits + 0 * self.extra(logits[:, :1])

    batch = draw(faces, 4, 0)
    estimate = recovered(Auxiliary(), batch)
    assert estimate.labels.tolist() == sorted(batch[1].tolist())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", ["clipped", "private", "delta"])
def test_labels_are_recovered_from_gradients_of_unknown_scale_and_sign(kind, size):
    """Clipping scales the residual, a FedAvg client turns its sign: the labels are the same."""
    torch.manual_seed(size)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    labels = torch.tensor([7, 2, 2])[:size]
    batch = torch.rand(size, 1, 8, 8), labels
    snapshot = Snapshot.from_batch(model, batch, loss=nn.functional.cross_entropy)
    protocol = snapshot.protocol
    if kind == "clipped":
        protocol = replace(protocol, clip=ClipNorm(max_norm=1e-3))
    elif kind == "private":
        protocol = replace(protocol, private=PrivateSum(max_norm=1e-3, noise_multiplier=0.0, divisor=64.0))
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        local = LocalOptimizer.of(optimizer, {id(p): n for n, p in model.named_parameters()})
        settings = (LocalOptimizer.settings_of(optimizer),)
        protocol = replace(protocol, optimizer=replace(local, settings=settings))
    observation = replace(snapshot.observation, protocol=protocol)
    observation = replace(observation, gradients=observation.simulate(*batch))
    estimate = recover_labels(observation, generator=torch.Generator().manual_seed(0))
    assert estimate.labels is not None, estimate.reason
    assert estimate.labels.tolist() == sorted(labels.tolist())


def test_an_adaptive_optimizer_hides_the_labels_and_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    snapshot = Snapshot.from_batch(model, (torch.rand(1, 1, 8, 8), torch.tensor([7])), loss=nn.functional.cross_entropy)
    optimizer = torch.optim.Adam(model.parameters())
    local = LocalOptimizer.of(optimizer, {id(p): n for n, p in model.named_parameters()})
    protocol = replace(snapshot.protocol, optimizer=local)
    estimate = recover_labels(replace(snapshot.observation, protocol=protocol), generator=torch.Generator())
    assert estimate.labels is None
    assert "Adam hides" in estimate.reason


# Public images


def train(model, images, labels, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    random = torch.Generator().manual_seed(3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,), generator=random)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model


def mean_accuracy(model, images, labels, size, public, batches=8, **kwargs):
    found = []
    for number in range(batches):
        at = torch.arange(number * size, (number + 1) * size) % len(images)
        estimate = recovered(model, (images[at], labels[at]), public_images=public, **kwargs)
        found.append(multiset_accuracy(estimate.labels.numpy(), labels[at].numpy()))
    return np.mean(found)


@pytest.fixture(scope="module")
def halves(faces):
    """Private and public photographs, of faces and others alike, with labels of ten classes that images tell apart."""
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    brightness = faces[0].mean((1, 2, 3)).argsort().argsort() * 5 // 200
    labels = 2 * brightness + faces[1]
    return faces[0][order[:100]], labels[order[:100]], faces[0][order[100:]]


def test_public_images_count_labels_late_in_training_better_than_noise(halves):
    images, labels, public = halves
    model = train(network(), images, labels, 40)
    sizes = (2, 8, 32)
    found = {
        held is not None: [mean_accuracy(model, images, labels, s, held) for s in sizes] for held in (public, None)
    }
    assert found[True][0] >= 0.97
    assert min(found[True]) >= 0.85
    assert np.mean(found[True]) >= np.mean(found[False]) + 0.03


def test_counts_are_exact_when_the_public_mean_is_the_true_one(faces):
    """The closed form n = B(p̄ - r) with the batch's own images held publicly: p̄ is then that of the batch."""
    model = train(network(), *draw(faces, 100, 5), 40)
    for seed in range(4):
        images, labels = draw(faces, 24, seed)
        estimate = recovered(model, (images, labels), public_images=images)
        assert estimate.labels.tolist() == sorted(labels.tolist())


def test_a_class_that_no_column_shows_and_samples_that_columns_show_one_by_one():
    """Columns of three samples through six features: sole ones are counted, mixtures are not."""
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.3, 0.3, 0.3, 0.1]])
    errors = p - torch.nn.functional.one_hot(torch.tensor([0, 1, 0]), 4)
    features = torch.tensor([[1.0, 2.0, 0, 0, 0, 0, 1.0], [0, 0, 3.0, 1.0, 0, 0, 0], [0, 0, 0, 0, 0.5, 1.5, 2.0]])
    assert count_samples_in_columns(errors.T @ features).tolist() == [2, 1, 0, 0]
    mixed = torch.tensor([[1.0, 2.0, 0.5], [1.0, 0.3, 2.0], [1.0, 1.1, 0.2]])
    seen = count_samples_in_columns(errors.T @ mixed)
    assert bool((seen <= torch.tensor([2, 1, 0, 0])).all())


def head_and_batches(classes, size, *, head_bias=True, batches=40, seed=0):
    """A sure head on Gaussian features: public outputs, and batches of other samples with labels as it expects them."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn((classes, 80), generator=random) * 0.3
    features = torch.randn((400 + batches * size, 80), generator=random) + 1.0
    unit = None
    if not head_bias:
        weight = weight - weight.mean(1, keepdim=True)
        unit = torch.linalg.lstsq(features[:400], torch.ones(400)).solution
    logits = features @ weight.T
    labels = torch.multinomial(logits.softmax(1), 1, generator=random)[:, 0]
    head = HeadOutputs(features=features[:400], logits=logits[:400], weight=weight, unit=unit)
    private = zip(features[400:].split(size), logits[400:].split(size), labels[400:].split(size), strict=True)
    found = []
    for f, z, y in private:
        errors = z.softmax(1) - functional.one_hot(y, classes)
        gradient = errors.T @ f / size
        found.append((errors.mean(0) if unit is None else gradient @ unit, gradient, y.bincount(minlength=classes)))
    return head, found


@pytest.mark.parametrize(
    ("classes", "size", "head_bias"),
    [(10, 8, True), (10, 32, True), (10, 8, False), (30, 16, True)],
)
def test_quadratic_statistics_expect_counts_closer_than_the_mean_output_does(classes, size, head_bias):
    head, batches = head_and_batches(classes, size, head_bias=head_bias)
    expect = QuadraticCounts(head, size, torch.Generator().manual_seed(0))
    mean = head.logits.softmax(1).mean(0)
    errors = torch.tensor(
        [[float((guess - n).square().sum()) for guess in (expect(r, g), size * (mean - r))] for r, g, n in batches]
    ).mean(0)
    assert float(errors[0]) < (0.75 if classes == 10 else 0.95) * float(errors[1])


def test_quadratic_statistics_never_stray_far_from_what_was_simulated():
    """A gradient unlike any of this network's must not be extrapolated to nonsense."""
    head, batches = head_and_batches(10, 8, batches=1)
    expect = QuadraticCounts(head, 8, torch.Generator().manual_seed(0))
    residual, gradient, _ = batches[0]
    strange = expect(residual, 1e4 * torch.randn_like(gradient)) - 8 * (head.logits.softmax(1).mean(0) - residual)
    assert bool(strange.isfinite().all())
    assert float(strange.abs().max()) < 64


@pytest.mark.parametrize(("images", "classes", "enough"), [(31, 10, False), (32, 10, True), (400, 101, False)])
def test_quadratic_statistics_are_left_alone_where_images_are_few_or_classes_many(images, classes, enough):
    logits = torch.zeros(images, classes)
    assert HeadOutputs(features=logits, logits=logits, weight=torch.eye(classes)).tell_enough == enough


@pytest.mark.parametrize("head_bias", [True, False], ids=["bias", "no bias"])
def test_batchnorm_in_train_mode_sees_public_images_in_batches_of_the_clients_size(halves, head_bias):
    images, labels, public = halves
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2, padding=2),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 169, CLASSES, bias=head_bias),
        )
    assert mean_accuracy(model, images, labels, 8, public, mode="train") >= 0.97
    observation = Snapshot.from_batch(
        model, (images[:8], labels[:8]), loss=functional.cross_entropy, mode="train", public_images=public
    ).observation
    assert {len(batch) for batch in probe_images(observation, torch.Generator())} == {8}


def test_public_images_belong_to_what_the_adversary_holds_and_are_told_by_number(halves):
    images, labels, public = halves
    held = Snapshot.from_batch(network(), (images[:2], labels[:2]), loss=functional.cross_entropy, public_images=public)
    none = Snapshot.from_batch(network(), (images[:2], labels[:2]), loss=functional.cross_entropy)
    assert torch.equal(held.observation.public_images, public)
    assert held.observation.threat_model.to_dict()["public_images"] == 100
    assert none.observation.threat_model.to_dict()["public_images"] == 0
    assert "tensor" not in repr(held.observation.threat_model)


@pytest.mark.parametrize(
    ("public", "says"),
    [
        (torch.rand(4, 1, 8, 8), r"expected floating-point pixels \(M, 1, 25, 25\), got \(4, 1, 8, 8\)"),
        (torch.randint(255, (4, 1, 25, 25)), "got .*int64"),
        (torch.rand(0, 1, 25, 25), r"got \(0, 1, 25, 25\)"),
        (torch.rand(4, 1, 25, 25) * 255, r"must lie in \[0, 1\]"),
        ("faces", "got str"),
    ],
)
def test_public_images_that_cannot_be_used_are_refused(faces, public, says):
    with pytest.raises(InvalidInputError, match=f"public_images: .*{says}"):
        recovered(network(), draw(faces, 2, 0), public_images=public)
    if "25, 25" not in says:
        return
    with pytest.raises(InvalidInputError, match="public_images"):
        GradAudit(threat_model=ThreatModel(public_images=public.flatten()))


# The head is found by use


class Branches(nn.Module):
    """A classifier with a layer beside the head that runs last, and one that never runs."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.Tanh())
        self.head = head
        self.beside = nn.Linear(16, 7)
        self.never = nn.Linear(3, 5)

    def forward(self, images):
        features = self.body(images)
        logits = self.head(features)
        return logits, self.beside(features.mean((2, 3)))


def loss_of_branches(outputs, labels):
    logits, beside = outputs
    return functional.cross_entropy(logits, labels) + 0.1 * beside.square().mean()


HEADS = {
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    "1x1 convolution": lambda: nn.Sequential(nn.Conv2d(16, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "1x1 convolution without bias": lambda: nn.Sequential(
        nn.Conv2d(16, 10, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_head_that_is_not_the_last_layer_gives_the_labels(faces, head, size):
    torch.manual_seed(size)
    batch = draw(faces, size, size)
    estimate = recovered(Branches(HEADS[head]()), batch, loss=loss_of_branches)
    assert estimate.classes == 10
    assert estimate.labels.tolist() == sorted(batch[1].tolist())


def test_shares_of_any_size_end_at_the_total():
    """Strong noise gave counts of more than 2²⁴, from which one in float32 takes nothing off."""
    counts = largest_remainder(torch.tensor([3e9, 2e20, 0.2]), 5)
    assert counts.sum() == 5
    assert counts.argmax() == 1
    rough = torch.tensor([40.6, 33.1, 7.9, 0.4])
    by_hand = rough.floor()
    while by_hand.sum() > 9:
        by_hand[(by_hand - rough).masked_fill(by_hand <= 0, -torch.inf).argmax()] -= 1
    assert largest_remainder(rough, 9).tolist() == by_hand.tolist()
