"""Whole evaluations as one compiled graph: forward, backward, objective and second-order pass.

Compiling a forward pass alone does not help: PyTorch does not differentiate a compiled function twice. So the whole
evaluation is traced into ATen operations first, including all Python code of the training step. Inductor compiles that
graph, in which nothing is left to differentiate. Every tensor of the problem is an argument of the graph, so one graph
serves all later audits of the same architecture, shapes and objective.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_gradaudit.attacks.compilation.cuda_graph import CudaGraphFunction, Function
from lightning_gradaudit.errors import UnsupportedError
from lightning_gradaudit.utils.pickling import form, join_tensors, split_tensors
from lightning_gradaudit.utils.threads import use_single_thread


@dataclass(frozen=True, kw_only=True)
class CompilationSettings:
    """When graphs are compiled, kept and trusted.

    Attributes:
        kept_graphs: Compiled graphs that a process holds.
        eager_evaluations: Evaluations of a problem before a compiler is started: many attacks end earlier.
        relative_error: Largest error of a graph's gradient; kinks of a deep ReLU network cause up to 1e-2 in float32.
        tf32_rounding: Relative rounding of the factors that a GPU multiplies in TF32.
        rounding_factor: How much larger a gradient's error may be than the change by rounding the images.
    """

    kept_graphs: int = 32
    eager_evaluations: int = 50
    relative_error: float = 0.05
    tf32_rounding: float = 2.0**-11
    rounding_factor: float = 3.0


SETTINGS = CompilationSettings()


@dataclass(eq=False)
class Compilation:
    """What was compiled inside a `compiled_evaluation` block.

    Attributes:
        wait: Wait for the compiler instead of evaluating eagerly meanwhile.
        evaluations: Number of evaluations by compiled graphs.
        reasons: Why the other evaluations were eager, each reason once.
    """

    wait: bool = False
    evaluations: int = 0
    reasons: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Note why an evaluation was eager."""
        reason = f"not compiled: {reason}"
        if reason not in self.reasons:
            self.reasons.append(reason)


_current: ContextVar[Compilation | None] = ContextVar("compilation", default=None)


@contextmanager
def compiled_evaluation(*, wait: bool = False) -> Iterator[Compilation]:
    """Let gradient matching use compiled evaluations in this block and thread.

    An evaluation is compiled in the background, which takes 10 to 90 seconds of one core, once in a process for each
    architecture, shapes, objective and penalties. Until then, and where it cannot be compiled, evaluations are eager.
    The results are those of eager evaluations up to rounding.

    Args:
        wait: Wait for the compiler: the trajectory is then the same in every run, whatever the machine.

    Yields:
        What was compiled; complete when the block ends.

    Example:
        >>> from lightning_gradaudit.attacks import compiled_evaluation
        >>> with compiled_evaluation() as compilation:
        ...     pass  # attack(observation, budget=..., generator=...)
        >>> compilation.evaluations
        0
    """
    compilation = Compilation(wait)
    token = _current.set(compilation)
    try:
        yield compilation
    finally:
        _current.reset(token)


def current_compilation() -> Compilation | None:
    """Return the compilation of the `compiled_evaluation` block this thread is in; None: it is in none."""
    return _current.get()


def wait_for_compilers() -> None:
    """Wait until every requested graph is compiled or has failed."""
    for graph in list(_compiled.values()):
        wait_for([graph])


class CompiledEvaluation:
    """A picklable function of tensors, and its compiled twin once there is one.

    Args:
        function: Maps tensors that need no gradient to a tuple of tensors. It may hold further tensors.
        refused: Why it must not be compiled; empty: it may be.
        twin: What is compiled, if another way to the same results is cheaper in a graph. None: the function.

    Attributes:
        problem: The twin in pickled form without the tensors it holds; empty until a graph was looked for.
        tensors: The tensors it holds.
        graph: The future of its graph; None: none was requested yet.
        trusted: Whether the graph has agreed with the function.
    """

    def __init__(self, function: Function, refused: str = "", *, twin: Function | None = None) -> None:
        self.function, self._refused = function, refused
        self._twin = function if twin is None else twin
        self._calls = 0
        self.problem = b""
        self.tensors: list[Tensor] = []
        self.graph: Future[Function] | None = None
        self.trusted = False

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Evaluate, by the compiled graph where one is requested and ready."""
        compilation = _current.get()
        if compilation is None:
            return self.function(*arguments)
        if self._refused:
            compilation.refuse(self._refused)
            return self.function(*arguments)
        self._calls += 1
        start = compilation.wait or self._calls > SETTINGS.eager_evaluations
        if self.graph is None and (start or self._calls == 1):
            self._find(arguments, start=start)
        if self.graph is None or not (compilation.wait or self.graph.done()):
            return self.function(*arguments)
        return self._run(self.graph, arguments, compilation)

    def _find(self, arguments: Sequence[Tensor], *, start: bool) -> None:
        """Look for the graph of an earlier problem; without one, start a compiler if `start` is set."""
        try:
            if not self.problem:
                self.problem, self.tensors = split_tensors(self._twin)
        except Exception as error:  # any error of pickling a user's objective
            self._refused = first_line(error)
            return
        self.graph = _cached(self.problem, self.tensors, [a.detach() for a in arguments], start=start)

    def _run(
        self, compiled: Future[Function], arguments: Sequence[Tensor], compilation: Compilation
    ) -> tuple[Tensor, ...]:
        try:
            with torch.no_grad():
                found = compiled.result()(*self.tensors, *(a.detach() for a in arguments))
        except Exception as error:
            self._refused = first_line(error)
            return self(*arguments)
        if not self.trusted:
            expected = self.function(*arguments)
            if (off := self.disagreement(found, arguments, expected)) > 0:
                self._refused = f"the compiled graph is off by {off:.2g}"
                return expected
            self.trusted = True
        compilation.evaluations += 1
        return found

    def disagreement(self, found: Sequence[Tensor], arguments: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Return the relative error of results; 0 where rounding explains it."""
        off = _relative_errors(found, expected)
        if all(error <= SETTINGS.relative_error for error in off) or self._is_rounding(off, arguments, expected):
            return 0.0
        return max(math.inf if math.isnan(error) else error for error in off)

    def _is_rounding(self, off: list[float], arguments: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        """Tell whether errors are no larger than those of rounding the arguments.

        In a deep ReLU network rounding decides which units switch, in TF32 many. A loss does not jump there, so its
        error is not excused.
        """
        generator = torch.Generator().manual_seed(0)

        def rounded(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            unit = max(torch.finfo(t.dtype).eps, SETTINGS.tf32_rounding if t.is_cuda else 0.0)
            return t * (1 + unit * torch.randn(t.shape, generator=generator).sign().to(t))

        loss, *gradients = off
        by_rounding = _relative_errors(self.function(*map(rounded, arguments)), expected)[1:]
        allowed = [SETTINGS.rounding_factor * error for error in by_rounding]
        return loss <= SETTINGS.relative_error and all(a <= b for a, b in zip(gradients, allowed, strict=True))


def _relative_errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, expected, strict=True)]


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# One compiled graph per problem. Problems are the same if they pickle to the same bytes, tensors aside.

_compiled: OrderedDict[str, Future[Function]] = OrderedDict()
_compiled_lock = threading.Lock()
# One: it takes a whole core.
_compiler = ThreadPoolExecutor(1, thread_name_prefix="gradaudit-compiler", initializer=use_single_thread)


def _cached(
    problem: bytes,
    held: list[Tensor],
    arguments: list[Tensor],
    *,
    start: bool,
) -> Future[Function] | None:
    """Return the future of a problem's graph; where there is none, start a compiler or return None."""
    forms = repr([form(t) for t in arguments])
    key = hashlib.sha256(problem + forms.encode()).hexdigest()
    with _compiled_lock:
        if key in _compiled:
            _compiled.move_to_end(key)
            return _compiled[key]
        if not start:
            return None
        future: Future[Function] = Future()
        _compiled[key] = future
        while len(_compiled) > SETTINGS.kept_graphs:
            _compiled.popitem(last=False)
    _compiler.submit(_compile_into, future, problem, held, arguments)
    return future


def _compile_into(
    future: Future[Function],
    problem: bytes,
    held: list[Tensor],
    arguments: list[Tensor],
) -> None:
    if not threading.main_thread().is_alive():  # a program that ends waits for work in progress only
        future.set_exception(UnsupportedError("the program is ending"))
        return
    try:
        future.set_result(_compile(problem, held, arguments))
    except Exception as error:
        future.set_exception(error)


def _compile(problem: bytes, held: list[Tensor], arguments: list[Tensor]) -> Function:
    import torch._inductor  # slow to import

    graph = _traced(problem, held, arguments)
    targets = {node.target for node in graph.graph.nodes}
    random = {str(t) for t in targets if torch.Tag.nondeterministic_seeded in getattr(t, "tags", ())}
    if random:
        raise UnsupportedError(f"the training step draws random numbers ({', '.join(sorted(random))})")
    # On the CPU Inductor converts convolutions and their weights to channels_last in every call. At small batches that
    # costs more than it saves.
    options = {"layout_optimization": False} if arguments[0].device.type == "cpu" else {}
    with torch.no_grad():
        compiled: Function = torch._inductor.compile(graph, [*held, *arguments], options=options)  # type: ignore[assignment]
    return CudaGraphFunction(compiled) if arguments[0].is_cuda else compiled


def _traced(problem: bytes, held: list[Tensor], arguments: list[Tensor]) -> torch.fx.GraphModule:
    """Trace a problem as a function of the tensors it holds and of its arguments."""
    changed: set[int] = set()

    def evaluate(*tensors: Tensor) -> tuple[Tensor, ...]:
        own = [t.clone() if i in changed else t for i, t in enumerate(tensors)]
        return join_tensors(problem, own[: len(held)])(*own[len(held) :])  # type: ignore[no-any-return]

    versions = [t._version for t in held]
    graph = make_fx(evaluate)(*held, *arguments)
    changed |= {i for i, t in enumerate(held) if t._version != versions[i]}
    # A training step may change a metric's state: the graph does so on a copy, or every call would add to it.
    return make_fx(evaluate)(*held, *arguments) if changed else graph
