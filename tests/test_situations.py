"""What people feed: one small real fit for each everyday situation (`benchmarks.quality.fits`)."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
from skimage.data import lfw_subset

from benchmarks.quality.fits import SITUATIONS, audit, train
from benchmarks.quality.situations import REFUSED

FACES = torch.from_numpy(lfw_subset()[:8]).float()[:, None].repeat(1, 3, 1, 1)
PACKAGES = {"peft_adapters": "peft", "timm_model": "timm", "transformers_vit": "transformers"}
pytestmark = pytest.mark.filterwarnings("ignore")


def make(name):
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    torch.manual_seed(0)
    return SITUATIONS[name]()


@pytest.mark.parametrize("name", [name for name in SITUATIONS if name not in REFUSED])
def test_every_audit_is_valid_an_attack_runs_and_training_is_as_without(name):
    fit = make(name)
    plain = copy.deepcopy(fit)
    callback = audit(fit, FACES, evaluations=20)
    records = callback.evidence.records
    assert not callback.evidence.faults
    assert len(records) >= 2
    for record in records:
        assert record.valid, record.self_test
        assert record.attacked, record.reason
        assert not math.isnan(float(record.exposure.sum()))
    state, logged = torch.get_rng_state(), fit.module.trainer.logged_metrics
    train(plain, FACES)
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.module.trainer.logged_metrics == {k: v for k, v in logged.items() if not k.startswith("gradaudit/")}
    for name_of, weights in fit.module.state_dict().items():
        assert torch.equal(weights, plain.module.state_dict()[name_of]), name_of


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_audited_is_refused_in_one_sentence_with_the_way_round(name):
    callback = audit(make(name), FACES, evaluations=20)
    assert not callback.evidence.records
    (said,) = {fault.message for fault in callback.evidence.faults}
    assert said.startswith(f"batch: expected {REFUSED[name]}")
    assert "in the data set or in" in said
