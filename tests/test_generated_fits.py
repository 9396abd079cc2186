"""Whatever module on whatever batch: every audit is valid, or there is one refusal that names what came.

`GRADAUDIT_FITS=2000` generates that many fits, of another seed each time.
"""

from __future__ import annotations

import copy
import os
import random
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.quality.fits import Fit, Module, audit, train
from lightning_gradaudit import Status

FITS = int(os.environ.get("GRADAUDIT_FITS", "40"))
MANY = FITS > 40  # at random, each time others
CLASSES = 3
PIXELS = F.interpolate(torch.rand((8, 3, 4, 4), generator=torch.Generator().manual_seed(0)), (16, 16), mode="bilinear")
TRACEBACK = re.compile(r"^\w*(Error|Exception|Exit|Interrupt)\b: ")  # how a foreign error is described
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Plan:
    """A module, its loss, and the layout of its batches."""

    channels: int
    side: int
    width: int
    stride: int
    normalization: str  # "none", "batch", "group"
    activation: str
    dropout: bool
    second: bool  # another convolution
    head: str  # "linear", "1x1 convolution", "two linear"
    auxiliary: str  # "none", "after the head", "before the head", "unused"
    frozen: str  # "none", "first", "body", "head's bias"
    loss: str  # "cross entropy", "binary", "squares"
    layout: str
    extra: str  # "none", "weights", "names", "both", "number"
    bytes: str  # "none", "always": scaled whatever they are, "found": scaled where they are bytes
    last: bool  # (B, H, W, C)
    augment: str  # "none", "flip", "numpy"
    accumulate: int
    adam: bool


PLANS = st.builds(
    Plan,
    channels=st.sampled_from([1, 3]),
    side=st.sampled_from([8, 10]),
    width=st.sampled_from([4, 6]),
    stride=st.sampled_from([1, 2]),
    normalization=st.sampled_from(["none", "batch", "group"]),
    activation=st.sampled_from(["ReLU", "Sigmoid", "GELU", "Identity"]),
    dropout=st.booleans(),
    second=st.booleans(),
    head=st.sampled_from(["linear", "1x1 convolution", "two linear"]),
    auxiliary=st.sampled_from(["none", "none", "after the head", "before the head", "unused"]),
    frozen=st.sampled_from(["none", "none", "first", "body", "head's bias"]),
    loss=st.sampled_from(["cross entropy", "binary", "squares"]),
    layout=st.sampled_from(["tuple", "dict", "nested", "no labels", "two views", "views in one", "two labels", "flat"]),
    extra=st.sampled_from(["none", "none", "weights", "names", "both", "number"]),
    bytes=st.sampled_from(["none", "none", "always", "found"]),
    last=st.booleans(),
    augment=st.sampled_from(["none", "none", "flip", "numpy"]),
    accumulate=st.sampled_from([1, 1, 2]),
    adam=st.booleans(),
)


class Net(nn.Module):
    """Body and head by a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        width, outputs = plan.width, 1 if plan.loss == "binary" else CLASSES
        body = [nn.Conv2d(plan.channels, width, 3, plan.stride, 1)]
        body += {"none": [], "batch": [nn.BatchNorm2d(width)], "group": [nn.GroupNorm(2, width)]}[plan.normalization]
        body += [getattr(nn, plan.activation)(), *([nn.Dropout(0.3)] if plan.dropout else [])]
        body += [nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()] if plan.second else []
        side = plan.side // plan.stride
        if plan.auxiliary == "before the head":
            self.auxiliary = nn.Conv2d(width, 1, 1)
        self.body = nn.Sequential(*body)
        flat = [nn.Flatten(), nn.Linear(width * side**2, outputs)]
        self.head = nn.Sequential(
            *{
                "linear": flat,
                "1x1 convolution": [nn.Conv2d(width, outputs, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
                "two linear": [nn.Flatten(), nn.Linear(width * side**2, 8), nn.ReLU(), nn.Linear(8, outputs)],
            }[plan.head]
        )
        if plan.auxiliary in ("after the head", "unused"):
            self.auxiliary = nn.Conv2d(width, 1, 1)
        self.uses_auxiliary = plan.auxiliary in ("after the head", "before the head")
        frozen = {"none": (), "first": (self.body[0],), "body": (self.body,), "head's bias": ()}[plan.frozen]
        for part in frozen:
            part.requires_grad_(False)
        if plan.frozen == "head's bias":
            next(m for m in reversed(list(self.head.modules())) if hasattr(m, "bias")).bias.requires_grad_(False)

    def forward(self, images):
        features = self.body(images)
        penalty = self.auxiliary(features).square().mean() if self.uses_auxiliary else 0.0
        return self.head(features), 0.1 * penalty


def entries(plan, batch):
    """Return images of one view or several, labels or None, and weights or None."""
    if isinstance(batch, dict) and "data" in batch:
        batch = batch["data"]
    if isinstance(batch, dict):
        return [batch["image"]], batch.get("label"), batch.get("weight")
    if torch.is_tensor(batch):
        return [batch], None, None
    images, *others = batch
    others = [other for other in others if torch.is_tensor(other)]
    labels = others[0] if plan.layout != "no labels" and others else None
    weights = others[-1] if plan.extra in ("weights", "both") and plan.layout != "flat" else None
    return list(images) if isinstance(images, (list, tuple)) else [images], labels, weights


def step_of(plan):
    def view(module, images):
        scaled = plan.bytes == "always" or images.dtype == torch.uint8  # else where bytes are found
        images = images.float() / 255 if scaled else images
        images = images.movedim(-1, 1) if plan.last and plan.layout != "views in one" else images
        if plan.augment == "flip" and torch.rand(()) < 0.5:
            images = images.flip(-1)
        if plan.augment == "numpy":
            images = images * np.random.uniform(0.8, 1.0)
        return module.net(images)

    def step(module, batch):
        views, labels, weights = entries(plan, batch)
        if plan.layout == "views in one":
            views = list(views[0].unbind(1))
        outputs = [view(module, images) for images in views]
        logits, penalty = sum(o for o, _ in outputs) / len(outputs), sum(p for _, p in outputs)
        labels = labels[:, 0] if labels is not None and labels.ndim == 2 else labels
        if labels is None:
            losses = logits.square().mean(1)
        elif plan.loss == "cross entropy":
            losses = F.cross_entropy(logits, labels, reduction="none")
        elif plan.loss == "binary":
            losses = F.binary_cross_entropy_with_logits(logits[:, 0], (labels > 0).float(), reduction="none")
        else:
            losses = (logits - labels[:, None]).square().mean(1)
        loss = (losses if weights is None else losses * weights).mean() + penalty
        module.log("loss", loss)
        return loss

    return step


def row_of(plan):
    def row(image, at):
        image = (255 * image).byte() if plan.bytes != "none" else image
        image = image.movedim(0, -1).contiguous() if plan.last and plan.layout != "views in one" else image
        label = at % CLASSES
        weight = {"weight": torch.tensor(1.0 + at % 2)} if plan.extra in ("weights", "both") else {}
        name = {"name": f"image {at}"} if plan.extra in ("names", "both") else {}
        number = {"number": at} if plan.extra == "number" else {}
        others = weight | name | number
        if plan.layout == "dict":
            return {"image": image, "label": label, **others}
        if plan.layout == "nested":
            return {"data": {"image": image, "label": label, **weight}, "meta": {"site": "north", **name, **number}}
        if plan.layout == "flat":
            return image
        if plan.layout == "no labels":
            return (image, *name.values(), *weight.values())
        if plan.layout == "two views":
            return ((image, image.flip(0)), label, *others.values())
        if plan.layout == "views in one":
            return (torch.stack([image, image.flip(-1)]), label, *others.values())
        if plan.layout == "two labels":
            return (image, torch.tensor([label, at % 2]), *others.values())
        return (image, label, *others.values())

    return row


class Optimized(Module):
    def configure_optimizers(self):
        kind = torch.optim.Adam if self.adam else torch.optim.SGD
        return kind([p for p in self.parameters() if p.requires_grad], lr=0.01)


def fit_of(plan):
    torch.manual_seed(0)
    module = Optimized(step_of(plan), net=Net(plan))
    module.adam = plan.adam
    return Fit(
        module, row_of(plan), channels=plan.channels, shape=(plan.side, plan.side),
        trainer={"accumulate_grad_batches": plan.accumulate},
    )  # fmt: skip


def randomness():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def check(plan):
    fit = fit_of(plan)
    plain = copy.deepcopy(fit)
    callback = audit(fit, PIXELS, evaluations=12)
    after, logged = randomness(), fit.module.trainer.logged_metrics
    train(plain, PIXELS)
    assert randomness() == after
    assert plain.module.trainer.logged_metrics == {k: v for k, v in logged.items() if not k.startswith("gradaudit/")}
    for name, weights in fit.module.state_dict().items():
        assert torch.equal(weights, plain.module.state_dict()[name]), name
    records, said = callback.evidence.records, {fault.message for fault in callback.evidence.faults}
    if said:
        assert len(said) == 1, said
        assert not TRACEBACK.search(next(iter(said))), said
        assert not records
    else:
        assert records
    for record in records:
        assert record.valid, (record.self_test, record.outcome, record.reason)
        assert record.attacked or bool(record.exposure.isnan().all()), record.outcome
        assert record.attacked or record.reason
    verdict = callback.verdict()
    assert verdict.status is not Status.PASS
    assert bool(verdict.action) == (verdict.status is Status.UNKNOWN)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_generated_modules_and_batches_are_audited_or_refused_by_name():
    @settings(
        max_examples=FITS,
        deadline=None,
        derandomize=not MANY,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(PLANS)
    def run(plan):
        check(plan)

    run()
