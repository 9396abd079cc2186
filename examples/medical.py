"""Grey medical-like images: microscopy of cells and a retina, cut into patches, each with the id of its scan.

The hospital asks which of its scans a step's gradient would give away, and how much noise would hide them. The
photographs come with scikit-image.
"""

import pytorch_lightning as pl
import torch
from skimage.color import rgb2gray
from skimage.data import cell, retina
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_gradaudit import Budget, GradAudit

SIDE = 32


def patches(picture, count):
    """Cut the most varied patches (N, 1, 32, 32) in [0, 1] out of a grey picture."""
    tiles = torch.as_tensor(picture, dtype=torch.float32).unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE)
    tiles = tiles.reshape(-1, 1, SIDE, SIDE)
    chosen = tiles[tiles.flatten(1).std(1).argsort(descending=True)[:count]]
    return (chosen - chosen.amin()) / (chosen.amax() - chosen.amin())


class Scans(Dataset):
    def __init__(self):
        self.images = torch.cat([patches(cell() / 255, 60), patches(rgb2gray(retina())[::2, ::2], 60)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        kind = int(index >= 60)
        return {"image": self.images[index], "label": kind, "scan": f"{('cell', 'retina')[kind]}-{index % 60:02d}"}


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2, padding=2), nn.Sigmoid(), nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(12 * 16 * 16, 2),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main():
    pl.seed_everything(0)
    audit = GradAudit(every_n_steps=50, budget=Budget(evaluations=250), sample_id="scan", dirpath="gradaudit-medical")
    trainer = pl.Trainer(max_epochs=1, callbacks=[audit], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(), DataLoader(Scans(), batch_size=1, shuffle=True))
    for image in audit.evidence.most_exposed():
        print(f"{image['id']} at step {image['step']}: exposure {image['exposure']:.2f}, PSNR {image['psnr']:.1f} dB")
    for record in audit.evidence.records:
        if record.leakage is not None:
            print(f"step {record.step}: noise that would hide it {float(record.leakage.noise_to_hide.max()):.2g}")
    return audit


if __name__ == "__main__":
    main()
