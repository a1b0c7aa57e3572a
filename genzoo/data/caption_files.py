"""Captions of the images of a folder, from text files beside them.

    captions.jsonl, metadata.jsonl    a JSON object on each line, {"file": "a.png", "caption": "..."}
    captions.csv, metadata.csv        the same as a table with a header
    NAME.txt                          the caption of NAME.png, of any suffix

Files are named relative to the folder of the table; the keys of Hugging Face's ``imagefolder``, ``file_name`` and ``text``, are
read too. Tables may lie in any folder; metadata without these keys is left out. Of several captions of an image the first one
is kept, in the order above, of a list in JSON its first one, and of a text file its first line with a letter.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from genzoo.data.dataset import DataError
from genzoo.data.decoding import check_file, shown

TABLES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
SUFFIX = ".txt"
FILES, CAPTIONS = ("file", "file_name"), ("caption", "text")  # keys of a table
TABLE_BYTES, TEXT_BYTES = 2**28, 2**16  # of a table, and of a caption


class Captions(NamedTuple):
    """Captions of images.

    Attributes:
        of: caption of each image, by path.
        sources: the text files with a caption of an image.
        notes: what was read and what was not, one line each.
    """

    of: dict[Path, str]
    sources: list[Path]
    notes: list[str]


class _Row(NamedTuple):
    source: Path
    image: Path
    texts: list[str]


def read_captions(images: Sequence[Path], files: Sequence[Path]) -> Captions:
    """Read the captions of images.

    Args:
        images: the images.
        files: text files in the same folders, of any name.

    Raises:
        DataError: for a file that is unreadable, damaged, too large or no UTF-8 text, naming the line.
    """
    found = Captions({}, [], [])
    known, stems = set(images), defaultdict(list)
    for image in images:
        stems[image.with_suffix("")].append(image)
    several, empty, absent = 0, 0, []
    sources: Counter[Path] = Counter()
    for row in _rows(files, stems, found.notes):
        if row.image not in known:
            absent.append(row)
            continue
        texts = [text for text in (" ".join(text.split()) for text in row.texts) if text]
        if not texts:
            empty += 1
            continue
        several += len(texts) - 1
        if row.image in found.of:
            several += 1
            continue
        found.of[row.image] = texts[0]
        sources[row.source] += 1
    found.sources.extend(sources)
    tables = {path: count for path, count in sources.items() if path.name in TABLES}
    beside = sum(sources.values()) - sum(tables.values())
    found.notes.extend(f"{path}: captions of {_count(count, 'image')}" for path, count in sorted(tables.items()))
    if beside:
        found.notes.append(f"captions of {_count(beside, 'image')} from {SUFFIX} files beside them")
    if several:
        found.notes.append(f"{_count(several, 'further caption')} left out: the first one of each image is read")
    if empty:
        found.notes.append(f"{_count(empty, 'empty caption')} left out")
    if absent:
        first = f"{absent[0].source}: {shown(absent[0].image.name)}"
        found.notes.append(
            f"{_count(len(absent), 'caption')} of files that are no images here left out, such as {first}"
        )
    return found


def _rows(files: Sequence[Path], stems: dict[Path, list[Path]], notes: list[str]) -> Iterator[_Row]:
    """List all captions, those of tables first."""
    for name in TABLES:
        for path in sorted(path for path in files if path.name == name):
            try:
                yield from _json_lines(path) if path.suffix == ".jsonl" else _table(path)
            except _NoCaptionsError as error:
                if name.startswith("captions"):
                    raise DataError(f"{path}, {error}") from error
                notes.append(f"{path} left out: {error}")
    for path in sorted(path for path in files if path.suffix.lower() == SUFFIX):
        if images := stems.get(path.with_suffix("")):
            # Numbers alone are labels of objects.
            lines = [line for line in _text(path, TEXT_BYTES).splitlines() if any(map(str.isalpha, line))]
            for image in images:
                yield _Row(path, image, lines)


class _NoCaptionsError(ValueError):
    """A table without the keys of captions."""


def _json_lines(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(io.StringIO(_text(path, TABLE_BYTES)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: is not an object with the keys file and caption")
        yield _row(path, number, row)


def _table(path: Path) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(_text(path, TABLE_BYTES), newline=""), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: has {len(cells)} cells, the header {len(header)}: "
                    "quote captions with commas"
                )
            yield _row(path, reader.line_num, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: is not CSV ({error})") from error


def _row(path: Path, line: int, row: dict[str, Any]) -> _Row:
    """Check a row of a table.

    Raises:
        _NoCaptionsError: without the keys.
        DataError: for values of other types, and files outside of the folder of the table.
    """
    file, texts = (next((row[key] for key in keys if key in row), None) for keys in (FILES, CAPTIONS))
    if file is None or texts is None:
        keys = FILES if file is None else CAPTIONS
        raise _NoCaptionsError(f"line {line}: has no {keys[0]} or {keys[1]}")
    texts = texts if isinstance(texts, list) else [texts]
    if not all(isinstance(text, str) for text in (file, *texts)):
        raise DataError(f"{path}, line {line}: file must be a text, and caption a text or a list of them")
    for text in (file, *texts):
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise DataError(f"{path}, line {line}: is not Unicode text ({error.reason})") from error
        if size > TEXT_BYTES:
            raise DataError(f"{path}, line {line}: a caption of {size:,} bytes, at most {TEXT_BYTES:,} are read")
    place = PurePosixPath(file.replace(os.sep, "/"))
    if place.is_absolute() or ".." in place.parts or not place.parts or "\0" in file:
        raise DataError(f"{path}, line {line}: file {file[:200]!r} is not a path below {path.parent}")
    return _Row(path, path.parent / place, texts)


def _text(path: Path, most: int) -> str:
    """Read a file of UTF-8 text."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable or remove it") from error
    if len(content) > most:
        raise DataError(f"{path} has more than {most:,} bytes, too many for captions: shorten or remove it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert or remove it"
        ) from error


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
