"""Forged and damaged evidence: none passes, none ends in a traceback, and nothing outside is read or written.

Two kinds of forger. The first changes files and knows nothing of the format: the digests show every change. The second
computes the digests anew: only what no audit can have measured shows. What a digest cannot show, and only a signature
by the run itself could (so that none of it is asked here):

- values within their ranges under digests that were computed anew: a lower exposure, a later step, other image digests,
  more records, no faults, an engine check that passed, fewer losses;
- a stamp or sidecar made up as a whole for weights that were never audited;
- a log cut off after an earlier "step" line, or whole sessions that were removed or moved: what is left is what the log
  of a shorter run looks like;
- the line that begins a session, twice: it looks like a session that ended at once, and was resumed;
- a stamp or sidecar that says BLOCK, removed beside another that passes;
- what else a checkpoint holds besides its weights and step, which the stamp does not cover: optimizer moments (made of
  gradients), hyperparameters, callbacks' states, bytes around the archive;
- a hard link inside a run folder to a picture outside of it.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Classifier, loader, record, trainer
from torchvision.utils import save_image

from lightning_gradaudit import AuditSettings, GradAudit, RiskGate, RiskGatedCheckpoint, Status
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.cli.main import main
from lightning_gradaudit.report.html import write_markdown, write_report
from lightning_gradaudit.report.run import load_run
from lightning_gradaudit.risk.checks import Losses
from lightning_gradaudit.risk.history import RECORDS_FILE, SIDECAR_SUFFIX, AuditHistory
from lightning_gradaudit.risk.release import judge
from lightning_gradaudit.risk.run_log import RunLog
from lightning_gradaudit.utils.digests import weights_digest

GATE = RiskGate(0.3)
AUDITS = 40
HUGE = 10**30
ABSENT, TWICE = object(), object()
WRONG = {
    "NaN": math.nan, "infinity": math.inf, "-5": -5, "1e9": 1e9, "text": "false", "null": None, "list": [],
    "object": {}, "huge": HUGE, "true": True, "empty text": "", "nested": [[{"a": [1]}]],
}  # fmt: skip
Path_ = tuple[Any, ...]
Write = Callable[[Path], Path]
Forgeries = Iterator[tuple[str, Write]]


def audits(count: int = AUDITS, session: str = "s", **changes: Any) -> list[Any]:
    """Clean audits of one image each, with every optional field that a record can have."""
    return [
        record(
            0, (0.1,), rank=i, digests=(f"{session}, image {i}",), session=session, ceiling=torch.tensor([0.5]),
            effort=torch.tensor([50.0]), effort_exposure=0.5, confirmed=torch.tensor([0.0]), confirmed_chance=0.1,
            features={"net.5": 0.2}, noise=0.5, declared_noise=0.5, reason="none", **changes,
        )
        for i in range(count)
    ]  # fmt: skip


CLEAN = audits()
LEAKY = [*CLEAN[1:], replace(CLEAN[0], exposure=torch.tensor([0.9]))]
ENGINE = EngineCheck(passed=True, psnr={"attack": 40.0})


class Earned(GradAudit):
    """An audit that is given its records."""

    def __init__(self, records: list[Any], path: Path) -> None:
        super().__init__(
            schedule=lambda step: False, executor="inline", settings=AuditSettings(analysis=False), dirpath=path
        )
        self.given = records

    def on_train_epoch_start(self, trainer, pl_module):
        self.evidence.records, self.evidence.engine = list(self.given), ENGINE


def fitted(path: Path, records: list[Any], seed: int = 0, **options: Any) -> Path:
    """Train, and return the checkpoint that the gate wrote, released or quarantined."""
    torch.manual_seed(seed)
    gate = RiskGatedCheckpoint(dirpath=path, filename="model", wait=0.0, policy="quarantine", **options)
    trainer(Earned(records, path / "audit"), gate).fit(Classifier(), loader(8))
    (found,) = path.rglob("*.ckpt")
    return found


def write_log(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    (path / RECORDS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def session(
    path: Path, run: str, records: list[Any], *, known: AuditHistory | None = None, step: int | None = 100
) -> None:
    """Write one session of a run as the callback does."""
    folder = RunLog(path)
    folder.create()
    folder.begin(AuditHistory(run=run, settings={"attack": "Auto()"}) if known is None else known)
    folder.append("engine", ENGINE.to_dict())
    for each in records:
        folder.append("record", each.to_dict() | {"lag_steps": 3.0})
    if step is not None:
        folder.append("step", {"step": step, "lost": Losses().to_dict()})


@dataclass(frozen=True)
class Honest:
    """What passes as it is, to be forged."""

    checkpoint: Path
    other: Path
    leaky: Path
    weights: Path
    folder: Path

    def stamp(self) -> dict[str, Any]:
        return json.loads(self.sidecar.read_text())

    @property
    def sidecar(self) -> Path:
        return Path(f"{self.weights}{SIDECAR_SUFFIX}")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / RECORDS_FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Honest:
    path = tmp_path_factory.mktemp("honest")
    session(path / "run", "a run", CLEAN)
    return Honest(
        fitted(path / "full", CLEAN),
        fitted(path / "other", audits(session="t"), seed=1),
        fitted(path / "leaky", LEAKY, seed=2),
        fitted(path / "weights", CLEAN, seed=3, save_weights_only=True),
        path / "run",
    )


# How the first kind of forger changes a value


def places(values: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Yield the place of every value; of the records, a field of each in turn, so that every field is met once."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        yield (*path, key)
        if key == "records":
            yield from ((*path, key, i % len(value), name) for i, name in enumerate(value[0]))
        else:
            yield from places(value, (*path, key))


def at(values: Any, path: Path_) -> Any:
    for key in path:
        values = values[key]
    return values


def changed(values: Any, path: Path_, new: Any) -> Any:
    """Return a copy with one value changed, removed (`ABSENT`) or, in a list, there twice (`TWICE`)."""
    values = copy.copy(values)
    if len(path) > 1:
        values[path[0]] = changed(values[path[0]], path[1:], new)
    elif new is ABSENT:
        del values[path[0]]
    elif new is TWICE:
        values.insert(path[0], values[path[0]])
    else:
        values[path[0]] = new
    return values


def other_than(value: Any) -> Any:
    """Return what could stand there as well."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if isinstance(value, int) else 0.9 * value + 1e-3
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    if isinstance(value, dict):
        return value | {"more": 1}
    return [*value, 0.0] if isinstance(value, list) else 0.5


_TURN = itertools.cycle(WRONG)


def wrongs(values: Any, path: Path_, count: int) -> Iterator[tuple[str, Any]]:
    """Yield changed copies, each with its name; of the wrong values so many, in turn."""
    chosen = list(itertools.islice(_TURN, count))
    old, name = at(values, path), ".".join(map(str, path))
    for said, new in [*((said, WRONG[said]) for said in chosen), ("another", other_than(old))]:
        if json.dumps(new) != json.dumps(old):
            yield f"{name} = {said}", changed(values, path, new)
    yield f"{name} removed", changed(values, path, ABSENT)
    if isinstance(path[-1], int):
        yield f"{name} twice", changed(values, path, TWICE)


def anew(stamp: dict[str, Any]) -> dict[str, Any]:
    """Return a stamp whose digest was computed again, whatever is in it."""
    rest = {key: value for key, value in stamp.items() if key not in ("digest", "file")}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return stamp | {"digest": hashlib.sha256(text.encode()).hexdigest()}


def relinked(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a log whose chain was computed again."""
    chain, new = "", []
    for line in lines:
        rest = {key: value for key, value in line.items() if key != "chain"}
        chain = "" if line["kind"] == "run" else chain
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        chain = hashlib.sha256(f"{chain}{hashlib.sha256(text.encode()).hexdigest()}".encode()).hexdigest()
        new.append(rest | {"chain": chain})
    return new


# Who writes what


def beside(honest: Honest, stamp: Any) -> Write:
    """Write the weights-only file with this sidecar: JSON values, or bytes."""

    def write(folder: Path) -> Path:
        path = folder / "weights.ckpt"
        os.link(honest.weights, path)
        content = stamp if isinstance(stamp, bytes) else json.dumps(stamp).encode()
        Path(f"{path}{SIDECAR_SUFFIX}").write_bytes(content)
        return path

    return write


def saved(checkpoint: Any, sidecar: Any = None) -> Write:
    """Write a checkpoint: values, or bytes."""

    def write(folder: Path) -> Path:
        path = folder / "model.ckpt"
        path.write_bytes(checkpoint) if isinstance(checkpoint, bytes) else torch.save(checkpoint, path)
        if sidecar is not None:
            stamp = sidecar(path) if callable(sidecar) else sidecar
            Path(f"{path}{SIDECAR_SUFFIX}").write_text(json.dumps(stamp))
        return path

    return write


def logged(lines: list[dict[str, Any]] | bytes) -> Write:
    def write(folder: Path) -> Path:
        if not isinstance(lines, bytes):
            return write_log(folder / "run", lines)
        (folder / "run").mkdir()
        (folder / "run" / RECORDS_FILE).write_bytes(lines)
        return folder / "run"

    return write


def forged_sidecars(honest: Honest) -> Forgeries:
    stamp = honest.stamp()
    for path in places(stamp):
        for name, forged in wrongs(stamp, path, 3):
            yield name, beside(honest, forged)
    records = stamp["evidence"]["records"]
    for i in range(len(records)):
        lower = changed(stamp, ("evidence", "records", i, "exposure"), [0.0])
        yield f"record {i} lowered", beside(honest, lower)
        yield f"record {i} removed", beside(honest, changed(stamp, ("evidence", "records", i), ABSENT))
        yield f"record {i} twice", beside(honest, changed(stamp, ("evidence", "records", i), TWICE))
        moved = records[:i] + records[i + 1 :] + [records[i]]
        if moved != records:
            yield f"record {i} moved", beside(honest, changed(stamp, ("evidence", "records"), moved))
    yield "records 200 times", beside(honest, changed(stamp, ("evidence", "records"), records * 200))
    yield "one record 200 times", beside(honest, changed(stamp, ("evidence", "records"), records[:1] * 200))


def forged_stamps(honest: Honest) -> Forgeries:
    checkpoint = torch.load(honest.checkpoint, weights_only=True)
    small = {key: checkpoint[key] for key in ("state_dict", "global_step", "gradaudit")}
    for path in places(small["gradaudit"]):
        for name, forged in wrongs(small["gradaudit"], path, 1):
            yield name, saved(small | {"gradaudit": forged})
    for name, value in WRONG.items():
        if name != "huge":
            yield f"the whole stamp = {name}", saved(small | {"gradaudit": value})
            yield f"step = {name}", saved(small | {"global_step": value})
            yield f"weights = {name}", saved(small | {"state_dict": value})


def forged_weights(honest: Honest) -> Forgeries:
    checkpoint = torch.load(honest.checkpoint, weights_only=True)
    state = checkpoint["state_dict"]
    weight, bias = "net.5.weight", "net.5.bias"
    bits = state[weight].clone()
    bits.view(torch.uint8)[0, 0] ^= 1
    two = [name for name, each in state.items() if each.shape == (6,)][:2]
    deep: Any = []
    for _ in range(150):
        deep = [deep]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    forged: dict[str, Any] = {
        "one bit": {weight: bits},
        "another shape": {weight: state[weight].reshape(-1)},
        "transposed": {weight: state[weight].T},
        "another dtype": {weight: state[weight].half()},
        "the same bytes as integers": {weight: state[weight].view(torch.int32)},
        "two exchanged": {two[0]: state[two[1]], two[1]: state[two[0]]},
        "one more": {"net.9.weight": torch.ones(1)},
        "sparse": {weight: state[weight].to_sparse()},
        "without bytes": {weight: torch.empty(3, 3, device="meta")},
        "conjugated": {weight: torch.ones(3, dtype=torch.complex64).conj()},
        "negated": {weight: torch._neg_view(torch.ones(3))},
        "expanded": {weight: torch.zeros(1).expand(2**24)},
        "more than a file can hold": {weight: torch.zeros(1).expand(2**40)},
        "nested": {weight: nested},
        "no tensor": {weight: 5},
        "deep": {weight: deep},
        "half a character": {"net.\ud800": torch.ones(1)},
        "a number as a name": {7: torch.ones(1)},
    }
    for name, new in forged.items():
        yield name, saved(checkpoint | {"state_dict": state | new})
    for name in state:
        yield f"{name} removed", saved(checkpoint | {"state_dict": {k: v for k, v in state.items() if k != name}})
        other = {(k if k != name else f"{k}_"): v for k, v in state.items()}
        yield f"{name} renamed", saved(checkpoint | {"state_dict": other})
        new = state[name] + 1
        yield f"{name} changed", saved(checkpoint | {"state_dict": state | {name: new}})
    swapped = state | {weight: state[bias], bias: state[weight]}
    yield "weight and bias exchanged", saved(checkpoint | {"state_dict": swapped})
    step = checkpoint["global_step"]
    steps = [step + 1, step + 4000, 0, -step, float(step), str(step), torch.tensor(step), torch.zeros(2), [step], HUGE]
    for new in steps:
        yield f"step {new!r}", saved(checkpoint | {"global_step": new})
    other = torch.load(honest.other, weights_only=True)
    leaky = torch.load(honest.leaky, weights_only=True)
    for (name, of), (by, stamped) in itertools.permutations([("a", checkpoint), ("b", other), ("c", leaky)], 2):
        if stamped is not leaky:
            yield f"the stamp of {by} in {name}", saved(of | {"gradaudit": stamped["gradaudit"]})
    nameless = changed(checkpoint["gradaudit"], ("evidence", "run"), "")
    for name, stamp in (("without a run", nameless), ("without a run, digest anew", anew(nameless))):
        yield f"other weights, stamp {name}", saved(other | {"gradaudit": stamp})
    old = changed(checkpoint["gradaudit"], ("evidence", "version"), 1)
    yield "a stamp that says it is of version 1", saved(checkpoint | {"gradaudit": old})
    unbound = anew(checkpoint["gradaudit"] | {"weights": None})
    yield "bound to no weights, digest anew", saved(checkpoint | {"gradaudit": unbound})


def forged_pairs(honest: Honest) -> Forgeries:
    """Files and sidecars that do not belong together."""
    sidecar = honest.stamp()
    stamp = torch.load(honest.checkpoint, weights_only=True)["gradaudit"]
    leaky = honest.leaky.read_bytes()
    weights_only = honest.weights.read_bytes()

    def fitting(stamp: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
        return lambda path: stamp | {"file": hashlib.sha256(path.read_bytes()).hexdigest()}

    yield "LEAK: a sidecar that passes beside a leak", saved(leaky, sidecar)
    yield "LEAK: a sidecar that passes and fits beside a leak", saved(leaky, fitting(sidecar))
    yield "LEAK: a checkpoint that leaks", saved(leaky)
    yield "another's stamp as sidecar", saved(honest.other.read_bytes(), stamp)
    yield "another's stamp as sidecar that fits", saved(honest.other.read_bytes(), fitting(stamp))
    yield "a stamp as sidecar of other weights only", saved(weights_only, fitting(stamp))
    yield "a sidecar beside another file", saved(honest.other.read_bytes(), sidecar)
    yield "weights only without a sidecar", saved(weights_only)
    for size in (0, 1, 100, 100_000):
        noise = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
        yield f"{size} random bytes", saved(bytes(noise.tolist()))
        yield f"{size} random bytes, sidecar", saved(bytes(noise.tolist()), sidecar)
        yield f"{size} random bytes, stamp as sidecar that fits", saved(bytes(noise.tolist()), fitting(stamp))

    def linked(target: Callable[[Path], Any]) -> Write:
        def write(folder: Path) -> Path:
            path = folder / "model.ckpt"
            target(path)
            return path

        return write

    yield "a link to nothing", linked(lambda path: path.symlink_to("nothing"))
    yield "a link to itself", linked(lambda path: path.symlink_to(path))
    yield "a pipe", linked(os.mkfifo)
    yield "an empty folder", linked(Path.mkdir)
    yield "a device", linked(lambda path: path.symlink_to("/dev/zero"))
    yield "a zero byte in the name", lambda folder: folder / "a\0b"
    yield "a name that is too long", lambda folder: folder / ("a" * 5000)
    yield "a sidecar of nothing", lambda folder: folder / f"model.ckpt{SIDECAR_SUFFIX}"

    def with_sidecar(make: Callable[[Path], Any]) -> Write:
        def write(folder: Path) -> Path:
            path = folder / "model.ckpt"
            os.link(honest.checkpoint, path)
            make(Path(f"{path}{SIDECAR_SUFFIX}"))
            return path

        return write

    yield "a sidecar that is a pipe", with_sidecar(os.mkfifo)
    yield "a sidecar that is a folder", with_sidecar(Path.mkdir)
    yield "a sidecar that is a link to nothing", with_sidecar(lambda path: path.symlink_to("nothing"))
    yield "a sidecar that is a link to a device", with_sidecar(lambda path: path.symlink_to("/dev/zero"))
    yield "an empty sidecar", with_sidecar(Path.touch)


def damaged(honest: Honest) -> Forgeries:
    """Files cut off, grown, nested, or of other bytes."""
    checkpoint, stamp = honest.checkpoint.read_bytes(), honest.sidecar.read_bytes()
    log = (honest.folder / RECORDS_FILE).read_bytes()
    for share in (0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
        for name, content, write in (
            ("checkpoint", checkpoint, saved),
            ("sidecar", stamp, lambda cut: beside(honest, cut)),
            ("log", log, logged),
        ):
            yield f"{name} cut at {share:.1%}", write(content[: int(share * len(content))])
            broken = bytearray(content)
            broken[int(share * len(content))] ^= 0x80
            if name != "checkpoint":  # which holds more than the stamp covers
                yield f"{name} with a bit turned at {share:.1%}, not UTF-8", write(bytes(broken))
        yield (
            f"checkpoint cut at {share:.1%}, sidecar",
            saved(checkpoint[: int(share * len(checkpoint))], json.loads(stamp)),
        )
    for name, write in (("sidecar", lambda content: beside(honest, content)), ("log", logged)):
        yield f"{name} of UTF-16", write(stamp.decode().encode("utf-16"))
        yield f"{name} in Latin-1", write('{"kind": "é"}\n'.encode("latin-1"))
        yield f"{name} of 100 000 brackets", write(b"[" * 100_000)
        yield f"{name} of 100 000 objects", write(b'{"a":' * 100_000)
        yield f"{name} of whole brackets", write(b'{"evidence":' + b"[" * 500 + b"]" * 500 + b"}")
        yield f"{name} of 5000 digits", write(b'{"version": ' + b"9" * 5000 + b"}")
        yield f"{name} of zero bytes", write(b"\0" * 1000)
        yield f"{name} of blank lines", write(b"\n\n\n")
        yield f"{name} that is empty", write(b"")
        yield f"{name} that is null", write(b"null\n")
        yield f"{name} that is a list", write(b"[1]\n")
        yield f"{name} that is a PNG", write(b"\x89PNG\r\n\x1a\n" + b"\0" * 64)
    deep: Any = []
    for _ in range(150):
        deep = [deep]
    small = torch.load(honest.checkpoint, weights_only=True)
    yield "a deep stamp", saved(small | {"gradaudit": small["gradaudit"] | {"gate": deep}})
    circle: list[Any] = []
    circle.append(circle)
    yield "a stamp that holds itself", saved(small | {"gradaudit": small["gradaudit"] | {"gate": circle}})

    def bomb(folder: Path) -> Path:
        path = folder / "model.ckpt"
        with zipfile.ZipFile(honest.checkpoint) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry) if "/data/" not in entry else b"\0" * 2**22)
        return path

    yield "a zip bomb", bomb


def forged_logs(honest: Honest) -> Forgeries:
    lines = honest.lines()
    kinds = {line["kind"]: number for number, line in reversed(list(enumerate(lines)))}
    for kind, number in kinds.items():
        for name, forged in (each for key in lines[number] for each in wrongs(lines[number], (key,), 2)):
            if kind != "record":
                yield f"{kind}: {name}", logged([*lines[:number], forged, *lines[number + 1 :]])
    for i, key in enumerate(lines[kinds["record"]]):  # every field of a record, each in another record
        number = kinds["record"] + i % AUDITS
        for name, forged in itertools.islice(wrongs(lines[number], (key,), 1), 1, None):
            yield f"record {i % AUDITS}: {name}", logged([*lines[:number], forged, *lines[number + 1 :]])
    for number in range(0, len(lines), 6):
        rest = lines[:number] + lines[number + 1 :]
        yield f"line {number} removed", logged(rest)
        if number:
            yield f"line {number} twice", logged([*lines[: number + 1], *lines[number:]])
        if rest != lines[:-1]:
            yield f"line {number} at the end", logged([*rest, lines[number]])
    yield "the last line removed", logged(lines[:-1])
    yield "the first record last", logged([*lines[:2], *lines[3:-1], lines[2], lines[-1]])
    yield "reversed", logged(lines[::-1])
    yield "records only", logged(lines[2:-1])
    yield "200 times", logged([lines[0], lines[1], *lines[2:-1] * 5, lines[-1]])
    yield "of version 1", logged([{k: v for k, v in line.items() if k not in ("chain", "run")} for line in lines])


def forged_runs(honest: Honest) -> Forgeries:
    """Folders used more than once."""

    def several(*parts: dict[str, Any]) -> Write:
        def write(folder: Path) -> Path:
            for part in parts:
                session(folder / "run", **part)
            return folder / "run"

        return write

    first: dict[str, Any] = {"run": "a", "records": CLEAN}
    half: dict[str, Any] = {"run": "a", "records": CLEAN[:20]}
    known = AuditHistory(run="a", records=list(CLEAN[:20]), engine=ENGINE)
    yield "a newer run that audited nothing", several(first, {"run": "b", "records": []})
    yield "a newer run that was killed at once", several(first, {"run": "b", "records": [], "step": None})
    yield "a newer run of few audits", several(first, {"run": "b", "records": audits(5, "b")})
    yield "killed, without a step", several(first | {"step": None})
    yield "LEAK: a newer run that leaks", several(first, {"run": "b", "records": LEAKY})
    yield "resumed, its audits written again", several(half, half)
    yield "resumed, its audits known and written again", several(half, half | {"known": known})
    yield "LEAK: resumed after a leak", several({"run": "a", "records": LEAKY}, half)
    yield "step before the audits", several({"run": "a", "records": [replace(each, step=500) for each in CLEAN]})
    yield "old audits", several(first | {"step": 5000})
    run_b = audits(20, "b")
    yield "two runs of twenty audits", several(half, {"run": "b", "records": run_b})

    def same_name(folder: Path) -> Path:
        """Put the sessions of two runs under one name: their images cannot be told apart."""
        session(folder / "run", "a", CLEAN[:20])
        session(folder / "run", "a", run_b)
        return folder / "run"

    yield "two runs under one name", same_name

    def two_logs(outer: list[Any], inner: list[Any]) -> Write:
        def write(folder: Path) -> Path:
            session(folder / "run", "outer", outer)
            session(folder / "run" / "gradaudit", "inner", inner)
            return folder / "run"

        return write

    yield "LEAK: a log that passes below one that leaks", two_logs(LEAKY, CLEAN)
    yield "LEAK: a log that leaks below one that passes", two_logs(CLEAN, LEAKY)
    yield "an empty log above one that passes", two_logs([], CLEAN)
    for name, make in (("pipe", os.mkfifo), ("folder", Path.mkdir), ("link", lambda path: path.symlink_to(path))):

        def odd(folder: Path, make: Callable[[Path], Any] = make) -> Path:
            (folder / "run").mkdir()
            make(folder / "run" / RECORDS_FILE)
            return folder / "run"

        yield f"a log that is a {name}", odd


# The second kind of forger

NUMBERS: dict[str, tuple[float, float]] = {
    "gallery": (0, math.inf), "chance_hits": (0, 100), "chance_trials": (1, math.inf), "label_accuracy": (0, 1),
    "matching_loss": (0, math.inf), "gradient_similarity": (-1, 1), "truth_similarity": (-1, 1),
    "self_test": (0, 1e-3), "self_test_tolerance": (1e-7, 0.05), "defence_gap": (0, math.inf),
    "evaluations": (0, math.inf), "seconds": (0, math.inf), "noise": (0, math.inf), "declared_noise": (0, math.inf),
    "rank": (0, math.inf), "step": (0, 100), "effort_exposure": (0, 1), "confirmed_chance": (0, 1),
}  # fmt: skip
IMAGES: dict[str, tuple[float, float]] = {
    "exposure": (0, 1), "psnr": (0, 200), "ssim": (-1, 1), "mse": (0, 1), "identified": (0, 1), "null": (0, 1),
    "exact_leaks": (0, 1), "copied": (0, 1), "ceiling": (0, 1), "effort": (0, math.inf), "confirmed": (0, 1),
}  # fmt: skip
TEXTS = ("attack", "outcome", "measure", "reason", "session")


def impossible() -> Iterator[tuple[str, Any]]:
    """Yield fields of a record and values that no audit can have measured."""
    kinds: tuple[Any, ...] = ("false", [], True)
    for name, (low, high) in NUMBERS.items():
        above = 2 * high
        yield from ((name, value) for value in (math.nan, HUGE, low - 5, *kinds))
        if high < math.inf:
            yield name, above
    for name, (low, high) in IMAGES.items():
        yield from ((name, value) for value in ("false", {}, 0.1, [], [0.1, 0.1], ["0.1"]))
        yield from ((name, [value]) for value in (math.nan, math.inf, low - 0.5, -5, HUGE))
        if high < math.inf:
            yield from ((name, [value]) for value in (high + 0.5, 1e9))
    yield from itertools.product(TEXTS, (None, 5, True, [], {}))
    yield from itertools.product(("threat_model", "features"), (None, 5, "local", [], True))
    yield from itertools.product(("digests",), ([], ["a", "b"], [5], [None], 5, True, {"a": 1, "b": 2}))
    yield from itertools.product(("ids",), (["a", "b"], [5], [None], 5, {"a": 1, "b": 2}))
    yield from itertools.product(("leakage",), (5, "x", [], {}, {"leak_r2": 5}, {"leak_r2": ["x"], "curve": []}))
    yield "outcome", "not_applicable"
    yield "outcome", "nonfinite"
    yield "outcome", "PASS"


def impossible_records(honest: Honest) -> Forgeries:
    """One record each that cannot be, under digests that fit; every 29 audits still count without it."""
    stamp = honest.stamp()
    for i, (name, value) in enumerate(impossible()):
        if name == "digests" and value == []:
            continue  # such an image counts for nothing, and the others suffice
        where = ("evidence", "records", i % AUDITS, name)
        yield f"record {i % AUDITS}: {name} = {str(value)[:40]}", beside(honest, anew(changed(stamp, where, value)))
    required = set(stamp["evidence"]["records"][0]) & (NUMBERS.keys() | IMAGES.keys() | {*TEXTS})
    optional = {
        "rank", "reason", "features", "ceiling", "leakage", "effort", "effort_exposure", "confirmed", "session",
        "confirmed_chance", "noise", "declared_noise",
    }  # fmt: skip
    for i, name in enumerate(sorted(required - optional)):
        where = ("evidence", "records", i % AUDITS, name)
        yield f"record {i % AUDITS}: {name} removed", beside(honest, anew(changed(stamp, where, ABSENT)))
    one = stamp["evidence"]["records"][:1]
    yield "one record 200 times", beside(honest, anew(changed(stamp, ("evidence", "records"), one * 200)))
    few = stamp["evidence"]["records"][:20]
    yield "20 records 10 times", beside(honest, anew(changed(stamp, ("evidence", "records"), few * 10)))
    lines = honest.lines()
    for i, (name, value) in enumerate(itertools.islice(impossible(), 0, None, 12)):
        number = 2 + i % AUDITS
        forged = changed(lines, (number, name), value)
        if value != []:
            yield f"line {number}: {name} = {str(value)[:40]}", logged(relinked(forged))


def impossible_evidence(honest: Honest) -> Forgeries:
    """Anything besides the records that cannot be, under digests that fit."""
    stamp = honest.stamp()
    kinds = (math.nan, math.inf, -5, "false", True, [], {}, HUGE, 1.5)
    forged: list[tuple[Path_, Any]] = [
        *((("evidence", "step"), value) for value in (*kinds, None, "", 10**9)),
        *((("evidence", "run"), value) for value in (None, 5, "", [], True, {})),
        *((("evidence", "version"), value) for value in (None, 0, 1, 3, 1.0, True, "2", [], {})),
        *((("version",), value) for value in (None, 0, 1, 3, True, "2", [], {})),
        *((("evidence", "engine"), value) for value in (None, 5, "passed", [], {}, True)),
        *((("evidence", "engine", "passed"), value) for value in ("false", 0, 1, None, [], False)),
        *((("evidence", "engine", "psnr"), value) for value in (None, {}, [], 40.0, "40", {"attack": 5.0})),
        *((("evidence", "engine", "psnr"), {"attack": value}) for value in (math.nan, -5, "40", None, True, [40.0])),
        *((("evidence", "lost", name), value) for name in ("dropped", "given_up", "thinned") for value in kinds),
        *((("evidence", "lost"), value) for value in (None, 5, [], "none")),
        *((("evidence", "lost", "given_up"), value) for value in (1, 10**9)),
        *((("evidence", "lost", "dropped"), value) for value in (1, 10**9)),
        *((("evidence", "faults"), value) for value in (None, 5, "x", [5], ["abc"], [[]], [[0]], [["0", "x"]])),
        *((("evidence", "faults"), [[0, "x", value]]) for value in ("false", 0, None, [])),
        *((("evidence", "faults"), [value]) for value in ([-1, "x"], [None, "x"], [0, 5], [0, "x"], [0, "x", True, 1])),
        *((("evidence", "records"), value) for value in (None, 5, "x", {}, [], [None], [5], ["x"], [[]], [{}])),
        *((("evidence", "settings"), value) for value in (None, 5, [], "x", {"a": 5}, {"a": None})),
        *((("evidence", "damage"), value) for value in (None, 5, "x", ["x"], [5])),
        *((("evidence",), value) for value in (None, 5, [], "x", {}, True)),
    ]
    runs = (
        [[0, 30, 10**13]],
        [[30, 0, 1]],
        [[0, 1]],
        [["0", 1, 1]],
        [[0, 1, -1]],
        [[0.0, 1.0, 1]],
        "abc",
        [5],
        5,
        [[]],
    )
    forged += [(("evidence", "lost"), {"dropped": 10**13 if run == runs[0] else 1, "runs": run}) for run in runs]
    for path, value in forged:
        yield f"{'.'.join(path)} = {str(value)[:40]}", beside(honest, anew(changed(stamp, path, value)))
    for name in ("run", "lost", "engine", "step", "version", "records"):
        yield f"{name} removed", beside(honest, anew(changed(stamp, ("evidence", name), ABSENT)))
    lines = honest.lines()
    last = len(lines) - 1
    for path, value in [
        *(((last, "step"), value) for value in (*kinds, None, "")),
        *(((last, "lost"), value) for value in (5, [], "x", {"dropped": -1}, {"runs": [[0, 9, 10**13]]}, None)),
        *(((1, "passed"), value) for value in ("false", 1, None, False)),
        *(((1, "psnr"), value) for value in (None, {}, 40.0, {"attack": math.inf}, {"attack": "40"}, {"attack": 1.0})),
        *(((0, "run"), value) for value in (None, 5, "", [], {})),
        *(((0, "settings"), value) for value in (None, 5, {"a": 5})),
        *(((0, "evidence"), value) for value in (5, "x", [], {}, {"version": 2})),
    ]:
        forged_line = changed(lines, path, value)
        yield f"line {path[0]}: {path[1]} = {str(value)[:40]}", logged(relinked(forged_line))


KINDS = {
    kind.__name__: kind
    for kind in (
        forged_sidecars, forged_stamps, forged_weights, forged_pairs, damaged, forged_logs, forged_runs,
        impossible_records, impossible_evidence,
    )
}  # fmt: skip


# What must hold


def tree(folder: Path) -> dict[str, Any]:
    """Return what lies in a folder, and of what bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        digest = hashlib.blake2b(content).digest()
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_mtime_ns, state.st_size, digest)
    return found


def by_command(path: Path) -> tuple[int, list[str]]:
    """Return the exit status of `gradaudit gate` and the lines it wrote."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = main(["gate", str(path), "--max-risk", "0.3"])
    return status, (said.getvalue() + complained.getvalue()).split("\n")[:-1]


def violations(name: str, path: Path, around: Path, *, command: bool) -> list[str]:
    """Judge a forgery and say what is wrong with the answer."""
    before, wanted = tree(around), Status.BLOCK if name.startswith("LEAK") else Status.UNKNOWN
    try:
        verdict, _ = judge(path, GATE)
        wrong = [] if verdict.status is wanted else [f"{verdict.status}, expected {wanted}: {verdict}"]
        if "could not be judged" in str(verdict):
            wrong.append(f"caught by the last resort only: {verdict}")
        if command and "\0" not in str(path):  # which no shell can pass
            status, lines = by_command(path)
            wrong += [] if status == wanted.exit_code else [f"exit status {status}, expected {wanted.exit_code}"]
            wrong += [] if len(lines) == 1 and lines[0].isprintable() else [f"not one line: {lines}"]
    except BaseException as error:
        wrong = [f"escaped: {type(error).__name__}: {str(error)[:200]}"]
    if tree(around) != before:
        wrong.append("a file was touched")
    return [f"{name}: {each[:300]}" for each in wrong]


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """An empty working folder, in which nothing may appear."""
    path = tmp_path / "nowhere"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def test_what_is_forged_below_passes_as_it_is(honest, nowhere, tmp_path):
    stamp = honest.stamp()
    anew_again = {"sidecar": beside(honest, anew(stamp)), "log": logged(relinked(honest.lines()))}
    for name, write in anew_again.items():
        (tmp_path / name).mkdir()
        assert judge(write(tmp_path / name), GATE)[0].status is Status.PASS, "the second forger knows the format"
    for path in (honest.checkpoint, honest.other, honest.weights, honest.sidecar, honest.folder):
        assert by_command(path)[0] == 0
    assert by_command(honest.leaky)[0] == 1
    assert not any(nowhere.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_no_forgery_passes_and_none_escapes(honest, nowhere, tmp_path, kind):
    wrong, count = [], 0
    for count, (name, write) in enumerate(KINDS[kind](honest), 1):
        folder = tmp_path / "forged"
        folder.mkdir()
        path = write(folder)
        wrong += violations(name, path, folder, command=count % 40 == 1 or "LEAK" in name)
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:60])
    assert not any(nowhere.iterdir()), "the working folder was written to"


def gaps_once(honest: Honest) -> Forgeries:
    """Yield what passed before records and JSON were checked to the last entry."""
    stamp, record_3 = honest.stamp(), ("evidence", "records", 3)
    for name, value in (("null_complete", "x"), ("null_complete", 5), ("features", {"a": "b"}), ("features", {"a": 7}),
                        ("ids", "a"), ("measure", "?")):  # fmt: skip
        yield f"{name} = {value}, digest anew", beside(honest, anew(changed(stamp, (*record_3, name), value)))
    text = json.dumps(stamp)
    yield "a key twice, the wrong value first", beside(honest, ('{"weights": "other", ' + text[1:]).encode())
    first, *rest = (honest.folder / RECORDS_FILE).read_bytes().split(b"\n")
    yield "a line's key twice", logged(b"\n".join([b'{"run": "another", ' + first[1:], *rest]))


GAPS = ("null_complete = x", "null_complete = 5", "features = {'a': 'b'}", "features = {'a': 7}", "ids = a",
        "measure = ?", "a key twice", "a line's key twice")  # fmt: skip


@pytest.mark.parametrize("gap", GAPS)
def test_what_once_passed_does_not(honest, nowhere, tmp_path, gap):
    (write,) = (write for name, write in gaps_once(honest) if name.startswith(gap))
    assert not violations(gap, write(tmp_path), tmp_path, command=False)


@pytest.mark.parametrize(
    ("audited", "forged"),
    [
        ({"x": {"scale": torch.zeros(2000)}}, {"x": {"scale": (torch.arange(2000) == 999).float()}}),
        ({"x": [torch.tensor(0.1)]}, {"x": [torch.tensor(0.10000001)]}),
        (
            {"a": torch.tensor([98, 99], dtype=torch.uint8), "b": torch.ones(1)},
            {"a|(2,)|torch.uint8\nbcb": torch.ones(1)},
        ),
    ],
    ids=["one of 2000 nested values", "the last digit of a nested value", "bytes as a name"],
)
def test_weights_that_differ_have_another_digest(audited, forged):
    assert weights_digest(audited) != weights_digest(forged)


def test_there_are_as_many_forgeries_as_promised(honest):
    counts = {kind: sum(1 for _ in make(honest)) for kind, make in KINDS.items()}
    assert sum(counts.values()) >= 500
    assert min(counts.values()) >= 15


def test_no_report_shows_what_lies_outside_of_the_run_folder(honest, nowhere, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    secret = outside / "secret.png"
    save_image(torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)), secret)
    (outside / "secret.txt").write_text("SENTINEL " * 9)
    pairs = [
        str(secret), "../outside/secret.png", "images/../../outside/secret.png", "link.png", "linked/secret.png",
        "hop.png", str(outside / "secret.txt"), "../outside/secret.txt", "text.png", "linked/../secret.png",
        f"file://{secret}", str(outside), "/etc/passwd", "../../../../../../../etc/passwd", "/dev/zero", "pipe.png",
        "a\0b", "", ".", "..", "x" * 5000,
    ]  # fmt: skip
    shown = [path.read_bytes() for path in (secret, outside / "secret.txt", Path("/etc/passwd"))]
    for start in range(0, len(pairs), 6):  # the report shows six at most
        path = folder / str(start)
        path.mkdir(parents=True)
        (path / "images").mkdir()
        (path / "link.png").symlink_to(secret)
        (path / "hop.png").symlink_to("link.png")
        (path / "text.png").symlink_to(outside / "secret.txt")
        (path / "linked").symlink_to(outside)
        os.mkfifo(path / "pipe.png")
        log = RunLog(path)
        log.begin(AuditHistory(run="a"))
        for each, pair in zip(CLEAN, pairs[start : start + 6], strict=False):
            log.append("record", each.to_dict() | {"pairs": pair})
        before = tree(tmp_path)
        run = load_run(path)
        pages = [write_report([run], nowhere / "report.html"), write_markdown([run], nowhere / "report.md")]
        assert tree(tmp_path).items() - before.items() <= {
            (name, state) for name, state in tree(tmp_path).items() if name.startswith("nowhere")
        }
        for page in pages:
            text = page.read_text()
            assert '<img src="data:' not in text  # Plotly's script holds others
            assert not any(hidden_in(content, text) for content in shown)


def hidden_in(content: bytes, text: str) -> bool:
    """Tell whether a part of a file stands in a text, as it is or in base 64."""
    parts = {content[-60:], content[:60]} - {b""}
    coded = {base64.b64encode(content[start:])[:60].decode() for start in range(3)}
    plain = {part.decode("utf-8", "ignore") for part in parts if part.isascii()}
    return any(each and each in text for each in coded | plain)
