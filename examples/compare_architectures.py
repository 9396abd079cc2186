"""Choose an architecture with an eye on what its gradients give away: the same photographs, attack and budget for all.

`gradaudit compare --own net.py:build=weights.ckpt` does the same from the command line. Few images rank models roughly
at best; `found.contenders[i].records` has every image.
"""

import torch
from skimage.data import lfw_subset
from torch import nn

from lightning_gradaudit import Budget, compare


def main():
    torch.manual_seed(0)
    faces = torch.tensor(lfw_subset()[:100], dtype=torch.float32).unsqueeze(1)
    models = {
        "linear layer": nn.Sequential(nn.Flatten(), nn.Linear(625, 32), nn.ReLU(), nn.Linear(32, 10)),
        "stride": nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 5, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 4 * 4, 10),
        ),
        "pooling": nn.Sequential(
            nn.Conv2d(1, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 10),
        ),
    }  # fmt: skip
    found = compare(
        models, faces[:2], torch.tensor([3, 7]), budget=Budget(evaluations=120), gallery=faces[2:], labels_known=True
    )
    for row in found.table():
        print(" | ".join(row))
    return found


if __name__ == "__main__":
    main()
