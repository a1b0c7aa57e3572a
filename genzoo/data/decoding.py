"""Finds and opens picture files that anybody may have made: bounded in memory, never waiting, and whole or refused by name.

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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from genzoo.data.dataset import DataError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

# What is read as a picture, wherever pictures are read. Left out are formats whose decoders start programs (EPS), allocate what
# the file says and not what its pixels need (JPEG 2000, AVIF), or hold no pixels of 8 or 16 bits (PFM).
SUFFIXES: tuple[str, ...] = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
)
SUFFIXES += (".apng", ".dib", ".jfif", ".jpe")
# The decoders of Pillow that a file may reach, whatever its name.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
BITS = {1, 2, 4, 8, 16}  # of a sample of a TIFF; the range of other ones is not known
TIFF_BITS, TIFF_TILE = 258, (322, 323)  # tags

PIXELS = 50_000_000  # of the largest picture
FILE = 2**27  # bytes of the largest file
SHOWN = 6  # kinds of files that are passed over, in a message
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


class Listing(NamedTuple):
    """The pictures under a folder, and what else is there."""

    names: list[PurePosixPath]  # relative to the folder, sorted
    passed_over: Counter[str]  # how many files or folders, by what they are

    @property
    def others(self) -> str:
        """Say what was passed over, ``3 files passed over: 2 .txt, 1 hidden``."""
        count = self.passed_over.total()
        if not count:
            return "no file passed over"
        kinds = [f"{n} {kind}" for kind, n in sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0]))]
        more = [f"{len(kinds) - SHOWN} other kinds"] if len(kinds) > SHOWN else []
        return f"{count} {'file' if count == 1 else 'files'} passed over: {', '.join(kinds[:SHOWN] + more)}"


def list_pictures(root: Path) -> Listing:
    """List the pictures under a folder, by their suffixes.

    Names that start with a dot are passed over. Links to folders are followed, but no folder is read twice, and none that
    holds ``root``; those that are not followed, and those that lead nowhere, are passed over by their names.

    Raises:
        DataError: for a folder that cannot be listed, or a picture's name that belongs to no file: a broken link, a pipe.
    """

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be listed ({error.strerror}): make it readable or remove it"
        ) from error

    names, passed_over, above = [], Counter[str](), os.path.realpath(root)
    visited: set[tuple[int, int]] = set()
    pending, first = [Path(root)], True
    while pending:  # the folders proper, then those behind their links, and so on
        links: list[Path] = []
        for start in sorted(pending):
            real = os.path.realpath(start)
            if not first and (above == real or above.startswith(f"{real.rstrip(os.sep)}{os.sep}")):
                passed_over[f"link to a folder above ({shown(start.relative_to(root).as_posix())})"] += 1
                continue
            for here, folders, files in os.walk(start, onerror=fail):
                status = os.stat(here)
                if (status.st_dev, status.st_ino) in visited:
                    passed_over[f"link to a folder that was read already ({shown(os.path.relpath(here, root))})"] += 1
                    folders.clear()
                    continue
                visited.add((status.st_dev, status.st_ino))
                passed_over["hidden"] += sum(name.startswith(".") for name in (*folders, *files))
                folders[:] = [name for name in folders if not name.startswith(".")]
                links += [path for path in (Path(here, name) for name in folders) if path.is_symlink()]
                for path in (Path(here, name) for name in files if not name.startswith(".")):
                    suffix = path.suffix.lower()
                    if suffix in SUFFIXES:
                        check_file(path)
                        names.append(PurePosixPath(path.relative_to(root).as_posix()))
                    elif path.is_symlink() and not path.exists():
                        passed_over[f"link that leads nowhere ({shown(path.relative_to(root).as_posix())})"] += 1
                    else:
                        passed_over[shown(suffix)[:20] if suffix else "without a suffix"] += 1
        pending, first = links, False
    passed_over += Counter()  # drops what was counted as none
    return Listing(sorted(names), passed_over)


def shown(name: str) -> str:
    """Show a name as it is, or escaped where a terminal would not print it."""
    return name if name.isprintable() else ascii(name)


def check_file(path: Path) -> None:
    """Refuse a name that belongs to no file.

    Raises:
        DataError: for a link that leads nowhere, and for what would be waited for.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise DataError(f"{path} leads nowhere ({error.strerror}): remove it") from error
    if not is_file:  # whoever opened a pipe would wait for its other end
        raise DataError(f"{path} is no file but a pipe, a socket or a device: remove it")


def upright(picture: Image.Image, channels: int) -> Image.Image:
    """Give a picture 8 bits, no transparency and one or three channels, turned as its EXIF orientation says.

    It is laid on white where it is transparent; 16 bits are scaled to 8, colour profiles ignored.

    Args:
        picture: which may be changed.
        channels: 3 for colour, 1 for grey.

    Raises:
        ValueError: for pixels whose range is not known.
    """
    from PIL import ImageOps

    ImageOps.exif_transpose(picture, in_place=True)
    flat, mode = _flatten(picture), "RGB" if channels == 3 else "L"
    return flat if flat.mode == mode else flat.convert(mode)


def _flatten(picture: Image.Image) -> Image.Image:
    """Give a picture 8 bits and no transparency, on white where it had some."""
    from PIL import Image

    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise ValueError("the range of its samples is not known; store 8 or 16 bits")
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.uint32)
        levels += 128
        levels //= 257
        return Image.fromarray(levels.astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    paper = Image.new("RGB", picture.size, "white")
    paper.paste(picture, mask=picture)
    return paper


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
            if header.format == "TIFF":
                _check_tiff(header)
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


def _check_tiff(header: Image.Image) -> None:
    """Refuse tiles that are larger than pictures may be, which its decoder would make room for, and samples of odd bits.

    Raises:
        DecompressionBombError, ValueError: saying what it has.
    """
    from PIL import Image

    tags: Any = header.tag_v2  # type: ignore[attr-defined]
    width, height = (int(tags.get(tag, 0)) for tag in TIFF_TILE)
    if width * height > PIXELS:
        raise Image.DecompressionBombError(f"tiles of {width}x{height} pixels")
    bits = tags.get(TIFF_BITS, 1)
    odd = set(bits if isinstance(bits, tuple) else (bits,)) - BITS
    if odd:
        raise ValueError(f"its samples have {max(odd)} bits, whose range is not known; store 8 or 16")


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
