"""Manual optimization: the gradient of one optimizer, told apart from what else the training step differentiates."""

from __future__ import annotations

import copy
import logging

import pytest
import pytorch_lightning as pl
import torch
from support import HoldingExecutor, images_and_labels, trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import AtSteps, GradAudit, Limits, ThreatModel
from lightning_gradaudit.errors import UnsupportedError
from lightning_gradaudit.simulation.defences import ClipNorm, ClipValue

AT = 2


def data() -> DataLoader:
    return DataLoader(TensorDataset(*images_and_labels(20)), batch_size=4, shuffle=False)


class ByHand(pl.LightningModule):
    """Keep, before the discriminator's or classifier's step, what an oracle needs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3))
        self.lr = 0.05

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)


class Single(ByHand):
    clip = None

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.clip:
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm=self.clip)
        optimizer.step()
        self.log("train/loss", loss)


class ClipsByNorm(Single):
    clip = "norm"


class ClipsByValue(Single):
    clip = "value"


class PlainBackward(Single):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        F.cross_entropy(self.net(batch[0]), batch[1]).backward()
        optimizer.step()


class Closure(Single):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class TwoLosses(Single):
    """Two backward passes before one step."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        self.manual_backward(0.1 * self.net(batch[0].flip(-1)).square().mean())
        optimizer.step()


class Accumulating(Single):
    """A step after every second batch: the sampled batch has none."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class Gan(pl.LightningModule):
    """The generator steps first; only the discriminator sees real images."""

    toggling = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(5, 144), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Tanh(), nn.Linear(16, 1))
        self.seen: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        real = batch[0]
        state = torch.get_rng_state()
        noise = torch.randn(len(real), 5)
        if self.toggling:
            self.toggle_optimizer(first)
        fooled = self.discriminator(self.generator(noise).reshape(real.shape))
        loss = F.binary_cross_entropy_with_logits(fooled, torch.ones_like(fooled))
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        if self.toggling:
            self.untoggle_optimizer(first)
            self.toggle_optimizer(second)
        for name, loss in self.losses(real, noise).items():
            if name == "real":
                second.zero_grad()
            self.manual_backward(loss)
        if self.__dict__.get("keeping"):
            self.seen.append({"state": state, **{k: v.clone() for k, v in self.state_dict().items()}, "noise": noise})
        second.step()
        if self.toggling:
            self.untoggle_optimizer(second)

    def losses(self, real, noise):
        fake = self.generator(noise).reshape(real.shape).detach()
        on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        return {
            "real": F.binary_cross_entropy_with_logits(on_real, torch.ones_like(on_real)),
            "fake": F.binary_cross_entropy_with_logits(on_fake, torch.zeros_like(on_fake)),
        }

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.generator.parameters(), lr=0.1),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.1),
        )


class Untoggled(Gan):
    toggling = False


def captured(module, optimizer=None, view="local", **options):
    audit = GradAudit(
        schedule=AtSteps([AT]),
        executor=HoldingExecutor(),
        threat_model=ThreatModel(view=view, optimizer=optimizer),
        limits=Limits(final_wait_seconds=0),
        **options,
    )
    trainer(audit).fit(module, data())
    assert not audit.evidence.faults, audit.evidence.faults
    return audit.executor.snapshots


def oracle(kind) -> dict[str, torch.Tensor]:
    """Run the steps before the sampled one by hand and return the raw gradient at it."""
    pl.seed_everything(3, verbose=False)
    net = kind().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    batches = list(data())
    for index, (images, labels) in enumerate(batches[: AT + 1]):
        loss = F.cross_entropy(net(images), labels)
        if kind is TwoLosses:
            loss = loss + 0.1 * net(images.flip(-1)).square().mean()
        if kind is Accumulating:
            loss = loss / 2
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        if index == AT:
            return {f"net.{n}": g for (n, _), g in zip(net.named_parameters(), gradients, strict=True)}
        for p, g in zip(net.parameters(), gradients, strict=True):
            p.grad = g if p.grad is None else p.grad + g
        if kind is Accumulating and index % 2 == 0:
            continue
        if kind is ClipsByNorm:
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        elif kind is ClipsByValue:
            nn.utils.clip_grad_value_(net.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError


def relative(got, expected) -> float:
    assert set(got) == set(expected)
    difference = torch.cat([(got[n] - expected[n]).flatten() for n in expected])
    return float(difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm())


KINDS = [Single, ClipsByNorm, ClipsByValue, PlainBackward, Closure, TwoLosses, Accumulating]
# The sampled batch of an accumulating step has no update.
BY_HAND = [(kind, view) for kind in KINDS for view in ("local", "update") if (kind, view) != (Accumulating, "update")]


@pytest.mark.parametrize(("kind", "view"), BY_HAND)
def test_one_optimizer_by_hand(kind, view):
    pl.seed_everything(3, verbose=False)
    (snapshot,) = captured(kind(), view=view)
    expected = oracle(kind)
    if view == "update" and kind is ClipsByNorm:
        expected = ClipNorm(max_norm=0.01)(expected, generator=torch.Generator())
    if view == "update" and kind is ClipsByValue:
        expected = ClipValue(max_value=0.01)(expected, generator=torch.Generator())
    assert relative(snapshot.observation.gradients, expected) < 2e-6
    assert snapshot.self_test().error < 1e-5


@pytest.mark.parametrize("kind", [Gan, Untoggled])
@pytest.mark.parametrize("view", ["local", "update"])
def test_the_discriminator_of_a_gan_is_the_one_that_sees_images(kind, view):
    pl.seed_everything(3, verbose=False)
    module = kind()
    module.__dict__["keeping"] = True
    (snapshot,) = captured(module, view=view)
    seen = module.seen[AT]
    reference = copy.deepcopy(module)
    reference.load_state_dict({k: v for k, v in seen.items() if k not in ("state", "noise")})
    losses = reference.losses(list(data())[AT][0], seen["noise"])
    weights = dict(reference.discriminator.named_parameters())
    gradients = torch.autograd.grad(losses["real"] + losses["fake"], list(weights.values()))
    expected = {f"discriminator.{n}": g for n, g in zip(weights, gradients, strict=True)}
    assert relative(snapshot.observation.gradients, expected) < 1e-6
    assert snapshot.self_test().error < 1e-5
    assert torch.equal(snapshot.truth.inputs, list(data())[AT][0])


def test_a_chosen_optimizer_without_images_gives_a_constant_simulation():
    pl.seed_everything(3, verbose=False)
    (snapshot,) = captured(Gan(), optimizer=0)
    assert set(snapshot.observation.gradients) == {"generator.0.weight", "generator.0.bias"}
    assert snapshot.self_test().error < 1e-5
    other = snapshot.observation.simulate(snapshot.truth.inputs.flip(-1), snapshot.truth.labels)
    assert relative(other, snapshot.observation.gradients) < 1e-5, "no image is behind it"


def test_several_optimizers_that_see_images_are_named(caplog):
    class Two(Gan):
        def losses(self, real, noise):
            return {"real": self.discriminator(real).mean(), "fake": self.generator(real.flatten(1)[:, :5]).mean()}

        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.generator, self.discriminator)]

        def training_step(self, batch, batch_idx):
            for optimizer, loss in zip(self.optimizers(), reversed(self.losses(batch[0], None).values()), strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss**2)
                optimizer.step()

    with caplog.at_level(logging.WARNING, logger="lightning_gradaudit"):
        (snapshot,) = captured(Two())
    assert "optimizers [0, 1] depend on the images; auditing 0" in caplog.text
    assert set(snapshot.observation.gradients) == {"generator.0.weight", "generator.0.bias"}


@pytest.mark.parametrize("view", ["step", "reduced", "delta"])
def test_views_that_only_the_training_step_could_define_are_refused(view):
    with pytest.raises(UnsupportedError, match="view='local'"):
        trainer(GradAudit(view=view)).fit(Single(), data())


@pytest.mark.parametrize("kind", [ClipsByNorm, Closure, Gan])
@pytest.mark.parametrize("view", ["local", "update"])
def test_training_by_hand_does_not_notice(kind, view, tmp_path):
    def fit(*callbacks):
        pl.seed_everything(3, verbose=False)
        module = kind()
        trainer(*callbacks).fit(module, data())
        return [*module.state_dict().values(), torch.get_rng_state()]

    options = {"executor": HoldingExecutor(), "limits": Limits(queue_size=9, final_wait_seconds=0), "dirpath": tmp_path}
    audit = GradAudit(every_n_steps=1, view=view, **options)
    assert all(torch.equal(a, b) for a, b in zip(fit(audit), fit(), strict=True))
    assert len(audit.executor.snapshots) == 5
