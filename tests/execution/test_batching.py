"""Calls that wait for an executor and go on together."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from support import HandDriven

from lightning_gradaudit.execution.batching import BatchingExecutor
from lightning_gradaudit.execution.executors import InlineExecutor, ProcessExecutor
from lightning_gradaudit.execution.remote import Deferred


@pytest.fixture
def held():
    return HandDriven()


def add(a, b, *, times=1):
    return (a + b) * times


def test_the_first_call_goes_on_at_once_and_those_that_wait_go_on_together(held):
    bundles = BatchingExecutor(held, batch_audits=3)
    futures = [bundles.submit(add, n, 1, times=10) for n in range(6)]
    assert len(held.work) == 1
    for done in (1, 4, 6):
        held.run(len(held.work) - 1)
        assert [future.done() for future in futures] == [True] * done + [False] * (6 - done)
    assert len(held.work) == 3
    assert [future.result() for future in futures] == [10 * (n + 1) for n in range(6)]


def test_an_error_is_one_calls_alone(held):
    bundles = BatchingExecutor(held, batch_audits=4)
    futures = [bundles.submit(divmod, 6, d) for d in (1, 2, 0, 3)]
    held.run(0)
    held.run(1)
    assert [futures[i].result() for i in (0, 1, 3)] == [(6, 0), (3, 0), (2, 0)]
    assert isinstance(futures[2].exception(), ZeroDivisionError)


def test_what_is_lost_with_its_worker_is_lost_by_name_and_the_next_go_on(held):
    bundles = BatchingExecutor(held, batch_audits=2)
    futures = [bundles.submit(add, n, 1) for n in range(4)]
    held.run(0)
    held.fail(1, RuntimeError("worker lost"))
    for future in futures[1:3]:
        assert str(future.exception()) == "worker lost"
    held.run(2)
    assert futures[3].result() == 4


def test_a_cancelled_call_is_not_sent(held):
    bundles = BatchingExecutor(held, batch_audits=2)
    futures = [bundles.submit(add, n, 1) for n in range(4)]
    assert futures[1].cancel()
    held.run(0)
    held.run(1)
    assert [futures[i].result() for i in (0, 2, 3)] == [1, 3, 4]
    assert futures[1].cancelled()


def test_an_executor_that_takes_nothing_more_fails_every_call(held, monkeypatch):
    bundles = BatchingExecutor(held, batch_audits=2)
    futures = [bundles.submit(add, n, 1) for n in range(4)]

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(held, "submit", broken)
    held.run(0)
    assert [str(future.exception()) for future in futures[1:]] == ["broken"] * 3


def test_a_bundle_that_nobody_waits_for_is_given_up(held):
    bundles = BatchingExecutor(held, batch_audits=2)
    futures = [bundles.submit(add, n, 1) for n in range(4)]
    held.run(0)
    (sent, _) = held.work[1]
    assert futures[1].cancel()
    assert not sent.cancelled()
    assert futures[2].cancel()
    assert sent.cancelled()
    held.run(2)
    assert futures[3].result() == 4


class UnpicklableError(Exception):
    def __init__(self, code, hint):
        super().__init__(f"{code}: {hint}")


def refuse(code):
    raise UnpicklableError(code, "cannot travel")


def test_an_error_that_cannot_travel_takes_nobody_along(held):
    bundles = BatchingExecutor(held, batch_audits=3)
    futures = [bundles.submit(add, 1, 1), bundles.submit(add, 2, 1), bundles.submit(refuse, 7)]
    held.run(0)
    held.run(1)
    assert futures[1].result() == 3
    assert str(futures[2].exception()) == "UnpicklableError: 7: cannot travel"


def test_an_error_from_a_process_says_where_it_was_raised():
    bundles = BatchingExecutor(ProcessExecutor(), batch_audits=2)
    futures = [bundles.submit(add, 1, 1), bundles.submit(divmod, 1, 0), bundles.submit(add, 2, 1)]
    error = futures[1].exception(timeout=120)
    assert isinstance(error, ZeroDivisionError)
    assert "divmod" in str(error.__cause__) or "batching" in str(error.__cause__)
    assert futures[2].result(timeout=120) == 3
    bundles.shutdown(wait=True)


def test_an_interrupt_of_inline_work_is_raised_and_leaves_nothing_waiting():
    def interrupted():
        raise KeyboardInterrupt

    bundles = BatchingExecutor(InlineExecutor(), batch_audits=2)
    with pytest.raises(KeyboardInterrupt):
        bundles.submit(interrupted)
    assert bundles.submit(add, 1, 1).result(timeout=0) == 2
    bundles.shutdown(wait=True)


def test_inline_work_is_done_when_submit_returns():
    bundles = BatchingExecutor(InlineExecutor(), batch_audits=4)
    assert [bundles.submit(add, n, 1).result(timeout=0) for n in range(3)] == [1, 2, 3]


def test_shutting_down_waits_for_what_waits_or_gives_it_up():
    gate = threading.Event()
    bundles = BatchingExecutor(ThreadPoolExecutor(1), batch_audits=2)
    futures = [bundles.submit(gate.wait), *[bundles.submit(add, n, 1) for n in range(3)]]
    threading.Timer(0.1, gate.set).start()
    bundles.shutdown(wait=True)
    assert [future.result(timeout=0) for future in futures] == [True, 1, 2, 3]
    with pytest.raises(RuntimeError, match="shut down"):
        bundles.submit(add, 1, 1)

    gate.clear()
    bundles = BatchingExecutor(ThreadPoolExecutor(1), batch_audits=2)
    futures = [bundles.submit(gate.wait), *[bundles.submit(add, n, 1) for n in range(3)]]
    bundles.shutdown(wait=False, cancel_futures=True)
    gate.set()
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result(timeout=10)


def test_a_process_gets_what_is_made_on_the_way():
    bundles = BatchingExecutor(ProcessExecutor(), batch_audits=3)
    futures = [bundles.submit(add, Deferred(lambda n=n: n), 1) for n in range(4)]
    assert [future.result(timeout=120) for future in futures] == [1, 2, 3, 4]
    bundles.shutdown(wait=True)
