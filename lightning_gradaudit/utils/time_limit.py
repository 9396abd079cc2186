"""How long the work of a thread may take, and a notice by which another process of this machine shortens it."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4


class TimeIsUpError(Exception):
    """Work was given up because its time was over."""


def _new_path() -> Path:
    return Path(tempfile.gettempdir()) / f"gradaudit-{uuid4().hex}"


@dataclass(frozen=True)
class EndNotice:
    """Tells running work when to end: a small file, which is there only once the notice is given.

    It can be pickled. On another machine it is never seen.

    Attributes:
        path: Of the file. It holds a moment of `time.monotonic`, a clock that processes of one machine share.
    """

    path: Path = field(default_factory=_new_path)

    def give(self, seconds: float) -> None:
        """Let the work end in so many seconds; where the file cannot be written, it goes on as it was."""
        draft = self.path.with_suffix(".new")
        with suppress(OSError):
            draft.write_text(repr(time.monotonic() + seconds))
            draft.replace(self.path)

    def withdraw(self) -> None:
        """Remove the file, if there is one."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def left(self) -> float:
        """Return the seconds until the work is to end; infinite where no notice was given."""
        try:
            return float(self.path.read_text()) - time.monotonic()
        except (OSError, ValueError):
            return math.inf


_ends: ContextVar[float] = ContextVar("ends", default=math.inf)
_notice: ContextVar[EndNotice | None] = ContextVar("notice", default=None)


@contextmanager
def limited_time(seconds: float | None = None, notice: EndNotice | None = None) -> Iterator[None]:
    """Limit the work of this block and thread; a limit around it holds, too.

    Args:
        seconds: From now on; None: no further limit.
        notice: May end it earlier; None: that of a block around it.
    """
    ends = _ends.set(min(_ends.get(), math.inf if seconds is None else time.monotonic() + seconds))
    noticed = _notice.set(_notice.get() if notice is None else notice)
    try:
        yield
    finally:
        _notice.reset(noticed)
        _ends.reset(ends)


def time_left() -> float:
    """Return the seconds that the work of this thread has left, negative after its end; infinite without a limit."""
    notice, ends = _notice.get(), _ends.get()
    left = math.inf if math.isinf(ends) else ends - time.monotonic()
    return left if notice is None else min(left, notice.left())


def require_time() -> None:
    """Check that there is time left.

    Raises:
        TimeIsUpError: When there is none.
    """
    if time_left() <= 0:
        raise TimeIsUpError("its time was over")
