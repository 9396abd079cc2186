"""Measure how many labels are recovered from a gradient with the help of public images, against floors.

Each row is one state of one network and one batch size: the share of the label multiset that `recover_labels` finds,
mean over the batches with a 95 % bootstrap interval. A third of the images is public: the network has not seen them
and they are never audited. The others train the network, for as many epochs as the row says, and the audited batches
are drawn from them, as in an audit while training runs. Untrained networks are initialised afresh for every batch.
`plain` is the same without public images, where the mean softmax output comes from noise.

Exit status 1: a row's mean with public images fell below the floor of its state.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, models
from lightning_gradaudit import Snapshot
from lightning_gradaudit.attacks import recover_labels

NETWORKS = ("mlp", "conv2", "lenet_default", "convnet8", "resnet8", "vit")
NORMALIZED = {"convnet8", "resnet8"}  # by BatchNorm: the mode matters
EPOCHS = (0, 5)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
QUICK = {"networks": ("mlp", "convnet8"), "sizes": (1, 8, 32)}
FLOORS = {0: 0.99, 5: 0.93}
RESAMPLES = 2000


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("labels", __doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", type=int, default=16, help="audited batches per row, at least 8")
    args = parser.parse_args(arguments)
    if args.batches < 8:
        parser.error(f"--batches: an interval needs at least 8, got {args.batches}.")
    return args


def split(images: common.Images, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the public images and of those that train the network, disjoint."""
    order = images.audited[torch.randperm(len(images.audited), generator=torch.Generator().manual_seed(seed))]
    return order[: len(order) // 3], order[len(order) // 3 :]


def share(recovered: Tensor, labels: Tensor) -> float:
    """Return the share of a multiset of labels that another one contains."""
    counts = (torch.bincount(each.cpu(), minlength=common.CLASSES) for each in (recovered, labels))
    return float(torch.minimum(*counts).sum()) / len(labels)


def rows_of(network: str, epochs: int, images: common.Images, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for every mode and batch size of one state."""
    public, private = split(images, args.seed)
    pixels, labels = images.pixels.to(args.device), images.labels.to(args.device)

    def fresh(number: int) -> nn.Module:
        torch.manual_seed(args.seed * 1000 + number)
        return getattr(models, network)().to(args.device)

    trained = fresh(0)
    models.train(trained, pixels[private], labels[private], epochs=epochs, seed=args.seed)
    for mode in ("eval", "train") if network in NORMALIZED else ("eval",):
        for size in QUICK["sizes"] if args.quick else SIZES:
            if size > len(private):
                continue
            start, found, plain = time.perf_counter(), [], []
            for number in range(args.batches):
                random = torch.Generator().manual_seed(args.seed * 1000 + number)
                chosen = private[torch.randperm(len(private), generator=random)[:size]]
                for held, shares in ((pixels[public], found), (None, plain)):
                    observation = Snapshot.from_batch(
                        trained if epochs else fresh(number),
                        (pixels[chosen], labels[chosen]),
                        loss=nn.functional.cross_entropy,
                        mode=mode,
                        public_images=held,
                        seed=args.seed,
                    ).observation
                    estimate = recover_labels(observation, generator=torch.Generator().manual_seed(args.seed))
                    shares.append(0.0 if estimate.labels is None else share(estimate.labels, labels[chosen]))
            low, high = bootstrap(found, args.seed)
            yield {
                "network": network,
                "epochs": epochs,
                "mode": mode,
                "batch_size": size,
                "batches": args.batches,
                "public_images": len(public),
                "accuracy": sum(found) / len(found),
                "interval": [low, high],
                "least": min(found),
                "plain": sum(plain) / len(plain),
                "seconds": (time.perf_counter() - start) / (2 * args.batches),
            }


def bootstrap(shares: list[float], seed: int) -> tuple[float, float]:
    """Return a 95 % percentile interval of the mean over batches."""
    values = torch.tensor(shares)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


HEADERS = ("network", "epochs", "mode", "B", "batches", "accuracy", "95 %", "least", "plain", "s")


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    return [
        row["network"],
        str(row["epochs"]),
        row["mode"],
        str(row["batch_size"]),
        str(row["batches"]),
        f"{row['accuracy']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row['least']:.2f}",
        f"{row['plain']:.3f}",
        f"{row['seconds']:.2f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for network in QUICK["networks"] if args.quick else args.networks:
        for epochs in EPOCHS:
            for row in rows_of(network, epochs, images, args):
                print(" ".join(cells(row)), file=sys.stderr, flush=True)
                rows.append(row)
    failures = [
        f"{r['network']}, {r['epochs']} epochs, {r['mode']} mode, B={r['batch_size']}: {r['accuracy']:.3f} of the "
        f"labels, expected at least {FLOORS[r['epochs']]:.2f}."
        for r in rows
        if not r["accuracy"] >= FLOORS[r["epochs"]]
    ]
    common.print_table(HEADERS, [cells(row) for row in rows])
    common.write_json(
        args.out,
        {
            "benchmark": "labels",
            "rows": rows,
            "failures": failures,
            "seconds": time.perf_counter() - start,
            "settings": common.settings_of(args, images),
            "machine": common.machine(device),
            "versions": common.versions(),
        },
    )
    return common.judge(failures, len(rows))


if __name__ == "__main__":
    sys.exit(main())
