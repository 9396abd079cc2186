"""The replayed training step: what it computes, what it refuses, and that the truth is not inside it."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping
from typing import Any

import cloudpickle
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import stochastic_depth

from lightning_gradaudit import Snapshot
from lightning_gradaudit.errors import InvalidInputError, ReplayError, UnsupportedError
from lightning_gradaudit.simulation.batch import BatchLayout
from lightning_gradaudit.simulation.replay import ReplayedRandomness
from lightning_gradaudit.simulation.training_step import TrainingStep

CLASSES = 10


class Lit(pl.LightningModule):
    """A LightningModule whose step does what users' steps do."""

    def __init__(self, returns="tensor"):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))
        self.net(torch.zeros(1, 1, 8, 8))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.returns = returns

    def training_step(self, batch, batch_idx):
        images, labels = (batch["image"], batch["label"]) if isinstance(batch, Mapping) else (batch[0], batch[-1])
        logits = self.net(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=0.1)
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy, on_step=True)
        self.log_dict({"loss": loss})
        return {"loss": loss, "logits": logits} if self.returns == "dict" else loss


def make_batch(size=8):
    images = torch.rand((size, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return images, torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])[:size]


@pytest.fixture
def lit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Lit()


def gradient_by_hand(module, images, labels):
    net = copy.deepcopy(module.net)
    functional.cross_entropy(net(images), labels, label_smoothing=0.1).backward()
    return {f"net.{name}": p.grad for name, p in net.named_parameters()}


def largest_difference(got, expected):
    assert set(got) == set(expected)
    return max(float((got[n] - g).norm() / g.norm()) for n, g in expected.items())


LAYOUTS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "list with an extra tensor between": lambda x, y: [x, torch.rand(len(x), 3), y],
    "dict": lambda x, y: {"image": x, "label": y},
    "dict with extras": lambda x, y: {"id": torch.arange(len(x)), "label": y, "path": "x.png", "image": x},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_a_training_step_with_logging_and_metrics_is_replayed_exactly(layout, returns):
    module = Lit(returns)
    images, labels = make_batch()
    snapshot = Snapshot.from_batch(module, LAYOUTS[layout](images, labels))
    assert largest_difference(snapshot.observation.gradients, gradient_by_hand(module, images, labels)) < 1e-6


def test_a_training_step_without_batch_index_is_replayed(lit):
    class NoIndex(Lit):
        def training_step(self, batch):
            return functional.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=0.1)

    module, (images, labels) = NoIndex(), make_batch()
    gradients = Snapshot.from_batch(module, (images, labels)).observation.gradients
    assert largest_difference(gradients, gradient_by_hand(module, images, labels)) < 1e-6


def test_the_users_metrics_are_not_updated_and_the_replicas_do_not_pile_up(lit):
    images, labels = make_batch()
    lit.accuracy.update(functional.one_hot(labels, CLASSES).float(), labels)
    observation = Snapshot.from_batch(lit, (images, labels)).observation
    for _ in range(3):
        observation.simulate(images, labels)
    assert lit.accuracy.compute() == 1.0
    assert int(lit.accuracy.tp.sum()) == 8
    assert int(observation.client.module.accuracy.tp.sum()) == 0


def test_a_training_step_may_be_replayed_with_another_loss(lit):
    images, labels = make_batch()
    lit.forward = lit.net.forward
    module = lit.net
    squared = lambda logits, y: ((logits - functional.one_hot(y, CLASSES)) ** 2).mean()
    got = Snapshot.from_batch(module, (images, labels), loss=squared).observation.gradients
    reference = copy.deepcopy(module)
    squared(reference(images), labels).backward()
    assert largest_difference(got, {n: p.grad for n, p in reference.named_parameters()}) < 1e-6


# What cannot be replayed


def replace_step(module, step):
    module.__class__ = type("Custom", (type(module),), {"training_step": step})
    return module


@pytest.mark.parametrize(
    ("step", "says"),
    [
        pytest.param(
            lambda self, batch, i: self.net(batch[0]).mean() * self.trainer.max_epochs, r"self\.trainer", id="trainer"
        ),
        pytest.param(lambda self, batch, i: None, "no loss", id="manual optimization"),
        pytest.param(lambda self, batch, i: {"logits": self.net(batch[0])}, "no loss", id="dict without loss"),
        pytest.param(lambda self, batch, i: batch[2].sum(), "IndexError", id="the user's own error"),
    ],
)
def test_a_step_that_cannot_be_replayed_says_so_and_names_the_way_out(lit, step, says):
    with pytest.raises(ReplayError, match=rf"(?s){says}.*loss=|loss=.*{says}"):
        Snapshot.from_batch(replace_step(lit, step), make_batch())


def test_a_loss_that_is_not_a_scalar_is_refused_by_name(lit):
    with pytest.raises(InvalidInputError, match=r"loss: expected a scalar tensor, got a tensor of shape \(8,\)"):
        Snapshot.from_batch(lit.net, make_batch(), loss=lambda z, y: functional.cross_entropy(z, y, reduction="none"))


@pytest.mark.parametrize("replayed", [True, False])
def test_a_label_beyond_the_head_is_refused_by_name(lit, replayed):
    images, labels = make_batch()
    labels[2] = CLASSES + 3
    arguments = (lit, {}) if replayed else (lit.net, {"loss": functional.cross_entropy})
    with pytest.raises(InvalidInputError, match=r"labels: got class index \d+ to 13"):
        Snapshot.from_batch(arguments[0], (images, labels), **arguments[1])


def test_a_module_without_a_trainable_parameter_is_refused(lit):
    with pytest.raises(InvalidInputError, match="module: Lit has no trainable parameter"):
        Snapshot.from_batch(lit.requires_grad_(False), make_batch())


def test_a_plain_module_without_a_loss_is_refused_by_name(lit):
    with pytest.raises(InvalidInputError, match="loss: Sequential has no training_step"):
        Snapshot.from_batch(lit.net, make_batch())


def test_a_module_that_cannot_be_copied_is_a_replay_error(lit):
    lit.stream = (number for number in range(3))
    with pytest.raises(ReplayError, match="Lit cannot be copied"):
        Snapshot.from_batch(lit, make_batch())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_a_scripted_part_is_refused_by_name(lit):
    lit.net[0] = torch.jit.script(lit.net[0])
    with pytest.raises(UnsupportedError, match=r"its module 'net\.0' is TorchScript \(Conv2d\)"):
        Snapshot.from_batch(lit, make_batch())


def test_a_layout_that_changes_during_the_run_is_refused():
    layout = BatchLayout.of(LAYOUTS["dict"](*make_batch()))
    with pytest.raises(InvalidInputError, match="layout changed"):
        layout.split(make_batch())


# The truth is unreachable


def reachable(root: Any) -> Iterator[Any]:
    """Yield everything that can be reached from an object through attributes, containers and closures."""
    stack, seen = [root], {}
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType, str, bytes, int, float, torch.dtype)):
            continue
        seen[id(value)] = value
        yield value
        if isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack += value
        if isinstance(value, types.FunctionType):
            stack += [cell.cell_contents for cell in value.__closure__ or ()] + list(value.__defaults__ or ())
        if isinstance(value, types.MethodType):
            stack += [value.__self__, value.__func__]
        if isinstance(value, Tensor) and value.is_leaf and value.grad is not None:
            stack.append(value.grad)
        stack += list(getattr(value, "__dict__", {}).values())


def hides(value: Any, secret: Tensor) -> bool:
    """Tell whether a tensor or array holds the secret, or the first sample of it."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.is_meta or value.numel() < secret[0].numel():
        return False
    flat, wanted = value.detach().flatten().double(), secret.flatten().double()
    if secret[0].numel() == 1:  # labels: the whole vector, or nothing
        return flat.shape == wanted.shape and torch.equal(flat, wanted)
    width = secret[0].numel()
    return flat.numel() % width == 0 and any(
        torch.allclose(row, image) for row in flat.reshape(-1, width) for image in wanted.reshape(-1, width)
    )


def assert_truth_is_unreachable(snapshot, images, labels):
    observation = snapshot.observation
    found = [v for v in reachable(observation) if hides(v, images) or hides(v, labels)]
    assert found == []
    blob = cloudpickle.dumps(observation)
    assert images[0].numpy().tobytes() not in blob
    assert labels.numpy().tobytes() not in blob


def test_the_search_for_the_truth_finds_it_where_it_is_allowed_to_be(lit):
    images, labels = make_batch()
    snapshot = Snapshot.from_batch(lit, (images, labels))
    everything = list(reachable(snapshot))
    assert any(hides(value, images) for value in everything)
    assert any(hides(value, labels) for value in everything)
    blob = cloudpickle.dumps(snapshot)
    assert images[0].numpy().tobytes() in blob
    assert labels.numpy().tobytes() in blob


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_truth_cannot_be_reached_from_an_observation(lit, layout):
    images, labels = make_batch()
    snapshot = Snapshot.from_batch(lit, LAYOUTS[layout](images, labels))
    snapshot.self_test()
    assert_truth_is_unreachable(snapshot, images, labels)


@pytest.mark.parametrize("copy_of", [lambda x: x.flatten(1).clone(), lambda x: x.permute(0, 2, 3, 1).clone()])
def test_a_copy_of_the_images_elsewhere_in_the_batch_is_not_known(lit, copy_of):
    images, labels = make_batch()
    snapshot = Snapshot.from_batch(lit, {"image": images, "copy": copy_of(images), "label": labels})
    assert_truth_is_unreachable(snapshot, images, labels)


class Remembers(Lit):
    """Keeps its last batch and its outputs, as the hooks of Lightning 2 made common."""

    def __init__(self):
        super().__init__()
        self.outputs = []
        self.seen = torchmetrics.CatMetric()

    def training_step(self, batch, batch_idx):
        self.last_batch = batch
        self.seen.update(batch[1].float())
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        return loss


@pytest.mark.parametrize("when", ["before the snapshot", "in the self-test"])
def test_a_module_that_remembers_its_batch_does_not_hand_it_to_the_adversary(when):
    module, (images, labels) = Remembers(), make_batch()
    if when == "before the snapshot":
        module.log = module.log_dict = lambda *args, **kwargs: None
        module.training_step((images, labels), 0)
        del module.log, module.log_dict
    snapshot = Snapshot.from_batch(module, (images, labels))
    if when == "in the self-test":
        snapshot.self_test()
    assert_truth_is_unreachable(snapshot, images, labels)


def test_a_step_that_collects_its_outputs_does_not_grow_with_every_candidate():
    module, (images, labels) = Remembers(), make_batch()
    observation = Snapshot.from_batch(module, (images, labels)).observation
    before = len(observation.client.module.outputs)
    for _ in range(5):
        observation.simulate(images, labels)
    assert len(observation.client.module.outputs) == before
    assert module.outputs == []


def test_the_replica_holds_shapes_instead_of_weights(lit):
    client = Snapshot.from_batch(lit, make_batch()).observation.client
    assert {p.device.type for p in client.module.parameters()} == {"meta"}
    assert len(cloudpickle.dumps(client)) < 100_000


def test_an_observation_travels_by_pickle_and_simulates_the_same(lit):
    images, labels = make_batch()
    observation = Snapshot.from_batch(lit, (images, labels)).observation
    travelled = cloudpickle.loads(cloudpickle.dumps(observation))
    assert largest_difference(travelled.simulate(images, labels), observation.simulate(images, labels)) == 0


# Randomness

DRAWS = {
    "nn.Dropout": lambda x: nn.Dropout(0.4).train()(x),
    "nn.Dropout2d": lambda x: nn.Dropout2d(0.4).train()(x),
    "nn.AlphaDropout": lambda x: nn.AlphaDropout(0.4).train()(x),
    "F.dropout": lambda x: functional.dropout(x, 0.3),
    "F.rrelu": lambda x: functional.rrelu(x - 0.5, training=True),
    "F.gumbel_softmax": lambda x: functional.gumbel_softmax(x.flatten(1)),
    "rand_like": lambda x: x + torch.rand_like(x),
    "randn_like": lambda x: x + torch.randn_like(x),
    "randn_like in another dtype": lambda x: x + torch.randn_like(x, dtype=torch.float64),
    "rand": lambda x: x + torch.rand(x.shape),
    "randn": lambda x: x + torch.randn(x.shape),
    "randperm": lambda x: x[torch.randperm(len(x))],
    "randint up to a bound": lambda x: x.roll(torch.randint(7, (1,)).item(), -1),
    "randint between bounds": lambda x: x.roll(torch.randint(1, 8, (1,)).item(), -1),
    "normal": lambda x: x + torch.normal(0.0, 1.0, x.shape),
    "normal around a tensor": lambda x: torch.normal(x, 0.1),
    "bernoulli": torch.bernoulli,
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.3),
    "uniform_": lambda x: x + torch.empty_like(x).uniform_(-1, 1),
    "multinomial": lambda x: x.flatten(1).gather(1, torch.multinomial(x.flatten(1), 5)),
    "stochastic_depth by row": lambda x: stochastic_depth(x, 0.5, "row"),
    "stochastic_depth by batch": lambda x: stochastic_depth(x, 0.5, "batch"),
    "two in a row": lambda x: functional.dropout(functional.dropout(x, 0.3) + torch.rand_like(x), 0.3),
}

if "generator" in torch.ops.aten.randint_like.overloads():  # not yet in torch 2.6: such a model is refused there
    DRAWS["randint_like"] = lambda x: x + torch.randint_like(x, 5)


@pytest.mark.parametrize("name", DRAWS)
def test_a_replay_draws_the_numbers_of_the_real_forward_pass_and_moves_no_global_state(name):
    x = torch.rand((6, 2, 8, 8), generator=torch.Generator().manual_seed(2))
    state = torch.Generator().manual_seed(123).get_state()
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        expected = DRAWS[name](x)
    before = torch.get_rng_state()
    replayed = torch.Generator()
    replayed.set_state(state)
    with ReplayedRandomness(replayed):
        got = DRAWS[name](x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropping_everything_draws_nothing_and_gives_zeros(generator):
    with ReplayedRandomness(generator):
        assert functional.dropout(torch.ones(5), 1.0).tolist() == [0.0] * 5


def test_every_candidate_sees_the_same_dropout_mask(snap):
    snapshot = snap("dropout", batch=3, mode="train")
    first, second = (snapshot.observation.simulate(snapshot.truth.inputs, snapshot.truth.labels) for _ in range(2))
    assert largest_difference(first, second) == 0


class SometimesRandom(nn.Module):
    """Draws only for bright images."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        x = functional.dropout(x, 0.5) if x.mean() > 0.3 else x
        return self.head(x.flatten(1))


def test_a_model_that_draws_only_for_some_candidates_never_moves_the_global_state():
    bright = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1])
    observation = Snapshot.from_batch(
        SometimesRandom(), (bright * 0.1, labels), loss=functional.cross_entropy, mode="train"
    ).observation
    before = torch.get_rng_state()
    first, second = observation.simulate(bright, labels), observation.simulate(bright, labels)
    assert torch.equal(torch.get_rng_state(), before)
    assert largest_difference(first, second) == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_mixed_precision_is_replayed_under_autocast(lit, precision):
    images, labels = make_batch()
    client = TrainingStep(lit, loss=None, layout=BatchLayout.of((images, labels)), precision=precision)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in lit.named_parameters()}
    loss = client.forward(parameters, dict(lit.named_buffers()), images, labels, torch.Generator())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
        expected = functional.cross_entropy(lit.net(images), labels, label_smoothing=0.1)
    assert float(loss.detach()) == float(expected.detach())
