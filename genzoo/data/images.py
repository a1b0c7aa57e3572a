"""Image data sets as integer levels in memory.

    set              shape          levels   train / test      source
    digits           (1, 8, 8)      17       1437 / 360        scikit-learn
    mnist            (1, 28, 28)    256      60000 / 10000     a download, or the files in ``root``
    fashion_mnist    (1, 28, 28)    256      60000 / 10000     a download, the files in ``root``, or Debian's package
    cifar10          (3, 32, 32)    256      50000 / 10000     a download, or the archive or its folder in ``root``
    folder           any            256      by name or hash   a folder of image files

Names, addresses and MD5 checksums are those of torchvision's classes; a download with another checksum is discarded. Local idx
files may differ from the published bytes (Debian recompresses them), so their gzip CRC-32 and header sizes are checked
instead. CIFAR's pickled batches must have the published checksum, and are read from the archive in memory by an unpickler
restricted to arrays and containers.

References:
    Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", 1998, https://doi.org/10.24432/C50P49.
    LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998,
    https://doi.org/10.1109/5.726791 (MNIST).
    Xiao, Rasul, Vollgraf, "Fashion-MNIST", 2017, https://arxiv.org/abs/1708.07747.
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
    https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf (CIFAR-10).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import math
import os
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, get_args
from urllib.request import Request, urlopen

import numpy as np
import torch

from genzoo.data.captions import captioned
from genzoo.data.dataset import DataError, DataSet, Split
from genzoo.data.decoding import FORMATS, decoded, upright
from genzoo.data.layout import CaptionMode, arrange
from genzoo.environment import usable_cores
from genzoo.numerics.random import seed_of

if TYPE_CHECKING:
    from PIL import Image
    from torchvision.datasets import CIFAR10, MNIST

log = logging.getLogger(__name__)

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
DIGITS = tuple("0123456789")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TIMEOUT = 10  # seconds
# Size limits: the largest idx file has 47 million bytes, CIFAR-10's archive 170 million, 186 million unpacked.
IDX_BYTES, ARCHIVE_BYTES = 2**26, 2**28
MEMBERS = 100  # of the archive, which has 9
TEST_FRACTION = 0.1  # of a folder

_rebuild_array = np.empty(0).__reduce__()[0]
PARTS_OF_ARRAYS = {  # globals allowed in a pickle; CIFAR-10 was written by numpy on Python 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _rebuild_array,
    ("numpy._core.multiarray", "_reconstruct"): _rebuild_array,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # bytes, as Python 3 writes them in protocol 2
}


def digits() -> DataSet:
    """Load scikit-learn's 1797 handwritten digits, the test half of the UCI set: 8x8 pixels of 17 levels.

    The split into 1437 and 360 is fixed and stratified: every fifth digit is a test image, in the order of the classes
    and, within a class, of a hash of the index. The writers are unknown, and both splits share them.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    x = torch.from_numpy(source.images).to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(source.target).long()
    order = sorted(range(len(y)), key=lambda i: (int(y[i]), seed_of("digits", i)))
    test = torch.zeros(len(y), dtype=torch.bool)
    test[order[::5]] = True
    return DataSet(Split(x[~test], y[~test]), Split(x[test], y[test]), levels=17, classes=DIGITS)


# MNIST and Fashion-MNIST: four gzipped files of the idx format


def mnist(root: str | Path, download: bool = True, source: type[MNIST] | None = None) -> DataSet:
    """Load MNIST: 28x28 grey handwritten digits, 60000 and 10000.

    Args:
        root: folder with the files in torchvision's layout (``MNIST/raw/train-images-idx3-ubyte``, with or without
            ``.gz``) or directly in it; missing ones are downloaded to the former.
        download: whether to download missing files.
        source: torchvision class with names, addresses and checksums of the files; ``MNIST`` by default.

    Raises:
        DataError: if a file is damaged, or missing and not downloadable.
    """
    from torchvision.datasets import MNIST

    return _idx_dataset(source or MNIST, "MNIST", Path(root).expanduser(), [], download, DIGITS)


def fashion_mnist(root: str | Path, download: bool = True, source: type[MNIST] | None = None) -> DataSet:
    """Load Fashion-MNIST: 28x28 grey images of clothes, 60000 and 10000.

    Falls back to the files of Debian's package ``dataset-fashion-mnist`` if ``root`` has none.

    Args:
        root: as for ``mnist``, with torchvision's folder ``FashionMNIST/raw``.
        download: whether to download missing files.
        source: as for ``mnist``; torchvision's ``FashionMNIST`` by default.

    Raises:
        DataError: if a file is damaged, or missing and not downloadable.
    """
    from torchvision.datasets import FashionMNIST

    classes = tuple(FashionMNIST.classes)
    root = Path(root).expanduser()
    return _idx_dataset(source or FashionMNIST, "FashionMNIST", root, [DEBIAN_FASHION_MNIST], download, classes)


def _idx_dataset(
    source: type[MNIST], name: str, root: Path, elsewhere: Sequence[Path], download: bool, classes: tuple[str, ...]
) -> DataSet:
    home = (root / name / "raw").absolute()
    filenames = [filename for filename, _ in source.resources]
    found = (_find_idx(folder, filenames) for folder in (home, root, *elsewhere))
    paths = next(filter(None, found), None)
    if paths is None:
        for filename, md5 in source.resources:
            if not (home / filename).is_file():
                urls = [mirror + filename for mirror in source.mirrors]
                _download(urls, home / filename, md5, download, IDX_BYTES)
        paths = [home / filename for filename in filenames]
    train_x, train_y, test_x, test_y = paths
    return DataSet(
        _idx_split(train_x, train_y, len(classes)),
        _idx_split(test_x, test_y, len(classes)),
        levels=256,
        classes=classes,
    )


def _find_idx(folder: Path, filenames: Sequence[str]) -> list[Path] | None:
    """Find all four files in a folder, each gzipped or not."""
    choices = [(folder / filename, folder / filename.removesuffix(".gz")) for filename in filenames]
    found = [path for pair in choices for path in [p for p in pair if p.is_file()][:1]]
    return found if len(found) == len(choices) else None


def _idx_split(images: Path, labels: Path, num_classes: int) -> Split:
    x, y = _read_idx(images, 3), _read_idx(labels, 1)
    if len(x) != len(y):
        raise DataError(f"{images} has {len(x)} images and {labels} {len(y)} labels: take both from one source")
    if len(y) and y.max() >= num_classes:
        raise DataError(f"{labels} contains the label {y.max()}: labels must be 0..{num_classes - 1}")
    return Split(torch.from_numpy(x).unsqueeze(1), torch.from_numpy(y).long())


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read a uint8 idx file: two zeros, type 8, the rank, big-endian sizes, the bytes.

    At most the size in the header is unpacked.
    """
    packed = io.BytesIO(_read(path, IDX_BYTES))
    stream: io.BufferedIOBase = gzip.GzipFile(fileobj=packed) if path.suffix == ".gz" else packed
    try:
        header = stream.read(4 + 4 * ndim)
        shape = np.frombuffer(header[4:], ">u4").tolist() if len(header) == 4 + 4 * ndim else [0]
        size = math.prod(shape)
        content = stream.read(size + 1) if size <= IDX_BYTES else b""  # one more, after which the checksum is compared
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and download it again") from error
    if header[:4] != bytes((0, 0, 8, ndim)) or len(content) != size:
        raise DataError(f"{path} is not a complete uint8 idx file of rank {ndim}: delete it and download it again")
    return np.frombuffer(content, np.uint8).reshape(shape).copy()


# CIFAR-10: pickled batches, in a folder or in the archive


def cifar10(root: str | Path, download: bool = True, source: type[CIFAR10] | None = None) -> DataSet:
    """Load CIFAR-10: 32x32 colour photographs of ten classes, 50000 and 10000.

    Args:
        root: folder with ``cifar-10-batches-py`` or ``cifar-10-python.tar.gz``; if it has neither, the archive is
            downloaded to it.
        download: whether to download a missing archive.
        source: torchvision class with names, address and checksums of the files; ``CIFAR10`` by default.

    Raises:
        DataError: if the archive is missing and not downloadable, or a checksum differs.
    """
    from torchvision.datasets import CIFAR10

    source = source or CIFAR10
    root = Path(root).expanduser().absolute()
    names = [name for name, _ in (*source.train_list, *source.test_list)]
    folder, archive = root / source.base_folder, root / source.filename
    if all((folder / name).is_file() for name in names):
        batches = {name: _read(folder / name, ARCHIVE_BYTES) for name in names}
        home = folder
    else:
        if not archive.is_file():
            _download([source.url], archive, source.tgz_md5, download, ARCHIVE_BYTES)
        batches = _read_archive(archive, source.tgz_md5, [f"{source.base_folder}/{name}" for name in names])
        home = archive / source.base_folder
    train, test = (
        _cifar_split([(home / name, batches[name], md5) for name, md5 in table])
        for table in (source.train_list, source.test_list)
    )
    return DataSet(train, test, levels=256, classes=CIFAR10_CLASSES)


def _read_archive(path: Path, md5: str, wanted: Sequence[str]) -> dict[str, bytes]:
    """Read members of a tar archive into memory, by base name."""
    content = _read(path, ARCHIVE_BYTES)
    _check_md5(path, content, md5)
    files = {}
    try:
        with tarfile.open(fileobj=_Bounded(fileobj=io.BytesIO(content)), mode="r:") as archive:
            for number, member in enumerate(archive):
                if number >= MEMBERS:
                    raise DataError(f"{path} has more than {MEMBERS} members: do not use this archive")
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise DataError(
                        f"{path} contains {member.name!r}, a link or a path outside: do not use this archive"
                    )
                stream = archive.extractfile(member) if member.name in wanted else None
                if stream is not None:
                    files[name.name] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete archive ({error}): delete it and download it again") from error
    for lacking in wanted:
        if PurePosixPath(lacking).name not in files:
            raise DataError(f"{path} lacks {lacking}: delete it and download it again")
    return files


class _Bounded(gzip.GzipFile):
    """A gzip stream limited to ARCHIVE_BYTES; tarfile trusts the sizes in headers."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or self.tell() + size > ARCHIVE_BYTES:
            raise tarfile.ReadError(f"it unpacks to more than {ARCHIVE_BYTES} bytes")
        return super().read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END or offset > ARCHIVE_BYTES:
            raise tarfile.ReadError(f"it unpacks to more than {ARCHIVE_BYTES} bytes")
        return super().seek(offset, whence)


def _cifar_split(batches: Sequence[tuple[Path, bytes, str]]) -> Split:
    """Decode and concatenate batches, given by path, content and checksum; rows are in CHW order."""
    x, y = [], []
    for path, content, md5 in batches:
        _check_md5(path, content, md5)
        try:
            batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
            batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
            pixels, labels = np.asarray(batch["data"]), np.asarray(batch["labels"], dtype=np.int64)
        except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a batch of CIFAR-10 ({error}): download the official archive") from error
        fits = pixels.dtype == np.uint8 and pixels.shape == (*labels.shape, 3072)
        if not fits or not np.isin(labels, np.arange(10)).all():
            raise DataError(
                f"{path} contains {pixels.dtype} {pixels.shape} and labels {labels.shape}, "
                "not uint8 (N, 3072) and (N,) of 0..9: download the official archive"
            )
        x.append(pixels.reshape(-1, 3, 32, 32))
        y.append(labels)
    return Split(torch.from_numpy(np.concatenate(x)), torch.from_numpy(np.concatenate(y)))


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler restricted to numpy arrays and builtin containers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PARTS_OF_ARRAYS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of an array")
        return PARTS_OF_ARRAYS[module, name]


# Bytes, checksums and downloads


def _read(path: Path, most: int) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): make it readable") from error
    if len(content) > most:
        raise DataError(f"{path} has more than {most} bytes, too many for this file: delete it and download it again")
    return content


def _check_md5(path: Path, content: bytes, expected: str) -> None:
    found = _md5(content)
    if found != expected:
        raise DataError(f"{path} is damaged: its MD5 is {found}, not {expected}; delete it and download it again")


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(urls: Sequence[str], path: Path, md5: str, allowed: bool, most: int) -> None:
    """Download a file from the first working address; it is written only after the checksum was verified.

    Raises:
        DataError: if downloads are not allowed, every address fails or sends more than ``most`` bytes, or the file cannot be
            written.
    """
    reason = "download=False"
    for url in urls if allowed else ():
        log.info("downloading %s", url)
        try:
            request = Request(url, headers={"User-Agent": "genzoo"})  # noqa: S310  torchvision's own addresses
            with urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
                content = _receive(response, most)
        except (OSError, HTTPException) as error:
            reason = str(error)
            continue
        if _md5(content) == md5:
            _write(path, content)
            return
        reason = f"the MD5 is {_md5(content)}, not {md5}"
    raise DataError(
        f"{path.name} is missing and was not downloaded ({reason}): get it from {urls[0]} and put it at {path}"
    )


def _receive(response: BinaryIO, most: int) -> bytes:
    """Read a response of at most ``most`` bytes."""
    content = bytearray()
    while piece := response.read(2**20):
        content += piece
        if len(content) > most:
            raise OSError(f"the server sends more than {most} bytes")
    return bytes(content)


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.unlink(missing_ok=True)
            with open(part, "xb") as file:  # does not follow links
                file.write(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error}): choose a writable root") from error


# Folders of image files


def folder(
    root: str | Path,
    size: int,
    channels: int = 3,
    test_fraction: float | None = TEST_FRACTION,
    test_root: str | Path | None = None,
    captions: CaptionMode = "auto",
    vocabulary: int = 1024,
    text_length: int | None = 128,
) -> DataSet:
    """Load all image files below a folder, cropped and resized to squares of ``size`` pixels.

    Folders named train, test and val are splits, other sub-folders are classes, sorted by name, unless there are images beside
    them; without a test split, test images are chosen by a hash of the name, class by class (``genzoo.data.layout``).
    Captions beside the images (``genzoo.data.caption_files``) take the place of classes. ``DataSet.notes`` lists the files read
    and skipped.

    Each image is rotated by its EXIF orientation, blended with white where transparent, converted to grey or RGB (16 bits are
    scaled to 8, colour profiles ignored), resized by a Lanczos filter until its short side is ``size``, and cropped to its
    centre. Of an animation or a multi-page file the first frame is read.

    Args:
        root: the folder.
        size: side of the squares, in pixels.
        channels: 3 for colour, 1 for grey.
        test_fraction: expected fraction of test images, in [0, 1), without a test folder; None for 0.1. With 0 all images are
            in ``train``.
        test_root: another folder, used as the test split.
        captions: "auto" to read captions where at least half of the images have one, "required" or "none". Images without a
            caption are then omitted.
        vocabulary, text_length: of the captions' tokens, as in ``genzoo.data.captions.captioned``.

    Raises:
        DataError: if a folder is missing or has no images, an image is unreadable, truncated or larger than 50 million pixels,
            captions are damaged or missing, or a split would be empty.
    """
    from PIL import Image

    root, test_fraction = Path(root).expanduser(), TEST_FRACTION if test_fraction is None else test_fraction
    if channels not in (1, 3) or size < 1 or not 0 <= test_fraction < 1:
        raise DataError(
            f"{root} cannot be read with size={size}, channels={channels}, test_fraction={test_fraction}: "
            "size must be positive, channels 1 or 3, test_fraction at least 0 and below 1"
        )
    if captions not in get_args(CaptionMode):
        raise DataError(f"data.captions={captions}: must be auto, required or none")
    layout = arrange(root, test_fraction, None if test_root is None else Path(test_root).expanduser(), captions)
    numbers = {name: number for number, name in enumerate(layout.classes)}

    def read(paths: Sequence[Path]) -> Split:
        x = torch.empty(len(paths), channels, size, size, dtype=torch.uint8)
        for i, pixels in enumerate(pool.map(lambda path: _read_picture(path, size, channels), paths)):
            x[i] = torch.from_numpy(pixels)
        y = torch.tensor([numbers[layout.labels[path]] for path in paths], dtype=torch.int64) if numbers else None
        return Split(x, y)

    with warnings.catch_warnings(), ThreadPoolExecutor(usable_cores()) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        groups = [layout.train, layout.test, *([layout.validation] if layout.validation else [])]
        splits = [read(paths) for paths in groups]
    if layout.captions:
        pairs = [
            (split.x, [layout.captions[path] for path in paths]) for split, paths in zip(splits, groups, strict=True)
        ]
        return captioned(*pairs, vocabulary=vocabulary, length=text_length, notes=layout.notes)
    train, test, *validation = splits
    notes = tuple(layout.notes)
    return DataSet(train, test, 256, layout.classes, notes=notes, validation=validation[0] if validation else None)


def _read_picture(path: Path, size: int, channels: int) -> np.ndarray:
    """Read one image as uint8, (channels, size, size)."""
    from PIL import Image, ImageOps

    def square(file: Image.Image) -> np.ndarray:
        return np.array(ImageOps.fit(upright(file, channels), (size, size), Image.Resampling.LANCZOS))

    return decoded(path, FORMATS, square).reshape(size, size, channels).transpose(2, 0, 1)
