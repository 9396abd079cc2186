"""Faults of audits that really run: training does not notice, the counters add up, and the verdict knows."""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cloudpickle
import pytest
from support import HandDriven

from lightning_gradaudit import Auditor, Budget
from lightning_gradaudit.attacks import Attack
from lightning_gradaudit.errors import AuditLostError
from lightning_gradaudit.execution.executors import InlineExecutor, ProcessExecutor, is_broken

SMALL = Budget(evaluations=1)


@pytest.fixture(scope="module")
def faults():
    """The benchmark, as a module that worker processes get by value."""
    path = Path(__file__).parents[1] / "benchmarks" / "faults.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    yield module
    cloudpickle.unregister_pickle_by_value(module)
    del sys.modules[spec.name]


@pytest.mark.filterwarnings("ignore")
def test_one_fault_of_each_kind_that_spares_the_worker(faults):
    kinds = ("none", "logger", "raise", "sys.exit", "interrupt", "disk")
    for line in faults.run(kinds, faults=len(kinds) - 1):
        assert line.holds, line
        assert line.faults, line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_one_fault_that_takes_the_worker(faults, kind, monkeypatch):
    monkeypatch.setattr(faults, "STEPS", 2)
    (line,) = faults.run((kind,), faults=1)
    assert line.holds, line
    assert line.faults == 1


class OwnError(BaseException):
    """What nobody expects."""


class Raises(Attack):
    """Raise what it is made with."""

    def __init__(self, error):
        self.error = error

    def run(self, observation, *, budget, generator):
        raise self.error


ERRORS = [SystemExit(3), OwnError("own"), GeneratorExit()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("make", [InlineExecutor, lambda: ThreadPoolExecutor(1)], ids=["inline", "thread"])
def test_whatever_an_attack_raises_is_a_lost_audit(snap, make, error):
    doing = make()
    auditor = Auditor(attack=Raises(error), closed_forms=False, budget=SMALL, executor=doing)
    for step in range(3):
        assert auditor.submit(snap("conv", step=step))
    seen = []
    for _ in range(4):
        with pytest.raises(AuditLostError, match=type(error).__name__) as lost:
            auditor.collect(wait=60)
        seen.append(lost.value)
        assert lost.value.__cause__ is error
    assert "engine check" in str(seen[0])
    assert [f"step {step}" in str(each) for step, each in enumerate(seen[1:])] == [True] * 3
    assert (auditor.submitted, auditor.completed, auditor.failed, auditor.pending) == (3, 0, 3, 0)
    doing.shutdown()


def test_a_users_interrupt_is_raised_where_the_attack_runs_in_the_main_thread(snap):
    auditor = Auditor(attack=Raises(KeyboardInterrupt()), budget=SMALL, executor="inline", engine_check=False)
    with pytest.raises(KeyboardInterrupt):
        auditor.submit(snap("conv"))
    auditor = Auditor(attack=Raises(KeyboardInterrupt()), budget=SMALL, executor="thread", engine_check=False)
    auditor.submit(snap("conv"))
    with pytest.raises(AuditLostError, match="KeyboardInterrupt"):
        auditor.collect(wait=60)
    auditor.close()


def test_what_cannot_be_packed_settles_its_future_whatever_was_raised():
    executor = ProcessExecutor()

    class Refuses:
        def __reduce__(self):
            raise SystemExit(3)

    assert isinstance(executor.submit(abs, Refuses()).exception(timeout=60), SystemExit)
    executor.shutdown(wait=True)


def test_an_old_error_of_a_lost_worker_does_not_end_the_new_one(snap):
    lost, fresh = HandDriven(), HandDriven()
    auditor = Auditor(executor=lost, budget=SMALL, engine_check=False)
    auditor._owned = True
    for step in range(2):
        auditor.submit(snap("conv", step=step))
        error = type("TerminatedWorkerError", (RuntimeError,), {})("lost")
        lost.fail(step, error)
    auditor._executor = fresh  # the first of both errors led to a new executor, in which work is under way
    for _ in range(2):
        with pytest.raises(RuntimeError, match="lost"):
            auditor.collect()
    assert auditor._executor is fresh
    assert not is_broken(fresh)
