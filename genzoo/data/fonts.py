r"""Colour bitmaps of an OpenType font, by the code points that they show.

Four tables of big-endian integers are read, each with a bounded number of entries, since fonts are untrusted and entries may
share their offsets:

    cmap          glyph of each code point (formats 4 and 12)
    GSUB          glyph of each pair of glyphs, the ligatures (lookups 4, and 7 that contain them)
    CBLC, CBDT    place and PNG of the bitmap of each glyph (index formats 1 to 5, image formats 17 to 19)

References:
    Microsoft, "OpenType specification", version 1.9.1, https://learn.microsoft.com/typography/opentype/spec/ (chapters cmap,
    GSUB, CBLC, CBDT).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

ENTRIES = 2**17  # read of each table; Noto Color Emoji has 4,000
_LIGATURES, _EXTENSION = 4, 7


class FontError(ValueError):
    """A font that is damaged, or has no colour bitmaps."""


def colour_bitmaps(content: bytes) -> dict[tuple[int, ...], bytes]:
    """Read the bitmaps of a font, as PNG, by one or two code points.

    Raises:
        FontError: for a damaged font, and one without colour bitmaps.
    """
    try:
        return _Font(content).bitmaps()
    except struct.error as error:
        raise FontError("is not a readable font: it ends too early") from error


class _Font:
    def __init__(self, content: bytes):
        self.content = content
        self.left = 0  # entries that may still be read
        count = self._u16(4)
        self.tables = {content[at : at + 4]: self._u32(at + 8) for at in range(12, 12 + 16 * count, 16)}

    def bitmaps(self) -> dict[tuple[int, ...], bytes]:
        if b"CBDT" not in self.tables or b"CBLC" not in self.tables:
            raise FontError("has no colour bitmaps (CBDT)")
        if b"cmap" not in self.tables:
            raise FontError("is not a readable font: it has no cmap")
        points = self._cmap(self.tables[b"cmap"])
        places = self._places(self.tables[b"CBLC"], self.tables[b"CBDT"])
        glyphs: dict[tuple[int, ...], int] = {(point,): glyph for point, glyph in points.items()}
        if b"GSUB" in self.tables:
            of_glyph = {glyph: point for point, glyph in points.items()}
            for first, second, glyph in self._ligatures(self.tables[b"GSUB"]):
                if first in of_glyph and second in of_glyph:
                    glyphs.setdefault((of_glyph[first], of_glyph[second]), glyph)
        self.left = 2 * len(self.content)  # bytes, of which two glyphs may share some
        return {points: self._png(*places[glyph]) for points, glyph in glyphs.items() if glyph in places}

    # Integers

    def _u16(self, at: int) -> int:
        return int(struct.unpack_from(">H", self.content, at)[0])

    def _u32(self, at: int) -> int:
        return int(struct.unpack_from(">I", self.content, at)[0])

    def _u16s(self, at: int, count: int) -> tuple[int, ...]:
        self._spend(count)
        return struct.unpack_from(f">{count}H", self.content, at)

    def _spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise FontError("is not a readable font: a table is too long")

    # Tables

    def _cmap(self, at: int) -> dict[int, int]:
        """Read the glyphs of all code points, from the subtable with most of them."""
        self.left = ENTRIES
        found: dict[int, int] = {}
        for i in range(self._u16(at + 2)):
            self._spend(1)
            table = at + self._u32(at + 4 + 8 * i + 4)
            kind = self._u16(table)
            read = {4: self._segments, 12: self._groups}.get(kind)
            if read is not None:
                found |= {point: glyph for point, glyph in read(table) if glyph}
        return found

    def _segments(self, at: int) -> Iterator[tuple[int, int]]:
        count = self._u16(at + 6) // 2
        ends, starts, deltas = (self._u16s(at + 14 + 2 * (k * count + (k > 0)), count) for k in range(3))
        ranges = at + 16 + 6 * count
        for i, (start, end, delta) in enumerate(zip(starts, ends, deltas, strict=True)):
            self._spend(max(end - start + 1, 0))
            offset = self._u16(ranges + 2 * i)
            for point in range(start, end + 1):
                glyph = self._u16(ranges + 2 * i + offset + 2 * (point - start)) if offset else point
                yield point, (glyph + delta) % 2**16 if glyph or not offset else 0

    def _groups(self, at: int) -> Iterator[tuple[int, int]]:
        for i in range(self._u32(at + 12)):
            start, end, glyph = struct.unpack_from(">3I", self.content, at + 16 + 12 * i)
            self._spend(1 + max(end - start + 1, 0))
            yield from ((point, glyph + point - start) for point in range(start, min(end, 0x10FFFF) + 1))

    def _ligatures(self, at: int) -> Iterator[tuple[int, int, int]]:
        """List the ligatures of two glyphs: first, second, and the glyph that replaces them."""
        self.left = ENTRIES
        lookups = at + self._u16(at + 8)
        for lookup in self._offsets(lookups, lookups):
            kind = self._u16(lookup)
            for table in self._offsets(lookup + 4, lookup):
                if kind == _EXTENSION and self._u16(table + 2) == _LIGATURES:
                    yield from self._ligature_table(table + self._u32(table + 4))
                elif kind == _LIGATURES:
                    yield from self._ligature_table(table)

    def _ligature_table(self, at: int) -> Iterator[tuple[int, int, int]]:
        firsts = self._coverage(at + self._u16(at + 2))
        for first, ligatures in zip(firsts, self._offsets(at + 4, at), strict=False):
            for ligature in self._offsets(ligatures, ligatures):
                glyph, parts, second = self._u16s(ligature, 3)
                if parts == 2:
                    yield first, second, glyph

    def _coverage(self, at: int) -> list[int]:
        count = self._u16(at + 2)
        if self._u16(at) == 1:
            return list(self._u16s(at + 4, count))
        found: list[int] = []
        for i in range(count):
            start, end, _ = self._u16s(at + 4 + 6 * i, 3)
            self._spend(max(end - start + 1, 0))
            found += range(start, end + 1)
        return found

    def _offsets(self, at: int, origin: int) -> list[int]:
        """Read a count and as many offsets from ``origin``."""
        return [origin + offset for offset in self._u16s(at + 2, self._u16(at))]

    def _places(self, at: int, data: int) -> dict[int, tuple[int, int]]:
        """List where the largest bitmap of each glyph is: its image format, and its place in the file."""
        self.left = ENTRIES
        count = self._u32(at + 4)
        self._spend(count)
        largest = max(
            range(count), key=lambda i: self.content[at + 8 + 48 * i + 45 : at + 8 + 48 * i + 46], default=None
        )
        if largest is None:
            raise FontError("has no colour bitmaps (CBLC is empty)")
        arrays, _, subtables = struct.unpack_from(">3I", self.content, at + 8 + 48 * largest)
        found: dict[int, tuple[int, int]] = {}
        for i in range(subtables):
            self._spend(1)
            first, last, more = struct.unpack_from(">2HI", self.content, at + arrays + 8 * i)
            table = at + arrays + more
            kind, image, start = struct.unpack_from(">2HI", self.content, table)
            for glyph, offset in self._index(kind, table + 8, first, max(last - first + 1, 0)):
                found[glyph] = image, data + start + offset
        return found

    def _index(self, kind: int, at: int, first: int, count: int) -> Iterator[tuple[int, int]]:
        """List the offsets of bitmaps, of ``count`` glyphs from the first one, or of those that the table names."""
        if kind in (1, 3):
            self._spend(count)
            offsets = struct.unpack_from(f">{count + 1}{'I' if kind == 1 else 'H'}", self.content, at)
            yield from ((first + i, offsets[i]) for i in range(count) if offsets[i + 1] > offsets[i])
        elif kind == 2:
            self._spend(count)
            yield from ((first + i, i * self._u32(at)) for i in range(count))
        elif kind == 4:
            pairs = self._u16s(at + 4, 2 * self._u32(at)) if self._u32(at) < ENTRIES else self._u16s(at, ENTRIES + 1)
            yield from zip(pairs[::2], pairs[1::2], strict=True)
        elif kind == 5:
            glyphs = self._u16s(at + 16, min(self._u32(at + 12), ENTRIES + 1))
            yield from ((glyph, i * self._u32(at)) for i, glyph in enumerate(glyphs))

    def _png(self, image: int, at: int) -> bytes:
        metrics = {17: 5, 18: 8, 19: 0}.get(image)
        if metrics is None:
            raise FontError(f"has bitmaps of format {image}; those of format 17, 18 and 19 are PNGs")
        size = self._u32(at + metrics)
        self._spend(size)
        content = self.content[at + metrics + 4 : at + metrics + 4 + size]
        if len(content) < size:
            raise FontError("is not a readable font: it ends too early")
        return content
