"""Digests of weights, evidence, files and images, which bind a verdict to its inputs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_KEY_BYTES, _DIGEST_BYTES, _SESSION_BYTES = 32, 12, 4
_CHUNK = 1 << 22


def json_digest(values: Any) -> str:
    """Return the SHA-256 of plain JSON values, whatever the order of their keys.

    Raises:
        ValueError: When a value is NaN or infinite, which JSON does not know.
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        OSError: When it cannot be read.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def weights_digest(state: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of a state dictionary: names, shapes, dtypes and bytes, in the order of the names.

    The order of the names and the device do not matter. Entries that are not tensors (`_extra_state`) count by what
    they hold, or by their `repr` where that is unknown.

    Returns:
        None where a tensor is sharded, so that this process does not have all of its bytes.
    """
    found = hashlib.sha256()
    whole = [_add(found, name, state[name]) for name in sorted(state)]
    return found.hexdigest() if all(whole) else None


def _add(found: Any, name: str, value: Any) -> bool:
    """Add an entry; each part follows its length, so that no name can imitate bytes. False: it is sharded."""
    if isinstance(value, (dict, list, tuple)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        _add_text(found, f"{name}|{type(value).__name__}|{len(value)}")
        return all(_add(found, f"{name}/{key!r}", entry) for key, entry in entries)
    if not isinstance(value, Tensor):
        _add_text(found, f"{name}|{value!r}")
        return True
    if hasattr(value, "to_local"):
        return False
    _add_text(found, f"{name}|{tuple(value.shape)}|{value.dtype}")
    if value.numel():
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return True


def _add_text(found: Any, text: str) -> None:
    content = text.encode()
    found.update(len(content).to_bytes(8, "little") + content)


class ImageKey:
    """A secret key of one process for digests that distinguish images without revealing them.

    A digest without a key would let a reader test guesses of the image. The key is never written; digests of two keys
    cannot be compared, so each digest is stored with the session it belongs to.

    Attributes:
        session: A public name of the key.

    Example:
        >>> key, image = ImageKey(), torch.rand(1, 3, 8, 8)
        >>> key.digests(image) == key.digests(image.clone()) != ImageKey().digests(image)
        True
    """

    def __init__(self) -> None:
        self._secret = os.urandom(_KEY_BYTES)
        self.session = hashlib.blake2b(b"session", key=self._secret, digest_size=_SESSION_BYTES).hexdigest()

    def __repr__(self) -> str:
        return f"ImageKey(session={self.session!r})"

    def digests(self, pixels: Tensor) -> tuple[str, ...]:
        """Return a digest of each image (B, C, H, W) in [0, 1], of its shape and its pixels at 8 bits.

        At 8 bits a photograph is the same image after normalisation and back.
        """
        coarse = (pixels.detach().float().cpu().clamp(0, 1).nan_to_num(0.0) * 255).round().to(torch.uint8)
        shape = str(tuple(pixels.shape[1:])).encode()
        return tuple(
            hashlib.blake2b(shape + each.numpy().tobytes(), key=self._secret, digest_size=_DIGEST_BYTES).hexdigest()
            for each in coarse
        )


PROCESS_KEY = ImageKey()
"""The key of audits without one of their own, for the life of the process."""
