"""Metrics of the analysis against NumPy and SciPy; updates in parts and merged states against all at once."""

from __future__ import annotations

import math
from functools import partial

import matplotlib as mpl
import numpy as np
import pytest
import torch
from scipy.stats import CensoredData, ecdf
from torch.nn import functional

from lightning_gradaudit import Budget, Outcome, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import InvertingGradients
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics import BracketGap, Ceiling, Effort, Exposure, NoiseToHide
from lightning_gradaudit.metrics.functional import effort_more_than, effort_quantile, summary

NAN, INF = math.nan, math.inf
NUMPY = {"worst": np.max, "p90": lambda x: np.quantile(x, 0.9, method="higher"), "mean": np.mean}


def values(count, seed):
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    drawn[seed % 7 :: 7] = NAN  # images that were not analysed
    return drawn


def censored(count, seed):
    """Efforts of images that were attacked for different budgets, with ties, and what was spent on each."""
    rng = np.random.default_rng(seed)
    true = np.round(np.exp(rng.normal(4, 1, count)), -1)
    spent = rng.choice([40.0, 100.0, 400.0], count)
    return torch.tensor(np.where(true <= spent, true, np.inf)), torch.tensor(spent)


def of(metric, *arguments):
    """Return a metric of one update."""
    metric.update(*arguments)
    return float(metric.compute())


# Statistics of images


@pytest.mark.parametrize("statistic", NUMPY)
@pytest.mark.parametrize("seed", range(3))
def test_ceiling_noise_and_gap_are_statistics_of_the_images_that_were_analysed(statistic, seed):
    leak, reached, noise = values(50, seed), values(50, seed + 10), 5 * values(50, seed + 20)
    oracle = NUMPY[statistic]
    known = leak.numpy()[~np.isnan(leak.numpy())]
    assert of(Ceiling(statistic), leak) == pytest.approx(oracle(known), abs=1e-6)
    assert of(NoiseToHide(statistic), noise) == pytest.approx(oracle(noise[~noise.isnan()].numpy()), abs=1e-5)
    apart = (leak - reached).numpy()
    assert 30 < np.isfinite(apart).sum() < len(known)
    assert of(BracketGap(statistic), leak, reached) == pytest.approx(oracle(apart[np.isfinite(apart)]), abs=1e-6)


def test_an_estimate_below_what_was_reached_shows_as_a_negative_gap():
    assert of(BracketGap(), torch.tensor([0.2]), torch.tensor([0.7])) == pytest.approx(-0.5)


# Effort


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(8))
def test_the_effort_is_the_kaplan_meier_quantile_of_scipy(seed, share):
    effort, spent = censored(61, seed)
    exposed = effort.isfinite()
    assert 0.2 < float(exposed.double().mean()) < 0.9
    time = torch.where(exposed, effort, spent)
    survival = ecdf(CensoredData.right_censored(time.numpy(), ~exposed.numpy())).sf
    reached = survival.quantiles[survival.probabilities <= 1 - share + 1e-12]
    # SciPy also lists times at which images were lost and none fell, where the curve stays as it was.
    expected = reached[0] if len(reached) else INF
    assert float(effort_quantile(effort, spent, share=share)) == expected
    assert float(effort_more_than(effort, spent)) == float(time.max())


@pytest.mark.parametrize("seed", range(5))
def test_the_median_is_near_the_true_one_where_leaving_out_or_counting_the_censored_is_not(seed):
    rng = np.random.default_rng(seed)
    true, spent = rng.exponential(100, 4000), rng.uniform(0, 200, 4000)
    effort, median = torch.tensor(np.where(true <= spent, true, np.inf)), 100 * math.log(2)
    got = float(effort_quantile(effort, torch.tensor(spent)))
    assert got == pytest.approx(median, rel=0.1)
    assert np.median(true[true <= spent]) < 0.75 * median
    assert np.median(np.minimum(true, spent)) < 0.75 * median


def test_without_censoring_it_is_the_smallest_effort_that_half_of_the_images_do_not_exceed():
    effort = torch.tensor([7.0, 1.0, 5.0, 3.0])
    assert float(effort_quantile(effort, 10)) == np.quantile(effort, 0.5, method="inverted_cdf") == 3
    assert float(effort_quantile(effort, 10, share=0.0)) == 1
    assert float(effort_quantile(effort, 10, share=1.0)) == 7


def test_a_median_that_no_budget_reached_is_more_than_the_largest_budget():
    metric = Effort()
    metric.update(torch.tensor([20.0, INF, NAN]), 100)
    metric.update(torch.tensor([INF, INF]), torch.tensor([400.0, 30.0]))
    assert float(metric.compute()) == INF
    assert float(metric.more_than) == 400
    assert float(effort_quantile(torch.tensor([20.0, INF, INF]), INF)) == INF


def test_an_attack_that_ended_by_itself_leaves_its_images_hidden_for_ever():
    """Censored at 30 the two would be left out from then on, and the others would rule the median."""
    effort = torch.tensor([INF, INF, 50.0, INF])
    assert float(effort_quantile(effort, torch.tensor([30.0, 30.0, 100.0, 40.0]))) == 50
    ended = torch.tensor([INF, INF, 100.0, INF])
    assert float(effort_quantile(effort, ended)) == float(effort_more_than(effort, ended)) == INF
    half = torch.tensor([INF, INF, 100.0, 80.0])  # the two others might still make half of the images
    assert float(effort_quantile(effort, half)) == INF
    assert float(effort_more_than(effort, half)) == 80


def test_a_record_says_how_far_its_hidden_images_were_followed(faces, build):
    images, labels = faces
    snapshot = Snapshot.from_batch(build("conv"), (images[:1], labels[:1]), loss=functional.cross_entropy)
    record = audit_snapshot(snapshot, attack=InvertingGradients(), budget=Budget(evaluations=5))
    assert (record.outcome, record.followed) == (Outcome.BUDGET_SPENT, 5)
    exact = audit_snapshot(
        Snapshot.from_batch(build("mlp"), (images[:1], labels[:1]), loss=functional.cross_entropy),
        budget=Budget(evaluations=5),
    )
    assert (exact.outcome, exact.followed) == (Outcome.EXACT, INF)


# Classes


def cases():
    """Each metric with the arguments of three updates, and the result for all of them together."""
    leak, reached = values(24, 1), values(24, 2)
    known = reached.nan_to_num(0.5)
    effort, spent = censored(24, 3)
    parts = [slice(0, 5), slice(5, 6), slice(6, 24)]
    analysed = leak[~leak.isnan()]
    apart = leak - reached
    return [
        (partial(Exposure, "mean"), [(known[p], 0 * known[p]) for p in parts], summary(known, "mean")),
        (partial(Ceiling, "mean"), [(leak[p],) for p in parts], analysed.mean()),
        (partial(Ceiling, "worst"), [(leak[p],) for p in parts], analysed.max()),
        (partial(NoiseToHide, "p90"), [(leak[p],) for p in parts], summary(analysed, "p90")),
        (BracketGap, [(leak[p], reached[p]) for p in parts], apart.nanmean()),
        (partial(Effort, 0.3), [(effort[p], spent[p]) for p in parts], effort_quantile(effort, spent, share=0.3)),
    ]


@pytest.mark.parametrize("index", range(6))
def test_updates_in_parts_and_merged_states_equal_all_at_once(index):
    make, parts, expected = cases()[index]
    assert math.isfinite(float(expected))
    one = make()
    for part in parts:
        one.update(*part)
    assert float(one.compute()) == pytest.approx(float(expected), abs=1e-6)
    if not hasattr(one, "merge_state"):
        pytest.skip("torchmetrics merges states from 1.5 on")
    left, right = make(), make()
    left.update(*parts[0])
    left.update(*parts[1])
    right.update(*parts[2])
    right.merge_state(left)
    assert float(right.compute()) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("index", range(6))
def test_processes_are_gathered_unless_told_not_to(index):
    """A second process is played by a function in the place of the collective."""
    make, parts, expected = cases()[index]
    other = make()
    for part in parts[:2]:
        other.update(*part)
    held = [torch.cat(getattr(other, name)) for name in other._defaults]
    waiting = list(held)

    def gathered(tensor, group=None):
        return [waiting.pop(0), tensor]

    here = make()
    here.update(*parts[2])
    for sync in (True, False):
        options = {"dist_sync_fn": gathered, "distributed_available_fn": lambda: True}
        metric = make(sync_on_compute=sync, **options)
        metric.update(*parts[2])
        assert float(metric.compute()) == pytest.approx(float(expected if sync else here.compute()), abs=1e-6)
        assert not waiting


def test_an_effort_that_was_not_reached_can_be_plotted():
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    metric = Effort()
    metric.update(torch.tensor([INF]), 100)
    figure, axes = metric.plot()
    assert axes.get_ylim()[0] <= 0
    plt.close(figure)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Ceiling().update(torch.tensor([1.2])), r"leak_r2: expected values in \[0, 1\]"),
        (lambda: Ceiling().update(torch.tensor(0.5)), "leak_r2: expected one value for each image"),
        (lambda: NoiseToHide().update(torch.tensor([-1.0])), "noise"),
        (lambda: Ceiling("median"), "statistic"),
        (lambda: BracketGap().update(torch.zeros(2), torch.zeros(3)), "ceiling and exposure"),
        (lambda: BracketGap().update(torch.zeros(1), torch.ones(1) * 2), "exposure"),
        (lambda: effort_quantile(torch.tensor([50.0]), 40), "effort"),
        (lambda: effort_quantile(torch.tensor([50.0]), torch.ones(3)), "spent"),
        (lambda: Effort(share=1.5), "share"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(call, named):
    with pytest.raises(InvalidInputError, match=named):
        call()
