"""On CUDA: a worker thread with its own stream sees the true gradient and training notices nothing."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
import torchvision
from support import Classifier, loader
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import AuditSettings, Budget, GradAudit, Limits, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import (
    BatchNormStatistics,
    CosineDistance,
    GradientMatching,
    TotalVariation,
    compiled_evaluation,
)
from lightning_gradaudit.attacks.matching.problem import MatchingProblem
from lightning_gradaudit.execution.executors import make_executor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def fit(*callbacks):
    pl.seed_everything(3, verbose=False)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    module = Classifier(dropout=0.0)
    run = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=40,
        max_epochs=-1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module, loader(64))
    return copy.deepcopy(module.state_dict()), torch.cuda.get_rng_state(), torch.get_rng_state()


def test_auto_is_a_thread_on_cuda():
    executor, owned = make_executor("auto", device=torch.device("cuda"))
    assert owned
    assert type(executor).__name__ == "ThreadPoolExecutor"
    executor.shutdown()


@pytest.mark.parametrize(
    ("executor", "device"), [("auto", None), ("inline", None), ("process", None), ("process", "cuda")]
)
def test_training_is_bit_equal_and_every_audit_valid(tmp_path, executor, device):
    plain = fit()
    audit = GradAudit(
        every_n_steps=5,
        budget=Budget(evaluations=50),
        executor=executor,
        settings=AuditSettings(device=device),
        limits=Limits(queue_size=16),
        dirpath=tmp_path,
    )
    audited = fit(audit)
    assert len(audit.evidence.records) == 8
    assert not audit.evidence.faults
    assert all(record.valid for record in audit.evidence.records)
    assert all(torch.equal(plain[0][name], audited[0][name]) for name in plain[0])
    assert torch.equal(plain[1], audited[1])
    assert torch.equal(plain[2], audited[2])


def test_an_audit_on_the_device_recovers_what_one_on_the_cpu_does():
    """Smooth, since in a network with kinks the last digit decides where a search ends: 19 dB or 29."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, stride=2), torch.nn.Sigmoid(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 3)
    )
    images = loader(4).dataset.tensors[0][:1]
    snapshot = Snapshot.from_batch(model, (images, torch.tensor([1])), loss=F.cross_entropy)
    local = audit_snapshot(snapshot, budget=Budget(evaluations=400))
    remote = audit_snapshot(snapshot.to("cuda"), budget=Budget(evaluations=400))
    assert remote.valid
    assert bool(local.copied.all())
    assert bool(remote.copied.all())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_the_loop_does_not_wait_for_the_device():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, stride=2), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 3)
    )
    images = loader(4).dataset.tensors[0][:1]
    snapshot = Snapshot.from_batch(model, (images, torch.tensor([1])), loss=F.cross_entropy, labels_known=True)
    attack = GradientMatching(regularizers=(TotalVariation(), BatchNormStatistics()))
    run = attack.start(snapshot.to("cuda").observation, torch.Generator())
    (candidate,) = run.candidates
    candidate.advance(Budget(evaluations=5))
    candidate.begin(Budget(evaluations=30))
    try:
        torch.cuda.set_sync_debug_mode("error")
        while candidate.meter.evaluations < 20:  # the host reads values at the first, and after fifty
            candidate.optimizer.step(candidate.evaluate)
            attack.parametrization.project(candidate.variables, candidate.observation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert candidate.meter.evaluations == 20


@pytest.mark.parametrize(("exact", "off"), [(True, 5e-3), (False, 2e-2)], ids=["twice", "difference"])
def test_a_compiled_evaluation_on_the_device_is_the_eager_one(exact, off):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 5, stride=2), torch.nn.Sigmoid(), torch.nn.Flatten())
    model.append(torch.nn.Linear(8 * 16, 3))
    images = loader(4).dataset.tensors[0][:1]
    snapshot = Snapshot.from_batch(model, (images, torch.tensor([1])), loss=F.cross_entropy).to("cuda")
    evaluation = MatchingProblem(snapshot.observation, CosineDistance(), exact=exact)
    candidate, labels = torch.rand(images.shape, device="cuda"), snapshot.truth.labels
    expected = evaluation(candidate, labels)
    with compiled_evaluation(wait=True) as compilation:
        found = evaluation(candidate, labels)
    assert (compilation.evaluations, compilation.reasons) == (1, [])
    assert (found.inputs_gradient - expected.inputs_gradient).norm() < off * expected.inputs_gradient.norm()


def test_one_captured_graph_serves_later_problems_from_several_streams():
    torch.manual_seed(0)
    images, labels = torch.rand(2, 1, 1, 12, 12), torch.tensor([1])
    for batch in images:
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 5, stride=2), torch.nn.Sigmoid(), torch.nn.Flatten())
        model.append(torch.nn.Linear(8 * 16, 3))
        snapshot = Snapshot.from_batch(model, (batch, labels), loss=F.cross_entropy).to("cuda")
        evaluation = MatchingProblem(snapshot.observation, CosineDistance())
        for _ in range(3):
            candidate = torch.rand(batch.shape, device="cuda")
            expected = evaluation(candidate, snapshot.truth.labels)
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()), compiled_evaluation(wait=True) as compilation:
                found = evaluation(candidate, snapshot.truth.labels)
            assert (compilation.evaluations, compilation.reasons) == (1, [])
            torch.cuda.synchronize()
            torch.testing.assert_close(found.inputs_gradient, expected.inputs_gradient, rtol=2e-2, atol=1e-4)


def residual_network():
    """Deep enough for TF32 to decide which ReLU switches: two ways to multiply give two gradients."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = torch.nn.Conv2d(1, 64, 3, padding=1, bias=False), torch.nn.Identity()
    return model.eval()


def test_a_deep_network_is_compiled_in_spite_of_tf32(faces):
    batch = faces[0][:1], faces[1][:1]
    snapshot = Snapshot.from_batch(residual_network(), batch, loss=F.cross_entropy, labels_known=True).to("cuda")
    attack = GradientMatching(regularizers=(TotalVariation(),))
    with compiled_evaluation(wait=True) as compilation:
        attack(snapshot.observation, budget=Budget(evaluations=5), generator=torch.Generator())
    assert (compilation.evaluations, compilation.reasons) == (5, [])


def test_what_a_gpu_computed_in_tf32_is_replayed_validly_on_the_cpu(faces):
    batch = faces[0][:2].cuda(), faces[1][:2].cuda()
    snapshot = Snapshot.from_batch(residual_network().cuda(), batch, loss=F.cross_entropy)
    record = audit_snapshot(snapshot.to("cpu"), budget=Budget(evaluations=2), closed_forms=False)
    assert record.valid
