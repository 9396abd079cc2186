"""Audit one gradient without a Trainer: any module, any loss, a batch of your own.

Here: what would a client give away that computes one step of a small network on two portraits?
"""

import torch
from skimage.data import lfw_subset
from torch import nn

from lightning_gradaudit import Baseline, Budget, GaussianNoise, Snapshot, audit_snapshot


def main():
    torch.manual_seed(0)
    faces = torch.tensor(lfw_subset()[:100], dtype=torch.float32).unsqueeze(1)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip
    baseline = Baseline()
    baseline.observe(faces)  # what an average face gives away without any gradient, and whom to tell apart
    batch = faces[:2], torch.tensor([3, 7])
    records = {}
    for defences in ((), (GaussianNoise(relative=1.0),), (GaussianNoise(relative=30.0),)):
        snapshot = Snapshot.from_batch(model, batch, loss=nn.functional.cross_entropy, defences=defences)
        record = audit_snapshot(snapshot, budget=Budget(evaluations=300), baseline=baseline)
        records[defences] = record
        exposure = ", ".join(f"{value:.2f}" for value in record.exposure)
        print(f"{defences or 'no defence'}: exposure {exposure}; named {record.identified.tolist()} of 100 faces")
    return records


if __name__ == "__main__":
    main()
