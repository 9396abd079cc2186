"""One conformance table over every attack that is exported, discovered and not listed."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gradaudit import Budget, Outcome, Reconstruction, Snapshot, attacks
from lightning_gradaudit.attacks import (
    Attack,
    GradientMatching,
    InvertingGradients,
    LinearLayerInversion,
    Portfolio,
    Whitened,
    iDLG,
)
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.observation import Observation

# What an attack needs to be built; all others are built with their defaults.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "Portfolio": {"attacks": (LinearLayerInversion(), InvertingGradients())},
    "GalleryIdentification": {"candidates": torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(5))},
}
VARIANTS = {
    "InvertingGradients with restarts": InvertingGradients(restarts=3),
    "GradientMatching with joint labels": GradientMatching(labels="joint"),
    "GradientMatching in white coordinates": GradientMatching(parametrization=Whitened()),
    "Portfolio of matching": Portfolio(attacks=(iDLG(), InvertingGradients())),
}


def makes_attacks(exported: Any) -> bool:
    """Whether it is an attack's class, or a function that returns an attack."""
    if inspect.isclass(exported):
        return issubclass(exported, Attack) and not inspect.isabstract(exported)
    if not inspect.isfunction(exported):
        return False
    returned = typing.get_type_hints(exported).get("return")
    return inspect.isclass(returned) and issubclass(returned, Attack)


FOUND = {name: getattr(attacks, name) for name in attacks.__all__ if makes_attacks(getattr(attacks, name))}
ATTACKS = {name: make(**ARGUMENTS.get(name, {})) for name, make in FOUND.items()} | VARIANTS
SCENES: dict[str, dict[str, Any]] = {
    "one grey image": {"kind": "conv", "batch": 1, "channels": 1, "side": 8},
    "three colour images": {"kind": "conv", "batch": 3, "channels": 3, "side": 16},
    "one large colour image": {"kind": "conv", "batch": 1, "channels": 3, "side": 64},
    "an MLP on four images": {"kind": "mlp", "batch": 4, "channels": 1, "side": 8},
    "BatchNorm in train mode": {"kind": "batchnorm", "batch": 2, "channels": 3, "side": 8, "mode": "train"},
    "dropout in train mode": {"kind": "dropout", "batch": 2, "channels": 1, "side": 8, "mode": "train"},
    "a vision transformer": {"kind": "vit", "batch": 1, "channels": 3, "side": 8},
    "double precision": {"kind": "sigmoid", "batch": 1, "channels": 1, "side": 8},
}
BUDGET = Budget(evaluations=8)


@pytest.fixture
def counted(monkeypatch):
    """Count the simulated gradients that an attack differentiates through: its real effort."""
    calls = []
    simulate = Observation.simulate

    def counting(self, inputs, *args, **kwargs):
        if inputs.requires_grad:
            calls.append(inputs.shape)
        return simulate(self, inputs, *args, **kwargs)

    monkeypatch.setattr(Observation, "simulate", counting)
    return calls


@pytest.fixture(params=list(SCENES))
def scene(request, snap, build) -> Snapshot:
    settings = SCENES[request.param]
    if request.param != "double precision":
        return snap(**settings)
    model = build("sigmoid", channels=1, side=8).double()
    images = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return Snapshot.from_batch(model, (images, torch.tensor([1])), loss=torch.nn.functional.cross_entropy)


@pytest.fixture(params=list(ATTACKS))
def attack(request) -> Attack:
    return ATTACKS[request.param]


def test_the_table_holds_what_is_known_to_be_exported():
    known = {"DLG", "iDLG", "InvertingGradients", "Modern", "ClientPrivacyLeakage"}
    known |= {"SeeThroughGradients", "LinearLayerInversion", "GradientMatching", "Auto", "FedAvgMatching", "Portfolio"}
    known |= {"RecursiveInversion", "LevenbergMarquardt"}
    assert known <= set(FOUND)
    assert set(ARGUMENTS) <= set(FOUND)


def tensors_of(value: Any, seen: set[int]) -> list[Tensor]:
    """Every tensor that can be reached from an object through fields, attributes and containers."""
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type)):
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [] if value.is_meta else [value]  # a replica's shapes hold no data
    if isinstance(value, Mapping):
        inner: list[Any] = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    elif is_dataclass(value):
        inner = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, torch.nn.Module) or type(value).__module__.startswith("lightning_gradaudit"):
        inner = list(vars(value).values())
    else:
        inner = []
    return [tensor for each in inner for tensor in tensors_of(each, seen)]


def test_the_truth_cannot_be_reached_from_an_observation(scene):
    """No tensor in reach is the true batch or one of its images, in model inputs or in pixels."""
    truth = scene.truth.inputs
    assert any(t.shape == truth.shape and torch.equal(t, truth) for t in tensors_of(scene, set()))  # the walk finds it
    reached = tensors_of(scene.observation, set())
    assert len(reached) >= len(scene.observation.gradients) + len(scene.observation.parameters)
    flat = truth.flatten(1)
    for tensor in reached:
        rows = tensor.detach().reshape(-1, flat.shape[1]) if tensor.numel() % flat.shape[1] == 0 else flat[:0]
        assert not any(torch.equal(row.to(flat), image) for row in rows for image in flat)


def test_an_attack_keeps_the_contract(attack, scene, counted):
    observation = scene.observation
    before = {n: t.clone() for group in (observation.gradients, observation.parameters) for n, t in group.items()}
    global_state = torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in observation.client.module.modules()]

    result = attack(observation, budget=BUDGET, generator=torch.Generator().manual_seed(4))
    again = attack(observation, budget=BUDGET, generator=torch.Generator().manual_seed(4))

    assert isinstance(result, Reconstruction)
    assert tuple(result.inputs.shape) == observation.shape
    assert (result.inputs.dtype, result.inputs.device) == (observation.input_dtype, observation.device)
    assert bool(result.inputs.isfinite().all())
    assert result.attack
    assert result.attack in attack.name
    assert not result.inputs.requires_grad
    assert result.inputs.grad_fn is None
    if result.outcome is Outcome.NOT_APPLICABLE:
        assert result.reason
        assert result.matching_loss == math.inf
    else:
        assert len(result.labels) == observation.batch_size
        assert 0 <= result.matching_loss < math.inf
        assert not result.labels.requires_grad
    # to the evaluation: neither claimed nor really spent beyond the budget
    assert result.evaluations <= BUDGET.evaluations
    assert len(counted) <= 2 * BUDGET.evaluations
    assert torch.equal(result.inputs, again.inputs)
    assert (result.matching_loss, result.evaluations) == (again.matching_loss, again.evaluations)
    # nothing left behind
    assert torch.equal(torch.get_rng_state(), global_state)
    now = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in observation.client.module.modules()]
    assert now == hooks
    after = dict(observation.gradients) | dict(observation.parameters)
    assert all(torch.equal(after[n], before[n]) and after[n].grad is None for n in after)
    assert not any(t.requires_grad for t in after.values())


@pytest.mark.parametrize("evaluations", [1, 2, 7, 60])
@pytest.mark.parametrize("name", ["InvertingGradients", "InvertingGradients with restarts", "DLG", "iDLG"])
def test_a_matching_attack_differentiates_exactly_as_often_as_it_says(snap, counted, name, evaluations):
    result = ATTACKS[name](
        snap("conv").observation, budget=Budget(evaluations=evaluations), generator=torch.Generator().manual_seed(0)
    )
    assert result.evaluations == len(counted)
    assert len(counted) <= evaluations
    if "Inverting" in name:
        assert len(counted) == evaluations


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {"observation": s}, r"observation: expected an Observation, got Snapshot.*snapshot\.observation"),
        (lambda s: {"observation": s.observation.gradients}, "observation: .*got dict"),
        (lambda s: {"budget": 400}, r"budget: expected Budget\(evaluations=\.\.\.\), got 400"),
        (lambda s: {"generator": 0}, "generator: expected a torch.Generator on the CPU, got 0"),
    ],
)
def test_wrong_arguments_are_refused_by_name_the_snapshot_above_all(attack, snap, change, says):
    snapshot = snap("conv")
    good = {"observation": snapshot.observation, "budget": BUDGET, "generator": torch.Generator()}
    arguments = good | change(snapshot)
    with pytest.raises(InvalidInputError, match=says):
        attack(arguments.pop("observation"), **arguments)
