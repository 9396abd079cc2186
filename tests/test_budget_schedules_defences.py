"""Budget, schedules and defences against hand-computed values."""

from __future__ import annotations

import math
import time

import pytest
import torch

from lightning_gradaudit import AtSteps, Budget, ClipNorm, EveryNSteps, GaussianNoise
from lightning_gradaudit.attacks.budget import Meter
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.defences import Defence, apply_defences, derived_seed
from lightning_gradaudit.utils.tensors import global_norm


@pytest.fixture
def gradients():
    random = torch.Generator().manual_seed(3)
    return {"weight": torch.randn(40, 50, generator=random), "bias": torch.randn(40, generator=random)}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "evaluations="),
        ({"evaluations": 0}, "evaluations="),
        ({"evaluations": -3}, "evaluations="),
        ({"evaluations": True}, "evaluations="),
        ({"evaluations": 2.5}, "evaluations="),
        ({"seconds": 0}, "seconds="),
        ({"seconds": math.inf}, "seconds="),
        ({"seconds": math.nan}, "seconds="),
    ],
)
def test_a_budget_that_bounds_nothing_is_refused_by_name(arguments, named):
    with pytest.raises(InvalidInputError, match=named):
        Budget(**arguments)


def test_a_meter_is_exhausted_exactly_at_its_evaluations():
    meter = Meter(Budget(evaluations=3))
    states = []
    for _ in range(3):
        states.append((meter.remaining, meter.exhausted))
        meter.spend()
    assert states == [(3, False), (2, False), (1, False)]
    assert (meter.remaining, meter.exhausted, meter.evaluations) == (0, True, 3)


def test_a_meter_ends_by_the_clock_when_only_seconds_are_limited(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = Meter(Budget(seconds=2.0))
    meter.spend(10_000)
    assert (meter.remaining, meter.exhausted) == (math.inf, False)
    now = 102.0
    assert meter.exhausted
    assert meter.seconds == 2.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (EveryNSteps(1), [0, 1, 2, 3, 4, 5, 6, 7]),
        (EveryNSteps(3), [0, 3, 6]),
        (EveryNSteps(3, offset=2), [2, 5]),
        (AtSteps([7, 1, 1]), [1, 7]),
        (AtSteps([]), []),
    ],
    ids=repr,
)
def test_a_schedule_is_a_pure_function_of_the_step(schedule, expected):
    assert [step for step in range(8) if schedule(step)] == expected
    assert [step for step in reversed(range(8)) if schedule(step)] == expected[::-1]


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_a_schedule_that_never_or_fractionally_samples_is_refused(n):
    with pytest.raises(InvalidInputError, match="every_n_steps"):
        EveryNSteps(n)


def test_the_global_norm_is_the_norm_of_everything_in_one_vector(gradients):
    flat = torch.cat([t.flatten() for t in gradients.values()])
    assert float(global_norm(gradients)) == pytest.approx(float(flat.norm()), rel=1e-6)


@pytest.mark.parametrize("relative", [0.3, 10.0])
def test_relative_noise_has_the_declared_share_of_the_gradients_norm(gradients, generator, relative):
    noisy = GaussianNoise(relative=relative)(gradients, generator=generator)
    noise = {name: noisy[name] - gradients[name] for name in gradients}
    # 2040 coordinates: the norm of Gaussian noise varies by 1.6 % around its expectation.
    assert float(global_norm(noise) / global_norm(gradients)) == pytest.approx(relative, rel=0.08)
    assert float(noise["bias"].std() / noise["weight"].std()) == pytest.approx(1, abs=0.5)


def test_absolute_noise_has_the_declared_standard_deviation(gradients, generator):
    noisy = GaussianNoise(std=0.25)(gradients, generator=generator)
    assert float((noisy["weight"] - gradients["weight"]).std()) == pytest.approx(0.25, rel=0.06)


@pytest.mark.parametrize("share", [0.1, 0.999, 1.0, 5.0])
def test_clipping_scales_the_whole_gradient_to_the_limit_and_never_up(gradients, generator, share):
    norm = float(global_norm(gradients))
    clipped = ClipNorm(max_norm=share * norm)(gradients, generator=generator)
    assert float(global_norm(clipped)) == pytest.approx(min(share, 1) * norm, rel=1e-5)
    for name, original in gradients.items():
        torch.testing.assert_close(clipped[name], min(share, 1.0) * original)


def test_clipping_a_zero_gradient_leaves_it_zero(generator):
    assert ClipNorm(max_norm=1.0)({"w": torch.zeros(3)}, generator=generator)["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "defence", [GaussianNoise(std=1.0), GaussianNoise(relative=1.0), ClipNorm(max_norm=0.1)], ids=repr
)
def test_a_defence_leaves_the_gradient_it_was_given_alone(gradients, generator, defence):
    before = {name: t.clone() for name, t in gradients.items()}
    shared = defence(gradients, generator=generator)
    assert isinstance(defence, Defence)
    for name, original in before.items():
        assert torch.equal(gradients[name], original)
        assert not torch.equal(shared[name], original)


def test_defences_run_in_order_and_repeat_with_their_seed(gradients):
    both = (ClipNorm(max_norm=1.0), GaussianNoise(std=0.5))
    once, again, other = (apply_defences(both, gradients, seed=seed) for seed in (4, 4, 5))
    random = torch.Generator().manual_seed(derived_seed(4, "defence"))
    scale = 1.0 / float(torch.cat([t.flatten() for t in gradients.values()]).norm())
    for name, original in gradients.items():
        torch.testing.assert_close(once[name], scale * original + 0.5 * torch.randn(original.shape, generator=random))
        assert torch.equal(once[name], again[name])
        assert not torch.equal(once[name], other[name])


def test_defences_do_not_touch_the_global_random_state(gradients):
    before = torch.get_rng_state()
    apply_defences((GaussianNoise(std=1.0),), gradients, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GaussianNoise(), "relative= and std="),
        (lambda: GaussianNoise(relative=1.0, std=1.0), "relative= and std="),
        (lambda: GaussianNoise(std=-1.0), "std="),
        (lambda: GaussianNoise(relative=math.nan), "relative="),
        (lambda: ClipNorm(max_norm=0.0), "max_norm="),
        (lambda: ClipNorm(max_norm=math.nan), "max_norm="),
    ],
)
def test_a_defence_without_a_strength_is_refused_by_name(make, named):
    with pytest.raises(InvalidInputError, match=named):
        make()
