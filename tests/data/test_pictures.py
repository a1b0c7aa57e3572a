"""Pictures show the data: bytes are exact, a grid holds every image where it belongs, PNG files lose nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from genzoo.data import DataError
from genzoo.data.pictures import as_bytes, check_range, grid, is_marked, save_png, save_scatter
from genzoo.distributions.discretization import bin_center, dequantize
from genzoo.numerics.random import generator


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_bytes_of_bin_centres_are_the_levels_stretched_over_the_greys(levels):
    k = torch.arange(levels)
    expected = [(510 * i + levels - 1) // (2 * (levels - 1)) for i in range(levels)]  # round half up of 255 i/(K - 1)
    for x in (bin_center(k, levels), dequantize(k, levels, generator("bytes"))):
        shown = as_bytes(x.view(1, 1, 1, levels), levels)
        assert shown.dtype == np.uint8 and shown.shape == (1, 1, levels, 1)
        assert shown.flatten().tolist() == expected
    assert expected[0] == 0 and expected[-1] == 255 and sorted(set(expected)) == expected


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_points_beyond_the_cube_become_black_and_white(levels):
    x = torch.tensor([-7.0, -1.0001, 1.0, 1.0001, 7.0]).view(1, 1, 1, 5)
    assert as_bytes(x, levels).flatten().tolist() == [0, 0, 255, 255, 255]


def test_colours_keep_their_pixels():
    k = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    shown = as_bytes(bin_center(k, 256), 256)
    assert shown.shape == (2, 4, 5, 3)
    assert torch.equal(torch.from_numpy(shown).permute(0, 3, 1, 2).long(), k)


@pytest.mark.parametrize(
    "n, columns, expected", [(5, 2, (3, 2)), (6, 3, (2, 3)), (1, None, (1, 1)), (10, None, (3, 4))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_reading_order_between_white_gaps(n, columns, expected, channels):
    images = np.random.default_rng(0).integers(0, 250, (n, 60, 64, channels), dtype=np.uint8)
    rows, across = expected
    canvas = grid(images, columns=columns, gap=2)
    assert canvas.shape == (rows * 62 + 2, across * 66 + 2, channels)
    inside = np.zeros(canvas.shape[:2], dtype=bool)
    for i, image in enumerate(images):
        top, left = 2 + i // across * 62, 2 + i % across * 66
        assert np.array_equal(canvas[top : top + 60, left : left + 64], image)
        inside[top : top + 60, left : left + 64] = True
    assert (canvas[~inside] == 255).all()


def test_tiny_images_are_enlarged_by_whole_pixels():
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    canvas = grid(image, min_side=56, gap=1)
    assert canvas.shape == (58, 58, 1)
    assert np.array_equal(canvas[1:-1, 1:-1, 0], np.kron(image[0, :, :, 0], np.ones((7, 7), dtype=np.uint8)))


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_a_png_is_read_back_as_it_was(tmp_path, channels, mode):
    image = np.random.default_rng(1).integers(0, 256, (9, 11, channels), dtype=np.uint8)
    save_png(tmp_path / "image.png", image)
    with Image.open(tmp_path / "image.png") as read:
        assert read.mode == mode
        assert np.array_equal(np.asarray(read).reshape(image.shape), image)


def test_a_cloud_is_drawn_on_the_frame_of_the_data(tmp_path):
    """Samples far outside the data's frame leave the picture of the data as it is."""
    truth = torch.rand(400, 2, generator=generator("cloud"))
    pictures = []
    for name, samples in (("near", truth), ("far", truth + 100)):
        save_scatter(tmp_path / f"{name}.png", samples, truth)
        with Image.open(tmp_path / f"{name}.png") as read:
            pictures.append(np.asarray(read.convert("RGB")).astype(int))
    near, far = pictures
    assert near.shape == far.shape == (400, 800, 3)
    assert np.array_equal(near[:, 400:], far[:, 400:])
    blue = [int((picture[:, :400, 2] - picture[:, :400, 0] > 30).sum()) for picture in pictures]
    assert blue[0] > 200 and blue[1] == 0, "the samples, drawn in blue, and then out of the frame"


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_that_a_picture_does_not_have_are_refused_and_not_taken_for_transparency(tmp_path, channels):
    with pytest.raises(DataError, match=f"images of {channels} channels"):
        save_png(tmp_path / "x.png", np.zeros((4, 4, channels), np.uint8))
    assert not (tmp_path / "x.png").exists()


def test_a_picture_says_who_has_written_it(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    save_png(tmp_path / "ours.png", image, marked=True)
    save_png(tmp_path / "other.png", image)
    (tmp_path / "link.png").symlink_to("ours.png")
    with Image.open(tmp_path / "ours.png") as read:
        assert read.info == {"Software": "genzoo"} and np.array_equal(np.asarray(read), image)
    names = ("ours.png", "other.png", "link.png", "missing.png", ".")
    assert [is_marked(tmp_path / name) for name in names] == [True, False, False, False, False]


REAL = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8))


@pytest.mark.parametrize(
    ("change", "certain"),
    [
        (lambda x: x, None),
        (lambda x: x.clamp(20, 235), None),  # hardly a white or a black pixel
        (lambda x: x // 2 + 64, False),
        (lambda x: x // 2, False),
        (lambda x: x // 16, False),
        (lambda x: x // 128, True),
        (lambda x: x * 0 + 77, True),
        (lambda x: (x > 9) * 255, True),
    ],
)
def test_a_range_is_odd_where_most_of_the_data_leave_it(change, certain):
    odd = check_range(change(REAL.int()).to(torch.uint8), REAL, 256)
    assert (odd and odd.certain) == certain
    # Whoever has such data may draw such samples.
    same = change(REAL.int()).to(torch.uint8)
    assert check_range(same[:20], same[20:], 256) is None


def test_points_on_another_scale_are_odd():
    law = torch.randn(500, 2, generator=generator("points"))
    assert check_range(law[:250], law[250:], None) is None and check_range(law[:250] * 3, law[250:], None) is None
    assert not check_range(law[:250] / 9, law[250:], None).certain
    assert check_range(law[:250] * 0, law[250:], None).certain
