"""Measure audits per minute over one and two workers, and say what a model makes of it for up to a thousand.

The same audits (a ConvNet, one image, one arithmetic thread each) are sent through an `Auditor` to one worker and to
two, of processes and of a local Ray cluster, in turn, round after round; workers are started and warm before the clock
runs. Ratios are medians over rounds. Two workers need two cores: on fewer, or where other work keeps them busy, the
threshold fails for want of them.

The model: W workers finish W / a audits a second, a being the seconds of one audit on a worker, until the sending
process is busy all the time: it spends s seconds of processor time on each audit, all its threads together (measured:
packing, sending and collecting). Assumptions: workers are alike and alone on their cores; the network carries the
snapshots (megabytes per second are printed); samples are there when they are wanted, which takes a training that
samples W / a steps a second; nothing else is shared.

Exit status 1: two workers of an executor finish fewer audits than `--min-speedup` times what one does, or an audit
failed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks import common, models
from lightning_gradaudit import Auditor, Budget, Snapshot
from lightning_gradaudit.attacks import InvertingGradients
from lightning_gradaudit.execution.executors import ProcessExecutor
from lightning_gradaudit.execution.ray_executor import RayExecutor
from lightning_gradaudit.utils.pickling import split_tensors

WORKERS = (1, 2)
MODELLED = (1, 2, 4, 10, 100, 1000)
PATIENCE = 600.0  # seconds for one round


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("scaling", __doc__)
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=list(EXECUTORS))
    parser.add_argument("--audits", type=int, default=12, help="per round and arrangement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--min-speedup", type=float, default=1.7)
    args = parser.parse_args(arguments)
    if args.quick:
        args.audits, args.rounds, args.evaluations = 6, 1, 100
    return args


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    executor = ProcessExecutor(workers=workers, threads=1)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True)


@contextmanager
def ray_cluster(workers: int) -> Iterator[Executor]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=workers, log_to_driver=False, include_dashboard=False, configure_logging=False)
    executor = RayExecutor(cpus=1)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True)
        ray.shutdown()


EXECUTORS: dict[str, Callable[[int], Any]] = {"process": processes, "ray": ray_cluster}


def process_id() -> int:
    time.sleep(0.2)  # long enough for the others to be asked too
    return os.getpid()


def wait_for_workers(executor: Executor, workers: int) -> None:
    """Return once that many processes have answered."""
    seen: set[int] = set()
    while len(seen) < workers:
        seen |= {
            future.result(timeout=PATIENCE) for future in [executor.submit(process_id) for _ in range(2 * workers)]
        }


def audit_all(executor: Executor, snapshot: Snapshot, audits: int, args: argparse.Namespace) -> dict[str, float]:
    """Send the audits and wait for all; return wall seconds, and for each this process' and the worker's seconds."""
    auditor = Auditor(
        attack=InvertingGradients(),
        closed_forms=False,
        budget=Budget(evaluations=args.evaluations),
        executor=executor,
        queue_size=audits,
        engine_check=False,
    )
    start, own = time.perf_counter(), time.process_time()
    for step in range(audits):
        auditor.submit(replace(snapshot, step=step))
    records = []
    while auditor.pending and time.perf_counter() - start < PATIENCE:
        records += auditor.collect(wait=1.0)
    wall = time.perf_counter() - start
    if len(records) != audits:
        raise SystemExit(f"{audits - len(records)} audit(s) did not come back within {PATIENCE:.0f} s.")
    return {
        "wall": wall,
        "own": (time.process_time() - own) / audits,
        "worker": statistics.median(record.seconds for record in records),
    }


def measure(name: str, snapshot: Snapshot, args: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds of one executor."""
    rounds: dict[int, list[dict[str, float]]] = {workers: [] for workers in WORKERS}
    for number in range(args.rounds):
        for workers in WORKERS if number % 2 == 0 else WORKERS[::-1]:
            with EXECUTORS[name](workers) as executor:
                wait_for_workers(executor, workers)
                audit_all(executor, snapshot, 2 * workers, args)  # what a worker imports and allocates once
                rounds[workers].append(audit_all(executor, snapshot, args.audits, args))
        print(f"{name}: round {number + 1}/{args.rounds} done", file=sys.stderr, flush=True)
    one, two = (rounds[workers] for workers in WORKERS)
    return {
        "executor": name,
        "audits_per_minute": {
            str(workers): 60 * args.audits / statistics.median(r["wall"] for r in each)
            for workers, each in rounds.items()
        },
        "speedup": statistics.median(a["wall"] / b["wall"] for a, b in zip(one, two, strict=True)),
        "worker_seconds": statistics.median(r["worker"] for r in one),
        "own_seconds": statistics.median(r["own"] for r in one),
    }


def modelled(row: dict[str, Any], megabytes: float) -> list[dict[str, Any]]:
    """Return what the model says for each number of workers."""
    rows = []
    for workers in MODELLED:
        by_workers, by_sender = workers / row["worker_seconds"], 1 / row["own_seconds"]
        rate = min(by_workers, by_sender)
        bound = "workers" if by_workers <= by_sender else "sender"
        rows.append({"workers": workers, "audits_per_minute": 60 * rate, "bound": bound, "MB_per_s": rate * megabytes})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    torch.manual_seed(args.seed)
    batch = images.pixels[:1].to(device), images.labels[:1].to(device)
    snapshot = Snapshot.from_batch(models.convnet8().to(device), batch, loss=nn.functional.cross_entropy)
    megabytes = sum(t.numel() * t.element_size() for t in split_tensors(snapshot)[1]) / 1e6
    rows = [measure(name, snapshot, args) for name in args.executors]
    common.print_table(
        ("executor", "audits/min, 1 worker", "2 workers", "speedup", "s on a worker", "ms of the sender"),
        [
            [
                row["executor"],
                *(f"{row['audits_per_minute'][str(workers)]:.1f}" for workers in WORKERS),
                f"{row['speedup']:.2f}",
                f"{row['worker_seconds']:.2f}",
                f"{1e3 * row['own_seconds']:.1f}",
            ]
            for row in rows
        ],
    )
    for row in rows:
        row["model"] = modelled(row, megabytes)
        print(f"\nmodel for {row['executor']}, snapshots of {megabytes:.2f} MB:")
        common.print_table(
            ("workers", "audits/min", "bound by", "MB/s"),
            [
                [str(m["workers"]), f"{m['audits_per_minute']:.0f}", m["bound"], f"{m['MB_per_s']:.2f}"]
                for m in row["model"]
            ],
        )
    failures = [
        f"{row['executor']}: two workers do {row['speedup']:.2f} times what one does, limit {args.min_speedup:.2f}."
        for row in rows
        if not row["speedup"] >= args.min_speedup
    ]
    header = {"settings": common.settings_of(args, images), "machine": common.machine(device)}
    common.write_json(args.out, header | {"versions": common.versions(), "rows": rows, "failures": failures})
    return common.judge(failures, len(rows))


if __name__ == "__main__":
    sys.exit(main())
