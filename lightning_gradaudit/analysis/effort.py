"""The attacker's capacity: exposure against gradient evaluations, by their knowledge and number of starts.

An attack never sees the truth. It leaves its best candidates along the way (`Reconstruction.path`), and the auditor
scores them afterwards. Equal work means equal simulated gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.problem import activations
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.metrics.functional.exposure import exposure
from lightning_gradaudit.metrics.functional.similarity import (
    Similarity,
    assign,
    pairwise_similarity,
    usable_similarity,
)
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.utils.time_limit import time_left

EXPOSED = 0.3
"""Exposure whose effort is reported by default: the default limit of `RiskGate`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EffortCurve:
    """What an attack had exposed after how many simulated gradients.

    Attributes:
        evaluations: (K,) increasing.
        exposure: (K, B) of each image in the order of the truth, in [0, 1], at the attack's own best candidate.
    """

    evaluations: tuple[int, ...]
    exposure: Tensor

    def effort(self, level: float = EXPOSED) -> Tensor:
        """Return the evaluations after which each image was exposed to `level` in (0, 1], (B,).

        Infinite where it never was: the effort is censored at the last of `evaluations`, that is, it is larger.
        """
        if not 0 < level <= 1:
            raise InvalidInputError(f"level must lie in (0, 1], got {level!r}.")
        spent = torch.tensor(self.evaluations, dtype=torch.float64)[:, None]
        reached = torch.where(self.exposure >= level, spent, math.inf)
        return reached.min(0).values


def effort_curve(
    reconstruction: Reconstruction, snapshot: Snapshot, *, null: Tensor, measure: Similarity = "ssim"
) -> EffortCurve:
    """Score an attack's path against the truth, each point with its own assignment.

    The path is that of the run which won. What other attacks of a portfolio, racers or starts spent counts as spent
    before it, so an effort is never understated. Where time is limited (`time_limit`) and over,
    the later points but the last are left out, which cannot understate it either.

    Args:
        reconstruction: What the attack returned; without a path its end alone is scored.
        null: (B,) similarity of a guess without the gradient, in [0, 1] (see `Baseline.score`).
        measure: "ssim" or "nmse"; the latter below 8 pixels a side.
    """
    truth = snapshot.truth_pixels.cpu()
    measure = usable_similarity(measure, *truth.shape[-2:])
    path = list(reconstruction.path)
    before = reconstruction.evaluations - path[-1][0] if path else 0
    points = [(spent + before, images) for spent, images in path if spent + before < reconstruction.evaluations]
    points.append((reconstruction.evaluations, reconstruction.inputs.cpu()))
    rows, scored = [], []
    for spent, images in points:
        if spent < reconstruction.evaluations and time_left() <= 0:
            continue
        scored.append(spent)
        pixels = snapshot.observation.normalization.to_pixels(images.float()).clamp(0, 1).nan_to_num(0.5)
        pairs = pairwise_similarity(pixels, truth, measure)
        rows.append(exposure(pairs[assign(pairs), torch.arange(len(truth))], null.cpu().float()))
    return EffortCurve(evaluations=tuple(scored), exposure=torch.stack(rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class KnowledgeLevel:
    """The result of an attack with some knowledge.

    Attributes:
        knowledge: What the attacker holds beside gradient, weights and batch size.
        attack: What ran, with its number of starts.
        restarts: Starts that shared the budget.
        outcome: How it ended.
        curve: Its exposure against evaluations.
    """

    knowledge: str
    attack: str
    restarts: int
    outcome: Outcome
    curve: EffortCurve


def knowledge_sweep(
    snapshot: Snapshot,
    *,
    attack: Attack,
    budget: Budget,
    restarts: Sequence[int] = (1,),
    baseline: Baseline | None = None,
    seed: int = 0,
) -> list[KnowledgeLevel]:
    """Run one attack with more and more knowledge, and with several starts, each time on the same budget.

    More knowledge cannot hurt an ideal attacker; one run of a real one may still do worse with it.

    Args:
        attack: Any; several starts need a `GradientMatching`.
        budget: Of each run.
        restarts: Numbers of starts to try.
        baseline: For the null; None: 0.
        seed: The same for every run.

    Raises:
        InvalidInputError: When restarts are asked of an attack that has none.
    """
    if any(count != 1 for count in restarts) and not isinstance(attack, GradientMatching):
        raise InvalidInputError(f"restarts: {attack.name} has no restarts; pass a GradientMatching or restarts=(1,).")
    scorer = Baseline() if baseline is None else baseline
    rungs = []
    for knowledge, observation in knowledge_levels(snapshot).items():
        for count in restarts:
            chosen = replace(attack, restarts=count) if isinstance(attack, GradientMatching) else attack
            result = chosen(observation, budget=budget, generator=torch.Generator().manual_seed(seed))
            pixels = observation.normalization.to_pixels(result.inputs.float()).clamp(0, 1).nan_to_num(0.5)
            scores = scorer.score(pixels, snapshot.truth_pixels, snapshot.truth.labels)
            curve = effort_curve(result, snapshot, null=scores.null, measure=scores.measure)
            rungs.append(
                KnowledgeLevel(
                    knowledge=knowledge, attack=chosen.name, restarts=count, outcome=result.outcome, curve=curve
                )
            )
    return rungs


def knowledge_levels(snapshot: Snapshot) -> dict[str, Observation]:
    """Return what adversaries of growing knowledge hold of one step, those who know least first.

    "nothing" (labels must be recovered), "+ labels", and where BatchNorm ran in train mode also "+ BatchNorm
    statistics" and "+ mode". Without the mode they simulate the step in eval mode with the running statistics, or
    with the batch's own as constants; with the mode they simulate the step as it was. Levels that make no difference
    to this step are left out.
    """
    full = replace(snapshot.observation, labels=snapshot.truth.labels)
    countable = not snapshot.truth.labels.is_floating_point() and snapshot.truth.labels.ndim == 1
    layers = [
        (name, module)
        for name, module in full.client.module.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and f"{name}.running_mean" in full.buffers
    ]
    if not layers:
        return ({"nothing": replace(full, labels=None)} if countable else {}) | {"+ labels": full}
    outside = replace(full, client=full.client.in_eval_mode())
    levels = {"nothing": replace(outside, labels=None)} if countable else {}
    statistics = {**full.buffers, **_batch_statistics(snapshot, [name for name, _ in layers])}
    return levels | {
        "+ labels": outside,
        "+ BatchNorm statistics": replace(outside, buffers=statistics),
        "+ mode": full,
    }


def _batch_statistics(snapshot: Snapshot, names: Sequence[str]) -> dict[str, Tensor]:
    """Return mean and biased variance (over N·H·W values) of what the true batch feeds each BatchNorm layer."""
    observation = replace(snapshot.observation, protocol=snapshot.protocol)
    with activations(observation, names) as seen, torch.no_grad():
        observation.loss(snapshot.truth.inputs, snapshot.truth.labels)
    found = {}
    for name, inputs in seen.items():
        values = inputs[-1].detach().transpose(0, 1).flatten(1)
        for key, value in (("running_mean", values.mean(1)), ("running_var", values.var(1, correction=0))):
            found[f"{name}.{key}"] = value.to(observation.buffers[f"{name}.{key}"])
    return found
