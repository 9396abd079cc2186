"""`gradaudit compare`: attack the same images through several models."""

from __future__ import annotations

import argparse
import json
import runpy
import zipfile
from pathlib import Path

import numpy as np
import torch

from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.audit.comparison import compare
from lightning_gradaudit.cli.architectures import BUILT_IN, training_states
from lightning_gradaudit.cli.output import import_report_module, print_table, write_text
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.utils.files import load_checkpoint, regular_file
from lightning_gradaudit.utils.formatting import printable

_DATA_LIMIT = 8 * 2**30
"""Bytes of arrays in a file of images."""
CEILING_CAVEAT = (
    "exposure: what the attack got beyond a guess; ceiling: a local estimate of what any attacker could get, no "
    "guarantee; effort: simulated gradients until half of the images were exposed; exact: given away by algebra."
)


def run(options: argparse.Namespace) -> int:
    """Compare the models and show the table; return 0."""
    images, labels = _read_images(options.data)
    own = [(text, _build_own_model(text)) for text in options.own]
    chosen = options.models if options.models is not None else ([] if own else list(BUILT_IN))
    # The attacked images are spread over the set, so that classes mix; the others train and are the gallery.
    attacked = torch.arange(options.images) * max(1, len(images) // max(1, options.images))
    rest = torch.ones(len(images), dtype=torch.bool)
    if not 0 < options.images < len(images):
        raise InvalidInputError(f"--images: expected between 1 and {len(images) - 1}, got {options.images}.")
    rest[attacked] = False
    built_in = {name: BUILT_IN[name] for name in chosen}
    states = training_states(built_in, images[rest], labels[rest], epochs=options.epochs, seed=options.seed)
    found = compare(
        [*own, *states],
        images[attacked],
        labels[attacked],
        mode="train" if options.train_mode else "eval",
        batch_size=options.batch_size,
        budget=Budget(evaluations=options.evaluations),
        gallery=images[rest],
        compile=options.compile,
        seed=options.seed,
    )
    if options.out is not None:
        write_text(options.out, "comparison.json", json.dumps(found.to_dict(), indent=2, allow_nan=False))
        write_text(options.out, "comparison.svg", import_report_module("charts").comparison_chart(found))
    if options.json:
        print(json.dumps(found.to_dict(), allow_nan=False))
    else:
        print_table(found.table(), f"{found.images} images, {found.batch_size} behind a gradient")
        print(CEILING_CAVEAT)
    return 0


def _read_images(path: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Read images in [0, 1] and labels."""
    if path is None:
        from lightning_gradaudit.cli.demo import faces

        return faces()
    try:
        path = regular_file(path)
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        images = labels = np.empty(0)
        if size <= _DATA_LIMIT:
            with np.load(path) as file:
                images, labels = file["images"], file["labels"]
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own for a damaged file
        raise InvalidInputError(f"--data: {path} is no npz with images and labels ({printable(error)}).") from error
    if size > _DATA_LIMIT:
        raise InvalidInputError(f"--data: expected at most {_DATA_LIMIT} bytes of arrays, {path} holds {size}.")
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
        raise InvalidInputError(f"--data: expected uint8 images (N, C, H, W), got {images.dtype} {images.shape}.")
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def _build_own_model(text: str) -> torch.nn.Module:
    """Build a user's model from "FILE.py:NAME" or "FILE.py:NAME=CHECKPOINT"; the file is executed."""
    source, _, weights = text.partition("=")
    file, _, name = source.rpartition(":")
    if not file or not Path(file).is_file():
        raise InvalidInputError(f"--own: expected FILE.py:NAME or FILE.py:NAME=CHECKPOINT with a file, got {text!r}.")
    namespace = runpy.run_path(file)
    if not callable(namespace.get(name)):
        raise InvalidInputError(f"--own: {file} has no callable named {name!r}.")
    model = namespace[name]()
    if not isinstance(model, torch.nn.Module):
        raise InvalidInputError(f"--own: {name} returned {type(model).__name__}, expected a torch.nn.Module.")
    if weights:
        try:
            state = load_checkpoint(weights, mmap=False)
            model.load_state_dict(state.get("state_dict", state))
        except InvalidInputError as error:
            raise InvalidInputError(f"--own: {error}") from error
        except (RuntimeError, AttributeError, TypeError) as error:
            raise InvalidInputError(f"--own: {weights} does not hold the weights of {name} ({error}).") from error
    return model
