"""Metrics against scikit-image, NumPy and brute force; classes against their functional forms."""

from __future__ import annotations

import itertools
import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional
from torchmetrics import Metric

from lightning_gradaudit import metrics
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics import (
    BracketGap,
    Ceiling,
    Effort,
    Exposure,
    GradientSimilarity,
    Identification,
    LabelMultisetAccuracy,
    NoiseToHide,
)
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.metrics.functional import (
    assign,
    excess_over_chance,
    exposure,
    gradient_similarity,
    identification,
    label_multiset_accuracy,
    pairwise_similarity,
    psnr,
)
from lightning_gradaudit.metrics.functional.similarity import mean_squared_error, similarity


def noisy(images, amount, seed=0):
    return (images + amount * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def ssim_by_skimage(a, b):
    """SSIM over the whole image, with mirrored borders as torchmetrics has them."""
    padded = [np.pad(x.double().numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect") for x in (a, b)]
    return structural_similarity(
        *padded, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )


# Similarities


@pytest.mark.parametrize("amount", [0.01, 0.1, 0.5])
def test_psnr_and_mse_equal_those_of_scikit_image(faces, amount):
    truth = faces[0][::20]
    preds = noisy(truth, amount)
    for got, mse, a, b in zip(psnr(preds, truth), mean_squared_error(preds, truth), preds, truth, strict=True):
        assert float(got) == pytest.approx(peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1), abs=1e-3)
        assert float(mse) == pytest.approx(float(((a.double() - b.double()) ** 2).mean()), rel=1e-4)


def test_the_psnr_of_a_copy_is_capped_so_that_it_can_be_drawn(faces):
    assert psnr(faces[0][:2], faces[0][:2]).tolist() == [100.0, 100.0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("amount", [0.05, 0.2, 1.0])
def test_ssim_equals_that_of_scikit_image(faces, amount, channels):
    truth = faces[0][::25].repeat(1, channels, 1, 1)
    preds = noisy(truth, amount)
    got = similarity(preds, truth)
    expected = [max(0.0, ssim_by_skimage(a, b)) for a, b in zip(preds, truth, strict=True)]
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_nmse_is_one_minus_the_error_over_the_variance(faces):
    truth = faces[0][::20]
    preds = noisy(truth, 0.1)
    expected = 1 - ((preds - truth) ** 2).flatten(1).mean(1) / truth.flatten(1).var(1, unbiased=False)
    np.testing.assert_allclose(similarity(preds, truth, "nmse"), expected.clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("measure", ["ssim", "nmse"])
def test_all_pairs_equal_each_pair_alone(faces, measure):
    preds, truth = noisy(faces[0][:30], 0.3), faces[0][10:32]
    table = pairwise_similarity(preds, truth, measure)
    assert table.shape == (30, 22)
    for m, n in [(0, 0), (29, 21), (11, 1), (13, 20)]:
        alone = similarity(preds[m : m + 1], truth[n : n + 1], measure)
        assert float(table[m, n]) == pytest.approx(float(alone), abs=1e-6)
    assert pairwise_similarity(preds[:0], truth).shape == (0, 22)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: pairwise_similarity(x, x[..., :8]), "preds and target"),
        (lambda x: similarity(x, x, "mse"), "measure"),
        (lambda x: identification(x, x, x[..., :8]), "preds, target and gallery"),
        (lambda x: exposure(torch.zeros(2), torch.zeros(3)), "similarity and null"),
        (lambda x: assign(torch.zeros(2, 3)), "similarities"),
        (lambda x: gradient_similarity({"a": x}, {"b": x}), r"preds and target .*'a', 'b'"),
        (lambda x: label_multiset_accuracy(torch.zeros(2).long(), torch.zeros(3).long()), "preds and target"),
        (lambda x: Identification(chance=1.0), "chance"),
        (lambda x: Exposure("median"), "statistic"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(faces, call, named):
    with pytest.raises(InvalidInputError, match=named):
        call(faces[0][:2])


# Assignment


@pytest.mark.parametrize("seed", range(10))
def test_the_assignment_is_the_best_of_all_permutations(seed):
    random = torch.Generator().manual_seed(seed)
    m, n = 4 + seed % 2, 4
    table = torch.rand((m, n), generator=random)
    order = assign(table)
    best = max(sum(float(table[p[i], i]) for i in range(n)) for p in itertools.permutations(range(m), n))
    assert len(set(order.tolist())) == n
    assert float(table[order, torch.arange(n)].sum()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_batch_scores_the_same_in_every_order(faces, order):
    """Applying the inverse permutation, a known defect, shows on the 3-cycles among these."""
    truth = faces[0][:40:10]
    preds = torch.cat([noisy(truth[i : i + 1], 0.02 + 0.08 * i, seed=i) for i in range(4)])
    straight, shuffled = (Baseline().score(p, truth) for p in (preds, preds[list(order)]))
    assert [order[i] for i in shuffled.order.tolist()] == straight.order.tolist() == [0, 1, 2, 3]
    for name in ("exposure", "similarity", "psnr", "ssim", "mse"):
        torch.testing.assert_close(getattr(shuffled, name), getattr(straight, name))


def test_one_good_reconstruction_among_garbage_is_credited_to_its_owner(faces):
    """With a sum of squared errors the garbage decides, and the crisp face goes to a black image."""
    face = faces[0][3:4]
    truth = torch.cat([face, torch.zeros_like(face)])
    crisp = 0.5 * face  # dark, but every feature is there
    garbage = torch.rand(face.shape, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.5
    preds = torch.cat([garbage, crisp])
    squared = ((preds[:, None] - truth[None]) ** 2).flatten(2).mean(2)
    assert squared[1, 1] + squared[0, 0] < squared[1, 0] + squared[0, 1]  # what a peer would choose
    scores = Baseline().score(preds, truth)
    assert scores.order.tolist() == [1, 0]
    assert float(scores.exposure[0]) > 0.5


# Exposure


def test_exposure_is_the_clipped_share_of_what_a_guess_leaves_open():
    random = np.random.default_rng(0)
    s, n = random.random((2, 500)).astype(np.float32)
    expected = np.clip((s - n) / (1 - n), 0, 1)
    np.testing.assert_allclose(exposure(torch.from_numpy(s), torch.from_numpy(n)), expected, atol=1e-5)


def test_a_copy_is_exposed_wholly_unless_a_guess_is_a_copy_too():
    nulls = torch.tensor([0.0, 0.5, 0.999, 1.0])
    assert exposure(torch.ones(4), nulls).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])
    assert exposure(nulls, nulls).tolist() == [0.0] * 4


@pytest.mark.parametrize("statistic", ["worst", "p90", "mean"])
@pytest.mark.parametrize("size", [1, 9, 10, 11, 100])
def test_the_exposure_metric_reduces_like_numpy_over_all_updates(statistic, size):
    random = torch.Generator().manual_seed(size)
    s, n = torch.rand((2, size), generator=random)
    metric = Exposure(statistic)
    for part in torch.arange(size).split(4):
        metric.update(similarity=s[part], null=n[part])
    values = exposure(s, n).double().numpy()
    oracle = {"worst": values.max(), "p90": np.quantile(values, 0.9, method="higher"), "mean": values.mean()}
    assert float(metric.compute()) == pytest.approx(oracle[statistic], abs=1e-6)


# Identification


@pytest.mark.parametrize("batch", [1, 8])
def test_copies_name_their_image(faces, batch):
    images, labels = faces
    for part in torch.arange(0, 200, 25).split(batch):
        hit, sizes = identification(images[part], images[part], images, labels=labels[part], gallery_labels=labels)
        assert hit.tolist() == [1.0] * len(part)
        assert int(sizes.min()) >= 95


def test_faces_under_noise_are_still_named_and_the_reconstruction_of_another_face_is_not(faces):
    images = faces[0][:100]
    owners, _ = identification(noisy(images[:20], 0.2), images[:20], faces[0])
    strangers, _ = identification(noisy(images[20:40], 0.2), images[:20], faces[0])
    assert float(owners.mean()) > 0.9
    assert float(strangers.mean()) < 0.1


def test_noise_names_an_image_no_more_often_than_chance(faces):
    images = faces[0]
    random = torch.Generator().manual_seed(0)
    hits = torch.cat(
        [identification(torch.rand(part.shape, generator=random), part, images)[0] for part in images.split(40)]
    )
    # Two statistics with 200 candidates: about 1 %; 200 trials.
    assert float(hits.mean()) < 0.05


@pytest.mark.parametrize(("gallery", "measured"), [(50, False), (99, True), (98, False), (150, True)])
def test_fewer_than_a_hundred_candidates_give_no_answer(gallery, measured):
    images = torch.rand((gallery + 1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    hit, sizes = identification(images[:1], images[:1], images[1:])
    assert sizes.tolist() == [gallery + 1]
    assert math.isnan(float(hit)) is not measured


def test_near_copies_of_the_image_in_the_gallery_are_no_rivals():
    images = torch.rand((150, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    twins = noisy(images[:1].expand(5, -1, -1, -1), 0.01)
    hit, sizes = identification(twins[:1], images[:1], torch.cat([images[1:], twins]))
    assert (hit.tolist(), sizes.tolist()) == ([1.0], [150])


def test_candidates_are_of_the_images_class_where_there_are_enough(faces):
    images, labels = faces
    _, same = identification(images[:1], images[:1], images, labels=labels[:1], gallery_labels=labels, min_gallery=50)
    _, any_class = identification(
        images[:1], images[:1], images[:150], labels=labels[150:151], gallery_labels=labels[:150], min_gallery=60
    )
    assert int(same) <= 100
    assert int(any_class) > 100


@pytest.mark.parametrize(
    ("rate", "chance", "expected"), [(0.5, 0.0, 0.5), (0.5, 0.5, 0.0), (0.2, 0.5, 0.0), (1, 0.5, 1), (1, 1, 0)]
)
def test_excess_identification_starts_at_chance(rate, chance, expected):
    assert excess_over_chance(rate, chance) == pytest.approx(expected)


# Gradients and labels


def test_gradient_similarity_is_the_cosine_of_the_flat_vectors():
    random = torch.Generator().manual_seed(0)
    a, b = ({n: torch.randn(s, generator=random) for n, s in {"w": (3, 4), "b": (5,)}.items()} for _ in range(2))
    flat_a, flat_b = (torch.cat([g["w"].flatten(), g["b"]]) for g in (a, b))
    expected = float(functional.cosine_similarity(flat_a, flat_b, dim=0))
    reordered = {"b": b["b"], "w": b["w"]}
    assert float(gradient_similarity(a, reordered)) == pytest.approx(expected, abs=1e-6)
    metric = GradientSimilarity()
    metric.update(a, b)
    metric.update(a, a)
    assert float(metric.compute()) == pytest.approx((expected + 1) / 2, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_label_accuracy_is_the_best_over_all_orders(seed):
    random = torch.Generator().manual_seed(seed)
    preds, target = torch.randint(3, (2, 5), generator=random)
    best = max(float((preds[list(p)] == target).float().mean()) for p in itertools.permutations(range(5)))
    assert float(label_multiset_accuracy(preds, target)) == pytest.approx(best)
    metric = LabelMultisetAccuracy()
    metric.update(preds, target)
    metric.update(target, target)
    assert float(metric.compute()) == pytest.approx((best + 1) / 2)


# Classes


def fill(metric):
    images = torch.rand((120, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    arguments = {
        Exposure: (torch.tensor([0.4, 0.7]), torch.tensor([0.4, 0.4])),
        Identification: (images[:2], images[:2], images),
        GradientSimilarity: ({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 0.0])}),
        LabelMultisetAccuracy: (torch.tensor([0, 1]), torch.tensor([0, 2])),
        Ceiling: (torch.tensor([0.2, 0.6]),),
        NoiseToHide: (torch.tensor([0.5, 3.0]),),
        BracketGap: (torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.5])),
        Effort: (torch.tensor([50.0, math.inf]), 100),
    }
    metric.update(*arguments[type(metric)])
    return metric


EXPECTED = {
    BracketGap: 0.4,
    Ceiling: 0.4,
    Effort: 50.0,
    Exposure: 0.5,
    GradientSimilarity: math.sqrt(0.5),
    Identification: 1.0,
    LabelMultisetAccuracy: 0.5,
    NoiseToHide: 3.0,
}
DESCRIPTIONS = {BracketGap}  # neither better nor worse when high
BOUNDS = dict.fromkeys(EXPECTED, (0.0, 1.0)) | {
    BracketGap: (-1.0, 1.0),
    Effort: (0.0, None),
    GradientSimilarity: (-1.0, 1.0),
    NoiseToHide: (0.0, None),
}


def test_every_metric_that_is_exported_is_tested_here():
    assert {kind.__name__ for kind in EXPECTED} == set(metrics.__all__)


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_metric_states_its_facts_resets_and_plots(kind):
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    assert (kind.is_differentiable, kind.full_state_update) == (False, False)
    assert kind.higher_is_better is (None if kind in DESCRIPTIONS else kind is Effort)
    assert (kind.plot_lower_bound, kind.plot_upper_bound) == BOUNDS[kind]
    metric = kind()
    assert isinstance(metric, Metric)
    fill(metric)
    value = float(metric.compute())
    assert value == pytest.approx(EXPECTED[kind], abs=1e-6)
    figure, axes = metric.plot()
    drawn = [float(y) for line in axes.get_lines() for y in line.get_ydata()]
    assert any(y == pytest.approx(value, abs=1e-6) for y in drawn)
    plt.close(figure)
    metric.reset()
    assert metric.update_count == 0
    assert float(fill(metric).compute()) == pytest.approx(value)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("kind", EXPECTED)
def test_a_metric_without_data_is_not_a_number(kind):
    assert math.isnan(float(kind().compute()))


def test_the_identification_metric_counts_only_what_could_be_compared(faces):
    images = faces[0]
    metric = Identification(chance=0.2)
    metric.update(images[:4], images[:4], images)
    metric.update(images[[5, 4]], images[[4, 5]], images)
    metric.update(images[:4], images[:4], images[:10])
    assert float(metric.total) == 6
    assert float(metric.compute()) == pytest.approx((4 / 6 - 0.2) / 0.8)
