"""Audit a checkpoint after the fact: load weights, take a private batch, and ask what its gradient would give away.

No Trainer is needed at audit time. The snapshot can be saved and attacked elsewhere (`gradaudit audit step.pt
--trust`): loading runs the model's code, so load only snapshots whose maker you know. It holds the private batch, so
treat the file as you treat the images.
"""

import pytorch_lightning as pl
import torch
from own_module import Portraits, Recogniser
from torch.utils.data import DataLoader, default_collate

from lightning_gradaudit import Baseline, Budget, Snapshot, audit_snapshot


def main():
    pl.seed_everything(0)
    data = Portraits()
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Recogniser(), DataLoader(data, batch_size=4, shuffle=True))
    trainer.save_checkpoint("model.ckpt")  # yours, from any run

    model = Recogniser.load_from_checkpoint("model.ckpt")
    baseline = Baseline()
    baseline.observe(data.images[2:])  # what a guess without the gradient looks like, and whom to tell apart
    batch = default_collate([data[0], data[1]])
    snapshot = Snapshot.from_batch(model, batch, mode="train", sample_id="name")
    snapshot.save("step.pt")
    loaded = Snapshot.load("step.pt", trust=True)  # the file is ours
    record = audit_snapshot(loaded, budget=Budget(evaluations=400), baseline=baseline, analysis=True)
    print(record.summary)
    for row in record.table():
        print(" | ".join(row))
    return record


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
