"""Measure how much of the images the attacks recover, case by case, against floors.

Every row attacks gradients of real images through `audit_snapshot`: the same self-test, scores and null baseline as
in a live audit, with a gallery of other images of the same data set. Labels are unknown to the attacker, who knows the
weights, the batch size and the BatchNorm mode. Untrained models are initialised afresh for every audit; trained ones
have seen all images but the audited ones. Noise is Gaussian, its norm relative to that of the gradient.

How to read a row: `PSNR` in dB (mean over the images, 95 % bootstrap interval over the audits; 30 dB is a copy, about
10 dB is nothing), `SSIM`, `exposure` in [0, 1] above what a guess without the gradient reaches (mean / worst image),
`named`: share of the images that are nearest to their own reconstruction in the gallery, `labels`: share of the labels
recovered, `evals`: simulated gradients spent, `s`: seconds per audit. `auto` is what `GradAudit()` runs: closed forms,
then `Auto`; `auto public` is the same by an adversary who holds other images of the data set, no mirror images of the
audited among them; every other row runs one attack alone. `ig` is Inverting Gradients at three weights of its total
variation.

Exit status 1: a row fell below its case's floor. Rows that were not run are not judged.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, models
from lightning_gradaudit import AuditRecord, Baseline, Budget, GaussianNoise, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import (
    Attack,
    InvertingGradients,
    LevenbergMarquardt,
    Modern,
    RecursiveInversion,
    WhitenedMatching,
)
from lightning_gradaudit.attacks.auto import Auto

RESAMPLES = 2000
EXACT_PSNR = 60.0
ATTACKS: dict[str, Attack | None] = {
    "auto": None,
    "auto public": None,
    "ig 1e-4": InvertingGradients(total_variation=1e-4),
    "ig 1e-2": InvertingGradients(total_variation=1e-2),
    "ig 1e-1": InvertingGradients(total_variation=1e-1),
    "whitened": WhitenedMatching(),
    "modern": Modern(),
    "lbfgs": Auto().quick[0],
    "least squares": LevenbergMarquardt(),
    "peeling": RecursiveInversion(),
}
AUTO = ("auto", "auto public")
IG = ("ig 1e-4", "ig 1e-2", "ig 1e-1")
SINGLES = tuple(name for name in ATTACKS if name not in {*AUTO, "ig 1e-4", "ig 1e-1"})


@dataclass(frozen=True, kw_only=True)
class Case:
    """One state of one model, the attacks on it, and what `auto` must reach.

    Attributes:
        model: Name in `models`.
        epochs: Of training before the audits.
        batch_size, train_mode, noise: Of the audited gradients.
        evaluations: Budget of every attack; of `auto` twice as much where `portfolio` is set.
        rivals: Attacks beside `auto`.
        public: Whether `auto public` runs too, and must be as far above the rivals.
        psnr: Least mean PSNR in dB.
        exact: Least share of audits in which every image is recovered exactly (above 60 dB).
        above: Least margin of the mean PSNR over the best rival, in dB.
        ssim_above: The same for the mean SSIM.
        audits: Least number of audits.
        portfolio: Whether `auto` may spend twice as much as each rival.
    """

    model: str
    epochs: int = 0
    batch_size: int = 1
    train_mode: bool = False
    noise: float = 0.0
    evaluations: int = 2000
    rivals: tuple[str, ...] = ()
    public: bool = False
    psnr: float | None = None
    exact: float | None = None
    above: float | None = None
    ssim_above: float | None = None
    audits: int = 1
    portfolio: bool = False

    @property
    def name(self) -> str:
        """Short and unique."""
        mode = " train mode" if self.train_mode else ""
        noise = f" noise {self.noise:g}" if self.noise else ""
        state = f"{self.epochs} epochs" if self.epochs else "untrained"
        return f"{self.model} {state}{mode}{noise} B={self.batch_size}" + (" portfolio" if self.portfolio else "")


MLP = [Case(model="mlp", epochs=e, batch_size=b, exact=1.0, audits=8) for e in (0, 1, 5) for b in (1, 2, 4, 8)]
MLP += [Case(model="mlp", epochs=e, batch_size=12, exact=7 / 8, audits=8) for e in (0, 1, 5)]
CASES = {
    "mlp": MLP,
    "lenet": [Case(model="lenet_default", psnr=35.0, rivals=("ig 1e-2",))],
    "convnet": [
        Case(model="convnet8", rivals=IG, psnr=20.0, above=3.0),
        Case(model="convnet8", epochs=5, rivals=IG[2:], above=1.0),
    ],
    "convnet batches": [
        Case(model="convnet8", epochs=5, batch_size=4, evaluations=500, rivals=IG[1:], above=1.0),
        Case(model="convnet8", train_mode=True, batch_size=4, evaluations=500, rivals=IG[1:], above=1.0),
        Case(model="convnet8", train_mode=True, batch_size=8, evaluations=500, audits=2, rivals=IG[1:], above=1.0),
    ],
    "resnet": [
        Case(model="resnet18", evaluations=200, rivals=IG[1:2], above=1.0),
        Case(model="resnet18", epochs=5, evaluations=150, rivals=IG[2:3], above=1.0),
    ],
    "vit": [Case(model="vit", epochs=e, evaluations=400, psnr=40.0) for e in (0, 5)],
    "noise": [
        Case(model="conv2", noise=1.0, batch_size=b, evaluations=400, rivals=IG[1:], ssim_above=0.2, public=True)
        for b in (1, 4)
    ],
    "portfolio": [
        Case(model=m, epochs=e, evaluations=400, rivals=SINGLES, above=-0.5, portfolio=True)
        for m, e in (("conv2", 0), ("conv2", 5), ("lenet_default", 0), ("lenet", 0), ("convnet8", 0), ("convnet8", 5))
    ],
}
QUICK = {
    "mlp": [case for case in MLP if case.epochs != 1 and case.batch_size in (1, 8)],
    "lenet": [replace(CASES["lenet"][0], evaluations=600)],
    "vit": CASES["vit"],
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("recovery", __doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="groups of cases")
    parser.add_argument("--evaluations", type=int, help="budget of every attack; default: each case's own")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, help="only these rows, and judge none")
    parser.add_argument("--images", type=int, default=8, help="least number of images per row")
    parser.add_argument("--gallery", type=int, default=128, help="other images in the gallery, at least 100")
    args = parser.parse_args(arguments)
    if args.gallery < 100:
        parser.error(f"--gallery: identification needs at least 100 other images, got {args.gallery}.")
    return args


def draw(images: common.Images, args: argparse.Namespace, wanted: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the audited images and of all others, disjoint."""
    order = torch.randperm(len(images.audited), generator=torch.Generator().manual_seed(args.seed))
    audited = images.audited[order[:wanted]]
    rest = torch.ones(len(images.pixels), dtype=torch.bool)
    rest[audited] = False
    others = rest.nonzero().flatten()
    if len(audited) < wanted or len(others) < args.gallery:
        raise SystemExit(
            f"--data: {len(images.pixels)} images are too few for {wanted} audited and {args.gallery} others."
        )
    return audited, others[torch.randperm(len(others), generator=torch.Generator().manual_seed(args.seed + 1))]


def trained(case: Case, images: common.Images, others: Tensor, args: argparse.Namespace) -> Callable[[int], nn.Module]:
    """Return a function of the audit's number: a fresh model each, or the trained one."""

    def fresh(step: int) -> nn.Module:
        torch.manual_seed(args.seed * 1000 + step)
        return getattr(models, case.model)().to(args.device)

    if not case.epochs:
        return fresh
    model = fresh(0)
    pixels, labels = images.pixels[others].to(args.device), images.labels[others].to(args.device)
    models.train(model, pixels, labels, epochs=case.epochs, seed=args.seed)
    return lambda _: copy.deepcopy(model)


def audit_rows(images: common.Images, args: argparse.Namespace, case: Case) -> list[dict[str, Any]]:
    """Audit one case with `auto` and its rivals, all on the same gradients."""
    audits = max(-(-args.images // case.batch_size), case.audits)
    audited, others = draw(images, args, audits * case.batch_size)
    build = trained(case, images, others, args)
    public = images.pixels[others[torch.isin(others, images.audited)]].to(args.device)
    rows = []
    for name in (*AUTO[: 1 + case.public], *case.rivals):
        if args.attacks and name not in args.attacks:
            continue
        held = public if name == "auto public" else None
        baseline = Baseline(gallery_size=args.gallery)
        baseline.observe(images.pixels[others[: args.gallery]], images.labels[others[: args.gallery]])
        records = [
            audit(name, case, args, baseline, snapshot(case, images, chosen, build(step), args, step, held))
            for step, chosen in enumerate(audited.split(case.batch_size))
        ]
        rows.append(summarise(name, case, records, args.seed))
        print(" ".join(cells(rows[-1])), file=sys.stderr, flush=True)
    return rows


def snapshot(
    case: Case,
    images: common.Images,
    chosen: Tensor,
    model: nn.Module,
    args: argparse.Namespace,
    step: int,
    public: Tensor | None,
) -> Snapshot:
    """Return the gradient of one batch."""
    return Snapshot.from_batch(
        model,
        (images.pixels[chosen].to(args.device), images.labels[chosen].to(args.device)),
        loss=nn.functional.cross_entropy,
        mode="train" if case.train_mode else "eval",
        defences=(GaussianNoise(relative=case.noise),) if case.noise else (),
        public_images=public,
        seed=args.seed,
        step=step,
    )


def audit(name: str, case: Case, args: argparse.Namespace, baseline: Baseline, taken: Snapshot) -> AuditRecord:
    """Run one attack, and let the baseline remember what it made."""
    attack = ATTACKS[name]
    evaluations = args.evaluations or case.evaluations
    record = audit_snapshot(
        taken,
        attack=attack,
        closed_forms=attack is None,
        budget=Budget(evaluations=evaluations * (2 if case.portfolio and attack is None else 1)),
        baseline=baseline,
        seed=args.seed,
    )
    assert record.pixels is not None
    assert record.truth is not None
    baseline.remember(record.pixels, record.truth)
    return record


def summarise(attack: str, case: Case, records: list[AuditRecord], seed: int) -> dict[str, Any]:
    """Reduce the audits of a row to its figures."""
    psnr = [record.psnr for record in records]
    low, high = bootstrap(psnr, seed)
    exposure = torch.cat([record.exposure for record in records])
    exact = [bool((record.psnr > EXACT_PSNR).all()) for record in records]
    return {
        "case": case.name,
        "attack": attack,
        "audits": len(records),
        "images": len(exposure),
        "psnr": float(torch.cat(psnr).mean()),
        "psnr_interval": [low, high],
        "psnr_per_image": [float(v) for v in torch.cat(psnr)],
        "ssim": float(torch.cat([record.ssim for record in records]).mean()),
        "exact": sum(exact) / len(exact),
        "exposure_mean": float(exposure.mean()),
        "exposure_max": float(exposure.max()),
        "identified": float(torch.cat([record.identified for record in records]).nanmean()),
        "chance": sum(r.chance_hits for r in records) / max(1, sum(r.chance_trials for r in records)),
        "label_accuracy": float(torch.tensor([record.label_accuracy for record in records]).nanmean()),
        "evaluations": sum(record.evaluations for record in records) / len(records),
        "seconds_per_audit": sum(record.seconds for record in records) / len(records),
        "outcomes": dict(Counter(str(record.outcome) for record in records)),
        "invalid": sum(not record.valid for record in records),
        "winners": dict(Counter(r.reconstruction.attack for r in records if r.reconstruction is not None)),
    }


def bootstrap(groups: list[Tensor], seed: int) -> tuple[float, float]:
    """Return a 95 % percentile interval of the mean, resampling audits: images of one batch share a fate."""
    means = torch.stack([group.mean() for group in groups])
    draws = torch.randint(len(means), (RESAMPLES, len(means)), generator=torch.Generator().manual_seed(seed))
    low, high = means[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def check(case: Case, rows: list[dict[str, Any]]) -> tuple[list[str], int]:
    """Compare a case's rows with its floors."""
    auto, rivals = rows[0], [row for row in rows if row["attack"] not in AUTO]
    best = max((row["psnr"] for row in rivals), default=float("-inf"))
    most = max((row["ssim"] for row in rivals), default=float("-inf"))
    floors = (
        ("mean PSNR in dB", auto["psnr"], case.psnr),
        ("share of audits that are exact", auto["exact"], case.exact),
        ("dB above the best rival", auto["psnr"] - best, case.above),
        *(
            (f"SSIM of {row['attack']} above the best rival", row["ssim"] - most, case.ssim_above)
            for row in rows
            if row["attack"] in AUTO
        ),
    )
    asked = [(what, reached, floor) for what, reached, floor in floors if floor is not None]
    failures = [
        f"{case.name}: {what} {reached:.2f}, expected at least {floor:.2f}."
        for what, reached, floor in asked
        if not reached >= floor
    ]
    failures += [
        f"{case.name} by {row['attack']}: {row['invalid']} audit(s) invalid." for row in rows if row["invalid"]
    ]
    return failures, len(asked)


HEADERS = (
    "case", "attack", "n", "PSNR", "95 %", "SSIM", "exact", "exposure", "named", "labels", "evals", "s", "winners"
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["psnr_interval"]
    return [
        row["case"],
        row["attack"],
        str(row["images"]),
        f"{row['psnr']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{row['ssim']:.2f}",
        f"{row['exact']:.0%}",
        f"{row['exposure_mean']:.2f} / {row['exposure_max']:.2f}",
        f"{row['identified']:.0%}",
        f"{row['label_accuracy']:.0%}",
        f"{row['evaluations']:.0f}",
        f"{row['seconds_per_audit']:.1f}",
        ", ".join(f"{name} {count}" for name, count in sorted(row["winners"].items())),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    checked = 0
    groups = QUICK if args.quick else {name: CASES[name] for name in args.cases}
    for case in (case for group in groups.values() for case in group):
        found = audit_rows(images, args, case)
        failed, judged = ([], 0) if args.attacks else check(case, found)
        rows, failures, checked = rows + found, failures + failed, checked + judged
    common.print_table(HEADERS, [cells(row) for row in rows])
    common.write_json(
        args.out,
        {
            "benchmark": "recovery",
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
