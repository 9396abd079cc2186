"""Simulate runs whose true share of exposed images lies above the tail, and count those that PASS at any look.

The guarantee of `RiskGate`: such a run passes with a chance of at most 5 %, over all its looks (one after each audit)
together, whatever the correlation within its audits. Every run draws a scenario: the share (half of the runs: .101),
the batch size, how images of a batch hang together (independent, beta-binomial, whole batches), whether exposure
belongs to the image or to the step (always; late: from some step on; early: up to some step), and data: endless, or
finite with epochs, of which every k-th step is audited, so that images return (as the same pixels, or augmented and
named by `sample_id`, or augmented without names).

A PASS counts against the gate at a look at which the true share so far lies above the tail, by steps or by distinct
images: before a late leak begins there is none. A PASS is always the word of `RiskGate.verdict` about `AuditRecord`s;
to be quick it is asked only where the bound of the tail, which it needs, holds by the same functions of
`intervals`. On a sample of runs it is asked at every look, and must agree. "Old rule": an exact binomial interval of
all images of the newest window of 128, each look for itself, nothing remembered beyond it.

Exit status 1: a rate of false PASS lies above 5 % beyond the error of simulation (its lower Clopper-Pearson bound of
99.9 %), or gate and shortcut disagree.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from lightning_gradaudit import RiskGate, Status
from lightning_gradaudit.attacks.reconstruction import Outcome
from lightning_gradaudit.audit import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.risk.intervals import bounds_share, clopper_pearson

LIMIT, TAIL, ALLOWED, WINDOW = 0.3, 0.1, 0.05, 128
CERTAIN = 0.999
LOOKS = 150
LEAST = 0.101
CLEAN = 0.05  # exposure of an image that is none
STATISTICS = ("worst", "p90", "mean")
TIMES = ("image", "step", "late", "early")
CORRELATIONS = (0.0, 0.3, 1.0)
DATA = ("endless", "finite", "augmented, named", "augmented, nameless")
POWER_SHARES = (0.0, 0.01, 0.02)
CHECKED = 24
PASSED = EngineCheck(passed=True, psnr={"attack": 40.0})


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run's world."""

    share: float
    statistic: str
    batch: int
    correlation: float
    exposure: str
    data: str
    size: int
    every: int
    worth: float


def draw_scenario(rng: np.random.Generator, share: float | None = None, statistic: str = "") -> Scenario:
    if share is None:
        share = LEAST if rng.random() < 0.5 else float(rng.uniform(LEAST, 0.3))
    return Scenario(
        share=share,
        statistic=statistic or str(rng.choice(STATISTICS)),
        batch=int(rng.choice([1, 2, 4, 8, 16, 32])),
        correlation=float(rng.choice(CORRELATIONS)),
        exposure=str(rng.choice(TIMES)),
        data=str(rng.choice(DATA)),
        size=int(rng.integers(200, 2000)),
        every=int(rng.integers(1, 8)),
        worth=float(rng.choice([0.35, 0.9])),
    )


def correlated(rng: np.random.Generator, share: float, count: int, correlation: float) -> np.ndarray:
    """Draw which images of a batch are exposed."""
    if correlation == 1 or share in (0, 1):
        return np.full(count, rng.random() < share)
    if correlation == 0:
        return rng.random(count) < share
    odds = (1 - correlation) / correlation
    return rng.random(count) < rng.beta(share * odds, (1 - share) * odds)


@dataclass
class World:
    """Batches of one run, as audited: names of images, whether each is exposed, and the share at that step."""

    scenario: Scenario
    rng: np.random.Generator
    flags: np.ndarray = field(init=False)
    blocks: bool = field(init=False)

    def __post_init__(self) -> None:
        s, rng = self.scenario, self.rng
        # Correlation of what belongs to the image: neighbours alike, and batches of neighbours.
        self.blocks = s.exposure == "image" and s.correlation > 0
        self.flags = np.zeros(s.size, dtype=bool)
        if s.data == "endless" or s.exposure != "image":
            return
        if not self.blocks:
            least = math.floor(TAIL * s.size) + 1 if s.share > TAIL else 0
            chosen = rng.permutation(s.size)[: max(least, round(s.share * s.size))]
            self.flags[chosen] = True
            return
        while True:
            parts = [
                correlated(rng, s.share, min(s.batch, s.size - i), s.correlation) for i in range(0, s.size, s.batch)
            ]
            self.flags = np.concatenate(parts)
            if (self.flags.mean() > TAIL) == (s.share > TAIL):
                return

    @property
    def share(self) -> float:
        """The share among images, where it belongs to them."""
        return float(self.flags.mean()) if self.flags.any() else self.scenario.share

    def audits(self) -> Iterator[tuple[list[int], np.ndarray, float]]:
        s, rng = self.scenario, self.rng
        batches = self._batches()
        least = s.share if s.exposure == "early" else 0.0
        part = float(rng.uniform(max(least, 0.1), 0.9))  # of the looks that come first
        for look in range(LOOKS):
            epoch, names = next(batches)
            if s.exposure == "image" and s.data != "endless":
                yield names, self.flags[names], self.share
                continue
            first = look < part * LOOKS
            now = {
                "late": 0.0 if first else min(1.0, s.share / (1 - part)),
                "early": min(1.0, s.share / part) if first else 0.0,
                "first epoch": 0.0 if epoch else s.share,
            }.get(s.exposure, s.share)
            yield names, correlated(rng, now, len(names), s.correlation), now

    def _batches(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the epoch and the names of the images of every k-th step."""
        s, step, first, epoch = self.scenario, 0, 0, 0
        while s.data == "endless":
            yield 0, list(range(first, first + s.batch))
            first += s.batch
        # Blocks keep their order within an epoch where neighbours are alike: shuffled once, not at every epoch.
        order = np.arange(s.size)
        starts = np.arange(0, s.size, s.batch)
        while True:
            if self.blocks:
                starts = self.rng.permutation(starts)
            else:
                order = self.rng.permutation(s.size)
            for start in starts:
                if step % s.every == 0:
                    yield epoch, order[start : start + s.batch].tolist()
                step += 1
            epoch += 1


def record_of(look: int, names: Sequence[int], exposures: np.ndarray, scenario: Scenario) -> AuditRecord:
    n = len(names)
    zeros = torch.zeros(n)
    labels = [f"{look}/{name}" if scenario.data == "augmented, nameless" else str(name) for name in names]
    named = scenario.data == "augmented, named"
    return AuditRecord(
        step=look, attack="simulated", outcome=Outcome.BUDGET_SPENT, exposure=torch.from_numpy(exposures).float(),
        psnr=zeros, ssim=zeros, mse=zeros, identified=zeros, null=zeros, exact_leaks=zeros.bool(), copied=zeros.bool(),
        gallery=100, chance_hits=1.0, chance_trials=100, null_complete=True, label_accuracy=1.0, matching_loss=0.1,
        gradient_similarity=0.9, truth_similarity=1.0, self_test=0.0, self_test_tolerance=1e-3, defence_gap=0.0,
        evaluations=1, seconds=0.0, threat_model={}, measure="ssim", session="simulated",
        ids=tuple(labels) if named else (),
        digests=tuple(f"{look}/{name}" for name in names) if named else tuple(labels),
    )  # fmt: skip


@dataclass
class Tally:
    """Distinct images so far, and the shares of their units: what the bound of the tail is made of."""

    images: dict[Any, int] = field(default_factory=dict)
    flags: list[bool] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    above: list[int] = field(default_factory=list)

    def add(self, names: Sequence[Any], exposed: np.ndarray) -> int:
        """Return how many images are new."""
        unit = None
        before = len(self.images)
        for name, flag in zip(names, exposed.tolist(), strict=True):
            at = self.images.get(name)
            if at is None:
                if unit is None:
                    unit = len(self.sizes)
                    self.sizes.append(0)
                    self.above.append(0)
                self.images[name] = len(self.flags)
                self.flags.append(flag)
                self.owners.append(unit)
                self.sizes[unit] += 1
                self.above[unit] += flag
            elif flag and not self.flags[at]:
                self.flags[at] = True
                self.above[self.owners[at]] += 1
        return len(self.images) - before

    def bounds_tail(self, statistic: str) -> bool:
        shares = np.array(self.above) / np.array(self.sizes)
        return bounds_share(shares, TAIL, confidence=1 - ALLOWED, tolerant=statistic != "worst")


def passes_by_the_old_rule(batches: list[np.ndarray], statistic: str, rng: np.random.Generator) -> bool:
    """Return what one look at the newest window said: all images independent, nothing remembered."""
    window: list[np.ndarray] = []
    for batch in reversed(batches):
        if sum(map(len, window)) >= WINDOW:
            break
        window.append(batch)
    values = np.concatenate(window)
    exceeding = int((values > LIMIT).sum())
    if clopper_pearson(exceeding, len(values))[1] > TAIL:
        return False
    if statistic == "worst":
        return exceeding == 0
    if len(window) < 2:
        return False
    sizes = np.array([len(batch) for batch in window])
    draws = rng.integers(len(window), size=(200, len(window)))
    totals = sizes[draws].sum(1)
    if statistic == "mean":
        high = np.quantile(np.array([batch.sum() for batch in window])[draws].sum(1) / totals, 1 - ALLOWED)
        return float(max(values.mean(), high)) <= LIMIT
    above = np.array([(batch > LIMIT).sum() for batch in window])[draws].sum(1) / totals
    return float(np.quantile(above, 1 - ALLOWED)) <= TAIL  # then the 90 % quantile is below the limit


@dataclass
class Found:
    """What became of one run; looks are counted from 1, None: never."""

    scenario: Scenario
    false_pass: int | None = None
    earlier: bool = False
    old_pass: int | None = None
    first_pass: int | None = None
    disagreed: int = 0
    looks_checked: int = 0


def simulate(scenario: Scenario, rng: np.random.Generator, *, check: bool = False, until: str = "false") -> Found:
    """Follow one run to its end, or until both rules have decided."""
    found, gate = Found(scenario), RiskGate(LIMIT, statistic=scenario.statistic)  # type: ignore[arg-type]
    tally, records, batches = Tally(), [], []
    by_step, by_image, blocked = 0.0, 0.0, False
    for look, (names, exposed, now) in enumerate(World(scenario, rng).audits()):
        exposures = np.where(exposed, scenario.worth, CLEAN)
        batches.append(exposures)
        records.append((look, names, exposures))
        labels = [(look, name) for name in names] if scenario.data == "augmented, nameless" else names
        new = tally.add(labels, exposed)
        by_step, by_image = by_step + now, by_image + now * new
        above = scenario.exposure == "first epoch" or max(by_step / (look + 1), by_image / len(tally.images)) > TAIL
        blocked |= scenario.statistic == "worst" and bool(exposed.any())
        possible = not blocked and tally.bounds_tail(scenario.statistic)
        wanted = found.false_pass is None and (until == "false" or found.first_pass is None)
        if check or (possible and wanted and (above or found.first_pass is None)):
            made = [each if isinstance(each, AuditRecord) else record_of(*each, scenario) for each in records]
            records = list(made)
            passed = gate.verdict(made, step=look, engine=PASSED, engine_required=True).status is Status.PASS
            found.looks_checked += check
            found.disagreed += check and passed and not possible
            if passed and found.first_pass is None:
                found.first_pass = look + 1
            if passed and above and found.false_pass is None:
                found.false_pass = look + 1
            found.earlier |= passed and not above
        if above and found.old_pass is None and passes_by_the_old_rule(batches, scenario.statistic, rng):
            found.old_pass = look + 1
        decided = blocked or found.false_pass is not None or (until == "pass" and found.first_pass is not None)
        if decided and not check and (until == "pass" or found.old_pass is not None):
            break
    return found


def rows_of(found: Sequence[Found]) -> list[dict[str, Any]]:
    """Return the rates of all runs, and by each property of a scenario."""
    groups: dict[str, list[Found]] = {"all": list(found)}
    for name in ("statistic", "exposure", "correlation", "data", "batch", "worth"):
        for value in sorted({getattr(each.scenario, name) for each in found}, key=str):
            groups[f"{name} {value}"] = [each for each in found if getattr(each.scenario, name) == value]
    groups[f"share {LEAST}"] = [each for each in found if each.scenario.share == LEAST]
    groups[f"worst, share {LEAST}, whole batches"] = [
        each
        for each in groups[f"share {LEAST}"]
        if each.scenario.statistic == "worst" and each.scenario.correlation == 1
    ]
    rows = []
    for name, runs in groups.items():
        now, old = (sum(getattr(run, rule) is not None for run in runs) for rule in ("false_pass", "old_pass"))
        low, high = clopper_pearson(now, len(runs), confidence=CERTAIN)
        rows.append(
            {
                "scenario": name, "runs": len(runs), "pass_now": now / max(1, len(runs)), "low": low, "high": high,
                "pass_old_rule": old / max(1, len(runs)),
            }
        )  # fmt: skip
    return rows


def outside(runs: int, seed: int) -> list[dict[str, Any]]:
    """Return what is outside of the guarantee: whole batches leak in the first epoch, and none of them later.

    Every image was at stake in the first epoch, so that its share is the share of distinct images that were ever
    exposed. But audits are spread over all epochs, and count the shares of their steps.
    """
    rows = []
    for statistic in STATISTICS:
        passed = 0
        for number in range(runs):
            rng = np.random.default_rng([seed, 2, number])
            drawn = draw_scenario(rng, None, statistic)
            world = {"exposure": "first epoch", "data": "finite", "correlation": 1.0, "every": max(drawn.every, 2)}
            passed += simulate(replace(drawn, **world), rng).false_pass is not None
        rows.append({"statistic": statistic, "runs": runs, "pass_now": passed / runs})
    return rows


def power(runs: int, seed: int) -> list[dict[str, Any]]:
    """Return how many runs with few exposed images pass, and after how many audits."""
    rows = []
    for share in POWER_SHARES:
        for statistic in STATISTICS:
            found = []
            for number in range(runs):
                rng = np.random.default_rng([seed, 1, number])
                found.append(simulate(draw_scenario(rng, share, statistic), rng, until="pass"))
            audits = [each.first_pass for each in found if each.first_pass is not None]
            rows.append(
                {
                    "share": share, "statistic": statistic, "runs": runs, "pass": len(audits) / runs,
                    "median_audits": float(np.median(audits)) if audits else None,
                    "audits_90": float(np.quantile(audits, 0.9)) if audits else None,
                }
            )  # fmt: skip
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for guarantee.json")
    args = parser.parse_args(arguments)
    if args.runs < 1:
        parser.error(f"--runs must be >= 1, got {args.runs}.")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(1)
    start = time.monotonic()
    found = []
    for number in range(args.runs):
        rng = np.random.default_rng([args.seed, 0, number])
        found.append(simulate(draw_scenario(rng), rng, check=number < CHECKED))
    rows = rows_of(found)
    helpful = power(max(1, args.runs // 50), args.seed)
    common.print_table(
        ["scenario", "runs", "PASS now", "99.9 % bounds", "PASS old rule"],
        [
            [r["scenario"], r["runs"], f"{r['pass_now']:.2%}", f"{r['low']:.2%}-{r['high']:.2%}",
             f"{r['pass_old_rule']:.1%}"]
            for r in rows
        ],
    )  # fmt: skip
    print()
    common.print_table(
        ["true share", "statistic", "runs", "PASS", "median audits", "90 % within"],
        [
            [f"{r['share']:.0%}", r["statistic"], r["runs"], f"{r['pass']:.0%}", str(r["median_audits"]),
             str(r["audits_90"])]
            for r in helpful
        ],
    )  # fmt: skip
    print("\nOutside of the guarantee: a leak of the first epoch only, by the share of distinct images.")
    beyond = outside(max(1, args.runs // 20), args.seed)
    cells = [[r["statistic"], r["runs"], f"{r['pass_now']:.1%}"] for r in beyond]
    common.print_table(["statistic", "runs", "PASS"], cells)
    checked, disagreed = sum(f.looks_checked for f in found), sum(f.disagreed for f in found)
    earlier = sum(f.earlier for f in found)
    seconds = time.monotonic() - start
    print(f"\nThe gate was asked at all {checked} looks of {min(CHECKED, args.runs)} runs; disagreements: {disagreed}.")
    print(f"{earlier} runs passed at a look before their share rose above the tail. {seconds:.0f} s.")
    failures = [f"{r['scenario']}: {r['pass_now']:.2%} false PASS" for r in rows if r["low"] > ALLOWED]
    if disagreed:
        failures.append(f"the gate passed at {disagreed} looks where the tail is not bounded")
    passed = [asdict(f.scenario) | {"look": f.false_pass} for f in found if f.false_pass is not None]
    content = {
        "settings": {"runs": args.runs, "seed": args.seed, "looks": LOOKS, "limit": LIMIT, "tail": TAIL},
        "rows": rows, "power": helpful, "outside": beyond, "checked_looks": checked, "disagreements": disagreed,
        "passed_before_the_leak": earlier, "seconds": seconds,
        "false_passes": sorted(passed, key=lambda run: run["look"])[:20],
        "machine": common.machine(torch.device("cpu")), "versions": common.versions(),
    }  # fmt: skip
    common.write_json(args.out / "guarantee.json", content)
    return common.judge(failures, len(rows) + 1)


if __name__ == "__main__":
    sys.exit(main())
