"""Independent evaluations as one compiled graph: of one step, or of the steps of audits that take turns."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_gradaudit.attacks.compilation.cuda_graph import Function
from lightning_gradaudit.attacks.compilation.evaluation_graph import (
    CompiledEvaluation,
    by_graph,
    current_compilation,
    first_line,
    graph_of_many,
)
from lightning_gradaudit.simulation.replay import undrawn
from lightning_gradaudit.utils.threads import use_single_thread

T = TypeVar("T")
Results = list[tuple[Tensor, ...]]
_SMALL = 1 << 10  # elements

logger = logging.getLogger(__name__)


class BatchedEvaluation:
    """Independent calls of a step, made as one where that is faster: one graph keeps busy what waits between kernels.

    A single call is made along with those of other steps, where somebody has them take turns (`run_interleaved`).

    Args:
        step: The step; until its own graph is trusted, and where nothing is compiled, calls are made one by one.
    """

    def __init__(self, step: CompiledEvaluation) -> None:
        self._step = step
        self._together: BatchedGraph | None = None

    def __call__(self, calls: Sequence[Sequence[Tensor]]) -> Results:
        """Make calls; more than the first time one by one."""
        compilation = current_compilation()
        # Whoever waits for compilers wants the same trajectory on every machine.
        if compilation is not None and not compilation.wait:
            found = self._among_others(calls[0]) if len(calls) == 1 else self._as_one(calls)
            if found is not None:
                compilation.evaluations += len(found)
                return found
        return [self._step(*call) for call in calls]

    def _as_one(self, calls: Sequence[Sequence[Tensor]]) -> Results | None:
        if not self._step.trusted:
            return None
        if self._together is None:
            self._together = BatchedGraph([self._step] * len(calls))
        return self._together(calls)

    def _among_others(self, call: Sequence[Tensor]) -> Results | None:
        turns = _turns.get()
        found = None if turns is None else turns.evaluate(self._step, call)
        return None if found is None else [found]


class BatchedGraph:
    """Calls of steps of one problem, one of each, as one graph. Results are those of the calls but for rounding.

    Which way is faster is measured, once for a graph.

    Args:
        steps: Steps of one problem with trusted graphs of their own; a step may come several times.
    """

    def __init__(self, steps: Sequence[CompiledEvaluation]) -> None:
        self._steps = steps
        self._held: list[Tensor] = []
        self._graph: Future[Function] | None = None
        self._right: bool | None = None

    def __call__(self, calls: Sequence[Sequence[Tensor]]) -> Results | None:
        """Make a call of each of the first steps.

        Returns:
            Their results; None: there is no graph of this many, or not yet, or one by one they are faster.
        """
        if self._right is False or not 1 < len(calls) <= len(self._steps):
            return None
        try:
            return self._made(calls) if self._is_ready(calls) else None
        except Exception as error:  # the calls are as good one by one
            self._right = False
            logger.info("Evaluations are not made side by side: %s", first_line(error))
            return None
        finally:
            if self._right is False:
                self._held = []

    def _is_ready(self, calls: Sequence[Sequence[Tensor]]) -> bool:
        if self._graph is None:
            held = list(zip(*(step.tensors for step in self._steps), strict=True))
            apart = [_differ(each) for each in held]
            self._held = [torch.stack(each) if own else each[0] for each, own in zip(held, apart, strict=True)]
            self._graph = graph_of_many(self._steps[0].problem, self._held, apart, self._stacked(calls))
        if not self._graph.done() or not self._is_faster(self._graph, calls):
            return False
        if self._right is None:
            self._right = self._is_right(calls)
        return self._right

    def _stacked(self, calls: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Stack the arguments; where calls are missing, the last is repeated: the graph is of all steps."""
        filled = [*calls, *[calls[-1]] * (len(self._steps) - len(calls))]
        return [torch.stack([a.detach() for a in each]) for each in zip(*filled, strict=True)]

    def _made(self, calls: Sequence[Sequence[Tensor]]) -> Results:
        assert self._graph is not None
        found = by_graph(self._graph, self._held, self._stacked(calls))
        return list(zip(*(t.unbind() for t in found), strict=True))[: len(calls)]

    def _is_faster(self, graph: Future[Function], calls: Sequence[Sequence[Tensor]]) -> bool:
        if graph not in _seconds_of:
            step, device = self._steps[0], calls[0][0].device
            own = step.graph
            assert own is not None
            alone = _seconds(lambda: by_graph(own, step.tensors, calls[0]), device)
            _seconds_of[graph] = alone, _seconds(lambda: self._made(calls), device)
        alone, together = _seconds_of[graph]
        return together < len(calls) * alone

    def _is_right(self, calls: Sequence[Sequence[Tensor]]) -> bool:
        last = len(calls) - 1
        found, call, step = self._made(calls)[last], calls[last], self._steps[last]
        return step.disagreement(found, call, step.function(*call)) == 0


def _differ(tensors: Sequence[Tensor]) -> bool:
    """Tell whether calls need tensors of their own: weights of one model are shared, which is faster."""
    first, *rest = tensors
    others = [t for t in rest if t is not first]
    # Small ones may be equal by chance, as labels are, and each answer is a graph of its own.
    return bool(others) and (first.numel() < _SMALL or not all(torch.equal(t, first) for t in others))


_seconds_of: WeakKeyDictionary[Future[Function], tuple[float, float]] = WeakKeyDictionary()


def _seconds(work: Callable[[], object], device: torch.device, *, repeats: int = 3) -> float:
    """Return how long it takes once, on average, after a first time that does not count."""

    def until_done() -> float:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()

    work()
    start = until_done()
    for _ in range(repeats):
        work()
    return (until_done() - start) / repeats


def run_interleaved(jobs: Iterable[Callable[[], T]]) -> list[Future[T]]:
    """Do jobs whose evaluations are made side by side, where they are compiled and that is faster.

    Each has a thread of its own, of which one is awake at a time: whoever needs a compiled evaluation sleeps until all
    others need one, too, or are done. So what one job does never meets another half-way, and nothing takes more cores
    than one job does. (Where torch calculates in several threads, each job has its own set of them, of which one is
    busy; measured with one.) Jobs begin with the caller's context variables, CUDA device and stream, but not with its
    autocast.

    Args:
        jobs: Audits or attacks that know nothing of each other.

    Returns:
        Their results or errors, all done.
    """
    jobs = list(jobs)
    if len(jobs) < 2:
        return [_done(job) for job in jobs]
    turns = _Rendezvous(len(jobs))
    with undrawn(), ThreadPoolExecutor(len(jobs), thread_name_prefix="gradaudit-turns") as pool:
        try:
            futures = [pool.submit(copy_context().run, turns.attend, number, job) for number, job in enumerate(jobs)]
            wait_for(futures)
        except BaseException:  # Ctrl-C, or no thread to be had: those who have begun end at their next evaluation
            turns.give_up()
            raise
    return futures


def _done(job: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future


class _Likeness:
    """What torch keeps for each thread, to be taken on by another."""

    def __init__(self) -> None:
        self._alone = torch.get_num_threads() == 1
        self._differentiates = torch.is_grad_enabled()
        self._multithreading = torch._C._is_multithreading_enabled()
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._stream = torch.cuda.current_stream() if cuda else None

    def take_on(self) -> None:
        """Calculate as the thread does that this was made in."""
        if self._alone:
            use_single_thread()
        torch.set_grad_enabled(self._differentiates)
        torch.autograd.set_multithreading_enabled(self._multithreading)
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)  # of the caller's device, which becomes this thread's


@dataclass(eq=False)
class _PendingCall:
    """A call that somebody sleeps for."""

    number: int
    step: CompiledEvaluation
    call: Sequence[Tensor]
    asked: torch.cuda.Event | None
    made: torch.cuda.Event | None = None
    found: tuple[Tensor, ...] | None = None
    answered: threading.Event = field(default_factory=threading.Event)


class _Rendezvous:
    """Threads of which one is awake, and what the others wait for."""

    def __init__(self, members: int) -> None:
        self._all, self._going = members, members
        self._awake = threading.Lock()
        self._wishes: list[_PendingCall] = []
        self._together: dict[tuple[CompiledEvaluation, ...], BatchedGraph] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._likeness = _Likeness()
        self._given_up = False

    def attend(self, number: int, job: Callable[[], T]) -> T:
        """Do a job as one of those who take turns."""
        with self._awake:
            self._likeness.take_on()
            _turns.set(self)
            _number.set(number)
            try:
                return job()
            finally:
                self._going -= 1
                self._answer()

    def give_up(self) -> None:
        """Let every job end at its next evaluation."""
        self._given_up = True
        for wish in list(self._wishes):
            wish.answered.set()

    def evaluate(self, step: CompiledEvaluation, call: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Make a call along with others; None: it is to be made alone.

        Raises:
            CancelledError: When the jobs were given up.
        """
        self._go_on()
        if not step.trusted:
            return None
        device = call[0].device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        wish = _PendingCall(_number.get(), step, call, None if stream is None else stream.record_event())
        self._wishes.append(wish)
        self._answer()
        if not wish.answered.is_set():
            self._awake.release()
            wish.answered.wait()
            self._awake.acquire()
            self._go_on()
        if stream is not None and wish.made is not None:
            stream.wait_event(wish.made)
            for tensor in wish.found or ():
                tensor.record_stream(stream)
        return wish.found

    def _go_on(self) -> None:
        if self._given_up:
            raise CancelledError

    def _answer(self) -> None:
        """Answer all wishes, if nobody else is still under way to one."""
        if len(self._wishes) < self._going:
            return
        wishes, self._wishes = sorted(self._wishes, key=lambda wish: wish.number), []
        try:
            # Whoever was the last may be at its end: without what it calculated in.
            with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
                self._make_all(wishes)
        except Exception as error:  # of a device; the calls are as good one by one
            logger.info("Evaluations are not made side by side: %s", first_line(error))
        finally:
            for wish in wishes:
                wish.answered.set()

    def _make_all(self, wishes: list[_PendingCall]) -> None:
        alike: dict[object, list[_PendingCall]] = {}
        for wish in wishes:
            alike.setdefault((wish.step.problem, *(a.shape for a in wish.call)), []).append(wish)
        groups = {self._filled(group): group for group in alike.values() if len(group) > 1}
        self._together = {steps: self._together.get(steps) or BatchedGraph(steps) for steps in groups}
        for steps, group in groups.items():
            self._make(self._together[steps], group)

    def _filled(self, wishes: list[_PendingCall]) -> tuple[CompiledEvaluation, ...]:
        """Return as many steps as there were members: one graph serves those who are left, too."""
        steps = [wish.step for wish in wishes]
        return (*steps, *[steps[-1]] * (self._all - len(steps)))

    def _make(self, together: BatchedGraph, wishes: list[_PendingCall]) -> None:
        """Make calls on a stream of their own, behind whatever each of them waits for on its."""
        calls, device = [wish.call for wish in wishes], wishes[0].call[0].device
        if device.type != "cuda":
            found, made = together(calls), None
        else:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            for wish in wishes:
                assert wish.asked is not None
                stream.wait_event(wish.asked)
            with torch.cuda.stream(stream):
                found, made = together(calls), stream.record_event()
        for number, wish in enumerate(wishes):
            wish.found, wish.made = found[number] if found else None, made


_turns: ContextVar[_Rendezvous | None] = ContextVar("turns", default=None)
_number: ContextVar[int] = ContextVar("number")
