"""The null: what tells nothing is worth nothing, a copy is worth everything, and neither drifts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.baseline import Baseline, flat_similarity, near_copies
from lightning_gradaudit.metrics.functional.similarity import similarity


def uniform(n, random):
    return torch.rand((n, 1, 25, 25), generator=random)


def smooth(n, random):
    """What total variation makes of noise."""
    coarse = torch.randn((n, 1, 7, 7), generator=random)
    return (0.5 + 0.25 * functional.interpolate(coarse, (25, 25), mode="bilinear")).clamp(0, 1)


def grey(n, random):
    return 0.5 + 0.01 * torch.randn((n, 1, 25, 25), generator=random)


@pytest.fixture(scope="module")
def photographs(faces):
    """The 200 images, five of them replaced by flat ones of different brightness."""
    images = faces[0].clone()
    images[::40] = torch.linspace(0.05, 0.95, 5).reshape(5, 1, 1, 1)
    return images


def photographs_of_other_batches(images):
    """For a batch of every tenth image, the images five places on: none of them is in the batch."""
    return images.roll(-5, 0)


@pytest.mark.parametrize("kind", [uniform, smooth, grey, photographs_of_other_batches], ids=lambda k: k.__name__)
def test_reconstructions_that_know_nothing_of_the_gradient_are_not_exposed(photographs, faces, kind):
    random = torch.Generator().manual_seed(0)
    labels = faces[1]
    if kind is photographs_of_other_batches:  # other audits succeeded, this one shows other people
        made = kind(photographs)
        earlier = owners = photographs.flip(0)[:64]
    else:
        made, earlier = kind(200, random), kind(64, random)
        owners = photographs[torch.randint(200, (64,), generator=random)]
    baseline = Baseline()
    baseline.observe(photographs, labels)
    baseline.remember(earlier, owners)
    scores = [
        baseline.score(made[part], photographs[part], labels[part]) for part in torch.arange(200).reshape(20, 10).T
    ]
    exposures = torch.cat([s.exposure for s in scores])
    assert len(exposures) == 200
    assert float(exposures.mean()) < 0.02
    # Identification at the level that the same procedure measures on mismatched reconstructions.
    rate = float(torch.cat([s.identified for s in scores]).mean())
    trials = sum(s.chance_trials for s in scores)
    chance = sum(s.chance_hits for s in scores) / trials
    assert trials > 500
    assert abs(rate - chance) < 0.06


def test_the_measured_chance_is_close_to_the_nominal_one_for_single_images(faces):
    """One image at a time, 200 candidates, two statistics: between 1/200 and a few hundredths."""
    images = faces[0]
    random = torch.Generator().manual_seed(0)
    baseline = Baseline(reservoir_size=16)
    baseline.observe(images)
    baseline.remember(uniform(16, random), images[torch.randint(200, (16,), generator=random)])
    hits = trials = 0
    for i in range(0, 200, 20):
        scores = baseline.score(uniform(1, random), images[i : i + 1])
        hits, trials = hits + scores.chance_hits, trials + scores.chance_trials
    assert trials > 140
    assert hits / trials < 0.05


@pytest.mark.parametrize("measure", ["ssim", "nmse"])
def test_the_right_colour_alone_is_no_exposure_and_takes_nothing_from_what_is_one(measure):
    """Of a smooth photograph a flat picture is the better guess than any face; it shows nothing all the same."""
    sky = torch.linspace(0.3, 0.4, 25).reshape(1, 1, 1, 25).expand(1, 3, 25, 25).clone()
    sky[:, :, 10:14, 10:18] = torch.tensor([0.6, 0.5, 0.2]).reshape(1, 3, 1, 1)  # something flies there
    flat = sky.mean((2, 3), keepdim=True).expand_as(sky)
    baseline = Baseline(measure=measure)
    reached = similarity(flat, sky, measure)
    torch.testing.assert_close(flat_similarity(sky, measure), reached)
    assert float(reached) > 0.02
    assert float(baseline.score(flat, sky).exposure) == 0.0
    drawn = 0.5 * sky + 0.5 * flat
    assert float(baseline.score(drawn, sky).exposure) == float(similarity(drawn, sky, measure))  # there is no null


@pytest.mark.parametrize("batch", [1, 5])
def test_a_copy_is_exposed_wholly(photographs, faces, batch):
    random = torch.Generator().manual_seed(0)
    baseline = Baseline()
    baseline.observe(photographs, faces[1])
    baseline.remember(smooth(64, random), photographs[:64])
    part = torch.arange(0, 200, 40)[:batch]
    scores = baseline.score(photographs[part], photographs[part], faces[1][part])
    assert scores.exposure.tolist() == pytest.approx([1.0] * batch, abs=1e-4)


def test_an_image_that_fills_gallery_and_reservoir_is_still_exposed_by_a_copy(faces):
    """In a data set of one repeated image its own near copies would make a perfect null and hide everything."""
    face = faces[0][3:4]
    repeated = (face + 0.005 * torch.randn((64, 1, 25, 25), generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    baseline = Baseline()
    baseline.observe(repeated)
    baseline.remember(repeated, repeated)
    scores = baseline.score(face, face)
    assert float(scores.exposure) == pytest.approx(1, abs=1e-4)
    assert scores.chance_trials == 0


@pytest.mark.parametrize("where", ["gallery", "reservoir"])
def test_near_copies_among_others_do_not_raise_the_null_of_their_image(faces, where):
    images = faces[0]
    random = torch.Generator().manual_seed(0)
    nulls = []
    for copies in (0, 20):
        baseline = Baseline()
        others = images[100:150]
        twins = images[:1].expand(copies, -1, -1, -1)
        baseline.observe(torch.cat([others, twins]) if where == "gallery" else others)
        guesses, owners = smooth(64 - copies, random), images[40 : 104 - copies]
        if where == "reservoir":  # good reconstructions of the same image, from earlier audits of it
            guesses, owners = torch.cat([guesses, twins]), torch.cat([owners, twins])
        else:
            guesses, owners = torch.cat([guesses, guesses[:copies]]), torch.cat([owners, owners[:copies]])
        baseline.remember(guesses, owners)
        nulls.append(float(baseline.score(images[:1], images[:1]).null))
    assert nulls[1] <= nulls[0] + 0.05


def test_a_null_of_the_mean_image_equals_its_similarity_computed_by_hand(faces):
    images, labels = faces
    baseline = Baseline()
    baseline.observe(images[:60], labels[:60])
    truth = images[150:153]
    by_hand = similarity(images[:60].mean(0, keepdim=True).expand(3, -1, -1, -1), truth)
    torch.testing.assert_close(baseline.score(truth, truth).null, by_hand, rtol=1e-4, atol=1e-4)


def test_the_mean_of_the_images_class_counts_where_it_is_the_better_guess(faces):
    images, labels = faces
    baseline = Baseline()
    baseline.observe(images, labels)
    truth = images[:10]
    face_mean = similarity(images[:100].mean(0, keepdim=True).expand(10, -1, -1, -1), truth)
    with_labels = baseline.score(truth, truth, labels[:10]).null
    without = baseline.score(truth, truth).null
    assert bool((with_labels >= without - 1e-6).all())
    assert float((with_labels - face_mean).abs().mean()) < 0.03
    assert float(with_labels.mean()) > float(without.mean()) + 0.02


def test_the_null_has_a_fixed_size_and_does_not_drift_with_the_number_of_audits(faces):
    images = faces[0]
    random = torch.Generator().manual_seed(0)
    guesses, owners = smooth(64, random), images[100:164]
    fresh, old = Baseline(reservoir_size=64), Baseline(reservoir_size=64)
    fresh.remember(guesses, owners)
    for _ in range(10):  # a long run before it, with guesses that come much closer
        old.remember(images[:50] * 0.9, images[150:])
    old.remember(guesses, owners)
    assert (fresh.guesses, old.guesses) == (64, 64)
    assert torch.equal(fresh.score(images[:4], images[:4]).null, old.score(images[:4], images[:4]).null)


def test_the_null_is_a_quantile_of_the_reservoir_and_not_its_best(faces):
    images = faces[0]
    random = torch.Generator().manual_seed(0)
    guesses = smooth(64, random)
    guesses[0] = images[0] * 0.95  # a single lucky guess made for another image
    baseline = Baseline(quantile=0.9)
    baseline.remember(guesses, images[100:164])
    reached = similarity(guesses, images[:1].expand(64, -1, -1, -1))
    expected = reached.quantile(0.9, interpolation="higher")
    assert float(baseline.score(images[:1], images[:1]).null) == pytest.approx(float(expected), abs=1e-5)
    assert float(reached.max()) > float(expected) + 0.3


@pytest.mark.parametrize(("guesses", "complete"), [(0, False), (63, False), (64, True), (80, True)])
def test_an_unfilled_reservoir_is_said(faces, guesses, complete):
    baseline = Baseline()
    baseline.remember(faces[0][:guesses], faces[0][:guesses])
    assert baseline.score(faces[0][:1], faces[0][:1]).null_complete is complete


def test_without_gallery_and_reservoir_the_null_is_zero_and_nobody_is_identified(faces):
    scores = Baseline().score(faces[0][:2], faces[0][:2])
    assert scores.null.tolist() == [0.0, 0.0]
    assert bool(scores.identified.isnan().all())
    assert scores.chance_trials == 0


def test_a_frozen_baseline_keeps_its_state(faces):
    images = faces[0]
    baseline = Baseline()
    baseline.observe(images[:50])
    frozen = baseline.frozen()
    baseline.observe(images[50:])
    baseline.remember(images[:10], images[:10])
    assert (len(frozen.gallery), frozen.guesses) == (50, 0)
    assert (len(baseline.gallery), baseline.guesses) == (200, 10)


def test_the_gallery_stops_at_its_size_and_ignores_images_of_another_shape(faces):
    baseline = Baseline(gallery_size=30)
    baseline.observe(faces[0][:20])
    baseline.observe(torch.zeros(5, 3, 25, 25))
    assert len(baseline.gallery) == 20
    baseline.observe(faces[0][20:])
    assert baseline.gallery_full
    assert torch.equal(baseline.gallery, faces[0][:30])


def test_large_images_are_pooled_for_the_gallery_and_still_identified():
    images = torch.rand((120, 1, 48, 40), generator=torch.Generator().manual_seed(0))
    baseline = Baseline()
    baseline.observe(images)
    assert tuple(baseline.gallery.shape) == (120, 1, 32, 32)
    assert baseline.score(images[:2], images[:2]).identified.tolist() == [1.0, 1.0]


def test_near_copies_are_found_by_pattern_or_by_pixels(faces):
    truth = torch.cat([faces[0][3:4], torch.full((1, 1, 25, 25), 0.4)])
    images = torch.cat([truth[:1] * 0.5 + 0.2, truth[:1].flip(-1), truth[1:] + 0.001, truth[1:] + 0.3])
    assert near_copies(images, truth).tolist() == [[True, False], [False, False], [False, True], [False, False]]


@pytest.mark.parametrize(
    "arguments", [{"reservoir_size": 0}, {"gallery_size": -1}, {"quantile": 0.0}, {"quantile": 1.5}]
)
def test_settings_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(InvalidInputError, match=next(iter(arguments))):
        Baseline(**arguments)
