"""LightningCLI: audit and gate come from a YAML file, nothing is written in Python.

Run it with `python examples/lightning_cli.py fit --config examples/lightning_cli.yaml`. Attacks and defences are given
by `class_path`, e.g. `lightning_gradaudit.attacks.InvertingGradients`. Needs jsonargparse (`lightning[extra]`).
"""

import pytorch_lightning as pl
from own_module import Portraits, Recogniser
from pytorch_lightning.cli import LightningCLI
from torch.utils.data import DataLoader


class PortraitData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 2):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(Portraits(), batch_size=self.batch_size, shuffle=True)


def main(args=None):
    return LightningCLI(Recogniser, PortraitData, args=args)


if __name__ == "__main__":
    main()
