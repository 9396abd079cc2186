"""Watch leakage curves in Weights & Biases: attach the logger, and the callback writes to it.

Offline here, so that it runs anywhere: `wandb sync wandb/offline-run-*` uploads it. Curves are drawn over the step of
capture, `gradaudit/step`, because results come later than the step they belong to.
"""

import pytorch_lightning as pl
from own_module import Portraits, Recogniser
from pytorch_lightning.loggers import WandbLogger
from torch.utils.data import DataLoader

from lightning_gradaudit import Budget, GradAudit


def main():
    pl.seed_everything(0)
    audit = GradAudit(
        every_n_steps=25,
        budget=Budget(evaluations=300),
        sample_id="name",
        log_images=True,  # reconstructions of private images: leave it off unless the project may hold them
    )
    logger = WandbLogger(project="gradaudit", name="portraits", offline=True)
    trainer = pl.Trainer(max_epochs=1, callbacks=[audit], logger=logger, accelerator="cpu", enable_checkpointing=False)
    trainer.fit(Recogniser(), DataLoader(Portraits(), batch_size=2, shuffle=True))
    logger.experiment.finish()
    return audit


if __name__ == "__main__":
    main()
