"""Batch statistics from running statistics, against means and variances computed by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from skimage.data import lfw_subset
from torch import nn
from torch.nn import functional

from lightning_gradaudit import Budget, Snapshot, ThreatModel, audit_snapshot
from lightning_gradaudit.capture.loop import record_step
from lightning_gradaudit.simulation.batch_statistics import solve_statistics
from lightning_gradaudit.simulation.snapshot import SelfTest

KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def buffers_of(module):
    return {name: b.clone() for name, b in module.named_buffers()}


def solved(module, batches):
    """Pass batches through a module, and solve for what went in."""
    before = buffers_of(module)
    for batch in batches:
        module(batch)
    return solve_statistics(module, before, buffers_of(module), passes=len(batches))


def batches(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    return [(torch.randn(shape, generator=generator) + 0.7 * at) * scale for at in range(1, count + 1)]


def weighted(values, weights):
    return sum(w * v for w, v in zip(weights, values, strict=True))


@pytest.mark.parametrize("momentum", [0.1, 0.03, 0.9, 1.0, None])
@pytest.mark.parametrize(
    "shape", [(4, 5), (4, 5, 7), (2, 5, 6, 6), (2, 5, 1, 1), (2, 5, 3, 3, 3)], ids=lambda shape: str(len(shape))
)
def test_one_pass_gives_the_mean_and_the_unbiased_variance(momentum, shape):
    layer = KINDS[max(1, len(shape) - 2)](5, momentum=momentum)
    (images,) = batches(1, shape)
    found = solved(layer, [images])[""]
    values = images.transpose(0, 1).flatten(1).double()
    assert torch.allclose(found.mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.variance.double(), values.var(1, correction=1), rtol=1e-5, atol=1e-5)
    assert found.weights == pytest.approx((1.0,))
    assert found.error([images]) == 0


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_several_passes_give_their_weighted_mean(momentum):
    layer = nn.BatchNorm2d(3, momentum=momentum)
    layer(batches(1, (4, 3, 5, 5), seed=9)[0])
    seen = batches(5, (4, 3, 5, 5))
    found = solved(layer, seen)[""]
    raw = [1.0] * 5 if momentum is None else [(1 - momentum) ** (4 - k) for k in range(5)]
    weights = [w / sum(raw) for w in raw]
    assert found.weights == pytest.approx(weights)
    expected = weighted([b.double().mean((0, 2, 3)) for b in seen], weights)
    assert torch.allclose(found.mean.double(), expected, rtol=1e-5, atol=1e-5)
    expected = weighted([b.double().var((0, 2, 3)) for b in seen], weights)
    assert torch.allclose(found.variance.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.error(seen) == 0
    assert found.error(seen[::-1]) == 0 if momentum is None else found.error(seen[::-1]) > 1e-2


def test_a_layer_that_counts_no_passes_takes_their_number():
    layer = nn.BatchNorm2d(3)
    layer.num_batches_tracked = None
    seen = batches(2, (4, 3, 5, 5))
    found = solved(layer, seen)[""]
    assert found.weights == pytest.approx((0.9 / 1.9, 1 / 1.9))
    assert found.error(seen) == 0


def test_eval_mode_tells_nothing_and_frozen_weights_tell_as_much_as_trained_ones():
    still, frozen = nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3).requires_grad_(requires_grad=False)
    (images,) = batches(1, (4, 3, 5, 5))
    found = solved(nn.Sequential(still, frozen), [images])
    assert list(found) == ["1"]
    assert torch.allclose(found["1"].mean, still(images).mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, momentum=0.0),
        nn.InstanceNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 5, 5]),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_tell_nothing(layer):
    assert solved(layer, batches(1, (4, 4, 5, 5))) == {}


def test_synchronised_layers_tell_the_statistics_of_all_images():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    (images,) = batches(1, (8, 3, 5, 5))
    found = solved(model, [images])["0"]
    assert isinstance(model[0], nn.SyncBatchNorm)
    assert torch.allclose(found.mean, images.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.variance, images.var((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_a_pass_that_checkpointing_repeats_counts_once():
    layer = nn.BatchNorm2d(3)
    first, second = batches(2, (4, 3, 5, 5))
    found = solved(layer, [first, first, second, second])[""]
    assert found.error([first, second]) == 0
    assert found.error([second, first]) > 1e-2


def test_the_stated_rounding_covers_what_a_long_average_has_lost():
    layer = nn.BatchNorm2d(64, momentum=None)
    layer.num_batches_tracked.fill_(200_000)
    (images,) = batches(1, (4, 64, 5, 5))
    layer.running_mean.copy_(images.mean((0, 2, 3)) + 0.3)
    layer.running_var.copy_(images.var((0, 2, 3)) * 1.3)
    found = solved(layer, [images])[""]
    off = (found.mean - images.mean((0, 2, 3))).abs()
    assert off.max() > 1e-3  # so much is lost
    assert (off <= 4 * found.mean_error).all()
    assert found.error([images]) == 0


# In snapshots


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 100, 2),
    )  # fmt: skip


def faces(count=4):
    return torch.from_numpy(lfw_subset()[:count]).float()[:, None], torch.arange(count) % 2


def recorded(model, **arguments):
    """Record a step of a hand-written loop."""
    images, labels = faces()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record_step(model, (images, labels), loss=functional.cross_entropy, **arguments) as step:
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return step.snapshot


def shared(model=None):
    return recorded(net() if model is None else model, threat_model=ThreatModel(buffers_shared=True))


def test_a_recorded_step_gives_the_statistics_of_every_layer_and_passes_its_self_test():
    model = net()
    start = copy.deepcopy(model)
    snapshot = shared(model)
    found = snapshot.observation.statistics
    images, _ = faces()
    first = start[0](images)
    second = start[3](start[2](start[1](first)))
    for name, values in (("1", first), ("4", second)):
        assert torch.allclose(found[name].mean, values.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        assert torch.allclose(found[name].variance, values.var((0, 2, 3)), rtol=1e-5, atol=1e-5)
    test = snapshot.self_test()
    assert test.error < 1e-5
    assert test.statistics < 1e-5


def test_by_default_gradients_travel_alone():
    snapshot = recorded(net())
    assert snapshot.observation.buffers_after is None
    assert snapshot.observation.statistics == {}
    assert snapshot.self_test().statistics == 0
    assert not ThreatModel().shares_buffers
    assert ThreatModel(view="delta").shares_buffers
    assert not ThreatModel(view="delta", buffers_shared=False).shares_buffers
    assert replace(ThreatModel(), view="delta").shares_buffers


@pytest.mark.parametrize("change", ["momentum", "eval", "more"])
def test_the_self_test_finds_a_replay_with_other_buffers(change):
    snapshot = shared()
    client = copy.deepcopy(snapshot.observation.client)
    if change == "momentum":
        client.module[4].momentum = 0.1
    after = dict(snapshot.observation.buffers_after)
    if change == "eval":  # buffers that did not move although the layer is in train mode
        after |= {name: b for name, b in snapshot.observation.buffers.items() if name.startswith("4.")}
    if change == "more":  # another batch passed between
        after["4.running_mean"] = 0.7 * after["4.running_mean"] + 0.3
        after["4.num_batches_tracked"] = after["4.num_batches_tracked"] + 1
    wrong = replace(snapshot, observation=replace(snapshot.observation, client=client, buffers_after=after))
    test = wrong.self_test()
    assert test.error < 1e-5
    assert test.statistics > 1e-2
    record = audit_snapshot(wrong, budget=Budget(evaluations=1))
    assert not record.valid
    assert "buffers after the step" in record.reason


def test_a_snapshot_of_a_batch_shares_the_buffers_it_is_told_to():
    images, labels = faces()
    model = net()
    snapshot = Snapshot.from_batch(
        model, (images, labels), loss=functional.cross_entropy, mode="train", buffers_shared=True
    )
    assert all(int(b) == 1 for n, b in snapshot.observation.buffers_after.items() if n.endswith("tracked"))
    assert all(int(b) == 0 for n, b in model.named_buffers() if n.endswith("tracked"))  # the model is as it was
    assert snapshot.self_test().statistics < 1e-5
    first = model[0](images)
    assert torch.allclose(snapshot.observation.statistics["1"].mean, first.mean((0, 2, 3)), atol=1e-5)
    less = snapshot.with_batch_size(2)
    assert torch.allclose(less.observation.statistics["1"].mean, first[:2].mean((0, 2, 3)), atol=1e-5)


def test_a_gradient_that_is_not_finite_fails_the_self_test_whatever_the_buffers_say():
    nan = math.nan
    assert math.isnan(SelfTest(nan, 0.0, 1.0, statistics=1e-7).worst)
    assert math.isnan(SelfTest(1e-7, 0.0, 1.0, statistics=nan).worst)
    assert SelfTest(1e-7, 0.0, 1.0, statistics=math.inf).worst == math.inf
    assert SelfTest(1e-7, 0.0, 1.0).worst == 1e-7
