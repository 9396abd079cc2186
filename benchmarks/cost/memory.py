"""Measure the memory of a snapshot and of an attack, against the parameters and the batch.

`snapshot` counts the bytes of every tensor that a queued audit keeps. `step` and `attack` are the peaks, above what was
there before, of one training step and of an attack's first evaluations: of PyTorch's tensors on the CPU, as its
profiler counts them (not what a library below takes for itself), and of the allocator on CUDA. The extra memory of an
audited run is at most the queued snapshots, the one that is being made, and one attack.

Exit status 1: a snapshot takes more than `--max-snapshot` times the parameters and buffers, plus the batch; or an
attack more than `--max-attack` times what a training step and the parameters take together. A snapshot is given 0.1 MB
more for what does not grow with the model: random states.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import common, models
from lightning_gradaudit import Budget, Snapshot
from lightning_gradaudit.attacks import InvertingGradients
from lightning_gradaudit.utils.pickling import split_tensors

MODELS = {
    "mlp": models.mlp,
    "lenet": models.lenet_default,
    "convnet8": models.convnet8,
    "resnet18": models.resnet18,
    "vit": models.vit,
}
EVALUATIONS = 3
SLACK = 0.1  # MB
MB = 1e6


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("memory", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-snapshot", type=float, default=2.0)
    parser.add_argument("--max-attack", type=float, default=5.0)
    args = parser.parse_args(arguments)
    if args.quick:
        args.models, args.batch_sizes = ["lenet", "convnet8"], [1, 8]
    return args


def size_of(item: Any) -> int:
    """Return the bytes of all tensors in an object, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in split_tensors(item)[1]}
    return sum(storages.values())


def make(model: str, size: int, args: argparse.Namespace) -> tuple[nn.Module, Snapshot]:
    """Build a model and a snapshot of a batch of noise."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    module = MODELS[model]().to(device)
    batch = torch.rand(size, 3, common.SIDE, common.SIDE, device=device), torch.arange(size, device=device) % 10
    return module, Snapshot.from_batch(module, batch, loss=nn.functional.cross_entropy, labels_known=True)


def work_on(work: str, module: nn.Module, snapshot: Snapshot) -> None:
    """Do a training step, or an attack's first evaluations."""
    if work == "step":
        module.zero_grad()
        nn.functional.cross_entropy(module(snapshot.truth.inputs), snapshot.truth.labels).backward()
    else:
        budget = Budget(evaluations=EVALUATIONS)
        InvertingGradients()(snapshot.observation, budget=budget, generator=torch.Generator())


def peak(work: str, module: nn.Module, snapshot: Snapshot, args: argparse.Namespace) -> int:
    """Return the bytes of all tensors alive at the peak of a piece of work, above what was there before."""
    if args.device != "cpu":
        common.synchronise(torch.device(args.device))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work_on(work, module, snapshot)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work_on(work, module, snapshot)
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    changes = [int(e["args"]["Bytes"]) for e in sorted(events, key=lambda e: float(e["ts"]))]
    return max(accumulate(changes))


def measure(model: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one model and batch size."""
    module, snapshot = make(model, size, args)
    parameters, batch = size_of(dict(module.state_dict())), size_of(snapshot.truth)
    step, attack = (peak(work, module, snapshot, args) for work in ("step", "attack"))
    return {
        "model": model,
        "batch_size": size,
        "parameters_MB": parameters / MB,
        "batch_MB": batch / MB,
        "snapshot_MB": size_of(snapshot) / MB,
        "snapshot_over_parameters": (size_of(snapshot) - batch) / parameters,
        "step_MB": step / MB,
        "attack_MB": attack / MB,
        "attack_over_step": attack / (step + parameters),
    }


def check(rows: list[dict[str, Any]], args: argparse.Namespace) -> tuple[list[str], int]:
    """Hold snapshots and attacks against their limits."""
    failures = []
    for row in rows:
        name = f"{row['model']} at B = {row['batch_size']}"
        allowed = args.max_snapshot * row["parameters_MB"] + row["batch_MB"] + SLACK
        if not row["snapshot_MB"] <= allowed:
            failures.append(f"{name}: a snapshot takes {row['snapshot_MB']:.2f} MB, limit {allowed:.2f} MB.")
        allowed = args.max_attack * (row["parameters_MB"] + row["step_MB"])
        if not row["attack_MB"] <= allowed:
            failures.append(f"{name}: an attack takes {row['attack_MB']:.0f} MB, limit {allowed:.0f} MB.")
    return failures, 2 * len(rows)


HEADERS = ("model", "B", "parameters MB", "batch MB", "snapshot MB", "snapshot/parameters")
PEAKS = ("step MB", "attack MB", "attack/(step + parameters)")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    rows = [measure(model, size, args) for model in args.models for size in args.batch_sizes]
    common.print_table(
        (*HEADERS, *PEAKS),
        [
            [row["model"], str(row["batch_size"]), *(f"{row[k]:.2f}" for k in ("parameters_MB", "batch_MB"))]
            + [f"{row[k]:.2f}" for k in ("snapshot_MB", "snapshot_over_parameters")]
            + [f"{row[k]:.1f}" for k in ("step_MB", "attack_MB", "attack_over_step")]
            for row in rows
        ],
    )
    failures, checked = check(rows, args)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    header = {"settings": settings, "machine": common.machine(device), "versions": common.versions()}
    common.write_json(args.out, header | {"rows": rows, "failures": failures})
    return common.judge(failures, checked)


if __name__ == "__main__":
    sys.exit(main())
