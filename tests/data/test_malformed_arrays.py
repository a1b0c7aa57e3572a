"""Arrays of other programs, malformed in every way that a header, an archive and a stream can be: one line each."""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from genzoo.data.dataset import DataError
from genzoo.data.pictures import read_samples
from tests.data.test_bombs import little

SHAPE = (1, 8, 8)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
POINTS = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)


def npz(array: np.ndarray, compressed: bool = False, **more: np.ndarray) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, samples=array, **more)
    return file.getvalue()


def npy(header: str | bytes, data: bytes = b"", version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    """Write a .npy file with a header of one's own."""
    text = header.encode() if isinstance(header, str) else header
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + version + size + text + data


def archive(*members: tuple[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as packed:
        for name, content in members:
            packed.writestr(name, content)
    return file.getvalue()


def said(shape: str, descr: str = "'|u1'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def one(header: str | bytes, data: bytes = bytes(1280), **more: object) -> bytes:
    return archive(("samples.npy", npy(header, data, **more)))  # type: ignore[arg-type]


def patched(content: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """Change bytes behind every mark of a signature."""
    changed, place = bytearray(content), content.find(signature)
    while place >= 0:
        changed[place + offset : place + offset + len(value)] = value
        place = content.find(signature, place + 1)
    return bytes(changed)


def everywhere(content: bytes, local: int, central: int, value: bytes) -> bytes:
    """Change a field of an archive in the local headers and in the directory."""
    return patched(patched(content, b"PK\x03\x04", local, value), b"PK\x01\x02", central, value)


def duplicated() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return archive(("samples.npy", npy(said("(20, 8, 8, 1)"), bytes(1280))), ("samples.npy", b"x"))


PACKED = npz(IMAGES, compressed=True)
MALFORMED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "no archive": lambda: b"x" * 1000,
    "only the end of an archive": lambda: npz(IMAGES)[-22:],
    "cut in its middle": lambda: npz(IMAGES)[: len(npz(IMAGES)) // 2],
    "cut before its end": lambda: npz(IMAGES)[:-30],
    "no member": archive,
    "members of other kinds": lambda: archive(("a.txt", b"1"), ("b/", b"")),
    "a member that is no array": lambda: archive(("samples.npy", b"no array, of whatever length" * 10)),
    "an empty member": lambda: archive(("samples.npy", b"")),
    "encrypted": lambda: everywhere(npz(IMAGES), 6, 8, b"\x01\x00"),
    "compressed in an unknown way": lambda: everywhere(npz(IMAGES), 8, 10, struct.pack("<H", 99)),
    "compressed in an old way": lambda: everywhere(npz(IMAGES), 8, 10, struct.pack("<H", 6)),
    "a broken stream of zlib": lambda: PACKED[:60] + bytes(40) + PACKED[100:],
    "stored, and called deflated": lambda: everywhere(npz(IMAGES), 8, 10, struct.pack("<H", 8)),
    "stored, and called bzip2": lambda: everywhere(npz(IMAGES), 8, 10, struct.pack("<H", 12)),
    "stored, and called lzma": lambda: everywhere(npz(IMAGES), 8, 10, struct.pack("<H", 14)),
    "a flipped bit": lambda: npz(IMAGES).replace(IMAGES.tobytes()[100:140], b"\0" * 40),
    "two of one name": duplicated,
    "a shape of 10^13": lambda: one(said("(10000000000000,)")),
    "a shape of 10^13 by 10^13": lambda: one(said(f"({10**13}, {10**13})")),
    "a shape beyond 64 bits": lambda: one(said(f"({2**70},)")),
    "a negative shape": lambda: one(said("(-20, -8, 8, 1)")),
    "a shape of texts": lambda: one(said("('a', 8)")),
    "a shape that is a number": lambda: one(said("1280")),
    "more bytes than its shape": lambda: one(said("(10, 8, 8, 1)")),
    "fewer bytes than its shape": lambda: one(said("(21, 8, 8, 1)")),
    "a header without an end": lambda: one("{'descr': '|u1', 'shape': ("),
    "a header of code": lambda: one("__import__('os').system('touch done')"),
    "a header of many brackets": lambda: one("(" * 5000),
    "a header of many minus signs": lambda: one("-" * 9000 + "1"),
    "a header that is too long": lambda: one(said("(20, 8, 8, 1)") + " " * 60_000),
    "a header of zeros": lambda: one(bytes(100)),
    "a header longer than the file": lambda: one(said("(20, 8, 8, 1)"), version=b"\x02\x00", length=2**32 - 1),
    "a version that is none": lambda: one(said("(20, 8, 8, 1)"), version=b"\x09\x00"),
    "a header of version 3": lambda: one(said("(20, 8, 8, 1)"), version=b"\x03\x00"),
    "another key in the header": lambda: one("{'descr': '|u1', 'fortran_order': False, 'shape': (1,), 'x': 1}"),
    "a type that is none": lambda: one(said("(20, 8, 8, 1)", "'zz'")),
    "a type of the wrong kind": lambda: one(said("(20, 8, 8, 1)", "3")),
    "a type of no bytes": lambda: one(said("(20,)", "'|V0'"), b""),
    "objects": lambda: one(said("(20, 8, 8, 1)", "'|O'"), b"cos\nsystem\n(S'touch done'\ntR." * 50),
    "records that hold objects": lambda: one(said("(1280,)", "[('a', '|O')]")),
    "records": lambda: one(said("(1280,)", "[('a', '|u1')]")),
    "texts": lambda: npz(np.array(["a", "b"])),
    "dates": lambda: npz(np.zeros((20, 8, 8, 1), "datetime64[s]")),
    "truth values": lambda: npz(IMAGES > 100),
    "other bytes": lambda: npz(IMAGES.astype(np.int8)),
    "wide integers": lambda: npz(IMAGES.astype(np.int64)),
    "floats": lambda: npz(IMAGES.astype(np.float32)),
    "a number": lambda: npz(np.uint8(3)),
    "one dimension": lambda: npz(IMAGES.ravel()),
    "five dimensions": lambda: npz(IMAGES[..., None]),
    "channels first": lambda: npz(IMAGES.transpose(0, 3, 1, 2)),
    "another size": lambda: npz(IMAGES[:, :7]),
    "no samples": lambda: npz(IMAGES[:0]),
    "no pixels": lambda: npz(IMAGES[:, :, :0]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_one_line_names_the_file_and_the_cause(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("odd.npz").write_bytes(MALFORMED[name]())
    with little(2**24), pytest.raises(DataError, match=r"^samples=odd\.npz: .") as info:
        read_samples(Path("odd.npz"), SHAPE, 256)
    assert len(str(info.value)) < 12_000 and "\n" not in str(info.value)
    assert os.listdir() == ["odd.npz"]


@pytest.mark.parametrize(
    ("array", "because"),
    [
        (POINTS * np.nan, "holds NaN"),
        (np.where(POINTS > 1, np.inf, POINTS), "infinity"),
        (POINTS.astype(np.float64) * 1e300, "beyond float32"),
        (POINTS[:, :1], "not floats"),
        (POINTS.astype(np.complex64), "not floats"),
        (POINTS.astype(np.int32), "not floats"),
        (POINTS[:0], "no samples"),
    ],
)
def test_points_that_are_none_are_refused(tmp_path, array, because):
    (tmp_path / "odd.npz").write_bytes(npz(array))
    with pytest.raises(DataError, match=because):
        read_samples(tmp_path / "odd.npz", (2,), None)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "array",
    [IMAGES, np.asfortranarray(IMAGES), IMAGES[::-1], IMAGES[..., 0], IMAGES[:1]],
    ids=["as it is", "in columns", "backwards", "without channels", "one"],
)
def test_whole_arrays_of_any_layout_are_read_as_numpy_reads_them(tmp_path, array, compressed):
    (tmp_path / "whole.npz").write_bytes(npz(array, compressed))
    found = read_samples(tmp_path / "whole.npz", SHAPE, 256)
    np.testing.assert_array_equal(found[:, 0].numpy(), array.reshape(-1, 8, 8))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", np.longdouble])
def test_points_of_any_float_are_read_as_numpy_reads_them(tmp_path, dtype):
    (tmp_path / "whole.npz").write_bytes(npz(np.asfortranarray(POINTS.astype(dtype))))
    found = read_samples(tmp_path / "whole.npz", (2,), None)
    np.testing.assert_array_equal(found.numpy(), POINTS.astype(dtype).astype(np.float32))


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change a few bytes, cut or repeat a part, mostly where headers are."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.choice(
            [rng.randrange(len(changed)), rng.randrange(min(200, len(changed))), -1 - rng.randrange(100)]
        )
        how = rng.randrange(4)
        if how == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed[place] = rng.choice([0, 255, rng.randrange(256)])
        elif how == 2:
            del changed[place : place + rng.choice([1, 2, 30])]
        else:
            changed[place:place] = rng.randbytes(rng.choice([1, 4, 20]))
        if len(changed) < 200:
            break
    return bytes(changed)


def test_whatever_is_changed_in_an_archive_it_is_read_whole_or_refused(tmp_path):
    rng, refused = random.Random(0), 0
    originals = [npz(IMAGES), PACKED, npz(IMAGES, labels=np.arange(20))]
    originals += [archive(("samples.npy", npy(said("(20, 8, 8, 1)"), IMAGES.tobytes())), how=how) for how in (12, 14)]
    path = tmp_path / "odd.npz"
    for i in range(600):
        path.write_bytes(mutated(originals[i % len(originals)], rng))
        try:
            found = read_samples(path, SHAPE, 256)
        except DataError as error:
            assert str(error).startswith(f"samples={path}: ") and "\n" not in str(error)
            refused += 1
        else:  # the sums of the archive held: what was changed is not the array, or it is its header
            assert found.numel() == IMAGES.size
    assert refused > 300
