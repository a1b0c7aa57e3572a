"""Captions of folders: each image keeps its own, whatever file says it, and what is not read is said in one line."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from genzoo.conditions import Tokens
from genzoo.data import DataSet, folder
from genzoo.data.caption_files import read_captions
from tests.commands import genzoo
from tests.data.test_images import fill, picture, refused

NAMES = [f"{i}.png" for i in range(40)]
WORDS = {f"{i}.png": f"a picture of the number {i}" for i in range(40)}


@pytest.fixture
def root(tmp_path) -> Path:
    fill(tmp_path, NAMES)
    return tmp_path


def lines(rows: list[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def by_picture(data: DataSet) -> dict[bytes, str]:
    assert data.tokenizer is not None
    return {
        bytes(x.permute(1, 2, 0).numpy()): text
        for split in data.splits.values()
        for x, text in zip(split.x, data.tokenizer.decode(split.y), strict=True)
    }


def expected(words: dict[str, str], names: list[str] = NAMES) -> dict[bytes, str]:
    return {bytes(np.asarray(picture(seed))): words[name] for seed, name in enumerate(names) if name in words}


def write(root: Path, form: str, words: dict[str, str] = WORDS) -> None:
    """Write captions in one of the forms."""
    kind, _, rest = form.partition(" ")
    if kind.endswith(".jsonl"):
        file, text = rest.split(",")
        (root / kind).write_text(lines([{file: name, text: words[name], "other": 3} for name in words]))
    elif kind.endswith(".csv"):
        rows = [f'{name},"{text}"' for name, text in words.items()]
        (root / kind).write_text("\n".join([rest, *rows]) + "\n")
    else:
        for name, text in words.items():
            (root / name).with_suffix(".txt").write_text(text + "\n")


FORMS = [
    "captions.jsonl file,caption",
    "captions.jsonl file_name,text",
    "metadata.jsonl file_name,text",
    "captions.csv file,caption",
    "metadata.csv file_name,text",
    "txt",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("captions", ["auto", "required"])
def test_every_picture_has_its_caption(root, form, captions):
    write(root, form)
    data = folder(root, size=8, captions=captions)
    assert by_picture(data) == expected(WORDS)
    assert isinstance(data.condition, Tokens) and data.classes == ()
    assert len(data.notes) == 2 and "captions" in data.notes[0] and "40 images" in data.notes[1]
    assert "no file skipped" in data.notes[0]
    plain = folder(root, size=8, captions="none")
    assert plain.condition is None and plain.tokenizer is None and plain.train.y is None
    assert len(plain.train.x) == len(data.train.x)  # the same split


def test_folders_without_captions_are_what_they_were(tmp_path):
    fill(tmp_path, [f"{kind}/{i}.png" for kind in "ab" for i in range(20)])
    (tmp_path / "README.txt").write_text("some words")
    data = folder(tmp_path, size=8)
    assert data.classes == ("a", "b") and data.tokenizer is None and "1 .txt" in data.notes[0]
    refused(
        lambda: folder(tmp_path, size=8, captions="required"), str(tmp_path), "captions.jsonl", "data.captions=required"
    )


def test_captions_take_the_place_of_classes(tmp_path):
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in "ab" for i in range(6)]
    names += [f"test/c/{i}.png" for i in range(3)]  # a class without training images
    fill(tmp_path, names)
    words = {name: f"the {name.split('/')[1]} number {name[-5]}" for name in names}
    for split in ("train", "test"):
        rows = [{"file_name": n.partition("/")[2], "text": words[n]} for n in names if n.startswith(split)]
        (tmp_path / split / "metadata.jsonl").write_text(lines(rows))
    data = folder(tmp_path, size=8)
    assert by_picture(data) == expected(words, names)
    assert (len(data.train.x), len(data.test.x)) == (12, 15)


def test_captions_of_another_test_folder(tmp_path):
    fill(tmp_path / "one", NAMES)
    fill(tmp_path / "two", [f"t{i}.png" for i in range(5)])
    write(tmp_path / "one", "txt")
    refused(lambda: folder(tmp_path / "one", size=8, test_root=tmp_path / "two"), str(tmp_path / "two"), "no image has")
    (tmp_path / "two/captions.csv").write_text("file,caption\n" + "".join(f"t{i}.png,test {i}\n" for i in range(4)))
    data = folder(tmp_path / "one", size=8, test_root=tmp_path / "two")
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.test.y) == [f"test {i}" for i in range(4)] and len(data.train.x) == 40
    assert any("1 image without a caption" in note for note in data.notes)


def test_pictures_without_a_caption_are_left_out(root):
    write(root, "txt", {name: WORDS[name] for name in NAMES[:30]})
    data = folder(root, size=8)
    assert by_picture(data) == expected({name: WORDS[name] for name in NAMES[:30]})
    assert any("10 images without a caption left out" in note for note in data.notes)


def test_few_captions_are_not_taken_for_those_of_a_data_set(root):
    write(root, "txt", {name: WORDS[name] for name in NAMES[:19]})
    data = folder(root, size=8)
    assert data.tokenizer is None and len(data.train.x) + len(data.test.x) == 40
    assert any("19 of 40 images not used" in note and "data.captions=required" in note for note in data.notes)
    chosen = folder(root, size=8, captions="required")
    assert by_picture(chosen) == expected({name: WORDS[name] for name in NAMES[:19]})


def test_of_several_captions_the_first_is_kept(root):
    write(root, "txt")
    (root / "0.txt").write_text("\n 1 2 3\n the first\nthe  second\nthe third\n")
    rows: list[object] = [{"file": "1.png", "caption": ["one", "two", "three"]}, {"file": "1.png", "caption": "four"}]
    (root / "captions.jsonl").write_text(lines(rows))
    data = folder(root, size=8)
    assert by_picture(data) == expected(WORDS | {"0.png": "the first", "1.png": "one"})
    assert any("6 further captions left out" in note for note in data.notes)


def test_what_is_not_read_is_said(root):
    write(root, "captions.jsonl file,caption")
    with (root / "captions.jsonl").open("a") as file:
        file.write("\n" + lines([{"file": "no\u202e.png", "caption": "x"}, {"file": "other/3.png", "caption": "x"}]))
    (root / "captions.csv").write_text("file,caption\n3.png,  \n")
    (root / "metadata.csv").write_text("id,label\n3,4\n")
    notes = folder(root, size=8).notes
    assert any("2 captions of files that are no images here left out, such as" in note for note in notes)
    assert any("1 empty caption left out" in note for note in notes)
    assert any(f"{root / 'metadata.csv'} left out" in note and "has no file or file_name" in note for note in notes)
    assert all(note.isprintable() for note in notes)


def test_labels_of_objects_are_no_captions(root):
    for name in NAMES:  # as YOLO writes them
        (root / name).with_suffix(".txt").write_text("0 0.5 0.5 0.2 0.3\n1 0.1 0.2 0.3 0.4\n")
    assert folder(root, size=8).tokenizer is None


def test_spaces_and_marks_of_unicode(root):
    write(root, "txt", WORDS)
    (root / "0.txt").write_bytes(b"\xef\xbb\xbfa  caf\xc3\xa9 \t of\xe3\x80\x80spaces\r\n")
    (root / "1.txt").write_text("😀 \u2013 \u2018quoted\u2019 日本")
    found = by_picture(folder(root, size=8))
    assert found == expected(WORDS | {"0.png": "a café of spaces", "1.png": "😀 \u2013 \u2018quoted\u2019 日本"})


def test_long_captions_are_cut(root):
    write(root, "txt", WORDS | {"0.png": "word " * 5000})
    data = folder(root, size=8)
    assert data.train.y is not None and data.train.y.shape[1] == 128
    assert any("were cut" in note for note in data.notes)
    small = folder(root, size=8, text_length=4, vocabulary=258)
    assert small.condition == Tokens(4, 258)


def test_the_split_is_that_of_the_names(root):
    write(root, "txt")
    before = {bytes(x.numpy()) for x in folder(root, size=8).test.x}
    (root / "new").mkdir()
    picture(99).save(root / "new/99.png")
    (root / "new/99.txt").write_text("one more")
    after = {bytes(x.numpy()) for x in folder(root, size=8).test.x}
    assert before == after - {bytes(np.asarray(picture(99)).transpose(2, 0, 1))}


# Damage


ROW = {"file": "0.png", "caption": "x"}
BROKEN = {  # file, content, and what is said of it
    "no JSON": ("captions.jsonl", lines([ROW]).encode() + b"{file: 3}\n", "line 2: is not JSON"),
    "a list": ("captions.jsonl", b"[1, 2]\n", "line 1: is not an object"),
    "deep": ("captions.jsonl", b"[" * 100_000 + b"\n", "line 1: is not JSON"),
    "no caption": ("captions.jsonl", lines([ROW, {"file": "1.png"}]).encode(), "line 2: has no caption or text"),
    "no file": ("captions.jsonl", lines([{"caption": "x"}]).encode(), "line 1: has no file or file_name"),
    "a number": ("captions.jsonl", lines([{"file": "0.png", "caption": 3}]).encode(), "line 1: file must be a text"),
    "a number as file": ("captions.jsonl", lines([{"file": 3, "caption": "x"}]).encode(), "line 1: file must be a text"),
    "a list of numbers": ("captions.jsonl", lines([{"file": "0.png", "caption": [3]}]).encode(), "caption a text or a list"),
    "half a character": ("captions.jsonl", b'{"file": "0.png", "caption": "\\ud800"}\n', "line 1: is not Unicode text"),
    "not UTF-8": ("captions.jsonl", '{"file": "0.png", "caption": "é"}'.encode("latin1"), "is not UTF-8 text"),
    "UTF-16": ("captions.csv", "file,caption\n0.png,x\n".encode("utf-16"), "is not UTF-8 text"),
    "above": ("captions.jsonl", lines([{"file": "../0.png", "caption": "x"}]).encode(), "line 1: file '../0.png' is"),
    "absolute": ("captions.jsonl", lines([{"file": "/etc/passwd", "caption": "x"}]).encode(), "line 1: file '/etc/passwd'"),
    "no name": ("captions.jsonl", lines([{"file": "", "caption": "x"}]).encode(), "line 1: file ''"),
    "a zero": ("captions.jsonl", lines([{"file": "a\0b", "caption": "x"}]).encode(), "line 1: file"),
    "a long caption": ("captions.jsonl", lines([{"file": "0.png", "caption": "x" * 70_000}]).encode(), "70,000 bytes"),
    "a long text": ("0.txt", b"x" * 70_000, "more than 65,536 bytes"),
    "a text of bytes": ("0.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
    "no columns": ("captions.csv", b"id,words\n1,2\n", "line 2: has no file or file_name"),
    "a comma": ("captions.csv", b"file,caption\n0.png,a ring, red\n", "line 2: has 3 cells, the header 2: quote"),
    "an open quote": ("captions.csv", b'file,caption\n0.png,"a ring\n', "is not CSV"),
    "a long cell": ("captions.csv", b"file,caption\n0.png," + b"x" * 200_000, "is not CSV"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("captions", ["auto", "required"])
def test_broken_captions_are_named_in_one_line(root, name, captions):
    file, content, said = BROKEN[name]
    (root / file).write_bytes(content)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: folder(root, size=8, captions=captions), str(root / file), said)
    assert time.monotonic() - began < 10 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18
    assert len(folder(root, size=8, captions="none").train.x)


def test_large_tables_are_refused(root):
    with (root / "captions.jsonl").open("wb") as file:
        file.truncate(2**28 + 1)
    refused(lambda: folder(root, size=8), str(root / "captions.jsonl"), "268,435,456 bytes")


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.csv", "0.txt"])
def test_captions_that_are_no_files_are_named_and_nothing_hangs(root, name):
    os.mkfifo(root / name)
    refused(lambda: folder(root, size=8), str(root / name), "a pipe", "remove it")
    for target in ("nowhere", name):
        (root / name).unlink()
        (root / name).symlink_to(target)
        assert f"1 broken link ({name})" in folder(root, size=8).notes[0]


def test_reading_is_linear(tmp_path):
    images = [tmp_path / f"{i}.png" for i in range(50_000)]
    (tmp_path / "captions.jsonl").write_text(lines([{"file": path.name, "caption": "x"} for path in images]))
    began = time.monotonic()
    found = read_captions(images, [tmp_path / "captions.jsonl"])
    assert len(found.of) == 50_000 and time.monotonic() - began < 20


def test_the_key_of_the_command(root):
    refused(lambda: folder(root, size=8, captions="some"), "data.captions=some")
    words = ("data=folder", f"data.root={root}", "data.size=8", "model=vae", "budget=smoke")
    code, _, err = genzoo(*words, "data.captions=some")
    assert code == 2 and err.count("\n") == 1 and "data.captions" in err
    code, _, err = genzoo(*words, "data.captions=required")
    assert code == 2 and err.count("\n") == 1 and "no image has a caption" in err
