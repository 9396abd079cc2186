"""What the benchmarks share: options, images, a description of the machine, tables and JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "pytorch-lightning",
    "torchmetrics",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-image",
    "loky",
    "ray",
)
CLASSES = 10
SIDE = 32
_FACES = 100  # the first hundred of scikit-image's subset of Labeled Faces in the Wild; the rest are no faces


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--data", type=Path, help="npz with images uint8 (N, 3, 32, 32) and labels; default: LFW faces")
    result.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where to write the figures")
    result.add_argument("--device", default="cpu", help="cpu or cuda")
    result.add_argument("--threads", type=int, help="arithmetic threads of torch in this process; default: torch's own")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--quick", action="store_true", help="a smaller run that takes a minute or two")
    return result


@dataclass(frozen=True)
class Images:
    """Real images: pixels (N, 3, 32, 32) in [0, 1], labels (N,), and words for the record.

    `audited` holds the indices that may be attacked; the others serve as gallery only.
    """

    pixels: Tensor
    labels: Tensor
    description: str
    audited: Tensor


def load_images(path: Path | None) -> Images:
    """Read images from an npz, or take the faces that come with scikit-image."""
    if path is None:
        return _faces()
    with np.load(path) as file:
        raw, labels = file["images"], torch.from_numpy(file["labels"]).long()
    if raw.dtype != np.uint8 or raw.shape[1:] != (3, SIDE, SIDE) or len(labels) != len(raw):
        raise SystemExit(f"--data: expected uint8 images (N, 3, {SIDE}, {SIDE}), got {raw.dtype} {raw.shape}.")
    digest = hashlib.sha256(raw.tobytes()).hexdigest()[:12]
    pixels = torch.from_numpy(raw).float() / 255
    return Images(pixels, labels, f"{len(raw)} images from --data (SHA-256 {digest})", torch.arange(len(raw)))


def _faces() -> Images:
    """Enlarge the faces to 32 x 32 RGB; their mirror images only fill the gallery. Classes are arbitrary."""
    try:
        from skimage.data import lfw_subset
    except ImportError as error:
        raise SystemExit("scikit-image is missing: install it, or pass --data FILE.npz.") from error
    grey = torch.from_numpy(np.asarray(lfw_subset()[:_FACES], dtype=np.float32))[:, None]
    faces = torch.nn.functional.interpolate(grey, (SIDE, SIDE), mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1)
    labels = torch.arange(_FACES) % CLASSES
    return Images(
        torch.cat([faces, faces.flip(-1)]).contiguous(),
        torch.cat([labels, labels]),
        f"{_FACES} LFW faces of scikit-image, enlarged to 32 x 32, and their mirror images",
        torch.arange(_FACES),
    )


def check_device(name: str, threads: int | None) -> torch.device:
    """Return the device, or end with a clear line when it is not there."""
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here.")
    return device


def synchronise(device: torch.device) -> None:
    """Wait for the device's work, so that a clock read afterwards has seen it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine without naming it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Versions of the packages that decide the figures; this one's own comes from the source tree."""
    import lightning_gradaudit

    found = {"lightning-gradaudit": lightning_gradaudit.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def settings_of(args: argparse.Namespace, images: Images) -> dict[str, Any]:
    """Return the options as plain JSON, without any path."""
    kept = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    return kept | {"images_from": images.description}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write figures as strict JSON; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table: the first column to the left, figures to the right."""
    widths = [max(len(str(row[i])) for row in [headers, *rows]) for i in range(len(headers))]
    for row in [headers, ["-" * width for width in widths], *rows]:
        cells = [
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)


def judge(failures: Sequence[str], checked: int) -> int:
    """Print the verdict on the thresholds and return the exit status."""
    for failure in failures:
        print(f"FAILED: {failure}")
    if not failures:
        print(f"passed: {checked} threshold(s) checked")
    return 1 if failures else 0
