"""Closed form for vision transformers: the patches from the gradients of their embedding and of its positions.

Tokens are z_n = E p_n + b + pos_n for patches p_n and *learned* positions pos_n. For one image the gradient of the
positions is A_n = ∂ℓ/∂pos_n = ∂ℓ/∂z_n, and that of the embedding is ∂ℓ/∂E = Σ_n A_n p_nᵀ = Aᵀ P: linear equations for
the patches P, whatever follows the embedding (norms, residual paths, any attention, any head), at any stage of
training. They settle all patches when A (N positions x D channels) has rank N, so N <= D; where a LayerNorm without
its mean follows on every path (pre-norm), the rows of A are orthogonal to the constant vector, so N < D.

APRIL (Lu et al., arXiv:2112.14087) goes from A through the gradients of the first block's queries, keys and values,
so it needs a block without LayerNorm and residual path. Its equations have the same matrix Aᵀ: it cannot help where
rank is missing here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.closed_form.image_layer import ImageLayer, fit_pixel_maps, random_images
from lightning_gradaudit.attacks.closed_form.verification import VERIFIED_SQUARED_ERROR, simulated_error, solution
from lightning_gradaudit.attacks.labels.head import placeholder_labels
from lightning_gradaudit.attacks.labels.recovery import known_labels
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.tensors import Tensors

_KINDS = (nn.Conv2d, nn.Linear)
_TABLES = (nn.Embedding, nn.ParameterList, nn.ParameterDict)  # of torch.nn, may hold positions; its other layers do not


@dataclass(frozen=True)
class PatchSettings:
    """Settings of `PatchEmbeddingInversion`."""

    most_extra_tokens: int = 8  # class, distillation and register tokens that may stand before the patches
    structure_misfit: float = 0.05  # relative, of ∂ℓ/∂E = Aᵀ P on a known image: a wrong order is above, bf16 is below
    prior_pixel: float = 0.5  # mean of a pixel before anything is known
    prior_deviation: float = 0.25  # its standard deviation
    least_relative_noise: float = 1e-7  # of a gradient
    certified_pixel_error: float = 0.01  # predicted root mean square error up to which an image is certified: 40 dB
    most_pixel_error: float = 0.75 * 0.25  # the same, above which nothing is claimed; of the prior's deviation
    consistent_misfit: float = 1e-3  # relative, of redundant equations, which verifies a solution


SETTINGS = PatchSettings()


@dataclass(frozen=True)
class PatchEmbedding:
    """A layer that embeds patches of the image, and the learned positions added to its outputs.

    Attributes:
        layer: How the layer's inputs depend on the pixels.
        module: The layer; only its settings are used.
        shape: (C, H, W) of the image.
        position: Name of the position parameter.
        arrangement: Which of the ways to read its rows (see `_list_tables`) fits.
    """

    layer: ImageLayer
    module: nn.Module
    shape: torch.Size
    position: str = ""
    arrangement: int = 0

    def patches(self, layer_input: Tensor) -> Tensor:
        """Cut the layer's flat inputs for one image into patches (N, d)."""
        if isinstance(self.module, nn.Conv2d):
            return F.unfold(layer_input.reshape(1, *self.shape), **_unfold_settings(self.module))[0].T
        return layer_input.reshape(_count_patches(self.module, self.shape), -1)

    def image(self, patches: Tensor, observation: Observation) -> Tensor:
        """Put patches (N, d) together to an image (1, C, H, W) in the model's input space; overlaps are averaged."""
        flat = patches.reshape(1, -1)
        if isinstance(self.module, nn.Conv2d):
            window = _unfold_settings(self.module)
            sums, times = (F.fold(p.T[None], self.shape[1:], **window) for p in (patches, torch.ones_like(patches)))
            flat = (sums / times).reshape(1, -1)
        return self.layer.image(flat.float(), observation)

    def equations(self, gradients: Tensors) -> list[tuple[Tensor, Tensor]]:
        """Return A (N, D) and ∂ℓ/∂E (D, d) in double precision, for every way to read the positions."""
        weight = gradients[self.layer.weight].flatten(1).double()
        count = _count_patches(self.module, self.shape)
        return [(table, weight) for table in _list_tables(gradients[self.position].double(), count, len(weight))]


def _unfold_settings(convolution: nn.Conv2d) -> dict[str, tuple[int, ...]]:
    return {name: getattr(convolution, name) for name in ("kernel_size", "stride", "padding", "dilation")}


def _count_patches(module: nn.Module, shape: torch.Size) -> int:
    """Return the number of patches that a layer would cut an image into; 0 when it cannot."""
    if isinstance(module, nn.Linear):
        count, rest = divmod(shape.numel(), module.in_features)
        return 0 if rest else count
    if not isinstance(module, nn.Conv2d) or module.groups > 1 or module.in_channels != shape[0]:
        return 0
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return 0
    covered = torch.ones((1, *shape))
    try:
        patches = F.unfold(covered, **_unfold_settings(module))
    except RuntimeError:  # a kernel larger than the image
        return 0
    seen = F.fold(torch.ones_like(patches), shape[1:], **_unfold_settings(module))
    return patches.shape[2] if bool((seen > 0).all()) else 0


def _list_tables(position: Tensor, count: int, width: int) -> list[Tensor]:
    """List all ways to read `count` rows of `width` channels out of a position parameter."""
    squeezed, tables = position.squeeze(), []
    if squeezed.ndim in (2, 3) and squeezed.shape[-1] == width:
        tables.append(squeezed.reshape(-1, width))
    if squeezed.ndim in (2, 3) and squeezed.shape[0] == width:
        tables.append(squeezed.reshape(width, -1).T)
    return [t[i : i + count] for t in tables for i in range(min(len(t) - count, SETTINGS.most_extra_tokens) + 1)]


def patch_layers(observation: Observation, generator: torch.Generator) -> list[PatchEmbedding]:
    """List pairs of a layer that sees the image in patches and a parameter that could be its positions.

    A layer counts when it ran once, on pixels in any order and up to an affine map of each (a normalisation). Where
    shapes leave no pair, no forward pass is made.
    """
    modules = list(observation.client.module.named_modules())
    stock = [(n, m) for n, m in modules if type(m).__module__.startswith("torch.nn.") and not isinstance(m, _TABLES)]
    owned = {f"{name}.{own}" for name, module in stock for own, _ in module.named_parameters(recurse=False)}
    free = [name for name in observation.gradients if name not in owned]
    pairs = [
        (name, module, position)
        for name, module in modules
        if isinstance(module, _KINDS) and f"{name}.weight" in observation.gradients
        for position in free
        if (count := _count_patches(module, observation.input_shape)) > 1
        and _list_tables(observation.gradients[position], count, len(observation.gradients[f"{name}.weight"]))
    ]
    names, pixels = {name for name, _, _ in pairs}, observation.input_shape.numel()
    if not names:
        return []
    layers = fit_pixel_maps(
        observation, generator, lambda call: call.name in names and call.inputs.numel() == pixels, kinds=_KINDS
    )
    fits = {layer.name: layer for layer in layers}
    return [
        PatchEmbedding(fits[name], module, observation.input_shape, position)
        for name, module, position in pairs
        if name in fits
    ]


def choose_embedding(
    layers: list[PatchEmbedding], observation: Observation, generator: torch.Generator
) -> PatchEmbedding | None:
    """Return the pair whose equations hold in the gradient of a random image; simulates one gradient.

    This tests kind and order of the tokens, and everything between the gradient and what is shared, without the truth.
    """
    image = random_images(observation, generator)
    gradients = observation.simulate(image, placeholder_labels(observation))
    best, found = SETTINGS.structure_misfit, None
    for each in layers:
        patches = each.patches(each.layer.inputs(image)).double()
        for arrangement, (positions, weight) in enumerate(each.equations(gradients)):
            misfit = float((weight - positions.T @ patches).norm() / weight.norm().clamp_min(1e-30))
            if misfit < best and bool(weight.any()):
                best, found = misfit, replace(each, arrangement=arrangement)
    return found


@dataclass(frozen=True)
class PatchSolution:
    """What the equations say of the image.

    Attributes:
        image: (1, C, H, W) in the model's input space.
        error: Predicted root mean square error of its pixels, of a range of 1; without truth.
        misfit: Relative misfit of the equations, infinite where there are no more of them than unknowns.
        conditioning: Smallest singular value of A over the largest.
    """

    image: Tensor
    error: float
    misfit: float
    conditioning: float


def solve(embedding: PatchEmbedding, observation: Observation) -> PatchSolution:
    """Solve ∂ℓ/∂E = Aᵀ P for the patches, in double precision, by the best linear estimate.

    The prior of a pixel is 0.5 ± 0.25, and the noise of the equations is their misfit where they are redundant
    (D > N). So directions that rounding or noise hides stay grey instead of exploding, and the error is predicted.
    """
    positions, weight = embedding.equations(observation.gradients)[embedding.arrangement]
    pixels = torch.full((2, *observation.input_shape), SETTINGS.prior_pixel, device=weight.device)
    pixels[1] += SETTINGS.prior_deviation
    inputs = [embedding.layer.inputs(image) for image in observation.normalization.from_pixels(pixels)]
    grey, brighter = (embedding.patches(each).double() for each in inputs)
    prior = (brighter - grey).square().mean(0)  # (d,) variance
    rest = weight - positions.T @ grey
    left, values, right = torch.linalg.svd(positions.T, full_matrices=False)
    explained = left.T @ rest
    unexplained = (rest - left @ explained).square().sum()
    count, width = positions.shape
    noise = (SETTINGS.least_relative_noise * weight).square().mean()
    if width > count:
        noise = noise.maximum(unexplained / (width - count) / weight.shape[1])
    # A is as noisy as the rest: noise alone would give singular values of about its norm in D channels.
    power = (values.square() - noise * width).clamp_min(0)[:, None] * prior
    trusted = power / (power + noise).clamp_min(1e-300)
    patches = grey + right.T @ (trusted * explained / values.clamp_min(1e-300)[:, None])
    unknown = (1 - trusted).mean(1).sum() + max(count - width, 0)
    return PatchSolution(
        image=embedding.image(patches, observation),
        error=SETTINGS.prior_deviation * float(unknown / count) ** 0.5,
        misfit=float(unexplained.sqrt() / weight.norm()) if width > count else torch.inf,
        conditioning=float(values[-1] / values[0]) if width >= count else 0.0,
    )


@dataclass(frozen=True, kw_only=True)
class PatchEmbeddingInversion(Attack):
    """Solve for the patches of one image that a vision transformer embeds with learned positions.

    Applies to a convolution or a linear layer that sees the image in patches (also through a normalisation inside the
    model), whose outputs get a learned position each: torchvision's `VisionTransformer`, modules in timm's manner with
    a parameter `pos_embed`, tables in an `nn.Embedding`, channels first or last, with or without class and register
    tokens in front, pooled heads. Layers are found by their shapes and by probing the simulator, never by name. Does
    not apply where positions are fixed, frozen, relative or rotary, where a norm stands between pixels and embedding or
    between embedding and positions, where several linear layers or a convolutional stem make the tokens, and to batches
    of more than one image, whose position gradients are sums.

    The answer is `certified`, without the truth, when its predicted error is below 0.01 of the pixel range and either
    its simulated gradient is the observed one or the redundant equations agree; under noise and in reduced precision
    it is an estimate. With fewer channels than patches the missing directions stay grey.
    """

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        def refuse(reason: str, evaluations: int = 0) -> Reconstruction:
            return Reconstruction.not_applicable(observation, reason, evaluations=evaluations)

        if observation.batch_size > 1:
            return refuse("one image alone: in a batch the gradients of the positions add up over the images")
        layers = patch_layers(observation, generator)
        if not layers:
            return refuse("no layer that shares its gradient embeds patches of the image beside learned positions")
        if not any(bool(observation.gradients[each.layer.weight].any()) for each in layers):
            return refuse("the gradient of the patch embedding is zero")
        meter = Meter(budget)
        meter.spend()
        embedding = choose_embedding(layers, observation, generator)
        if embedding is None:
            return refuse("no parameter acts as the positions of the embedded patches", 1)
        solved = solve(embedding, observation)
        if not solved.error < SETTINGS.most_pixel_error:
            count, width = embedding.equations(observation.gradients)[0][0].shape
            return refuse(
                f"{count} patches from {width} channels, singular values down to {solved.conditioning:.1e} of the "
                f"largest: pixels would be off by {solved.error:.2f}",
                1,
            )
        low, high = observation.box
        image, labels = solved.image.clamp(low, high), known_labels(observation, generator=generator).labels
        error = simulated_error(observation, image, labels, meter)
        # A saturated softmax leaves rounding, which simulation cannot repeat; it does not affect the equations.
        verified = error < VERIFIED_SQUARED_ERROR or solved.misfit < SETTINGS.consistent_misfit
        exact = solved.error < SETTINGS.certified_pixel_error and verified
        reason = (
            f"{'verified' if exact else 'not verified'}: predicted error of a pixel {solved.error:.1e}, "
            f"smallest singular value {solved.conditioning:.1e} of the largest"
        )
        return solution(image, labels, error, torch.tensor([exact], device=image.device), meter, reason)
