"""Reproduce published recoveries: their figure, our port of their attack, and our default on the same gradients.

Models and settings are written from the papers' text. Images are those of `--data`, so a published mean over other
images is compared with an interval. Networks are untrained, a fresh one for each batch, in eval mode; labels are known
where the source knows them.

| row | source | setting |
|---|---|---|
| `lenet` | Geiping et al. (arXiv:2003.14053), Table 1 | sigmoid LeNet, B = 1, signed Adam .1, TV 1e-2, 4 800 steps |
| `dlg` | breaching's stored runs | ConvNet of 2 904 970 parameters, B = 1, deep leakage from gradients, L-BFGS |
| `tiled` | the same | Wei et al. (arXiv:2004.10397): tiled start, L-BFGS |
| `cnn6` | the same | R-GAP (Zhu and Blaschko, arXiv:2010.07733) on its CNN of 154 266 parameters, B = 1 |
| `vit` | APRIL (arXiv:2112.14087) | a ViT-S at 224 x 224, B = 1; the images are enlarged |
| `spear` | SPEAR (arXiv:2403.03945) | a ReLU network on pixels, B = 25, all images exact |

How to read a row: PSNR in dB, mean over images with a 95 % bootstrap interval over batches, and the gradient
evaluations that each attack was granted.

Exit status 1: our default lies below the published figure or below our port of the attack.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from benchmarks import common, models
from benchmarks.quality.generalise import MEAN, STD, normalise, summarise
from lightning_gradaudit import Budget, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import (
    DLG,
    Attack,
    ClientPrivacyLeakage,
    InvertingGradients,
    PatchEmbeddingInversion,
    RecursiveInversion,
    SpanInversion,
)

EXACT_PSNR = 60.0


def cnn6() -> nn.Module:
    """The network of R-GAP: six convolutions without bias and leaky ReLUs, a linear head; 154 266 parameters."""
    layers: list[nn.Module] = []
    channels = 3
    for outputs, kernel, stride, padding in (
        (12, 4, 2, 2),
        (36, 3, 2, 1),
        (36, 3, 1, 1),
        (36, 3, 1, 1),
        (64, 3, 2, 1),
        (128, 3, 1, 1),
    ):
        layers += [nn.Conv2d(channels, outputs, kernel, stride, padding, bias=False), nn.LeakyReLU(0.2)]
        channels = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 5 * 5, models.CLASSES))


def vit_small() -> nn.Module:
    """ViT-S on patches of 16 x 16 of an image of 224 x 224, its head drawn as torch draws it."""
    model = VisionTransformer(
        image_size=224,
        patch_size=16,
        num_layers=12,
        num_heads=6,
        hidden_dim=384,
        mlp_dim=1536,
        num_classes=models.CLASSES,
    )
    model.heads.head.reset_parameters()
    return model


def relu_network(width: int = 200, layers: int = 6) -> nn.Module:
    """SPEAR's fully connected ReLU network: hidden layers of 200 units on the pixels."""
    modules: list[nn.Module] = [nn.Flatten()]
    inputs = 3 * models.SIDE**2
    for _ in range(layers - 1):
        modules += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*modules, nn.Linear(inputs, models.CLASSES))


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure and how it is reproduced.

    Attributes:
        build: Makes the network.
        figure: Published PSNR in dB, `deviation` its standard deviation over images; None: not given.
        exact: Whether the source claims exact images in place of a PSNR.
        port: Our port of the published attack, granted `port_evaluations`.
        evaluations: What our default is granted; the same or fewer.
        batch_size, side: Of the batches; images are enlarged to the side.
        labels_known: Whether the adversary is given the labels.
    """

    build: Callable[[], nn.Module]
    figure: float | None = None
    deviation: float | None = None
    exact: bool = False
    port: Attack
    port_evaluations: int
    evaluations: int
    batch_size: int = 1
    side: int = models.SIDE
    labels_known: bool = True


ROWS = {
    "lenet": Published(
        build=models.lenet,
        figure=18.00,
        deviation=3.33,
        port=InvertingGradients(total_variation=1e-2),
        port_evaluations=4800,
        evaluations=1200,
    ),
    "cnn6": Published(
        build=cnn6, figure=49.01, port=RecursiveInversion(), port_evaluations=600, evaluations=600, labels_known=False
    ),
    "vit": Published(
        build=vit_small, figure=23.90, port=PatchEmbeddingInversion(), port_evaluations=2, evaluations=2, side=224
    ),
    "spear": Published(
        build=relu_network,
        exact=True,
        port=SpanInversion(),
        port_evaluations=60,
        evaluations=60,
        batch_size=25,
        labels_known=False,
    ),
    "dlg": Published(
        build=partial(models.pool_convnet, 64),
        figure=23.41,
        port=DLG(),
        port_evaluations=1200,
        evaluations=1200,
        labels_known=False,
    ),
    "tiled": Published(
        build=partial(models.pool_convnet, 64),
        figure=24.06,
        port=ClientPrivacyLeakage(),
        port_evaluations=1200,
        evaluations=1200,
    ),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("published", __doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--images", type=int, default=30, help="least number of images per row")
    parser.add_argument("--port-evaluations", type=int, help="of the published attack; default: each row's own")
    parser.add_argument("--evaluations", type=int, help="of our default; default: each row's own")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rows, args.images = ["lenet", "cnn6"], 2
        args.port_evaluations = args.evaluations = 200
    return args


def reproduce(name: str, images: common.Images, args: argparse.Namespace) -> dict[str, Any]:
    """Run the port and our default on the gradients of one row."""
    row = ROWS[name]
    batches = -(-args.images // row.batch_size)
    order = torch.randperm(len(images.audited), generator=torch.Generator().manual_seed(args.seed))
    chosen = images.audited[order[: batches * row.batch_size]].split(row.batch_size)
    port = args.port_evaluations or row.port_evaluations
    ours = args.evaluations or row.evaluations
    result: dict[str, Any] = {
        "row": name,
        "published": row.figure,
        "published_deviation": row.deviation,
        "images": batches * row.batch_size,
        "batch_size": row.batch_size,
    }
    for label, attack, evaluations in (("port", row.port, port), ("default", None, ours)):
        start = time.process_time()
        records = [
            audit_snapshot(
                snapshot(row, images.pixels[each].to(args.device), images.labels[each].to(args.device), number, args),
                attack=attack,
                closed_forms=attack is None,
                budget=Budget(evaluations=evaluations),
                seed=args.seed,
            )
            for number, each in enumerate(chosen)
        ]
        result[label] = summarise(records, args.seed) | {
            "evaluations": evaluations,
            "spent": sum(record.evaluations for record in records) / len(records),
            "exact": sum(bool((record.psnr > EXACT_PSNR).all()) for record in records) / len(records),
            "deviation": float(torch.cat([record.psnr for record in records]).std()) if len(records) > 1 else None,
            "cpu_seconds": time.process_time() - start,
        }
    return result


def snapshot(row: Published, pixels: Tensor, labels: Tensor, number: int, args: argparse.Namespace) -> Snapshot:
    """Return the gradient of one batch on a fresh network."""
    torch.manual_seed(args.seed * 1000 + number)
    if row.side != models.SIDE:
        enlarged = nn.functional.interpolate(pixels, (row.side, row.side), mode="bicubic", align_corners=False)
        pixels = enlarged.clamp(0, 1)
    return Snapshot.from_batch(
        row.build().to(args.device),
        (normalise(pixels), labels),
        loss=nn.functional.cross_entropy,
        mean=MEAN,
        std=STD,
        labels_known=row.labels_known,
        seed=args.seed,
        step=number,
    )


HEADERS = ("row", "images", "published", "port", "95 %", "evaluations", "default", "95 %", "evaluations", "exact")


def cells(result: dict[str, Any]) -> list[str]:
    published = "exact" if result["published"] is None else f"{result['published']:.2f}"
    found = [result["row"], str(result["images"]), published]
    for each in (result["port"], result["default"]):
        low, high = each["psnr_interval"]
        found += [f"{each['psnr']:.1f}", f"{low:.1f}-{high:.1f}", str(each["evaluations"])]
    return [*found, f"{result['default']['exact']:.0%}"]


def check(result: dict[str, Any]) -> list[str]:
    """Compare our default with the published figure and with the port."""
    name, ours = result["row"], result["default"]
    if ROWS[name].exact:
        return [] if ours["exact"] == 1 else [f"{name}: {ours['exact']:.0%} of the batches exact, expected all."]
    # An exact port and an exact default differ by rounding alone.
    floors = (("published", ROWS[name].figure), ("our port", min(result["port"]["psnr"], EXACT_PSNR)))
    return [
        f"{name}: {ours['psnr']:.2f} dB, {what} {floor:.2f}."
        for what, floor in floors
        if floor is not None and not ours["psnr"] >= floor  # a port that does not apply has no PSNR
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    start = time.perf_counter()
    results: list[dict[str, Any]] = []
    failures: list[str] = []
    for name in args.rows:
        results.append(reproduce(name, images, args))
        failures += check(results[-1])
        print(" | ".join(cells(results[-1])), file=sys.stderr, flush=True)
        content = {
            "benchmark": "published",
            "rows": results,
            "failures": failures,
            "seconds": time.perf_counter() - start,
            "settings": common.settings_of(args, images),
            "machine": common.machine(device),
            "versions": common.versions(),
        }
        common.write_json(args.out, content)  # after every row: a long run may be cut short
    common.print_table(HEADERS, [cells(result) for result in results])
    return common.judge(failures, len(results))


if __name__ == "__main__":
    sys.exit(main())
