"""Everyday training situations as small real fits: what is trained, on which batches, and how."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_gradaudit import AuditSettings, Budget, GradAudit

SIDE, BATCH, STEPS = 16, 2, 2
Step = Callable[[pl.LightningModule, Any], Any]


class Rows(Dataset[Any]):
    """The entries that a function makes of each image and its number."""

    def __init__(self, images: Tensor, make: Callable[[Tensor, int], Any]) -> None:
        self.images, self.make = images, make

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: int) -> Any:
        return self.make(self.images[at], at)


class Stream(IterableDataset[Any]):
    """The same rows, one after the other."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return (self.rows[at] for at in range(len(self.rows)))


class Module(pl.LightningModule):
    """Networks by name and a training step given as a function."""

    def __init__(self, step: Step, **nets: nn.Module) -> None:
        super().__init__()
        self.step = step
        for name, net in nets.items():
            setattr(self, name, net)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


@dataclass
class Fit:
    """What is trained on what, and how.

    Attributes:
        module: The user's module.
        row: Makes an entry of the data set of an image (C, H, W) and its number.
        audit: Arguments of `GradAudit`.
        trainer: Arguments of `Trainer`.
        loader: Makes the data loader of the rows; None: batches of `BATCH`.
        channels, shape: Of the images.
    """

    module: pl.LightningModule
    row: Callable[[Tensor, int], Any]
    audit: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    loader: Callable[[Rows], Any] | None = None
    channels: int = 3
    shape: tuple[int, int] = (SIDE, SIDE)


def small_net(classes: int = 4, channels: int = 3, side: int = SIDE) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * side**2, classes)
    )


def labelled(image: Tensor, at: int) -> tuple[Tensor, int]:
    return image, at % 4


def classify(module: pl.LightningModule, batch: Any) -> Tensor:
    images, labels = batch
    return F.cross_entropy(module(images), labels)


SITUATIONS: dict[str, Callable[[], Fit]] = {}


def situation(make: Callable[[], Fit]) -> Callable[[], Fit]:
    SITUATIONS[make.__name__] = make
    return make


# Heads and labels


@situation
def classifier() -> Fit:
    return Fit(Module(classify, net=small_net()), labelled)


@situation
def single_logit() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.binary_cross_entropy_with_logits(module(images)[:, 0], labels.float())

    return Fit(Module(step, net=small_net(1)), lambda image, at: (image, at % 2))


@situation
def convolutional_head() -> Fit:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return Fit(Module(classify, net=net), labelled)


@situation
def auxiliary_layer_after_the_head() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        features = module.net(images)
        rotation = module.auxiliary(features)
        return F.cross_entropy(module.head(features), labels) + 0.1 * rotation.square().mean()

    nets = {"net": small_net(16), "head": nn.Linear(16, 4), "auxiliary": nn.Linear(16, 1)}
    return Fit(Module(step, **nets), labelled)


class Gan(pl.LightningModule):
    """A generator and a discriminator that are optimised by hand."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 3 * SIDE**2), nn.Sigmoid(), nn.Unflatten(1, (3, SIDE, SIDE)))
        self.discriminator = small_net(1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images = batch[0]
        first, second = self.optimizers()  # type: ignore[misc]
        fake = self.generator(torch.randn(len(images), 8, device=images.device))
        self.toggle_optimizer(first)
        loss = F.softplus(-self.discriminator(fake)).mean()
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        real = F.softplus(-self.discriminator(images)).mean()
        loss = real + F.softplus(self.discriminator(fake.detach())).mean()
        self.manual_backward(loss)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        nets = (self.generator, self.discriminator)
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets], []


@situation
def gan() -> Fit:
    return Fit(Gan(), labelled)


@situation
def soft_labels() -> Fit:
    return Fit(
        Module(classify, net=small_net()), lambda image, at: (image, F.one_hot(torch.tensor(at % 4), 4) * 0.9 + 0.025)
    )


@situation
def smoothed_and_weighted_labels() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module(images), labels, torch.arange(1.0, 5), label_smoothing=0.1)

    return Fit(Module(step, net=small_net()), labelled)


@situation
def multi_label() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.binary_cross_entropy_with_logits(module(images), labels)

    return Fit(
        Module(step, net=small_net()), lambda image, at: (image, torch.tensor([at % 2, at % 3 > 0, 1, 0]).float())
    )


@situation
def regression() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, values = batch
        return F.mse_loss(module(images)[:, 0], values)

    return Fit(Module(step, net=small_net(1)), lambda image, at: (image, torch.tensor(at / 10.0)))


@situation
def several_tasks() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        features = module.net(batch["image"]).relu()
        kind = F.cross_entropy(module.kind(features), batch["kind"])
        return kind + F.mse_loss(module.age(features)[:, 0], batch["age"])

    nets = {"net": small_net(16), "kind": nn.Linear(16, 4), "age": nn.Linear(16, 1)}
    return Fit(Module(step, **nets), lambda image, at: {"image": image, "kind": at % 4, "age": torch.tensor(at / 10.0)})


@situation
def segmentation() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, masks = batch
        return F.cross_entropy(module(images), masks)

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    return Fit(Module(step, net=net), lambda image, _: (image, (image.mean(0) > 0.5).long()))


# The whole batch


@situation
def weights_of_samples() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels, weights = batch
        return (F.cross_entropy(module(images), labels, reduction="none") * weights).mean()

    return Fit(Module(step, net=small_net()), lambda image, at: (image, at % 4, torch.tensor(1.0 + at % 3)))


@situation
def nested_dictionaries() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        assert isinstance(batch["meta"]["path"][0], str)
        return F.cross_entropy(module(batch["data"]["image"]), batch["data"]["label"])

    def row(image: Tensor, at: int) -> dict[str, Any]:
        return {"data": {"image": image, "label": at % 4}, "meta": {"path": f"face-{at}.png", "site": "north"}}

    return Fit(Module(step, net=small_net()), row)


@situation
def batch_without_labels() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        return F.mse_loss(module(batch).view_as(batch), batch)

    net = nn.Sequential(small_net(16), nn.ReLU(), nn.Linear(16, 3 * SIDE**2))
    return Fit(Module(step, net=net), lambda image, _: image)


@situation
def masked_images() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        (images,) = batch
        mask = (torch.rand(len(images), 1, SIDE, SIDE, device=images.device) > 0.5).float()
        return ((module(images * mask) - images) * (1 - mask)).square().mean()

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    return Fit(Module(step, net=net), lambda image, _: (image,))


def contrast(first: Tensor, second: Tensor) -> Tensor:
    scores = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / 0.2
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


@situation
def two_views() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        (first, second), _ = batch
        return contrast(module(first), module(second))

    def row(image: Tensor, at: int) -> Any:
        return (image, (0.8 * image).flip(-1)), at % 4

    return Fit(Module(step, net=small_net(8)), row)


@situation
def teacher_and_student() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        first, second = batch
        with torch.no_grad():
            target = module.teacher(second)
        return 2 - 2 * F.cosine_similarity(module.predictor(module.net(first)), target).mean()

    net, teacher = small_net(8), small_net(8).requires_grad_(False)
    return Fit(
        Module(step, net=net, predictor=nn.Linear(8, 8), teacher=teacher), lambda image, _: (image, image.flip(-1))
    )


@situation
def several_crops() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        crops, labels = batch  # (B, crops, C, H, W)
        logits = module(crops.flatten(0, 1)).view(*crops.shape[:2], -1).mean(1)
        return F.cross_entropy(logits, labels)

    def row(image: Tensor, at: int) -> Any:
        return torch.stack([image, image.flip(-1), image.flip(-2)]), at % 4

    return Fit(Module(step, net=small_net()), row)


@situation
def crops_of_several_sizes() -> Fit:
    """Two large and two small crops in a list, as self-distillation takes them."""

    def step(module: Any, batch: Any) -> Tensor:
        crops, _ = batch
        outputs = [module(F.interpolate(crop, size=SIDE)) for crop in crops]
        return contrast(outputs[0], outputs[1]) + contrast(outputs[2], outputs[0]) + contrast(outputs[3], outputs[1])

    def row(image: Tensor, at: int) -> Any:
        half = SIDE // 2
        return [image, image.flip(-1), image[:, :half, :half], image[:, half:, half:]], at % 4

    return Fit(Module(step, net=small_net(8)), row)


class MomentumEncoder(Module):
    """Keeps a queue of earlier keys, and an encoder that follows the trained one inside the step."""

    def __init__(self, step: Step) -> None:
        super().__init__(step, net=small_net(8), key=small_net(8).requires_grad_(False))
        self.register_buffer("queue", F.normalize(torch.randn(16, 8), dim=1))


@situation
def momentum_encoder() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        query = F.normalize(module.net(batch[0]), dim=1)
        with torch.no_grad():
            for trained, follower in zip(module.net.parameters(), module.key.parameters(), strict=True):
                follower.mul_(0.9).add_(trained, alpha=0.1)
            key = F.normalize(module.key(batch[1]), dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ module.queue.T.clone()], 1) / 0.2
        with torch.no_grad():
            module.queue.copy_(torch.cat([key, module.queue])[: len(module.queue)])
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    return Fit(MomentumEncoder(step), lambda image, _: (image, image.flip(-1)))


@situation
def stereo() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        features = module.net(batch["left"]) - module.net(batch["right"])
        return F.mse_loss(module.depth(features)[:, 0], batch["depth"])

    def row(image: Tensor, at: int) -> Any:
        return {"left": image, "right": image.roll(1, -1), "depth": torch.tensor(at / 10.0)}

    return Fit(Module(step, net=small_net(8), depth=nn.Linear(8, 1)), row)


@situation
def bytes_in_the_step() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module(images.float() / 255), labels)

    return Fit(Module(step, net=small_net()), lambda image, at: ((image * 255).byte(), at % 4))


def as_bytes(image: Tensor, at: int) -> tuple[Tensor, int]:
    return (image * 255).byte(), at % 4


@situation
def bytes_where_they_are_found() -> Fit:
    """The step scales its images where they are bytes, and leaves others as they are."""

    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return F.cross_entropy(module(images), labels)

    return Fit(Module(step, net=small_net()), as_bytes)


@situation
def bytes_by_torchvision() -> Fit:
    from torchvision.transforms import v2

    convert = v2.Compose([v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])

    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module(convert(images)), labels)

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(2 * SIDE**2, 4)
    )
    return Fit(Module(step, net=net), as_bytes)


@situation
def bits_of_bytes() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module((images >> 2).float() / 63), labels)

    return Fit(Module(step, net=small_net()), as_bytes)


class ConvertsOnTransfer(Module):
    """Converts bytes where Lightning hands batches over."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return images.float() / 255, labels


@situation
def bytes_in_the_transfer() -> Fit:
    module = ConvertsOnTransfer(classify, net=small_net())
    return Fit(module, lambda image, at: ((image * 255).byte(), at % 4))


@situation
def combined_loaders() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        (images, labels), unlabelled = batch["labelled"], batch["unlabelled"]
        consistency = F.mse_loss(module(unlabelled), module(unlabelled.flip(-1)))
        return F.cross_entropy(module(images), labels) + consistency

    def loader(rows: Rows) -> Any:
        plain = DataLoader(Rows(rows.images.flip(0), lambda image, _: image), batch_size=BATCH)
        return CombinedLoader({"labelled": DataLoader(rows, batch_size=BATCH), "unlabelled": plain}, "max_size_cycle")

    return Fit(Module(step, net=small_net()), labelled, loader=loader)


@dataclass
class Scan:
    """A batch of a class of the user's, with arrays and pictures beside the images."""

    image: Tensor
    label: Tensor
    weight: Any
    originals: list[Any]

    def to(self, *_: Any, **__: Any) -> Scan:
        return self


@situation
def batches_of_a_dataclass_with_arrays() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        losses = F.cross_entropy(module(batch.image), batch.label, reduction="none")
        return (losses * torch.from_numpy(batch.weight).float()).mean()

    def collate(rows: list[Any]) -> Scan:
        images, labels = torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])
        return Scan(images, labels, np.arange(1.0, 1 + len(rows)), [image.permute(1, 2, 0).numpy() for image in images])

    return Fit(
        Module(step, net=small_net()),
        labelled,
        loader=lambda rows: DataLoader(rows, batch_size=BATCH, collate_fn=collate),
    )


@situation
def entries_changed_in_place() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels, weights = batch
        images.mul_(2).sub_(1)
        weights *= 2
        return (F.cross_entropy(module(images), labels, reduction="none") * weights).mean()

    return Fit(Module(step, net=small_net()), lambda image, at: (image, at % 4, torch.tensor(1.0 + at % 3)))


@situation
def iterable_data() -> Fit:
    return Fit(
        Module(classify, net=small_net()), labelled, loader=lambda rows: DataLoader(Stream(rows), batch_size=BATCH)
    )


@situation
def detection() -> Fit:
    """Images of different sizes in a list, boxes in dictionaries, as torchvision's detectors take them."""

    def step(module: Any, batch: Any) -> Tensor:
        images, targets = batch
        losses = []
        for image, target in zip(images, targets, strict=True):
            found = module.net(image[None]).mean((2, 3))[0]
            losses.append(
                F.smooth_l1_loss(found[:4], target["boxes"][0] / SIDE)
                + F.cross_entropy(found[None, 4:], target["labels"])
            )
        return torch.stack(losses).mean()

    def row(image: Tensor, at: int) -> Any:
        image = image[:, : SIDE - 2 * (at % 2)]
        return image, {"boxes": torch.tensor([[2.0, 2, 10, 12]]), "labels": torch.tensor([at % 4])}

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def loader(rows: Rows) -> Any:
        return DataLoader(
            rows, batch_size=BATCH, collate_fn=lambda entries: tuple(map(list, zip(*entries, strict=True)))
        )

    return Fit(Module(step, net=net), row, loader=loader)


@situation
def detection_of_one_size() -> Fit:
    fit = detection()
    return Fit(fit.module, lambda image, at: (image, fit.row(image, at)[1]), loader=fit.loader)


# Augmentation inside the step


@situation
def mixup() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        share, order = torch.rand((), device=images.device), torch.randperm(len(images), device=images.device)
        logits = module(share * images + (1 - share) * images[order])
        return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[order])

    return Fit(Module(step, net=small_net()), labelled)


@situation
def cutmix_with_numpy() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        left, order = np.random.randint(2, SIDE - 2), np.random.permutation(len(images))  # noqa: NPY002
        mixed = images.clone()
        mixed[..., left:] = images[order][..., left:]
        logits = module(mixed)
        share = left / SIDE
        return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[order])

    return Fit(Module(step, net=small_net()), labelled)


# Adapters and other people's networks


class LowRank(nn.Module):
    """A frozen linear layer with a trained update of low rank."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(layer.in_features, rank, bias=False),
            nn.Linear(rank, layer.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@situation
def low_rank_adapters() -> Fit:
    net = nn.Sequential(
        nn.Flatten(), LowRank(nn.Linear(3 * SIDE**2, 32)), nn.ReLU(), LowRank(nn.Linear(32, 32)), nn.Linear(32, 4)
    )
    return Fit(Module(classify, net=net), labelled)


@situation
def head_beside_frozen_layers() -> Fit:
    net = nn.Sequential(small_net(32).requires_grad_(False), nn.ReLU(), nn.Linear(32, 4))
    return Fit(Module(classify, net=net), labelled)


@situation
def peft_adapters() -> Fit:
    from peft import LoraConfig, get_peft_model

    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 32), nn.ReLU(), nn.Linear(32, 4))
    config = LoraConfig(r=4, target_modules=["1"], modules_to_save=["3"])
    return Fit(Module(classify, net=get_peft_model(net, config)), labelled)


@situation
def torchvision_vit() -> Fit:
    from torchvision.models import VisionTransformer

    net = VisionTransformer(
        image_size=SIDE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4
    )
    return Fit(Module(classify, net=net), labelled)


@situation
def torchvision_swin() -> Fit:
    from torchvision.models import SwinTransformer

    sizes = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return Fit(Module(classify, net=SwinTransformer(**sizes, num_classes=4)), labelled)


@situation
def timm_model() -> Fit:
    import timm

    net = timm.create_model("resnet10t", pretrained=False, num_classes=4)
    return Fit(Module(classify, net=net), labelled, shape=(32, 32))


@situation
def transformers_vit() -> Fit:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=4,
    )

    def step(module: Any, batch: Any) -> Tensor:
        return module.net(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss

    return Fit(
        Module(step, net=ViTForImageClassification(config)), lambda image, at: {"pixel_values": image, "labels": at % 4}
    )


@situation
def group_norm() -> Fit:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Linear(2 * SIDE**2, 4)
    )
    return Fit(Module(classify, net=net), labelled)


@situation
def sync_batch_norm() -> Fit:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(2 * SIDE**2, 4))
    return Fit(Module(classify, net=net), labelled, trainer={"sync_batchnorm": True})


@situation
def gradient_checkpointing() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module.head(checkpoint(module.net, images, use_reentrant=False)), labels)

    return Fit(Module(step, net=small_net(16), head=nn.Linear(16, 4)), labelled)


@situation
def compiled_module() -> Fit:
    return Fit(Module(classify, net=torch.compile(small_net(), backend="aot_eager")), labelled)  # type: ignore[arg-type]


@situation
def weights_changed_in_the_step() -> Fit:
    """Clips weights without telling autograd, and adds noise to them."""

    def step(module: Any, batch: Any) -> Tensor:
        for weight in module.net.parameters():
            weight.data.clamp_(-0.1, 0.1)
            weight.data.add_(0.05 * torch.randn_like(weight))
        return classify(module, batch)

    return Fit(Module(step, net=small_net()), labelled)


class DecaysInHook(Module):
    """Changes its weights before each step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.mul_(0.5)


@situation
def weights_changed_in_a_hook() -> Fit:
    return Fit(DecaysInHook(classify, net=small_net()), labelled)


# Trainer


class MovingAverage(Callback):
    """Keeps an exponential average of the weights beside the module."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        with torch.no_grad():
            now = {n: p.clone() for n, p in pl_module.named_parameters()}
            kept = getattr(self, "kept", now)
            self.kept = {n: 0.9 * kept[n] + 0.1 * p for n, p in now.items()}


@situation
def averages_of_weights() -> Fit:
    callbacks = [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), MovingAverage()]
    return Fit(Module(classify, net=small_net()), labelled, trainer={"callbacks": callbacks, "max_epochs": 2})


class TwoOptimizers(Module):
    """Body and head have optimizers of their own."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = F.cross_entropy(self.head(self.net(images)), labels)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.net, self.head)], []


@situation
def several_optimizers() -> Fit:
    return Fit(TwoOptimizers(classify, net=small_net(16), head=nn.Linear(16, 4)), labelled)


class WithTuners(Module):
    """Has what the finders of learning rate and batch size set."""

    def __init__(self, *args: Any, **nets: nn.Module) -> None:
        super().__init__(*args, **nets)
        self.lr, self.batch_size = 0.01, BATCH


@situation
def finders() -> Fit:
    from pytorch_lightning.callbacks import LearningRateFinder

    callbacks = [LearningRateFinder(num_training_steps=3)]
    return Fit(WithTuners(classify, net=small_net()), labelled, trainer={"callbacks": callbacks})


# Shapes and ranges


def of_channels(channels: int) -> Callable[[], Fit]:
    def make() -> Fit:
        return Fit(Module(classify, net=small_net(channels=channels)), labelled, channels=channels)

    make.__name__ = f"channels_{channels}"
    return make


for number in (1, 6, 13):
    situation(of_channels(number))


@situation
def half_precision_images() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module(images.float()), labels)

    return Fit(Module(step, net=small_net()), lambda image, at: (image.half(), at % 4))


@situation
def images_from_0_to_255() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module(images / 255), labels)

    return Fit(Module(step, net=small_net()), lambda image, at: (image * 255, at % 4))


@situation
def not_square() -> Fit:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 10, 4))
    return Fit(Module(classify, net=net), labelled, shape=(12, 20))


@situation
def channels_last() -> Fit:
    return Fit(
        Module(classify, net=small_net().to(memory_format=torch.channels_last)),
        lambda image, at: (image[None].to(memory_format=torch.channels_last)[0], at % 4),
    )


@situation
def channels_last_through_dropout() -> Fit:
    def collate(rows: list[Any]) -> Any:
        images, labels = torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])
        return images.to(memory_format=torch.channels_last), labels

    net = nn.Sequential(nn.Dropout(0.2), small_net())
    return Fit(
        Module(classify, net=net), labelled, loader=lambda rows: DataLoader(rows, batch_size=BATCH, collate_fn=collate)
    )


@situation
def height_width_channels() -> Fit:
    def step(module: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module(images.permute(0, 3, 1, 2)), labels)

    return Fit(Module(step, net=small_net()), lambda image, at: (image.permute(1, 2, 0).contiguous(), at % 4))


@situation
def large_scans() -> Fit:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 7, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, 4, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    return Fit(Module(classify, net=net), labelled, channels=1, shape=(512, 512))


# Running


def images_for(fit: Fit, pixels: Tensor, count: int) -> Tensor:
    """Return faces of the wanted size and channels, (count, C, H, W) in [0, 1]."""
    faces = F.interpolate(pixels[:count], size=fit.shape, mode="bilinear", antialias=True)
    repeats = -(-fit.channels // faces.shape[1])
    shades = torch.linspace(1, 0.5, repeats * faces.shape[1])[: fit.channels]
    return (faces.repeat(1, repeats, 1, 1)[:, : fit.channels] * shades[:, None, None]).clamp(0, 1)


def train(fit: Fit, pixels: Tensor, *callbacks: Callback, seed: int = 0) -> None:
    """Train `STEPS` steps on faces."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    rows = Rows(images_for(fit, pixels, STEPS * BATCH), fit.row)
    data = DataLoader(rows, batch_size=BATCH) if fit.loader is None else fit.loader(rows)
    arguments: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    arguments |= {"enable_progress_bar": False, "enable_model_summary": False} | fit.trainer
    arguments["callbacks"] = [*arguments.get("callbacks", []), *callbacks]
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(default_root_dir=folder, **arguments).fit(fit.module, data)


def audit(fit: Fit, pixels: Tensor, *, evaluations: int, seed: int = 0) -> GradAudit:
    """Train and audit every step in line."""
    settings = AuditSettings(budget=Budget(evaluations=evaluations), analysis=False, confirm=0)
    callback = GradAudit(every_n_steps=1, executor="inline", settings=settings, **fit.audit)
    train(fit, pixels, callback, seed=seed)
    return callback
