"""Opens picture files that anybody may have made: bounded in memory, never waiting, and whole or refused by name.

Pillow refuses most broken files, but fills with black or grey what a PNG with too few rows, a JPEG that was patched or a file
that a crash has left full of zeros does not hold; and its limit of pixels is of one picture, not of a process that reads
many at once.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from genzoo.data.dataset import DataError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

PIXELS = 50_000_000  # of the largest picture
FILE = 2**27  # bytes of the largest file
BYTES = 20  # that a pixel takes at most, while decoders, copies and conversions hold it at once: 17 in a WebP


class Room:
    """Memory that threads share: whoever asks for more than is left waits for the others.

    Args:
        bytes: how much there is; nobody may ask for more.
    """

    def __init__(self, bytes: int):
        self.left = bytes
        self._changed = threading.Condition()

    @contextmanager
    def take(self, bytes: int) -> Iterator[None]:
        """Hold some of it."""
        with self._changed:
            self._changed.wait_for(lambda: self.left >= bytes)
            self.left -= bytes
        try:
            yield
        finally:
            with self._changed:
                self.left += bytes
                self._changed.notify_all()


# Whoever holds the first waits for the second, never the other way round.
FOR_FILES, FOR_PIXELS = Room(FILE), Room(PIXELS * BYTES)


def picture_names(root: Path, suffixes: Sequence[str]) -> list[PurePosixPath]:
    """List the pictures under a folder by their relative paths, sorted.

    Names that start with a dot and links to folders are passed over.

    Raises:
        DataError: for a folder that cannot be listed, or a name that belongs to no file: a broken link, a pipe.
    """

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be listed ({error.strerror}): make it readable or remove it"
        ) from error

    names = []
    for here, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(here, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in suffixes:
                try:
                    is_file = stat.S_ISREG(path.stat().st_mode)
                except OSError as error:
                    raise DataError(f"{path} leads nowhere ({error.strerror}): remove it") from error
                if not is_file:  # whoever opened a pipe would wait for its other end
                    raise DataError(f"{path} is no file but a pipe, a socket or a device: remove it")
                names.append(PurePosixPath(path.relative_to(root).as_posix()))
    return sorted(names)


def decoded(path: Path, formats: tuple[str, ...], use: Callable[[Image.Image], T]) -> T:
    """Read a picture, and return what is made of it; the memory that this needs is held meanwhile.

    Args:
        path: of the file.
        formats: that it may have, whatever its name, as Pillow calls them.
        use: takes the picture and keeps nothing of it.

    Raises:
        DataError: naming the file if it is broken, too large or of another format, also where ``use`` stumbles over it.
    """
    from PIL import Image

    try:
        size = path.stat().st_size
        if size > FILE:
            raise Image.DecompressionBombError(f"{size} bytes")
        with FOR_FILES.take(size):
            content = path.read_bytes()
            with Image.open(BytesIO(content), formats=formats) as header:
                width, height = header.size
            if width * height > PIXELS:
                raise Image.DecompressionBombError(f"{width}x{height} pixels")
            del header
            with FOR_PIXELS.take(width * height * BYTES):
                made = _decoded(content, formats, use)
                if width * height > 2**20:
                    give_back()
            return made
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problem = f"{path} is too large ({error}): scale it down or remove it"
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        problem = f"{path} is not a readable image ({error}): replace or remove it"
    raise DataError(problem)  # without its cause, whose frames hold the picture


def give_back() -> None:
    """Have the allocator return what is free: glibc's keeps it for each thread, whose next picture may be a small one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def _decoded(content: bytes, formats: tuple[str, ...], use: Callable[[Image.Image], T]) -> T:
    from PIL import Image

    with Image.open(BytesIO(content), formats=formats) as picture:
        check_whole(content, picture)
        return use(picture)


def check_whole(content: bytes, picture: Image.Image) -> None:
    """Read the pixels of a picture, and refuse it where its decoder makes up what the file lacks.

    Raises:
        ValueError: saying what it lacks.
    """
    if picture.format == "PNG":
        _check_png(content)
    picture.load()
    if picture.format in ("JPEG", "MPO"):
        _check_jpeg(content, picture)
    # Large areas of one colour end in zeros too, as a twentieth of the file.
    elif picture.format == "WEBP" and len(content) - len(content.rstrip(b"\0")) > max(64, len(content) // 8):
        raise ValueError("it ends in zeros")


def _check_png(content: bytes) -> None:
    """Count the bytes of its rows, and check the sums of the chunks that hold them."""
    view = memoryview(content)
    needed, found, start = None, 0, 8
    rows = zlib.decompressobj()
    while start + 12 <= len(view):
        length, kind = int.from_bytes(view[start : start + 4]), bytes(view[start + 4 : start + 8])
        body, start = view[start + 8 : start + 8 + length], start + 12 + length
        if kind == b"IHDR":
            needed = _rows(bytes(body))
        elif kind == b"IDAT":
            if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(view[start - 4 : start]):
                raise ValueError("the sum of a chunk is wrong")
            piece: bytes | memoryview = body
            while piece and needed and found < needed:
                found += len(rows.decompress(piece, 2**20))
                piece = rows.unconsumed_tail
    if not needed or found < needed:
        raise ValueError("rows are missing")


def _rows(header: bytes) -> int:
    """Return how many bytes the rows of a PNG have, those of its seven passes if it is interlaced."""
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    depth, colour, interlaced = header[8], header[9], header[12]
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    sizes = [(-((x - width) // dx), -((y - height) // dy)) for x, y, dx, dy in passes]
    return sum(h * (1 + (w * bits + 7) // 8) for w, h in sizes if w > 0 and h > 0)


# Coded pixels go on until a marker that is neither a stuffed zero nor a restart.
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")


def _end_of_jpeg(content: bytes) -> int:
    """Walk over its segments to the mark of its end; cameras put more behind it."""
    start = 2
    while (marker := _MARKER.search(content, start)) is not None:
        if marker[1] == b"\xd9":
            return marker.start()
        start = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
    raise ValueError("its end is missing")


def _check_jpeg(content: bytes, picture: Image.Image) -> None:
    """Refuse a JPEG that ends before its last pixel: bytes that are put before its end would be taken for pixels.

    What is missing is painted in one colour, so that only few pictures need to be read twice.
    """
    from PIL import Image, ImageChops

    end = _end_of_jpeg(content)
    width, height = picture.size
    corner = picture.crop(((width - 1) // 8 * 8, (height - 1) // 8 * 8, width, height)).convert("RGB")
    if corner.getcolors(1):
        longer = BytesIO(content[:end] + bytes(range(1, 128)) + b"\xff\xd9")
        with Image.open(longer, formats=("JPEG",)) as other:
            if ImageChops.difference(picture, other).getbbox(alpha_only=False):
                raise ValueError("rows are missing")
