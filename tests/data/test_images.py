"""The image sets: pixels arrive where they belong, and damaged or hostile files are refused in one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

from genzoo.data import DataError, DataSet, cifar10, digits, fashion_mnist, folder, images, mnist


def refused(read, *words: str) -> None:
    """Check that ``read`` raises one line that holds all the words."""
    with pytest.raises(DataError) as info:
        read()
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


# digits


def test_digits_are_scikit_learns_split_by_class():
    from sklearn.datasets import load_digits

    data, source = digits(), load_digits()
    assert (data.shape, data.levels, data.num_classes) == ((1, 8, 8), 17, 10)
    assert data.classes == tuple("0123456789")
    assert len(data.train.x) == 1437 and len(data.test.x) == 360
    assert data.train.x.dtype == torch.uint8 and data.train.y.dtype == torch.int64
    assert data.train.x.unique().tolist() == list(range(17))

    # Together the two sides are the 1797 digits with their labels, each once.
    def rows(x, y):
        return sorted((bytes(pixels), int(label)) for pixels, label in zip(x, y, strict=True))

    both = torch.cat([data.train.x, data.test.x]).flatten(1).numpy(), torch.cat([data.train.y, data.test.y])
    assert rows(*both) == rows(source.data.astype(np.uint8), source.target)

    share = torch.bincount(data.test.y) / torch.bincount(torch.cat([data.train.y, data.test.y]))
    assert float((share - 0.2).abs().max()) < 0.006
    # Pinned, so that no release moves a digit from one side to the other.
    assert md5(data.test.x.numpy().tobytes()) == "f0a578c8c9900bb9e8a7df912ae4af51"


# MNIST and Fashion-MNIST

RNG = np.random.default_rng(0)
TRAIN_X, TRAIN_Y = RNG.integers(0, 256, (12, 28, 28), np.uint8), np.arange(12, dtype=np.uint8) % 10
TEST_X, TEST_Y = RNG.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
IDX = {
    "train-images-idx3-ubyte": TRAIN_X,
    "train-labels-idx1-ubyte": TRAIN_Y,
    "t10k-images-idx3-ubyte": TEST_X,
    "t10k-labels-idx1-ubyte": TEST_Y,
}


def idx(array: np.ndarray) -> bytes:
    """The format of yann.lecun.com: magic number 0x800 + rank, sizes, bytes; integers are big-endian."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_idx(where: Path, compress: bool = True) -> None:
    where.mkdir(parents=True, exist_ok=True)
    for name, array in IDX.items():
        if compress:
            (where / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (where / name).write_bytes(idx(array))


def check_idx(data: DataSet) -> None:
    assert (data.shape, data.levels, data.num_classes) == ((1, 28, 28), 256, 10)
    for split, x, y in ((data.train, TRAIN_X, TRAIN_Y), (data.test, TEST_X, TEST_Y)):
        assert split.x.dtype == torch.uint8 and np.array_equal(split.x[:, 0].numpy(), x)
        assert split.y.dtype == torch.int64 and split.y.tolist() == y.tolist()


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize(("read", "home"), [(mnist, "MNIST/raw"), (fashion_mnist, "FashionMNIST/raw"), (mnist, ".")])
def test_idx_files_in_root_are_used(tmp_path, read, home, compress):
    write_idx(tmp_path / home, compress)
    check_idx(read(tmp_path, download=False))
    check_idx(read(str(tmp_path), download=False))


def test_debians_fashion_mnist_is_used_where_root_has_none(tmp_path, monkeypatch):
    write_idx(tmp_path / "usr")
    monkeypatch.setattr(images, "DEBIAN_FASHION_MNIST", tmp_path / "usr")
    data = fashion_mnist(tmp_path / "root", download=False)
    check_idx(data)
    assert data.classes[0] == "T-shirt/top" and data.classes[9] == "Ankle boot"
    assert not (tmp_path / "root").exists()
    refused(lambda: mnist(tmp_path / "root", download=False), "train-images-idx3-ubyte.gz")


@pytest.mark.skipif(not images.DEBIAN_FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(tmp_path):
    data = fashion_mnist(tmp_path, download=False)
    assert data.train.x.shape == (60_000, 1, 28, 28) and data.test.x.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.train.y).tolist() == 10 * [6000] and torch.bincount(data.test.y).tolist() == 10 * [1000]
    assert data.train.y[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert float(data.train.x.double().mean()) / 255 == pytest.approx(0.2860, abs=5e-5)  # the published statistics
    assert float(data.train.x.double().std()) / 255 == pytest.approx(0.3530, abs=5e-5)


def mirror(where: Path, home: type[MNIST] = MNIST) -> type[MNIST]:
    """A mirror on this machine, and the class that pins what it serves."""
    write_idx(where)
    names = [f"{name}.gz" for name in IDX]

    class Mirrored(home):
        mirrors = [(where / "down").as_uri() + "/", where.as_uri() + "/"]
        resources = [(name, md5((where / name).read_bytes())) for name in names]

    return Mirrored


@pytest.mark.parametrize(
    ("read", "kind", "home"), [(mnist, MNIST, "MNIST"), (fashion_mnist, FashionMNIST, "FashionMNIST")]
)
def test_missing_idx_files_are_downloaded_to_torchvisions_place(tmp_path, monkeypatch, read, kind, home):
    monkeypatch.setattr(images, "DEBIAN_FASHION_MNIST", tmp_path / "usr")
    source = mirror(tmp_path / "mirror", kind)
    root = tmp_path / "new" / "root"
    check_idx(read(root, source=source))
    assert sorted(p.name for p in (root / home / "raw").iterdir()) == sorted(name for name, _ in source.resources)
    check_idx(read(root, download=False))


def test_a_download_that_misses_its_checksum_is_not_kept(tmp_path):
    source = mirror(tmp_path / "mirror")
    name = "train-images-idx3-ubyte.gz"
    expected = dict(source.resources)[name]
    (tmp_path / "mirror" / name).write_bytes(b"another file")
    refused(
        lambda: mnist(tmp_path / "root", source=source), name, expected, md5(b"another file"), str(tmp_path / "root")
    )
    assert not (tmp_path / "root").exists()


def test_a_dead_network_leaves_nothing_behind(tmp_path):
    class Dead(MNIST):
        mirrors = ["http://127.0.0.1:9/"]

    place = str(tmp_path / "root" / "MNIST" / "raw" / "train-images-idx3-ubyte.gz")
    refused(lambda: mnist(tmp_path / "root", source=Dead), "http://127.0.0.1:9/train-images-idx3-ubyte.gz", place)
    refused(lambda: mnist(tmp_path / "root", download=False), "download=False", place)
    assert not (tmp_path / "root").exists()


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "root").write_text("a file")
    refused(lambda: mnist(tmp_path / "root", source=mirror(tmp_path / "mirror")), str(tmp_path / "root"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(TRAIN_X))[:-20]),
        ("train-images-idx3-ubyte.gz", b"no gzip"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(TRAIN_X)[:-1])),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(TRAIN_X) + b"x")),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(TEST_X))),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(TEST_Y[:-1]))),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(TEST_Y + 10))),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(b"")),
    ],
    ids=["truncated", "not gzip", "short", "long", "rank", "count", "label", "empty"],
)
def test_damaged_idx_files_are_named(tmp_path, name, content):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(content)
    refused(lambda: mnist(tmp_path, download=False), str(tmp_path / name))


# CIFAR-10


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 wrote it, opcode by opcode: byte strings, and numpy's names of 2009."""

    def string(value: bytes) -> bytes:
        return b"U" + struct.pack("<B", len(value)) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    raw = pixels.tobytes()
    shape = integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"\x87R"
    array += b"(" + integer(1) + shape + dtype + b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    listed = b"](" + b"".join(integer(label) for label in labels) + b"e"
    items = string(b"batch_label") + string(b"training batch") + string(b"labels") + listed + string(b"data") + array
    return b"\x80\x02}(" + items + b"u."


def python3_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"training batch"}, protocol=2)


PIXELS = RNG.integers(0, 256, (6, 4, 3072), np.uint8)  # six batches of four pictures
LABELS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9], [9, 8, 7, 6]]
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def batches(write=python2_pickle) -> dict[str, bytes]:
    return {f"cifar-10-batches-py/{n}": write(x, y) for n, x, y in zip(NAMES, PIXELS, LABELS, strict=True)}


def tar(files: dict[str, bytes], *links: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for link in links:
            archive.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pinned(archive: bytes, files: dict[str, bytes], address: str = "http://127.0.0.1:9/") -> type[CIFAR10]:
    """torchvision's class with the checksums of these files."""
    sums = {name.rpartition("/")[2]: md5(content) for name, content in files.items()}

    class Pinned(CIFAR10):
        url = address + CIFAR10.filename
        tgz_md5 = md5(archive)
        train_list = [[name, sums[name]] for name in NAMES[:5]]
        test_list = [["test_batch", sums["test_batch"]]]

    return Pinned


def check_cifar(data: DataSet) -> None:
    assert (data.shape, data.levels, data.num_classes) == ((3, 32, 32), 256, 10)
    assert data.classes[0] == "airplane" and data.classes[9] == "truck"
    assert data.train.x.shape == (20, 3, 32, 32) and data.test.x.shape == (4, 3, 32, 32)
    assert data.train.x.dtype == torch.uint8 and data.train.y.dtype == torch.int64
    assert data.train.y.tolist() == sum(LABELS[:5], []) and data.test.y.tolist() == LABELS[5]
    for i in range(4):  # 1024 bytes of red, then green, then blue, each row by row
        for c, row, col in ((0, 0, 0), (0, 0, 1), (1, 31, 5), (2, 7, 30), (2, 31, 31)):
            at = 1024 * c + 32 * row + col
            assert data.train.x[8 + i, c, row, col] == PIXELS[2, i, at]
            assert data.test.x[i, c, row, col] == PIXELS[5, i, at]
    assert np.array_equal(data.train.x.flatten(1).numpy(), PIXELS[:5].reshape(20, 3072))


@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
def test_cifar_is_read_from_its_archive_without_extracting(tmp_path, write):
    files = batches(write)
    archive = tar({**files, "cifar-10-batches-py/readme.html": b"hello"})
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    check_cifar(cifar10(tmp_path, download=False, source=pinned(archive, files)))
    assert os.listdir(tmp_path) == ["cifar-10-python.tar.gz"]


def test_cifar_is_read_from_its_folder(tmp_path):
    files = batches()
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    source = pinned(b"", files)
    check_cifar(cifar10(tmp_path, download=False, source=source))

    damaged = tmp_path / "cifar-10-batches-py/data_batch_3"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9] + b"x" + content[-8:])
    read = md5(damaged.read_bytes())
    refused(lambda: cifar10(tmp_path, source=source), str(damaged), md5(content), read)


def test_cifar_is_downloaded(tmp_path):
    files = batches()
    archive = tar(files)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/cifar-10-python.tar.gz").write_bytes(archive)
    source = pinned(archive, files, (tmp_path / "mirror").as_uri() + "/")
    check_cifar(cifar10(tmp_path / "root", source=source))
    assert (tmp_path / "root/cifar-10-python.tar.gz").read_bytes() == archive


def test_missing_cifar_names_archive_address_and_place(tmp_path):
    files = batches()
    for download in (True, False):
        refused(
            lambda download=download: cifar10(tmp_path / "root", download=download, source=pinned(b"", files)),
            "cifar-10-python.tar.gz is missing",
            "http://127.0.0.1:9/cifar-10-python.tar.gz",
            str(tmp_path / "root" / "cifar-10-python.tar.gz"),
        )
    refused(
        lambda: cifar10(tmp_path / "root", download=False), "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    )
    assert not (tmp_path / "root").exists()


def test_a_damaged_cifar_archive_names_both_checksums(tmp_path):
    files = batches()
    archive = tar(files)
    place = tmp_path / "cifar-10-python.tar.gz"
    place.write_bytes(archive[:1000])
    refused(lambda: cifar10(tmp_path, source=pinned(archive, files)), str(place), md5(archive), md5(archive[:1000]))
    refused(lambda: cifar10(tmp_path, source=pinned(archive[:1000], files)), str(place), "not a complete archive")
    archive = tar(dict(list(files.items())[:-1]))
    place.write_bytes(archive)
    refused(lambda: cifar10(tmp_path, source=pinned(archive, files)), str(place), "lacks", "test_batch")


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("extra", "links"),
    [
        ({"../evil": b"x"}, ()),
        ({"/tmp/genzoo-evil": b"x"}, ()),
        ({"cifar-10-batches-py/../../evil": b"x"}, ()),
        ({}, (link("cifar-10-batches-py/data_batch_1", "/etc/passwd", tarfile.SYMTYPE),)),
        ({}, (link("cifar-10-batches-py/readme.html", "cifar-10-batches-py/test_batch", tarfile.LNKTYPE),)),
    ],
    ids=["parent", "absolute", "inner parent", "symbolic link", "hard link"],
)
def test_hostile_archives_are_refused(tmp_path, extra, links):
    files = batches()
    archive = tar({**extra, **files}, *links)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cifar-10-python.tar.gz").write_bytes(archive)
    refused(lambda: cifar10(tmp_path / "root", source=pinned(archive, files)), "do not use this archive")
    assert os.listdir(tmp_path) == ["root"] and os.listdir(tmp_path / "root") == ["cifar-10-python.tar.gz"]
    assert not Path("/tmp/genzoo-evil").exists()


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", [os.mkdir, eval], ids=["os.mkdir", "eval"])
def test_a_program_in_a_batch_is_not_run(tmp_path, call, protocol):
    victim = tmp_path / "victim"
    argument = str(victim) if call is os.mkdir else f"__import__('os').mkdir({str(victim)!r})"
    files = batches()
    files["cifar-10-batches-py/data_batch_2"] = pickle.dumps({"data": Call(call, argument), "labels": []}, protocol)
    archive = tar(files)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    refused(lambda: cifar10(tmp_path, source=pinned(archive, files)), "data_batch_2", "which is not part of an array")
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": PIXELS[0]}),
        python3_pickle(PIXELS[0].astype(np.int16), LABELS[0]),
        python3_pickle(PIXELS[0], LABELS[0][:-1]),
        python3_pickle(PIXELS[0], [0, 1, 2, 10]),
    ],
    ids=["empty", "noise", "list", "no labels", "dtype", "count", "label"],
)
def test_other_pickles_are_not_batches(tmp_path, content):
    files = {**batches(), "cifar-10-batches-py/test_batch": content}
    archive = tar(files)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    refused(lambda: cifar10(tmp_path, source=pinned(archive, files)), "test_batch", "download the official archive")


# A folder of one's own


def picture(seed: int, width: int = 8, height: int = 8, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode)


def fill(root: Path, names: list[str]) -> None:
    """Write lossless pictures, each from the seed of its place in the list."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
        picture(seed).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))


def split_of(data: DataSet) -> dict[bytes, str]:
    """On which side each picture is."""
    sides = {"train": data.train, "test": data.test}
    return {bytes(x.permute(1, 2, 0).numpy()): side for side, split in sides.items() for x in split.x}


def one(tmp_path: Path, image: Image.Image, name: str, size: int, channels: int = 3, **options) -> np.ndarray:
    """Read one picture through the folder, as (size, size, channels), with company so that both sides are there."""
    root = tmp_path / "root"
    fill(root, [f"b{i}.png" for i in range(30)])
    image.save(root / f"a-{name}", **options)
    alone = folder(root, size=size, channels=channels, test_fraction=0.5)
    (root / f"a-{name}").unlink()
    company = split_of(folder(root, size=size, channels=channels, test_fraction=0.5))
    (found,) = [x for x in torch.cat([alone.train.x, alone.test.x]) if bytes(x.permute(1, 2, 0).numpy()) not in company]
    return found.permute(1, 2, 0).numpy()


def test_folder_without_classes(tmp_path):
    names = [*(f"{i}.png" for i in range(20)), *(f"{i}.WebP" for i in range(20, 40)), "deep/40.PNG"]
    fill(tmp_path, names)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden.png").write_text("not a picture")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/0.png").write_text("not a picture")
    data = folder(tmp_path, size=8, test_fraction=0.3)
    assert (data.shape, data.levels, data.classes, data.num_classes) == ((3, 8, 8), 256, (), 0)
    assert data.train.y is None and data.test.y is None and data.train.x.dtype == torch.uint8
    pixels = {bytes(np.asarray(picture(seed))) for seed in range(41)}
    assert set(split_of(data)) == pixels
    assert len(data.train.x) + len(data.test.x) == 41


def test_folder_with_classes(tmp_path):
    names = [f"{kind}/{i}.png" for kind in ("dog", "Cat", "bee", "ant") for i in range(8)] + ["dog/small/pup.png"]
    fill(tmp_path, names)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/notes.txt").write_text("not a picture")
    data = folder(tmp_path, size=8, test_fraction=0.3)
    assert data.classes == ("Cat", "ant", "bee", "dog")
    assert data.train.y.dtype == torch.int64 and len(data.train.y) + len(data.test.y) == 33
    expected = {bytes(np.asarray(picture(seed))): name.partition("/")[0] for seed, name in enumerate(names)}
    for split in (data.train, data.test):
        for x, y in zip(split.x, split.y, strict=True):
            assert data.classes[y] == expected[bytes(x.permute(1, 2, 0).numpy())]


def test_split_of_a_picture_depends_on_its_name_alone(tmp_path):
    names = [f"{i % 2}/{i // 2}.png" for i in range(60)]
    fill(tmp_path / "a", names)
    before = split_of(folder(tmp_path / "a", size=8))
    fill(tmp_path / "b" / "a", [*names, "0/000.png", "new/0.png"])
    after = split_of(folder(tmp_path / "b" / "a", size=8))
    assert {x: after[x] for x in before} == before
    # Pinned, so that no release moves a picture from one side to the other.
    is_test = [
        hashlib.blake2b(name.encode(), digest_size=6).digest() < bytes([25, 153, 153, 153, 153, 154]) for name in names
    ]
    assert [before[bytes(np.asarray(picture(i)))] == "test" for i in range(60)] == is_test


def test_jpeg_and_grey(tmp_path):
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    for name in ("flat.jpg", "flat.JPEG"):
        assert np.abs(one(tmp_path, flat, name, 8).astype(int) - [200, 100, 50]).max() <= 2
    assert (
        np.abs(one(tmp_path, flat, "flat.png", 8, channels=1).astype(int) - 124).max() <= 1
    )  # .299 R + .587 G + .114 B
    grey = picture(100, mode="L")
    assert np.array_equal(one(tmp_path, grey, "grey.png", 8), np.repeat(np.asarray(grey)[..., None], 3, axis=2))


def test_short_side_is_resized_and_the_centre_kept(tmp_path):
    wide, tall = picture(100, 60, 20), picture(101, 20, 60)
    for image, small, box in ((wide, (30, 10), (10, 0, 20, 10)), (tall, (10, 30), (0, 10, 10, 20))):
        expected = np.asarray(image.resize(small, Image.Resampling.LANCZOS).crop(box)).astype(int)
        assert np.abs(one(tmp_path, image, "long.png", 10) - expected).max() <= 1
    dot = one(tmp_path, Image.new("RGB", (1, 3), (10, 200, 30)), "dot.png", 10)
    assert np.array_equal(dot, np.full((10, 10, 3), (10, 200, 30)))
    fine = np.zeros((64, 64, 3), np.uint8)
    fine[:, ::2] = 255  # stripes finer than the target: an antialiased picture is grey
    assert np.abs(one(tmp_path, Image.fromarray(fine), "fine.png", 8)[:, 1:-1].astype(int) - 128).max() <= 3


def test_exif_orientation_is_applied(tmp_path):
    image = picture(100)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show after 90 degrees clockwise
    turned = one(tmp_path, image, "turned.png", 8, exif=exif)
    assert np.array_equal(turned, np.rot90(np.asarray(image), k=-1))


def test_transparency_is_laid_on_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (0, 100, 200, 128))
    for name, lossless in (("alpha.png", {}), ("alpha.webp", {"lossless": True})):
        assert (one(tmp_path, clear, name, 8, **lossless) == 255).all()
        assert np.abs(one(tmp_path, half, name, 8, **lossless).astype(int) - [127, 177, 227]).max() <= 1
    assert (one(tmp_path, Image.new("LA", (8, 8), (0, 0)), "grey.png", 8, channels=1) == 255).all()

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 80, 170])
    assert (one(tmp_path, palette, "palette.png", 8) == (9, 80, 170)).all()
    assert (one(tmp_path, palette, "clear-palette.png", 8, transparency=1) == 255).all()


def test_sixteen_bits_become_eight(tmp_path):
    levels = np.array([0, 257 * 3, 257 * 100, 257 * 100 + 128, 257 * 100 + 129, 65534, 65535, 40000], np.uint16)
    image = Image.fromarray(np.tile(levels, (8, 1)))
    found = one(tmp_path, image, "deep.png", 8, channels=1)
    assert found[0, :, 0].tolist() == np.round(levels / 257).astype(int).tolist()


def test_sixteen_bit_colour(tmp_path):
    """Written by hand, since Pillow writes none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + 8 * struct.pack(">3H", 65535, 257 * 100, 257 * 7)
    header = chunk(b"IHDR", struct.pack(">2I5B", 8, 8, 16, 2, 0, 0, 0))
    fill(tmp_path, [f"{i}.png" for i in range(30)])
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(8 * row)) + chunk(b"IEND", b"")
    )
    data = folder(tmp_path, size=8)
    assert np.tile([255, 100, 7], 64).astype(np.uint8).tobytes() in split_of(data)


def test_cmyk_is_converted(tmp_path):
    ink = Image.new("CMYK", (8, 8), (255, 0, 255, 0))  # cyan and yellow: green
    red, green, blue = one(tmp_path, ink, "ink.jpg", 8, quality=95).reshape(-1, 3).mean(axis=0)
    assert green > 100 and green > red + 60 and green > blue + 60


@pytest.mark.parametrize(("name", "kind"), [("film.png", "PNG"), ("film.webp", "WEBP")])
def test_first_frame_of_an_animation(tmp_path, name, kind):
    first, second = picture(100), picture(101)
    options = {"lossless": True} if kind == "WEBP" else {}
    frame = one(tmp_path, first, name, 8, save_all=True, append_images=[second], **options)
    assert np.array_equal(frame, np.asarray(first))


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(0, 64, 64).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zero.png", b""),
        ("noise.webp", b"not an image\nat all"),
        ("cut.jpg", encoded("JPEG")[:900]),
        ("cut.png", encoded("PNG")[:900]),
        ("cut.webp", encoded("WEBP")[:900]),
        ("cut.gif", encoded("GIF")[:900]),
        ("icon.png", encoded("ICO")),
    ],
)
def test_broken_pictures_are_named(tmp_path, name, content):
    fill(tmp_path, [f"{i}.png" for i in range(30)])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).write_bytes(content)
    refused(lambda: folder(tmp_path, size=8), str(tmp_path / "deep" / name), "not a readable image")


@pytest.mark.parametrize("limit", [50, 20], ids=["warned of by Pillow", "refused by Pillow"])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    fill(tmp_path, [f"{i}.png" for i in range(30)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    refused(lambda: folder(tmp_path, size=8), str(tmp_path / "0.png"), "too large")


def test_folders_that_cannot_be_split_or_read(tmp_path):
    refused(lambda: folder(tmp_path / "missing", size=8), str(tmp_path / "missing"), ".png, .jpg, .jpeg, .webp")
    refused(lambda: folder(tmp_path / "two\nlines", size=8), "two lines")
    (tmp_path / "empty").mkdir()
    refused(lambda: folder(tmp_path / "empty", size=8), str(tmp_path / "empty"), ".png, .jpg, .jpeg, .webp")
    fill(tmp_path / "single", ["0.png"])
    refused(lambda: folder(tmp_path / "single", size=8), str(tmp_path / "single"), "no test image", "test_fraction")
    refused(lambda: folder(tmp_path / "single", size=8, test_fraction=0.99999), "no test image")
    assert len(folder(tmp_path / "single", size=8, test_fraction=0.0).train.x) == 1
    for bad in ({"size": 0}, {"channels": 2}, {"test_fraction": -0.1}, {"test_fraction": 1.0}):
        refused(lambda bad=bad: folder(tmp_path / "single", **{"size": 8, **bad}), str(tmp_path / "single"), "must be")


def test_import_is_light():
    """Neither torchvision nor Pillow nor scikit-learn is imported before it is needed."""
    import subprocess
    import sys

    heavy = "{'torchvision', 'PIL', 'sklearn', 'pytorch_lightning'}"
    program = f"import sys, genzoo.data; print(*({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
