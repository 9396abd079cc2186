"""Measure what one evaluation of gradient matching costs, in training steps.

An evaluation is what `InvertingGradients` repeats: the simulated gradient of a candidate, its cosine distance to the
observed one, total variation, and the derivative of all that with respect to the images. A training step is the forward
and backward pass of the same batch through the same model in the same mode. Counted in forward passes of three kinds
(forward, backward to the weights, backward to the images), the least an evaluation can cost is 7/3 of a training step
if it differentiates twice (`twice`), and 5/3 by a difference of first derivatives, as `InvertingGradients` and other
first-order attacks do where they are compiled (`compiled`).

For each model and batch size, training steps, eager and compiled evaluations are timed in turn, round by round, in
one process; a ratio is the median over rounds of that within a round. `plain` is an iteration of the loop that one
would write down without this package: the gradient with its graph, the objective, its derivative, a step of Adam.
`compile s` is what the compiler took, once per architecture and shapes. `breaching` is the same evaluation by that
package where it is importable (it need not be): its own `invertinggradients` attack, per iteration, in the same rounds;
`floor` is the least evaluation over that one, were a convolution as fast as in the training step. `off` is the relative
error of the first derivative by difference; on a GPU that multiplies in TF32 it is too large, so that compiled
evaluations differentiate twice there.

Exit status 1: on the CPU, a compiled evaluation costs more training steps than its model's limit, or more than
`--max-of-breaching` of breaching's; on a GPU, one image's costs more than `--max-of-plain` of the plain loop on a
ResNet-18; or it could not be compiled.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import common, models
from lightning_gradaudit import Snapshot
from lightning_gradaudit.attacks import CosineDistance, TotalVariation, compiled_evaluation
from lightning_gradaudit.attacks.matching.problem import LossAndGradient, MatchingProblem
from lightning_gradaudit.simulation.observation import Observation

MODELS = {
    "mlp": models.mlp,
    "lenet": models.lenet_default,
    "convnet8": models.convnet8,
    "resnet18": models.resnet18,
    "vit": models.vit,
}
FLOOR = 5 / 3
LIMITS = {"lenet": 3.0, "convnet8": 3.0, "resnet18": 4.0, "vit": 4.0}
"""Largest cost of a compiled evaluation, in training steps; the MLP, which closed forms solve, has none."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("evaluation", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of one measurement within a round")
    parser.add_argument("--eager", action="store_true", help="do not compile, and check no threshold")
    parser.add_argument("--max-of-breaching", type=float, default=0.5)
    parser.add_argument("--max-of-plain", type=float, default=0.15, help="on a GPU, ResNet-18, one image")
    args = parser.parse_args(arguments)
    if args.quick:
        args.models, args.batch_sizes, args.rounds = ["lenet", "convnet8"], [1], 3
    return args


def seconds_per_call(work: Callable[[], object], device: torch.device, least: float) -> float:
    """Time as many calls as fill the least time; the device is waited for at the end alone."""
    calls = 1
    while True:
        common.synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        common.synchronise(device)
        elapsed = time.perf_counter() - start
        if elapsed >= least:
            return elapsed / calls
        calls = max(2 * calls, round(1.2 * calls * least / elapsed))


class Row:
    """One model and batch size: the works that are timed in turn."""

    def __init__(self, name: str, size: int, images: common.Images, args: argparse.Namespace) -> None:
        self.name, self.size = name, size
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = MODELS[name]().to(self.device).eval()
        self.batch = images.pixels[:size].to(self.device), images.labels[:size].to(self.device)
        self.observation = self._observed(self.model)
        self.candidate = torch.rand(self.observation.shape, device=self.device)
        self.compile_seconds = 0.0
        self.reasons: list[str] = []
        self.works: dict[str, Callable[[], object]] = {
            "step": self.step,
            "eager": self._evaluation(exact=False),
        }
        self.off = self._error()
        if not args.eager:
            self._compile("twice", exact=True)
            self._compile("compiled", exact=False)

    def _observed(self, model: nn.Module) -> Observation:
        loss = nn.functional.cross_entropy
        return Snapshot.from_batch(model, self.batch, loss=loss, labels_known=True).observation

    def step(self) -> None:
        """Run the forward and backward pass of a training step."""
        images, labels = self.batch
        self.model.zero_grad()
        nn.functional.cross_entropy(self.model(images), labels).backward()

    def _plain_loop(self) -> Callable[[], object]:
        candidate = self.candidate.clone().requires_grad_()
        optimizer = torch.optim.Adam([candidate], lr=0.1)
        observed, labels = list(self.observation.gradients.values()), self.batch[1]
        weights = list(self.model.parameters())

        def iteration() -> None:
            loss = nn.functional.cross_entropy(self.model(candidate), labels)
            simulated = torch.autograd.grad(loss, weights, create_graph=True)
            product = sum((a * b).sum() for a, b in zip(simulated, observed, strict=True))
            squares = [sum(t.pow(2).sum() for t in gradient) for gradient in (simulated, observed)]
            rows = (candidate[..., 1:, :] - candidate[..., :-1, :]).abs().mean()
            columns = (candidate[..., 1:] - candidate[..., :-1]).abs().mean()
            distance = 1 - product / (squares[0] * squares[1]).sqrt() + 1e-2 * (rows + columns)
            candidate.grad = torch.autograd.grad(distance, candidate)[0].sign_()
            optimizer.step()
            with torch.no_grad():
                candidate.clamp_(0, 1)

        return iteration

    def _matching(self, *, exact: bool, observation: Observation | None = None) -> MatchingProblem:
        observation = self.observation if observation is None else observation
        return MatchingProblem(observation, CosineDistance(), (TotalVariation(weight=1e-2),), exact=exact)

    def _evaluation(self, *, exact: bool) -> Callable[[], LossAndGradient]:
        evaluation, labels = self._matching(exact=exact), self.batch[1]
        return lambda: evaluation(self.candidate, labels)

    def _error(self) -> float:
        """Return how far the derivative by difference is from the exact one, without penalties that it shares."""
        evaluation = MatchingProblem(self.observation, CosineDistance(), exact=False)
        ways = evaluation.differentiate_twice, evaluation.take_difference
        exact, difference = (way(self.candidate, self.batch[1])[1] for way in ways)
        return float((difference - exact).norm() / exact.norm())

    def _compile(self, name: str, *, exact: bool) -> None:
        evaluate = self._evaluation(exact=exact)

        def compiled() -> object:
            with compiled_evaluation(wait=True):
                return evaluate()

        start = time.perf_counter()
        with compiled_evaluation(wait=True) as compilation:
            evaluate()
        self.compile_seconds, self.reasons = time.perf_counter() - start, [*self.reasons, *compilation.reasons]
        if compilation.evaluations:
            self.works[name] = compiled

    def measure(self, args: argparse.Namespace, peer: Callable[[Row], Callable[[], object]] | None) -> dict[str, Any]:
        """Time all works in turn and return the row's figures."""
        works = self.works | self._if_it_works("plain", self._plain_loop)
        if peer is not None:
            works |= self._if_it_works("breaching", lambda: peer(self))
        times: dict[str, list[float]] = {name: [] for name in works}
        for number in range(args.rounds + 1):  # the first round warms up
            for name, work in works.items():
                taken = seconds_per_call(work, self.device, args.seconds)
                if number:
                    times[name].append(taken)
        row: dict[str, Any] = {"model": self.name, "batch_size": self.size, "compile_seconds": self.compile_seconds}
        row |= {"reasons": self.reasons, "off": self.off}
        for name, each in times.items():
            row[f"{name}_ms"] = 1e3 * statistics.median(each)
            row[f"{name}_over_step"] = _ratio(each, times["step"])
        if "compiled" in times and "plain" in times:
            row["compiled_over_plain"] = _ratio(times["compiled"], times["plain"])
        if "breaching" in times and "compiled" in times:
            row["compiled_over_breaching"] = _ratio(times["compiled"], times["breaching"])
            row["floor_over_breaching"] = FLOOR / row["breaching_over_step"]
        return row

    def _if_it_works(self, name: str, make: Callable[[], Callable[[], object]]) -> dict[str, Callable[[], object]]:
        try:
            work = make()
            work()
        except Exception as error:  # not every model can be differentiated twice as it is
            self.reasons.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            return {}
        return {name: work}


def _ratio(times: Sequence[float], over: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, over, strict=True))


def breaching_peer() -> Callable[[Row], Callable[[], object]] | None:
    """Return what makes breaching's evaluation of a row, or None where it is not installed."""
    try:
        import breaching
    except ImportError:
        return None

    def peer(row: Row) -> Callable[[], object]:
        config = breaching.get_config(overrides=["attack=invertinggradients"])
        setup = {"device": row.device, "dtype": torch.float32}
        attacker = breaching.attacks.prepare_attack(row.model, nn.CrossEntropyLoss(), config.attack, setup)
        images, labels = row.batch
        data = config.case.data
        data.shape, data.classes, data.normalize = [3, common.SIDE, common.SIDE], common.CLASSES, False
        payload = {"parameters": list(row.model.parameters()), "buffers": list(row.model.buffers()), "metadata": data}
        shared = {
            "gradients": list(row.observation.gradients.values()),
            "buffers": None,
            "metadata": {"num_data_points": len(images), "labels": labels, "local_hyperparams": None},
        }
        rec_models, labels, _ = attacker.prepare_attack([payload], [shared])
        attacker.objective.initialize(attacker.loss_fn, attacker.cfg.impl, None)
        candidate = row.candidate.clone().requires_grad_()
        optimizer, _ = attacker._init_optimizer([candidate])
        return attacker._compute_objective(candidate, labels, rec_models, optimizer, [shared], 0)

    return peer


def check(rows: list[dict[str, Any]], args: argparse.Namespace) -> tuple[list[str], int]:
    """Hold the compiled evaluations against their limits."""
    failures, checked = [], 0
    for row in rows if not args.eager else ():
        name = f"{row['model']} at B = {row['batch_size']}"
        limit = LIMITS.get(row["model"]) if args.device == "cpu" else None
        cost = row.get("compiled_over_step")
        if cost is None:
            failures.append(f"{name}: not compiled ({'; '.join(row['reasons'])}).")
        elif limit is not None:
            checked += 1
            if not cost <= limit:
                failures.append(f"{name}: an evaluation costs {cost:.2f} training steps, limit {limit:.1f}.")
        if args.device != "cpu" and (row["model"], row["batch_size"]) == ("resnet18", 1) and cost is not None:
            checked += 1
            if not (share := row["compiled_over_plain"]) <= args.max_of_plain:
                failures.append(f"{name}: {share:.3f} of the plain loop's time, limit {args.max_of_plain:.2f}.")
        if (share := row.get("compiled_over_breaching")) is not None and args.device == "cpu":
            checked += 1
            if not share <= args.max_of_breaching:
                failures.append(f"{name}: {share:.2f} of breaching's time, limit {args.max_of_breaching:.2f}.")
    return failures, checked


HEADERS = (
    "model", "B", "step ms", "plain ms", "eager ms", "twice ms", "compiled ms", "eager/step", "twice/step",
    "compiled/step", "limit", "of plain", "off", "compile s"
)  # fmt: skip
PEER = ("breaching ms", "of breaching", "floor")


def cells(row: dict[str, Any]) -> list[str]:
    def cell(key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else ""

    times = [cell(f"{name}_ms", 2) for name in ("step", "plain", "eager", "twice", "compiled")]
    ratios = [cell(f"{name}_over_step", 2) for name in ("eager", "twice", "compiled")]
    limit = LIMITS.get(row["model"])
    limits = [f"{limit:.1f}" if limit else "", cell("compiled_over_plain", 3)]
    limits += [f"{row['off']:.0e}", f"{row['compile_seconds']:.0f}"]
    peer = [cell("breaching_ms", 1), cell("compiled_over_breaching", 2), cell("floor_over_breaching", 2)]
    return [row["model"], str(row["batch_size"]), *times, *ratios, *limits, *peer]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    peer = breaching_peer()
    header = {"settings": common.settings_of(args, images), "machine": common.machine(device)}
    rows: list[dict[str, Any]] = []
    failures, checked = [], 0
    for name in args.models:
        for size in args.batch_sizes:
            rows.append(Row(name, size, images, args).measure(args, peer))
            failures, checked = check(rows, args)
            common.write_json(args.out, header | {"versions": common.versions(), "rows": rows, "failures": failures})
            print(f"{name}, B = {size}: done", file=sys.stderr, flush=True)
    common.print_table((*HEADERS, *PEER), [cells(row) for row in rows])
    return common.judge(failures, checked)


if __name__ == "__main__":
    sys.exit(main())
