"""Measure how much of the images each attack recovers, model by model.

Every row attacks gradients of real images through `audit_snapshot`: the same self-test, scores and null baseline as
in a live audit, with a gallery of other images of the same data set. Models are untrained. Labels are unknown to the
attacker, who knows the weights, the batch size and the BatchNorm mode.

How to read a row: `PSNR` in dB (mean over the images, 95 % bootstrap interval over the audits; 30 dB is a copy, about
10 dB is nothing), `SSIM`, `exposure` in [0, 1] above what a guess without the gradient reaches (mean / worst image),
`named`: share of the images that are nearest to their own reconstruction in the gallery, `labels`: share of the labels
recovered, `evals`: simulated gradients spent, `s`: seconds per audit. `portfolio` is what `GradAudit()` runs: closed
forms, then Inverting Gradients; every other row runs one attack alone. Some rows are poor and belong here: they show
where an attack fails.

Exit status 1: a row that a correct implementation must reach fell below its floor (`--min-...`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import models
import torch
from torch import Tensor, nn

from lightning_gradaudit import AuditRecord, Baseline, Budget, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import DLG, Attack, InvertingGradients, LinearLayerInversion, iDLG

RESAMPLES = 2000


@dataclass(frozen=True)
class Setup:
    """A model and the BatchNorm mode its gradients are taken in."""

    build: Callable[[], nn.Module]
    train_mode: bool = False


SETUPS = {
    "mlp": Setup(models.mlp),
    "conv2": Setup(models.conv2),
    "lenet": Setup(models.lenet),
    "convnet8-eval": Setup(models.convnet8),
    "convnet8-train": Setup(models.convnet8, train_mode=True),
}
ATTACKS: dict[str, Attack | None] = {
    "linear": LinearLayerInversion(),
    "ig": InvertingGradients(),
    "dlg": DLG(),
    "idlg": iDLG(),
    "portfolio": None,
}
QUICK = {"mlp": ("linear", "portfolio"), "conv2": ("ig",), "lenet": ("dlg", "idlg")}


@dataclass(frozen=True)
class Floor:
    """The least mean PSNR (dB) that the best of some attacks must reach on a model at batch size 1."""

    model: str
    attacks: tuple[str, ...]
    psnr: float


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("recovery", __doc__)
    parser.add_argument("--evaluations", type=int, default=400, help="simulated gradients per audit")
    parser.add_argument("--images", type=int, default=8, help="least number of images per row")
    parser.add_argument("--gallery", type=int, default=128, help="other images in the gallery, at least 100")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--models", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--min-exact", type=float, default=60.0, help="dB: mlp by linear and by portfolio")
    parser.add_argument("--min-conv2", type=float, default=20.0, help="dB: conv2 by ig")
    # L-BFGS without a line search ends anywhere for some starts, which the mean over eight images feels: hence 16.
    parser.add_argument("--min-lenet", type=float, default=16.0, help="dB: lenet by the better of dlg and idlg")
    args = parser.parse_args(arguments)
    if args.gallery < 100:
        parser.error(f"--gallery: identification needs at least 100 other images, got {args.gallery}.")
    return args


def makes_sense(attack: str, model: str, batch_size: int, *, quick: bool) -> bool:
    """Leave out what cannot run: closed forms without a linear layer at the image, iDLG on batches, BN at B=1."""
    if attack == "linear" and model != "mlp":
        return False
    if attack == "idlg" and batch_size > 1:
        return False
    if SETUPS[model].train_mode and batch_size == 1:
        return False
    return not quick or (attack in QUICK.get(model, ()) and (batch_size == 1 or model == "conv2"))


def draw(images: common.Images, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the indices of the audited images and of the gallery, disjoint, the same for every row."""
    generator = torch.Generator().manual_seed(args.seed)
    most = max([args.images, *args.batch_sizes]) + max(args.batch_sizes)
    audited = images.audited[torch.randperm(len(images.audited), generator=generator)[:most]]
    rest = torch.ones(len(images.pixels), dtype=torch.bool)
    rest[audited] = False
    others = rest.nonzero().flatten()
    if len(audited) < most or len(others) < args.gallery:
        raise SystemExit(
            f"--data: {len(images.pixels)} images are too few for {most} audited and {args.gallery} others."
        )
    return audited, others[torch.randperm(len(others), generator=generator)[: args.gallery]]


def audit_row(
    images: common.Images, args: argparse.Namespace, attack: str, model: str, batch_size: int
) -> list[AuditRecord]:
    """Audit at least `--images` images in batches; each batch meets a freshly initialised model."""
    audited, others = draw(images, args)
    baseline = Baseline(gallery_size=args.gallery)
    baseline.observe(images.pixels[others], images.labels[others])
    records = []
    for step in range(-(-args.images // batch_size)):
        chosen = audited[step * batch_size : (step + 1) * batch_size]
        record = audit_snapshot(
            take(images, chosen, SETUPS[model], args, step),
            attack=ATTACKS[attack],
            closed_forms=ATTACKS[attack] is None,
            budget=Budget(evaluations=args.evaluations),
            baseline=baseline,
            seed=args.seed,
        )
        assert record.pixels is not None
        assert record.truth is not None
        baseline.remember(record.pixels, record.truth)
        records.append(record)
    return records


def take(images: common.Images, chosen: Tensor, setup: Setup, args: argparse.Namespace, step: int) -> Snapshot:
    """Return the gradient of one batch at a fresh initialisation."""
    torch.manual_seed(args.seed * 1000 + step)
    model = setup.build().to(args.device)
    batch = images.pixels[chosen].to(args.device), images.labels[chosen].to(args.device)
    mode = "train" if setup.train_mode else "eval"
    return Snapshot.from_batch(model, batch, loss=nn.functional.cross_entropy, mode=mode, seed=args.seed, step=step)


def summarise(attack: str, model: str, batch_size: int, records: list[AuditRecord], seed: int) -> dict[str, Any]:
    """Reduce the audits of a row to its figures."""
    psnr = [record.psnr for record in records]
    low, high = bootstrap(psnr, seed)
    exposure = torch.cat([record.exposure for record in records])
    return {
        "model": model,
        "attack": attack,
        "batch_size": batch_size,
        "audits": len(records),
        "images": len(exposure),
        "psnr": float(torch.cat(psnr).mean()),
        "psnr_interval": [low, high],
        "psnr_per_image": [float(v) for v in torch.cat(psnr)],
        "ssim": float(torch.cat([record.ssim for record in records]).mean()),
        "exposure_mean": float(exposure.mean()),
        "exposure_max": float(exposure.max()),
        "identified": float(torch.cat([record.identified for record in records]).nanmean()),
        "chance": sum(r.chance_hits for r in records) / max(1, sum(r.chance_trials for r in records)),
        "label_accuracy": float(torch.tensor([record.label_accuracy for record in records]).nanmean()),
        "evaluations": sum(record.evaluations for record in records) / len(records),
        "seconds_per_audit": sum(record.seconds for record in records) / len(records),
        "outcomes": dict(Counter(str(record.outcome) for record in records)),
        "invalid": sum(not record.valid for record in records),
    }


def bootstrap(groups: list[Tensor], seed: int) -> tuple[float, float]:
    """Return a 95 % percentile interval of the mean, resampling audits: images of one batch share a fate."""
    means = torch.stack([group.mean() for group in groups])
    draws = torch.randint(len(means), (RESAMPLES, len(means)), generator=torch.Generator().manual_seed(seed))
    low, high = means[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def check(rows: list[dict[str, Any]], floors: Sequence[Floor]) -> tuple[list[str], int]:
    """Compare rows with their floors; rows that were not run are not judged."""
    failures, checked = [], 0
    for floor in floors:
        ran = [r for r in rows if r["model"] == floor.model and r["attack"] in floor.attacks and r["batch_size"] == 1]
        if not ran:
            continue
        checked += 1
        best = max(row["psnr"] for row in ran)
        if not best >= floor.psnr:
            names = " or ".join(row["attack"] for row in ran)
            failures.append(f"{floor.model} B=1 by {names}: mean PSNR {best:.1f} dB, expected at least {floor.psnr:g}.")
    failures += [
        f"{row['model']} B={row['batch_size']} by {row['attack']}: {row['invalid']} audit(s) invalid."
        for row in rows
        if row["invalid"] and not row["outcomes"].get("nonfinite")
    ]
    return failures, checked


HEADERS = (
    "model", "attack", "B", "n", "PSNR", "95 %", "SSIM", "exposure", "named", "labels", "evals", "s", "outcomes"
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["psnr_interval"]
    return [
        row["model"],
        row["attack"],
        str(row["batch_size"]),
        str(row["images"]),
        f"{row['psnr']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{row['ssim']:.2f}",
        f"{row['exposure_mean']:.2f} / {row['exposure_max']:.2f}",
        f"{row['identified']:.0%}",
        f"{row['label_accuracy']:.0%}",
        f"{row['evaluations']:.0f}",
        f"{row['seconds_per_audit']:.1f}",
        ", ".join(f"{name} {count}" for name, count in sorted(row["outcomes"].items())),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    start = time.perf_counter()
    rows = []
    for model in args.models:
        for batch_size in args.batch_sizes:
            for attack in args.attacks:
                if makes_sense(attack, model, batch_size, quick=args.quick):
                    records = audit_row(images, args, attack, model, batch_size)
                    rows.append(summarise(attack, model, batch_size, records, args.seed))
                    print(" ".join(cells(rows[-1])), file=sys.stderr, flush=True)
    common.print_table(HEADERS, [cells(row) for row in rows])
    floors = (
        Floor("mlp", ("linear",), args.min_exact),
        Floor("mlp", ("portfolio",), args.min_exact),
        Floor("conv2", ("ig",), args.min_conv2),
        Floor("lenet", ("dlg", "idlg"), args.min_lenet),
    )
    failures, checked = check(rows, floors)
    common.write_json(
        args.out,
        {
            "benchmark": "recovery",
            "rows": rows,
            "floors": [{"model": f.model, "attacks": f.attacks, "psnr": f.psnr} for f in floors],
            "failures": failures,
            "seconds": time.perf_counter() - start,
            "settings": common.settings_of(args, images),
            "machine": common.machine(device),
            "versions": common.versions(),
        },
    )
    return common.judge(failures, checked)


if __name__ == "__main__":
    sys.exit(main())
