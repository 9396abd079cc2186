"""The attack that chooses: budget, determinism, and what it chooses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lightning_gradaudit import Budget, ClipNorm, GaussianNoise, Outcome, Snapshot
from lightning_gradaudit.attacks import (
    Auto,
    GradientMatching,
    InvertingGradients,
    MaximumAPosteriori,
    SequentialAttack,
    WhitenedMatching,
    iDLG,
)
from lightning_gradaudit.errors import InvalidInputError

RACERS = (Auto().relay, *Auto().quick)
SINGLES = (*Auto().relay.stages, *Auto().quick)


def run(attack, observation, evaluations, seed=0):
    return attack(observation, budget=Budget(evaluations=evaluations), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("evaluations", [1, 2, 7, 50, 133])
def test_the_race_spends_its_budget_to_the_evaluation(snap, monkeypatch, evaluations):
    observation = snap("conv", channels=3, side=10).observation
    simulated = []
    plain = type(observation).simulate

    def counted(self, inputs, labels, leaves=None):
        simulated.append(leaves is not None)  # a run's own leaves: not the one look at what it reached
        return plain(self, inputs, labels, leaves)

    monkeypatch.setattr(type(observation), "simulate", counted)
    plain_finish = InvertingGradients()  # products with the Jacobian are no simulated gradients
    first_order = Auto(finish=plain_finish, finish_kinked=plain_finish)
    result = run(first_order, observation, evaluations)
    assert result.evaluations == sum(simulated) <= evaluations
    assert result.evaluations == evaluations or result.outcome is Outcome.CONVERGED
    assert result.inputs.isfinite().all()


def test_the_same_generator_gives_the_same_answer(snap):
    observation = snap("sigmoid", batch=2, channels=3, side=10).observation
    first, again, other = (run(Auto(), observation, 80, seed) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs)
    assert first.reason == again.reason
    assert first.reason != other.reason  # the winner may start at grey and need no randomness


def test_the_reason_says_what_each_racer_reached_and_cost(snap):
    result = run(Auto(), snap("sigmoid", side=10).observation, 90)
    assert result.attack == "Auto"
    parts = result.reason.split("; ")
    names = [part.split(":")[0] for part in parts]
    assert names[0] == Auto().relay.name
    assert set(names) <= {attack.name for attack in (*RACERS, Auto().equations, Auto().finish)}
    spent = [int(part.split(" after ")[1].split()[0]) for part in parts if " after " in part]
    assert sum(spent) == result.evaluations <= 90
    assert f"{result.matching_loss:.3g}" in [part.split()[-4] for part in parts if " after " in part]


def test_the_path_holds_what_was_there_after_so_many_evaluations_whoever_won(snap, monkeypatch):
    observation = snap("conv", channels=3, side=10).observation
    simulated = []
    plain = type(observation).simulate

    def kept(self, inputs, labels, leaves=None):
        if leaves is not None:  # a run's own leaves: not the one look at what it reached
            simulated.append(inputs.detach().clone())
        return plain(self, inputs, labels, leaves)

    monkeypatch.setattr(type(observation), "simulate", kept)
    result = run(Auto(finish=InvertingGradients(), finish_kinked=InvertingGradients()), observation, 200)
    spent = [each for each, _ in result.path]
    assert spent == sorted(set(spent))
    assert spent[-1] == result.evaluations == len(simulated)
    assert torch.equal(result.path[-1][1], result.inputs)
    assert sum(40 < each < 160 for each in spent) >= 5  # the winner's own last run began later, or was over sooner
    for each, images in result.path[:-1]:
        assert min(float((images - seen).abs().max()) for seen in simulated[:each]) < 1e-5


def names(result):
    return [part.split(":")[0] for part in result.reason.split("; ")]


def test_where_there_are_kinks_no_quick_method_is_probed(snap):
    kinked, smooth = (run(Auto(), snap(kind, channels=3, side=10).observation, 100) for kind in ("conv", "sigmoid"))
    assert names(kinked) == ["SequentialAttack"]
    assert "LBFGS" in names(smooth)
    assert kinked.evaluations == smooth.evaluations == 100


@pytest.mark.parametrize(("rate", "order"), [(1e-9, "stuck"), (0.1, "fine")])
def test_equations_come_before_a_relay_whose_probe_got_nowhere(snap, monkeypatch, rate, order):
    started = []
    start = GradientMatching.start
    monkeypatch.setattr(
        GradientMatching, "start", lambda self, *a, **k: started.append(self.label) or start(self, *a, **k)
    )
    relay = SequentialAttack(stages=(InvertingGradients(lr=rate),), shares=(1,))
    auto = Auto(relay=relay, equations=GradientMatching(label="Equations"), finish=GradientMatching(label="Finish"))
    result = run(auto, snap("conv", channels=3, side=10).observation, 400)
    probe, first, second, *_ = started
    assert probe == "InvertingGradients"
    assert (first, second) == {
        "stuck": ("Equations", "InvertingGradients"),
        "fine": ("InvertingGradients", "Equations"),
    }[order]
    assert result.evaluations <= 400


@pytest.mark.parametrize(("rate", "last"), [(1e-9, "Plain"), (0.1, "Kinked")])
def test_a_relay_that_came_near_in_a_network_with_kinks_is_finished_in_their_way(snap, rate, last):
    relay = SequentialAttack(stages=(InvertingGradients(lr=rate),), shares=(1,))
    plain, kinked = (GradientMatching(label=label) for label in ("Plain", "Kinked"))
    auto = Auto(relay=relay, equations=None, finish=plain, finish_kinked=kinked)
    ran = names(run(auto, snap("conv", channels=3, side=10).observation, 600))
    assert last in ran
    assert not ({"Plain", "Kinked"} - {last}) & set(ran)


@pytest.mark.parametrize("defence", [GaussianNoise(std=0.01), GaussianNoise(relative=0.5)])
def test_known_noise_calls_for_the_posterior(snap, defence):
    observation = snap("conv", channels=3, side=10, defences=(defence,)).observation
    result = run(Auto(), observation, 30)
    alone = run(MaximumAPosteriori(), observation, 30)
    assert "noise of standard deviation" in result.reason
    assert "MaximumAPosteriori" in result.reason
    assert result.outcome is alone.outcome is Outcome.BUDGET_SPENT


def test_a_gradient_of_unknown_length_is_left_to_directions(snap):
    defences = (ClipNorm(max_norm=0.01), GaussianNoise(std=1e-5))
    result = run(Auto(), snap("conv", channels=3, side=10, defences=defences).observation, 30)
    assert "ClipNorm" in result.reason
    assert Auto().directions.name in result.reason
    assert Auto().relay.name not in result.reason
    assert result.evaluations == 30


def test_the_race_is_no_worse_than_the_best_racer_alone_with_half_its_evaluations(build, faces):
    """By more than 0.5 dB on average over networks; beyond 40 dB more is no better."""

    def reach(attack, observed, evaluations):
        errors = [((run(attack, each, evaluations).inputs.clamp(0, 1) - image) ** 2).mean() for each, image in observed]
        return sum(min(40.0, float(-10 * error.log10())) for error in errors) / len(errors)

    loss = []
    for kind in ["conv", "sigmoid", "batchnorm"]:
        model = build(kind, side=12, classes=4)
        images = [functional.adaptive_avg_pool2d(faces[0][[index]], 12) for index in (3, 41)]
        batches = [(image, torch.tensor([1])) for image in images]
        observed = [
            (Snapshot.from_batch(model, batch, loss=functional.cross_entropy).observation, batch[0])
            for batch in batches
        ]
        raced = reach(Auto(), observed, 800)
        # No racer reaches more than 40 dB, so that none is asked where the race reached them.
        loss.append(0.0 if raced == 40.0 else max(reach(single, observed, 400) for single in SINGLES) - raced)
    assert sum(loss) / len(loss) < 0.5, loss


def test_labels_that_nobody_can_recover_are_said_to_be_the_cause(snap):
    loss = lambda outputs, labels: functional.mse_loss(outputs, functional.one_hot(labels, 2).float())
    result = run(Auto(), snap("conv", channels=3, side=10, loss=loss).observation, 20)
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert result.evaluations == 0
    assert "labels unknown" in result.reason


def test_a_relay_goes_on_from_where_its_leg_got_to(snap):
    """Against the stages run by hand: the second starts at the images of the first."""
    observation = snap("conv", channels=3, side=10, labels_known=True).observation
    stages = InvertingGradients(), WhitenedMatching()
    result = run(SequentialAttack(stages=stages, shares=(1, 3)), observation, 80)
    generator = torch.Generator().manual_seed(0)
    first = stages[0](observation, budget=Budget(evaluations=20), generator=generator)
    second = stages[1].start(observation, generator, at=first.inputs)
    second.advance(Budget(evaluations=60))
    assert result.evaluations == 80
    expected = min((first, second.result()), key=lambda each: each.matching_loss)
    assert torch.equal(result.inputs, expected.inputs)
    assert [spent for spent, _ in result.path][-1] == 80
    assert {20, 80} <= {spent for spent, _ in result.path}


def test_a_leg_that_does_not_apply_is_passed_over(snap):
    observation = snap("conv", channels=3, side=10, labels_known=True, batch=2).observation
    result = run(SequentialAttack(stages=(InvertingGradients(), iDLG()), shares=(1, 1)), observation, 30)
    assert result.evaluations == 15
    assert torch.equal(result.inputs, run(InvertingGradients(), observation, 15).inputs)


@pytest.mark.parametrize(("stages", "shares"), [((), ()), ((InvertingGradients(),), (1, 1)), ((iDLG(),), (0,))])
def test_a_relay_needs_legs_and_their_shares(stages, shares):
    with pytest.raises(InvalidInputError, match="stages"):
        SequentialAttack(stages=stages, shares=shares)
