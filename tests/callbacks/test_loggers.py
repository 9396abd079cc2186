"""Curves arrive in every logger, at the step of capture, with equal values: read back from what was written."""

from __future__ import annotations

import csv
import json
import logging
import struct
import warnings
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from support import Classifier, RecordingLogger, images_and_labels, trainer
from support import record as audit_record
from torch.utils.data import DataLoader

from lightning_gradaudit import AuditSettings, Budget, GradAudit, Limits
from lightning_gradaudit.callbacks.curves import CURVES
from lightning_gradaudit.callbacks.loggers import STEP_KEY, sink, wandb_workspace
from lightning_gradaudit.callbacks.publisher import pairs_picture

KEYS = [f"gradaudit/{key}" for key in (*CURVES, "layer/net.0", "layer/net.1", "layer/net.5")]
PLAIN = AuditSettings(analysis=False, confirm=0)
STEPS = [0, 4, 8]
TABLE = "gradaudit/most_exposed"
LOGGERS = ("csv", "tensorboard", "wandb", "mlflow", "comet")


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


class Named(torch.utils.data.Dataset):
    """Images with labels and names of their own, as a mapping."""

    def __init__(self, count):
        self.images, self.labels = images_and_labels(count)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index], "patient": f"patient-{index}"}


class DictClassifier(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["label"]), batch_idx)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Train once with five loggers; return the folder, the audit and how to find the MLflow run."""
    folder = tmp_path_factory.mktemp("loggers")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
            patch.setenv(name, "true")
        patch.setenv("COMET_START_ONLINE", "false")
        logging.getLogger("comet_ml").setLevel(logging.CRITICAL)  # it logs on exit, when pytest has closed its streams
        quiet = dict.fromkeys(("log_code", "log_git_metadata", "log_git_patch", "log_env_details"), False)
        quiet |= {"auto_output_logging": False, "parse_args": False}
        mlflow = MLFlowLogger(
            "audits", tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder / "artifacts")
        )
        loggers = [
            CSVLogger(folder, name="csv", version=""),
            TensorBoardLogger(folder, name="tb", version=""),
            WandbLogger(save_dir=folder, offline=True, project="test", name="run"),
            mlflow,
            CometLogger(api_key="none", project="test", offline_directory=str(folder / "comet"), **quiet),
        ]
        audit = GradAudit(
            every_n_steps=4,
            budget=Budget(evaluations=20),
            executor="thread",
            limits=Limits(queue_size=9),
            log_images=True,
            sample_id="patient",
            dirpath=folder / "audit",
        )
        trainer(audit, logger=loggers).fit(DictClassifier(), DataLoader(Named(48), batch_size=4, shuffle=True))
        for logger in loggers:
            sink(logger).finish()
    assert [record.step for record in audit.evidence.records] == STEPS
    assert not audit.evidence.faults
    return folder, audit, mlflow.run_id


def csv_rows(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def tensorboard_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
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


def mlflow_client(folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def comet_messages(folder):
    """Yield kind, payload and the uploaded file's content, if any, of each message in the offline archive."""
    (path,) = (folder / "comet").glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("messages.json").decode().splitlines():
            message = json.loads(line)
            content = archive.read(message["payload"]["file_path"]) if message["type"] == "file_upload" else None
            yield message["type"], message["payload"], content


def curves_in(kind, folder, run_id):
    """Return {step: {key: value}} as one logger's store has it."""
    found = defaultdict(dict)
    if kind == "csv":
        for row in csv_rows(folder):
            if row["gradaudit/risk"]:
                found[int(row["step"])] = {key: float(row[key]) for key in KEYS}
    elif kind == "tensorboard":
        events = tensorboard_events(folder)
        for key in KEYS:
            for event in events.Scalars(key):
                found[event.step][key] = event.value
    elif kind == "wandb":
        for row in wandb_history(folder)[0]:
            if "gradaudit/risk" in row:
                found[row[STEP_KEY]] = {key: float(row[key]) for key in KEYS}
    elif kind == "mlflow":
        for key in KEYS:
            for metric in mlflow_client(folder).get_metric_history(run_id, key):
                found[metric.step][key] = metric.value
    else:
        for message, payload, _ in comet_messages(folder):
            if message == "metric_msg" and payload["metric"]["metricName"].startswith("gradaudit/"):
                metric = payload["metric"]
                found[metric["step"]][metric["metricName"]] = float(metric["metricValue"])
    return dict(found)


@pytest.mark.parametrize("kind", LOGGERS)
def test_every_logger_has_every_curve_at_the_step_of_capture_with_equal_values(written, kind):
    folder, audit, run_id = written
    found, expected = curves_in(kind, folder, run_id), curves_in("csv", folder, run_id)
    assert sorted(found) == STEPS
    for record in audit.evidence.records:
        row = found[record.step]
        assert set(KEYS) <= set(row)
        for key in KEYS:
            assert row[key] == pytest.approx(expected[record.step][key], rel=1e-5, nan_ok=True), key
        assert row["gradaudit/exposure_max"] == pytest.approx(float(record.exposure.max()), rel=1e-5)
        assert row["gradaudit/psnr"] == pytest.approx(float(record.psnr.mean()), rel=1e-5)
        assert row["gradaudit/seconds"] > 0


def test_wandb_draws_every_curve_by_exact_name_over_the_step_of_capture(written):
    _, metrics = wandb_history(written[0])
    for key in KEYS:
        assert metrics[key].step_metric == STEP_KEY
        assert not metrics[key].options.step_sync


def test_the_ready_made_layout_shows_curves_that_are_there(written):
    _, metrics = wandb_history(written[0])
    layout = wandb_workspace("entity", "project")
    panels = [panel for section in layout.sections for panel in section.panels]
    drawn = [curve for panel in panels for curve in getattr(panel, "y", None) or ()]
    assert drawn[:3] == ["gradaudit/risk", "gradaudit/risk_low", "gradaudit/risk_high"]
    assert set(drawn) <= set(metrics)
    assert {panel.x for panel in panels if getattr(panel, "y", None)} == {STEP_KEY}
    assert [panel.media_keys for panel in panels if hasattr(panel, "media_keys")] == [["gradaudit/reconstructions"]]
    assert (layout.entity, layout.project) == ("entity", "project")


def test_tensorboard_lays_risk_and_bounds_out_in_one_chart(written):
    from tensorboard.plugins.custom_scalar import layout_pb2

    event = tensorboard_events(written[0]).Tensors("custom_scalars__config__")[0]
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (series,) = layout.category[0].chart[0].margin.series
    assert (series.value, series.lower, series.upper) == tuple(f"gradaudit/risk{end}" for end in ("", "_low", "_high"))


def test_pictures_are_where_loggers_hold_pictures(written):
    folder, _, run_id = written
    assert len(list((folder / "csv").glob("gradaudit_reconstructions_*.png"))) == len(STEPS)
    assert [e.step for e in tensorboard_events(folder).Images("gradaudit/reconstructions")] == STEPS
    assert any("gradaudit/reconstructions" in key for row in wandb_history(folder)[0] for key in row)
    kept = [file.path for file in mlflow_client(folder).list_artifacts(run_id, "images")]
    assert sum(path.endswith(".png") for path in kept) == len(STEPS)
    uploads = [payload for kind, payload, _ in comet_messages(folder) if kind == "file_upload"]
    shown = [u["additional_params"]["step"] for u in uploads if u["upload_type"] == "visualization"]
    assert sorted(set(shown)) == STEPS  # Comet also mirrors what TensorBoard is given


def test_tables_name_the_most_exposed_images_by_the_users_own_ids(written):
    folder, audit, run_id = written
    worst = audit.evidence.most_exposed()
    values = sorted((float(e) for r in audit.evidence.records for e in r.exposure), reverse=True)[:10]
    assert [image["exposure"] for image in worst] == pytest.approx(values)
    ids = [image["id"] for image in worst]
    assert len(set(ids)) == 10
    assert all(name.startswith("patient-") for name in ids)

    (table,) = (folder / "wandb").glob("offline-run-*/files/media/table/gradaudit/*.json")
    columns = json.loads(table.read_text())
    assert [row[columns["columns"].index("id")] for row in columns["data"]] == ids
    text = tensorboard_events(folder).Tensors(f"{TABLE}/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [line.split(" | ")[2] for line in text.splitlines()[2:]] == ids
    stored = mlflow_client(folder).download_artifacts(run_id, f"{TABLE}.json", str(folder))
    kept = json.loads(Path(stored).read_text())
    assert [row[kept["columns"].index("id")] for row in kept["data"]] == ids
    (content,) = (c for kind, p, c in comet_messages(folder) if kind == "file_upload" and p["upload_type"] == "asset")
    assert [row["id"] for row in csv.DictReader(content.decode().splitlines())] == ids


def test_the_users_own_curves_stay_at_their_steps(written):
    rows = [row for row in csv_rows(written[0]) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(12))


class Failing(RecordingLogger):
    """A logger whose disk fills up, or whose connection drops, in the middle of the run."""

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("gradaudit/") for key in metrics) and step >= 4:
            raise OSError("No space left on device")
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("failing_first", [True, False])
def test_a_logger_that_fails_in_the_middle_stops_nobody(tmp_path, caplog, failing_first):
    failing, other = Failing(), RecordingLogger()
    audit = GradAudit(every_n_steps=4, budget=Budget(evaluations=5), executor="inline", settings=PLAIN,
                      dirpath=tmp_path)  # fmt: skip
    loggers = [failing, other] if failing_first else [other, failing]
    run = trainer(audit, logger=loggers)
    run.fit(Classifier(), DataLoader(torch.utils.data.TensorDataset(*images_and_labels(48)), batch_size=4))
    assert run.global_step == 12
    assert [step for step, _ in other.of_the_audit()] == STEPS
    assert [step for step, _ in failing.of_the_audit()] == [0]
    assert failing.of_the_user() == other.of_the_user()
    assert len(audit.evidence.records) == 3
    assert not audit.evidence.faults, "a logger says nothing about the audits"
    assert sum("No space left" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("sample_id", [2, lambda batch: batch[2].tolist()], ids=["index", "function"])
@pytest.mark.parametrize("view", ["local", "step"])
def test_ids_follow_images_through_accumulation(sample_id, view):
    images, labels = images_and_labels(16)
    names = torch.arange(16) + 100
    audit = GradAudit(
        every_n_steps=8, view=view, budget=Budget(evaluations=2), executor="inline", settings=PLAIN,
        sample_id=sample_id,
    )  # fmt: skip

    class Indexed(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    data = DataLoader(torch.utils.data.TensorDataset(images, labels, names), batch_size=4)
    if callable(sample_id):  # without a key, names must not look like labels
        data = DataLoader(torch.utils.data.TensorDataset(images, labels, names.float()), batch_size=4)
    trainer(audit, accumulate_grad_batches=2).fit(Indexed(), data)
    assert not audit.evidence.faults
    count = 4 if view == "local" else 8
    assert [int(float(name)) for name in audit.evidence.records[0].ids] == list(range(100, 100 + count))


@pytest.mark.parametrize("sample_id", ["nobody", lambda batch: [1]], ids=["missing", "too few"])
def test_ids_that_are_not_there_are_a_fault_that_names_the_argument(sample_id):
    audit = GradAudit(every_n_steps=1, budget=Budget(evaluations=2), executor="inline", sample_id=sample_id)
    data = DataLoader(Named(8), batch_size=4)
    trainer(audit).fit(DictClassifier(), data)
    assert all("sample_id" in text for _, text, _ in audit.evidence.faults)
    assert audit.evidence.faults


def test_pairs_lie_above_each_other():
    truth = torch.stack([torch.full((1, 4, 4), level) for level in (0.2, 0.6, 0.4)])
    picture = pairs_picture(audit_record(exposure=(0.1, 0.9, 0.5), truth=truth, pixels=truth / 2), 2, enlarge=1)
    assert picture.shape == (3, 2 * 8 + 4, 2 * 8 + 4)
    for column, level in ((4, 0.6), (12, 0.4)):  # the two most exposed, worst first
        assert torch.allclose(picture[:, 4:8, column : column + 4], torch.tensor(level))
        assert torch.allclose(picture[:, 12:16, column : column + 4], torch.tensor(level / 2))
    assert pairs_picture(audit_record(), 2) is None


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_pairs_of_any_number_of_channels_make_a_picture(channels):
    truth = torch.rand(2, channels, 4, 4)
    picture = pairs_picture(audit_record(exposure=(0.9, 0.1), truth=truth, pixels=truth), 1, enlarge=1)
    assert picture.shape == (3, 2 * 8 + 4, 8 + 4)
    shown = truth[0] if channels != 6 else truth[0].mean(0, keepdim=True)
    assert torch.allclose(picture[:, 4:8, 4:8], shown.expand(3, 4, 4), atol=1e-6)
