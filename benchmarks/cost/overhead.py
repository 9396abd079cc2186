"""Measure what `GradAudit` costs the training it watches.

A small ResNet is trained on 32 x 32 images with a real `Trainer.fit`, in short fits: without the callback and with it
in several arrangements, one of each per block, the order rotating from block to block, so that drifts of the machine
hit all alike. Figures are medians over the blocks, each fit compared with the one without callback in its own block.

Arrangements:
  capture   an executor that never does the work: what is left is the copying of gradients and weights.
  results   an executor that answers at once with an audit made before: copying, and collecting and logging a result
            for every audited step, without any contention.
  default   the default executor (a process on the CPU, a thread on CUDA) with the full attack, always busy;
            `--executor` and `--audit-device` take another, `--compile` compiles its evaluations.

How to read the table: `share` is the time the training thread spends inside the callback (every public hook, and the
tensor hooks it registers) over the wall time of the training loop, first audit included; this is what the threshold is
about. `after 1st` leaves out the first audited step, which starts the worker. `step ratio` is the mean step time with /
without callback: for `capture` and `results` it repeats the share with more noise; for `default` it also holds the
contention of attack and training, which has a threshold with `--threads 1` and a second core for the attack: then there
need be none. `capture ms` is the cost of one audited step (median / largest), from arming to submission. One-time costs
and the end are listed below the table: audits still under way are given up at once
(`Limits(final_wait_seconds=0)`), because waiting is no step time.

Exit status 1: the share of some arrangement exceeds `--max-share`, training has less than `--min-throughput` of its
speed although a core is to spare, no audit was submitted, or one failed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any, get_args
from unittest import mock

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import common, models
from lightning_gradaudit import AuditRecord, AuditSettings, Budget, GradAudit, Limits, Snapshot, audit_snapshot
from lightning_gradaudit.audit import EngineCheck, check_engine
from lightning_gradaudit.execution.executors import ExecutorName, InlineExecutor

MODES = ("without", "capture", "results", "default")
CAPTURE_HOOKS = ("on_train_batch_start", "tensor hooks", "on_after_backward")
ONE_TIME_HOOKS = ("setup", "on_train_start")
END_HOOKS = ("on_train_end", "teardown")
TINY = 4  # evaluations behind the audit that `results` answers with: collecting it costs the same whatever it took
SETTLE = 1.0  # seconds between fits, for ended workers to be gone


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("overhead", __doc__)
    parser.add_argument("--steps", type=int, default=350, help="training steps per fit")
    parser.add_argument("--blocks", type=int, default=5, help="repetitions of every arrangement")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--every-n-steps", type=int, default=50)
    parser.add_argument("--evaluations", type=int, default=400, help="of one audit of the default arrangement")
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=list(MODES[1:]))
    parser.add_argument("--executor", choices=get_args(ExecutorName), default="auto", help="of the default arrangement")
    parser.add_argument("--audit-device", help="where the default arrangement attacks; default: the callback's own")
    parser.add_argument("--compile", action="store_true", help="evaluations of the default arrangement")
    parser.add_argument("--max-share", type=float, default=0.01, help="largest share of the loop's wall time")
    parser.add_argument("--min-throughput", type=float, default=0.97, help="with a core to spare, of without callback")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps, args.blocks = min(args.steps, 150), min(args.blocks, 2)
    return args


class Classifier(pl.LightningModule):
    """An ordinary image classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.resnet8()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Repeated(Dataset[tuple[Tensor, Tensor]]):
    """The images over and over, until there are `length`."""

    def __init__(self, images: common.Images, length: int) -> None:
        self.images, self.length = images, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index %= len(self.images.pixels)
        return self.images.pixels[index], self.images.labels[index]


class IdleExecutor(InlineExecutor):
    """Accept work and never do it. Inline by kind, so that nothing is moved to the CPU for a worker process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return Future()


class ReadyExecutor(InlineExecutor):
    """Answer at once with results made before."""

    def __init__(self, record: AuditRecord, engine: EngineCheck) -> None:
        self.record, self.engine = record, engine

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.engine if fn is check_engine else replace(self.record, step=args[0].step))
        return future


def ready_executor(images: common.Images, args: argparse.Namespace) -> ReadyExecutor:
    """Make one real audit of a batch, with an attack that is over soon."""
    torch.manual_seed(args.seed)
    batch = images.pixels[: args.batch_size], images.labels[: args.batch_size]
    snapshot = Snapshot.from_batch(models.resnet8(), batch, loss=nn.functional.cross_entropy, mode="train")
    record = audit_snapshot(snapshot, budget=Budget(evaluations=TINY))
    return ReadyExecutor(record, check_engine(None, Budget(evaluations=args.evaluations)))


class LoopClock(pl.Callback):
    """Time of the training loop; must be the first callback, so that every other one falls inside.

    Attributes:
        seconds: Wall time.
        dropped: Samples dropped for want of room in the queue; what is given up at the end is not counted yet.
    """

    def __init__(self, device: torch.device, audit: GradAudit | None) -> None:
        self.device, self.audit = device, audit
        self.seconds = self._start = 0.0
        self.dropped = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            common.synchronise(self.device)
            self._start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        common.synchronise(self.device)
        self.seconds = time.perf_counter() - self._start
        self.dropped = 0 if self.audit is None else self.audit.evidence.dropped


@dataclass
class HookClock:
    """Time the training thread spends inside a callback, measured from outside.

    On CUDA the device is synchronised around the hooks of audited steps, so that their copies are counted and the
    training's own work is not.

    Attributes:
        calls: (hook, training step or -1, seconds).
    """

    device: torch.device
    due: Callable[[int], bool]
    calls: list[tuple[str, int, float]] = field(default_factory=list)
    step: int = -1

    def watch(self, callback: pl.Callback) -> None:
        """Wrap every public hook that the callback overrides."""
        for name in vars(pl.Callback):
            overridden = getattr(type(callback), name) is not getattr(pl.Callback, name)
            if overridden and not name.startswith("_") and callable(getattr(callback, name)):
                setattr(callback, name, self._hook(name, getattr(callback, name)))

    def _hook(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._timed(name, method)
        if name != "on_train_batch_start":
            return timed
        register = torch.Tensor.register_hook

        def timed_register(tensor: Tensor, hook: Callable[..., Any]) -> Any:
            return register(tensor, self._timed("tensor hooks", hook))

        @functools.wraps(method)
        def start(*args: Any, **kwargs: Any) -> Any:
            self.step += 1
            if not self.due(self.step):
                return timed(*args, **kwargs)
            # The copies are made by tensor hooks during the backward pass: they belong to the callback too.
            with mock.patch.object(torch.Tensor, "register_hook", timed_register):
                return timed(*args, **kwargs)

        return start

    def _timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            wait = self.step >= 0 and self.due(self.step)
            if wait:
                common.synchronise(self.device)
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                if wait:
                    common.synchronise(self.device)
                self.calls.append((name, self.step, time.perf_counter() - start))

        return timed

    def total(self, *names: str, skip_step: int | None = None) -> float:
        """Seconds in these hooks, or in all that run inside the loop."""
        outside = (*ONE_TIME_HOOKS, *END_HOOKS)
        chosen = [c for c in self.calls if (c[0] in names if names else c[0] not in outside)]
        return sum(seconds for _, step, seconds in chosen if skip_step is None or step != skip_step)

    def captures(self) -> list[float]:
        """Seconds per audited step, from arming to submission."""
        steps = [step for step in range(self.step + 1) if self.due(step)]
        return [sum(s for name, at, s in self.calls if at == step and name in CAPTURE_HOOKS) for step in steps]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What one fit with the callback showed.

    Attributes:
        share, share_after_first: Of the loop's wall time spent inside the callback.
        captures: Seconds per audited step.
        hooks: Seconds per hook over the fit.
        counts: What became of the audits; `unfinished` ones were given up when training ended.
        faults: Messages.
    """

    share: float
    share_after_first: float
    captures: list[float]
    hooks: dict[str, float]
    counts: dict[str, int]
    faults: list[str]


@dataclass(frozen=True)
class Fit:
    """One short training run: mean step time in seconds, and what the callback did."""

    step_seconds: float
    watched: Watched | None = None


def observe(hooks: HookClock, loop: LoopClock, audit: GradAudit) -> Watched:
    """Sum up a finished fit."""
    evidence, captures = audit.evidence, hooks.captures()
    names = dict.fromkeys(name for name, _, _ in hooks.calls)
    return Watched(
        share=hooks.total() / loop.seconds,
        share_after_first=hooks.total(skip_step=0) / loop.seconds,
        captures=captures,
        hooks={name: hooks.total(name) for name in names},
        counts={
            "due": len(captures),
            "submitted": len(captures) - loop.dropped,
            "dropped": loop.dropped,
            "finished": len(evidence.records),
            "unfinished": evidence.lost.given_up,
        },
        faults=[text for _, text, _ in evidence.faults],
    )


def make_audit(executor: ExecutorName | Executor, args: argparse.Namespace) -> GradAudit:
    """Return the callback of an arrangement, with room for every audit."""
    return GradAudit(
        every_n_steps=args.every_n_steps,
        budget=Budget(evaluations=args.evaluations),
        executor=executor,
        settings=AuditSettings(
            device=args.audit_device if executor is args.executor else None,
            compile=args.compile and executor is args.executor,
            seed=args.seed,
        ),
        limits=Limits(queue_size=args.steps // args.every_n_steps + 1, final_wait_seconds=0.0),
    )


def fit(executor: ExecutorName | Executor | None, images: common.Images, args: argparse.Namespace) -> Fit:
    """Train once from the same seed; without an executor, without the callback."""
    device = torch.device(args.device)
    audit = None if executor is None else make_audit(executor, args)
    loop = LoopClock(device, audit)
    hooks = HookClock(device, lambda step: step % args.every_n_steps == 0)
    if audit is not None:
        hooks.watch(audit)
    torch.manual_seed(args.seed)
    loader = DataLoader(Repeated(images, args.steps * args.batch_size), args.batch_size, num_workers=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1 if device.index is None or device.type == "cpu" else [device.index],
            max_epochs=1,
            callbacks=[loop] if audit is None else [loop, audit],
            logger=CSVLogger(folder),
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), loader)
    gc.collect()
    time.sleep(SETTLE)
    return Fit(loop.seconds / args.steps, None if audit is None else observe(hooks, loop, audit))


def run_blocks(images: common.Images, args: argparse.Namespace) -> dict[str, list[Fit]]:
    """Run every arrangement once per block; the order rotates and turns round from block to block."""
    executors: dict[str, ExecutorName | Executor | None] = {
        "without": None,
        "capture": IdleExecutor(),
        "results": ready_executor(images, args),
        "default": args.executor,
    }
    modes = ["without", *args.modes]
    fits: dict[str, list[Fit]] = {mode: [] for mode in modes}
    warm_up = argparse.Namespace(**vars(args) | {"steps": 20})
    for mode in modes[:2]:
        fit(executors[mode], images, warm_up)
    for block in range(args.blocks):
        shift = block // 2 % len(modes)
        order = modes[shift:] + modes[:shift]
        for mode in order if block % 2 == 0 else order[::-1]:
            fits[mode].append(fit(executors[mode], images, args))
            print(f"block {block + 1}/{args.blocks}: {mode}", file=sys.stderr, flush=True)
    return fits


def summarise(mode: str, fits: list[Fit], without: list[Fit]) -> dict[str, Any]:
    """Reduce the fits of an arrangement to its figures."""
    ratios = [fit.step_seconds / base.step_seconds for fit, base in zip(fits, without, strict=True)]
    row: dict[str, Any] = {
        "mode": mode,
        "step_ms": 1e3 * statistics.median(fit.step_seconds for fit in fits),
        "step_ratio": statistics.median(ratios),
        "step_ratios": ratios,
    }
    watched = [fit.watched for fit in fits if fit.watched is not None]
    if not watched:
        return row
    later = [seconds for each in watched for seconds in each.captures[1:]]
    return row | {
        "share": statistics.median(each.share for each in watched),
        "shares": [each.share for each in watched],
        "share_after_first": statistics.median(each.share_after_first for each in watched),
        "capture_ms_p50": 1e3 * statistics.median(later),
        "capture_ms_max": 1e3 * max(later),
        "first_capture_ms": 1e3 * statistics.median(each.captures[0] for each in watched),
        "hook_ms_per_fit": {
            name: 1e3 * statistics.median(each.hooks.get(name, 0.0) for each in watched) for name in watched[0].hooks
        },
        "counts": {key: sum(each.counts[key] for each in watched) for key in watched[0].counts},
        "faults": sorted({text for each in watched for text in each.faults}),
    }


def core_to_spare(args: argparse.Namespace) -> bool:
    """Whether training leaves the attack a core of its own."""
    return args.device == "cpu" and args.threads == 1 < (os.cpu_count() or 1)


def check(rows: list[dict[str, Any]], args: argparse.Namespace) -> tuple[list[str], int]:
    """Hold every arrangement with the callback against the thresholds, and make sure that it audited at all."""
    failures = []
    audited = [row for row in rows if "share" in row]
    checked = len(audited)
    for row in audited:
        if not row["share"] <= args.max_share:
            failures.append(
                f"{row['mode']}: {row['share']:.2%} of the loop inside the callback, limit {args.max_share:.2%}."
            )
        if row["mode"] == "default" and core_to_spare(args):
            checked += 1
            if not (throughput := 1 / row["step_ratio"]) >= args.min_throughput:
                failures.append(f"default: {throughput:.3f} of the speed without, limit {args.min_throughput:.3f}.")
        if not row["counts"]["submitted"]:
            failures.append(f"{row['mode']}: no audit was submitted, so nothing was measured.")
        if row["mode"] == "results" and not row["counts"]["finished"]:
            failures.append("results: no audit was collected, so nothing was measured.")
        failures += [f"{row['mode']}: an audit failed: {text}" for text in row["faults"]]
    return failures, checked


HEADERS = (
    "arrangement",
    "step ms",
    "step ratio",
    "share",
    "after 1st",
    "capture ms",
    "submitted",
    "dropped",
    "finished",
)


def cells(row: dict[str, Any]) -> list[str]:
    times = [row["mode"], f"{row['step_ms']:.1f}", f"{row['step_ratio']:.3f}"]
    if "share" not in row:
        return [*times, *[""] * (len(HEADERS) - len(times))]
    return [
        *times,
        f"{row['share']:.2%}",
        f"{row['share_after_first']:.2%}",
        f"{row['capture_ms_p50']:.1f} / {row['capture_ms_max']:.1f}",
        *(str(row["counts"][key]) for key in ("submitted", "dropped", "finished")),
    ]


def print_once(rows: list[dict[str, Any]]) -> None:
    """Print what happens once a run, and is no step time."""
    print("\nonce per run, ms:")
    names = (*ONE_TIME_HOOKS, "first audited step", *END_HOOKS)
    figures = [
        [
            row["mode"],
            *(f"{(row['hook_ms_per_fit'] | {names[2]: row['first_capture_ms']}).get(n, 0):.1f}" for n in names),
        ]
        for row in rows
        if "share" in row
    ]
    common.print_table(("arrangement", *names), figures)
    ratios = {row["mode"]: row["step_ratio"] for row in rows}
    if "default" in ratios:
        print(f"\ncontention (default, attack always busy): step time x {ratios['default']:.2f}")


def be_quiet() -> None:
    """Keep the Trainer's notices and the expected word about unfinished audits out of the table."""
    for name in ("pytorch_lightning", "lightning_gradaudit"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    be_quiet()
    start = time.perf_counter()
    fits = run_blocks(images, args)
    rows = [summarise(mode, of_mode, fits["without"]) for mode, of_mode in fits.items()]
    common.print_table(HEADERS, [cells(row) for row in rows])
    print_once(rows)
    failures, checked = check(rows, args)
    common.write_json(
        args.out,
        {
            "benchmark": "overhead",
            "rows": rows,
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
