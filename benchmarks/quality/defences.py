"""Measure what defences cost in accuracy, and what they leave to attackers who ignore them and to those who know them.

The network has two strided ReLU convolutions and a linear head. Accuracy: it is trained for equal epochs with the
defended gradient (SGD; of two learning rates the one with the better training accuracy), and tested on a fifth of the
images, held out. Attacks: the same weights, after 20 undefended steps, meet every defence; labels are known. `plain`
compares directions, whatever the defence; `adaptive` is the default attack, which is told it.

How to read a row: means over images with 95 % bootstrap intervals over audits; `gain` is the paired difference of
exposure, adaptive minus plain. `reach` is the local estimate of what any adversary could get.

Exit status 1: on pruning of 90 %, signs, 8 bit to the nearest level or Soteria the interval of the gain reaches 0.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.quality.recovery import bootstrap
from lightning_gradaudit import (
    Baseline,
    Budget,
    ClipLayers,
    ClipNorm,
    GaussianNoise,
    LaplaceNoise,
    PruneSmallest,
    Quantise,
    SignOnly,
    Snapshot,
    Soteria,
    WithholdLayers,
    audit_snapshot,
)
from lightning_gradaudit.attacks import AdaptiveMatching
from lightning_gradaudit.simulation.defences import Defence, apply_defences

HEAD = "5.weight"
DEFENCES: dict[str, tuple[Defence, ...]] = {
    "none": (),
    "clip 0.1": (ClipNorm(max_norm=0.1),),
    "clip layers 0.1": (ClipLayers(max_norm=0.1),),
    "noise 0.3": (GaussianNoise(relative=0.3),),
    "noise 3": (GaussianNoise(relative=3.0),),
    "noise 30": (GaussianNoise(relative=30.0),),
    "laplace 0.3": (LaplaceNoise(relative=0.3),),
    "laplace 3": (LaplaceNoise(relative=3.0),),
    "prune 90 %": (PruneSmallest(share=0.9),),
    "prune 99 %": (PruneSmallest(share=0.99),),
    "sign": (SignOnly(),),
    "8 bit": (Quantise(bits=8, stochastic=False),),
    "4 bit": (Quantise(bits=4, stochastic=False),),
    "8 bit at random": (Quantise(bits=8),),
    "soteria 80 %": (Soteria(layer=HEAD, share=0.8),),
    "first layer withheld": (WithholdLayers(names=("0",)),),
}
GAINS = ("prune 90 %", "sign", "8 bit", "soteria 80 %")
RATES = (1e-2, 1e-3)
STEPS = 20


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("defences", __doc__)
    parser.add_argument("--images", type=int, default=12, help="attacked images per row")
    parser.add_argument("--evaluations", type=int, default=150, help="simulated gradients of an attack")
    parser.add_argument("--batch-size", type=int, default=1, help="of the attacked steps")
    parser.add_argument("--epochs", type=int, default=10, help="of training, in batches of 4")
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES))
    args = parser.parse_args(arguments)
    if args.quick:
        args.images, args.epochs, args.evaluations, args.defences = 4, 2, 60, ["none", *GAINS]
    return args


def load(args: argparse.Namespace) -> tuple[Tensor, Tensor, str]:
    """Return images, labels and words for the record: faces against other photographs, or those of --data."""
    if args.data is not None:
        images = common.load_images(args.data)
        return images.pixels, images.labels, images.description
    from skimage.data import lfw_subset

    pixels = torch.from_numpy(np.asarray(lfw_subset(), dtype=np.float32))[:, None]
    return pixels, (torch.arange(len(pixels)) >= 100).long(), "100 LFW faces and 100 other photographs, 25 x 25"


def build(pixels: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    side = (pixels.shape[-1] + 3) // 4
    return nn.Sequential(
        nn.Conv2d(pixels.shape[1], 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, int(labels.max()) + 1),
    )


def train(model: nn.Module, pixels: Tensor, labels: Tensor, defences: tuple[Defence, ...], **options: Any) -> None:
    """Train with defended gradients: `steps` of `batch` images, at `rate`, by `seed`."""
    generator = torch.Generator().manual_seed(options["seed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=options["rate"], weight_decay=1e-3)
    named = dict(model.named_parameters())
    order: list[int] = []
    for step in range(options["steps"]):
        if len(order) < options["batch"]:
            order = torch.randperm(len(pixels), generator=generator).tolist()
        chosen, order = order[: options["batch"]], order[options["batch"] :]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels[chosen]), labels[chosen]).backward()
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        shared = apply_defences(defences, gradients, seed=options["seed"] * 1_000_003 + step)
        for name, parameter in named.items():
            parameter.grad = shared.get(name)
        optimizer.step()


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(pixels).argmax(1) == labels).float().mean())


def trained_accuracy(
    defences: tuple[Defence, ...], seen: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], args: argparse.Namespace
) -> float:
    found = []
    for rate in RATES:
        model = build(*seen, args.seed)
        train(model, *seen, defences, rate=rate, batch=4, steps=args.epochs * (len(seen[0]) // 4), seed=args.seed)
        found.append((accuracy(model, *seen), accuracy(model, *held)))
    return max(found)[1]


def measure(
    model: nn.Module,
    defences: tuple[Defence, ...],
    audited: tuple[Tensor, Tensor],
    baseline: Baseline,
    args: argparse.Namespace,
) -> dict[str, list[Tensor]]:
    """Attack each batch twice; every figure is a list of (B,) tensors, one a batch."""
    found: dict[str, list[Tensor]] = {}
    for step, at in enumerate(torch.arange(len(audited[0])).split(args.batch_size)):
        snapshot = Snapshot.from_batch(
            model,
            (audited[0][at], audited[1][at]),
            loss=nn.functional.cross_entropy,
            defences=defences,
            labels_known=True,
            seed=args.seed,
            step=step,
        )
        for name, attack in (("plain", AdaptiveMatching().plain), ("adaptive", None)):
            last = attack is None
            record = audit_snapshot(
                snapshot,
                attack=attack,
                closed_forms=last,
                budget=Budget(evaluations=args.evaluations),
                baseline=baseline,
                analysis=last,
                confirm=50 if last else 0,
                seed=args.seed,
            )
            figures = {"exposure": record.exposure, "identified": record.identified}
            found.setdefault(f"{name}_valid", []).append(torch.tensor([float(record.valid)]))
            if last:
                figures["confirmed"] = record.confirmed
                figures["reach"] = None if record.leakage is None else record.leakage.reach
            for key, value in figures.items():
                found.setdefault(f"{name}_{key}", []).append(
                    torch.full((len(at),), math.nan) if value is None else torch.as_tensor(value).float()
                )
    pairs = zip(found["adaptive_exposure"], found["plain_exposure"], strict=True)
    return found | {"gain": [adaptive - plain for adaptive, plain in pairs]}


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    pixels, labels, words = load(args)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(args.seed))
    held, seen = order[: len(order) // 5], order[len(order) // 5 :]
    chosen = seen[: args.images]
    baseline = Baseline()
    baseline.observe(pixels[torch.cat([seen[args.images :], held])])
    state = build(pixels, labels, args.seed)
    train(state, pixels[seen], labels[seen], (), rate=1e-2, batch=4, steps=STEPS, seed=args.seed)
    rows: list[dict[str, Any]] = []
    failures = []
    for name in args.defences:
        defences = DEFENCES[name]
        reached = trained_accuracy(defences, (pixels[seen], labels[seen]), (pixels[held], labels[held]), args)
        found = measure(copy.deepcopy(state), defences, (pixels[chosen], labels[chosen]), baseline, args)
        row: dict[str, Any] = {"defence": name, "settings": [repr(d) for d in defences], "accuracy": reached}
        for key, groups in found.items():
            low, high = bootstrap(groups, args.seed)
            row[key] = {"mean": float(torch.cat(groups).mean()), "low": low, "high": high}
        rows.append(row)
        if name in GAINS and not row["gain"]["low"] > 0:
            failures.append(f"{name}: gain {row['gain']['mean']:.2f}, its interval begins at {row['gain']['low']:.2f}")
        keys = ("plain_exposure", "adaptive_exposure", "gain", "plain_identified", "adaptive_identified")
        keys += ("adaptive_confirmed", "adaptive_reach")
        cells = [f"{row[k]['mean']:.2f} ({row[k]['low']:.2f} to {row[k]['high']:.2f})" for k in keys]
        common.print_table(["defence", "accuracy", *keys], [[name, f"{reached:.2f}", *cells]])
        settings = {k: v for k, v in vars(args).items() if k not in ("data", "out")} | {"images_from": words}
        content = {"machine": common.machine(device), "versions": common.versions(), "settings": settings, "rows": rows}
        common.write_json(args.out, content)
    return common.judge(failures, sum(name in GAINS for name in args.defences))


if __name__ == "__main__":
    sys.exit(main())
