"""LightningCLI builds callback, gate, attack and defence from a YAML file by `class_path`."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser
from pytorch_lightning.cli import LightningCLI
from support import Classifier, Data
from test_docs import ATTACKS

from lightning_gradaudit import Budget, GaussianNoise, GradAudit, Limits, RiskGatedCheckpoint, attacks
from lightning_gradaudit.attacks import GradientMatching, TotalVariation

CONFIG = """
seed_everything: 1
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_gradaudit.GradAudit
      init_args:
        every_n_steps: 2
        executor: inline
        budget: {{evaluations: 20}}
        attack:
          class_path: lightning_gradaudit.attacks.InvertingGradients
          init_args: {{total_variation: 0.001}}
        threat_model:
          labels_known: true
          defences:
            - class_path: lightning_gradaudit.GaussianNoise
              init_args: {{relative: 0.5}}
        settings:
          seed: 3
          confirm: 0
          analysis: {{steps: 2}}
        limits: {{queue_size: 2}}
        dirpath: {folder}/audit
    - class_path: lightning_gradaudit.RiskGatedCheckpoint
      init_args: {{max_risk: 0.4, dirpath: {folder}/checkpoints}}
"""


@pytest.mark.filterwarnings("ignore")
def test_a_yaml_file_configures_audit_and_gate(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    cli = LightningCLI(Classifier, Data, args=["fit", "--config", str(config)], save_config_callback=None)
    audit = next(callback for callback in cli.trainer.callbacks if isinstance(callback, GradAudit))
    gate = next(callback for callback in cli.trainer.callbacks if isinstance(callback, RiskGatedCheckpoint))
    settings = audit.settings
    assert isinstance(settings.attack, GradientMatching)
    assert settings.attack.regularizers == (TotalVariation(weight=0.001),)
    assert settings.budget == Budget(evaluations=20)
    assert (settings.seed, settings.confirm, settings.analysis.steps) == (3, 0, 2)
    assert audit.limits == Limits(queue_size=2)
    assert audit.threat_model.labels_known
    assert audit.threat_model.defences == (GaussianNoise(relative=0.5),)
    assert gate.gate.max_risk == 0.4
    assert [record.step for record in audit.evidence.records] == [0, 2]
    assert "TotalVariation(weight=0.001" in audit.evidence.settings["attack"]


PARTS = ("LinearLayerInversion", "InvertingGradients")
REQUIRED = {"Portfolio": {"attacks": [{"class_path": f"lightning_gradaudit.attacks.{name}"} for name in PARTS]}}


@pytest.fixture(scope="module")
def parser():
    """What LightningCLI builds for the Trainer's callbacks."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GradAudit, "audit")
    return parser


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "GalleryIdentification"])  # takes images
def test_every_attack_is_built_by_its_class_path(parser, name):
    attack = {"class_path": f"lightning_gradaudit.attacks.{name}", "init_args": REQUIRED.get(name, {})}
    config = parser.parse_object(
        {"audit": {"class_path": "lightning_gradaudit.GradAudit", "init_args": {"attack": attack}}}
    )
    built = parser.instantiate(config).audit
    arguments = {"attacks": tuple(getattr(attacks, part)() for part in PARTS)} if name in REQUIRED else {}
    assert repr(built.settings.attack) == repr(getattr(attacks, name)(**arguments))
