"""Train models of ordinary size under the default audit: when results come, what they say, and what training pays.

Each row is a model of torchvision (or a U-Net, or LoRA by peft) that trains with Adam on photographs scaled up to its
size, first without the callback for a fifth of the steps, then with `GradAudit()` and `RiskGatedCheckpoint()` as in the
README (`every_n_steps` is a third of the steps). The table shows when the first result was there, how many audits
ended, the evaluations and seconds of their rungs, the peak memory of both processes, what the audits found, what
training kept of its speed, and the verdict. A row is written into the JSON file as soon as it is there, beside the rows
of earlier calls.

Exit status 1: a row's first result is later than `--patience` seconds after the first sample, fewer than three audits
ended, the training thread spent more than a hundredth of its time, or, with `--threads 1` and a second core, training
kept less than `--min-throughput` of its speed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from benchmarks import common
from benchmarks.cost.overhead import HookClock, LoopClock
from lightning_gradaudit import AuditRecord, GradAudit, Limits, RiskGatedCheckpoint

MB = 1e6
AUDITS = 3


def resnet18() -> nn.Module:
    return models.resnet18(num_classes=common.CLASSES)


def densenet_grey() -> nn.Module:
    model = models.densenet121(num_classes=common.CLASSES)
    model.features.conv0 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return model


def mobilenet() -> nn.Module:
    return models.mobilenet_v3_small(num_classes=common.CLASSES)


def vit() -> nn.Module:
    return models.VisionTransformer(224, 16, 6, 6, 384, 1536, num_classes=common.CLASSES)


def lora_vit() -> nn.Module:
    import peft

    settings = peft.LoraConfig(r=8, target_modules=r".*mlp\.[03]", modules_to_save=["heads"])
    return peft.get_peft_model(vit(), settings)  # type: ignore[arg-type]


def frozen_stem() -> nn.Module:
    model = resnet18()
    for stem in (model.conv1, model.bn1, model.layer1, model.layer2):
        stem.requires_grad_(False)  # type: ignore[union-attr,operator]
    return model


class UNet(nn.Module):
    """Three levels with skip connections; one logit for each pixel."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x if not skips else F.avg_pool2d(x, 2))
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1))
        return self.last(x)


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A model as it is trained.

    Attributes:
        make: Builds it.
        side: Pixels of an image.
        batch_size: Images of a step.
        steps: Training steps by default.
        channels: Of an image.
        masks: Whether each pixel has a label (bright or not), and not each image.
    """

    make: Callable[[], nn.Module]
    side: int
    batch_size: int
    steps: int
    channels: int = 3
    masks: bool = False


ROWS = {
    "resnet18-64": Row(resnet18, 64, 16, 300),
    "resnet18-224": Row(resnet18, 224, 8, 60),
    "densenet121-64-grey": Row(densenet_grey, 64, 8, 90, channels=1),
    "mobilenetv3-96": Row(mobilenet, 96, 8, 150),
    "vit-224": Row(vit, 224, 4, 60),
    "unet-64": Row(UNet, 64, 4, 150, masks=True),
    "resnet18-64-frozen-stem": Row(frozen_stem, 64, 4, 150),
    "vit-224-lora": Row(lora_vit, 224, 2, 60),
}


class Module(pl.LightningModule):
    """Train a model with Adam."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.network = row.make()
        self.masks = row.masks

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.network(batch[0])
        if self.masks:
            return F.binary_cross_entropy_with_logits(logits, batch[1])
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class StepClock(LoopClock):
    """Time of the training steps alone: what a gate waits at a save is its own setting (`wait=`)."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        common.synchronise(self.device)
        self.seconds = time.perf_counter() - self._start

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.saving = time.perf_counter() - self._start - self.seconds


class Watch(pl.Callback):
    """Note when a result of an audit is there, and what its rung took."""

    def __init__(self, audit: GradAudit) -> None:
        self.audit, self.began = audit, 0.0
        self.results: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._spent: dict[int, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = time.monotonic()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.look()

    def look(self) -> None:
        """Note the results that are new; the seconds of a record are those of its rungs together."""
        for record in self.audit.evidence.records:
            key = record.step, record.rung, record.evaluations
            if key not in self.results:
                took = record.seconds - self._spent.get(record.step, 0.0)
                self._spent[record.step] = record.seconds
                self.results[key] = {
                    "step": record.step, "rung": record.rung, "evaluations": record.evaluations, "took": took,
                    "there": time.monotonic() - self.began,
                }  # fmt: skip


def loader(row: Row, images: common.Images, steps: int, seed: int) -> DataLoader[Any]:
    """Return batches for so many steps, each image as often as it takes."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.cat([torch.randperm(len(images.pixels), generator=generator) for _ in range(steps)])
    chosen = chosen[: steps * row.batch_size]
    kept, where = chosen.unique(return_inverse=True)
    pixels = F.interpolate(images.pixels[kept], (row.side, row.side), mode="bilinear", align_corners=False)
    pixels = pixels.mean(1, keepdim=True) if row.channels == 1 else pixels
    grey = pixels.mean(1, keepdim=True)
    targets = (grey > grey.mean((2, 3), keepdim=True)).float() if row.masks else images.labels[kept].long()
    whole = TensorDataset(pixels, targets)
    return DataLoader(torch.utils.data.Subset(whole, where.tolist()), batch_size=row.batch_size)


def fit(row: Row, images: common.Images, steps: int, args: argparse.Namespace, *callbacks: pl.Callback) -> pl.Trainer:
    torch.manual_seed(args.seed)
    trainer = pl.Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu", max_steps=steps, logger=False,
        enable_checkpointing=any(isinstance(each, RiskGatedCheckpoint) for each in callbacks),
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        default_root_dir=tempfile.mkdtemp(prefix="gradaudit-realistic-"),
    )  # fmt: skip
    trainer.fit(Module(row), loader(row, images, steps, args.seed))
    return trainer


def measure(name: str, images: common.Images, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model without and with the audit, and return its row."""
    row, device = ROWS[name], torch.device(args.device)
    steps = args.steps or row.steps
    without = StepClock(device, None)
    fit(row, images, max(10, steps // 5), args, without)
    audit = GradAudit(every_n_steps=max(1, steps // AUDITS), limits=Limits(final_wait_seconds=args.wait))
    folder = tempfile.mkdtemp(prefix="gradaudit-realistic-")
    watch, clock, hooks = Watch(audit), StepClock(device, audit), HookClock(device, audit.schedule)
    hooks.watch(audit)
    checkpoint = RiskGatedCheckpoint(max_risk=0.3, dirpath=folder)
    trainer = fit(row, images, steps, args, clock, audit, watch, checkpoint)
    total = time.monotonic() - watch.began
    watch.look()
    verdict, records, lost = audit.verdict(), audit.evidence.records, audit.evidence.lost
    speed = without.seconds / max(10, steps // 5) / (clock.seconds / trainer.global_step)
    peak = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "row": name, "batch_size": row.batch_size, "steps": trainer.global_step, "threads": torch.get_num_threads(),
        "training_seconds": clock.seconds, "saving_seconds": clock.saving, "seconds": total, "wait": args.wait,
        "first_result_seconds": min((each["there"] for each in watch.results.values()), default=None),
        "ended": len(records), "given_up": lost.given_up, "dropped": lost.dropped, "cut_short": lost.cut_short,
        "rungs": list(watch.results.values()), "training_peak_mib": peak[0], "audit_peak_mib": peak[1],
        "throughput": speed, "thread_share": hooks.total() / clock.seconds,
        "records": [describe(record) for record in records], "verdict": verdict.to_dict(),
        "faults": [fault.message for fault in audit.evidence.faults],
    }  # fmt: skip


def describe(record: AuditRecord) -> dict[str, Any]:
    """Return what an audit came to, as plain JSON."""
    leakage = record.leakage
    return {
        "step": record.step, "rung": record.rung, "rungs": record.rungs, "evaluations": record.evaluations,
        "seconds": record.seconds, "exposure": float(record.exposure.max()),
        "identified": float(record.identified.nanmean()), "label_accuracy": record.label_accuracy,
        "gradient_similarity": record.gradient_similarity,
        "ceiling": None if record.ceiling is None else float(record.ceiling.max()),
        "reach": None if leakage is None else float(leakage.reach.max()),
        "analysis_seconds": None if leakage is None else leakage.seconds, "reason": record.reason,
    }  # fmt: skip


def failures_of(found: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Return what a row misses, as sentences."""
    name, first = found["row"], found["first_result_seconds"]
    said = []
    if first is None or first > args.patience:
        said.append(f"{name}: the first result was there after {first} s, limit {args.patience:g}.")
    if found["ended"] < AUDITS:
        said.append(f"{name}: {found['ended']} audits ended, not {AUDITS}.")
    if found["thread_share"] > 0.01:
        said.append(f"{name}: the training thread spent {found['thread_share']:.2%}.")
    spare = found["threads"] == 1 and (common.machine(torch.device("cpu"))["cores"] or 1) > 1
    if spare and found["throughput"] < args.min_throughput:
        said.append(f"{name}: training kept {found['throughput']:.3f} of its speed.")
    return said


def cells(found: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    rungs = " ".join(f"{each['evaluations']}:{each['took']:.0f}" for each in found["rungs"])
    of = {key: [r[key] for r in found["records"] if r[key] is not None] for key in ("exposure", "identified", "reach")}
    worst = [f"{max(values):.2f}" if values else "-" for values in of.values()]
    first = found["first_result_seconds"]
    return [
        found["row"], "-" if first is None else f"{first:.0f}", str(found["ended"]), rungs,
        f"{found['training_peak_mib']:.0f}/{found['audit_peak_mib']:.0f}", *worst,
        f"{found['throughput']:.3f}", f"{found['thread_share']:.2%}", found["verdict"]["status"],
    ]  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("realistic", __doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, help="of training; default: by row")
    parser.add_argument("--wait", type=float, default=120.0, help="final_wait_seconds")
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--min-throughput", type=float, default=0.97)
    args = parser.parse_args(arguments)
    if args.quick:
        args.rows, args.steps, args.wait = ["resnet18-64-frozen-stem"], args.steps or 30, min(args.wait, 30.0)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    failures, table = [], []
    for name in args.rows:
        found = measure(name, images, args)
        found |= {"settings": common.settings_of(args, images), "machine": common.machine(device)}
        failures += failures_of(found, args)
        known = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
        key = name, found["threads"]
        known = [each for each in known if (each["row"], each["threads"]) != key]
        common.write_json(args.out, {"versions": common.versions(), "rows": [*known, found]})
        table.append(cells(found))
        print(f"{name}: {found['verdict']['status']}: {' '.join(found['verdict']['reasons'])}", flush=True)
    header = ("model", "first s", "ended", "evaluations:s", "MiB train/audit", "exposure", "identified", "reach")
    common.print_table((*header, "speed", "thread", "verdict"), table)
    return common.judge(failures, 4 * len(table))


if __name__ == "__main__":
    sys.exit(main())
