"""Measure how good a reconstruction is after how many evaluations and seconds.

Every attack is run with each budget of a ladder: schedules are stretched over the budget, so that a point of the curve
is what somebody gets who grants just that much. `ig` is a plain loop of Inverting Gradients, evaluation after
evaluation in eager mode; `auto` is what `GradAudit()` runs (closed forms, then the race); `auto compiled` is the same
with compiled evaluations once the compilers are done, whose seconds are given apart. Labels are unknown to the
attacker, the images real, one in each batch; PSNR and exposure are means over the images, seconds medians.

`to target` is the time of the cheapest budget with which an attack reaches the PSNR of `ig` after its largest budget,
over the time that `ig` took for it.

Exit status 1: the fastest arrangement of the default attack takes more than `--max-share` of that time in some case, or
does not get there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import common, models
from lightning_gradaudit import Baseline, Budget, Snapshot
from lightning_gradaudit.attacks import Attack, InvertingGradients, compiled_evaluation
from lightning_gradaudit.attacks.defaults import full_attack

MODELS = {"lenet": models.lenet_default, "convnet8": models.convnet8, "resnet18": models.resnet18}
REFERENCE = "ig"


@dataclass(frozen=True)
class Arrangement:
    """An attack, and what its evaluations run in."""

    attack: Attack
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext


def waiting() -> AbstractContextManager[Any]:
    return compiled_evaluation(wait=True)


ARRANGEMENTS = {
    REFERENCE: Arrangement(InvertingGradients()),
    "auto": Arrangement(full_attack(None, closed_forms=True)),
    "auto compiled": Arrangement(full_attack(None, closed_forms=True), waiting),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("quality_over_time", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["lenet", "convnet8"])
    parser.add_argument("--arrangements", nargs="+", choices=ARRANGEMENTS, default=list(ARRANGEMENTS))
    parser.add_argument("--budgets", type=int, nargs="+", default=[25, 50, 100, 200, 400, 800, 2000])
    parser.add_argument("--images", type=int, default=8, help="audits per point")
    parser.add_argument("--max-share", type=float, default=0.2, help="of the plain loop's time to its last PSNR")
    args = parser.parse_args(arguments)
    if args.quick:
        args.models, args.images, args.budgets = ["lenet"], 2, [50, 200, 1000]
    if REFERENCE not in args.arrangements:
        parser.error(f"--arrangements: {REFERENCE} is what the others are compared with.")
    args.budgets.sort()
    return args


def point(
    name: str, arrangement: Arrangement, budget: int, snapshots: list[Snapshot], baseline: Baseline, seed: int
) -> dict[str, Any]:
    """Attack every snapshot with one budget."""
    psnr, exposure, seconds = [], [], []
    for snapshot in snapshots:
        observation = snapshot.observation
        common.synchronise(observation.device)
        start = time.perf_counter()
        with arrangement.inside():
            found = arrangement.attack(
                observation, budget=Budget(evaluations=budget), generator=torch.Generator().manual_seed(seed)
            )
        common.synchronise(observation.device)
        seconds.append(time.perf_counter() - start)
        pixels = observation.normalization.to_pixels(found.inputs.float()).clamp(0, 1).nan_to_num(0.5)
        scores = baseline.score(pixels, snapshot.truth_pixels, snapshot.truth.labels)
        psnr.append(float(scores.psnr.mean()))
        exposure.append(float(scores.exposure.mean()))
    return {
        "arrangement": name,
        "evaluations": budget,
        "psnr": statistics.fmean(psnr),
        "exposure": statistics.fmean(exposure),
        "seconds": statistics.median(seconds),
    }


def run_case(model: str, images: common.Images, args: argparse.Namespace) -> dict[str, Any]:
    """Run the ladder for one model; the order of arrangements turns round from budget to budget."""
    device = torch.device(args.device)
    snapshots = []
    for number in images.audited[: args.images].tolist():
        torch.manual_seed(args.seed + number)
        batch = images.pixels[number : number + 1].to(device), images.labels[number : number + 1].to(device)
        snapshots.append(Snapshot.from_batch(MODELS[model]().to(device), batch, loss=nn.functional.cross_entropy))
    baseline = Baseline(gallery_size=128)
    baseline.observe(images.pixels[-128:], images.labels[-128:])
    compile_seconds = 0.0
    if "auto compiled" in args.arrangements:
        start = time.perf_counter()  # the largest budget starts every racer that a smaller one does
        point("", ARRANGEMENTS["auto compiled"], args.budgets[-1], snapshots[:1], baseline, args.seed)
        compile_seconds = time.perf_counter() - start
    points = []
    for turn, budget in enumerate(args.budgets):
        names = args.arrangements if turn % 2 == 0 else args.arrangements[::-1]
        points += [point(name, ARRANGEMENTS[name], budget, snapshots, baseline, args.seed) for name in names]
        print(f"{model}: {budget} evaluations done", file=sys.stderr, flush=True)
    points.sort(key=lambda p: (args.arrangements.index(p["arrangement"]), p["evaluations"]))
    case = {"model": model, "first_compiled_run_seconds": compile_seconds, "points": points}
    return case | {"to_target": time_to_target(points, args)}


def time_to_target(points: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, float | None]:
    """Return each arrangement's time to the reference's last PSNR, over the reference's time; None: not reached."""
    target = next(p for p in points if (p["arrangement"], p["evaluations"]) == (REFERENCE, args.budgets[-1]))
    shares: dict[str, float | None] = {}
    for name in args.arrangements:
        there = [p["seconds"] for p in points if p["arrangement"] == name and p["psnr"] >= target["psnr"]]
        shares[name] = min(there) / target["seconds"] if there else None
    return shares


def check(cases: list[dict[str, Any]], args: argparse.Namespace) -> tuple[list[str], int]:
    """Hold the default attack against the plain loop."""
    failures = []
    for case in cases:
        reached = [share for name, share in case["to_target"].items() if name != REFERENCE and share is not None]
        if not reached:
            failures.append(f"{case['model']}: the default attack does not reach the plain loop's PSNR.")
        elif not min(reached) <= args.max_share:
            failures.append(
                f"{case['model']}: {min(reached):.2f} of the plain loop's time to its PSNR, limit {args.max_share:.2f}."
            )
    return failures, len(cases)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    cases = [run_case(model, images, args) for model in args.models]
    for case in cases:
        print(f"\n{case['model']}, B = 1; first run with compilers: {case['first_compiled_run_seconds']:.0f} s")
        common.print_table(
            ("arrangement", "evaluations", "PSNR", "exposure", "seconds"),
            [
                [p["arrangement"], str(p["evaluations"]), *(f"{p[k]:.2f}" for k in ("psnr", "exposure", "seconds"))]
                for p in case["points"]
            ],
        )
        shares = {n: "not reached" if s is None else f"{s:.2f}" for n, s in case["to_target"].items()}
        print("to target:", ", ".join(f"{name} {share}" for name, share in shares.items()))
    failures, checked = check(cases, args)
    header = {"settings": common.settings_of(args, images), "machine": common.machine(device)}
    common.write_json(args.out, header | {"versions": common.versions(), "cases": cases, "failures": failures})
    return common.judge(failures, checked)


if __name__ == "__main__":
    sys.exit(main())
