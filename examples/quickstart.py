"""Audit a run of your own: add one callback, and a gate for its checkpoints.

Run it with `python examples/quickstart.py`; it takes less than a minute and needs scikit-image for its photographs.
"""

import pytorch_lightning as pl
import torch
from skimage.data import lfw_subset
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import Budget, GradAudit, Limits, RiskGatedCheckpoint


class FaceDetector(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 5, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 4 * 4, 2),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main():
    pl.seed_everything(0)
    images = torch.tensor(lfw_subset(), dtype=torch.float32).unsqueeze(1)  # 100 faces, 100 other patches
    labels = (torch.arange(200) >= 100).long()
    audit = GradAudit(
        every_n_steps=10, budget=Budget(evaluations=600), limits=Limits(queue_size=10), dirpath="gradaudit-quickstart"
    )
    gate = RiskGatedCheckpoint(max_risk=0.3, dirpath="gradaudit-quickstart/checkpoints")
    trainer = pl.Trainer(max_epochs=2, callbacks=[audit, gate], accelerator="cpu", logger=False)
    trainer.fit(FaceDetector(), DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True))
    print(audit.verdict())
    print("released:", gate.best_model_path or "nothing")
    return audit, gate


if __name__ == "__main__":
    main()
