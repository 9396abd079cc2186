"""A compiled evaluation as one CUDA graph: one launch in place of one for each kernel.

At small batches a device waits for the host between kernels most of the time. A graph replays them all, at the
addresses of its capture: arguments are copied there, and results away from there.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Replay = Callable[[], object]

_WARM_UP = 3  # calls before the capture: libraries choose algorithms and take their workspaces in the first ones

logger = logging.getLogger(__name__)


def capture(function: Function, arguments: Sequence[Tensor]) -> tuple[Replay, tuple[Tensor, ...]]:
    """Capture a call, on a stream of its own; return what repeats it on the current stream, and where its results lie.

    It waits for the whole device, once. Other threads, training among them, may allocate meanwhile: that is what
    `thread_local` permits (PyTorch's and CUDA's documentation of capture modes).
    """
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            function(*arguments)
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
        results = function(*arguments)
    return graph.replay, results


class CudaGraphFunction:
    """A function of CUDA tensors, captured by its first call; where that fails it is called as it is.

    Calls may come from several threads and streams: they take turns, on the host and on the device.

    Args:
        function: Takes tensors to tensors, draws no random number and does not wait for the device.
        capture: Takes it and tensors for its arguments to what repeats the call, and where the results then lie.
    """

    def __init__(
        self,
        function: Function,
        capture: Callable[[Function, Sequence[Tensor]], tuple[Replay, tuple[Tensor, ...]]] = capture,
    ) -> None:
        self._function, self._capture = function, capture
        self._lock = threading.Lock()
        self._places: list[Tensor] = []
        self._seen: list[tuple[weakref.ref[Tensor], int] | None] = []
        self._replay: Replay | None = None
        self._results: tuple[Tensor, ...] = ()
        self._failed = False
        self._done: torch.cuda.Event | None = None

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Call the function, with tensors of the shapes, strides and types that the first call had."""
        with self._lock:
            if self._replay is None and not self._failed:
                self._prepare(arguments)
            if self._replay is not None:
                with self._turn(arguments[0].device):
                    self._fill(arguments)
                    self._replay()
                    return tuple(t.clone() for t in self._results)
        return self._function(*arguments)

    def _prepare(self, arguments: Sequence[Tensor]) -> None:
        try:
            self._places = [t.clone() for t in arguments]
            self._replay, self._results = self._capture(self._function, self._places)
            self._seen = [None] * len(arguments)
        except Exception as error:  # what a driver or a kernel refuses: the evaluation is as good without
            logger.info("Evaluations are compiled, but not captured as a CUDA graph: %s", error)
            self._places, self._failed = [], True

    def _fill(self, arguments: Sequence[Tensor]) -> None:
        """Copy what is not in its place yet: in one attack the weights are, and the candidate is not."""
        for i, (place, tensor, seen) in enumerate(zip(self._places, arguments, self._seen, strict=True)):
            if seen is None or seen[0]() is not tensor or seen[1] != tensor._version:
                place.copy_(tensor)
                self._seen[i] = weakref.ref(tensor), tensor._version

    @contextmanager
    def _turn(self, device: torch.device) -> Iterator[None]:
        """Let the current stream wait for what another one still does at the same addresses."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done = torch.cuda.Event()
            self._done.record(stream)
