"""Real Opacus fits: an honest run passes by proof with few audits, and a run that leaves its mechanism does not."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from support import images_and_labels, trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import AuditSettings, Budget, GradAudit, PrivacyAccounting, Status
from lightning_gradaudit.cli.main import main
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.privacy_bounds import Looks, epsilon

opacus = pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Secure RNG turned off:UserWarning",
    "ignore:Full backward hook is firing:UserWarning",
    "ignore:Optimal order is the:UserWarning",
    "ignore:.*non-full backward hook.*:FutureWarning",
    "ignore:.*Expected_batch_size.*:UserWarning",
    "ignore:Trying to infer the `batch_size`:UserWarning",
    "ignore:Mean of empty slice:RuntimeWarning",
)
COUNT, SIZE, NOISE = 128, 16, 12.0
STEPS = COUNT // SIZE


class Private(pl.LightningModule):
    poisson = True
    noise = NOISE

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.Linear(150, 3)
        )

    def training_step(self, batch, batch_idx):
        if not len(batch[0]):
            return self.net(batch[0]).sum()
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        loader = DataLoader(TensorDataset(*images_and_labels(COUNT)), batch_size=SIZE, shuffle=True)
        model, private, self.private_data = opacus.PrivacyEngine().make_private(
            module=self,
            optimizer=torch.optim.SGD(self.parameters(), lr=0.05),
            data_loader=loader,
            noise_multiplier=self.noise,
            max_grad_norm=0.3,
            poisson_sampling=self.poisson,
        )
        self.dp = {"model": model}
        return private

    def train_dataloader(self):
        return self.private_data


def audit_of(folder, **options) -> GradAudit:
    defaults = {
        "every_n_steps": 1, "executor": "inline", "budget": Budget(evaluations=5), "dirpath": folder, "mean": 0.0,
        "std": 1.0, "settings": AuditSettings(analysis=False, confirm=0),
    }  # fmt: skip
    return GradAudit(**(defaults | options))


def fitted(folder, module=None, *, audit=None, **options):
    pl.seed_everything(1, verbose=False)
    audit = audit_of(folder / "audit") if audit is None else audit
    accounting = PrivacyAccounting(delta=1e-4)
    saver = ModelCheckpoint(folder / "ckpt")
    trainer(audit, accounting, saver, **options).fit(Private() if module is None else module)
    return audit, accounting, saver.best_model_path


def test_an_honest_run_passes_by_proof_with_few_audits(tmp_path, capsys):
    audit, accounting, path = fitted(tmp_path)
    assert accounting.ledger.faults == []
    assert accounting.ledger.looks == [Looks(NOISE, pytest.approx(SIZE / COUNT), STEPS)]
    verdict = audit.verdict()
    assert len(audit.evidence.records) == STEPS
    assert (verdict.status, verdict.basis) == (Status.PASS, "proven"), str(verdict)
    assert verdict.proven_reconstruction <= 0.1
    assert verdict.proven_identification <= 0.01
    assert verdict.epsilon >= epsilon([Looks(NOISE, SIZE / COUNT, STEPS)], 1e-4)
    for place in (path, str(tmp_path / "audit")):
        assert main(["gate", place, "--max-risk", "0.3"]) == 0, place
    assert "Proven" in capsys.readouterr().out
    stamp = torch.load(path, weights_only=True)["gradaudit"]
    assert stamp["verdict"]["basis"] == "proven"


class NoNoise(Private):
    """Declares its noise, and draws none."""

    def configure_optimizers(self):
        private = super().configure_optimizers()
        honest = type(private).add_noise

        def quiet(self):
            declared, self.noise_multiplier = self.noise_multiplier, 0.0
            honest(self)
            self.noise_multiplier = declared

        private.__class__ = type("DPOptimizer", (type(private),), {"add_noise": quiet, "__module__": FLAT})
        private.__class__.__qualname__ = "DPOptimizer"
        return private


class Shuffled(Private):
    poisson = False


class ClippedByBatch(Private):
    """Clips the sum of a batch, and not each sample."""

    def configure_optimizers(self):
        private = super().configure_optimizers()

        def clip(self):
            total = [self._get_flat_grad_sample(p).sum(0) for p in self.params]
            factor = (self.max_grad_norm / torch.cat([g.flatten() for g in total]).norm()).clamp(max=1.0)
            for p, g in zip(self.params, total, strict=True):
                p.summed_grad = factor * g
                opacus.optimizers.optimizer._mark_as_processed(p.grad_sample)

        private.__class__ = type("DPOptimizer", (type(private),), {"clip_and_accumulate": clip, "__module__": FLAT})
        private.__class__.__qualname__ = "DPOptimizer"
        return private


class Virtual(Private):
    """Puts two Poisson batches together, which the accountant takes for one."""

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.optimizers[0].signal_skip_step(do_skip=batch_idx % 2 == 0)


FLAT = "opacus.optimizers.optimizer"


@pytest.mark.parametrize(
    ("kind", "view", "words"),
    [
        (NoNoise, None, "noise multiplier"),
        (Shuffled, None, "not Poisson samples"),
        (ClippedByBatch, None, "invalid"),
        (Private, "local", "before the mechanism"),
        (Virtual, None, "do not pair off"),
    ],
)
def test_a_run_that_leaves_its_mechanism_does_not_pass_by_proof(tmp_path, capsys, kind, view, words):
    audit, _, path = fitted(tmp_path, kind(), audit=audit_of(tmp_path / "audit", view=view, every_n_steps=4))
    assert audit.evidence.records, "the test needs audits"
    verdict = audit.verdict()
    assert verdict.status is not Status.PASS
    assert math.isnan(verdict.proven_reconstruction)
    said = next(reason for reason in verdict.reasons if "Nothing is proven" in reason)
    assert words in said
    assert main(["gate", path, "--max-risk", "0.3"]) != 0
    assert main(["gate", str(tmp_path / "audit"), "--max-risk", "0.3"]) != 0
    assert words in capsys.readouterr().out


def test_training_stops_before_epsilon_is_spent(tmp_path):
    pl.seed_everything(1, verbose=False)
    accounting = PrivacyAccounting(delta=1e-4, stop_at_epsilon=0.1, every_n_steps=1)
    run = trainer(accounting, max_epochs=5)
    run.fit(Private())
    renyi = opacus.accountants.RDPAccountant()

    def spent(steps: int) -> float:
        renyi.history = [(NOISE, SIZE / COUNT, steps)]
        return renyi.get_epsilon(1e-4)

    assert 0 < run.global_step < 5 * STEPS
    assert spent(run.global_step) <= 0.1 < spent(run.global_step + 1)
    assert float(run.callback_metrics["gradaudit/epsilon_rdp"]) == pytest.approx(spent(run.global_step))


def test_training_does_not_notice_the_accounting():
    def fit(*callbacks):
        pl.seed_everything(1, verbose=False)
        module = Private()
        trainer(*callbacks).fit(module)
        return [*module.state_dict().values(), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(fit(PrivacyAccounting()), fit(), strict=True))


@pytest.mark.parametrize("wrong", [{"delta": 0}, {"stop_at_epsilon": -1.0}, {"every_n_steps": 0}])
def test_misuse_is_refused(wrong):
    with pytest.raises(InvalidInputError, match="expected delta"):
        PrivacyAccounting(**wrong)
