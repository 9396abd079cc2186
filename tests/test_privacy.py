"""No pixel and no label of a training image is left behind by a default run: its bytes are searched for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from privacy_program import BATCH, secret

from lightning_gradaudit.errors import AuditLostError, described

PROGRAM = Path(__file__).with_name("privacy_program.py")
ROW = 8  # consecutive pixels, or labels, that are no accident
SHARED_MEMORY = Path("/dev/shm")


def _keys(rows: np.ndarray) -> np.ndarray:
    """Return every eight consecutive bytes of each row as one number."""
    windows = np.lib.stride_tricks.sliding_window_view(rows, ROW, axis=-1)
    return np.ascontiguousarray(windows).reshape(-1, ROW).view(np.uint64).ravel()


def _wanted() -> np.ndarray:
    images, labels = secret()
    batches = labels.numpy().astype(np.uint8).reshape(-1, BATCH)
    return np.concatenate([_keys(images.numpy()), _keys(batches), _keys(np.sort(batches))])


WANTED = _wanted()


def _as_bytes(values: np.ndarray) -> np.ndarray:
    """Return pixels in [0, 1] as bytes; what is none becomes 0, which no secret holds eight of."""
    with np.errstate(all="ignore"):
        scaled = values.astype(np.float64) * 255
        near = (np.abs(scaled - np.round(scaled)) < 0.2) & (scaled > -0.5) & (scaled < 255.5)
        return np.where(near, np.round(scaled), 0).astype(np.uint8)


def _as_small(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.where((values >= 0) & (values < 256), values, 0).astype(np.uint8)


def _readings(data: bytes) -> Iterator[np.ndarray]:
    """Read a file in every way in which it may hold pixels or labels one after the other."""
    yield np.frombuffer(data, np.uint8)
    for kind in (np.float16, np.float32, np.float64, np.int32, np.int64):
        size = np.dtype(kind).itemsize
        for start in range(size):
            part = data[start:]
            values = np.frombuffer(part, kind, count=len(part) // size)
            yield _as_bytes(values) if np.issubdtype(kind, np.floating) else _as_small(values)
    numbers = np.array([float(each) for each in re.findall(rb"\d+(?:\.\d*)?(?:e[+-]?\d+)?", data)])
    yield from (_as_bytes(numbers), _as_small(numbers))


def _pixels(path: Path) -> Iterator[np.ndarray]:
    """Read a picture, which may be enlarged."""
    picture = np.array(Image.open(path).convert("RGB"))[..., 0]
    for scale in (1, 2, 3):
        for start in range(scale):
            yield picture[:, start::scale].ravel()


def holds_secrets(data: bytes | Path) -> bool:
    """Tell whether eight consecutive pixels or labels of a training image can be read from bytes or a file."""
    pictures = _pixels(data) if isinstance(data, Path) and data.suffix == ".png" else ()
    content = data.read_bytes() if isinstance(data, Path) else data
    for reading in (*_readings(content), *pictures):
        if len(reading) >= ROW and np.isin(_keys(reading), WANTED).any():
            return True
    return False


def found_in(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files, "there must be something to search"
    return [str(path.relative_to(folder)) for path in files if holds_secrets(path)]


def _start(root: Path, *kinds: str) -> subprocess.Popen[bytes]:
    (root / "tmp").mkdir(parents=True)
    (root / "tmp" / "here").touch()
    environment = os.environ | {"TMPDIR": str(root / "tmp"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", PROGRAM, root, *kinds],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=root / "tmp",
    )


# The search itself


def test_the_search_finds_every_form():
    images, labels = secret()
    row, batch = images[3, 0, 5, 2:10], labels[:BATCH]
    pixels = row.float() / 255
    forms = [
        *(form.numpy().tobytes() for form in (row, pixels, pixels.double(), pixels.half(), batch, batch.int())),
        str(pixels).encode(),
        str([round(p, 3) for p in pixels.tolist()]).encode(),
        str(batch.tolist()).encode(),
        str(batch.sort().values.tolist()).encode(),
    ]
    assert all(holds_secrets(b"abc" + form) for form in forms)
    assert not any(holds_secrets(form) for form in (bytes(4096), os.urandom(1 << 18), repr(labels.shape).encode()))


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("bad input tensor([[0.1, 0.25],\n [1e-3, .5]]) here", "bad input tensor([[…]]) here"),
        ("labels [3, 1, 2, 0, 1, 4, 9]", "labels […]"),
        ("weight of size [6, 1, 3, 3], got (4, 3, 12, 12)", "weight of size [6, 1, 3, 3], got (4, 3, 12, 12)"),
        ("index 7 is out of bounds for 3", "index 7 is out of bounds for 3"),
    ],
)
def test_what_is_said_of_an_error_holds_no_tensor(message, shown):
    assert described(ValueError(message)) == f"ValueError: {shown}"
    assert described(AuditLostError(message)) == shown
    assert len(described(ValueError("word " * 1000))) < 400


# Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs that end by themselves, and all that they printed, by kind."""
    root = tmp_path_factory.mktemp("runs")
    with _start(root, "normal", "failed", "strict", "refused", "logged", "saved") as program:
        printed, _ = program.communicate(timeout=500)
    assert program.returncode == 0, printed.decode()[-3000:]
    for part in printed.split(b"BEGIN ")[1:]:
        kind, _, text = part.partition(b"\n")
        (root / kind.decode() / "printed.log").write_bytes(text)
    return root


def _printed(runs: Path, kind: str) -> str:
    return (runs / kind / "printed.log").read_text()


def test_a_run_that_ends_well_leaves_no_image_and_no_label(runs):
    assert "normal 2 0" in _printed(runs, "normal"), "both audits were made"
    assert found_in(runs / "normal") == []


def test_a_run_whose_attack_breaks_leaves_none(runs):
    assert re.search(r"^failed \d [1-9]", _printed(runs, "failed"), re.MULTILINE)
    assert found_in(runs / "failed") == []
    assert "no idea what to do with" in _printed(runs, "strict")
    assert found_in(runs / "strict") == []


def test_a_module_that_prints_its_input_as_it_breaks_leaves_none(runs):
    assert re.search(r"^refused 0 [1-9]", _printed(runs, "refused"), re.MULTILINE)
    assert found_in(runs / "refused") == []


def test_nothing_is_left_in_temporary_folders(runs):
    assert found_in(runs / "tmp") == []


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_nothing_is_left_in_shared_memory(runs):
    printed = "".join(log.read_text() for log in runs.glob("*/printed.log"))
    made = re.findall("^WRITTEN IN (.+)$", printed, re.MULTILINE)
    assert len(made) == 5, "each run with audits had a folder"
    assert not any(Path(path).exists() for path in made)


def test_the_search_finds_what_was_asked_for(runs):
    assert any(name.endswith(".png") for name in found_in(runs / "logged"))
    assert found_in(runs / "saved") == ["snapshot.pt"]


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_a_killed_run_leaves_none_once_its_worker_has_noticed(tmp_path):
    with _start(tmp_path, "killed") as program:
        try:
            lines = iter(program.stdout.readline, b"")
            printed = []
            folder = next(
                Path(line.split()[-1].decode()) for line in lines if printed.append(line) or b"WRITTEN" in line
            )
            assert found_in(folder), "the snapshot lies there while it is audited"
        finally:
            program.kill()
        printed.append(program.stdout.read())
    deadline = time.monotonic() + 60
    while folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "printed.log").write_bytes(b"".join(printed))
    assert found_in(tmp_path) == []
