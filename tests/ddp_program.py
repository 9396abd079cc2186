"""What each of two processes runs for test_ddp.py: several short fits over gloo, their findings written to a folder."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from support import CostlyExecutor, FakeClock, HoldingExecutor, RecordingLogger, images_and_labels, record, trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import AtSteps, Budget, EveryNSteps, GradAudit, Limits, RiskGatedCheckpoint
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.callbacks import sampler
from lightning_gradaudit.callbacks.overhead import Overhead

RANKS, BATCHES, SIZE, AT, CLIP = 2, 6, 3, 2, 0.05
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "clip": {"gradient_clip_val": CLIP},
    "bf16": {"precision": "bf16-mixed"},
}
VIEWS = ("local", "step", "reduced", "update")


class Task(pl.LightningModule):
    """BatchNorm and dropout, so that processes differ in more than their images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(125, 3)
        )
        self.states: list[torch.Tensor] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.batches: list[list[torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        self.states.append(torch.get_rng_state())
        self.weights.append({n: p.detach().clone() for n, p in self.named_parameters()})
        self.batches.append([each.clone() for each in batch])
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class OddBatch(Task):
    """One process, once, gets a batch that cannot be audited."""

    transferred = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.transferred += 1
        odd = self.global_rank == 1 and self.transferred == 2
        return [batch[0].flatten(2), batch[1]] if odd else batch

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0].view(-1, 1, 12, 12), batch[1]], batch_idx)


class Ticking(Task):
    """Steps that take a second."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = [clock]

    def training_step(self, batch, batch_idx):
        self.clock[0].now += 1.0
        return super().training_step(batch, batch_idx)


class Sharded(Task):
    """FSDP2: every process holds half of each tensor."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def data() -> DataLoader:
    return DataLoader(TensorDataset(*images_and_labels(RANKS * BATCHES * SIZE)), batch_size=SIZE, shuffle=False)


def audit_of(view: str, *, at: int = AT, **options: Any) -> GradAudit:
    defaults = {
        "schedule": AtSteps([at]),
        "executor": HoldingExecutor(),
        "limits": Limits(final_wait_seconds=0),
        "view": view,
        "name": view,
    }
    return GradAudit(**(defaults | options))


def fit(folder: Path, *callbacks: pl.Callback, kind=Task, **options: Any):
    rank = int(os.environ["RANK"])
    pl.seed_everything(11 + rank, verbose=False)  # dropout differs between the processes
    torch.manual_seed(5)
    task, log = kind(), RecordingLogger()
    torch.manual_seed(100 + rank)
    defaults = {"strategy": "ddp", "devices": RANKS, "default_root_dir": folder, "logger": log}
    run = trainer(*callbacks, **(defaults | options))
    run.fit(task, data())
    return run, task, log


def capture_everything(folder: Path) -> dict[str, Any]:
    found = {}
    for mode, options in MODES.items():
        audits = [audit_of(view) for view in VIEWS]
        _, task, log = fit(folder, *audits, **options)
        rng = torch.get_rng_state()
        _, plain, plain_log = fit(folder, **options)
        found[mode] = {
            "snapshots": {a.name: a.executor.snapshots for a in audits},
            "faults": [a.evidence.faults for a in audits],
            "states": task.states,
            "weights": task.weights,
            "batches": task.batches,
            "final": [task.state_dict(), plain.state_dict()],
            "rng": [rng, torch.get_rng_state()],
            "rows": [
                [(s, {k: v for k, v in row.items() if k.split("/")[0] not in VIEWS}) for s, row in each.rows]
                for each in (log, plain_log)
            ],
        }
        found[mode]["rows"] = [[row for row in rows if row[1]] for rows in found[mode]["rows"]]
    return found


def audit_and_gate(folder: Path) -> dict[str, Any]:
    """Real audits in every process; only one process sees a fault; the gate must decide alike in both."""
    rank = int(os.environ["RANK"])

    audit = audit_of(
        "local",
        schedule=AtSteps([0, 2, 4]),
        executor="thread",
        limits=Limits(final_wait_seconds=60),
        budget=Budget(evaluations=10),
        name="gradaudit",
    )
    gate = RiskGatedCheckpoint(dirpath=folder / "checkpoints", save_last=True, wait=60)
    run, _, log = fit(folder, audit, gate)
    faulty = audit_of("reduced", schedule=AtSteps([1, 3]), name="faulty")
    odd, _, _ = fit(folder, faulty, kind=OddBatch)
    clock = FakeClock()
    skipped = audit_of(
        "local",
        schedule=EveryNSteps(1),
        executor=CostlyExecutor(clock, 0.49 + rank),
        name="thinned",
        limits=Limits(max_overhead=1.0, queue_size=BATCHES, final_wait_seconds=0),
    )
    with mock.patch.object(sampler, "Overhead", partial(Overhead, clock=clock)):
        fit(folder, skipped, kind=partial(Ticking, clock))
    return {
        "thinned": [[s.step for s in skipped.executor.snapshots], skipped.evidence.skipped],
        "records": [(r.step, r.rank, r.valid, r.batch_size) for r in audit.evidence.records],
        "risk": float(run.callback_metrics["gradaudit/risk"]),
        "verdict": str(audit.verdict().status),
        "rows": log.of_the_audit(),
        "checkpoints": sorted(p.name for p in (folder / "checkpoints").glob("*")),
        "lines": len((folder / "gradaudit" / "records.jsonl").read_text().splitlines()) if rank == 0 else None,
        "faulty": [faulty.evidence.faults, len(faulty.executor.snapshots), odd.global_step],
    }


def shard(folder: Path) -> dict[str, Any]:
    from pytorch_lightning.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    audit = audit_of("reduced")
    _, task, _ = fit(folder, audit, kind=Sharded, strategy=strategy)
    strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    rng = torch.get_rng_state()
    _, plain, _ = fit(folder, kind=Sharded, strategy=strategy)

    def local(module):
        return [p.to_local().detach().clone() for p in module.parameters()]

    return {
        "snapshots": audit.executor.snapshots,
        "faults": audit.evidence.faults,
        "states": task.states,
        "batches": task.batches,
        "final": [local(task), local(plain)],
        "rng": [rng, torch.get_rng_state()],
    }


class Earned(GradAudit):
    """An audit that has earned a PASS before its first step, on all processes alike."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.evidence.records = [record(0, (0.0,), rank=i, digests=(f"image {i}",)) for i in range(32)]
        self.evidence.engine = EngineCheck(passed=True, psnr={"attack": 40.0})


def save(folder: Path) -> dict[str, Any]:
    """Save released checkpoints of two strategies, whole and of weights only."""
    from pytorch_lightning.strategies import ModelParallelStrategy

    saved = {}
    for name, kind in (("ddp", Task), ("fsdp2", Sharded)):
        for weights_only in (False, True):
            sharded = {"data_parallel_size": RANKS, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
            options = {"strategy": ModelParallelStrategy(**sharded)} if kind is Sharded else {}
            path = folder / f"{name}-{weights_only}"
            gate = RiskGatedCheckpoint(dirpath=path / "c", save_weights_only=weights_only, wait=0)
            audit = Earned(
                dirpath=path / "audit",
                view="reduced",
                schedule=AtSteps([]),
                executor=HoldingExecutor(),
                limits=Limits(final_wait_seconds=0),
            )
            fit(path, audit, gate, kind=kind, enable_checkpointing=True, **options)
            saved[path.name] = gate.best_model_path
    return saved


def main() -> None:
    warnings.simplefilter("ignore")
    name, folder = sys.argv[1], Path(sys.argv[2])
    result = {"capture": capture_everything, "gate": audit_and_gate, "shard": shard, "save": save}[name](folder)
    torch.save(result, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()  # nobody leaves while the other still talks
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end can meet gloo's threads still running and abort a finished process
