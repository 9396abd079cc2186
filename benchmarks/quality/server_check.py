"""Measure `check_server`: false alarms in honest rounds, manipulations found, and what an active server gets.

Honest rounds: clients train for a few steps a round (SGD and Adam, small and large learning rates, warm restarts), get
other weights of the same architecture in the middle of a run, or get weights rounded to 8 or 4 bits. Manipulations are
made of the weights of such a run, at their published settings and ten times weaker, and judged with the run's history
and as the first round of a run. `--calibrate` measures the tails that `REFERENCES` holds; it uses other networks, seeds
and, by `--data`, other images than the figures.

How to read a row: how many of the trials a finding was made in. `--cases reach` shows what the server gets from
ResNet-18 at 64 x 64 with B images: the share of images that come back exactly (above 40 dB) by division of rows, for
fishing how alike the gradient is to that of one image, and whether that image is named among a hundred.

Exit status 1: more than 2 false alarms in 200 honest rounds, or a manipulation found in fewer than 95 of 100 trials.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18 as torchvision_resnet18

from benchmarks import common, models
from lightning_gradaudit import Snapshot
from lightning_gradaudit.analysis import RoundStatistics, ServerReport, check_server, judge_round
from lightning_gradaudit.attacks import (
    CuriousAbandonHonesty,
    DuplicatedHead,
    Fishing,
    IdentityLayers,
    RobbingTheFed,
    ScaledHead,
    SuppressedGradients,
)

LOSS = nn.functional.cross_entropy
Manipulation = Callable[[nn.Module, Tensor, int], nn.Module]


def tanh_mlp() -> nn.Module:
    """Two hidden layers of 256 and 128 tanh units."""
    sizes = (3 * common.SIDE**2, 256, 128)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], common.CLASSES))


def wide_cnn() -> nn.Module:
    """Three GELU convolutions with GroupNorm, and two linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 24), (24, 48), (48, 48)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, 96), nn.ReLU(), nn.Linear(96, common.CLASSES))


CALIBRATION: dict[str, Callable[[], nn.Module]] = {
    "mlp": models.mlp,
    "conv2": models.conv2,
    "lenet": models.lenet_default,
    "resnet8": models.resnet8,
    "small_vit": partial(models.vit, 48),
}
REPORTED: dict[str, Callable[[], nn.Module]] = {
    "tanh_mlp": tanh_mlp,
    "wide_cnn": wide_cnn,
    "convnet8": partial(models.convnet8, 16),
    "resnet8_wide": partial(models.resnet8, 24),
    "vit": models.vit,
}
SCENARIOS = ("sgd", "large_rate", "warm_restarts", "other_weights", "quantised")
RELU_NETS = ("wide_cnn", "convnet8", "resnet8_wide")


@dataclass
class Client:
    """A client in an honest run: its model, its images, and how a round changes the weights."""

    build: Callable[[], nn.Module]
    pixels: Tensor
    labels: Tensor
    scenario: str
    seed: int

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = self.build()
        self.generator = torch.Generator().manual_seed(self.seed)
        self.batch_size = (8, 16, 32, 64)[self.seed % 4]
        rate, momentum = (0.1, 0.9) if self.scenario == "large_rate" else (0.02, 0.5)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=momentum)
        if self.seed % 2 and self.scenario != "large_rate":
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.bits = (8, 4)[self.seed % 2]
        self.rate = rate if isinstance(self.optimizer, torch.optim.SGD) else 1e-3

    def batch(self, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw a batch."""
        chosen = torch.randperm(len(self.pixels), generator=self.generator)[: size or self.batch_size]
        return self.pixels[chosen], self.labels[chosen]

    def train(self, steps: int) -> None:
        """Make local steps."""
        self.model.train()
        for _ in range(steps):
            images, labels = self.batch(32)
            self.optimizer.zero_grad()
            LOSS(self.model(images), labels).backward()
            self.optimizer.step()

    def rounds(self, count: int, steps: int) -> Iterator[nn.Module]:
        """Yield the weights that each round begins with."""
        for number in range(count):
            if self.scenario == "warm_restarts":
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate * 5 * (1 - number % 4 / 4)
            if self.scenario == "other_weights" and number == count // 2:
                self.model.load_state_dict(self.other_weights(steps * count))
            received = copy.deepcopy(self.model)
            if self.scenario == "quantised":
                quantise(received, self.bits)
            yield received
            self.train(steps)

    def other_weights(self, steps: int) -> dict[str, Tensor]:
        """Return weights of the same architecture from another start and other images, as fine-tuning begins with."""
        other = Client(self.build, self.pixels.flip(-1), (self.labels + 3) % common.CLASSES, "sgd", self.seed + 5000)
        other.train(3 * steps)
        return other.model.state_dict()


def quantise(model: nn.Module, bits: int) -> None:
    """Round each weight tensor to a symmetric grid of so many bits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                step = parameter.abs().max().clamp_min(1e-12) / (2 ** (bits - 1) - 1)
                parameter.copy_((parameter / step).round() * step)


def honest_run(client: Client, rounds: int, steps: int = 4) -> tuple[list[ServerReport], list[RoundStatistics]]:
    """Check every round of an honest run against the rounds before it."""
    history: list[RoundStatistics] = []
    reports = []
    for received in client.rounds(rounds, steps):
        report = check_server(received.train(), client.batch(), loss=LOSS, history=history)
        reports.append(report)
        history.append(report.statistics)
    return reports, history


def by_image(make: Callable[..., Any], **settings: Any) -> Manipulation:
    """Return a manipulation that looks at public images, with a seed of the trial."""
    return lambda model, public, seed: make(seed=seed, **settings)(model, public)


def of_head(make: Callable[..., Any], **settings: Any) -> Manipulation:
    """Return a manipulation of a class and, where it is wanted, a feature of the trial."""

    def manipulate(model: nn.Module, _: Tensor, seed: int) -> nn.Module:
        feature = {"feature": seed % 16} if "slope" in settings else {}
        changed: nn.Module = make(target=seed % common.CLASSES, **feature, **settings)(model)
        return changed

    return manipulate


def of_model(make: Any) -> Manipulation:
    """Return a manipulation that looks at the model alone."""
    return lambda model, _, __: make(model)


MANIPULATIONS: dict[str, tuple[Manipulation, tuple[str, ...] | None]] = {
    "imprint, 512 bins": (by_image(RobbingTheFed, bins=512), None),
    "imprint, 51 bins": (by_image(RobbingTheFed, bins=51), None),
    "imprint, 5 bins": (by_image(RobbingTheFed, bins=5), None),
    "trap weights": (by_image(CuriousAbandonHonesty), None),
    "trap weights in 10% of the rows": (by_image(CuriousAbandonHonesty, share=0.1), None),
    "trap weights, magnitudes drawn anew": (by_image(CuriousAbandonHonesty, mirrored=False), None),
    "class fishing, bias 1000": (of_head(Fishing), None),
    "class fishing, bias 100": (of_head(Fishing, boost=100.0), None),
    "feature fishing, slope 1000": (of_head(Fishing, slope=1000.0), None),
    "feature fishing, slope 100": (of_head(Fishing, slope=100.0), None),
    "head times 100": (of_model(ScaledHead(factor=100.0)), None),
    "head times 10": (of_model(ScaledHead(factor=10.0)), None),
    "all head rows alike": (of_model(DuplicatedHead()), None),
    "two head rows alike": (of_model(DuplicatedHead(share=0.1)), None),
    "dead layers, shift 100": (of_model(SuppressedGradients(shift=100.0)), RELU_NETS),
    "dead layers, shift 10": (of_model(SuppressedGradients(shift=10.0)), RELU_NETS),
    "identity convolutions": (of_model(IdentityLayers()), RELU_NETS),
    "identity in 10% of the channels": (of_model(IdentityLayers(share=0.1)), RELU_NETS),
}


OPEN = ("trap weights, magnitudes drawn anew",)
"""Variants that the tests are not made for; without a threshold."""


def detection(
    nets: dict[str, Callable[[], nn.Module]], images: common.Images, trials: int, seed: int
) -> dict[str, Any]:
    """Count the trials in which each manipulation is found, with the run's history and in a first round."""
    found: dict[str, Counter[str]] = {name: Counter() for name in MANIPULATIONS}
    public, private = images.pixels[::2], (images.pixels[1::2], images.labels[1::2])
    number = 0
    while any(count["trials"] < trials for count in found.values()):
        net = list(nets)[number % len(nets)]
        scenario = SCENARIOS[(number // len(nets)) % len(SCENARIOS)]
        client = Client(nets[net], *private, scenario=scenario, seed=seed + number)
        client.train((0, 10, 30)[number % 3])
        _, history = honest_run(client, 6, steps=2)
        for name, (manipulate, wanted) in MANIPULATIONS.items():
            if found[name]["trials"] >= trials or (wanted is not None and net not in wanted):
                continue
            model = manipulate(client.model, public[:200], seed + number).train()
            batch = client.batch()
            known = check_server(model, batch, loss=LOSS, history=history)
            tests = [f.test for f in known.findings if f.test != "architecture"]
            first = judge_round(known.statistics)
            found[name].update(
                {"trials": 1, "found": bool(known.findings), "first": bool(first.findings), "besides": bool(tests)}
            )
            found[name].update({f"by {f.test}": 1 for f in known.findings})
        number += 1
    return {name: dict(count) for name, count in found.items()}


def honest(nets: dict[str, Callable[[], nn.Module]], images: common.Images, rounds: int, seed: int) -> dict[str, Any]:
    """Check honest rounds, and return the alarms and every test's statistics."""
    alarms: list[str] = []
    values: dict[str, list[float]] = {}
    count, number, length = 0, 0, 8
    while count < rounds:
        for name, build in nets.items():
            for scenario in SCENARIOS:
                if count >= rounds:
                    break
                client = Client(build, images.pixels, images.labels, scenario, seed + number)
                client.train((0, 20, 60)[number % 3])
                number += 1
                for at, report in enumerate(honest_run(client, length)[0]):
                    count += 1
                    alarms += [f"{name}, {scenario}, round {at}: {report}"] if report.findings else []
                    for test, value in report.values.items():
                        values.setdefault(test, []).append(value)
    return {"rounds": count, "alarms": alarms, "values": values}


def tails(values: dict[str, list[float]]) -> list[list[str]]:
    """Return the tail of each test: its 90th percentile, 1.5 times the mean excess, and the largest value."""
    rows = []
    for test, numbers in values.items():
        tensor = torch.tensor(numbers, dtype=torch.float64)
        start = float(tensor.quantile(0.9))
        excess = tensor[tensor > start] - start
        scale = 1.5 * float(excess.mean()) if len(excess) else 0.0
        rows.append([test, str(len(numbers)), f"{start:.3f}", f"{scale:.3f}", f"{float(tensor.max()):.3f}"])
    return rows


def reach(images: common.Images, batches: int, sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Return what a server gets from ResNet-18 at 64 x 64, and whether the client is warned in its first round."""
    pixels = nn.functional.interpolate(images.pixels, (64, 64), mode="bilinear")
    public, private, labels = pixels[::2][:200], pixels[1::2], images.labels[1::2]
    torch.manual_seed(seed)
    model = torchvision_resnet18(num_classes=common.CLASSES).eval()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in sizes:
        target = 0
        changed = {
            "imprint": RobbingTheFed(bins=512)(model, public),
            "trap weights": CuriousAbandonHonesty(batch_size=size)(model, public),
            "class fishing": Fishing(target=target)(model),
        }
        for name, manipulated in changed.items():
            got, warned = [], []
            for _ in range(batches):
                batch = draw(private, labels, size, target if name == "class fishing" else None, generator)
                gradient = Snapshot.from_batch(manipulated, batch, loss=LOSS).observation.gradients
                if name == "class fishing":
                    got.append(fished(manipulated, gradient, batch, private, labels, target))
                else:
                    got.append(exact_share(name, gradient, batch[0]))
                warned.append(bool(check_server(manipulated, batch, loss=LOSS).findings))
            rows.append({"manipulation": name, "B": size, "got": got, "warned": sum(warned), "batches": batches})
            print(rows[-1], flush=True)
    return rows


def draw(
    pixels: Tensor, labels: Tensor, size: int, sole: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a batch; with `sole`, one image of that class and no other of it."""
    order = torch.randperm(len(pixels), generator=generator)
    if sole is None:
        return pixels[order[:size]], labels[order[:size]]
    members = labels[order] == sole
    chosen = torch.cat([order[members][:1], order[~members][: size - 1]])
    return pixels[chosen], labels[chosen]


def exact_share(name: str, gradient: Any, truth: Tensor) -> float:
    """Return the share of a batch that some row, or difference of neighbouring rows, gives above 40 dB."""
    weight, bias = gradient["0.rows.weight"].double(), gradient["0.rows.bias"].double()
    if name == "imprint":
        weight, bias = weight[:-1] - weight[1:], bias[:-1] - bias[1:]
    kept = bias.abs() > 1e-6 * bias.abs().max()
    found = (weight[kept] / bias[kept, None]).float()
    errors = torch.cdist(truth.flatten(1), found).square() / truth[0].numel()
    return float((errors.amin(1) < 1e-4).float().mean())


def fished(
    model: nn.Module, gradient: Any, batch: tuple[Tensor, Tensor], private: Tensor, labels: Tensor, target: int
) -> tuple[float, bool]:
    """Return the cosine of the gradient below the head with the sole image's own, and whether that image is named."""
    others = private[labels == target]
    others = others[(others - batch[0][0]).abs().flatten(1).amax(1) > 0][:99]
    shared = torch.cat([g.flatten() for name, g in gradient.items() if not name.startswith("fc")])
    cosines = []
    for image in [batch[0][:1], *others[:, None]]:
        own = Snapshot.from_batch(model, (image, torch.tensor([target])), loss=LOSS).observation.gradients
        flat = torch.cat([g.flatten() for name, g in own.items() if not name.startswith("fc")])
        cosines.append(float(nn.functional.cosine_similarity(shared, flat, dim=0)))
    return cosines[0], cosines[0] >= max(cosines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("server_check", __doc__)
    parser.add_argument("--cases", nargs="+", choices=("honest", "detection", "reach"), default=["honest", "detection"])
    parser.add_argument("--calibrate", action="store_true", help="print the tails of the tests on the calibration nets")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--batches", type=int, default=8, help="per row of reach")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.trials, args.batches = 50, 10, 1
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    common.check_device(args.device, args.threads)
    images, began = common.load_images(args.data), time.perf_counter()
    if args.calibrate:
        measured = honest(CALIBRATION, images, args.rounds, args.seed)
        common.print_table(["test", "values", "start", "scale", "largest"], tails(measured["values"]))
        print(*measured["alarms"], sep="\n")
        return 0
    failures: list[str] = []
    content: dict[str, Any] = {"settings": common.settings_of(args, images), "versions": common.versions()}
    if "honest" in args.cases:
        measured = honest(REPORTED, images, args.rounds, args.seed)
        print(
            f"{len(measured['alarms'])} false alarms in {measured['rounds']} honest rounds",
            *measured["alarms"],
            sep="\n",
        )
        content["honest"] = {key: measured[key] for key in ("rounds", "alarms")}
        if len(measured["alarms"]) > max(2, args.rounds // 100):
            failures.append(f"{len(measured['alarms'])} false alarms in {measured['rounds']} honest rounds")
    if "detection" in args.cases:
        found = detection(REPORTED, images, args.trials, args.seed + 1000)
        rows = []
        for name, count in found.items():
            by = sorted((key for key in count if key.startswith("by ")), key=lambda key: -count[key])[:3]
            tests = ", ".join(f"{key[3:]} {count[key]}" for key in by)
            rows.append([name, *(str(count[key]) for key in ("trials", "found", "besides", "first")), tests])
            if name not in OPEN and count["found"] < 0.95 * count["trials"]:
                failures.append(f"{name}: found in {count['found']} of {count['trials']}")
        common.print_table(["manipulation", "trials", "found", "without architecture", "in a first round", "by"], rows)
        content["detection"] = found
    if "reach" in args.cases:
        content["reach"] = reach(images, args.batches, (8, 32, 64), args.seed)
    print(f"{time.perf_counter() - began:.0f} s")
    common.write_json(args.out, content)
    return common.judge(failures, 1 + len(MANIPULATIONS) - len(OPEN))


if __name__ == "__main__":
    sys.exit(main())
