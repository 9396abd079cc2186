"""Measure what the analysis of an audit costs, in training steps.

For each model and batch size the default analysis (`Analysis()`, as `GradAudit()` runs it) is timed on real images
against the forward and backward pass of the training step it analyses. A batch is analysed in one run; `per image` is
that run over the number of its images. Medians over repetitions.

Exit status 1: a row costs more than `--max-steps` training steps per audited image.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks import common, models
from lightning_gradaudit import Snapshot
from lightning_gradaudit.analysis import Analysis, analyse

MODELS = {
    "mlp": models.mlp,
    "conv2": models.conv2,
    "lenet": models.lenet,
    "convnet8": models.convnet8,
    "resnet8": models.resnet8,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser("analysis_cost", __doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--max-steps", type=float, default=200.0, help="training steps per audited image")
    args = parser.parse_args(arguments)
    if args.quick:
        args.models, args.repetitions = ["mlp", "conv2"], 3
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    rows, failures = [], []
    for name in args.models:
        for size in args.batch_sizes:
            torch.manual_seed(args.seed)
            batch = images.pixels[:size].to(device), images.labels[:size].to(device)
            snapshot = Snapshot.from_batch(MODELS[name]().to(device), batch, loss=nn.functional.cross_entropy)
            found = [
                analyse(snapshot, Analysis(), generator=torch.Generator().manual_seed(args.seed))
                for _ in range(args.repetitions)
            ]
            steps = statistics.median(each.training_steps for each in found)
            row = {
                "model": name,
                "batch_size": size,
                "products": found[0].products,
                "training_steps": steps,
                "per_image": steps / size,
                "seconds": statistics.median(each.seconds for each in found),
                "leak_r2": float(found[0].leak_r2.mean()),
                "leak_r2_low": float(found[0].leak_r2_low.mean()),
            }
            rows.append(row)
            if row["per_image"] > args.max_steps:
                failures.append(f"{name} at B = {size}: {row['per_image']:.0f} training steps per image.")
    common.print_table(
        ["model", "B", "products", "training steps", "per image", "s", "leak-R2 from", "to"],
        [
            [
                row["model"],
                str(row["batch_size"]),
                str(row["products"]),
                f"{row['training_steps']:.0f}",
                f"{row['per_image']:.0f}",
                f"{row['seconds']:.2f}",
                f"{row['leak_r2_low']:.2f}",
                f"{row['leak_r2']:.2f}",
            ]
            for row in rows
        ],
    )
    header = {"settings": common.settings_of(args, images), "machine": common.machine(device)}
    common.write_json(args.out, header | {"versions": common.versions(), "rows": rows})
    return common.judge(failures, len(rows))


if __name__ == "__main__":
    sys.exit(main())
