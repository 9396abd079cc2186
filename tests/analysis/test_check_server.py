"""`check_server`: each test against a closed form, honest rounds that pass, and manipulations that do not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from benchmarks.quality.server_check import MANIPULATIONS, OPEN, RELU_NETS, REPORTED, SCENARIOS, Client, honest_run
from lightning_gradaudit.analysis import RoundStatistics, check_server
from lightning_gradaudit.analysis.server_check import FEWEST_ROUNDS, REFERENCES, compare_with_history, judge_round
from lightning_gradaudit.errors import InvalidInputError

LOSS = nn.functional.cross_entropy


@pytest.fixture
def images(faces):
    """Images (200, 3, 32, 32) and ten arbitrary classes."""
    pixels = nn.functional.interpolate(faces[0], (32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return pixels.contiguous(), torch.arange(200) % 10


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 5))


def batch(size=8):
    generator = torch.Generator().manual_seed(2)
    return torch.rand((size, 1, 8, 8), generator=generator), torch.arange(size) % 5


def values(model, data=None):
    return check_server(model, batch() if data is None else data, loss=LOSS).values


def test_the_p_value_is_the_fitted_tail():
    reference = REFERENCES["loss"]
    assert reference.p_value(reference.start) == 1.0
    assert reference.p_value(reference.start + 2 * reference.scale) == pytest.approx(0.1 * math.exp(-2))


def test_parallel_rows_are_counted():
    model = small()
    with torch.no_grad():
        model[1].weight[:8] = model[1].weight[0] * torch.arange(1, 9)[:, None]
    assert values(small())["parallel_rows"] == 0
    assert values(model)["parallel_rows"] == 3  # log2 of eight


def test_mirrored_and_one_hot_rows_are_seen():
    model = small()
    with torch.no_grad():
        half = torch.rand(40, 32)
        model[1].weight.copy_(torch.cat([-half, 0.7 * half.flip(1)], dim=1))
    assert values(model)["mirrored_rows"] > 5
    with torch.no_grad():
        model[1].weight[:10] = torch.eye(64)[:10]
    assert values(model)["one_hot_rows"] == 0.25


def test_head_and_loss_are_compared_with_a_loop_over_samples():
    model, data = small(), batch()
    found = values(model, data)
    weight = model[3].weight.detach()
    norms = weight.norm(dim=1)
    assert found["head_rows"] == pytest.approx(math.log10(norms.max() / norms.median()), abs=1e-5)
    loss, passed, ratios = 0.0, [], []
    for image, label in zip(*data, strict=True):
        features = model[:3](image[None]).detach().requires_grad_()
        logits = model[3](features)
        each = LOSS(logits, label[None])
        (at_logits,) = torch.autograd.grad(each, logits, retain_graph=True)
        (at_features,) = torch.autograd.grad(each, features)
        loss += float(each.detach()) / 8
        passed.append(float(at_features.norm() / at_logits.norm() / weight.norm() * 5**0.5))
        ratios.append((float(at_features.norm()), float(at_logits.norm())))
    shares = [[each[i] / sum(pair[i] for pair in ratios) for each in ratios] for i in (0, 1)]
    assert found["loss"] == pytest.approx(math.log10(loss / math.log(5)), abs=1e-4)
    assert found["blocked_samples"] == pytest.approx(-math.log10(min(passed)), abs=1e-4)
    expected = math.log2(max(a / b for a, b in zip(*shares, strict=True)))
    assert found["gradient_share"] == pytest.approx(expected, abs=1e-4)


def test_changes_are_measured_in_the_spread_of_the_history():
    past = [RoundStatistics(traced={"spectrum": {"a": value}}) for value in (1.0, 1.2, 1.4)]
    now = RoundStatistics(traced={"spectrum": {"a": 2.1, "new": 7.0}})
    assert compare_with_history(now, past)["spectrum"] == (pytest.approx(math.log2(1 + 0.9 / 0.3)), "a")


def test_the_model_the_random_state_and_the_gradients_stay():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(216, 5)
    )
    LOSS(model(batch()[0]), batch()[1]).backward()
    before, state = copy.deepcopy(model), torch.random.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters()]
    check_server(model, batch(), loss=LOSS)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    for (name, tensor), other in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_frozen_stems_soft_labels_and_two_classes_are_no_finding():
    model = small()
    model[1].requires_grad_(False)
    assert not check_server(model, batch(), loss=LOSS).findings
    inputs, labels = batch()
    soft = nn.functional.one_hot(labels, 5).float()
    assert not check_server(small(), (inputs, soft), loss=LOSS).findings
    torch.manual_seed(0)
    binary = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 2))
    assert not check_server(binary, (inputs, labels % 2), loss=LOSS).findings
    regression = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 1))
    assert not check_server(regression, (inputs, labels.float()[:, None]), loss=nn.functional.mse_loss).findings


def test_another_architecture_is_a_finding_once_there_is_a_history():
    model = small()
    statistics = check_server(model, batch(), loss=LOSS).statistics
    other = nn.Sequential(*model[:3], nn.Linear(40, 40), nn.ReLU(), model[3])
    report = check_server(other, batch(), loss=LOSS, history=[statistics] * FEWEST_ROUNDS)
    assert "architecture" in {finding.test for finding in report.findings}
    assert "architecture" not in {
        f.test for f in check_server(other, batch(), loss=LOSS, history=[statistics]).findings
    }


def test_statistics_survive_json():
    statistics = check_server(small(), batch(), loss=LOSS).statistics
    assert RoundStatistics.from_dict(statistics.to_dict()) == statistics
    assert judge_round(statistics).findings == ()
    with pytest.raises(InvalidInputError, match="history"):
        RoundStatistics.from_dict({"values": []})


def test_misuse_is_refused():
    with pytest.raises(InvalidInputError, match="false_alarm_rate"):
        check_server(small(), batch(), loss=LOSS, false_alarm_rate=0.0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_honest_rounds_are_no_finding(scenario, images):
    net = "tanh_mlp" if scenario == "sgd" else "wide_cnn"
    client = Client(REPORTED[net], *images, scenario=scenario, seed=4)
    reports, _ = honest_run(client, 6, steps=1)
    assert [str(report) for report in reports if report.findings] == []


@pytest.mark.parametrize("name", [name for name in MANIPULATIONS if name not in OPEN])
def test_manipulations_are_found(name, images, client_run):
    client, history = client_run
    manipulate, nets = MANIPULATIONS[name]
    assert nets is None or "wide_cnn" in RELU_NETS
    model = manipulate(client.model, images[0][:100], 3).train()
    assert check_server(model, client.batch(), loss=LOSS, history=history).findings


@pytest.fixture(scope="module")
def client_run(faces):
    pixels = nn.functional.interpolate(faces[0], (32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    client = Client(REPORTED["wide_cnn"], pixels, torch.arange(200) % 10, scenario="sgd", seed=6)
    return client, honest_run(client, 5, steps=2)[1]
