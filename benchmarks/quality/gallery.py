"""Measure how well candidate photographs are named from a gradient alone (`attacks.GalleryIdentification`).

The candidates are the hundred LFW faces of scikit-image, enlarged to 32 x 32; batches are drawn from them. The network
is `conv2` after 20 steps of training, on one of two tasks: `tens`, the faces and their mirror images in ten arbitrary
classes; `faces`, faces against other photographs, so that all candidates are of one class and their gradients alike.
Noise is Gaussian, its norm relative to that of the gradient. `known`: the attacker knows the candidates' labels;
`unknown`: each candidate is tried with the labels recovered from the gradient.

How to read a row: the share of a batch among the B candidates named (mean over batches, 95 % bootstrap interval),
beside the chance B / 100.

Exit status 1: at B = 4 a row fell below its floor: 99 % without noise, 90 % at noise 1, 35 % at noise 3.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import common, models
from benchmarks.quality.recovery import bootstrap
from lightning_gradaudit import Budget, GaussianNoise, Snapshot
from lightning_gradaudit.attacks import GalleryIdentification

CANDIDATES = 100
FLOORS = {0.0: 0.99, 1.0: 0.90, 3.0: 0.35}  # at B = 4, where chance is 4 %
STEPS = 20


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("gallery", __doc__)
    parser.add_argument("--batches", type=int, default=24, help="batches per row")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 1.0, 3.0])
    parser.add_argument("--tasks", nargs="+", choices=("tens", "faces"), default=["tens", "faces"])
    args = parser.parse_args(arguments)
    if args.data is not None:
        parser.error("--data: this benchmark is about faces.")
    if args.quick:
        args.batch_sizes = [4]
    return args


def task(name: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network after 20 steps, the candidates (100, 3, 32, 32) in [0, 1] and their labels (100,)."""
    images = common.load_images(None)
    pixels, labels = images.pixels, images.labels
    if name == "faces":
        from skimage.data import lfw_subset

        grey = torch.from_numpy(np.asarray(lfw_subset(), dtype=np.float32))[:, None]
        pixels = nn.functional.interpolate(grey, pixels.shape[-2:], mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1)
        labels = (torch.arange(len(pixels)) < CANDIDATES).long()
    torch.manual_seed(seed)
    model = models.conv2()
    models.train(model, pixels, labels, epochs=STEPS * 50 // len(pixels), seed=seed)
    return model.eval(), pixels[:CANDIDATES].contiguous(), labels[:CANDIDATES]


def share_named(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    noise: float,
    known: bool,
    batches: int,
    seed: int = 0,
) -> Tensor:
    """Return the share of each of some random batches that is named among all candidates, (batches,) in [0, 1].

    Args:
        model: The network, in the mode to be audited.
        pixels, labels: (K, C, H, W) in [0, 1] and (K,): candidates; batches are drawn from them.
        batch_size: B.
        noise: Norm of the Gaussian noise relative to that of the gradient.
        known: Whether the attacker knows the candidates' labels.
        batches: How many.
        seed: Draws batches and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    attack = GalleryIdentification(candidates=pixels, labels=labels if known else None)
    shares = []
    for step in range(batches):
        chosen = torch.randperm(len(pixels), generator=generator)[:batch_size]
        snapshot = Snapshot.from_batch(
            model,
            (pixels[chosen], labels[chosen]),
            loss=nn.functional.cross_entropy,
            mode="as_is",
            defences=(GaussianNoise(relative=noise),) if noise else (),
            seed=seed * 1000 + step,
        )
        most = Budget(evaluations=4 * len(pixels) * batch_size + 1)
        named = attack(snapshot.observation, budget=most, generator=generator).inputs
        apart = (named[:, None] - pixels[chosen]).abs().flatten(2).amax(2)
        shares.append((apart.min(0).values < 1e-4).float().mean())
    return torch.stack(shares)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    start, rows = time.perf_counter(), []
    for name in args.tasks:
        model, pixels, labels = task(name, args.seed)
        model, pixels, labels = model.to(device), pixels.to(device), labels.to(device)
        for size in args.batch_sizes:
            for noise in args.noise:
                for known in (True, False):
                    began = time.perf_counter()
                    shares = share_named(
                        model, pixels, labels,
                        batch_size=size, noise=noise, known=known, batches=args.batches, seed=args.seed,
                    )  # fmt: skip
                    seconds = (time.perf_counter() - began) / args.batches
                    rows.append(_row(name, size, noise, shares.cpu(), seconds, args.seed, known=known))
                    print(" ".join(cells(rows[-1])), file=sys.stderr, flush=True)
    common.print_table(HEADERS, [cells(row) for row in rows])
    judged = [row for row in rows if row["batch_size"] == 4 and row["noise"] in FLOORS]
    failures = [
        f"{row['task']}, noise {row['noise']:g}, labels {row['labels']}: {row['named']:.0%}, expected at least "
        f"{FLOORS[row['noise']]:.0%}."
        for row in judged
        if row["named"] < FLOORS[row["noise"]]
    ]
    common.write_json(
        args.out,
        {
            "benchmark": "gallery",
            "rows": rows,
            "failures": failures,
            "seconds": time.perf_counter() - start,
            "settings": common.settings_of(args, common.load_images(None)),
            "machine": common.machine(device),
            "versions": common.versions(),
        },
    )
    return common.judge(failures, len(judged))


def _row(
    name: str, size: int, noise: float, shares: Tensor, seconds: float, seed: int, *, known: bool
) -> dict[str, Any]:
    low, high = bootstrap(list(shares[:, None]), seed)
    return {
        "task": name,
        "batch_size": size,
        "noise": noise,
        "labels": "known" if known else "unknown",
        "batches": len(shares),
        "named": float(shares.mean()),
        "named_interval": [low, high],
        "chance": size / CANDIDATES,
        "seconds_per_batch": seconds,
    }


HEADERS = ("task", "B", "noise", "labels", "named", "95 %", "chance", "s")


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["named_interval"]
    return [
        row["task"],
        str(row["batch_size"]),
        f"{row['noise']:g}",
        row["labels"],
        f"{row['named']:.0%}",
        f"{low:.0%}-{high:.0%}",
        f"{row['chance']:.0%}",
        f"{row['seconds_per_batch']:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
