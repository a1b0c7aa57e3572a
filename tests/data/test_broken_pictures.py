"""Pictures of strangers: every one is read or named in one line, none is filled up, and none takes the machine's memory."""

from __future__ import annotations

import io
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genzoo.data import DataError, decoding, folder
from genzoo.data.pictures import read_samples
from tests.commands import genzoo
from tests.data.test_images import fill, refused

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(1, 256, (64, 64, 3), dtype=np.uint8))
ROWS = b"".join(b"\0" + row.tobytes() for row in np.asarray(NOISE))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    rows: bytes = ROWS,
    *extra: bytes,
    size: tuple[int, int] = (64, 64),
    depth: int = 8,
    colour: int = 2,
    interlace: int = 0,
) -> bytes:
    """Write a PNG by hand: what Pillow cannot write, and what nobody should."""
    header = chunk(b"IHDR", struct.pack(">2I5B", *size, depth, colour, 0, 0, interlace))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def patched(content: bytes, start: int, new: bytes) -> bytes:
    return content[:start] + new + content[start + len(new) :]


def halved(content: bytes, rest: bytes = b"") -> bytes:
    return content[: len(content) // 2] + rest


def tiff(bits: int, strip: bytes, size: tuple[int, int], tile: tuple[int, int] | None = None) -> bytes:
    """Write a grey TIFF by hand, of one strip or of one tile."""
    where = {273: 8, 278: size[1], 279: len(strip)}
    if tile:
        where = {322: tile[0], 323: tile[1], 324: 8, 325: len(strip)}
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: 1, 277: 1, **where}
    entries = b"".join(struct.pack("<2H2I", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


JPEG, WEBP, LOSSLESS = encoded(NOISE, "JPEG"), encoded(NOISE, "WEBP"), encoded(NOISE, "WEBP", lossless=True)
PNG = encoded(NOISE, "PNG")
GIF = encoded(NOISE.convert("P"), "GIF")
BOMB = zlib.compress(bytes(200_000_000), 9)  # 200 kB
FRAME = JPEG.index(b"\xff\xc0") + 5  # where a JPEG says its height and width
WIDE = encoded(
    NOISE.convert("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0"
)  # with a header that gives the size of a canvas

BROKEN = {  # content, and what is said of it
    "empty.png": (b"", "not a readable image"),
    "noise.jpg": (bytes(RNG.integers(0, 256, 5000, dtype=np.uint8)), "not a readable image"),
    "zeros.webp": (bytes(5000), "not a readable image"),
    "half.png": (halved(PNG), "not a readable image"),
    "half.jpg": (halved(JPEG), "not a readable image"),
    "half.webp": (halved(WEBP), "not a readable image"),
    "half-zeros.png": (halved(PNG, bytes(len(PNG) // 2)), "not a readable image"),
    "half-zeros.jpg": (halved(JPEG, bytes(len(JPEG) // 2)), "its end is missing"),
    "half-zeros.webp": (halved(WEBP, bytes(len(WEBP) // 2)), "it ends in zeros"),
    "half-zeros-lossless.webp": (halved(LOSSLESS, bytes(len(LOSSLESS) // 2)), "it ends in zeros"),
    "half-patched.jpg": (halved(JPEG, b"\xff\xd9"), "rows are missing"),
    "half-rows.png": (png(ROWS[: len(ROWS) // 2]), "rows are missing"),
    "all-but-one-byte.png": (png(ROWS[:-1]), "rows are missing"),
    "no-rows.png": (png(b""), "rows are missing"),
    "wrong-sum.png": (patched(png(), len(png()) - 16, b"\0\0\0\0"), "the CRC of a chunk is wrong"),
    "interlaced.png": (png(ROWS, interlace=1), "rows are missing"),  # seven passes have more filter bytes
    "text-bomb.png": (png(ROWS, chunk(b"zTXt", b"k\0\0" + BOMB)), "not a readable image"),
    "itxt-bomb.png": (png(ROWS, chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB)), "not a readable image"),
    "icc-bomb.png": (png(ROWS, chunk(b"iCCP", b"k\0\0" + BOMB)), "not a readable image"),
    "many-texts.png": (png(ROWS, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6))) * 80), "not a readable image"),
    "huge.png": (png(ROWS, size=(30_000, 30_000)), "too large"),
    "large.png": (png(ROWS, size=(7072, 7072)), "too large"),
    "thin.png": (png(ROWS, size=(2**31 - 1, 1)), "too large"),
    "huge.jpg": (patched(JPEG, FRAME, struct.pack(">HH", 30_000, 30_000)), "too large"),
    "large.jpg": (patched(JPEG, FRAME, struct.pack(">HH", 7072, 7072)), "too large"),
    "huge.webp": (patched(WIDE, 24, struct.pack("<I", 16382)[:3] + struct.pack("<I", 16382)[:3]), "a"),
    "huge-lossless.webp": (patched(LOSSLESS, 21, struct.pack("<I", 16382 | 16382 << 14)), "a"),
    "float.png": (encoded(Image.new("F", (9, 9), 0.5), "TIFF"), "32 bits, of unknown range"),
    "int.tif": (encoded(Image.new("I", (9, 9), 99999), "TIFF"), "32 bits, of unknown range"),
    "float.ppm": (encoded(Image.new("F", (9, 9), 0.5), "PPM"), "the range of its samples is unknown"),  # a PFM
    "twelve.tif": (tiff(12, b"\x0f\xff\xff" * 9 * 5, (10, 9)), "its samples have 12 bits"),
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not a readable image"),
    "jpeg2000.jpg": (encoded(NOISE, "JPEG2000"), "not a readable image"),
    "half.bmp": (halved(encoded(NOISE, "BMP")), "not a readable image"),
    "half.ppm": (halved(encoded(NOISE, "PPM")), "not a readable image"),
    "half-text.pgm": (halved(b"P2 64 64 255 " + b"9 " * 64**2), "not a readable image"),
    "half.gif": (halved(GIF), "not a readable image"),
    "half-zeros.gif": (halved(GIF, bytes(len(GIF) // 2)), "not a readable image"),
    "half-patched.gif": (halved(GIF, b"\0;"), "not a readable image"),
    "half.tif": (halved(encoded(NOISE, "TIFF", compression="tiff_lzw")), "not a readable image"),
    "half-raw.tif": (halved(encoded(NOISE, "TIFF")), "not a readable image"),
    "huge.bmp": (patched(encoded(NOISE, "BMP"), 18, struct.pack("<2i", 30_000, 30_000)), "too large"),
    "huge.gif": (patched(GIF, 6, struct.pack("<2H", 30_000, 30_000)), "too large"),
    "huge-frame.gif": (
        patched(GIF, GIF.index(b",\0\0\0\0\x40\0") + 5, struct.pack("<2H", 30_000, 30_000)),
        "too large",
    ),
    "huge.pgm": (b"P5 30000 30000 255\n", "too large"),
    "huge.tif": (tiff(8, b"\1" * 90, (30_000, 30_000)), "too large"),
    "huge-tile.tif": (tiff(8, b"\1" * 90, (10, 9), tile=(32_768, 32_768)), "too large"),
}


@pytest.fixture
def root(tmp_path) -> Path:
    fill(tmp_path, [f"{i}.png" for i in range(30)])
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_or_absurd_is_named(root, name):
    content, said = BROKEN[name]
    (root / name).write_bytes(content)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: folder(root, size=8), str(root / name), said, "remove it")
    (root / "samples").mkdir()
    (root / name).rename(root / "samples" / name)
    refused(lambda: read_samples(root / "samples", (3, 64, 64), 256), str(root / "samples" / name))
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


READABLE = {
    "whole.jpg": JPEG,
    "with-more-behind.jpg": JPEG + b"\xff\xda" + bytes(RNG.integers(0, 256, 5000, dtype=np.uint8)),
    "progressive.jpg": encoded(NOISE, "JPEG", progressive=True),
    "one-colour.jpg": encoded(Image.new("RGB", (99, 99), "white"), "JPEG"),
    "grey.jpg": encoded(NOISE.convert("L"), "JPEG"),
    "cmyk.jpg": encoded(NOISE.convert("CMYK"), "JPEG"),
    "one-colour.webp": encoded(Image.new("RGB", (999, 999), "white"), "WEBP"),
    "lossless.webp": LOSSLESS,
    "animated.webp": encoded(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)]),
    "animated.png": encoded(NOISE, "PNG", save_all=True, append_images=[NOISE.rotate(90)]),
    "one-bit.png": encoded(NOISE.convert("1"), "PNG"),
    "palette.png": encoded(NOISE.convert("P"), "PNG"),
    "clear-palette.png": encoded(NOISE.convert("P"), "PNG", transparency=3),
    "clear-colour.png": encoded(NOISE, "PNG", transparency=(1, 2, 3)),
    "grey-alpha.png": encoded(NOISE.convert("LA"), "PNG"),
    "alpha.png": encoded(NOISE.convert("RGBA"), "PNG"),
    "deep-grey.png": encoded(Image.fromarray(RNG.integers(0, 2**16, (64, 64), dtype=np.uint16)), "PNG"),
    "deep-colour.png": png(b"".join(b"\0" + bytes(64 * 6) for _ in range(64)), depth=16),
    "deep-alpha.png": png(b"".join(b"\0" + bytes(64 * 8) for _ in range(64)), depth=16, colour=6),
    "two-bits.png": png(b"".join(b"\0" + bytes(16) for _ in range(64)), depth=2, colour=0),
    "more-rows.png": png(ROWS * 3),
    "row-bomb.png": png(bytes(200_000_000)),
    "with-text.png": png(ROWS, chunk(b"zTXt", b"k\0\0" + zlib.compress(b"hello"))),
    "gif.png": encoded(
        NOISE.convert("P"), "GIF", save_all=True, append_images=[NOISE.convert("L")]
    ),  # whatever its name
    "bmp.jpg": encoded(NOISE, "BMP"),
    "palette.bmp": encoded(NOISE.convert("P"), "BMP"),
    "clear.gif": encoded(NOISE.convert("P"), "GIF", transparency=3),
    "raw.TIF": encoded(NOISE, "TIFF"),
    "jpeg.tiff": encoded(NOISE, "TIFF", compression="jpeg"),
    "fax.tiff": encoded(NOISE.convert("1"), "TIFF", compression="group4"),
    "alpha.tiff": encoded(NOISE.convert("RGBA"), "TIFF", compression="tiff_deflate"),
    "deep.tif": tiff(16, bytes(range(180)), (10, 9)),
    "by-hand.tif": tiff(8, bytes(range(90)), (10, 9)),
    "two-pages.tif": encoded(NOISE, "TIFF", save_all=True, append_images=[NOISE]),
    "colour.ppm": encoded(NOISE, "PPM"),
    "grey.pgm": encoded(NOISE.convert("L"), "PPM"),
    "deep.pgm": b"P5 2 2 65535\n" + bytes(range(8)),
    "text.pgm": b"P2 2 2 15\n0 5 10 15\n",
    "bits.pbm": encoded(NOISE.convert("1"), "PPM"),
}


@pytest.mark.parametrize("name", READABLE)
def test_every_whole_picture_is_read(root, name):
    (root / name).write_bytes(READABLE[name])
    data = folder(root, size=8)
    assert len(data.train.x) + len(data.test.x) == 31


def test_what_stands_there_is_what_is_read(tmp_path):
    """A picture in four forms without loss: transparency, 16 bits and passes change nothing."""
    grey = np.array(NOISE.convert("L"))
    deep = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey.astype(np.uint16) * 257)
    wide = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in grey.astype(np.uint16) * 257)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    woven = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in grey[y::dy, x::dx])
    once = NOISE.convert("L")
    forms = {
        "grey": encoded(NOISE.convert("L"), "PNG"),
        "alpha": encoded(Image.merge("LA", [NOISE.convert("L"), Image.new("L", (64, 64), 255)]), "PNG"),
        "deep": png(deep, depth=16, colour=0),
        "colour": png(wide, depth=16),
        "woven": png(woven, colour=0, interlace=1),
        "webp": encoded(once.convert("RGB"), "WEBP", lossless=True),
        "bmp": encoded(once, "BMP"),
        "gif": encoded(once, "GIF"),
        "tif": encoded(once, "TIFF", compression="tiff_lzw"),
        "tiff": tiff(16, grey.astype("<u2").__mul__(257).tobytes(), (64, 64)),
        "pgm": encoded(once, "PPM"),
        "ppm": b"P5 64 64 65535\n" + (grey.astype(">u2") * 257).astype(">u2").tobytes(),
    }
    for name, content in forms.items():
        (
            tmp_path / f"{name}.{name if name in ('webp', 'bmp', 'gif', 'tif', 'tiff', 'pgm', 'ppm') else 'png'}"
        ).write_bytes(content)
    for seed in range(20):  # so that both sides of the split have one
        NOISE.rotate(90).convert("L").save(tmp_path / f"other-{seed}.png")
    data = folder(tmp_path, size=64, channels=1, test_fraction=0.5)
    found = torch.cat([data.train.x, data.test.x])
    assert sum(np.array_equal(x[0].numpy(), grey) for x in found) == len(forms)
    # Samples are read as data are.
    (tmp_path / "samples").mkdir()
    for name in forms:
        for path in tmp_path.glob(f"{name}.*"):
            path.rename(tmp_path / "samples" / path.name)
    samples = read_samples(tmp_path / "samples", (1, 64, 64), 256)
    assert samples.shape == (len(forms), 1, 64, 64) and (samples == torch.from_numpy(grey)).all()


def test_names_that_are_no_files_are_named_and_nothing_hangs(root, monkeypatch):
    def pipe(path: Path) -> None:
        os.mkfifo(path)

    def loop(path: Path) -> None:
        path.symlink_to(path)

    def lost(path: Path) -> None:
        path.symlink_to("nowhere")

    def port(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))

    monkeypatch.chdir(root)  # the name of a socket is short
    for make, said in ((pipe, "a pipe"), (loop, "broken link"), (lost, "broken link"), (port, "a socket")):
        path = Path("a.png")
        make(path)
        for read in (lambda: folder(".", size=8), lambda: read_samples(Path(), (3, 8, 8), 256)):
            refused(read, "a.png", said, "remove it")
        path.unlink()
    # Folders are walked into, whatever their names; links to folders are not.
    Path("folder.png").mkdir()
    Path("folder.png/again.png").symlink_to(root)
    NOISE.save("folder.png/x.png")
    data = folder(root, size=8)
    assert len(data.train.x) + len(data.test.x) == 31


def test_a_picture_that_may_not_be_read_is_named(root, monkeypatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    refused(lambda: folder(root, size=8), str(root / "0.png"), "Permission denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_named(root):
    (root / "closed").mkdir(mode=0)
    refused(lambda: folder(root, size=8), str(root / "closed"), "make it readable")


@pytest.mark.parametrize(
    "name", ["two\nlines\r\x1b[31m\u2028.png", os.fsdecode(b"\xff\xfe.png"), "a'\"b $(x).png"], ids=ascii
)
def test_any_name_is_read_and_fits_into_one_line(root, name, monkeypatch):
    (root / name).write_bytes(PNG)
    assert len(folder(root, size=8).train.x) > 0
    (root / name).write_bytes(halved(PNG))
    with pytest.raises(DataError) as info:
        folder(root, size=8)
    assert len(str(info.value).splitlines()) == 1
    monkeypatch.chdir(root.parent)
    code, _, err = genzoo("data=folder", f"data.root={root}", "data.size=8", "model=vae", "budget=smoke")
    assert (code, err.count("\n")) == (2, 1) and "is not a readable image" in err


def test_threads_share_the_room_and_never_take_more():
    room, held, most = decoding.MemoryBudget(10), [0], [0]
    lock = threading.Lock()

    def work(amount: int) -> None:
        with room.reserve(amount):
            with lock:
                held[0] += amount
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= amount

    threads = [threading.Thread(target=work, args=(1 + i % 10,)) for i in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most[0] <= 10 and room.left == 10


MEASURE = """
import os, re, sys
os.environ["OMP_NUM_THREADS"] = "6"
from genzoo.data import folder
data = folder(sys.argv[1], size=8, test_fraction=0.5)
assert len(data.train.x) + len(data.test.x) == 6
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss would count who has started it
"""


def test_pictures_just_under_the_limit_are_read_together_in_two_gigabytes(tmp_path):
    side = 7071
    assert side**2 <= decoding.PIXELS < (side + 1) ** 2
    row = b"\0" + bytes([100, 200]) * side
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, 4, 0, 0, 0))
    (tmp_path / "0.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b""),
    )
    Image.new("RGBA", (side, side), (1, 2, 3, 99)).save(tmp_path / "1.webp", lossless=True, method=0)
    for name in ("2.png", "3.webp", "4.png", "5.webp"):
        os.link(tmp_path / ("0.png" if name.endswith("png") else "1.webp"), tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * 2**20  # KiB
