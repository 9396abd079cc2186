"""Files that someone else may have made: a value or one sentence, whatever they hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from rich.text import Text
from torchvision.utils import save_image

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.utils import files
from lightning_gradaudit.utils.files import (
    DEPTH_LIMIT,
    check_plain,
    load_checkpoint,
    parse_json,
    printable,
    read_json,
    read_json_lines,
    read_picture,
    read_text,
)

PLAIN = {"state_dict": {"weight": torch.arange(6.0).view(2, 3)}, "gradaudit": {"step": 3, "reasons": ["none"]}}


def one_sentence(error):
    said = str(error.value)
    assert said == printable(said, 10_000)
    assert "\n" not in said
    assert len(said) < 700
    return said


def checkpoint(path, value=PLAIN, **options):
    torch.save(value, path, **options)
    return path


# Text for a terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – text", "plain – text"),
        ("two\nlines\r\n\tand\u2028more", "two lines and more"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://example.org\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jgone", "gone"),
        ("\x1bcreset", "reset"),
        ("nul\x00bell\x07", "nul\ufffdbell\ufffd"),
        ("bidi\u202eSSAP\u2066", "bidi\ufffdSSAP\ufffd"),
        ("half\ud800", "half\ufffd"),
        ("\x1b", "\ufffd"),
    ],
    ids=ascii,
)
def test_text_is_one_line_that_a_terminal_does_not_obey(text, shown):
    assert printable(text) == shown


def test_any_text_is_shown_without_control_characters_and_within_its_limit():
    pick = random.Random(0)
    letters = [*map(chr, range(0x250)), "\u200b", "\u202e", "\u2029", "\ud812", "\x1b", "[", "]", "\\", "日"]
    for _ in range(2000):
        shown = printable("".join(pick.choices(letters, k=80)), 40)
        assert len(shown) <= 40
        assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert Text.from_ansi(shown).plain == shown, "nothing is left that rich would read as an escape"
    assert printable("x" * 100, 10) == "x" * 9 + "…"


# JSON

DEEP = "[" * 100_000 + "]" * 100_000
MALFORMED = {
    "empty": "",
    "no JSON": "hello",
    "cut": '{"a": [1, 2',
    "NaN": '{"a": NaN}',
    "infinite": '{"a": [-Infinity]}',
    "overflow": '{"a": {"b": 1e999}}',
    "long integer": '{"a": ' + "9" * 5000 + "}",
    "integer of 65 bits": '{"a": 18446744073709551616}',
    "list": "[1]",
    "number": "3",
    "deep": f'{{"a": {DEEP}}}',
    "a level too deep": '{"a": ' + "[" * DEPTH_LIMIT + "]" * DEPTH_LIMIT + "}",
    "half a character": r'{"a": ["\ud800"]}',
    "half a character in a key": r'{"\udc00": 1}',
    "control characters": '{"a": "\x1b[31m\n"}',
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in MALFORMED.items()])
def test_json_that_is_not_an_object_of_plain_values_is_one_sentence(tmp_path, text):
    with pytest.raises(InvalidInputError, match="path: ") as error:
        parse_json(text, what="the\x1b[31m stamp")
    assert "the stamp" in one_sentence(error)
    path = tmp_path / "stamp.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=r"stamp\.json"):
        read_json(path)


def test_what_python_writes_is_read_back():
    values = {"a": [1, -2.5, None, True, "ä\U0001f600", {"b": []}], "c": {"d": 2**63 - 1}}
    assert parse_json(json.dumps(values)) == values
    deepest = "[" * (DEPTH_LIMIT - 1) + "]" * (DEPTH_LIMIT - 1)
    assert parse_json(f'{{"a": {deepest}}}')["a"]


@pytest.mark.parametrize(
    "values",
    [{"a": torch.zeros(1)}, {"a": {1: 2}}, {"a": {2, 3}}, {"a": b"bytes"}, {"a": [float("nan")]}, None, [1]],
    ids=lambda values: str(values)[:20],
)
def test_a_stamp_that_is_not_plain_json_is_refused(values):
    with pytest.raises(InvalidInputError) as error:
        check_plain(values, what="the stamp")
    one_sentence(error)


def test_lists_that_contain_each_other_are_counted_where_they_stand(monkeypatch):
    lists = [[]]
    for _ in range(28):  # 2**28 places, 29 lists
        lists.append([lists[-1], lists[-1]])
    monkeypatch.setattr(files, "VALUES_LIMIT", 100_000)
    with pytest.raises(InvalidInputError, match="at most 100000 values"):
        check_plain({"a": lists[-1]})
    round_about = {}
    round_about["a"] = round_about
    with pytest.raises(InvalidInputError, match="nested"):
        check_plain(round_about)


def test_a_log_is_read_up_to_a_line_that_a_crash_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"b": "\u2028"}\n{"c": ')
    assert read_json_lines(path) == [{"a": 1}, {"b": "\u2028"}]
    path.write_text('{"a": 1}\n{"b": 2}')
    assert read_json_lines(path) == [{"a": 1}, {"b": 2}]
    path.write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(InvalidInputError, match="line 2"):
        read_json_lines(path)
    path.write_text('{"a": 1}\n7')
    with pytest.raises(InvalidInputError, match="line 2"):
        read_json_lines(path)


def test_text_is_utf8_within_a_limit_from_an_ordinary_file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("ä".encode() * 5)
    assert read_text(path, limit=10) == "äääää"
    with pytest.raises(InvalidInputError, match="at most 9 bytes"):
        read_text(path, limit=9)
    path.write_bytes(b"abc\xff")
    with pytest.raises(InvalidInputError, match="UTF-8"):
        read_text(path)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "none", "zero\0byte", "x" * 5000):
        with pytest.raises(InvalidInputError, match="path: ") as error:
            read_text(other)
        one_sentence(error)


# Checkpoints


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_checkpoint_is_read_as_torch_reads_it(tmp_path, mmap, legacy):
    path = checkpoint(tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    loaded = load_checkpoint(path, mmap=mmap)
    assert torch.equal(loaded["state_dict"]["weight"], PLAIN["state_dict"]["weight"])
    assert loaded["gradaudit"] == PLAIN["gradaudit"]


class Runs:
    """An object whose loading runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Exits:
    def __reduce__(self):
        return exec, ("raise SystemExit(0)",)  # `sys.exit` itself may have been replaced, as wandb does


def test_code_in_a_checkpoint_runs_only_on_trust_and_cannot_end_the_program(tmp_path):
    path = checkpoint(tmp_path / "runs.ckpt", {"a": Runs(tmp_path / "ran")})
    with pytest.raises(InvalidInputError, match="--trust") as error:
        load_checkpoint(path)
    one_sentence(error)
    assert not (tmp_path / "ran").exists()
    load_checkpoint(path, trust=True)
    assert (tmp_path / "ran").exists()
    with pytest.raises(InvalidInputError, match="SystemExit"):
        load_checkpoint(checkpoint(tmp_path / "exits.ckpt", {"a": Exits()}), trust=True)


def repacked(path, change):
    """Write an archive anew, with every entry's content and options as `change` returns them."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content, method = change(entry.filename, old.read(entry))
            new.writestr(entry.filename, content, method)
    path.write_bytes(out.getvalue())


def bomb(path):
    checkpoint(path)
    blank = b"\0" * 300_000_000
    repacked(path, lambda name, content: (blank if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED))


def overlapping(path):
    """Let many entries of the directory stand for the same bytes, without compression."""
    checkpoint(path, {"a": torch.zeros(100_000)})
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")

    def number(at, size):
        return int.from_bytes(content[at : at + size], "little")

    count, size, begin = number(end + 10, 2), number(end + 12, 4), number(end + 16, 4)
    at = content.rindex(b"/data/0", begin, end)
    at = content.rindex(b"PK\x01\x02", begin, at)
    entry = content[at : at + 46 + number(at + 28, 2) + number(at + 30, 2) + number(at + 32, 2)]
    totals = (count + 20).to_bytes(2, "little") * 2 + (size + 20 * len(entry)).to_bytes(4, "little")
    path.write_bytes(
        content[:at] + 20 * entry + content[at : begin + size]
        + content[end : end + 8] + totals + begin.to_bytes(4, "little") + b"\0\0"
    )  # fmt: skip


def test_an_archive_that_would_grow_is_refused_before_it_does(tmp_path):
    for build in (bomb, overlapping):
        path = tmp_path / f"{build.__name__}.ckpt"
        build(path)
        assert path.stat().st_size < 1_000_000
        for trust in (False, True):
            with pytest.raises(InvalidInputError, match="would grow") as error:
                load_checkpoint(path, trust=trust)
            one_sentence(error)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    path = checkpoint(tmp_path / "wide.ckpt", {"state_dict": {"a": torch.zeros(1).expand(10**12)}})
    with pytest.raises(InvalidInputError, match="claim 4000000000000 bytes"):
        load_checkpoint(path)
    tied = torch.zeros(1000)
    load_checkpoint(checkpoint(tmp_path / "tied.ckpt", {f"a{i}": tied.view(10, 100) for i in range(50)}))


def test_whatever_happened_to_a_checkpoint_gives_a_value_or_one_sentence(tmp_path):
    """Cut at every percent, and 300 times with bytes changed."""
    path = tmp_path / "damaged.ckpt"
    whole = checkpoint(path).read_bytes()
    pick = random.Random(0)
    damaged = [whole[: len(whole) * percent // 100] for percent in range(100)]
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(pick.choice((1, 4, 40))):
            content[pick.randrange(len(content))] = pick.randrange(256)
        damaged.append(bytes(content))
    said = []
    for content in damaged:
        path.write_bytes(content)
        try:
            load_checkpoint(path)
        except InvalidInputError as error:
            said.append(str(error))
    assert len(said) >= 100, "every cut one"
    assert all(text == printable(text, 10_000) and "damaged.ckpt" in text for text in said)


OTHERS = {
    "empty": b"",
    "text": b"no checkpoint",
    "a pickle": pickle.dumps({"gradaudit": {}}),
    "deep pickle": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "a pickle with the magic": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + b"\x80\x02}q\0.",
    "an empty archive": b"PK\x05\x06" + b"\0" * 18,
    "archive's head alone": b"PK\x03\x04" + b"\0" * 100,
    "bytes": bytes(range(256)) * 40,
    "compressed": zlib.compress(b"x" * 1000),
}


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in OTHERS.items()])
def test_another_file_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "other\x1b[31m\n.ckpt"
    path.write_bytes(content)
    for trust in (False, True):
        with pytest.raises(InvalidInputError, match="path: ") as error:
            load_checkpoint(path, trust=trust)
        one_sentence(error)
        assert "--trust" not in str(error.value), "trust would not help"


# Pictures


def test_only_a_whole_png_inside_the_folder_is_read(tmp_path):
    folder, secret = tmp_path / "run", tmp_path / "secret.png"
    folder.mkdir()
    save_image(torch.rand(3, 8, 8), secret)
    save_image(torch.rand(3, 8, 8), folder / "in.png")
    (folder / "link.png").symlink_to(secret)
    (folder / "inner.png").symlink_to(folder / "in.png")
    (folder / "round.png").symlink_to(folder / "round.png")
    (folder / "cut.png").write_bytes(secret.read_bytes()[:-20])
    (folder / "text.png").write_text("root:x:0:0")
    (folder / "joined.png").write_bytes(secret.read_bytes() + b"root:x:0:0")
    huge = bytearray(secret.read_bytes())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    (folder / "huge.png").write_bytes(huge)
    os.mkfifo(folder / "pipe.png")
    for name in ("in.png", "inner.png", "../run/in.png", str(folder / "in.png")):
        assert read_picture(folder, name) == (folder / "in.png").read_bytes()
    wrong = ("../secret.png", str(secret), "/etc/passwd", "link.png", "round.png", "cut.png", "text.png", "joined.png",
             "huge.png", "pipe.png", ".", "", "none.png", "zero\0byte", "a" * 5000, 7, None)  # fmt: skip
    for name in wrong:
        with pytest.raises(InvalidInputError, match=r"^(pairs|path): ") as error:
            read_picture(folder, name)
        one_sentence(error)
