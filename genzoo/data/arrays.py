"""Safe reader of untrusted .npz and .npy files: no unpickling, and memory bounded by the file size.

``numpy.load`` trusts the shape in the header, such as 10^13 numbers in a file of a hundred bytes, and passes on all errors of
its parsers. Here sizes are compared before memory is allocated.
"""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from genzoo.data.dataset import DataError

DENSE = 100  # largest compression ratio
SMALL = 2**27  # unpacked size in bytes below which any ratio is accepted
MEMBERS = 10_000  # of one archive

# Exceptions of zipfile, its decompressors and numpy's header parser for damaged, encrypted or malicious files.
MALFORMED = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError),
    *(
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        MemoryError,
        SyntaxError,
        tokenize.TokenError,
    ),
    RuntimeError,  # encrypted, of an unknown compression (NotImplementedError), nested too deep (RecursionError)
)


def read_array(path: Path, names: Sequence[str], key: str = "samples") -> np.ndarray:
    """Read an .npy file, or one array of an .npz file.

    Args:
        path: the file.
        names: names of the array in order of preference; the default is the first array of the file.
        key: configuration key of the file, for messages.

    Returns:
        The array, of any dtype but object.

    Raises:
        DataError: naming the file and the cause.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
                file.seek(0)
                return _read_array(file, path.stat().st_size)
        with zipfile.ZipFile(path) as archive:
            return _read_member(archive, path, names, key)
    except DataError:
        raise
    except MALFORMED as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{key}={path}: not an .npz or .npy file of plain arrays: {what}") from error


def array_names(path: Path) -> set[str]:
    """List the names of the arrays of an .npz file; empty for a file of another kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    except MALFORMED:
        return set()


def _read_member(archive: zipfile.ZipFile, path: Path, names: Sequence[str], key: str) -> np.ndarray:
    members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
    if not members:
        raise DataError(f"{key}={path}: contains no array")
    if len(members) > MEMBERS:
        raise DataError(f"{key}={path}: contains more than {MEMBERS:,} arrays")
    by_name = {member.filename.removesuffix(".npy"): member for member in members}
    if len(by_name) < len(members):
        raise DataError(f"{key}={path}: contains two arrays of one name: write it by np.savez")
    name = next((name for name in names if name in by_name), members[0].filename.removesuffix(".npy"))
    member = by_name[name]
    packed = min(member.compress_size, path.stat().st_size)
    if member.file_size > max(DENSE * packed, SMALL):
        raise DataError(
            f"{key}={path}: unpacks to {member.file_size} bytes, over {DENSE} times its size: write it by np.savez"
        )
    with archive.open(member) as stream:
        return _read_array(stream, member.file_size)  # type: ignore[arg-type]


def _read_array(stream: BinaryIO, size: int) -> np.ndarray:
    """Read a .npy file.

    Args:
        stream: the file.
        size: its size in bytes.

    Raises:
        ValueError: for object arrays, and if the header does not match the size.
    """
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(stream)
    if version not in readers:
        raise ValueError(f"its header has version {version}, not 1 or 2")
    shape, in_columns, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("it contains Python objects, which are not unpickled")
    if not all(0 <= side < 2**62 for side in shape):
        raise ValueError(f"its header claims the shape {shape}")
    needed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if needed != held:
        raise ValueError(f"its header claims {dtype} {shape}, {needed:,} bytes, and {held:,} follow")
    content = bytearray(held)
    view, done = memoryview(content), 0
    while done < held and (count := stream.readinto(view[done : done + 2**24])):  # type: ignore[attr-defined]
        done += count
    if done < held or stream.read(1):  # zipfile compares the checksum at the end of the stream
        raise ValueError(f"only {done:,} of {held:,} bytes could be read")
    if not dtype.itemsize:
        raise ValueError(f"its dtype {dtype} has no bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if in_columns else "C")
