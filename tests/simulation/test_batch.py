"""Batches of any nesting: what is found in them, and that they come back as they were."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from lightning_gradaudit.errors import EmptyBatchError, InvalidInputError
from lightning_gradaudit.simulation.batch import BatchLayout
from lightning_gradaudit.simulation.batch_entries import OtherEntries, join_entries

B, C, H, W = 4, 3, 8, 10


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape or (B, C, H, W), generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    return torch.tensor([2, 0, 1, 1])


def same(a, b):
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def round_trip(batch):
    layout = BatchLayout.of(batch)
    split = layout.split(batch)
    return layout, split, layout.join(split.inputs, split.labels, split.other)


# Batch, images found (as paths), views, path of the labels
LAYOUTS = {
    "pair": ((images(), labels()), [(0,)], 1, (1,)),
    "weights of samples": ([images(), labels(), torch.rand(B)], [(0,)], 1, (1,)),
    "nested": (
        {"data": {"image": images(), "label": labels()}, "meta": {"path": ["a", "b", "c", "d"], "n": 3}},
        [("data", "image")], 1, ("data", "label"),
    ),
    "images alone": (images(), [()], 1, None),
    "one entry": ((images(),), [(0,)], 1, None),
    "two views": (([images(), images(seed=1)], labels()), [(0, 0), (0, 1)], 2, None),
    "named tuple": (Pair(images(), labels()), [(0,)], 1, (1,)),
    "ordered": (OrderedDict(x=images(), y=labels()), [("x",)], 1, ("y",)),
    "crops": ((images(B, 2, C, H, W), labels()), [(0,)], 2, None),
    "volume": ((images(B, 1, 5, H, W), labels()), [(0,)], 5, None),
    "channels last": ((images(B, H, W, C), labels()), [(0,)], 1, (1,)),
    "list of images": (
        ([images(C, H, W), images(C, H, W, seed=1)], [{"boxes": torch.rand(2, 4)}, {}]), [(0, 0), (0, 1)], 1, None,
    ),
    "image and mask": ((images(), images(B, 1, H, W)), [(0,)], 1, (1,)),
    "named among others": (
        {"noisy": images(), "image": images(seed=1), "label": labels()}, [("image",)], 1, ("label",),
    ),
    "several labels": ({"image": images(), "age": torch.rand(B), "kind": labels()}, [("image",)], 1, ("kind",)),
    "values": ((images(), torch.rand(B), torch.rand(B)), [(0,)], 1, None),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_and_labels_are_found_and_the_batch_comes_back_as_it_was(name):
    batch, paths, views, labelled = LAYOUTS[name]
    layout, split, back = round_trip(batch)
    assert [entry.path for entry in layout.images] == paths
    assert (layout.views, layout.labels) == (views, labelled)
    assert split.inputs.ndim == 4
    assert split.inputs.shape[1] in (1, 3)
    assert same(back, batch)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.int16])
def test_images_of_integers_are_the_numbers_that_they_are_converted_to(dtype):
    batch = (images() * 255).to(dtype), labels()
    layout, split, _ = round_trip(batch)
    assert layout.images[0].dtype == dtype
    assert torch.equal(split.inputs, batch[0].float())


def test_views_stand_one_after_the_other():
    first, second = images(), images(seed=1)
    for batch in ((first, second), torch.stack([first, second], 1), {"image": [first, second]}):
        assert torch.equal(BatchLayout.of(batch).split(batch).inputs, torch.cat([first, second]))


def test_a_batch_of_another_size_gets_the_entries_of_its_first_samples():
    weights = torch.arange(4.0)
    layout, split, _ = round_trip((images(), labels(), weights))
    assert layout.join(split.inputs[:2], split.labels[:2], split.other)[2].tolist() == [0, 1]
    six = torch.cat([split.inputs, split.inputs[:2]])
    assert layout.join(six, torch.zeros(6), split.other)[2].tolist() == [0, 1, 2, 3, 0, 1]


def test_entries_of_several_batches_are_put_in_a_row():
    parts = [OtherEntries({("w",): torch.full((n,), float(n)), ("name",): "x"}, n) for n in (2, 3)]
    joined = join_entries(parts)
    assert joined.samples == 5
    assert joined.entries["w",].tolist() == [2, 2, 3, 3, 3]
    assert joined.take([4, 0]).entries["w",].tolist() == [3, 2]


@pytest.mark.parametrize(
    ("known", "seen"),
    [(None, [5.0, 5, 1]), (("weights",), [5.0, 1, 1]), (("meta.age",), [1.0, 5, 1]), ((), [1.0, 1, 1])],
)
def test_the_adversary_sees_the_entries_that_are_known_and_never_a_copy_of_the_images(known, seen):
    fives = torch.full((B,), 5.0)
    entries = {("weights",): fives, ("meta", "age"): fives, ("copy",): torch.full((B, H * W * C), 5.0)}
    public = OtherEntries(entries, B).known_to_adversary(known, torch.Size((C, H, W)))
    assert [float(value.flatten()[0]) for value in public.entries.values()] == seen


def test_arrays_pictures_and_other_objects_are_hidden_like_tensors():
    picture = Image.fromarray(np.full((H, W, C), 5, np.uint8))
    entries = {
        ("weights",): np.full(B, 5.0), ("copy",): np.full((B, H, W, C), 5, np.uint8),
        ("one", 0): np.full((H, W, C), 5.0), ("rows", 0): torch.full((C, H, W), 5.0), ("picture",): picture,
        ("object",): SimpleNamespace(held=[np.full((H, W, C), 5.0)], number=5, text="x"), ("name",): "x",
        ("open",): threading.Lock(), ("file",): b"5555",
    }  # fmt: skip
    other = OtherEntries(entries, B)
    seen = {path[0]: value for path, value in other.known_to_adversary(None, torch.Size((C, H, W))).entries.items()}
    assert (seen["weights"] == 5).all()
    assert (seen["copy"] == 0).all()
    assert (seen["one"] == 1).all()
    assert (seen["rows"] == 1).all()
    assert not np.asarray(seen["picture"]).any()
    assert (seen["object"].held[0] == 1).all()
    assert (seen["object"].number, seen["object"].text, seen["name"]) == (5, "x", "x")
    assert (seen["open"], seen["file"]) == (None, bytes(4))
    assert (np.asarray(picture) == 5).all()
    assert (entries["object",].held[0] == 5).all()
    named = other.known_to_adversary(("copy",), torch.Size((C, H, W))).entries
    assert (named["copy",] == 5).all()
    assert (named["weights",] == 1).all()
    assert other.take([2, 0]).entries["copy",].shape == (2, H, W, C)
    assert join_entries([other, other]).entries["weights",].shape == (2 * B,)


def test_a_dataclass_is_a_container_and_entries_are_given_as_copies():
    @dataclasses.dataclass(frozen=True)
    class Record:
        image: Tensor
        label: Tensor
        weight: Tensor

    batch = Record(images(), labels(), torch.rand(B))
    layout, split, back = round_trip(batch)
    assert isinstance(back, Record)
    assert [entry.path for entry in layout.images] == [("image",)]
    assert layout.labels == ("label",)
    assert all(torch.equal(a, b) for a, b in zip(vars(back).values(), vars(batch).values(), strict=True))
    back.weight.zero_()
    back.label.zero_()
    again = layout.join(split.inputs, split.labels, split.other)
    assert torch.equal(again.weight, batch.weight)
    assert torch.equal(again.label, batch.label)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_get_the_strides_of_the_batch(channels):
    held = images(B, channels, H, W).clone(memory_format=torch.channels_last)
    layout, split, _ = round_trip((held, labels()))
    for candidate in (split.inputs, split.inputs.clone(memory_format=torch.contiguous_format)):
        assert layout.join(candidate, split.labels)[0].stride() == held.stride()


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        pytest.param("images", "got str", id="a string"),
        pytest.param(7, "got int", id="a number"),
        pytest.param((torch.rand(4, 8, 8), torch.zeros(4).long()), r"unsqueeze\(1\)", id="no channel dimension"),
        pytest.param({"text": torch.zeros(4, 7).long()}, "without images", id="text"),
        pytest.param(([torch.rand(3, 8, 8), torch.rand(3, 9, 8)], []), "3x8x8, 3x9x8", id="sizes in a list"),
        pytest.param({"low": torch.rand(4, 3, 8, 8), "high": torch.rand(4, 3, 16, 16)}, "'image'", id="two sizes"),
    ],
)
def test_a_batch_that_cannot_be_audited_is_refused_and_described(batch, says):
    with pytest.raises(InvalidInputError, match=f"(?s)batch: expected .*{says}"):
        BatchLayout.of(batch)


def test_the_hint_about_grayscale_is_given_for_a_tensor_at_top_level_alone():
    with pytest.raises(InvalidInputError) as refused:
        BatchLayout.of({"nested": {"audio": torch.rand(4, 8, 8)}})
    assert "unsqueeze" not in str(refused.value)


def test_an_empty_batch_is_told_from_a_wrong_one():
    with pytest.raises(EmptyBatchError):
        BatchLayout.of((torch.rand(0, 3, 8, 8), torch.zeros(0)))


LEAVES = st.sampled_from([torch.zeros(B), torch.zeros(B, 7), torch.tensor(3), "text", 5, None, 0.5])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(before=TREES, after=TREES, nested=st.integers(0, 3))
def test_whatever_stands_around_the_images_comes_back(before, after, nested):
    held = images()
    for level in range(nested):
        held = [held] if level % 2 else {"data": held}
    batch = [before, held, after]
    _, split, back = round_trip(batch)
    assert torch.equal(split.inputs, images())
    assert same(back, batch)
