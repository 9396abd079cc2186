"""Curves arrive in every logger, at the step of capture, with equal values: read back from what was written."""

from __future__ import annotations

import csv
import json
import struct
import warnings

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from support import Classifier, loader, trainer
from support import record as audit_record

from lightning_gradaudit import Budget, GradAudit
from lightning_gradaudit.curves import CURVES
from lightning_gradaudit.loggers import STEP_KEY, pairs_picture

KEYS = [f"gradaudit/{key}" for key in (*CURVES, "layer/net.0", "layer/net.1", "layer/net.5")]
STEPS = [0, 4, 8]


def wandb_records(path):
    """Parse an offline run file: LevelDB's log format after a header of 7 bytes, protobuf records inside."""
    from wandb.proto import wandb_internal_pb2 as messages

    data, offset, partial = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        chunk = data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        partial = chunk if kind in (1, 2) else partial + chunk
        if kind in (1, 4):
            record = messages.Record()
            record.ParseFromString(partial)
            yield record


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Train once with three loggers; return the folder and the rows the callback logged."""
    folder = tmp_path_factory.mktemp("loggers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wandb_logger = WandbLogger(save_dir=folder, offline=True, project="test", name="run")
        files = [CSVLogger(folder, name="csv", version=""), TensorBoardLogger(folder, name="tb", version="")]
        audit = GradAudit(
            every_n_steps=4,
            budget=Budget(evaluations=20),
            executor="thread",
            queue_size=9,
            log_images=True,
            dirpath=folder / "audit",
        )
        trainer(audit, logger=[*files, wandb_logger]).fit(Classifier(), loader(48))
        wandb_logger.experiment.finish()
        for logger in files:
            logger.finalize("success")
    rows = {r.step: r for r in audit.evidence.records}
    assert sorted(rows) == STEPS
    return folder, rows


def csv_rows(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def tensorboard_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def wandb_history(folder):
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    history, metrics = [], {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in items})
        if record.WhichOneof("record_type") == "metric":
            metrics[record.metric.name] = record.metric
    return history, metrics


def test_csv_has_every_curve_at_the_step_of_capture(written):
    folder, _ = written
    rows = [row for row in csv_rows(folder) if row["gradaudit/risk"]]
    assert [int(row["step"]) for row in rows] == STEPS
    assert set(KEYS) <= set(rows[0])
    assert len(list((folder / "csv").glob("gradaudit_reconstructions_*.png"))) == 3


def test_tensorboard_has_every_curve_at_the_step_of_capture(written):
    folder, _ = written
    events = tensorboard_scalars(folder)
    assert set(KEYS) <= set(events.Tags()["scalars"])
    for key in KEYS:
        assert [event.step for event in events.Scalars(key)] == STEPS
    assert [event.step for event in events.Images("gradaudit/reconstructions")] == STEPS


def test_wandb_has_every_curve_defined_by_exact_name_over_the_step_of_capture(written):
    folder, _ = written
    history, metrics = wandb_history(folder)
    for key in KEYS:
        assert metrics[key].step_metric == STEP_KEY
        assert not metrics[key].options.step_sync
    rows = [row for row in history if "gradaudit/risk" in row]
    assert [row[STEP_KEY] for row in rows] == STEPS
    assert all(set(KEYS) <= set(row) for row in rows)
    assert any("gradaudit/reconstructions" in key for row in history for key in row)


def test_all_loggers_hold_equal_values(written):
    folder, records = written
    table = {int(row["step"]): row for row in csv_rows(folder) if row["gradaudit/risk"]}
    events = tensorboard_scalars(folder)
    history, _ = wandb_history(folder)
    online = {row[STEP_KEY]: row for row in history if "gradaudit/risk" in row}
    for key in KEYS:
        for event in events.Scalars(key):
            local, remote = float(table[event.step][key]), online[event.step][key]
            assert event.value == pytest.approx(local, rel=1e-5, nan_ok=True)
            assert remote == pytest.approx(local, rel=1e-5, nan_ok=True)
    for step, record in records.items():
        assert float(table[step]["gradaudit/exposure_max"]) == pytest.approx(float(record.exposure.max()), rel=1e-5)
        assert float(table[step]["gradaudit/psnr"]) == pytest.approx(float(record.psnr.mean()), rel=1e-5)


def test_the_users_own_curves_stay_at_their_steps(written):
    folder, _ = written
    rows = [row for row in csv_rows(folder) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(12))


def test_pairs_lie_above_each_other():
    import torch

    truth = torch.stack([torch.full((1, 4, 4), level) for level in (0.2, 0.6, 0.4)])
    picture = pairs_picture(audit_record(exposure=(0.1, 0.9, 0.5), truth=truth, pixels=truth / 2), 2, enlarge=1)
    assert picture.shape == (3, 2 * 8 + 4, 2 * 8 + 4)
    for column, level in ((4, 0.6), (12, 0.4)):  # the two most exposed, worst first
        assert torch.allclose(picture[:, 4:8, column : column + 4], torch.tensor(level))
        assert torch.allclose(picture[:, 12:16, column : column + 4], torch.tensor(level / 2))
    assert pairs_picture(audit_record(), 2) is None
