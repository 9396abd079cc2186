"""Make the README's pictures from real audits: `python docs/pictures.py DEMO_FOLDER`.

`exposure_strip.png` comes from audits made here; `demo_faces.png` and `demo_curve.png` from a demo's folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision.io import decode_image

from lightning_gradaudit import Baseline, Budget, GaussianNoise, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import InvertingGradients
from lightning_gradaudit.cli.demo import FaceDetector, faces
from lightning_gradaudit.report import load_run

IMAGES = Path(__file__).parent / "images"
WANTED = (0.0, 0.05, 0.15, 0.35, 0.8, 1.0)


def exposure_strip() -> None:
    """Audit faces in batches of one to four under a little noise, and show one reconstruction a level of exposure."""
    torch.manual_seed(0)
    images, labels = faces()
    baseline = Baseline()
    baseline.observe(images, labels)
    model = FaceDetector().net
    found: list[tuple[float, torch.Tensor, torch.Tensor]] = []
    for index, (size, noise, tv) in enumerate(
        [(1, 0, 1e-4), (1, 0, 1e-2), (1, 0.3, 1e-2), (2, 0, 1e-2), (2, 0.1, 1e-2), (3, 0, 1e-2), (4, 0, 1e-2)] * 3
    ):
        chosen = slice(4 * index, 4 * index + size)
        snapshot = Snapshot.from_batch(
            model,
            (images[chosen], labels[chosen]),
            loss=nn.functional.cross_entropy,
            defences=(GaussianNoise(relative=noise),) if noise else (),
            step=index,
        )
        attack = InvertingGradients(total_variation=tv)
        record = audit_snapshot(snapshot, attack=attack, budget=Budget(evaluations=600), baseline=baseline.frozen())
        baseline.remember(record.pixels, record.truth)
        found += zip(record.exposure.tolist(), record.truth, record.pixels, strict=True)
    figure = Figure(figsize=(9, 3.3))
    axes = figure.subplots(2, len(WANTED))
    for column, wanted in enumerate(WANTED):
        exposure, truth, pixels = min(found, key=lambda entry: abs(entry[0] - wanted))
        for row, image in enumerate((truth, pixels)):
            axes[row, column].imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axes[row, column].set_axis_off()
        axes[0, column].set_title(f"exposure {exposure:.2f}", fontsize=10)
    figure.savefig(IMAGES / "exposure_strip.png", dpi=110, bbox_inches="tight", facecolor="white")


def demo_pictures(folder: Path) -> None:
    """Show the demo's most exposed faces and both risk curves."""
    runs = [load_run(folder / name / "gradaudit", name=name) for name in ("undefended", "defended")]
    rows = sorted(runs[0].rows, key=lambda row: -float(row.record.exposure.max()))[:4]
    figure = Figure(figsize=(9, 2.6))
    axes = figure.subplots(1, len(rows) * 2)
    for index, row in enumerate(rows):
        step = row.record.step
        twin = next(other for other in runs[1].rows if other.record.step == step)
        for offset, (name, pairs) in enumerate((("shared as it is", row.pairs), ("defended", twin.pairs))):
            panel = axes[2 * index + offset]
            panel.imshow(decode_image(str(pairs)).permute(1, 2, 0))
            panel.set_title(f"step {step}\n{name}", fontsize=8)
            panel.set_axis_off()
    figure.savefig(IMAGES / "demo_faces.png", dpi=110, bbox_inches="tight", facecolor="white")
    figure = Figure(figsize=(9, 2.6))
    panel = figure.subplots()
    for run, colour in zip(runs, ("#b91c1c", "#15803d"), strict=True):
        steps = [row.record.step for row in run.rows]
        low, risk, high = ([float(row.risk[key] or 0) for row in run.rows] for key in ("low", "risk", "high"))
        panel.plot(steps, risk, color=colour, marker="o", markersize=4, label=run.name)
        panel.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    panel.axhline(runs[0].limit or 0.3, color="#6b7280", linestyle="--", label="limit")
    panel.set(xlabel="training step", ylabel="risk, 95% bounds", ylim=(-0.03, 1.03))
    panel.legend(frameon=False, loc="center right")
    figure.savefig(IMAGES / "demo_curve.png", dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder that `gradaudit demo --out` wrote")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    exposure_strip()
    demo_pictures(options.demo)
