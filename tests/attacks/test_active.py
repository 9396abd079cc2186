"""What a dishonest server gets: the algebra of the papers, against images that are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradaudit import Budget, Outcome, Snapshot
from lightning_gradaudit.attacks import (
    CuriousAbandonHonesty,
    Fishing,
    IdentityLayers,
    ImprintInversion,
    LinearLayerInversion,
    RobbingTheFed,
    ScaledHead,
    SuppressedGradients,
)
from lightning_gradaudit.errors import InvalidInputError

LOSS = nn.functional.cross_entropy


@pytest.fixture
def batch(faces):
    return faces[0][:8], torch.arange(8) % 4


@pytest.fixture
def model(build):
    return build("conv", classes=4)


def test_neighbouring_bins_differ_by_one_image(model, batch, faces):
    changed = RobbingTheFed(bins=400)(model, faces[0][100:])
    gradient = Snapshot.from_batch(changed, batch, loss=LOSS).observation.gradients
    weight, bias = gradient["0.rows.weight"].double(), gradient["0.rows.bias"].double()
    brightness = batch[0].flatten(1).mean(1)
    thresholds = -changed[0].rows.bias.detach()
    alone = 0
    for image, level in zip(batch[0], brightness, strict=True):
        at = int((level > thresholds).sum()) - 1  # the last row that the image activates
        inside = (brightness > thresholds[at]) & (brightness <= thresholds[at + 1])
        if int(inside.sum()) == 1:
            alone += 1
            found = (weight[at] - weight[at + 1]) / (bias[at] - bias[at + 1])
            assert torch.allclose(found.float(), image.flatten(), atol=1e-4)
    assert alone >= 6


def test_imprint_inversion_gives_the_images_and_certifies_no_mixture(model, batch, faces, generator):
    for bins in (400, 6):  # with six bins, images share them
        changed = RobbingTheFed(bins=bins)(model, faces[0][100:])
        observation = Snapshot.from_batch(changed, batch, loss=LOSS, labels_known=True).observation
        found = ImprintInversion()(observation, budget=Budget(evaluations=100), generator=generator)
        near = torch.cdist(found.inputs.flatten(1), batch[0].flatten(1)).amin(1) < 1e-2
        assert bool(near[found.certified].all())
        assert int(near.sum()) >= (7 if bins == 400 else 0)
        assert (found.outcome is Outcome.EXACT) == bool(found.certified.all())


def test_imprint_inversion_does_not_apply_to_an_honest_model(build, batch, generator):
    observation = Snapshot.from_batch(build("mlp", classes=4), batch, loss=LOSS).observation
    found = ImprintInversion()(observation, budget=Budget(evaluations=100), generator=generator)
    assert found.outcome is Outcome.NOT_APPLICABLE


def test_trap_weights_give_images_that_honest_weights_keep(model, batch, faces, generator):
    changed = CuriousAbandonHonesty(rows=400, batch_size=8)(model, faces[0][100:])
    fires = changed[0].rows(batch[0].flatten(1)) > 0
    assert float((fires.sum(0) == 1).float().mean()) > 0.15
    snapshot = Snapshot.from_batch(changed, batch, loss=LOSS, labels_known=True)
    found = LinearLayerInversion()(snapshot.observation, budget=Budget(evaluations=200), generator=generator)
    assert int(found.certified.sum()) >= 4
    near = torch.cdist(found.inputs.flatten(1), batch[0].flatten(1)).amin(1) < 1e-2
    assert bool(near[found.certified].all())


def test_trap_weights_replace_rows_where_the_first_layer_sees_the_image(build, faces):
    model = build("mlp", classes=4)
    changed = CuriousAbandonHonesty(share=0.25, scale=0.9)(model, faces[0][:50])
    rows = changed[1].weight
    assert torch.equal(rows[16:], model[1].weight[16:])
    ordered = rows[:16].sort(1).values
    half = rows.shape[1] // 2
    assert torch.allclose(ordered[:, -half:].flip(1), -0.9 * ordered[:, :half], atol=1e-6)


def test_class_fishing_leaves_the_gradient_of_one_image(model, batch):
    images, _ = batch
    labels = torch.tensor([3, 0, 1, 2, 0, 1, 2, 0])
    changed = Fishing(target=3)(model)
    shared = Snapshot.from_batch(changed, (images, labels), loss=LOSS).observation.gradients
    alone = Snapshot.from_batch(changed, (images[:1], labels[:1]), loss=LOSS).observation.gradients
    for name in ("0.weight", "2.weight"):
        assert torch.allclose(shared[name], alone[name] / 8, atol=1e-7 * float(alone[name].abs().max()) + 1e-12)


def test_feature_fishing_leaves_the_images_below_the_threshold(model, batch):
    images, labels = batch[0], torch.full((8,), 2)
    features = model[:-1](images).detach()
    feature = int(features.std(0).argmax())
    values = features[:, feature].sort().values
    threshold = float(values[:2].mean())
    changed = Fishing(target=2, feature=feature, threshold=threshold, slope=1e5)(model)
    shared = Snapshot.from_batch(changed, (images, labels), loss=LOSS).observation.gradients["0.weight"]
    lowest = features[:, feature].argmin()
    alone = Snapshot.from_batch(changed, (images[lowest][None], labels[:1]), loss=LOSS).observation.gradients[
        "0.weight"
    ]
    assert torch.allclose(shared, alone / 8, rtol=1e-4, atol=1e-6 * float(alone.abs().max()))


def test_dead_layers_send_nothing(model, batch):
    gradient = Snapshot.from_batch(SuppressedGradients()(model), batch, loss=LOSS).observation.gradients
    assert not bool(gradient["0.weight"].any())
    assert not bool(gradient["2.weight"].any())


def test_identity_convolutions_pass_the_image_on(model, batch):
    changed = IdentityLayers()(model)
    assert torch.equal(changed[0](batch[0]).detach()[:, 5], batch[0][:, 0, ::2, ::2] + model[0].bias[5].detach())


def test_the_model_itself_stays_as_it_was(model, faces):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for changed in (RobbingTheFed(), CuriousAbandonHonesty()):
        changed(model, faces[0][:20])
    for changed in (Fishing(target=1), ScaledHead(), IdentityLayers(), SuppressedGradients()):
        changed(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_misuse_is_refused(model, faces):
    with pytest.raises(InvalidInputError, match="bins"):
        RobbingTheFed(bins=1)
    with pytest.raises(InvalidInputError, match="images"):
        RobbingTheFed()(model, faces[0][0])
    with pytest.raises(InvalidInputError, match="share"):
        CuriousAbandonHonesty(share=0.0)
    with pytest.raises(InvalidInputError, match="target"):
        Fishing(target=4)(model)
    with pytest.raises(InvalidInputError, match="feature"):
        Fishing(target=1, feature=10**6)(model)
    with pytest.raises(InvalidInputError, match="linear layer"):
        ScaledHead()(nn.Conv2d(1, 1, 1))
