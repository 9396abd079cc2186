"""Every example runs, and says what it claims to say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.alone
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


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"quickstart", "audit_one_batch", "write_an_attack"}
