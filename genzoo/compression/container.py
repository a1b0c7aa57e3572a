"""The file of compressed events: a header of about 25 bytes, and the words of a stream.

bytes      content
4          "GZC" and the version of the format
4          CRC-32 of all that follows
4          SHA-256 of the model, its first bytes
4          CRC-32 of the events
1 each     batch growth and number of threads
1 or more  number of dimensions, shape, levels, number of classes, batch size, number of events (7 bits a byte)
4 each     words of the stream, little-endian
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np

from genzoo.errors import UsageError

MAGIC, VERSION = b"GZC", 1
SUFFIX = ".gzc"
_HEAD = struct.Struct("<4sI")
_BODY = struct.Struct("<4sIBB")
MOST_VALUES = 2**32  # of all events of a file, against damaged headers


class Container(NamedTuple):
    """A compressed file.

    Attributes:
        digest: first 4 bytes of the SHA-256 of the model.
        checksum: CRC-32 of the events.
        growth: batch growth, see ``genzoo.compression.batch_sizes``.
        threads: of the processor in encoding.
        shape, levels, classes: of the events; no classes for an unconditional model.
        batch_size: events coded at once, at most.
        n: number of events.
        words: of the stream, uint32.
    """

    digest: bytes
    checksum: int
    growth: int
    threads: int
    shape: tuple[int, ...]
    levels: int
    classes: int
    batch_size: int
    n: int
    words: np.ndarray

    def to_bytes(self) -> bytes:
        """Serialise."""
        numbers = [len(self.shape), *self.shape, self.levels, self.classes, self.batch_size, self.n]
        body = _BODY.pack(self.digest, self.checksum, self.growth, self.threads)
        body += b"".join(_varint(number) for number in numbers) + self.words.astype("<u4").tobytes()
        return _HEAD.pack(MAGIC + bytes([VERSION]), zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Container:
        """Parse a file.

        Args:
            data: all of it.
            name: of the file, for messages.

        Raises:
            UsageError: for any other file, another version, and a damaged one.
        """
        if len(data) < _HEAD.size or data[:3] != MAGIC:
            raise UsageError(f"{name}: is not a file written by genzoo compress")
        head, checksum = _HEAD.unpack_from(data)
        if head[3] != VERSION:
            raise UsageError(f"{name}: has version {head[3]} of the format, this genzoo reads version {VERSION}")
        body = data[_HEAD.size :]
        if zlib.crc32(body) != checksum:
            raise UsageError(f"{name}: is damaged or incomplete (wrong CRC)")
        try:
            digest, events, growth, threads = _BODY.unpack_from(body)
            numbers = _Reader(body, _BODY.size)
            shape = tuple(numbers.next() for _ in range(numbers.next()))
            levels, classes, batch_size, n = (numbers.next() for _ in range(4))
            words = np.frombuffer(body[numbers.place :], dtype="<u4").astype(np.uint32)
        except (struct.error, ValueError, IndexError) as error:
            raise UsageError(f"{name}: has an invalid header") from error
        if min(*shape, levels, batch_size, threads, n) < 1 or n * int(np.prod(shape, dtype=object)) > MOST_VALUES:
            raise UsageError(f"{name}: has an invalid header")
        return cls(digest, events, growth, threads, shape, levels, classes, batch_size, n, words)


def _varint(number: int) -> bytes:
    """Write a number in groups of 7 bits, the lowest first."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


class _Reader:
    """Numbers in groups of 7 bits."""

    def __init__(self, data: bytes, place: int):
        self.data, self.place = data, place

    def next(self) -> int:
        number = shift = 0
        while True:
            byte = self.data[self.place]
            self.place += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 63 bits")
