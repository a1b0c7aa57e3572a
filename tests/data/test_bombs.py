"""Archives, idx files and servers that claim or send too much are refused before they have taken memory or time."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import MNIST

from genzoo.data import cifar10, images, mnist
from tests.data.test_images import TRAIN_X, batches, idx, pinned, refused, tar, write_idx


@contextmanager
def little(memory: int, seconds: float = 10) -> Iterator[None]:
    """Check what a block has taken."""
    tracemalloc.start()
    begun = time.monotonic()
    try:
        yield
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < memory and time.monotonic() - begun < seconds


def zeros(head: bytes, megabytes: int) -> bytes:
    """Pack a head and many zeros, a thousandth of their size."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(megabytes):
            file.write(bytes(2**20))
    return packed.getvalue()


IDX_BOMBS: dict[str, Callable[[], bytes]] = {
    "more than its sizes": lambda: zeros(idx(TRAIN_X), 300),
    "sizes that nobody has": lambda: zeros(struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1), 300),
    "sizes that few have": lambda: zeros(struct.pack(">4I", 0x803, 400_000, 28, 28), 300),
    "no picture of any size": lambda: zeros(struct.pack(">4I", 0x803, 0, 28, 28), 300),
    "no idx file": lambda: zeros(b"", 300),
    "a thousand files in one": lambda: gzip.compress(idx(TRAIN_X)) + gzip.compress(b"") * 1000 + zeros(b"", 300),
}


@pytest.mark.parametrize("name", IDX_BOMBS)
def test_no_more_of_an_idx_file_is_unpacked_than_its_sizes_say(tmp_path, name):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(IDX_BOMBS[name]())
    with little(2**23):
        refused(lambda: mnist(tmp_path, download=False), str(path), "download it again")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_a_file_that_is_too_long_is_not_read_to_its_end(tmp_path, name):
    write_idx(tmp_path, compress=name.endswith("gz"))
    with open(tmp_path / name, "r+b") as file:
        file.truncate(2**36)  # without taking place on the disk
    with little(2 * images.IDX_BYTES):
        refused(lambda: mnist(tmp_path, download=False), str(tmp_path / name), "delete it")
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with open(tmp_path / "cifar-10-python.tar.gz", "r+b") as file:
        file.truncate(2**36)
    with little(2 * images.ARCHIVE_BYTES):
        refused(lambda: cifar10(tmp_path, download=False), "cifar-10-python.tar.gz", "delete it")


def test_the_real_files_fit():
    assert images.IDX_BYTES > 60_000 * 28 * 28 + 16
    assert images.ARCHIVE_BYTES > 60_000 * (3072 + 1) + 10**6  # the members; the archive itself is smaller


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a long file that nobody asked for": lambda: zeros(member("cifar-10-batches-py/readme.html", 2**35), 400),
    "a long batch": lambda: zeros(member("cifar-10-batches-py/data_batch_1", 2**35), 400),
    "a long name": lambda: zeros(member("././@LongLink", 2**35, tarfile.GNUTYPE_LONGNAME), 400),
    "a long header": lambda: zeros(member("PaxHeader", 2**35, tarfile.XHDTYPE), 400),
    "many files": lambda: tar({f"cifar-10-batches-py/{i}": b"" for i in range(1000)}),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_unpacked_no_further_than_a_real_one_goes(tmp_path, name, monkeypatch):
    monkeypatch.setattr(images, "ARCHIVE_BYTES", 2**24)
    content = ARCHIVES[name]()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    with little(2**25):
        refused(lambda: cifar10(tmp_path, source=pinned(content, batches())), "cifar-10-python.tar.gz")


def test_nothing_is_opened_before_its_checksum_is_right(tmp_path, monkeypatch):
    files = batches()
    content = tar(files)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content + b"x")
    monkeypatch.setattr(tarfile, "open", lambda **_: pytest.fail("it was opened"))
    monkeypatch.setattr(images, "_ArrayUnpickler", lambda *_, **__: pytest.fail("it was unpickled"))
    refused(lambda: cifar10(tmp_path, source=pinned(content, files)), "is damaged: its MD5 is")
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, batch in files.items():
        (tmp_path / name).write_bytes(batch + b"x")
    refused(lambda: cifar10(tmp_path, source=pinned(content, files)), "is damaged: its MD5 is")


@pytest.fixture
def endless() -> Iterator[str]:
    """The address of a server that never stops to send."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2**20))
            except OSError:  # the other end has had enough
                return

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def test_a_server_that_sends_too_much_is_left(tmp_path, endless, monkeypatch):
    monkeypatch.setattr(images, "IDX_BYTES", 2**24)

    class Endless(MNIST):
        mirrors = [endless]

    with little(4 * images.IDX_BYTES, seconds=30):
        refused(lambda: mnist(tmp_path / "root", source=Endless), "sends more than", str(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


def test_an_array_of_samples_that_unpacks_to_too_much_is_refused(tmp_path: Path):
    from genzoo.data.pictures import read_samples

    np.savez_compressed(tmp_path / "bomb.npz", samples=np.zeros((4_000, 224, 224, 1), np.uint8))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**19
    with little(2**23):
        refused(lambda: read_samples(tmp_path / "bomb.npz", (1, 224, 224), 256), "bomb.npz", "np.savez")
    np.savez_compressed(tmp_path / "white.npz", samples=np.zeros((100, 28, 28, 1), np.uint8))
    assert read_samples(tmp_path / "white.npz", (1, 28, 28), 256).shape == (100, 1, 28, 28)
