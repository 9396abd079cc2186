"""The closed form for vision transformers: against the true images, and against the normal equations by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import VisionTransformer

from lightning_gradaudit import Budget, GaussianNoise, Outcome, Snapshot, audit_snapshot
from lightning_gradaudit.analysis import exact_leaks
from lightning_gradaudit.attacks import PatchEmbeddingInversion
from lightning_gradaudit.simulation.observation import Observation

CROSS_ENTROPY = functional.cross_entropy
SIDE, PATCH, COUNT = 25, 5, 25


class Attention(nn.Module):
    """Timm's manner: one linear layer for queries, keys and values, and the fused kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, *, pre_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.pre_norm = pre_norm

    def forward(self, x):
        if self.pre_norm:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Transformer(nn.Module):
    """A small vision transformer for 25 x 25 grey images, in the many ways such modules are written."""

    def __init__(
        self,
        width: int = 48,
        *,
        pre_norm=True,
        tokens=1,
        pooled=False,
        embed="conv",
        position="rows",
        between=None,
        dropout=0.0,
    ) -> None:
        super().__init__()
        self.embed, self.pooled, self.position, self.between = embed, pooled, position, between
        if embed == "conv":
            self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        elif embed == "overlapping":
            self.patches = nn.Conv2d(1, width, 7, stride=5, padding=1)
        elif embed == "stem":
            self.patches = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, width, 5, stride=5))
        else:
            self.patches = nn.Linear(PATCH * PATCH, width)
        self.prefix = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        rows = COUNT + tokens
        shapes = {"rows": (1, rows, width), "flat": (rows, width), "channels first": (1, width, 5, 5)}
        if position in shapes:
            self.pos_embed = nn.Parameter(torch.randn(shapes[position]) * 0.02)
        elif position == "table":
            self.table = nn.Embedding(rows, width)
        else:
            self.register_buffer("pos_embed", torch.randn(1, rows, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, pre_norm=pre_norm) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x):
        if self.embed == "linear":
            cut = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, 1, 5, 5, patch, patch)
            z = self.patches(cut.flatten(4).flatten(1, 3))
        else:
            z = self.patches(x).flatten(2).transpose(1, 2)
        if self.between is not None:
            z = self.between(z)
        if self.position == "channels first":
            z = z + self.pos_embed.flatten(2).transpose(1, 2)
        z = torch.cat([self.prefix.expand(len(x), -1, -1), z], 1)
        if self.position == "table":
            z = z + self.table(torch.arange(z.shape[1]))
        elif self.position != "channels first":
            z = z + self.pos_embed
        z = self.norm(self.blocks(self.dropout(z)))
        return self.head(z.mean(1) if self.pooled else z[:, 0])


class Normalised(nn.Module):
    """Normalise inside the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x - 0.4) / 0.2)


def build(make, *args, seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*args, **kwargs)


def invert(snapshot, evaluations=10):
    return PatchEmbeddingInversion()(
        snapshot.observation, budget=Budget(evaluations=evaluations), generator=torch.Generator().manual_seed(0)
    )


def face(faces, model, i=0, **kwargs):
    images, labels = faces
    return Snapshot.from_batch(model, (images[i : i + 1], labels[i : i + 1]), loss=CROSS_ENTROPY, **kwargs)


def psnr(a, b):
    return float(-10 * torch.log10(((a - b) ** 2).mean().clamp_min(1e-20)))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Transformer(), id="pre-norm with a class token"),
        pytest.param(lambda: Transformer(pre_norm=False), id="post-norm"),
        pytest.param(lambda: Transformer(pooled=True, tokens=0), id="pooled without class token"),
        pytest.param(lambda: Transformer(tokens=5), id="registers"),
        pytest.param(lambda: Transformer(embed="linear"), id="linear layer on patches"),
        pytest.param(lambda: Transformer(embed="overlapping"), id="overlapping patches"),
        pytest.param(lambda: Transformer(position="flat"), id="positions without batch dimension"),
        pytest.param(lambda: Transformer(position="channels first"), id="positions with channels first"),
        pytest.param(lambda: Transformer(position="table"), id="positions in an Embedding"),
        pytest.param(lambda: Normalised(Transformer()), id="a normalisation inside the model"),
        pytest.param(lambda: Transformer(dropout=0.3), id="dropout on the tokens"),
    ],
)
def test_an_image_comes_back_exactly_from_every_way_to_write_the_model(faces, model):
    images = (faces[0][:1] - 0.5) / 0.25
    snapshot = Snapshot.from_batch(
        build(model), (images, faces[1][:1]), loss=CROSS_ENTROPY, mode="train", mean=0.5, std=0.25
    )
    result = invert(snapshot)
    assert psnr(result.inputs, images) > 60
    assert (result.outcome, result.certified.tolist(), result.evaluations) == (Outcome.EXACT, [True], 2)
    assert result.labels.tolist() == [1]


@pytest.mark.parametrize("steps", [0, 20])
def test_torchvisions_transformer_gives_a_colour_image_away_before_and_after_training(faces, steps):
    images = functional.interpolate(faces[0], (24, 24)).repeat(1, 3, 1, 1) * torch.tensor([1, 0.8, 0.6])[:, None, None]
    model = build(
        VisionTransformer,
        image_size=24, patch_size=6, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=32, num_classes=2,
    )  # fmt: skip
    model.heads.head.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        chosen = torch.arange(8 * step, 8 * step + 8) * 7 % 200
        optimizer.zero_grad()
        CROSS_ENTROPY(model(images[chosen]), faces[1][chosen]).backward()
        optimizer.step()
    result = invert(Snapshot.from_batch(model, (images[3:4], faces[1][3:4]), loss=CROSS_ENTROPY))
    assert psnr(result.inputs, images[3:4]) > 60
    assert result.outcome is Outcome.EXACT


def test_the_patches_are_the_least_squares_solution_of_the_two_gradients(faces):
    snapshot = face(faces, build(Transformer))
    gradients = snapshot.observation.gradients
    positions = gradients["pos_embed"][0, 1:].double().numpy()
    weight = gradients["patches.weight"].reshape(48, 25).double().numpy()
    by_hand = np.linalg.lstsq(positions.T, weight, rcond=None)[0].reshape(5, 5, 5, 5).swapaxes(1, 2).reshape(25, 25)
    np.testing.assert_allclose(invert(snapshot).inputs[0, 0].numpy(), by_hand, atol=2e-4)


@pytest.mark.parametrize("relative", [0.0, 1e-6, 1e-5])
def test_the_predicted_error_is_the_true_one(faces, relative):
    snapshots = [face(faces, build(Transformer), i, defences=(GaussianNoise(relative=relative),)) for i in range(4)]
    results = [invert(snapshot) for snapshot in snapshots]
    predicted = [float(result.reason.split("pixel ")[1].split(",")[0]) for result in results]
    true = [float((r.inputs - s.truth.inputs).square().mean().sqrt()) for r, s in zip(results, snapshots, strict=True)]
    mean = [math.exp(sum(map(math.log, errors)) / 4) for errors in (predicted, true)]
    assert 0.5 < mean[0] / mean[1] < 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda g: g.bfloat16().float(), id="rounded to bf16"),
        pytest.param(lambda g: g + 1e-3 * g.norm() / g.numel() ** 0.5 * torch.ones_like(g), id="shifted"),
        pytest.param(lambda g: g * (g.abs() > g.abs().flatten().quantile(0.5)), id="pruned"),
    ],
)
def test_a_damaged_gradient_certifies_nothing(faces, damage):
    snapshot = face(faces, build(Transformer))
    damaged = {name: damage(g) for name, g in snapshot.observation.gradients.items()}
    result = invert(replace(snapshot, observation=replace(snapshot.observation, gradients=damaged)))
    assert result.outcome is not Outcome.EXACT
    assert result.certified is None or not bool(result.certified.any())


@pytest.mark.parametrize("relative", [1e-4, 1e-2, 1.0, 30.0])
def test_noise_certifies_nothing(faces, relative):
    result = invert(face(faces, build(Transformer), defences=(GaussianNoise(relative=relative),)))
    assert result.outcome in (Outcome.CONVERGED, Outcome.NOT_APPLICABLE)
    assert result.certified is None or not bool(result.certified.any())


def test_a_simulated_gradient_that_fits_is_no_proof_where_directions_are_missing(faces):
    """22 channels for 25 patches: the estimate matches the gradient to 1e-6 and is no copy."""
    results = [(s := face(faces, build(Transformer, 20), i), invert(s)) for i in range(4)]
    assert any(result.matching_loss < 1e-4 for _, result in results)
    for snapshot, result in results:
        assert result.outcome is Outcome.CONVERGED
        assert result.certified.tolist() == [False]
        assert psnr(result.inputs, snapshot.truth.inputs) > 15  # and yet far better than grey


def zero_head():
    model = Transformer()
    nn.init.zeros_(model.head.weight)
    return model


def frozen(name):
    model = Transformer()
    model.get_parameter(name).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "says"),
    [
        pytest.param(lambda: Transformer(8), "25 patches from 8 channels", id="more patches than channels"),
        pytest.param(zero_head, "embedding is zero", id="a head of zeros"),
        pytest.param(lambda: frozen("pos_embed"), "beside learned positions", id="frozen positions"),
        pytest.param(lambda: frozen("patches.weight"), "beside learned positions", id="frozen embedding"),
        pytest.param(lambda: Transformer(position="fixed"), "beside learned positions", id="fixed positions"),
        pytest.param(lambda: Transformer(embed="stem"), "beside learned positions", id="a convolutional stem"),
        pytest.param(lambda: Transformer(between=nn.LayerNorm(48)), "acts as the positions", id="a norm between"),
        pytest.param(lambda: Transformer(between=nn.Linear(48, 48)), "acts as the positions", id="two linear layers"),
    ],
)
def test_where_the_equations_are_missing_the_attack_says_so(faces, model, says):
    result = invert(face(faces, build(model)))
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert says in result.reason


def test_a_batch_is_refused_with_the_reason(faces):
    images, labels = faces
    result = invert(Snapshot.from_batch(build(Transformer), (images[:2], labels[:2]), loss=CROSS_ENTROPY))
    assert (result.outcome, result.evaluations) == (Outcome.NOT_APPLICABLE, 0)
    assert "add up over the images" in result.reason


@pytest.mark.parametrize("kind", ["conv", "mlp", "batchnorm", "tied"])
def test_other_networks_cost_no_forward_pass_and_no_random_number(snap, monkeypatch, kind):
    snapshot = snap(kind)
    monkeypatch.setattr(Observation, "loss", lambda *_: pytest.fail("a forward pass"))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    result = PatchEmbeddingInversion()(snapshot.observation, budget=Budget(evaluations=5), generator=generator)
    assert (result.outcome, result.evaluations) == (Outcome.NOT_APPLICABLE, 0)
    assert torch.equal(generator.get_state(), before)


def test_one_evaluation_suffices_where_the_equations_prove_themselves(faces):
    result = invert(face(faces, build(Transformer)), evaluations=1)
    assert (result.evaluations, result.matching_loss, result.outcome) == (1, math.inf, Outcome.EXACT)
    assert psnr(result.inputs, faces[0][:1]) > 60


# The structural certificate


@pytest.mark.parametrize(("relative", "leaks"), [(0.0, True), (1e-6, True), (1.0, False)])
def test_the_certificate_is_what_the_shared_gradient_gives_back(faces, relative, leaks):
    snapshot = face(faces, build(Transformer), defences=(GaussianNoise(relative=relative),))
    assert exact_leaks(snapshot, generator=torch.Generator().manual_seed(0)).tolist() == [leaks]


def test_a_failed_attack_against_it_is_on_record(faces):
    snapshot = face(faces, build(Transformer))
    failed = audit_snapshot(snapshot, closed_forms=False, budget=Budget(evaluations=2))
    assert failed.uncopied_leaks == 1
    solved = audit_snapshot(snapshot, budget=Budget(evaluations=5))
    assert (solved.uncopied_leaks, solved.outcome, solved.evaluations) == (0, Outcome.EXACT, 2)


def test_a_batch_has_no_such_certificate(faces):
    images, labels = faces
    snapshot = Snapshot.from_batch(build(Transformer), (images[:2], labels[:2]), loss=CROSS_ENTROPY)
    assert exact_leaks(snapshot, generator=torch.Generator().manual_seed(0)).tolist() == [False, False]
