"""Compare audits that end early with whole audits of the same steps: does ending early ever look safer?

Small networks at their initial weights, batches of photographs, the default attack in rungs of 20, 100 and all
evaluations. Of each audit the record after each rung is judged by a gate that one finished audit without a finding
satisfies: so a PASS shows that the audit counts. The table also shows what a rule would have done that lets the second
rung count: the audits that it would have passed although the whole audit finds an exposed image.

Exit status 1: an audit that ended early passes where the whole one does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from benchmarks import common, models
from lightning_gradaudit import Auditor, AuditRecord, Budget, RiskGate, Snapshot
from lightning_gradaudit.metrics.baseline import Baseline

MODELS = {"mlp": models.mlp, "conv2": models.conv2, "lenet": models.lenet, "resnet8": models.resnet8}
GATE = RiskGate(0.3, tail=0.5, confidence=0.5, window=10_000)


def status(record: AuditRecord) -> str:
    """Return the verdict on one audit."""
    return str(GATE.verdict([record], step=record.step).status)


def audit(name: str, images: common.Images, at: int, args: argparse.Namespace) -> dict[str, Any]:
    """Audit one step in rungs and return exposure and verdict after each."""
    torch.manual_seed(args.seed + at)
    chosen = images.audited[torch.randperm(len(images.audited))[: args.batch_size]]
    batch = images.pixels[chosen], images.labels[chosen].long()
    snapshot = replace(Snapshot.from_batch(MODELS[name](), batch, loss=F.cross_entropy), step=at)
    baseline = Baseline()
    baseline.observe(images.pixels[torch.randperm(len(images.pixels))[:256]])
    auditor = Auditor(
        budget=Budget(evaluations=args.evaluations), rungs=True, executor="inline", engine_check=False,
        baseline=baseline,
    )  # fmt: skip
    auditor.submit(snapshot)
    records = auditor.collect()
    return {
        "model": name, "evaluations": [r.evaluations for r in records],
        "exposure": [float(r.exposure.max()) for r in records], "status": [status(r) for r in records],
        "if_it_counted": status(replace(records[-2], rung=records[-2].rungs)),
    }  # fmt: skip


def cells(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return a row of the table."""
    shown = [f"{sum(each['exposure'][at] for each in rows) / len(rows):.2f}" for at in range(3)]
    early = [each for each in rows if "PASS" in each["status"][:-1]]
    passed = [each for each in rows if each["if_it_counted"] == "PASS" and each["status"][-1] != "PASS"]
    whole = [sum(each["status"][-1] == kind for each in rows) for kind in ("PASS", "BLOCK", "UNKNOWN")]
    return [name, str(len(rows)), *shown, "/".join(map(str, whole)), str(len(early)), str(len(passed))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser("early", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--audits", type=int, default=16, help="of each model")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=400)
    args = parser.parse_args(arguments)
    if args.quick:
        args.models, args.audits = ["conv2"], 3
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    rows = [audit(name, images, at, args) for name in args.models for at in range(args.audits)]
    header = (
        "model",
        "audits",
        "exposure after 20",
        "100",
        "all",
        "whole PASS/BLOCK/UNKNOWN",
        "early PASS",
        "wrong if",
    )
    common.print_table(header, [cells(name, [r for r in rows if r["model"] == name]) for name in args.models])
    wrong = [r for r in rows if "PASS" in r["status"][:-1] and r["status"][-1] != "PASS"]
    failures = [f"{len(wrong)} audits that ended early pass where the whole one does not."] if wrong else []
    described = {"settings": common.settings_of(args, images), "machine": common.machine(device)}
    common.write_json(args.out, described | {"versions": common.versions(), "rows": rows, "failures": failures})
    return common.judge(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
