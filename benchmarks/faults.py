"""Inject faults into audited fits and see that training does not notice.

A small network is trained by a real `Trainer.fit`, with and without `GradAudit`, from the same seed. The audits run in
a worker process and each of them meets a fault; training waits for every audit, so that as many faults are injected
as are counted.

Kinds:
  none        the control: no fault.
  raise       the attack raises an Exception.
  sys.exit    the attack raises SystemExit.
  interrupt   the attack raises KeyboardInterrupt.
  os._exit    the attack ends its worker.
  kill        the worker is killed (SIGKILL) in the attack.
  terminate   the worker gets SIGTERM in the attack.
  hang        the attack never ends; the audit is given up at the end of training.
  disk        the disk of the run folder is full (a write to /dev/full).
  memory      shared memory is full: snapshots travel as pickles.
  logger      the user's logger raises at every row of the audit.
  slow logger the user's logger blocks for a while at every row of the audit.
  sigterm     the trainer gets SIGTERM while an attack hangs.

What must hold, per fit:
  training    weights, optimizer state and the user's logged rows are bit-equal to those of the fit without audits; it
              ends in the same way: with the same error, if any.
  counters    due = submitted + dropped, submitted = completed + failed + given up, one record for each completed audit
              and a fault for each failed one. With a full disk a finished audit also costs a fault: it was not written.
  verdict     never PASS. Beyond that, `with evidence` asks what the gate would say if 40 clean audits stood beside the
              faults: UNKNOWN. A logger that fails, and a snapshot that travels as a pickle, say nothing about audits:
              there it is PASS as without any fault.

A logger is called on the thread of training, as Lightning's own calls are. One that raises never reaches training. One
that blocks makes training wait as long as it blocks, for the audit's rows as for the user's own; one that blocks for
ever stops training, with the audit's rows perhaps earlier than without. Loggers that send over a network do it in
threads of their own.

Exit status 1: a line does not hold.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import (
    AuditSettings,
    Budget,
    GradAudit,
    Limits,
    Outcome,
    RiskGate,
    Snapshot,
    Status,
    audit_snapshot,
)
from lightning_gradaudit.attacks import Attack
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.audit import EngineCheck
from lightning_gradaudit.execution import executors
from lightning_gradaudit.execution.executors import ProcessExecutor
from lightning_gradaudit.risk.run_log import RunLog

BATCH, SIDE, CLASSES, STEPS = 4, 12, 3, 10
PATIENCE = 120.0  # seconds to wait for one audit
BLOCKED = 0.1
HURTS_NO_AUDIT = ("none", "memory", "logger", "slow logger")
LOSES_WORKER = ("os._exit", "kill", "terminate")
ONE_A_FIT = ("hang", "sigterm")
KINDS = (*HURTS_NO_AUDIT, "raise", "sys.exit", "interrupt", "disk", *LOSES_WORKER, *ONE_A_FIT)


@dataclass(frozen=True, kw_only=True)
class Meets(Attack):
    """Return mid-grey, unless a fault is met; the engine check meets none."""

    fault: str
    begun: str = ""

    def run(self, observation, *, budget, generator):
        if observation.shape[-1] == SIDE:
            self._meet()
        grey = torch.full(observation.shape, 0.5)
        return Reconstruction(inputs=grey, labels=None, matching_loss=1.0, evaluations=1, outcome=Outcome.BUDGET_SPENT)

    def _meet(self) -> None:
        if self.fault == "raise":
            raise ValueError("a fault")
        if self.fault == "sys.exit":
            sys.exit(3)
        if self.fault == "interrupt":
            raise KeyboardInterrupt
        if self.fault == "os._exit":
            os._exit(3)
        if self.fault in {"kill", "terminate"}:
            os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGTERM)
        if self.fault in ONE_A_FIT:
            Path(self.begun).touch()
            time.sleep(10 * PATIENCE)


class Network(pl.LightningModule):
    """A small network that logs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(100, 200),  # large enough to travel by shared memory
            nn.ReLU(),
            nn.Linear(200, CLASSES),
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Rows(DummyLogger):
    """Keep the user's rows; fail or block at those of the audit."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.kept, self.met = fault, [], 0

    def log_metrics(self, metrics, step=None):
        if not any(key.startswith("gradaudit/") for key in metrics):
            self.kept.append((step, dict(metrics)))
            return
        self.met += 1
        if self.fault == "logger":
            raise OSError("a fault")
        if self.fault == "slow logger":
            time.sleep(BLOCKED)


class Watched(GradAudit):
    """The callback, with its queue still to be seen after the fit."""

    def _make_auditor(self):
        self.queue = super()._make_auditor()
        return self.queue


class Waits(pl.Callback):
    """Let every audit end, or hang, before training goes on; fill the disk, and send SIGTERM, on the way."""

    def __init__(self, fault: str, audit: Watched | None) -> None:
        self.fault, self.audit = fault, audit

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0 and self.fault == "disk" and self.audit is not None:
            log = RunLog(self.audit.dirpath).records_path
            log.unlink()
            log.symlink_to("/dev/full")
        if batch_idx == STEPS // 2 and self.fault == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while self.audit is not None and not self._met() and time.monotonic() < deadline:
            time.sleep(0.005)

    def _met(self) -> bool:
        """Tell whether the audit that waits has met its fault."""
        if self.fault in ONE_A_FIT:
            return Path(self.audit.settings.attack.begun).exists()
        return not any(audit.running for audit in self.audit.queue._ladder.audits)


def train(fault: str, audit: Watched | None) -> tuple[list[object], Rows]:
    """Return all that training came to, and its logger."""
    torch.manual_seed(0)
    images = torch.rand(STEPS * BATCH, 1, SIDE, SIDE)
    data = DataLoader(TensorDataset(images, torch.arange(len(images)) % CLASSES), batch_size=BATCH, shuffle=True)
    module, logger = Network(), Rows(fault)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([audit] if audit else []), Waits(fault, audit)],
    )
    error = ""
    try:
        trainer.fit(module, data)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    state = [*module.state_dict().values(), *_tensors(trainer.optimizers[0].state_dict())]
    return [error, trainer.global_step, logger.kept, torch.get_rng_state(), *state], logger


def _tensors(values: object) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


def equal(first: list[object], second: list[object]) -> bool:
    """Tell whether two trainings came to the same, bit by bit."""
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True)
    )


def clean_records(count: int = 40) -> list:
    """Records of audits that found nothing, each of another image."""
    images, labels = torch.rand(1, 1, SIDE, SIDE), torch.tensor([0])
    snapshot = Snapshot.from_batch(Network().eval(), (images, labels), loss=functional.cross_entropy)
    record = audit_snapshot(snapshot, attack=Meets(fault="none"), closed_forms=False)
    nothing, no = torch.zeros(1), torch.tensor([False])
    changes = {
        "exposure": nothing, "identified": nothing, "exact_leaks": no, "copied": no, "gallery": 128,
        "chance_hits": 0.0, "chance_trials": 64, "null_complete": True, "label_accuracy": 1.0,
        "gradient_similarity": 1.0, "truth_similarity": 1.0,
    }  # fmt: skip
    return [replace(record.without_images(), step=i, digests=(f"{i:024x}",), **changes) for i in range(count)]


@dataclass
class Line:
    """What was seen of one kind of fault."""

    kind: str
    fits: int = 0
    faults: int = 0
    submitted: int = 0
    completed: int = 0
    failed: int = 0
    given_up: int = 0
    dropped: int = 0
    bit_equal: bool = True
    adds_up: bool = True
    verdict: str = ""
    with_evidence: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether everything is as it must be."""
        expected = "PASS" if self.kind in HURTS_NO_AUDIT else "UNKNOWN"
        return self.bit_equal and self.adds_up and "PASS" not in self.verdict and self.with_evidence == expected


@contextmanager
def surroundings(kind: str) -> Iterator[mock.Mock]:
    """Fill shared memory, where that is the fault; the mock counts how often that was noticed."""
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch.object(executors, "SharedMemoryFile", full) if kind == "memory" else nullcontext():
        yield full


def fit_with(line: Line, shared: Callable[[], ProcessExecutor], reference: list[object], records: list) -> None:
    """Train once with audits that meet a fault, and add what was seen to its line."""
    kind, own = line.kind, line.kind in {*LOSES_WORKER, *ONE_A_FIT, "memory"}
    with tempfile.TemporaryDirectory(prefix="gradaudit-faults-") as folder, surroundings(kind) as full:
        audit = Watched(
            attack=Meets(fault=kind, begun=f"{folder}/begun"),
            every_n_steps=1,
            budget=Budget(evaluations=1),
            executor="process" if own else shared(),
            limits=Limits(queue_size=1, final_wait_seconds=0.2 if kind in ONE_A_FIT else PATIENCE),
            settings=AuditSettings(analysis=False, confirm=0),
            dirpath=folder,
        )
        found, logger = train(kind, audit)
    queue, evidence = audit.queue, audit.evidence
    given_up = evidence.lost.given_up
    line.fits += 1
    met = {"memory": full.call_count, "logger": logger.met, "slow logger": logger.met}
    line.faults += met.get(kind, queue.submitted)
    line.submitted += queue.submitted
    line.completed += queue.completed
    line.failed += queue.failed
    line.given_up += given_up
    line.dropped += evidence.dropped
    line.bit_equal &= equal(found, reference)
    due = STEPS if kind != "sigterm" else STEPS // 2 + 1
    line.adds_up &= queue.submitted + evidence.dropped == due
    line.adds_up &= queue.submitted == queue.completed + queue.failed + given_up
    line.adds_up &= len(evidence.records) == queue.completed and len(evidence.faults) >= queue.failed
    line.verdict = _also(line.verdict, audit.verdict())
    evidence.records, evidence.engine, evidence.step = list(records), EngineCheck(True, {"attack": 40.0}), len(records)
    line.with_evidence = _also(line.with_evidence, evidence.verdict(RiskGate()))


def _also(said: str, verdict) -> str:
    status = verdict.status if isinstance(verdict.status, str) else Status(verdict.status).value
    return " ".join(sorted({*said.split(), str(status)}))


def run(kinds: tuple[str, ...], faults: int) -> list[Line]:
    """Inject about so many faults, as many of each kind, and at least one."""
    lines, records, made = [Line(kind) for kind in kinds], clean_records(), []

    def shared() -> ProcessExecutor:
        if not made:
            made.append(ProcessExecutor(threads=1))
        return made[0]

    each = max(1, -(-faults // max(1, sum(kind != "none" for kind in kinds))))
    try:
        for line in lines:
            reference, _ = train(line.kind, None)
            started = time.monotonic()
            while line.faults < (1 if line.kind == "none" else each):
                fit_with(line, shared, reference, records)
                if not line.holds:
                    break  # it will not hold any better
            line.seconds = time.monotonic() - started
            print(table([line]).splitlines()[-1], flush=True)
    finally:
        for executor in made:
            executor.shutdown(wait=False, cancel_futures=True)
    return lines


def table(lines: list[Line]) -> str:
    """Return a table in Markdown."""
    head = (
        "| fault | faults | fits | submitted = completed + failed + given up | dropped | training bit-equal "
        "| counters add up | verdict | with evidence | holds | seconds |"
    )
    rows = [
        f"| {n.kind} | {n.faults} | {n.fits} | {n.submitted} = {n.completed} + {n.failed} + {n.given_up} | {n.dropped} "
        f"| {n.bit_equal} | {n.adds_up} | {n.verdict} | {n.with_evidence} | {n.holds} | {n.seconds:.0f} |"
        for n in lines
    ]
    return "\n".join([head, "|---" * 11 + "|", *rows])


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--faults", type=int, default=200, help="how many in all")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="which kinds")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    chosen = options.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    lines = run(tuple(chosen.kinds), chosen.faults)
    print(table(lines), f"\n{sum(line.faults for line in lines if line.kind != 'none')} faults injected.")
    chosen.out.write_text(json.dumps([vars(line) | {"holds": line.holds} for line in lines], indent=1) + "\n")
    return 0 if all(line.holds for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
