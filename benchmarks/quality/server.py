"""What does a server get that sees more than one gradient: buffers after the step, or the same batch again?

A federated client trains `convnet8` with BatchNorm in train mode. Two tables:

- *buffers*: one gradient of a batch, without and with the running statistics as they are after the step
  (`ThreatModel(buffers_shared=)`); untrained and after five epochs on other images, batches of 4 and 8.
- *looks*: gradients of one batch of 4 in 1, 2 and 5 rounds (`audit_looks`), one epoch on other images between them.

The same attack, the same number of evaluations and the same batches in every arm, labels unknown. An evaluation over k
looks simulates k gradients. `gain` is the mean over batches of the difference in PSNR to the first arm, with a 95 %
bootstrap interval over the batches.

    python -m benchmarks.quality.server --data FILE --threads 1
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, models
from lightning_gradaudit import AuditRecord, Baseline, Budget, Snapshot, audit_looks, audit_snapshot
from lightning_gradaudit.attacks import Attack, InvertingGradients, Modern
from lightning_gradaudit.attacks.auto import Auto

MEAN, STD = 0.5, 0.25
STAGES = (0, 5)
SIZES = (4, 8)
LOOKS = (1, 2, 5)
RESAMPLES = 2000
ATTACKS: dict[str, Attack] = {"modern": Modern(), "ig": InvertingGradients(total_variation=0.1), "auto": Auto()}
HEADERS = ("case", "arm", "PSNR dB", "SSIM", "exposure mean / worst", "named", "gain dB", "s")


def checkpoints(images: common.Images, seed: int, held_out: Tensor) -> list[nn.Module]:
    """Return the network after 0, 1, ... epochs on all images but the audited ones."""
    torch.manual_seed(seed)
    model = models.convnet8()
    kept = [copy.deepcopy(model)]
    others = torch.ones(len(images.pixels), dtype=torch.bool)
    others[held_out] = False
    pixels, labels = (images.pixels[others] - MEAN) / STD, images.labels[others]
    for epoch in range(STAGES[-1] + LOOKS[-1] - 1):
        models.train(model, pixels, labels, epochs=1, seed=seed * 1000 + epoch)
        kept.append(copy.deepcopy(model))
    return kept


def snapshot(model: nn.Module, images: common.Images, chosen: Tensor, *, shared: bool, step: int) -> Snapshot:
    """Return the gradient of a batch in train mode, with or without the buffers after it."""
    batch = (images.pixels[chosen] - MEAN) / STD, images.labels[chosen]
    return Snapshot.from_batch(
        model,
        batch,
        loss=nn.functional.cross_entropy,
        mean=MEAN,
        std=STD,
        mode="train",
        buffers_shared=shared,
        seed=step,
        step=step,
    )


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval."""
    tensor = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = tensor[torch.randint(len(tensor), (RESAMPLES, len(tensor)), generator=generator)].mean(1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(tensor.mean()), low, high


def arm(case: str, name: str, records: Sequence[AuditRecord], first: Sequence[AuditRecord]) -> dict[str, Any]:
    """Return one row: the records of one arm against those of the first arm on the same batches."""
    psnr = [float(r.psnr.mean()) for r in records]
    gain = [a - float(b.psnr.mean()) for a, b in zip(psnr, first, strict=True)]
    return {
        "case": case,
        "arm": name,
        "batches": len(records),
        "psnr": interval(psnr),
        "ssim": interval([float(r.ssim.mean()) for r in records]),
        "exposure": interval([float(r.exposure.mean()) for r in records]),
        "exposure_worst": max(float(r.exposure.max()) for r in records),
        "identified": float(torch.cat([r.identified for r in records]).float().mean()),
        "gain": interval(gain),
        "matching_loss": interval([r.matching_loss for r in records]),
        "self_test": max(r.self_test for r in records),
        "evaluations": max(r.evaluations for r in records),
        "seconds": sum(r.seconds for r in records) / len(records),
    }


def cells(row: dict[str, Any]) -> list[str]:
    def three(values: Sequence[float], digits: int = 1) -> str:
        mean, low, high = (f"{value:.{digits}f}" for value in values)
        return f"{mean} ({low}–{high})"

    exposure = f"{row['exposure'][0]:.2f} / {row['exposure_worst']:.2f}"
    return [
        row["case"], row["arm"], three(row["psnr"]), three(row["ssim"], 2), exposure, f"{row['identified']:.0%}",
        three(row["gain"]), f"{row['seconds']:.0f}",
    ]  # fmt: skip


def measure(args: Any, images: common.Images) -> list[dict[str, Any]]:
    """Return the rows of both tables."""
    generator = torch.Generator().manual_seed(args.seed)
    held_out = images.audited[torch.randperm(len(images.audited), generator=generator)[: max(SIZES) * args.batches]]
    nets = checkpoints(images, args.seed, held_out)
    gallery = torch.ones(len(images.pixels), dtype=torch.bool)
    gallery[held_out] = False
    baseline = Baseline(gallery_size=256)
    baseline.observe(images.pixels[gallery][:256], images.labels[gallery][:256])
    settings = {"attack": ATTACKS[args.attack], "closed_forms": False, "baseline": baseline}
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for stage in STAGES:
        state = f"{stage} epochs" if stage else "untrained"
        for size in SIZES if "buffers" in args.tables else ():
            batches = held_out.split(size)[: args.batches]
            found = []
            for shared in (False, True):
                steps = [snapshot(nets[stage], images, b, shared=shared, step=at) for at, b in enumerate(batches)]
                found.append(
                    [audit_snapshot(s, budget=Budget(evaluations=args.evaluations), **settings) for s in steps]
                )
                name = "buffers shared" if shared else "buffers not shared"
                rows.append(arm(f"{state}, B={size}", name, found[-1], found[0]))
                print(" | ".join(cells(rows[-1])), f"{time.monotonic() - start:.0f}", file=sys.stderr, flush=True)
        if "looks" in args.tables:
            by_count: list[list[AuditRecord]] = [[] for _ in LOOKS]
            for at, batch in enumerate(held_out.split(SIZES[0])[: args.batches]):
                seen = [snapshot(nets[stage + k], images, batch, shared=False, step=at) for k in range(LOOKS[-1])]
                records = audit_looks(seen, counts=LOOKS, budget=Budget(evaluations=args.look_evaluations), **settings)
                for kept, record in zip(by_count, records, strict=True):
                    kept.append(record)
            for count, kept in zip(LOOKS, by_count, strict=True):
                rows.append(arm(f"{state}, B={SIZES[0]}", f"{count} look(s)", kept, by_count[0]))
                print(" | ".join(cells(rows[-1])), f"{time.monotonic() - start:.0f}", file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parser("server", __doc__)
    options.add_argument("--attack", choices=list(ATTACKS), default="modern")
    options.add_argument("--evaluations", type=int, default=300)
    options.add_argument("--look-evaluations", type=int, default=200)
    options.add_argument("--batches", type=int, default=8)
    options.add_argument("--tables", nargs="+", choices=("buffers", "looks"), default=("buffers", "looks"))
    args = options.parse_args(arguments)
    device = common.check_device(args.device, args.threads)
    if args.quick:
        args.batches, args.evaluations, args.look_evaluations = 2, 100, 60
    images = common.load_images(args.data)
    rows = measure(args, images)
    # Every audit is valid, and what is known beside one gradient does not make the images worse on average.
    failures = [f"{r['case']}, {r['arm']}: self-test {r['self_test']:.1e}" for r in rows if not r["self_test"] < 1e-3]
    failures += [f"{r['case']}, {r['arm']}: gain {r['gain']}" for r in rows if r["gain"][2] < 0]
    common.print_table(HEADERS, [cells(row) for row in rows])
    common.write_json(
        args.out,
        {
            "benchmark": "server",
            "rows": rows,
            "failures": failures,
            "settings": common.settings_of(args, images),
            "machine": common.machine(device),
            "versions": common.versions(),
        },
    )
    return common.judge(failures, 2 * len(rows))


if __name__ == "__main__":
    sys.exit(main())
