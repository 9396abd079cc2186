"""Files of unknown origin: read within limits, or refused with one sentence.

A gate that ends in a traceback exits with 1, which reads as BLOCK. So whatever a file holds, these functions return a
value or raise `InvalidInputError`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.utils.formatting import printable

TEXT_LIMIT = 512 * 2**20
"""Bytes of a text file; the log of a hundred thousand audits has about 300 MB."""
DEPTH_LIMIT = 32
"""Containers inside containers; a stamp has 7."""
VALUES_LIMIT = 20_000_000
"""Values in one JSON document."""
PICTURE_LIMIT = 32 * 2**20
"""Bytes of a picture; also, its pixels."""
_INTEGER_LIMIT = 2**63
_CONTAINERS = (dict, list, tuple)  # tuples: in checkpoints
_EXPANDED_LIMIT = 2**30
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # first object of a file by torch.save before 1.6
_PNG_HEAD, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"


def regular_file(path: str | PathLike[str]) -> Path:
    """Return the path of an ordinary file; a pipe or a device could block or never end.

    Raises:
        InvalidInputError: When it is missing, unreachable or of another kind.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InvalidInputError(f"path: nothing can be read at {_name(path)} ({_reason(error)}).") from error
    if not stat.S_ISREG(mode):
        raise InvalidInputError(f"path: expected an ordinary file, {_name(path)} is a folder, pipe or device.")
    return path


def read_bytes(path: str | PathLike[str], *, limit: int = TEXT_LIMIT) -> bytes:
    """Read a whole ordinary file.

    Raises:
        InvalidInputError: When it cannot be read or holds more than `limit` bytes.
    """
    path = regular_file(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, limit))  # a log that grows meanwhile is read as it was when opened
    except (OSError, MemoryError) as error:
        raise InvalidInputError(f"path: {_name(path)} cannot be read ({_reason(error)}).") from error
    if size > limit:
        raise InvalidInputError(f"path: expected at most {limit} bytes, {_name(path)} has {size}.")
    return content


def read_text(path: str | PathLike[str], *, limit: int = TEXT_LIMIT) -> str:
    """Read a file of UTF-8 text.

    Raises:
        InvalidInputError: When it cannot be read, holds more than `limit` bytes or other bytes than UTF-8.
    """
    content = read_bytes(path, limit=limit)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"path: expected UTF-8 text, {_name(path)} has another byte at {error.start}; it is damaged or no text."
        ) from error


def parse_json(text: str, *, what: str = "text") -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        text: The document.
        what: What to call it in an error.

    Returns:
        Plain data as `check_plain` accepts it.

    Raises:
        InvalidInputError: When it is malformed, no object, or more than `check_plain` accepts.
    """
    try:
        values = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError, MemoryError) as error:  # ValueError: also an integer of 5 000 digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _reason(error)
        raise InvalidInputError(f"path: {printable(what)} is not valid JSON ({reason}).") from error
    return check_plain(values, what=what)


def read_json(path: str | PathLike[str], *, limit: int = TEXT_LIMIT) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        InvalidInputError: As `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, limit=limit), what=str(path))


def read_json_lines(path: str | PathLike[str], *, limit: int = TEXT_LIMIT) -> list[dict[str, Any]]:
    """Read a log of one JSON object per line; a last line that a crash cut off is ignored.

    Raises:
        InvalidInputError: As `read_text` and `parse_json`, naming the line.
    """
    # Not splitlines: it divides at characters that may stand inside JSON strings.
    *lines, rest = read_text(path, limit=limit).split("\n")
    events = [parse_json(line, what=f"line {number} of {path}") for number, line in enumerate(lines, 1)]
    try:  # without a line end: it is complete, or it was cut off
        json.loads(rest)
    except (ValueError, RecursionError, MemoryError):
        return events
    return [*events, parse_json(rest, what=f"line {len(lines) + 1} of {path}")]


def check_plain(values: Any, *, what: str = "text") -> dict[str, Any]:
    """Return the values if they are an object of plain JSON within limits.

    Checkpoints hold such objects too; there one list can occur in many places, and every place is counted.

    Raises:
        InvalidInputError: When it is no object; when a key is not text, a number is not finite or has more than 64
            bits, text holds a lone surrogate, a value is of another type; when it is deeper than `DEPTH_LIMIT` or has
            more than `VALUES_LIMIT` values.
    """
    what = printable(what)
    if type(values) is not dict:
        raise InvalidInputError(f"path: expected a JSON object in {what}, got {type(values).__name__}.")
    seen, level = 0, [values]
    for _ in range(DEPTH_LIMIT):
        below: list[Any] = []
        for container in level:
            keys, entries = ((), container) if type(container) is not dict else (container, list(container.values()))
            seen += len(entries) + 1
            if seen > VALUES_LIMIT:
                raise InvalidInputError(f"path: expected at most {VALUES_LIMIT} values, {what} has more.")
            wrong = next(filter(None, map(_fault_of, (*keys, *entries))), "")
            if wrong or any(type(key) is not str for key in keys):
                raise InvalidInputError(
                    f"path: expected plain JSON in {what}, found {wrong or 'a key that is no text'}."
                )
            below += [value for value in entries if type(value) in _CONTAINERS]
        if not below:
            return values
        level = below
    raise InvalidInputError(f"path: expected at most {DEPTH_LIMIT} nested levels, {what} has more.")


def load_checkpoint(path: str | PathLike[str], *, trust: bool = False, mmap: bool = True) -> Any:
    """Read a file of `torch.save` onto the CPU; a file that is damaged, or grows when read, is refused.

    Args:
        path: The file.
        trust: Allow objects that load only by running code that the file names. Such code can do anything.
        mmap: Leave tensors in the file until they are used. It must then stay as it is while they are in use.

    Raises:
        InvalidInputError: When it is missing, of another kind, cut off or damaged, compressed, or needs `trust`.
    """
    path = regular_file(path)
    archive = _check_container(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=not trust, mmap=mmap and archive)
    except (Exception, SystemExit) as error:  # SystemExit: trusted code must not end a gate with its own exit status
        raise InvalidInputError(_why_not_loaded(path, error, trust=trust)) from error
    _check_tensors(loaded, path)
    return loaded


def read_picture(folder: str | PathLike[str], name: str) -> bytes:
    """Read a PNG that lies inside a folder.

    Args:
        folder: A run folder.
        name: The picture's path in it.

    Raises:
        InvalidInputError: When the path leads out of the folder (also by a symbolic link), is missing, or is no whole
            PNG of at most `PICTURE_LIMIT` bytes and pixels.
    """
    if not isinstance(name, str):
        raise InvalidInputError(f"pairs: expected the path of a picture, got {type(name).__name__}.")
    try:
        root = Path(folder).resolve(strict=True)
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise InvalidInputError(f"pairs: nothing can be read at {_name(name)} ({_reason(error)}).") from error
    if not path.is_relative_to(root):
        raise InvalidInputError(f"pairs: expected a picture inside the run folder, {_name(name)} leads out of it.")
    content = read_bytes(path, limit=PICTURE_LIMIT)
    whole = content.startswith(_PNG_HEAD) and content[12:16] == b"IHDR" and content.endswith(_PNG_END)
    if not whole or math.prod(struct.unpack(">II", content[16:24])) > PICTURE_LIMIT:
        raise InvalidInputError(f"pairs: expected a whole PNG of at most {PICTURE_LIMIT} pixels, got {_name(name)}.")
    return content


def _name(path: str | PathLike[str]) -> str:
    return printable(path, 300)


def _reason(error: BaseException) -> str:
    """Return the message of an error, shortened."""
    said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return printable(said, 160) or type(error).__name__


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; refuse a key that occurs twice, whose first value would be lost."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _fault_of(value: Any) -> str:
    """Return what is wrong with a single JSON value, or an empty string."""
    kind = type(value)
    if kind is float:
        return "" if math.isfinite(value) else "a number that is not finite"
    if kind is int:
        return "" if -_INTEGER_LIMIT <= value < _INTEGER_LIMIT else "an integer of more than 64 bits"
    if kind is str:
        half = not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value)
        return "text with half a character (a lone surrogate)" if half else ""
    return "" if value is None or kind in (bool, *_CONTAINERS) else f"a value of type {printable(kind.__name__, 60)}"


def _check_container(path: Path) -> bool:
    """Return whether a file of `torch.save` is an archive, which can be mapped.

    `torch.save` stores and never compresses, so that entries are no larger than the file. Others could fill memory.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise InvalidInputError(f"path: {_name(path)} cannot be read ({_reason(error)}).") from error
    if not head.startswith(b"PK\x03\x04"):
        if head.startswith(b"\x80") and _LEGACY_MAGIC in head:
            return False
        raise InvalidInputError(f"path: expected a file written by torch.save, {_name(path)} begins with {head[:8]!r}.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise InvalidInputError(
            f"path: {_name(path)} is cut off or damaged ({_reason(error)}); write it again with torch.save."
        ) from error
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    declared = sum(entry.file_size for entry in entries)
    if compressed or declared > size:
        raise InvalidInputError(
            f"path: expected what torch.save stores, without compression; {_name(path)} has {size} bytes and would "
            f"grow to {declared}."
        )
    return True


def _why_not_loaded(path: Path, error: BaseException, *, trust: bool) -> str:
    text = str(error)
    needed = re.search(r"GLOBAL ([^\s,]+)|(?:Unsupported class|unrecognized function) ([^\s,]+)", text)
    if not trust and needed:
        return (
            f"path: {_name(path)} holds {printable(needed[1] or needed[2], 120)}, which loads only by running code: "
            "pass trust=True (on the command line --trust) if you know who made the file."
        )
    said = re.search(r"WeightsUnpickler error:\s*([^\n]+)", text)
    reason = printable(said[1], 160) if said else _reason(error)
    return f"path: {_name(path)} is damaged or no checkpoint ({type(error).__name__}: {reason})."


def _check_tensors(loaded: Any, path: Path) -> None:
    """Refuse tensors that claim far more elements than the file has bytes, as a stride of 0 allows."""
    limit = 8 * path.stat().st_size + _EXPANDED_LIMIT
    seen: set[int] = set()
    left, declared = [loaded], 0
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_meta:
                declared += value.numel() * value.element_size()
        elif isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            left += value
    if declared > limit:
        raise InvalidInputError(f"path: the tensors of {_name(path)} claim {declared} bytes, far more than it has.")
