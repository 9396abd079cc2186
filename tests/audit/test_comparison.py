"""Models side by side: what must differ between them, the command line, and the pictures."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from exact import dense
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit import Budget, Snapshot
from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.audit.comparison import compare
from lightning_gradaudit.cli.architectures import BUILT_IN, training_states
from lightning_gradaudit.cli.main import MISUSE, main
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.report.charts import comparison_chart

BUDGET = Budget(evaluations=10)


def pooled():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


@pytest.fixture(scope="module")
def found(faces, build):
    images, labels = faces
    models = {"mlp": build("mlp"), "pooled": pooled()}
    return compare(models, images[[0, 150]], labels[[0, 150]], budget=BUDGET, gallery=images[1:140])


def test_a_layer_that_sees_the_image_shows_and_pooling_hides(found):
    mlp, hidden = found.contenders
    assert mlp.exact_leaks == 2
    assert mlp.typical_effort < 10
    assert mlp.leaking_layer == "1"
    assert bool((mlp.ceiling == 1).all())
    assert hidden.exact_leaks == 0
    assert hidden.typical_effort == math.inf
    assert hidden.effective_rank < mlp.effective_rank
    assert float(hidden.ceiling.mean()) < 1
    assert [each.parameters for each in found.contenders] == [626 * 64 + 65 * 2, 10 * 8 + 9 * 2]
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["models"][1]["effort"] is None
    assert found.table()[2][4] == "> 10"


def test_the_effective_rank_is_that_of_the_matrix(found, faces, build):
    images, labels = faces
    expected = []
    for i in (0, 150):
        snapshot = Snapshot.from_batch(build("mlp"), (images[i : i + 1], labels[i : i + 1]), loss=F.cross_entropy)
        squares = torch.linalg.svdvals(dense(Jacobian(snapshot.observation, images[i : i + 1], labels[i : i + 1]))) ** 2
        expected.append(float(squares.sum() ** 2 / (squares**2).sum()))
    assert found.contenders[0].effective_rank == pytest.approx(sum(expected) / 2, rel=0.3)  # four probes


def test_models_are_left_alone_and_images_must_fill_batches(faces, build):
    images, labels = faces
    model = build("batchnorm")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare([("one", model)], images[:2], labels[:2], mode="train", batch_size=2, budget=BUDGET)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InvalidInputError, match="batch_size=2"):
        compare({"one": model}, images[:3], labels[:3], batch_size=2)
    with pytest.raises(InvalidInputError, match="at least one model"):
        compare({}, images[:3], labels[:3])


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(("channels", "side"), [(1, 25), (3, 32)])
def test_built_in_architectures_learn_from_any_square_images(name, channels, side):
    torch.manual_seed(0)
    images = torch.rand(20, channels, side, side)
    labels = torch.arange(20) % 2
    images[labels == 1] *= 0.2
    states = dict(training_states({name: BUILT_IN[name]}, images, labels, epochs=(0, 30)))
    losses = [float(F.cross_entropy(model.train()(images), labels).detach()) for model in states.values()]
    assert list(states) == [f"{name}, 0 epochs", f"{name}, 30 epochs"]
    assert losses[1] < losses[0]


def test_epochs_must_increase(faces):
    images, labels = faces
    with pytest.raises(InvalidInputError, match="epochs"):
        next(training_states(BUILT_IN, images, labels, epochs=(5, 1)))
    with pytest.raises(InvalidInputError, match="square"):
        next(training_states(BUILT_IN, images[:, :, :20], labels))


def test_the_command_compares_own_weights_with_built_in_models(tmp_path, capsys):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", images=generator.integers(0, 255, (8, 1, 12, 12), dtype=np.uint8),
             labels=np.arange(8) % 2)  # fmt: skip
    code = "from torch import nn\ndef mine():\n    return nn.Sequential(nn.Flatten(), nn.Linear(144, 2))\n"
    (tmp_path / "net.py").write_text(code)
    torch.save({"state_dict": {"1.weight": torch.zeros(2, 144), "1.bias": torch.zeros(2)}}, tmp_path / "w.ckpt")
    arguments = ["compare", "--own", f"{tmp_path / 'net.py'}:mine={tmp_path / 'w.ckpt'}", "--models", "lenet",
                 "--epochs", "0", "--images", "2", "--evaluations", "5", "--data", str(tmp_path / "data.npz"),
                 "--json", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [model["name"].rpartition("/")[2] for model in printed["models"]] == [
        f"net.py:mine={tmp_path}/w.ckpt".rpartition("/")[2],
        "lenet, 0 epochs",
    ]
    assert printed["models"][0]["exact_leaks"] == 2
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == printed
    ET.fromstring((tmp_path / "out/comparison.svg").read_text())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--own", "missing.py:net"], "--own"),
        (["--data", "missing.npz"], "--data"),
        (["--images", "0", "--models", "mlp"], "--images"),
    ],
)
def test_misuse_is_named(arguments, named, capsys):
    assert main(["compare", *arguments]) == MISUSE
    assert named in capsys.readouterr().err


def test_the_chart_names_every_model(found):
    words = [node.text or "" for node in ET.fromstring(comparison_chart(found)).iter() if node.tag.endswith("text")]
    assert {each.name for each in found.contenders} <= set(words)
