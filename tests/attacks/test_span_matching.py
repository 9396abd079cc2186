"""Matching inside the span of a linear layer's gradient: the span, its error under noise, and what is recovered."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Budget, ClipNorm, GaussianNoise, Outcome, Snapshot
from lightning_gradaudit.attacks import (
    DLG,
    Auto,
    InvertingGradients,
    LinearLayerInversion,
    MaximumAPosteriori,
    PowerLawPrior,
    SpanMatching,
)
from lightning_gradaudit.attacks.closed_form.image_layer import image_layers
from lightning_gradaudit.attacks.maximum_a_posteriori import energy, known_noise
from lightning_gradaudit.attacks.span_matching import AffineSpan
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.defences import ClipValue


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def observe(faces, indices, *defences, seed=0, width=96):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(625, width), nn.ReLU(), nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 5)
    )
    images = faces[0][indices]
    labels = torch.arange(len(indices)) % 5
    snapshot = Snapshot.from_batch(
        model,
        (images, labels),
        loss=F.cross_entropy,
        defences=defences,
        seed=seed,
        labels_known=True,
    )
    return snapshot.observation, images


def span_of(observation, noise=0.0):
    (layer,) = image_layers(observation, generator())
    return AffineSpan.of(observation, layer, noise)


def psnr(found, images):
    """Mean over the images of the best match among the reconstructions."""
    errors = ((found.clamp(0, 1)[None] - images[:, None]) ** 2).flatten(2).mean(2).min(1).values
    return float(-10 * errors.clamp_min(1e-12).log10().mean())


def run(attack, observation, evaluations=300):
    return attack(observation, budget=Budget(evaluations=evaluations), generator=generator())


def test_every_image_of_the_batch_lies_in_the_span(faces):
    observation, images = observe(faces, [3, 20, 41, 77])
    span = span_of(observation)
    assert span.basis.shape == (3, 625)
    for image in images:
        coordinates = (image.flatten() - span.origin) @ torch.linalg.pinv(span.basis)
        assert float((span.origin + coordinates @ span.basis - image.flatten()).norm() / image.norm()) < 1e-4


def test_a_repeated_image_leaves_a_smaller_span(faces):
    observation, _ = observe(faces, [3, 20, 20, 41])
    assert len(span_of(observation).values) == 3


def test_the_error_that_noise_leaves_is_the_predicted_one(faces):
    clean, images = observe(faces, [20])
    found, predicted = [], []
    for seed in range(40):
        draw = generator(seed)
        deviation = 0.02 * float(clean.gradients["1.weight"].norm()) / clean.gradients["1.weight"].numel() ** 0.5
        noisy = {n: g + deviation * torch.randn(g.shape, generator=draw) for n, g in clean.gradients.items()}
        observation = type(clean)(**{**vars(clean), "gradients": noisy})
        span = span_of(observation, deviation)
        found.append((span.origin - images.flatten()).square().mean())
        predicted.append(span.deviation(span.origin[None], deviation) ** 2)
    # The bias's own error scales the whole image and adds a little.
    ratio = float(torch.stack(found).mean() / torch.stack(predicted).mean())
    assert 0.8 < ratio < 1.6


def test_a_search_in_the_span_finds_more_than_one_in_all_pixels(faces):
    """Mean over four clean batches at equal evaluations; how far a single search gets is luck."""
    found = {SpanMatching(): [], InvertingGradients(): [], DLG(): []}
    for indices in ([3, 20, 41, 77], [5, 60, 33, 90], [1, 2, 103, 150], [10, 120, 66, 44]):
        observation, images = observe(faces, indices)
        for attack, quality in found.items():
            result = run(attack, observation)
            assert result.evaluations <= 300
            quality.append(psnr(result.inputs, images))
    in_span, *in_pixels = [sum(quality) / len(quality) for quality in found.values()]
    assert in_span > max(in_pixels) + 3


@pytest.mark.parametrize(("noise", "margin"), [(0.3, 1.5), (1.0, 5.0)])
def test_under_noise_one_image_beats_both_least_squares_and_the_posterior_from_afar(faces, noise, margin):
    """Mean over four faces: the singular vector gathers all rows, division by the bias does not."""
    gained, ahead = [], []
    for index in (3, 20, 41, 77):
        observation, images = observe(faces, [index], GaussianNoise(relative=noise), seed=index)
        reached = psnr(run(SpanMatching(), observation).inputs, images)
        gained.append(reached - psnr(run(LinearLayerInversion(), observation).inputs, images))
        ahead.append(reached - psnr(run(MaximumAPosteriori(), observation).inputs, images))
    assert sum(gained) / 4 > margin
    assert sum(ahead) / 4 > -0.5


def test_a_scaled_gradient_changes_nothing_for_one_image(faces):
    observation, images = observe(faces, [41], ClipNorm(max_norm=1e-3))
    result = run(SpanMatching(), observation, evaluations=5)
    assert psnr(result.inputs, images) > 50
    assert run(Auto(), observation, evaluations=5).reason.startswith("SpanMatching")


def test_the_likelier_of_two_wins_under_noise(faces):
    observation, _ = observe(faces, [3, 20], GaussianNoise(relative=0.5))
    prior, noise = PowerLawPrior(), known_noise(observation)
    attacks = SpanMatching(prior=prior), MaximumAPosteriori(prior=prior)
    chosen = run(Auto(noisy=attacks[1]), observation)
    assert "SpanMatching" in chosen.reason
    assert "MaximumAPosteriori" in chosen.reason
    assert chosen.evaluations <= 300
    likeliest = min(energy(observation, run(attack, observation, 150), prior=prior, noise=noise) for attack in attacks)
    assert energy(observation, chosen, prior=prior, noise=noise) <= likeliest + 0.02 * abs(likeliest)


@pytest.mark.parametrize(
    ("indices", "defences", "width", "reason"),
    [
        ([3], (GaussianNoise(std=100.0),), 96, "all noise"),
        ([3, 20, 41, 77], (), 4, "not larger than the batch"),
        ([3, 20], (ClipValue(max_value=1e-4),), 96, "need not keep the span"),  # entries cut one by one
    ],
)
def test_where_it_does_not_apply_it_says_so(faces, indices, defences, width, reason):
    observation, _ = observe(faces, indices, *defences, width=width)
    result = run(SpanMatching(), observation)
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert reason in result.reason


def test_a_convolution_has_no_such_span(snap):
    result = run(SpanMatching(), snap("conv", channels=3, side=10).observation)
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "fed by the image" in result.reason


def test_shares_are_checked():
    with pytest.raises(InvalidInputError, match="share"):
        SpanMatching(share=1.0)
