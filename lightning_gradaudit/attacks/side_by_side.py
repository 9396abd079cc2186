"""Independent evaluations of one step as one compiled graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_gradaudit.attacks.compilation import WholeStep, asked_for, first_line
from lightning_gradaudit.attacks.cuda_graph import Function

logger = logging.getLogger(__name__)


class SideBySide:
    """Independent calls of a step, made as one where that is faster: one graph keeps busy what waits between kernels.

    Results are those of the calls but for rounding. Which way is faster is measured, once for a graph.

    Args:
        step: The step; until its own graph is trusted, and where nothing is compiled, calls are made one by one.
    """

    def __init__(self, step: WholeStep) -> None:
        self._step = step
        self._calls = 0
        self._graph: Future[Function] | None = None
        self._pays: bool | None = None

    def __call__(self, calls: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """Make calls; if they are not as many as the first time, one by one."""
        compilation = asked_for()
        # Whoever waits for compilers wants the same trajectory on every machine.
        if compilation is not None and not compilation.wait and self._may_pay(calls):
            try:
                if self._is_ready(calls):
                    found = self._together(calls)
                    compilation.evaluations += len(calls)
                    return found
            except Exception as error:  # the calls are as good one by one
                self._pays = False
                logger.info("Evaluations are not made side by side: %s", first_line(error))
        return [self._step(*call) for call in calls]

    def _may_pay(self, calls: Sequence[Sequence[Tensor]]) -> bool:
        return len(calls) > 1 and self._step.trusted and self._pays is not False

    def _is_ready(self, calls: Sequence[Sequence[Tensor]]) -> bool:
        if self._graph is None:
            self._graph, self._calls = self._step.graph_of_many(_stacked(calls)), len(calls)
        if len(calls) != self._calls or not self._graph.done():
            return False
        if self._pays is None:
            self._pays = self._is_faster(calls) and self._is_right(calls)
        return self._pays

    def _together(self, calls: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        assert self._graph is not None
        found = self._step.by_graph(self._graph, _stacked(calls))
        return list(zip(*(t.unbind() for t in found), strict=True))

    def _is_faster(self, calls: Sequence[Sequence[Tensor]]) -> bool:
        graph, own = self._graph, self._step.graph
        assert graph is not None
        assert own is not None
        if graph not in _is_faster:
            device = calls[0][0].device
            together = _seconds(lambda: self._together(calls), device)
            _is_faster[graph] = together < _seconds(lambda: [self._step.by_graph(own, c) for c in calls], device)
        return _is_faster[graph]

    def _is_right(self, calls: Sequence[Sequence[Tensor]]) -> bool:
        found, call = self._together(calls)[-1], calls[-1]
        return self._step.disagreement(found, call, self._step.function(*call)) == 0


_is_faster: WeakKeyDictionary[Future[Function], bool] = WeakKeyDictionary()


def _stacked(calls: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack([a.detach() for a in each]) for each in zip(*calls, strict=True)]


def _seconds(work: Callable[[], object], device: torch.device, *, repeats: int = 3) -> float:
    """Return how long it takes, after once that does not count."""

    def until_done() -> float:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()

    work()
    start = until_done()
    for _ in range(repeats):
        work()
    return until_done() - start
