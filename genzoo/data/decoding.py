"""Safe decoding of untrusted image files: bounded memory, no blocking reads, and truncated files are rejected.

Pillow rejects most broken files, but fills the missing rows of a truncated PNG, a patched JPEG or a zero-filled file with black
or grey; and its pixel limit holds for one image, not for a process that decodes many in parallel.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from genzoo.data.dataset import DataError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

# Suffixes of image files. Excluded are formats whose decoders start programs (EPS), allocate memory by header fields and not
# by the number of pixels (JPEG 2000, AVIF), or have other than 8 or 16 bits (PFM).
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
TEXTS = (".txt", ".jsonl", ".csv")  # of files that may hold captions
# Pillow's decoders that are enabled, whatever the suffix.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
BITS = {1, 2, 4, 8, 16}  # per sample of a TIFF; the range of others is unknown
TIFF_BITS, TIFF_TILE = 258, (322, 323)  # tags

PIXELS = 50_000_000  # of the largest image
FILE = 2**27  # bytes of the largest file
SHOWN = 6  # kinds of skipped files in a message
BYTES = 20  # peak memory per pixel over decoder, copies and conversions: 17 for WebP


class MemoryBudget:
    """Memory shared by threads; a reservation blocks until enough is free.

    Args:
        bytes: size of the budget, an upper limit of each reservation.
    """

    def __init__(self, bytes: int):
        self.left = bytes
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, bytes: int) -> Iterator[None]:
        """Reserve memory within a block."""
        with self._changed:
            self._changed.wait_for(lambda: self.left >= bytes)
            self.left -= bytes
        try:
            yield
        finally:
            with self._changed:
                self.left += bytes
                self._changed.notify_all()


# Always reserved in this order, which excludes deadlocks.
FOR_FILES, FOR_PIXELS = MemoryBudget(FILE), MemoryBudget(PIXELS * BYTES)


class Listing(NamedTuple):
    """Image files below a folder, and counts of skipped files."""

    names: list[PurePosixPath]  # relative to the folder, sorted
    skipped: Counter[str]  # counts of files or folders by kind
    texts: list[PurePosixPath]  # skipped files that may hold captions, likewise

    @property
    def others(self) -> str:
        """Summary of skipped files, ``3 files skipped: 2 .txt, 1 hidden``."""
        count = self.skipped.total()
        if not count:
            return "no file skipped"
        kinds = [f"{n} {kind}" for kind, n in sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))]
        more = [f"{len(kinds) - SHOWN} other kinds"] if len(kinds) > SHOWN else []
        return f"{count} {'file' if count == 1 else 'files'} skipped: {', '.join(kinds[:SHOWN] + more)}"

    def used(self, texts: Sequence[Path]) -> None:
        """No longer count text files as skipped."""
        self.skipped.subtract(path.suffix.lower() for path in texts)
        for kind in [kind for kind, count in self.skipped.items() if not count]:
            del self.skipped[kind]


def list_pictures(root: Path) -> Listing:
    """List the image files below a folder, by suffix.

    Hidden names are skipped. Links to folders are followed, except to a parent of ``root`` or to a folder that was visited
    already; those and broken links are counted as skipped.

    Raises:
        DataError: for an unreadable folder, or an image name that is not a regular file, such as a broken link or a pipe.
    """

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be listed ({error.strerror}): make it readable or remove it"
        ) from error

    names, texts, skipped, above = [], [], Counter[str](), os.path.realpath(root)
    visited: set[tuple[int, int]] = set()
    pending, first = [Path(root)], True
    while pending:  # folders first, then the targets of links
        links: list[Path] = []
        for start in sorted(pending):
            real = os.path.realpath(start)
            if not first and (above == real or above.startswith(f"{real.rstrip(os.sep)}{os.sep}")):
                skipped[f"link to a folder above ({shown(start.relative_to(root).as_posix())})"] += 1
                continue
            for here, folders, files in os.walk(start, onerror=fail):
                status = os.stat(here)
                if (status.st_dev, status.st_ino) in visited:
                    skipped[f"link to a folder that was read already ({shown(os.path.relpath(here, root))})"] += 1
                    folders.clear()
                    continue
                visited.add((status.st_dev, status.st_ino))
                skipped["hidden"] += sum(name.startswith(".") for name in (*folders, *files))
                folders[:] = [name for name in folders if not name.startswith(".")]
                links += [path for path in (Path(here, name) for name in folders) if path.is_symlink()]
                for path in (Path(here, name) for name in files if not name.startswith(".")):
                    suffix = path.suffix.lower()
                    if suffix in SUFFIXES:
                        check_file(path)
                        names.append(PurePosixPath(path.relative_to(root).as_posix()))
                    elif path.is_symlink() and not path.exists():
                        skipped[f"broken link ({shown(path.relative_to(root).as_posix())})"] += 1
                    else:
                        skipped[shown(suffix)[:20] if suffix else "without a suffix"] += 1
                        if suffix in TEXTS:
                            texts.append(PurePosixPath(path.relative_to(root).as_posix()))
        pending, first = links, False
    skipped += Counter()  # drops zero counts
    return Listing(sorted(names), skipped, sorted(texts))


def shown(name: str) -> str:
    """Escape a name with unprintable characters."""
    return name if name.isprintable() else ascii(name)


def check_file(path: Path) -> None:
    """Check that a path is a regular file.

    Raises:
        DataError: for a broken link, a pipe, a socket or a device.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise DataError(f"{path} is a broken link ({error.strerror}): remove it") from error
    if not is_file:  # opening a pipe would block
        raise DataError(f"{path} is a pipe, a socket or a device, not a regular file: remove it")


def upright(picture: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits and one or three channels, and apply its EXIF orientation.

    Transparency is blended with white; 16 bits are scaled to 8; colour profiles are ignored.

    Args:
        picture: the image, possibly modified in place.
        channels: 3 for colour, 1 for grey.

    Raises:
        ValueError: for pixels of unknown range.
    """
    from PIL import ImageOps

    ImageOps.exif_transpose(picture, in_place=True)
    flat, mode = _flatten(picture), "RGB" if channels == 3 else "L"
    return flat if flat.mode == mode else flat.convert(mode)


def _flatten(picture: Image.Image) -> Image.Image:
    """Convert to 8 bits and blend transparency with white."""
    from PIL import Image

    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise ValueError("the range of its samples is unknown; store 8 or 16 bits")
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.uint32)
        levels += 128
        levels //= 257
        return Image.fromarray(levels.astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    background = Image.new("RGB", picture.size, "white")
    background.paste(picture, mask=picture)
    return background


def decoded(path: Path, formats: tuple[str, ...], use: Callable[[Image.Image], T]) -> T:
    """Decode an image file and apply a function to it, within the memory budget.

    Args:
        path: the file.
        formats: accepted formats, Pillow's names.
        use: function of the image, which must not keep a reference to it.

    Raises:
        DataError: for a file that is broken, too large or of another format, and for errors of ``use``.
    """
    from PIL import Image

    try:
        size = path.stat().st_size
        if size > FILE:
            raise Image.DecompressionBombError(f"{size} bytes")
        with FOR_FILES.reserve(size):
            content = path.read_bytes()
            with Image.open(BytesIO(content), formats=formats) as header:
                width, height = header.size
            if width * height > PIXELS:
                raise Image.DecompressionBombError(f"{width}x{height} pixels")
            if header.format == "TIFF":
                _check_tiff(header)
            del header
            with FOR_PIXELS.reserve(width * height * BYTES):
                made = _decoded(content, formats, use)
                if width * height > 2**20:
                    trim_heap()
            return made
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problem = f"{path} is too large ({error}): scale it down or remove it"
    except Exception as error:  # decoders raise errors of many kinds
        problem = f"{path} is not a readable image ({error}): replace or remove it"
    raise DataError(problem)  # without its cause, whose frames hold the image


def trim_heap() -> None:
    """Return free memory of glibc's per-thread arenas to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def _decoded(content: bytes, formats: tuple[str, ...], use: Callable[[Image.Image], T]) -> T:
    from PIL import Image

    with Image.open(BytesIO(content), formats=formats) as picture:
        check_whole(content, picture)
        return use(picture)


def check_whole(content: bytes, picture: Image.Image) -> None:
    """Load the pixels of an image, and reject truncated files that the decoder would pad.

    Raises:
        ValueError: naming the missing part.
    """
    if picture.format == "PNG":
        _check_png(content)
    picture.load()
    if picture.format in ("JPEG", "MPO"):
        _check_jpeg(content, picture)
    # Large areas of one colour end in zeros too, up to a twentieth of the file.
    elif picture.format == "WEBP" and len(content) - len(content.rstrip(b"\0")) > max(64, len(content) // 8):
        raise ValueError("it ends in zeros")


def _check_tiff(header: Image.Image) -> None:
    """Reject oversized tiles, for which the decoder would allocate memory, and unsupported bit depths.

    Raises:
        DecompressionBombError, ValueError: with the tile size or the bit depth.
    """
    from PIL import Image

    tags: Any = header.tag_v2  # type: ignore[attr-defined]
    width, height = (int(tags.get(tag, 0)) for tag in TIFF_TILE)
    if width * height > PIXELS:
        raise Image.DecompressionBombError(f"tiles of {width}x{height} pixels")
    bits = tags.get(TIFF_BITS, 1)
    odd = set(bits if isinstance(bits, tuple) else (bits,)) - BITS
    if odd:
        raise ValueError(f"its samples have {max(odd)} bits, of unknown range; store 8 or 16")


def _check_png(content: bytes) -> None:
    """Check the number of bytes of all rows, and the CRC of each data chunk."""
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
                raise ValueError("the CRC of a chunk is wrong")
            piece: bytes | memoryview = body
            while piece and needed and found < needed:
                found += len(rows.decompress(piece, 2**20))
                piece = rows.unconsumed_tail
    if not needed or found < needed:
        raise ValueError("rows are missing")


def _rows(header: bytes) -> int:
    """Number of bytes of the rows of a PNG, over all seven passes if interlaced."""
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    depth, colour, interlaced = header[8], header[9], header[12]
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    sizes = [(-((x - width) // dx), -((y - height) // dy)) for x, y, dx, dy in passes]
    return sum(h * (1 + (w * bits + 7) // 8) for w, h in sizes if w > 0 and h > 0)


# Entropy-coded data end at a marker that is neither a stuffed zero nor a restart.
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")


def _end_of_jpeg(content: bytes) -> int:
    """Offset of the end-of-image marker, which may be followed by data of the camera."""
    start = 2
    while (marker := _MARKER.search(content, start)) is not None:
        if marker[1] == b"\xd9":
            return marker.start()
        start = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
    raise ValueError("its end is missing")


def _check_jpeg(content: bytes, picture: Image.Image) -> None:
    """Reject a truncated JPEG: bytes inserted before its end marker would be decoded as pixels.

    Missing rows have one colour, so that only images with a uniform last block are decoded twice.
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
