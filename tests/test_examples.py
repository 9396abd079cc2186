"""Every example runs, and says what it claims to say."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import wandb

from lightning_gradaudit import GaussianNoise, GradAudit, RiskGatedCheckpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str):
    return load(name).main()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)  # `gradaudit` of this environment


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quickstart_refuses_the_checkpoint_of_a_leaky_run():
    audit, gate = run("quickstart")
    assert audit.verdict().status.value == "BLOCK"
    assert not audit.evidence.faults
    assert gate.best_model_path == ""


def test_audit_one_batch_shows_that_noise_hides_faces():
    plain, _, noisy = run("audit_one_batch").values()
    assert float(plain.exposure.max()) > 0.3
    assert bool((plain.identified == 1).any())
    assert float(noisy.exposure.max()) < 0.05


def test_write_an_attack_finds_the_flat_image_and_fails_the_engine_check():
    record, engine = run("write_an_attack")
    assert float(record.psnr) > 30
    assert record.evaluations == 16
    assert not engine.passed


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_own_module_names_portraits_by_their_own_ids():
    audit = run("own_module")
    assert not audit.evidence.faults
    worst = audit.evidence.most_exposed(5)
    assert worst[0]["exposure"] > 0.5
    assert all(re.fullmatch(r"portrait-0\d\d", image["id"]) for image in worst)


@pytest.mark.filterwarnings("ignore")
def test_wandb_curves_leaves_a_run_that_can_be_synced():
    wandb.teardown()  # the service of an earlier test would write relative to that test's folder
    audit = run("wandb_curves")
    assert len(audit.evidence.records) == 2
    assert not audit.evidence.faults
    wandb.teardown()  # its service writes what it holds when it ends, as with the process
    (run_file,) = Path("wandb").glob("offline-run-*/*.wandb")
    written = run_file.read_bytes()
    for name in (b"gradaudit/risk", b"gradaudit/ceiling", b"gradaudit/most_exposed", b"gradaudit/reconstructions"):
        assert name in written


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gate_a_release_stops_the_leaky_checkpoint_and_passes_the_defended_one(capfd):
    assert run("gate_a_release") == ["defended.ckpt"]
    said = capfd.readouterr().out
    assert "leaky.ckpt: exit status 1" in said
    assert "defended.ckpt: exit status 0" in said


def test_compare_architectures_ranks_what_algebra_gives_away_first():
    found = run("compare_architectures")
    linear, stride, pooling = found.contenders
    assert linear.exact_leaks == 2
    assert float(linear.exposure.min()) > 0.9
    assert stride.exact_leaks == pooling.exact_leaks == 0
    assert float(pooling.ceiling.max()) < float(stride.ceiling.min())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_audit_checkpoint_attacks_the_weights_of_a_file():
    record = run("audit_checkpoint")
    assert record.valid
    assert record.ids == ("portrait-000", "portrait-001")
    assert float(record.exposure.max()) > 0.3


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli_runs_its_file():
    arguments = ["fit", "--config", str(EXAMPLES / "lightning_cli.yaml")]
    cli = load("lightning_cli").main(arguments)
    audit, gate = (next(c for c in cli.trainer.callbacks if isinstance(c, k)) for k in (GradAudit, RiskGatedCheckpoint))
    assert [record.step for record in audit.evidence.records] == [0, 25]
    assert all(record.ids for record in audit.evidence.records)
    assert audit.threat_model.defences == (GaussianNoise(relative=0.1),)
    assert gate.gate.max_risk == 0.3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_medical_images_come_back_and_are_named_by_scan():
    audit = run("medical")
    assert not audit.evidence.faults
    worst = audit.evidence.most_exposed()
    assert worst[0]["psnr"] > 30
    assert all(re.fullmatch(r"(cell|retina)-\d\d", image["id"]) for image in worst)


def test_every_example_is_tested():
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    for path in EXAMPLES.glob("*.py"):
        assert f"test_{path.stem}" in tests, path
