"""Compare the default attack with Inverting Gradients on architectures that it was not chosen on.

`models.FIRST_HALF` served to choose, `models.OTHER_HALF` only to report; docs/notes/generalise.md has the split. Every
row attacks gradients of real images, labels known, networks in eval mode, pixels normalised by the statistics of
CIFAR-10. Untrained models are initialised afresh for every audit; trained ones have taken `--steps` steps on images
that are not audited. `auto` is what `GradAudit()` runs; `ig` is Inverting Gradients at two weights of its total
variation, with as many evaluations each.

How to read a row: mean PSNR in dB of each attack over the images, and the `lead` of `auto` over the better `ig` of
that row, with a 95 % bootstrap interval over audits of the difference.

Exit status 1: `auto` leads by less than 1 dB on average over the rows, or is more than .3 dB behind in one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, models
from benchmarks.quality.recovery import bootstrap, draw
from lightning_gradaudit import AuditRecord, Budget, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import Attack, InvertingGradients

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
LEAST_MEAN_LEAD = 1.0
LEAST_LEAD = -0.3
GALLERY = 128
AUTO = "auto"
ATTACKS: dict[str, Attack | None] = {
    AUTO: None,
    "ig 1e-2": InvertingGradients(total_variation=1e-2),
    "ig 1e-1": InvertingGradients(total_variation=1e-1),
}
HALVES = {
    "first": {build.__name__: build for build in models.FIRST_HALF},
    "other": {build.__name__: build for build in models.OTHER_HALF},
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("generalise", __doc__)
    parser.add_argument("--half", choices=HALVES, default="other")
    parser.add_argument("--models", nargs="+", help="only these of the half")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 40], help="of training before the audits")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[300])
    parser.add_argument("--images", type=int, default=8, help="least number of images per row")
    args = parser.parse_args(arguments)
    args.gallery = GALLERY
    if unknown := set(args.models or ()) - set(HALVES[args.half]):
        parser.error(f"--models: not in the {args.half} half: {', '.join(sorted(unknown))}.")
    if args.quick:
        args.batch_sizes, args.images, args.evaluations = [1], 2, [60]
    return args


def normalise(pixels: Tensor) -> Tensor:
    """Map pixels in [0, 1] to the models' input space."""
    mean, std = (torch.tensor(each, device=pixels.device)[:, None, None] for each in (MEAN, STD))
    return (pixels - mean) / std


def state(
    build: Callable[[], nn.Module], steps: int, images: common.Images, others: Tensor, args: argparse.Namespace
) -> Callable[[int], nn.Module]:
    """Return a function of the audit's number: a fresh model each, or the trained one."""

    def fresh(number: int) -> nn.Module:
        torch.manual_seed(args.seed * 1000 + number)
        return build().to(args.device)

    if not steps:
        return fresh
    model = fresh(0)
    pixels, labels = normalise(images.pixels[others].to(args.device)), images.labels[others].to(args.device)
    models.train(model, pixels, labels, epochs=steps, seed=args.seed, most_steps=steps)
    return lambda _: model


def audit(
    attack: Attack | None, model: nn.Module, images: common.Images, chosen: Tensor, number: int, **options: Any
) -> AuditRecord:
    """Attack the gradient of one batch."""
    device = next(model.parameters()).device
    snapshot = Snapshot.from_batch(
        model,
        (normalise(images.pixels[chosen].to(device)), images.labels[chosen].to(device)),
        loss=nn.functional.cross_entropy,
        mean=MEAN,
        std=STD,
        labels_known=True,
        seed=options["seed"],
        step=number,
    )
    return audit_snapshot(snapshot, attack=attack, closed_forms=attack is None, **options)


def compare(
    name: str,
    steps: int,
    batch_size: int,
    evaluations: int,
    images: common.Images,
    args: argparse.Namespace,
    attacks: dict[str, Attack | None] = ATTACKS,
) -> dict[str, Any]:
    """Run all attacks on one state of one model."""
    audited, others = draw(images, args, -(-args.images // batch_size) * batch_size)
    build = state(HALVES[args.half][name], steps, images, others, args)
    row: dict[str, Any] = {"model": name, "steps": steps, "batch_size": batch_size, "evaluations": evaluations}
    for label, attack in attacks.items():
        start = time.process_time()
        records = [
            audit(attack, build(number), images, chosen, number, seed=args.seed, budget=Budget(evaluations=evaluations))
            for number, chosen in enumerate(audited.split(batch_size))
        ]
        row[label] = summarise(records, args.seed) | {"cpu_seconds": time.process_time() - start}
    return row | leads(row, args.seed)


def summarise(records: list[AuditRecord], seed: int) -> dict[str, Any]:
    """Reduce the audits of one attack to its figures."""
    psnr = [record.psnr for record in records]
    exposure = torch.cat([record.exposure for record in records])
    return {
        "psnr": float(torch.cat(psnr).mean()),
        "psnr_interval": list(bootstrap(psnr, seed)),
        "psnr_per_audit": [[float(v) for v in each] for each in psnr],
        "ssim": float(torch.cat([record.ssim for record in records]).mean()),
        "exposure_mean": float(exposure.mean()),
        "exposure_max": float(exposure.max()),
        "invalid": sum(not record.valid for record in records),
        "winners": dict(Counter(r.reconstruction.attack for r in records if r.reconstruction is not None)),
        "reasons": [r.reconstruction.reason for r in records if r.reconstruction is not None],
    }


def leads(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the lead of `auto` over the better rival of a row, and its interval; nothing without both."""
    rivals = [name for name in row if name.startswith("ig ")]
    if AUTO not in row or not rivals:
        return {}
    best = max(rivals, key=lambda name: float(row[name]["psnr"]))
    pairs = zip(row[AUTO]["psnr_per_audit"], row[best]["psnr_per_audit"], strict=True)
    differences = [torch.tensor(ours) - torch.tensor(theirs) for ours, theirs in pairs]
    return {
        "lead": row[AUTO]["psnr"] - row[best]["psnr"],
        "lead_interval": list(bootstrap(differences, seed)),
        "best_rival": best,
    }


HEADERS = ("model", "steps", "B", "evaluations", *ATTACKS, "lead", "95 %")


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["lead_interval"]
    return [
        row["model"],
        *(str(row[key]) for key in ("steps", "batch_size", "evaluations")),
        *(f"{row[name]['psnr']:.1f}" for name in ATTACKS),
        f"{row['lead']:+.1f}",
        f"{low:+.1f} to {high:+.1f}",
    ]


def check(rows: list[dict[str, Any]]) -> list[str]:
    """Compare the leads with what is wanted."""
    mean = sum(row["lead"] for row in rows) / len(rows)
    failures = [] if mean >= LEAST_MEAN_LEAD else [f"mean lead {mean:.2f} dB, expected at least {LEAST_MEAN_LEAD}."]
    return failures + [
        f"{row['model']}, {row['steps']} steps, B = {row['batch_size']}: {row['lead']:+.2f} dB."
        for row in rows
        if row["lead"] < LEAST_LEAD
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for batch_size in args.batch_sizes:
        for evaluations in args.evaluations:
            for name in args.models or HALVES[args.half]:
                for steps in args.steps:
                    rows.append(compare(name, steps, batch_size, evaluations, images, args))
                    print(" | ".join(cells(rows[-1])), file=sys.stderr, flush=True)
                    write(rows, args, images, device, time.perf_counter() - start)  # a long run may be cut short
    common.print_table(HEADERS, [cells(row) for row in rows])
    return common.judge(check(rows), 1 + len(rows))


def write(
    rows: list[dict[str, Any]], args: argparse.Namespace, images: common.Images, device: torch.device, seconds: float
) -> None:
    common.write_json(
        args.out,
        {
            "benchmark": "generalise",
            "rows": rows,
            "mean_lead": sum(row["lead"] for row in rows) / len(rows),
            "failures": check(rows),
            "seconds": seconds,
            "settings": common.settings_of(args, images),
            "machine": common.machine(device),
            "versions": common.versions(),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
