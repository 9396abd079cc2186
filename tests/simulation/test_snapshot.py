"""The true gradient: `Snapshot.from_batch` against a hand-written backward pass, and what it must not change."""

from __future__ import annotations

import copy
import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_gradaudit import ClipNorm, GaussianNoise, Snapshot
from lightning_gradaudit.audit.self_test import SELF_TEST_TOLERANCE, self_test_tolerance
from lightning_gradaudit.errors import InvalidInputError, NonFiniteGradientError
from lightning_gradaudit.simulation.normalization import Normalization
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.sharing import SharingProtocol
from lightning_gradaudit.utils.tensors import global_norm

CROSS_ENTROPY = functional.cross_entropy


def make_batch(size=4, channels=1, side=8, classes=3, seed=5):
    random_numbers = torch.Generator().manual_seed(seed)
    images = torch.rand((size, channels, side, side), generator=random_numbers)
    return images, torch.randint(classes, (size,), generator=random_numbers)


def oracle_gradient(model, batch, *, train, loss=CROSS_ENTROPY, rng_state=None):
    """An ordinary training step on a copy: forward, loss.backward(), p.grad."""
    model = copy.deepcopy(model).train(train)
    with torch.random.fork_rng():
        if rng_state is not None:
            torch.set_rng_state(rng_state)
        loss(model(batch[0]), batch[1]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def relative_difference(got, expected):
    assert set(got) == set(expected)
    flat = [torch.cat([tensors[name].flatten() for name in expected]) for tensors in (got, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def frozen_first_layer(model):
    next(model.parameters()).requires_grad_(False)
    return model


CASES = [
    pytest.param("mlp", False, None, id="eval"),
    pytest.param("conv", True, None, id="convolutions"),
    pytest.param("batchnorm", True, None, id="BatchNorm in train mode"),
    pytest.param("batchnorm", False, None, id="BatchNorm in eval mode"),
    pytest.param("dropout", True, None, id="dropout in train mode"),
    pytest.param("dropout", False, None, id="dropout in eval mode"),
    pytest.param("mlp", True, frozen_first_layer, id="frozen parameter"),
    pytest.param("tied", True, None, id="tied weights"),
]


@pytest.mark.parametrize(("kind", "train", "change"), CASES)
def test_the_gradient_equals_that_of_an_ordinary_training_step(build, kind, train, change):
    model = build(kind, side=8, classes=3)
    model = change(model) if change else model
    batch = make_batch()
    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, mode="train" if train else "eval", seed=9)
    expected = oracle_gradient(model, batch, train=train, rng_state=snapshot.protocol.micro_batches[0].rng_state)
    assert relative_difference(snapshot.observation.gradients, expected) < 1e-6
    assert snapshot.self_test().error < 1e-6


def test_frozen_parameters_share_no_gradient_but_are_known_to_the_adversary(build):
    model = frozen_first_layer(build("mlp", side=8))
    observation = Snapshot.from_batch(model, make_batch(classes=2), loss=CROSS_ENTROPY).observation
    assert "1.weight" not in observation.gradients
    assert torch.equal(observation.parameters["1.weight"], model[1].weight)


class Attention(nn.Module):
    """Fused attention, as in every vision transformer; on the CPU torch tags its kernel as random."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        tokens = self.embed(x.reshape(len(x), 1, 4, 16))
        return self.head(functional.scaled_dot_product_attention(tokens, tokens, tokens).flatten(1))


@pytest.mark.parametrize("train", [True, False])
def test_fused_attention_without_dropout_is_simulated(train):
    model, batch = Attention(), make_batch()
    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, mode="train" if train else "eval")
    assert relative_difference(snapshot.observation.gradients, oracle_gradient(model, batch, train=train)) < 1e-6


def test_mode_as_is_keeps_the_flag_of_each_submodule(build):
    model = nn.Sequential(build("batchnorm", side=8), nn.Dropout(0.5)).train()
    model[0].eval()
    batch = make_batch(classes=2)
    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, mode="as_is")
    reference = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.set_rng_state(snapshot.protocol.micro_batches[0].rng_state)
        CROSS_ENTROPY(reference(batch[0]), batch[1]).backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    assert relative_difference(snapshot.observation.gradients, expected) < 1e-6
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_double_precision_models_are_audited_in_double(build):
    model = build("mlp", side=8, classes=3).double()
    images, labels = make_batch()
    snapshot = Snapshot.from_batch(model, (images.double(), labels), loss=CROSS_ENTROPY)
    expected = oracle_gradient(model, (images.double(), labels), train=False)
    assert snapshot.observation.gradients["1.weight"].dtype == torch.float64
    assert relative_difference(snapshot.observation.gradients, expected) < 1e-14


@pytest.mark.parametrize("mode", ["train", "eval", "as_is"])
@pytest.mark.parametrize("kind", ["batchnorm", "dropout", "tied"])
def test_taking_a_snapshot_leaves_the_model_exactly_as_it_was(build, kind, mode):
    model = build(kind, side=8, classes=3).train()
    model[2].eval() if kind != "tied" else None
    batch = make_batch()
    CROSS_ENTROPY(model(batch[0]), batch[1]).backward()
    calls = []
    handle = next(model.modules()).register_forward_hook(lambda *_: None)
    next(model.parameters()).register_hook(calls.append)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    identities = [id(p) for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    attributes = [sorted(m.__dict__) for m in model.modules()]

    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, mode=mode)
    snapshot.self_test()

    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert [id(p) for p in model.parameters()] == identities
    assert [m.training for m in model.modules()] == flags
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert calls == []
    handle.remove()


def test_later_training_does_not_reach_into_a_snapshot(build):
    model, batch = build("batchnorm", side=8, classes=3), make_batch()
    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, mode="train")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers(), *batch):
            tensor.zero_()
    assert snapshot.self_test().error < 1e-6


class DrawsFromEverywhere(nn.Module):
    """Augments in its forward pass, with the generators of torch, NumPy and Python."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = functional.dropout(x, 0.3, training=self.training) + 0.01 * torch.randn_like(x)
        return self.head(x.flatten(1)) * (1 + 0.1 * np.random.rand() + 0.1 * random.random())


@pytest.mark.parametrize("library", ["torch", "numpy", "python"])
def test_no_global_random_state_moves(library):
    model, batch = DrawsFromEverywhere().train(), make_batch()
    states = {
        "torch": lambda: torch.get_rng_state().tolist(),
        "numpy": lambda: [np.random.get_state()[1].tolist(), np.random.get_state()[2]],
        "python": random.getstate,
    }
    before = states[library]()
    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, mode="train")
    snapshot.observation.simulate(*batch)
    assert states[library]() == before


def test_dict_and_list_batches_give_the_same_gradient(build):
    model, (images, labels) = build("mlp", side=8, classes=3), make_batch()
    layouts = [(images, labels), [images, labels], {"label": labels, "img": images, "id": labels.float()}]
    gradients = [Snapshot.from_batch(model, b, loss=CROSS_ENTROPY).observation.gradients for b in layouts]
    for other in gradients[1:]:
        assert relative_difference(other, gradients[0]) == 0


def test_the_self_test_notices_another_mode(build):
    snapshot = Snapshot.from_batch(
        build("batchnorm", side=8, classes=3), make_batch(), loss=CROSS_ENTROPY, mode="train"
    )
    snapshot.observation.client.module.eval()
    assert snapshot.self_test().error > 0.1


def test_the_self_test_notices_weights_after_the_step(build):
    snapshot = Snapshot.from_batch(build("mlp", side=8, classes=3), make_batch(), loss=CROSS_ENTROPY)
    gradients = snapshot.observation.gradients
    stepped = {name: p - 0.5 * gradients[name] for name, p in snapshot.observation.parameters.items()}
    late = replace(snapshot, observation=replace(snapshot.observation, parameters=stepped))
    assert late.self_test().error > 0.05


def test_the_self_test_notices_other_inputs(build):
    snapshot = Snapshot.from_batch(build("mlp", side=8, classes=3), make_batch(), loss=CROSS_ENTROPY)
    flipped = replace(snapshot, truth=replace(snapshot.truth, inputs=snapshot.truth.inputs.flip(-1)))
    assert flipped.self_test().error > 0.05


def test_the_self_test_notices_another_dropout_mask(build):
    snapshot = Snapshot.from_batch(build("dropout", side=8, classes=3), make_batch(), loss=CROSS_ENTROPY, mode="train")
    state = torch.Generator().manual_seed(77).get_state()
    other = replace(snapshot, protocol=SharingProtocol.one_batch(len(snapshot.truth.inputs), state))
    assert other.self_test().error > 0.05


@pytest.mark.parametrize("defence", [ClipNorm(max_norm=1e-2), GaussianNoise(relative=2.0)], ids=repr)
def test_the_self_test_repeats_the_declared_defence_and_measures_its_gap(build, defence):
    model, batch = build("mlp", side=8, classes=3), make_batch()
    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, defences=(defence,), seed=3)
    clean = oracle_gradient(model, batch, train=False)
    shared = snapshot.observation.gradients
    gap = global_norm({n: shared[n] - clean[n] for n in clean}) / global_norm(shared)
    assert snapshot.self_test().error < 1e-5
    assert snapshot.self_test().defence_gap == pytest.approx(float(gap), rel=1e-3)
    assert float(gap) > 0.5
    undeclared = replace(snapshot.observation, threat_model=replace(snapshot.observation.threat_model, defences=()))
    assert replace(snapshot, observation=undeclared).self_test().error > 0.5


def test_the_adversarys_random_state_does_not_reveal_the_defences_noise(build):
    """The client's noise must come from a stream that the shared dropout seed does not open."""
    model, batch = build("mlp", side=8, classes=3), make_batch()
    snapshot = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, defences=(GaussianNoise(std=1.0),), seed=3)
    guess = torch.Generator()
    guess.set_state(snapshot.observation.protocol.micro_batches[0].rng_state)
    clean = oracle_gradient(model, batch, train=False)
    for name, shared in snapshot.observation.gradients.items():
        guessed = torch.randn(shared.shape, generator=guess)
        correlation = torch.corrcoef(torch.stack([guessed.flatten(), (shared - clean[name]).flatten()]))[0, 1]
        assert shared.numel() < 100 or abs(float(correlation)) < 0.2


def test_labels_reach_the_adversary_only_when_the_threat_model_says_so(build):
    model, batch = build("mlp", side=8, classes=3), make_batch()
    hidden = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY)
    given = Snapshot.from_batch(model, batch, loss=CROSS_ENTROPY, labels_known=True)
    assert hidden.observation.labels is None
    assert torch.equal(given.observation.labels, batch[1])


def test_targets_that_are_no_classes_are_given_away_and_the_record_says_so(build):
    images, labels = make_batch()
    soft = functional.one_hot(labels, 3).float()
    observation = Snapshot.from_batch(build("mlp", side=8, classes=3), (images, soft), loss=CROSS_ENTROPY).observation
    assert observation.threat_model.labels_known
    assert torch.equal(observation.labels, soft)


def test_a_saved_snapshot_loads_with_every_value_and_still_simulates(build, tmp_path):
    model = build("dropout", side=8, classes=3)
    saved = Snapshot.from_batch(
        model, make_batch(), loss=CROSS_ENTROPY, mode="train", defences=(GaussianNoise(std=0.1),), seed=5, step=42
    )
    saved.save(tmp_path / "a.snapshot")
    loaded = Snapshot.load(tmp_path / "a.snapshot", trust=True)
    assert (loaded.step, loaded.seed) == (42, 5)
    assert loaded.observation.threat_model == saved.observation.threat_model
    assert torch.equal(loaded.truth.inputs, saved.truth.inputs)
    assert torch.equal(loaded.truth.labels, saved.truth.labels)
    assert relative_difference(loaded.observation.gradients, saved.observation.gradients) == 0
    assert loaded.self_test() == saved.self_test()
    assert loaded.self_test().error < 1e-5


def torch_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not a snapshot", id="text"),
        pytest.param(b"c\nb\n", id="text that begins like a pickle"),
        pytest.param(b'{"kind": "run"}\n', id="JSON"),
        pytest.param(bytes(range(256)) * 4, id="bytes"),
        pytest.param(torch_file({"state_dict": {}}), id="a checkpoint"),
        pytest.param(torch_file([1])[:-40], id="a truncated archive"),
    ],
)
def test_loading_another_file_is_an_error_that_names_the_path(tmp_path, content):
    path = tmp_path / "wrong.snapshot"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"path: .*wrong\.snapshot"):
        Snapshot.load(path, trust=True)


def test_loading_a_missing_file_is_an_error_that_names_the_path(tmp_path):
    with pytest.raises(InvalidInputError, match=r"path: .*absent\.snapshot"):
        Snapshot.load(tmp_path / "absent.snapshot")


@pytest.mark.parametrize("scale", [255.0, -1.0, float("nan")])
def test_images_outside_the_unit_range_need_their_normalisation(build, scale):
    images, labels = make_batch()
    with pytest.raises(InvalidInputError, match=r"mean= and std="):
        Snapshot.from_batch(build("mlp", side=8, classes=3), (images * scale, labels), loss=CROSS_ENTROPY)


def test_normalised_images_come_back_as_the_pixels_they_were(build):
    pixels, labels = make_batch(channels=3)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    inputs = torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    model = build("mlp", channels=3, side=8, classes=3)
    snapshot = Snapshot.from_batch(model, (inputs, labels), loss=CROSS_ENTROPY, mean=mean, std=std)
    torch.testing.assert_close(snapshot.truth_pixels, pixels)
    low, high = snapshot.observation.box
    np.testing.assert_allclose(low.flatten(), [-m / s for m, s in zip(mean, std, strict=True)], rtol=1e-6)
    np.testing.assert_allclose(high.flatten(), [(1 - m) / s for m, s in zip(mean, std, strict=True)], rtol=1e-6)


def test_a_normalisation_for_other_channels_is_refused_by_name(build):
    with pytest.raises(InvalidInputError, match=r"mean/std: expected 1 or 1 values .*got 3"):
        Snapshot.from_batch(build("mlp", side=8, classes=3), make_batch(), loss=CROSS_ENTROPY, mean=[0.5, 0.5, 0.5])


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_a_standard_deviation_that_is_not_positive_is_refused_by_name(std):
    with pytest.raises(InvalidInputError, match="std:"):
        Normalization.of(0.0, [1.0, std])


def test_a_gradient_that_is_not_finite_is_an_error_of_its_own(build):
    model = build("mlp", side=8, classes=3)
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteGradientError, match="NaN"):
        Snapshot.from_batch(model, make_batch(), loss=CROSS_ENTROPY)


def test_an_empty_batch_is_refused_by_name(build):
    images, labels = make_batch()
    with pytest.raises(InvalidInputError, match="batch"):
        Snapshot.from_batch(build("mlp", side=8, classes=3), (images[:0], labels[:0]), loss=CROSS_ENTROPY)


def test_an_observation_of_gradients_without_weights_is_refused(snap):
    observation = snap("mlp").observation
    with pytest.raises(InvalidInputError, match=r"gradients: .*ghost"):
        replace(observation, gradients=dict(observation.gradients) | {"ghost": torch.zeros(1)})
    with pytest.raises(InvalidInputError, match=r"gradients: .*given: 0"):
        replace(observation, gradients={})


def test_the_simulated_gradient_is_differentiable_in_the_images_and_matches_a_finite_difference(snap):
    snapshot = snap("sigmoid", batch=2)
    observation: Observation = snapshot.observation
    double = replace(
        observation,
        parameters={n: p.double() for n, p in observation.parameters.items()},
        input_dtype=torch.float64,
    )
    inputs = snapshot.truth.inputs.double()
    probe = {
        n: torch.randn(g.shape, generator=torch.Generator().manual_seed(1)).double()
        for n, g in observation.gradients.items()
    }

    def inner(x):
        simulated = double.simulate(x, snapshot.truth.labels)
        return sum((simulated[n] * probe[n]).sum() for n in probe)

    x = inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(inner(x), x)
    direction = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2)).double()
    step = 1e-5
    finite = (inner(inputs + step * direction) - inner(inputs - step * direction)) / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(float(finite), rel=1e-5)


def test_a_gradient_of_another_kind_of_device_is_known_as_reduced_precision_is(snap):
    """A GPU multiplies in TF32; on the kind of device that it was computed on, nothing is forgiven."""
    snapshot = snap("conv")
    assert self_test_tolerance(snapshot.observation) == SELF_TEST_TOLERANCE["32-true"]
    moved = snapshot.to("meta")
    assert self_test_tolerance(moved.observation) == 5e-2
    assert moved.observation.to("meta").computed_on == "cpu"
    assert self_test_tolerance(snapshot.to("cpu").observation) == SELF_TEST_TOLERANCE["32-true"]
