"""Emoji by their names: from a font that is made here, and from that of Debian where it is installed."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path, PurePosixPath

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from genzoo.data.dataset import DataError, DataSet
from genzoo.data.emoji import NAMES, REGIONS, TONES, emoji
from genzoo.data.layout import unit_hash
from tests.commands import genzoo
from tests.data.colour_fonts import bitmap, made
from tests.data.test_images import refused

DEBIAN = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def expected(seed: int) -> np.ndarray:
    """The picture of a bitmap: white where it is transparent, and padded to 20x20."""
    with Image.open(io.BytesIO(bitmap(seed))) as file:
        rgba = np.asarray(file)
    x = np.full((20, 20, 3), 255, np.uint8)
    x[2:19] = rgba[1:, :, :3]
    return x


WAVE, TONE = 0x1F44B, 0x1F3FD
# Words that lie on both sides of the split.
IMAGES = {
    (0x1F600,): bitmap(0),
    (WAVE,): bitmap(1),
    (WAVE, TONE): bitmap(2),
    (0x1F1EF, 0x1F1F5): bitmap(3),
    (0x31, 0x20E3): bitmap(4),
    (0x2764,): bitmap(5),
    (0x2600,): bitmap(6),
    (0x26AB,): bitmap(7),
    (0x1FAE8,): bitmap(8),
    (0x1F3FF,): bitmap(9),
    **{(0x1F400 + i,): bitmap(20 + i) for i in range(40)},
}
CAPTIONS = [
    "grinning face",
    "waving hand sign",
    "waving hand sign, medium skin tone",
    "flag of japan",
    "keycap digit one",
    "red heart",
    "sun with rays",
    "medium black circle",
    "shaking face",
    "dark skin tone",
    *(unicodedata.name(chr(0x1F400 + i)).lower() for i in range(40)),
]


def by_caption(data: DataSet) -> dict[str, np.ndarray]:
    """Pictures (H, W, 3) by their captions."""
    assert data.tokenizer is not None
    found = {}
    for split in data.splits.values():
        for caption, x in zip(data.tokenizer.decode(split.y), split.x, strict=True):
            assert caption not in found
            found[caption] = x.permute(1, 2, 0).numpy()
    return found


def test_each_picture_has_its_own_name(tmp_path):
    data = emoji(made(tmp_path / "a.ttf", IMAGES), size=20)
    assert (data.shape, data.levels, data.classes) == ((3, 20, 20), 256, ())
    found = by_caption(data)
    seeds = [*range(10), *range(20, 60)]
    assert set(found) == set(CAPTIONS)
    for caption, seed in zip(CAPTIONS, seeds, strict=True):
        assert np.array_equal(found[caption], expected(seed)), caption


def test_pictures_are_resized(tmp_path):
    found = by_caption(emoji(made(tmp_path / "a.ttf", IMAGES), size=10))
    small = Image.fromarray(expected(0)).resize((10, 10), Image.Resampling.LANCZOS)
    assert np.array_equal(found["grinning face"], np.asarray(small))


def test_the_split_is_of_the_names_and_holds_tones_together(tmp_path):
    hands = {(0x1F446 + i, *tone): bitmap(100 + 9 * i + j) for i in range(10)
             for j, tone in enumerate([(), *((t,) for t in TONES)])}  # fmt: skip
    data = emoji(made(tmp_path / "a.ttf", hands), size=8, test_fraction=0.4)
    assert data.tokenizer is not None
    sides = [{c.partition(",")[0] for c in data.tokenizer.decode(split.y)} for split in (data.train, data.test)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10
    assert all((unit_hash(PurePosixPath(name)) < 0.4) is side for side in (False, True) for name in sides[side])
    assert (len(data.train.x) + len(data.test.x)) == 60


def test_of_equal_pictures_one_is_kept(tmp_path):
    images = IMAGES | {(0x1F601,): bitmap(0), (0x1F602,): bitmap(1)}
    data = emoji(made(tmp_path / "a.ttf", images), size=20)
    assert "2 repeated ones left out" in data.notes[0]
    assert len(by_caption(data)) == len(IMAGES)


def test_what_has_no_name_is_skipped(tmp_path):
    zwj = (0x1F469, 0x200D, 0x1F680)
    images = IMAGES | {(0xFE82C,): bitmap(200), zwj: bitmap(201), (0x1F1EF, 0x1F1EF): bitmap(202)}
    assert set(by_caption(emoji(made(tmp_path / "a.ttf", images), size=8))) == set(CAPTIONS)


def test_names_of_regions_and_of_newer_characters():
    assert len(REGIONS) == 258 and len(set(REGIONS.values())) == 258
    assert all(code.isupper() and len(code) == 2 and name.islower() for code, name in REGIONS.items())
    assert (REGIONS["DE"], REGIONS["ZW"], REGIONS["AX"]) == ("germany", "zimbabwe", "aland islands")
    for point, name in NAMES.items():  # those of Unicode 15, where this Python has them
        if point > 0x1F6D0 and (known := unicodedata.name(chr(point), "")):
            assert name == known.lower()


# Fonts that are none


@pytest.mark.parametrize(
    "content", ["missing", "folder", "empty", "text", "truncated", "without bitmaps", "bad bitmap"]
)
def test_other_files_are_named_in_one_line(tmp_path, content):
    path = tmp_path / "a.ttf"
    if content == "folder":
        path.mkdir()
    elif content in ("empty", "text"):
        path.write_bytes(b"" if content == "empty" else b"no font" * 1000)
    elif content == "truncated":
        whole = made(path, IMAGES).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "without bitmaps":
        path.write_bytes((Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf").read_bytes())
    elif content == "bad bitmap":
        made(path, {**IMAGES, (0x1F604,): b"no PNG"})
    refused(lambda: emoji(path, size=8), f"data.font={path}")
    if content in ("missing", "folder", "without bitmaps"):
        refused(lambda: emoji(path, size=8), "fonts-noto-color-emoji")
    if content == "missing":
        refused(lambda: emoji(path, size=8), "data.font=FILE")


def test_large_bitmaps_and_fonts_are_refused(tmp_path, monkeypatch):
    path = made(tmp_path / "a.ttf", {**IMAGES, (0x1F604,): bitmap(0, (600, 3))})
    refused(lambda: emoji(path, size=8), "smiling face with open mouth and smiling eyes", "600x3", "512")
    monkeypatch.setattr("genzoo.data.emoji.FONT_BYTES", 100)
    refused(lambda: emoji(path, size=8), "more than 100 bytes")


def test_every_cut_of_a_font_is_refused_or_read(tmp_path):
    whole = made(tmp_path / "a.ttf", IMAGES).read_bytes()
    path = tmp_path / "b.ttf"
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 20):
            damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            data = emoji(path, size=8)
        except DataError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
        else:
            assert data.train.x.shape[1:] == (3, 8, 8)


def test_too_few_pictures_are_refused(tmp_path):
    path = made(tmp_path / "a.ttf", {(0x1F600,): bitmap(0)})
    refused(lambda: emoji(path, size=8), "0 test pictures", "data.test_fraction=0.1")
    for bad in ({"size": 0}, {"test_fraction": 0.0}, {"test_fraction": 1.0}):
        refused(lambda bad=bad: emoji(path, **{"size": 8, **bad}), "must be positive")


def test_the_command_names_the_key(tmp_path):
    code, _, err = genzoo("data=emoji", f"data.font={tmp_path / 'no.ttf'}", "model=vae", "budget=smoke")
    assert (code, err.count("\n")) == (2, 1) and "data.font=" in err and "fonts-noto-color-emoji" in err


# The font of Debian


@pytest.mark.skipif(not DEBIAN.is_file(), reason="fonts-noto-color-emoji is not installed")
def test_the_real_font():
    data = emoji(size=16)
    found = by_caption(data)
    assert len(found) > 2000 and 0.05 < len(data.test.x) / len(found) < 0.15
    assert len(data.notes) == 1  # no caption is cut
    flag = found["flag of japan"].astype(int)
    assert (flag[8, 8] - flag[8, 8].min()).argmax() == 0 and flag[8, 8, 0] > 150 > flag[8, 8, 1]  # the red disc
    assert (found["red heart"][7, 7].astype(int) - [230, 50, 50]).__abs__().max() < 60
    light, dark = (found[f"waving hand sign, {tone} skin tone"].mean() for tone in ("light", "dark"))
    assert light > dark + 15
    assert all(len(torch.unique(torch.from_numpy(x.copy()).flatten(0, 1), dim=0)) > 1 for x in found.values())
