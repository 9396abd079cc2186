"""Audit a LightningModule of your own whose batches are dictionaries, and name images by your own ids.

The callback finds the images (the only four-dimensional tensor) and the labels (an entry called label or target) by
itself; whatever else the batch holds never reaches the adversary. Needs scikit-image for its photographs.
"""

import pytorch_lightning as pl
import torch
from skimage.data import lfw_subset
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_gradaudit import Budget, GradAudit


class Portraits(Dataset):
    def __init__(self):
        self.images = torch.tensor(lfw_subset()[:100], dtype=torch.float32).unsqueeze(1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "target": index % 10, "name": f"portrait-{index:03d}"}


class Recogniser(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(16 * 11 * 11, 10)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.head(self.body(batch["image"])), batch["target"])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main():
    pl.seed_everything(0)
    audit = GradAudit(every_n_steps=15, budget=Budget(evaluations=300), sample_id="name", dirpath="gradaudit-own")
    trainer = pl.Trainer(max_epochs=1, callbacks=[audit], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Recogniser(), DataLoader(Portraits(), batch_size=2, shuffle=True))
    for image in audit.evidence.most_exposed(5):
        print(f"{image['id']} at step {image['step']}: exposure {image['exposure']:.2f}, PSNR {image['psnr']:.1f} dB")
    return audit


if __name__ == "__main__":
    main()
