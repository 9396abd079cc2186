"""Every way of training, every view: the captured tensors against a loop written by hand, without Lightning.

One run of each mode carries one callback for each view; a second run without any must end in the same state.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from support import HoldingExecutor, RecordingLogger, images_and_labels, trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import AtSteps, Budget, GradAudit, Limits, ThreatModel
from lightning_gradaudit.audit.self_test import SELF_TEST_TOLERANCE, self_test_tolerance

# Raised inside torch while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

BATCHES, SIZE, AT, LOCAL_STEPS = 7, 4, 3, 2
VIEWS = ("local", "step", "reduced", "update", "delta")


class Net(nn.Module):
    """Convolution, BatchNorm, dropout and a head; every submodule has a mode of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Tanh())
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6 * 36, 3)

    def forward(self, images):
        return self.head(self.drop(self.middle(self.body(images))).flatten(1))


class Checkpointed(Net):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, images):
        # A reentrant block needs an input that requires a gradient, hence not the first one.
        features = checkpoint(self.middle, self.body(images), use_reentrant=self.reentrant)
        return self.head(self.drop(features).flatten(1))


class Shared(Net):
    """One convolution called twice, and a second name for its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.again.weight = self.middle[0].weight

    def forward(self, images):
        features = self.again(self.middle(self.middle(self.body(images))))
        return self.head(self.drop(features).flatten(1))


class Task(pl.LightningModule):
    """Keep the random state before each forward pass, for the loop by hand to start from."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.net, self.make = net, optimizer
        self.states: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        if len(self.states) == batch_idx:  # a line search comes back
            self.states.append(torch.get_rng_state())
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make([p for p in self.net.parameters() if p.requires_grad])


class EvalBatchNorm(Task):
    def on_train_batch_start(self, batch, batch_idx):
        self.net.body[1].eval()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


def fused(parameters):
    return torch.optim.SGD(parameters, lr=0.05, fused=True)


def frozen():
    net = Net()
    net.body.requires_grad_(requires_grad=False)
    return net


def half_compiled():
    net = Net()
    net.middle = torch.compile(net.middle, backend="aot_eager")
    return net


def scaled():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))


@dataclass(frozen=True)
class Mode:
    net: Any = Net
    optimizer: Any = sgd
    options: dict[str, Any] = field(default_factory=dict)
    plugins: Any = None
    task: Any = Task
    compiled: bool = False
    autocast: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    without: tuple[str, ...] = ()  # views that this mode does not have
    tolerance: float = 1e-6


CLIP = 0.05
MODES = {
    "fp32": Mode(),
    "adam": Mode(optimizer=adam),
    "bf16-mixed": Mode(options={"precision": "bf16-mixed"}, autocast=torch.bfloat16),
    "16-mixed": Mode(plugins=scaled, autocast=torch.float16),
    "16-mixed-fused": Mode(plugins=scaled, autocast=torch.float16, optimizer=fused),
    "16-mixed-accumulate": Mode(plugins=scaled, autocast=torch.float16, options={"accumulate_grad_batches": 3}),
    "16-mixed-clip": Mode(plugins=scaled, autocast=torch.float16, options={"gradient_clip_val": CLIP}),
    "bf16-true": Mode(options={"precision": "bf16-true"}, dtype=torch.bfloat16, tolerance=1e-2),
    "64-true": Mode(options={"precision": "64-true"}, dtype=torch.float64),
    "accumulate": Mode(options={"accumulate_grad_batches": 3}),
    "accumulate-tail": Mode(options={"accumulate_grad_batches": 4}, without=("delta",)),
    "clip-norm": Mode(options={"gradient_clip_val": CLIP}),
    "clip-value": Mode(options={"gradient_clip_val": CLIP / 50, "gradient_clip_algorithm": "value"}),
    "accumulate-clip": Mode(options={"accumulate_grad_batches": 3, "gradient_clip_val": CLIP}),
    "lbfgs": Mode(optimizer=lbfgs, without=("delta",)),
    "lbfgs-clip": Mode(optimizer=lbfgs, options={"gradient_clip_val": CLIP}, without=("delta",)),
    "compiled": Mode(compiled=True),
    "compiled-submodule": Mode(net=half_compiled),
    "eval-submodule": Mode(task=EvalBatchNorm),
    "frozen": Mode(net=frozen),
    "shared": Mode(net=Shared),
    "checkpointing": Mode(net=lambda: Checkpointed(reentrant=False)),
    "checkpointing-reentrant": Mode(net=lambda: Checkpointed(reentrant=True)),
    "overfit": Mode(options={"overfit_batches": 1.0}),
}
CELLS = [(mode, view) for mode in MODES for view in VIEWS if view not in MODES[mode].without]


def data(dtype=torch.float32) -> DataLoader:
    images, labels = images_and_labels(BATCHES * SIZE)
    return DataLoader(TensorDataset(images.to(dtype), labels), batch_size=SIZE, shuffle=False)


def first_sampled(mode: Mode) -> int:
    """The batch that the schedule samples: the first of a window."""
    every = mode.options.get("accumulate_grad_batches", 1)
    return every * -(-AT // every)


def make_task(mode: Mode) -> pl.LightningModule:
    pl.seed_everything(7, verbose=False)
    return mode.task(mode.net(), mode.optimizer)


def audit_of(view: str, mode: Mode) -> GradAudit:
    return GradAudit(
        threat_model=ThreatModel(view=view, local_steps=LOCAL_STEPS),
        schedule=AtSteps([first_sampled(mode)]),
        executor=HoldingExecutor(),
        gallery=torch.rand(100, 1, 12, 12, generator=torch.Generator().manual_seed(0)),
        budget=Budget(evaluations=5),
        limits=Limits(final_wait_seconds=0),
        name=view,
    )


def fit(mode: Mode, *audits: GradAudit):
    task, log = make_task(mode), RecordingLogger()
    options = dict(mode.options)
    if mode.plugins is not None:
        options["plugins"] = mode.plugins()
    run = trainer(*audits, logger=log, **options)
    module = torch.compile(task, backend="aot_eager") if mode.compiled else task
    run.fit(module, data(torch.float64 if mode.dtype == torch.float64 else torch.float32))
    ours = {audit.name for audit in audits}
    users = [(s, {k: v for k, v in row.items() if k.split("/")[0] not in ours}) for s, row in log.rows]
    return task, torch.get_rng_state(), [row for row in users if row[1]]


@lru_cache
def audited_run(name: str):
    """Fit with one callback for each view; return the module and the snapshot of each view."""
    mode = MODES[name]
    audits = {view: audit_of(view, mode) for view in VIEWS if view not in mode.without}
    outcome = fit(mode, *audits.values())
    snapshots = {}
    for view, audit in audits.items():
        assert not audit.evidence.faults, (name, view, audit.evidence.faults)
        (snapshots[view],) = audit.executor.snapshots
    return outcome, snapshots


@lru_cache
def by_hand(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Train without Lightning and note what each adversary would hold."""
    mode = MODES[name]
    states = audited_run(name)[0][0].states
    net = make_task(mode).net.to(mode.dtype)
    net.train()
    if mode.task is EvalBatchNorm:
        net.body[1].eval()
    net.reentrant = False  # reentrant checkpointing knows no torch.autograd.grad
    named = {f"net.{n}": p for n, p in net.named_parameters() if p.requires_grad}
    optimizer = mode.optimizer(list(named.values()))
    scaler = mode.plugins().scaler if mode.plugins else None
    every = mode.options.get("accumulate_grad_batches", 1)
    batches = [(x.to(mode.dtype), y) for x, y in data(mode.dtype)]
    at = first_sampled(mode)
    views: dict[str, dict[str, torch.Tensor]] = {}

    def loss_of(index, *, start=True):
        if start:
            torch.set_rng_state(states[index])
        with torch.autocast("cpu", dtype=mode.autocast or torch.bfloat16, enabled=mode.autocast is not None):
            return F.cross_entropy(net(batches[index][0]), batches[index][1])

    def note(view, index):
        if at <= index < at + every and view not in views:
            views[view] = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}

    def clip():
        if "gradient_clip_val" in mode.options:
            by_value = mode.options.get("gradient_clip_algorithm") == "value"
            rule = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
            rule(named.values(), mode.options["gradient_clip_val"])

    evaluated: set[int] = set()

    def evaluate(index):
        """Forward, backward and clipping of a window's last batch, as a line search repeats it."""
        if every == 1:
            optimizer.zero_grad()
        loss = loss_of(index, start=index not in evaluated) / every
        evaluated.add(index)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        note("step", index)
        note("reduced", index)
        clip()
        note("update", index)
        return loss

    for index in range(BATCHES):
        last = (index + 1) % every == 0 or index + 1 == BATCHES
        if index == at:
            views["before"] = {n: p.detach().clone() for n, p in named.items()}
            buffers = {n: b.clone() for n, b in net.named_buffers()}
            loss = loss_of(index)
            scale = (1.0 if scaler is None else scaler.get_scale()) / every  # as Lightning: half precision rounds
            given = torch.autograd.grad(loss * scale, list(named.values()), allow_unused=True)
            views["local"] = {n: g / scale for n, g in zip(named, given, strict=True) if g is not None}
            net.load_state_dict({**net.state_dict(), **buffers})
        if not last:
            (scaler.scale(loss_of(index) / every) if scaler else loss_of(index) / every).backward()
            continue
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(lambda i=index: evaluate(i))
        elif scaler is None:
            evaluate(index)
            optimizer.step()
        else:
            evaluate(index)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if index + 1 == at + every * LOCAL_STEPS or (index + 1 == BATCHES and "before" in views):
            views.setdefault("delta", {n: p.detach() - views["before"][n] for n, p in named.items()})
    return views


def relative(got, expected) -> float:
    assert set(got) == set(expected)
    a = torch.cat([got[n].double().flatten() for n in expected])
    b = torch.cat([expected[n].double().flatten() for n in expected])
    return float((a - b).norm() / b.norm())


def unprefixed(tensors):
    """A compiled submodule gives its parameters longer names."""
    return {name.replace("._orig_mod", ""): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(("mode", "view"), CELLS, ids=lambda value: value)
def test_the_captured_tensors_are_those_of_a_loop_by_hand(mode, view):
    _, snapshots = audited_run(mode)
    observation = snapshots[view].observation
    expected = by_hand(mode)[view]
    assert relative(unprefixed(observation.gradients), unprefixed(expected)) <= MODES[mode].tolerance
    weights = {n: observation.parameters[n] for n in observation.gradients}
    assert relative(unprefixed(weights), unprefixed(by_hand(mode)["before"])) <= MODES[mode].tolerance


@pytest.mark.parametrize(("mode", "view"), CELLS, ids=lambda value: value)
def test_the_simulator_describes_the_step(mode, view):
    snapshot = audited_run(mode)[1][view]
    assert snapshot.self_test().error <= self_test_tolerance(snapshot.observation)
    if MODES[mode].dtype == torch.float32 and MODES[mode].autocast is None and (mode, view) != ("adam", "delta"):
        assert snapshot.self_test().error <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_training_does_not_notice(mode):
    (task, rng, rows), _ = audited_run(mode)
    plain, plain_rng, plain_rows = fit(MODES[mode])
    assert all(torch.equal(a, b) for a, b in zip(task.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.equal(rng, plain_rng)
    assert rows == plain_rows
    assert [set(m.__dict__) for m in task.modules()] == [set(m.__dict__) for m in plain.modules()]
    for module in (task, plain):
        assert sum(len(p._backward_hooks or ()) for p in module.parameters()) == 0


FAULTS = ("mode", "clipping", "scale", "weights", "images")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_test_detects_a_wrong_ingredient(fault):
    """One ingredient at a time is made wrong on purpose: each alone must turn the audit invalid."""
    snapshot = audited_run("accumulate-clip")[1]["update"]
    observation, protocol = snapshot.observation, snapshot.protocol
    if fault == "mode":
        client = copy.deepcopy(observation.client)
        client.module.eval()
        wrong = replace(snapshot, observation=replace(observation, client=client))
    elif fault == "clipping":
        wrong = replace(snapshot, protocol=replace(protocol, clip=None))
    elif fault == "scale":
        wrong = replace(snapshot, protocol=replace(protocol, scale=1.0, clip=None))
    elif fault == "weights":
        moved = {n: p - 0.05 * observation.gradients.get(n, 0) for n, p in observation.parameters.items()}
        wrong = replace(snapshot, observation=replace(observation, parameters=moved))
    else:
        wrong = replace(snapshot, truth=replace(snapshot.truth, inputs=snapshot.truth.inputs.flip(-1)))
    tolerance = SELF_TEST_TOLERANCE["32-true"]
    assert snapshot.self_test().error < tolerance / 10
    assert wrong.self_test().error > tolerance


def test_there_are_at_least_forty_cells():
    assert len(CELLS) >= 40
