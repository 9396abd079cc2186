"""Steps of plain loops and of Fabric, against gradients and weights kept by the loop itself."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from skimage.data import lfw_subset
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Budget, ThreatModel, audit_snapshot
from lightning_gradaudit.capture.loop import record_step


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 144, 2)
    )


def faces(count=4):
    return torch.from_numpy(lfw_subset()[:count]).float()[:, None], torch.arange(count) % 2


def train(module, steps, *, recorded_at=(), **arguments):
    """Train with SGD; return the recorded steps and the weights at the end."""
    images, labels = faces()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        if step in recorded_at:
            with record_step(module, (images, labels), loss=F.cross_entropy, step=step, **arguments) as recorded:
                F.cross_entropy(module(images), labels).backward()
                optimizer.step()
            found.append(recorded)
        else:
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()
    return found


def test_a_plain_loop_is_recorded_and_trains_bit_for_bit_as_without():
    watched, plain = net(), net()
    torch.manual_seed(1)
    found = train(watched, 3, recorded_at=(0, 2))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    train(plain, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    for recorded, step in zip(found, (0, 2), strict=True):
        assert recorded.snapshot.step == step
        assert recorded.snapshot.self_test().error < 1e-6
    record = audit_snapshot(found[0].snapshot, budget=Budget(evaluations=5))
    assert record.valid
    assert record.attacked


def test_gradients_that_lie_there_already_are_not_part_of_the_step():
    module, batch = net().eval(), faces()
    F.cross_entropy(module(batch[0]), batch[1]).backward()
    before = {name: p.grad.clone() for name, p in module.named_parameters()}
    with record_step(module, batch, loss=F.cross_entropy) as recorded:
        F.cross_entropy(module(batch[0]), batch[1]).backward()
    for name, gradient in recorded.snapshot.observation.gradients.items():
        assert torch.equal(gradient, before[name])


def test_a_step_function_replays_any_step_numpys_randomness_included():
    def step(module, batch):
        left = np.random.randint(1, 12)
        share = random.random()
        return share * F.cross_entropy(module(batch["face"].roll(left, -1)), batch["kind"]) * batch["weight"].mean()

    images, labels = faces()
    module, batch = net(), {"face": images, "kind": labels, "weight": torch.rand(4)}
    with record_step(module, batch, step_function=step) as recorded:
        step(module, batch).backward()
    state = np.random.get_state()[1].copy(), random.getstate()
    assert recorded.snapshot.self_test().error < 1e-6
    assert np.array_equal(np.random.get_state()[1], state[0])
    assert random.getstate() == state[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_is_recorded(precision):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    model, optimizer = fabric.setup(module, optimizer)
    images, labels = faces()
    with record_step(
        model, (images, labels), loss=F.cross_entropy, threat_model=ThreatModel(precision=precision)
    ) as recorded:
        fabric.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
    assert recorded.snapshot.self_test().error < (1e-6 if precision == "32-true" else 5e-2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": ("text", 3)}, "batch: expected images"),
        ({"threat_model": ThreatModel(view="update")}, "needs a Trainer"),
        ({"loss": None}, "no training_step"),
    ],
)
def test_what_cannot_be_recorded_is_said_and_the_step_goes_on(change, says, caplog):
    module, (images, labels) = net(), faces()
    arguments = {"batch": (images, labels), "loss": F.cross_entropy} | change
    batch = arguments.pop("batch")
    before = copy.deepcopy(module.state_dict())
    with record_step(module, batch, **arguments) as recorded:
        F.cross_entropy(module(images), labels).backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert recorded.snapshot is None
    assert says in recorded.reason
    assert says in caplog.text
    assert not torch.equal(before["0.weight"], module.state_dict()["0.weight"])


def test_an_error_of_the_users_step_reaches_the_user_and_leaves_no_hook():
    module, batch = net(), faces()
    with pytest.raises(KeyError), record_step(module, batch, loss=F.cross_entropy):
        raise KeyError
    assert all(not p._backward_hooks for p in module.parameters())


def test_a_context_without_a_backward_pass_has_nothing_to_audit():
    with record_step(net(), faces(), loss=F.cross_entropy) as recorded:
        pass
    assert "no backward pass" in recorded.reason
