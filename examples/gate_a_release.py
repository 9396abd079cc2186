"""Gate a release in a shell pipeline: a leaky checkpoint is stopped, a defended one passes.

Every checkpoint that was trained with GradAudit carries its evidence, so the pipeline needs nothing but the file:
`gate_a_release.sh` runs `gradaudit gate CHECKPOINT --max-risk 0.3 && cp ...`.
"""

import subprocess
from pathlib import Path

import pytorch_lightning as pl
from own_module import Portraits, Recogniser
from torch.utils.data import DataLoader

from lightning_gradaudit import AuditSettings, Budget, GaussianNoise, GradAudit, Limits, ThreatModel


def train(path, defences=(), every_n_steps=1):
    pl.seed_everything(0)
    audit = GradAudit(
        every_n_steps=every_n_steps,
        budget=Budget(evaluations=120),
        threat_model=ThreatModel(defences=defences),
        settings=AuditSettings(analysis=False, confirm=0),
        limits=Limits(queue_size=50),
        gallery=Portraits().images,
        executor="thread",
        dirpath=Path(path).with_suffix(""),
    )
    trainer = pl.Trainer(max_epochs=1, callbacks=[audit], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Recogniser(), DataLoader(Portraits(), batch_size=3, shuffle=True))
    trainer.save_checkpoint(path)


def main():
    train("leaky.ckpt", every_n_steps=8)  # one exposed image blocks; a PASS takes 29 audits
    train("defended.ckpt", defences=(GaussianNoise(relative=30.0),))
    script = Path(__file__).with_suffix(".sh")
    subprocess.run(["sh", script, "released", "leaky.ckpt", "defended.ckpt"], check=True)
    return sorted(path.name for path in Path("released").glob("*.ckpt"))


if __name__ == "__main__":
    print("released:", main())
