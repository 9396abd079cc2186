"""Write an attack in thirty lines: subclass `Attack`, fill in `run`, return a `Reconstruction`.

This one knows only that the gradient of the first convolution's bias says how bright the image is on average; it
guesses the flat image that matches best. A poor attack, so the engine check refuses to rely on it.
"""

from dataclasses import dataclass

import torch
from torch import nn

from lightning_gradaudit import Budget, Outcome, Reconstruction, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import Attack, SquaredError, recover_labels
from lightning_gradaudit.audit import check_engine


@dataclass(frozen=True, kw_only=True)
class BestFlatImage(Attack):
    """Try flat images from black to white and keep the one whose gradient fits best."""

    levels: int = 16

    def run(self, observation, *, budget, generator):
        labels = observation.labels
        if labels is None:
            labels = recover_labels(observation, generator=generator).labels
        if labels is None:
            return Reconstruction.not_applicable(observation, "labels unknown")
        scale = SquaredError()(
            {n: torch.zeros_like(g) for n, g in observation.gradients.items()}, observation.gradients
        )
        tried = []
        for level in torch.linspace(0, 1, min(self.levels, budget.evaluations or self.levels)):
            image = observation.normalization.from_pixels(torch.full(observation.shape, float(level)))
            loss = SquaredError()(observation.simulate(image, labels), observation.gradients) / scale
            tried.append((float(loss), image))
        loss, image = min(tried, key=lambda pair: pair[0])
        return Reconstruction(
            inputs=image, labels=labels, matching_loss=loss, evaluations=len(tried), outcome=Outcome.BUDGET_SPENT
        )


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    batch = torch.full((1, 1, 16, 16), 0.8), torch.tensor([2])
    snapshot = Snapshot.from_batch(model, batch, loss=nn.functional.cross_entropy)
    record = audit_snapshot(snapshot, attack=BestFlatImage(), budget=Budget(evaluations=50))
    engine = check_engine(BestFlatImage(), Budget(evaluations=50), closed_forms=False)
    print(f"PSNR {float(record.psnr):.1f} dB after {record.evaluations} evaluations; {engine}")
    return record, engine


if __name__ == "__main__":
    main()
