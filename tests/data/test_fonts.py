"""Bitmaps of fonts: as fontTools writes and reads them, and fonts that are made to exhaust the memory."""

from __future__ import annotations

import resource
import struct
import time
from pathlib import Path

import pytest
from fontTools.ttLib import TTFont

from genzoo.data.fonts import FontError, colour_bitmaps
from tests.data.colour_fonts import bitmap, made

DEBIAN = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SINGLES = {(0x1F600 + i,): bitmap(i) for i in range(9)}
FIRST = {(0x2600 + i,): bitmap(i) for i in range(4)}  # in the Basic Multilingual Plane
SEQUENCES = SINGLES | {(0x1F600, 0x1F3FD): bitmap(10), (0x1F600, 0x1F3FF): bitmap(11), (0x1F601, 0x1F3FD): bitmap(12)}


@pytest.mark.parametrize("index", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("image", [17, 18, 19])
def test_every_format_is_read(tmp_path, index, image):
    found = colour_bitmaps(made(tmp_path / "a.ttf", SINGLES, index, image).read_bytes())
    assert found == SINGLES


@pytest.mark.parametrize("images", [FIRST, SEQUENCES, FIRST | SEQUENCES])
def test_code_points_and_pairs(tmp_path, images):
    assert colour_bitmaps(made(tmp_path / "a.ttf", images).read_bytes()) == images


def test_longer_sequences_are_left_out(tmp_path):
    images = SINGLES | {(0x1F600, 0x200D, 0x1F601): bitmap(20)}
    assert colour_bitmaps(made(tmp_path / "a.ttf", images).read_bytes()) == SINGLES


@pytest.mark.parametrize("sizes", [(20, 40), (40, 20), (10, 40, 20)])
def test_the_largest_bitmaps_are_read(tmp_path, sizes):
    assert colour_bitmaps(made(tmp_path / "a.ttf", SINGLES, sizes=sizes).read_bytes()) == SINGLES


@pytest.mark.skipif(not DEBIAN.is_file(), reason="fonts-noto-color-emoji is not installed")
def test_the_real_font_is_read_as_by_fonttools():
    font = TTFont(DEBIAN)
    points, bitmaps = font.getBestCmap(), font["CBDT"].strikeData[0]
    expected = {(point,): bitmaps[glyph].imageData for point, glyph in points.items() if glyph in bitmaps}
    of_glyph = {glyph: point for point, glyph in points.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    if len(ligature.Component) == 1 and ligature.LigGlyph in bitmaps:
                        pair = of_glyph[first], of_glyph[ligature.Component[0]]
                        expected.setdefault(pair, bitmaps[ligature.LigGlyph].imageData)
    assert colour_bitmaps(DEBIAN.read_bytes()) == expected and len(expected) > 2000


# Damage


def test_every_prefix_is_refused(tmp_path):
    whole = made(tmp_path / "a.ttf", SEQUENCES).read_bytes()
    for length in [*range(0, 400), *range(400, len(whole) * 9 // 10, 97)]:
        with pytest.raises(FontError):
            colour_bitmaps(whole[:length])


def font(**tables: bytes) -> bytes:
    """Join tables to a font."""
    head = struct.pack(">4s4H", b"\0\1\0\0", len(tables), 0, 0, 0)
    at, entries, body = 12 + 16 * len(tables), b"", b""
    for name, content in tables.items():
        entries += struct.pack(">4s3I", name.encode(), 0, at + len(body), len(content))
        body += content
    return head + entries + body


def cmap(*groups: tuple[int, int, int], count: int | None = None) -> bytes:
    """Write a cmap of format 12, which may state another number of groups."""
    head = struct.pack(">2H2HI", 0, 1, 3, 10, 12) + struct.pack(">2H3I", 12, 0, 0, 0, count or len(groups))
    return head + b"".join(struct.pack(">3I", *group) for group in groups)


def sizes(arrays: bytes, subtables: int = 1, count: int = 1) -> bytes:
    """Write a CBLC of one size, which may state other numbers of subtables and of sizes."""
    size = struct.pack(">3I", 56, 0, subtables) + bytes(33) + bytes([20, 32, 1])
    return struct.pack(">2I", 0x30000, count) + size + arrays


def gsub(sets: bytes, coverage: bytes, subtables: int = 1) -> bytes:
    """Write a GSUB with one lookup of ligatures, whose subtables are one."""
    lookup = struct.pack(">3H", 4, 0, subtables) + struct.pack(">H", 6 + 2 * subtables) * subtables
    table = struct.pack(">2H", 1, 4 + len(sets)) + sets + coverage
    return struct.pack(">I3H", 0x10000, 0, 0, 10) + struct.pack(">2H", 1, 4) + lookup + table


ARRAY = struct.pack(">2HI", 1, 2, 8)  # glyphs 1 and 2
CONSTANT = struct.pack(">2HI", 2, 17, 4) + struct.pack(">I", 13)  # of 13 bytes each
WHOLE = {
    "cmap": cmap((0x1F600, 0x1F601, 1)),
    "CBLC": sizes(ARRAY + CONSTANT),
    "CBDT": bytes(4) + 2 * (bytes(5) + struct.pack(">I", 4) + b"PNG!"),
}
# The glyphs 1 and 2 become glyph 2.
PAIR = gsub(struct.pack(">7H", 1, 8, 1, 4, 2, 2, 2), struct.pack(">3H", 1, 1, 1))


def test_a_font_by_hand():
    """The valid font of which the others are variations."""
    single = {(0x1F600,): b"PNG!", (0x1F601,): b"PNG!"}
    assert colour_bitmaps(font(**WHOLE)) == single
    assert colour_bitmaps(font(**WHOLE, GSUB=PAIR)) == single | {(0x1F600, 0x1F601): b"PNG!"}


SEGMENTS = struct.pack(">2H2HI", 0, 1, 3, 1, 12) + struct.pack(">7H", 4, 0, 0, 2 * 9999, 0, 0, 0)
BOMBS = {
    "all code points": {"cmap": cmap((0, 2**32 - 1, 1))},
    "many groups": {"cmap": cmap(*[(0, 0xFFFF, 1)] * 10_000)},
    "more groups than there are": {"cmap": cmap((5, 5, 1), count=2**32 - 1)},
    "overlapping segments": {"cmap": SEGMENTS + b"\xff\xff" * 9999 + bytes(2 + 3 * 2 * 9999)},
    "many sizes": {"CBLC": sizes(ARRAY + CONSTANT, count=2**32 - 1)},
    "many subtables": {"CBLC": sizes(struct.pack(">2HI", 0, 65535, 8 * 9999) * 9999 + CONSTANT, subtables=9999)},
    "more subtables than there are": {"CBLC": sizes(ARRAY + CONSTANT, subtables=2**32 - 1)},
    "glyphs without end": {
        "CBLC": sizes(ARRAY + struct.pack(">2HII", 5, 17, 4, 13) + bytes(8) + struct.pack(">I", 2**32 - 1))
    },
    "pairs without end": {"CBLC": sizes(ARRAY + struct.pack(">2HII", 4, 17, 4, 2**32 - 1) + bytes(10**6))},
    "a large bitmap": {"CBDT": bytes(9) + struct.pack(">I", 2**32 - 1) + b"PNG!"},
    "shared bitmaps": {
        "cmap": cmap((0, 60_000, 1)),
        "CBLC": sizes(struct.pack(">2HI", 1, 60_000, 8) + struct.pack(">2HI", 2, 17, 4) + struct.pack(">I", 0)),
        "CBDT": bytes(9) + struct.pack(">I", 10**6) + bytes(10**6),
    },
    "shared lookups": {"GSUB": gsub(struct.pack(">H", 0), struct.pack(">2H3H", 2, 1, 0, 65535, 0), 10_000)},
    "shared sets": {"GSUB": gsub(struct.pack(">H", 9999) + bytes(2 * 9999), struct.pack(">5H", 2, 1, 0, 65535, 0), 99)},
}


@pytest.mark.parametrize("name", BOMBS)
def test_fonts_that_would_exhaust_the_memory_are_refused(name):
    content = font(**(WHOLE | BOMBS[name]))
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FontError) as info:
        colour_bitmaps(content)
    assert time.monotonic() - began < 5 and len(str(info.value).splitlines()) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


@pytest.mark.parametrize(("tables", "said"), [
    ({}, "no colour bitmaps"),
    ({"cmap": WHOLE["cmap"]}, "no colour bitmaps"),
    ({"CBLC": WHOLE["CBLC"], "CBDT": WHOLE["CBDT"]}, "no cmap"),
    (WHOLE | {"CBLC": struct.pack(">2I", 0x30000, 0)}, "CBLC is empty"),
    (WHOLE | {"CBLC": sizes(ARRAY + struct.pack(">2HII", 2, 1, 4, 13))}, "format 1;"),
])  # fmt: skip
def test_what_is_wrong_is_said(tables, said):
    with pytest.raises(FontError, match=said):
        colour_bitmaps(font(**tables))
