"""Two processes over gloo: each view against a recomputation in one process, and decisions that agree."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import ddp_program as program
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit.cli.main import main

CELLS = [(mode, view) for mode in program.MODES for view in program.VIEWS]


@lru_cache
def both_ranks(name: str) -> list[dict]:
    """Run the program in two processes and return what each of them wrote."""
    folder = Path(mkdtemp())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "import ddp_program; ddp_program.main()", name, str(folder)],
            cwd=Path(__file__).parents[1],
            env=os.environ
            | shared
            | {"PYTHONPATH": os.pathsep.join(sys.path)}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(program.RANKS)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(program.RANKS)]


def own_gradient(run: dict, index: int, mode: str) -> dict[str, torch.Tensor]:
    """Recompute, in this one process, what one rank's batch contributes."""
    task = program.Task()
    task.load_state_dict(run["weights"][index], strict=False)
    images, labels = run["batches"][index]
    torch.set_rng_state(run["states"][index])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "bf16"):
        loss = F.cross_entropy(task.net(images), labels)
    gradients = torch.autograd.grad(loss, list(task.parameters()))
    return {n: g for (n, _), g in zip(task.named_parameters(), gradients, strict=True)}


def mean(gradients: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {n: torch.stack([g[n] for g in gradients]).mean(0) for n in gradients[0]}


def relative(got, expected) -> float:
    assert set(got) == set(expected)
    difference = torch.cat([(got[n] - expected[n]).flatten() for n in expected])
    return float(difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm())


@pytest.mark.parametrize(("mode", "view"), CELLS)
def test_each_view_is_what_one_process_recomputes(mode, view):
    ranks = [result[mode] for result in both_ranks("capture")]
    every = program.MODES[mode].get("accumulate_grad_batches", 1)
    window = range(program.AT, program.AT + every)
    steps = [mean([own_gradient(run, i, mode) for i in window]) for run in ranks]
    assert all(run["faults"] == [[]] * len(program.VIEWS) for run in ranks)
    if view in ("local", "step"):
        for rank, run in enumerate(ranks):
            (snapshot,) = run["snapshots"][view]
            expected = own_gradient(run, program.AT, mode) if view == "local" else steps[rank]
            assert relative(snapshot.observation.gradients, expected) < 1e-6
            assert snapshot.self_test().error < (5e-2 if mode == "bf16" else 1e-5)
        return
    (snapshot,), none = ranks[0]["snapshots"][view], ranks[1]["snapshots"][view]
    assert none == [], "all hold the same gradient: it is audited once"
    expected = mean(steps)
    if view == "update" and mode == "clip":
        parameters = [nn.Parameter(g.clone()) for g in expected.values()]
        for p, g in zip(parameters, expected.values(), strict=True):
            p.grad = g.clone()
        nn.utils.clip_grad_norm_(parameters, program.CLIP)
        expected = {n: p.grad for n, p in zip(expected, parameters, strict=True)}
    assert relative(snapshot.observation.gradients, expected) < 1e-6
    assert snapshot.self_test().error < (5e-2 if mode == "bf16" else 1e-5)
    images = torch.cat([run["batches"][i][0] for run in ranks for i in window])
    assert torch.equal(snapshot.truth.inputs, images)


@pytest.mark.parametrize("mode", program.MODES)
def test_training_does_not_notice(mode):
    for result in both_ranks("capture"):
        run = result[mode]
        audited, plain = run["final"]
        assert all(torch.equal(audited[n], plain[n]) for n in plain)
        assert torch.equal(*run["rng"])
        assert run["rows"][0] == run["rows"][1]


def test_every_ranks_audits_count_and_all_decide_alike():
    zero, one = both_ranks("gate")
    assert zero["records"] == one["records"]
    assert [(step, rank) for step, rank, _, _ in zero["records"]] == [(s, r) for s in (0, 2, 4) for r in (0, 1)]
    assert all(valid and size == program.SIZE for _, _, valid, size in zero["records"])
    assert (zero["risk"], zero["verdict"]) == (one["risk"], one["verdict"])
    assert zero["checkpoints"] == one["checkpoints"] == [], "too few audits to release anything"
    assert len(zero["rows"]) == 6
    assert one["rows"] == [], "process zero writes"
    assert zero["lines"] >= 8


def test_all_processes_thin_the_schedule_alike():
    """Audits take one process 0.49 s and the other 1.49 s, steps 1 s: alone, the first would audit at every step."""
    zero, one = both_ranks("gate")
    assert zero["thinned"] == one["thinned"] == [[0, 3, 5], 3]


def test_a_batch_that_one_process_cannot_keep_stops_nobody():
    zero, one = both_ranks("gate")
    for result in (zero, one):
        faults, _, steps = result["faulty"]
        assert steps == program.BATCHES
        assert any("could not keep its batch" in text for _, text, _ in faults)
    assert zero["faulty"][1] == 1, "the other sampled step is audited"
    assert zero["faulty"][0] == one["faulty"][0]


def test_fsdp2_shards_are_gathered_and_training_does_not_notice():
    zero, one = both_ranks("shard")
    assert (zero["faults"], one["faults"]) == ([], [])
    (snapshot,) = zero["snapshots"]
    weights = snapshot.observation.parameters
    runs = [run | {"weights": {program.AT: weights}} for run in (zero, one)]
    expected = mean([own_gradient(run, program.AT, "plain") for run in runs])
    assert relative(snapshot.observation.gradients, expected) < 1e-6
    assert snapshot.self_test().error < 1e-5
    for run in (zero, one):
        audited, plain = run["final"]
        assert all(torch.equal(a, b) for a, b in zip(audited, plain, strict=True))
        assert torch.equal(*run["rng"])


def test_checkpoints_of_several_processes_pass_the_gate_with_the_weights_that_were_stamped():
    saved, _ = both_ranks("save")
    assert len(saved) == 4
    for name, path in saved.items():
        assert main(["gate", path, "--max-risk", "0.3"]) == 0, name
