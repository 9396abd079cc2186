"""A compiled evaluation as one CUDA graph: one launch instead of one for each kernel.

At small batches a device waits for the host between kernels most of the time. A graph replays all kernels at the memory
addresses of its capture, so arguments are copied to these addresses and results from them.
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

_WARM_UP_CALLS = 3  # before the capture: in the first calls libraries choose algorithms and allocate workspaces

logger = logging.getLogger(__name__)


def capture(function: Function, arguments: Sequence[Tensor]) -> tuple[Replay, tuple[Tensor, ...]]:
    """Capture a call on a stream of its own; return a function that repeats it on the current stream, and its results.

    The capture waits for the whole device once. The mode `thread_local` lets other threads, training among them,
    allocate meanwhile (PyTorch's and CUDA's documentation of capture modes).
    """
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP_CALLS):
            function(*arguments)
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
        results = function(*arguments)
    return graph.replay, results


class CudaGraphFunction:
    """A function of CUDA tensors, captured by its first call; where the capture fails it is called directly.

    Calls from several threads and streams run one after the other, on the host and on the device.

    Args:
        function: Maps tensors to tensors; it draws no random number and does not wait for the device.
        capture: Maps the function and its arguments to a function that repeats the call, and the results it writes to.
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
        except Exception as error:  # any error of a driver or a kernel: the evaluation runs without a graph
            logger.info("Evaluations are compiled, but not captured as a CUDA graph: %s", error)
            self._places, self._failed = [], True

    def _fill(self, arguments: Sequence[Tensor]) -> None:
        """Copy the arguments that changed: during an attack the candidate changes and the weights do not."""
        for i, (place, tensor, seen) in enumerate(zip(self._places, arguments, self._seen, strict=True)):
            if seen is None or seen[0]() is not tensor or seen[1] != tensor._version:
                place.copy_(tensor)
                self._seen[i] = weakref.ref(tensor), tensor._version

    @contextmanager
    def _turn(self, device: torch.device) -> Iterator[None]:
        """Make the current stream wait for the work of other streams at the same addresses."""
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
