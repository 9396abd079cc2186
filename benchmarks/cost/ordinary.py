"""Train a model of ordinary size under the default audit, and note when which result is there.

torchvision's ResNet-18 (ten classes) on images scaled up to 64x64, batches of 16, `GradAudit()` with its defaults, for
`--minutes` of training. The table shows, for every result of an audit, after how many seconds of training it was there
and of how many evaluations it is; then what stands at the end. Exit status 1: no result within `--patience` seconds of
the first sample.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import common
from lightning_gradaudit import AuditRecord, AuditSettings, GradAudit, Limits


class ResNet18(pl.LightningModule):
    """Train torchvision's ResNet-18 with Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torchvision.models.resnet18(num_classes=common.CLASSES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Watch(pl.Callback):
    """Note when a result of an audit is there.

    Args:
        audit: The audit to watch.
    """

    def __init__(self, audit: GradAudit) -> None:
        self.audit, self.began = audit, 0.0
        self.results: dict[tuple[int, int], dict[str, Any]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = time.monotonic()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.look()

    def look(self) -> None:
        """Note the results that are new."""
        for record in self.audit.evidence.records:
            key = record.step, record.evaluations
            self.results.setdefault(key, {"seconds": time.monotonic() - self.began, "rung": record.rung})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("ordinary", __doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--every", type=int, default=100, help="every_n_steps")
    parser.add_argument("--wait", type=float, default=120.0, help="final_wait_seconds")
    parser.add_argument("--one-rung", action="store_true", help="AuditSettings(rungs=False)")
    parser.add_argument("--patience", type=float, default=180.0)
    args = parser.parse_args(arguments)
    if args.quick:
        args.minutes, args.wait = 2.0, 30.0
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    torch.manual_seed(args.seed)
    pixels = F.interpolate(images.pixels, (64, 64), mode="bilinear", align_corners=False)
    data = DataLoader(TensorDataset(pixels, images.labels.long()), batch_size=16, shuffle=True, drop_last=True)
    audit = GradAudit(
        every_n_steps=args.every,
        settings=AuditSettings(rungs=not args.one_rung),
        limits=Limits(final_wait_seconds=args.wait),
        dirpath=tempfile.mkdtemp(prefix="gradaudit-ordinary-"),
    )
    watch = Watch(audit)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", max_epochs=-1,
        max_time={"seconds": int(60 * args.minutes)}, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[watch, audit],
    )  # fmt: skip
    trainer.fit(ResNet18(), data)
    total = time.monotonic() - watch.began
    watch.look()
    results = [{"step": step, "evaluations": count, **told} for (step, count), told in watch.results.items()]
    common.print_table(
        ("step", "evaluations", "there after s"),
        [[str(each["step"]), str(each["evaluations"]), f"{each['seconds']:.0f}"] for each in results],
    )
    print("\n".join(record.summary for record in audit.evidence.records))
    verdict = audit.verdict()
    print(f"{trainer.global_step} steps, {total:.0f} s until fit returned; {audit.evidence.lost}\n{verdict}")
    first = min((each["seconds"] for each in results), default=total)
    late = f"The first result was there after {first:.0f} s, limit {args.patience:.0f}."
    failures = [late] if not results or first > args.patience else []
    header = {"settings": common.settings_of(args, images), "machine": common.machine(device)}
    found = {
        "steps": trainer.global_step, "seconds": total, "results": results, "failures": failures,
        "records": [describe(record) for record in audit.evidence.records],
        "lost": audit.evidence.lost.to_dict(), "verdict": verdict.to_dict(),
    }  # fmt: skip
    common.write_json(args.out, header | {"versions": common.versions()} | found)
    return common.judge(failures, 1)


def describe(record: AuditRecord) -> dict[str, Any]:
    """Return what an audit came to, as plain JSON."""
    return {
        "step": record.step,
        "rung": record.rung,
        "rungs": record.rungs,
        "evaluations": record.evaluations,
        "seconds": record.seconds,
        "exposure": float(record.exposure.max()),
        "gradient_similarity": record.gradient_similarity,
        "ceiling": None if record.ceiling is None else float(record.ceiling.max()),
        "reason": record.reason,
    }


if __name__ == "__main__":
    sys.exit(main())
