"""Ask what predicts an attack: over many states of training, which figure that needs no attack ranks them as one does.

A state is an architecture, a number of epochs and a defence. On the same images every state is attacked through
`audit_snapshot` as `GradAudit()` would (closed forms, then the default attack), and every proxy is computed beside it.
An architecture under a defence is one run: its states share a null, as they would in training, and runs share nothing,
so that `--workers N` does N of them at once.
The table gives Spearman's rank correlation over states of each proxy with the mean exposure that the attack reached,
with a 95 % bootstrap interval over states; `SSIM` is the same with the reconstruction's SSIM. All proxies are listed,
the losers too. Signs are such that a useful proxy is positive.

How to read the names: `ceiling` is a record's, before it is raised to what the attack reached: leak-R2, and 1 where
algebra gives the image away; `leak-R2` is the analysis alone, at the attacker's relative precision rho and under a
prior of natural images or of white pixels (`low`: the bound from below); FIL, dFIL and bits
are at the noise that was declared and a precision of 1e-4; the I2F bound predicts an error, so it counts negatively;
`basin` and `way back` start near the truth and are no attacks; `reach` follows the linearisation's error from afar,
times what a search finds that begins with the `first step`, a linear solve at a grey image, and is 1 where algebra
gives the image away.
Combinations come last.

Exit status 1: over at least 20 states the correlation of `reach`, the default, fell below `--min-reach`.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from loky import ProcessPoolExecutor
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmarks import common, models
from benchmarks.published_bounds import dfil, fil, i2f_bound, lavp, leakage_bits
from lightning_gradaudit import Baseline, Budget, GaussianNoise, Snapshot, audit_snapshot
from lightning_gradaudit.analysis import Analysis, WhitePixels, analyse, basin, descent_alignment, similarity_relation
from lightning_gradaudit.analysis.ceiling import declared_noise
from lightning_gradaudit.analysis.image_covariance import NaturalImages
from lightning_gradaudit.analysis.jacobian import InPixels, Jacobian
from lightning_gradaudit.analysis.reach import bending, reach
from lightning_gradaudit.analysis.resolution import resolved
from lightning_gradaudit.analysis.spectrum import effective_rank
from lightning_gradaudit.cli.architectures import vit
from lightning_gradaudit.metrics.functional.correlation import spearman
from lightning_gradaudit.simulation.defences import Defence

RESAMPLES = 2000
PRECISION = 1e-4
ENOUGH_STATES = 20


def pooled() -> nn.Module:
    """Two convolutions whose positions are averaged away."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, common.CLASSES),
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "mlp": models.mlp,
    "conv2": models.conv2,
    "pooled": pooled,
    "lenet": models.lenet,
    "lenet_default": models.lenet_default,
    "convnet8": models.convnet8,
    "resnet8": models.resnet8,
    "vit": lambda: vit(3, common.SIDE, common.CLASSES),
}
DEFENCES: dict[str, tuple[Defence, ...]] = {
    "none": (),
    "noise 0.3": (GaussianNoise(relative=0.3),),
    "noise 3": (GaussianNoise(relative=3.0),),
}
QUICK = {"architectures": ["mlp", "conv2", "pooled"], "epochs": [0, 1], "defences": ["none", "noise 3"]}


@dataclass(frozen=True)
class State:
    """One model to audit under one defence."""

    architecture: str
    epochs: int
    defence: str
    model: nn.Module

    @property
    def name(self) -> str:
        return f"{self.architecture}, {self.epochs} epochs, {self.defence}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("prediction", __doc__)
    parser.add_argument("--evaluations", type=int, default=600, help="simulated gradients per audit")
    parser.add_argument("--images", type=int, default=3, help="images per state")
    parser.add_argument("--batch-size", type=int, default=1, help="images behind a gradient")
    parser.add_argument("--gallery", type=int, default=128, help="other images for the null")
    parser.add_argument("--training-images", type=int, default=500, help="most images that models are trained on")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 1, 5], help="increasing")
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES))
    parser.add_argument("--workers", type=int, default=1, help="processes; for figures, not for seconds")
    parser.add_argument("--min-reach", type=float, default=0.85, help="least Spearman correlation of reach")
    args = parser.parse_args(arguments)
    if args.images % args.batch_size:
        parser.error(f"--images: expected a multiple of --batch-size, got {args.images} and {args.batch_size}.")
    if args.quick:
        vars(args).update(QUICK, images=args.batch_size, evaluations=min(args.evaluations, 100), training_images=100)
    return args


def states(
    architecture: str, defence: str, pixels: Tensor, labels: Tensor, args: argparse.Namespace
) -> Iterator[State]:
    """Train an architecture and stop at every epoch wanted; the same weights meet every defence."""
    torch.manual_seed(args.seed)
    model = ARCHITECTURES[architecture]().to(args.device)
    done = 0
    for epochs in sorted(args.epochs):
        models.train(model, pixels, labels, epochs=epochs - done, seed=args.seed + done)
        done = epochs
        yield State(architecture, epochs, defence, copy.deepcopy(model))


def attacked(record: Any) -> dict[str, float]:
    return {
        "exposure": float(record.exposure.mean()),
        "exposure_max": float(record.exposure.max()),
        "SSIM": float(record.ssim.mean()),
        "PSNR": float(record.psnr.mean()),
        "identified": float(record.identified.nanmean()),
        "valid": float(record.valid),
        "evaluations": float(record.evaluations),
    }


def ceiling_without_attack(record: Any) -> float:
    """Return the record's ceiling before it was raised to what the attack reached: a predictor has not seen it."""
    if record.leakage is None:
        return math.nan
    return float(torch.where(record.exact_leaks.bool(), 1.0, record.leakage.leak_r2).mean())


def reach_of(record: Any) -> float:
    """Return the record's reach: the prediction that comes with every audit."""
    return math.nan if record.leakage is None else float(record.leakage.reach.mean())


def proxies(snapshot: Snapshot, record: Any, seed: int) -> dict[str, float]:
    """Compute every figure that needs no attack."""
    generator = torch.Generator().manual_seed(seed)
    truth, observation = snapshot.truth, snapshot.observation
    found = {"ceiling": ceiling_without_attack(record), "reach": reach_of(record)}
    for prior, label in ((NaturalImages(), "natural"), (WhitePixels(), "white")):
        leakage = analyse(snapshot, Analysis(prior=prior, tolerance=0.0), generator=generator)
        for rho, high, low in leakage.curve:
            found[f"leak-R2 {rho:.0e} {label}"] = high
            found[f"leak-R2 {rho:.0e} {label}, low"] = low
        found[f"noise to hide, {label}"] = float(leakage.noise_to_hide.mean())
        found[f"reach, {label}"] = float(leakage.reach.mean())
        found[f"first step, {label}"] = float(leakage.first_step.mean())
    jacobian = Jacobian(observation, truth.inputs, truth.labels)
    pixels = InPixels(jacobian, truth.inputs.shape, observation.normalization, None)
    norm = float(jacobian.gradient.norm())
    noise, _ = declared_noise(observation, norm, jacobian.rows)
    sigma = max(math.hypot(noise, PRECISION * norm), 1e-30)
    shared = torch.cat([observation.gradients[name].reshape(-1) for name in jacobian.names])
    steps = {"steps": 20, "generator": generator}
    top = fil(pixels, sigma=1.0, **steps)
    trace = dfil(pixels, sigma=1.0, probes=8, generator=generator)
    l2_high, l2_low = lavp(jacobian, objective="l2", **steps)
    cosine_high, cosine_low = lavp(jacobian, objective="cosine", **steps)
    prior = InPixels(jacobian, truth.inputs.shape, observation.normalization, NaturalImages())
    found |= {
        "gradient norm": norm,
        "loss": float(observation.loss(truth.inputs, truth.labels).detach()),
        "sigma_max": top,
        "FIL": top / sigma,
        "trace": trace,
        "dFIL": trace / sigma**2,
        "I2F bound": -i2f_bound(pixels, shared - jacobian.gradient, **steps),
        "LAVP l2, largest": l2_high,
        "LAVP l2, smallest": l2_low,
        "LAVP cosine, largest": cosine_high,
        "LAVP cosine, smallest": cosine_low,
        "bits": leakage_bits(prior, sigma=sigma, steps=20, probes=1, generator=generator),
        "effective rank": effective_rank(pixels, probes=4, generator=generator),
    }
    # Not the quotient of a record's two figures: where the first step is worth nothing it says nothing.
    settings = Analysis()
    bent = bending(jacobian, observation, truth.inputs, prior=settings.prior, rays=settings.rays, generator=generator)
    held = resolved(prior, blocks=len(truth.inputs), steps=settings.steps, probes=1, generator=generator)
    finest = max(math.hypot(noise, min(settings.precision, *settings.curve) * norm), 1e-30)
    found["reach without first step"] = float(reach(held, bent, finest).mean())
    relation = similarity_relation(snapshot, rays=4, radii=(1e-3, 1e-2, 1e-1), resamples=1, steps=4, seed=seed)
    found |= {
        "rho along rays": relation.rho("rays").value,
        "slope along rays": relation.slopes["all layers"].value,
        "least ratio m": relation.least.value,
        "m / M": relation.least.value / max(relation.largest.value, 1e-30),
    }
    near = basin(snapshot, amounts=(0.7, 0.9), budget=Budget(evaluations=60), seed=seed)
    back = descent_alignment(snapshot, seed=seed)
    found |= {
        "basin gain": float(near.gain.mean()),
        "basin gain, far": float(near.gain[-1]),
        "basin end": float(near.final.mean()),
        "way back: cosine": back.cosine,
        "way back: linearity": back.linearity,
        "way back": back.score,
    }
    return found


def with_combinations(rows: list[dict[str, float]]) -> None:
    """Add combinations of the best kinds: products, and means of ranks."""
    for row in rows:
        ceiling = row["leak-R2 1e-04 natural"]
        row["ceiling x way back"] = ceiling * max(row["way back"], 0.0)
        row["ceiling x basin end"] = ceiling * row["basin end"]
        row["reach x way back"] = row["reach"] * max(row["way back"], 0.0)
    for name, parts in {
        "ranks: reach + way back": ("reach", "way back"),
        "ranks: reach + basin end": ("reach", "basin end"),
        "ranks: ceiling + basin gain": ("ceiling", "basin gain"),
        "ranks: ceiling + way back": ("ceiling", "way back"),
        "ranks: ceiling + way back + basin gain": ("ceiling", "way back", "basin gain"),
    }.items():
        ranks = np.mean([rankdata([row[part] for row in rows]) for part in parts], axis=0)
        for row, rank in zip(rows, ranks, strict=True):
            row[name] = float(rank)


def correlate(rows: list[dict[str, float]], target: list[float], seed: int) -> dict[str, dict[str, float]]:
    """Return Spearman's correlation of every proxy with the target, with its bootstrap interval over states."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(rows), size=(RESAMPLES, len(rows)))
    reached = np.array(target)
    found = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        known = np.isfinite(values)
        chosen = [draw[known[draw]] for draw in draws]
        drawn = [rho for rho in (spearman(values[i], reached[i]) for i in chosen) if math.isfinite(rho)]
        low, high = np.quantile(drawn, (0.025, 0.975)) if drawn else (math.nan, math.nan)
        rho = spearman(values[known], reached[known])
        found[name] = {"rho": rho, "low": float(low), "high": float(high), "states": int(known.sum())}
    return found


def split(images: common.Images, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of the attacked images, of the gallery and of the training set, all disjoint."""
    generator = torch.Generator().manual_seed(args.seed)
    audited = images.audited[torch.randperm(len(images.audited), generator=generator)[: args.images]]
    rest = torch.ones(len(images.pixels), dtype=torch.bool)
    rest[audited] = False
    others = rest.nonzero().flatten()
    others = others[torch.randperm(len(others), generator=generator)]
    gallery = others[: min(args.gallery, len(others) // 2)]
    return audited, gallery, others[len(gallery) :][: args.training_images]


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def measure(state: State, images: common.Images, audited: Tensor, baseline: Baseline, args: argparse.Namespace) -> Any:
    """Attack a state and compute its proxies, means over the batches."""
    reached, figures, start = [], [], time.monotonic()
    for step, chosen in enumerate(audited.split(args.batch_size)):
        batch = images.pixels[chosen].to(args.device), images.labels[chosen].to(args.device)
        snapshot = Snapshot.from_batch(
            state.model,
            batch,
            loss=nn.functional.cross_entropy,
            defences=DEFENCES[state.defence],
            seed=args.seed,
            step=step,
        )
        budget = Budget(evaluations=args.evaluations)
        record = audit_snapshot(snapshot, budget=budget, baseline=baseline, analysis=True, seed=args.seed)
        reached.append(attacked(record))
        if record.pixels is not None and record.truth is not None:
            baseline.remember(
                record.pixels, record.truth
            )  # as in a live run: blur that any gradient gives is no exposure
        figures.append(proxies(snapshot, record, args.seed + step))
    return mean_of(reached), mean_of(figures), time.monotonic() - start


def measure_run(architecture: str, defence: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure an architecture under a defence after every number of epochs."""
    common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    audited, gallery, training = split(images, args)
    baseline = Baseline(gallery_size=len(gallery))
    baseline.observe(images.pixels[gallery], images.labels[gallery])
    pixels, labels = images.pixels[training].to(args.device), images.labels[training].to(args.device)
    told = []
    for state in states(architecture, defence, pixels, labels, args):
        reached, figures, seconds = measure(state, images, audited, baseline, args)
        told.append({"state": state.name, "reached": reached, "proxies": figures, "seconds": seconds})
        print(
            f"{state.name}: exposure {reached['exposure']:.2f}, ceiling {figures['ceiling']:.2f}, {seconds:.0f} s",
            flush=True,
        )
    return told


def measured(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Measure all runs, in the order in which they end."""
    runs = [(architecture, defence) for architecture in args.architectures for defence in args.defences]
    if args.workers == 1:
        yield from (measure_run(*run, args) for run in runs)
        return
    with ProcessPoolExecutor(args.workers) as pool:
        for future in as_completed([pool.submit(measure_run, *run, args) for run in runs]):
            yield future.result()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    settings = common.settings_of(args, common.load_images(args.data))
    header = {"settings": settings, "machine": common.machine(device), "versions": common.versions()}
    told: list[dict[str, Any]] = []
    for run in measured(args):
        told += run
        common.write_json(args.out, header | {"states": told})  # an hour's work is kept
    told.sort(key=lambda each: each["state"])
    targets, rows = [each["reached"] for each in told], [each["proxies"] for each in told]
    with_combinations(rows)
    by_exposure = correlate(rows, [reached["exposure"] for reached in targets], args.seed)
    by_ssim = correlate(rows, [reached["SSIM"] for reached in targets], args.seed)
    ordered = sorted(by_exposure, key=lambda name: -np.nan_to_num(by_exposure[name]["rho"], nan=-2.0))
    common.print_table(
        ["proxy", "Spearman", "95 %", "SSIM", "states"],
        [
            [
                name,
                f"{by_exposure[name]['rho']:.2f}",
                f"{by_exposure[name]['low']:.2f} to {by_exposure[name]['high']:.2f}",
                f"{by_ssim[name]['rho']:.2f}",
                str(by_exposure[name]["states"]),
            ]
            for name in ordered
        ],
    )
    found = {"states": told, "spearman_exposure": by_exposure, "spearman_ssim": by_ssim}
    common.write_json(args.out, header | found)
    rho = by_exposure["reach"]["rho"]
    judged = len(rows) >= ENOUGH_STATES
    failures = (
        [f"reach: Spearman {rho:.2f} over {len(rows)} states is below {args.min_reach:.2f}."]
        if judged and not rho >= args.min_reach
        else []
    )
    return common.judge(failures, int(judged))


if __name__ == "__main__":
    sys.exit(main())
