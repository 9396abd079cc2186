"""One step to be audited: what the adversary holds, beside the truth that only the auditor may use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import InvalidInputError, NonFiniteGradientError
from lightning_gradaudit.simulation.batch import Batch, BatchLayout, SampleId
from lightning_gradaudit.simulation.batch_entries import join_entries
from lightning_gradaudit.simulation.batch_statistics import keeps_statistics
from lightning_gradaudit.simulation.defences import Defence, apply_defences, derived_seed
from lightning_gradaudit.simulation.layer_trace import record_inputs
from lightning_gradaudit.simulation.normalization import Normalization
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.sharing import SharingProtocol
from lightning_gradaudit.simulation.threat_model import ThreatModel, check_public_images
from lightning_gradaudit.simulation.training_step import Loss, TrainingStep
from lightning_gradaudit.simulation.trials import find_image_use
from lightning_gradaudit.utils.files import load_checkpoint, regular_file
from lightning_gradaudit.utils.tensors import Tensors, global_norm


@dataclass(frozen=True)
class SelfTest:
    """Whether the simulator describes the training step.

    Attributes:
        error: Relative error between the observed gradient and the simulated one after the declared defences;
            about 0 (rounding), or the audit is invalid.
        defence_gap: The same without the declared defences: how much the defences changed the gradient.
        similarity: Cosine between the undefended simulated gradient and the observed one: what an adversary who
            finds the truth reaches.
        noise: Noise multiplier measured in the observed gradient; NaN without DP-SGD.
        declared_noise: Noise multiplier that DP-SGD was set to; NaN without.
        statistics: Largest distance of the truth's batch statistics from those that shared buffers give away, beyond
            rounding (`LayerStatistics.error`); infinite where only one of both has a layer's; 0 without such buffers.
    """

    error: float
    defence_gap: float
    similarity: float
    noise: float = math.nan
    declared_noise: float = math.nan
    statistics: float = 0.0

    @property
    def worst(self) -> float:
        """The larger of both errors; NaN where either is."""
        return float(np.maximum(self.error, self.statistics))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A sampled training step.

    Attributes:
        step: The logger's step at capture.
        observation: All an attack may see.
        truth: The real batch, for scoring only.
        seed: Seeds the random numbers of the client's defences; secret to the adversary.
        protocol: As the observation's, with the random states before each forward pass.
        noiseless: What was shared before its client added noise with a generator of its own (DP-SGD), else None.
    """

    step: int
    observation: Observation
    truth: Batch
    protocol: SharingProtocol
    seed: int = 0
    noiseless: Tensors | None = None

    @classmethod
    def capture(
        cls,
        *,
        step: int,
        client: TrainingStep,
        gradients: Tensors,
        parameters: Tensors,
        buffers: Tensors,
        truth: Batch,
        threat_model: ThreatModel,
        normalization: Normalization,
        protocol: SharingProtocol,
        seed: int = 0,
        noiseless: Tensors | None = None,
        buffers_after: Tensors | None = None,
    ) -> Snapshot:
        """Make a snapshot of a captured gradient: apply the defences, and withhold what the adversary does not know.

        `truth` and `normalization` are of the model's input space; from here on images are divided by `client.unit`.

        Raises:
            InvalidInputError: When images or buffers that the threat model gives to the adversary are unfit or missing.
        """
        if threat_model.shares_buffers and buffers and buffers_after is None:
            raise InvalidInputError(
                "buffers_after: expected the buffers after the step, which leave with what is shared, got None. Pass "
                "them, or ThreatModel(buffers_shared=False) where the client keeps them."
            )
        truth = replace(truth, inputs=truth.inputs / client.unit) if client.unit != 1 else truth
        normalization = normalization.in_units(client.unit)
        public_images = threat_model.held_images
        if public_images is not None:
            check_public_images(public_images, truth.inputs.shape[1:])
        public = protocol.with_known_entries(threat_model.known, truth.inputs.shape[1:])
        public = public if threat_model.dropout_known else public.without_randomness()
        # Targets that are not classes cannot be recovered from a gradient: the adversary is assumed to have them.
        known = threat_model.labels_known or truth.labels.is_floating_point() or truth.labels.ndim != 1
        observation = Observation(
            gradients=threat_model.defend(gradients, seed=seed),
            parameters=parameters,
            buffers=buffers,
            buffers_after=buffers_after if threat_model.shares_buffers else None,
            threat_model=replace(
                threat_model,
                labels_known=known,
                public_images=0 if public_images is None else len(public_images),
                held_images=None,
            ),
            input_shape=truth.inputs.shape[1:],
            batch_size=truth.inputs.shape[0],
            normalization=normalization,
            label_shape=truth.labels.shape[1:],
            label_dtype=truth.labels.dtype,
            input_dtype=truth.inputs.dtype,
            labels=truth.labels if known else None,
            public_images=public_images,
            client=client,
            protocol=public if threat_model.order_known else public.without_order(),
        )
        return cls(step, observation, truth, protocol, seed, noiseless)

    @classmethod
    def from_batch(
        cls,
        model: nn.Module,
        batch: Any,
        *,
        loss: Loss | None = None,
        mean: Any = None,
        std: Any = None,
        mode: Literal["train", "eval", "as_is"] = "eval",
        labels_known: bool = False,
        defences: tuple[Defence, ...] = (),
        buffers_shared: bool = False,
        public_images: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
        sample_id: SampleId | None = None,
    ) -> Snapshot:
        """Make a snapshot without a Trainer: the gradient of `model` on `batch` at its present weights.

        Args:
            model: Any module; a LightningModule needs no `loss`. It is left exactly as it was.
            batch: (images, labels) or a mapping that holds both; images (B, C, H, W) floating point.
            loss: `loss(model(images), labels)`, a scalar.
            mean, std: Normalisation that was applied to pixels in [0, 1], per channel; None: none.
            mode: Whether the client computes in train or eval mode, or as each submodule stands.
            labels_known: Give the labels to the adversary.
            defences: What the client does to the gradient before it leaves.
            buffers_shared: Give the buffers after the step to the adversary (see `ThreatModel`).
            public_images: (M, C, H, W) pixels in [0, 1] of the same kind that the adversary holds, none of them in the
                batch; they help to recover labels.
            seed: Seeds defences and dropout.
            step: Number to file the audit under.
            sample_id: Where the batch holds names of its images, for the record: an entry's key or index, or a function
                of the batch.

        Raises:
            InvalidInputError: On a batch, range, loss or model that cannot be audited, naming the argument.

        Example:
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
            >>> batch = torch.rand(1, 1, 8, 8), torch.tensor([1])
            >>> Snapshot.from_batch(model, batch, loss=nn.functional.cross_entropy).observation.shape
            (1, 1, 8, 8)
        """
        normalization = Normalization.of_batch(mean, std, BatchLayout.of(batch, sample_id).images[0].dtype)

        def make_step(layout: BatchLayout, truth: Batch) -> TrainingStep:
            step = TrainingStep(model, loss=loss, layout=layout, like=truth)
            if mode != "as_is":
                step.module.train(mode == "train")
            return step

        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        use = find_image_use(batch, sample_id, make_step, weights, buffers)
        layout = BatchLayout.of(batch, sample_id, use=use)
        truth = layout.split(batch).copy()
        check_range(normalization, truth.inputs)
        client = make_step(layout, truth)
        client.unit = normalization.unit
        held = 0 if public_images is None else public_images
        threat_model = ThreatModel(
            labels_known=labels_known, defences=defences, public_images=held, buffers_shared=buffers_shared
        )
        return _compute(model, client, truth, threat_model, normalization, seed, step)

    @property
    def truth_pixels(self) -> Tensor:
        """The true images in [0, 1], (B, C, H, W), float32."""
        return self.observation.normalization.to_pixels(self.truth.inputs.float()).clamp(0, 1)

    def self_test(self) -> SelfTest:
        """Compare the observed gradient with the simulator's on the truth (see `SelfTest`)."""
        observation = replace(self.observation, protocol=self.protocol)
        layers = self._layers_with_statistics()
        with record_inputs(observation.client.module, layers, in_train_mode=True) as seen:
            clean = shared = self._simulate()
        statistics = _statistics_error(observation, seen)
        if self.protocol.clip is not None or self.protocol.private is not None:
            clean = replace(self, protocol=self.protocol.undefended())._simulate()
        defended = apply_defences(observation.threat_model.defences, shared, seed=self.seed)
        dot = sum((clean[name] * g).sum() for name, g in observation.gradients.items())
        cosine = float(dot / (global_norm(clean) * global_norm(observation.gradients)).clamp_min(1e-30))
        gap = observation.relative_error(clean)
        if self.noiseless is None or self.protocol.private is None:
            return SelfTest(observation.relative_error(defended), gap, cosine, statistics=statistics)
        # DP-SGD draws noise from its own generator, so the simulator is compared with the gradient before the noise.
        error = replace(observation, gradients=self.noiseless).relative_error(shared)
        private = self.protocol.private
        noise = {name: g - self.noiseless[name] for name, g in observation.gradients.items()}
        coordinates = sum(g.numel() for g in noise.values())
        measured = float(global_norm(noise)) / coordinates**0.5 * private.divisor / private.max_norm
        return SelfTest(error, gap, cosine, measured, private.noise_multiplier, statistics)

    def _layers_with_statistics(self) -> list[str]:
        """Return the layers whose buffers tell batch statistics, where the adversary holds them."""
        if self.observation.buffers_after is None:
            return []
        return [name for name, layer in self.observation.client.module.named_modules() if keeps_statistics(layer)]

    def with_batch_size(self, size: int) -> Snapshot:
        """Return what the client would have shared had it used only the first `size` images of its batch.

        The gradient is recomputed on the replica, so it is as accurate as the self-test of the whole batch.

        Raises:
            InvalidInputError: When the batch is smaller.
        """
        if size > len(self.truth.inputs):
            raise InvalidInputError(
                f"batch_size: what-if batches are taken from the captured one of {len(self.truth.inputs)} images; "
                f"got {size}."
            )
        if size % self.observation.client.layout.views:
            raise InvalidInputError(
                f"batch_size: each sample of the batch has {self.observation.client.layout.views} images, so that a "
                f"what-if batch holds a multiple of it; got {size}."
            )
        truth = Batch(self.truth.inputs[:size], self.truth.labels[:size], self.truth.ids[:size])
        parts = self.protocol.micro_batches
        entries = [part.other for part in parts if part.other is not None]
        other = join_entries(entries).of_size(size) if len(entries) == len(parts) else None
        protocol = SharingProtocol.one_batch(size, parts[0].rng_state, other)
        observation = replace(
            self.observation,
            batch_size=size,
            labels=None if self.observation.labels is None else truth.labels,
            protocol=protocol,
        )
        changed = replace(self, observation=observation, truth=truth, protocol=protocol)
        public = protocol.with_known_entries(observation.threat_model.known, truth.inputs.shape[1:])
        public = public if observation.threat_model.dropout_known else public.without_randomness()
        after: dict[str, Tensor] = {}
        gradients = changed._simulate(after)
        return replace(changed, observation=replace(observation, protocol=public))._share(gradients, after)

    def _simulate(self, buffers_after: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return what the client shares according to the simulator, before random defences."""
        observation = replace(self.observation, protocol=self.protocol)
        return observation.simulate(self.truth.inputs, self.truth.labels, buffers_after=buffers_after)

    def _share(self, gradients: Tensors, buffers_after: Tensors) -> Snapshot:
        """Return the snapshot of a client that shares this gradient after its defences, and its buffers if it does."""
        shared = apply_defences(self.observation.threat_model.defences, gradients, seed=self.seed)
        after = buffers_after if self.observation.threat_model.shares_buffers else None
        return replace(
            self, observation=replace(self.observation, gradients=shared, buffers_after=after, computed_on="")
        )

    def to(self, device: torch.device | str) -> Snapshot:
        """Return the snapshot on another device."""
        noiseless = None if self.noiseless is None else {name: g.to(device) for name, g in self.noiseless.items()}
        return replace(
            self,
            observation=self.observation.to(device),
            truth=self.truth.to(device),
            protocol=self.protocol.to(device),
            noiseless=noiseless,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a file. It holds private images; it is as sensitive as they are."""
        with Path(path).open("wb") as file:
            torch.save(self.to("cpu"), file, pickle_module=cloudpickle)

    @staticmethod
    def load(path: str | PathLike[str], *, trust: bool = False) -> Snapshot:
        """Read a file that `save` wrote.

        Args:
            path: The file.
            trust: Run the code in the file. A snapshot contains the user's model as code, so that none can be loaded
                otherwise. The code can do anything: trust only files whose author you know.

        Raises:
            InvalidInputError: When the file is missing or holds something else, or without `trust`.
        """
        path = regular_file(path)
        if not trust:
            raise InvalidInputError(
                f"path: {path} can only be loaded by running the code that it holds, for a snapshot has its model with "
                "it: pass trust=True (on the command line --trust) if you know who made the file."
            )
        try:
            snapshot = load_checkpoint(path, trust=True, mmap=False)
        except InvalidInputError as error:
            if not isinstance(error.__cause__, (ImportError, AttributeError)):
                raise
            raise InvalidInputError(
                f"path: {path} holds a model of a module that cannot be imported here ({error.__cause__}). Classes of "
                "the script itself travel with the file; for others put their folder on PYTHONPATH."
            ) from error
        if not isinstance(snapshot, Snapshot):
            raise InvalidInputError(f"path: expected a saved Snapshot, {path} holds {type(snapshot).__name__}.")
        return snapshot


def _compute(
    model: nn.Module,
    client: TrainingStep,
    truth: Batch,
    threat_model: ThreatModel,
    normalization: Normalization,
    seed: int,
    step: int,
) -> Snapshot:
    """Make the snapshot of a step whose gradient is computed here, by the replica."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    state = torch.Generator().manual_seed(derived_seed(seed, "forward")).get_state()
    snapshot = Snapshot.capture(
        step=step,
        client=client,
        gradients={name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad},
        parameters=parameters,
        buffers=buffers,
        buffers_after=buffers,  # until the step is simulated
        truth=truth,
        threat_model=replace(threat_model, defences=()),
        normalization=normalization,
        protocol=SharingProtocol.one_batch(len(truth.inputs), state, truth.other),
        seed=seed,
    )
    after: dict[str, Tensor] = {}
    gradients = snapshot._simulate(after)
    if not torch.isfinite(global_norm(gradients)):
        raise NonFiniteGradientError("model: its gradient on this batch holds NaN or infinite values.")
    threat_model = replace(snapshot.observation.threat_model, defences=threat_model.defences)
    observation = replace(snapshot.observation, threat_model=threat_model)
    return replace(snapshot, observation=observation)._share(gradients, after)


def _statistics_error(observation: Observation, seen: Mapping[str, Sequence[Tensor]]) -> float:
    """Return how far the statistics of what went into the layers lie from those of the buffers (see `SelfTest`)."""
    if observation.buffers_after is None:
        return 0.0
    known = observation.statistics
    if set(known) != set(seen):
        return math.inf
    return float(np.max([0.0, *(known[name].error(observation.passes(calls)) for name, calls in seen.items())]))


def check_range(normalization: Normalization, inputs: Tensor) -> None:
    """Refuse images whose pixels do not lie in [0, 1].

    Raises:
        InvalidInputError: Where they do not, or there are none.
    """
    if inputs.numel() == 0:
        raise InvalidInputError(f"batch: expected at least one image, got images of shape {tuple(inputs.shape)}.")
    pixels = normalization.to_pixels(inputs)
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -0.01 and high <= 1.01):
        raise InvalidInputError(
            f"batch: un-normalised images must lie in [0, 1], these span [{low:.2f}, {high:.2f}]. "
            "Pass the mean= and std= they were normalised with (std=1/255 for [0, 255])."
        )
