"""Audits on a Ray cluster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.errors import AuditLostError, InvalidInputError, UnsupportedError, described
from lightning_gradaudit.execution.remote import RemoteExecutor
from lightning_gradaudit.execution.shared_memory import Packer, SharedBuffer


class RayExecutor(RemoteExecutor):
    """Run audits as Ray tasks: as many at once as the cluster has room for.

    Large tensors lie in Ray's object store, and what has not changed since the last submission is not put there again.
    A task whose worker or node is lost is run again elsewhere; its result counts once. Needs the extra `[ray]`, and the
    same packages on every node. Connects to the cluster that `ray.init` finds: that of `RAY_ADDRESS`, or else a local
    one, which `shutdown` ends.

    Args:
        cpus: CPU cores of one audit.
        gpus: GPUs of one audit; 0.25 lets four audits share one. Pass `device="cuda"` to the auditor, or they will
            attack on the CPU.
        resources: Custom resources of one audit, by which nodes are chosen, such as `{"audit": 1}`.
        retries: How often an audit is run again whose worker was lost; -1: without end.

    Raises:
        InvalidInputError: When an argument is out of range.
        UnsupportedError: By the first submission, when Ray is not installed.
    """

    def __init__(
        self, *, cpus: float = 1, gpus: float = 0, resources: Mapping[str, float] | None = None, retries: int = 3
    ) -> None:
        if cpus < 0 or gpus < 0:
            raise InvalidInputError(f"cpus and gpus must be >= 0, got {cpus!r} and {gpus!r}.")
        if retries < -1 or isinstance(retries, bool):
            raise InvalidInputError(f"retries must be >= 0, or -1 for no end, got {retries!r}.")
        self.cpus, self.gpus, self.resources, self.retries = cpus, gpus, dict(resources or {}), retries
        super().__init__(Packer(_ObjectStoreBuffer))
        self._task: Any = None
        self._started_ray = False

    def __repr__(self) -> str:
        return f"RayExecutor(cpus={self.cpus}, gpus={self.gpus}, resources={self.resources}, retries={self.retries})"

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._connect()
        return super().submit(fn, *args, **kwargs)

    def _send(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Future[Any], Callable[[], object]]:
        reference = self._task.remote(fn, *args, **kwargs)
        return reference.future(), lambda: _cancel(reference)

    def _connect(self) -> None:
        if self._task is not None:
            return
        ray = _ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
            self._started_ray = True
        self._task = ray.remote(
            num_cpus=self.cpus, num_gpus=self.gpus, resources=self.resources, max_retries=self.retries
        )(_call)

    @staticmethod
    def _unwrap(error: BaseException) -> BaseException:
        # Ray wraps what a task raises; every other executor raises the cause.
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, Exception) else error

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop; with `cancel_futures`, cancel what is not done. Ray itself ends if it was started here."""
        super().shutdown(wait=wait, cancel_futures=cancel_futures)
        if self._started_ray and (wait or cancel_futures):
            _ray().shutdown()
            self._started_ray = False


def _cancel(reference: Any) -> None:
    if _ray().is_initialized():
        _ray().cancel(reference, force=True)


class _ObjectStoreBuffer(SharedBuffer):
    """Bytes in Ray's object store, which Ray keeps while a reference exists."""

    def __init__(self, content: Tensor) -> None:
        self.reference = _ray().put(content.numpy())

    def read(self) -> Tensor:
        with warnings.catch_warnings():  # the store's memory is read-only, and is copied at once
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(_ray().get(self.reference)).clone()


def _call(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    try:
        return fn(*args, **kwargs)
    except SystemExit as error:
        # Ray takes a SystemExit for the loss of its worker and repeats the work, with the same result. The one by which
        # Ray itself ends a worker has this attribute.
        if hasattr(error, "ray_terminate_msg"):
            raise
        raise AuditLostError(f"the audit ended with {described(error)}") from error


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            "executor: Ray is not installed. Install lightning-gradaudit[ray], or choose executor='process'."
        ) from error
    return ray
