"""Animations and plots: frames that are read back, their times, and what a plot shows of the density and of the points."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image

from genzoo.data import Moons
from genzoo.data.animation import check_animation, forward, save_gif, save_mp4, there_and_back
from genzoo.data.dataset import DataError
from genzoo.data.plots import limits, moving_points, save_curves, save_pairs, save_point_panels

ORANGE = (241, 128, 63)  # of a density


def frames(n: int, channels: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (9, 13, channels)).astype(np.uint8) for _ in range(n)]


def read(file: io.BytesIO) -> list[np.ndarray]:
    with Image.open(io.BytesIO(file.getvalue())) as picture:
        found = []
        for i in range(picture.n_frames):
            picture.seek(i)
            found.append(np.asarray(picture.convert("RGB")))
        return found


def near(image: np.ndarray, colour: tuple[int, int, int], within: int = 40) -> np.ndarray:
    return (np.abs(image.astype(int) - colour).max(-1) < within).nonzero()


def test_a_gif_holds_grey_frames_exactly_and_their_times():
    made, file = frames(4, 1), io.BytesIO()
    save_gif(file, made, [50, 80, 20, 1500])
    found = read(file)
    assert len(found) == 4
    for a, b in zip(found, made, strict=True):
        np.testing.assert_array_equal(a, b.repeat(3, -1))
    with Image.open(io.BytesIO(file.getvalue())) as picture:
        times = []
        for i in range(4):
            picture.seek(i)
            times.append(picture.info["duration"])
        assert times == [50, 80, 20, 1500] and picture.info["loop"] == 0


def test_a_gif_of_few_colours_holds_them_exactly():
    made = [np.random.default_rng(i).choice([0, 60, 255], (9, 13, 3)).astype(np.uint8) for i in range(3)]
    file = io.BytesIO()
    save_gif(file, made, [100] * 3)
    for a, b in zip(read(file), made, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="pip install 'genzoo[video]'")
def test_an_mp4_lasts_as_long_and_shows_the_same():
    import av

    made = [np.full((9, 13, 1), shade, np.uint8) for shade in (0, 128, 255)]
    file = io.BytesIO()
    save_mp4(file, made, [100, 200, 1000])
    with av.open(io.BytesIO(file.getvalue())) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(found) == 39  # 1.3 seconds at 30 frames a second
    assert found[0].shape == (10, 14, 3)  # even sides
    for i, shade in ((0, 0), (5, 128), (38, 255)):
        assert abs(float(found[i][:8, :12].mean()) - shade) < 8


def test_an_mp4_without_pyav_names_what_installs_it(monkeypatch):
    check_animation(".gif")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (lambda: check_animation(".mp4"), lambda: save_mp4(io.BytesIO(), frames(2, 1), [10, 10])):
        with pytest.raises(DataError, match=r"pip install 'genzoo\[video\]'"):
            call()


@pytest.mark.parametrize("n", [2, 9, 51, 400])
def test_orders_and_times(n):
    order, times = forward(n)
    assert order == list(range(n)) and times[-1] == 1500 and min(times) >= 20 and all(t % 10 == 0 for t in times)
    order, times = there_and_back(n)
    assert order == [*range(n), *range(1, n - 1)[::-1]] and len(order) == 2 * n - 2
    assert [t for i, t in zip(order, times, strict=True) if i in (0, n - 1)] == [500, 500]


def test_moving_points_show_the_density_and_end_on_the_data():
    density = Moons()
    data = density.sample(2000, torch.Generator().manual_seed(0))
    noise = 3 * torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    made = moving_points(torch.stack([noise, data[:200]]), data, density, ["t = 1", "t = 0"])
    assert len(made) == 2 and made[0].shape == made[1].shape == (400, 400, 3)
    orange = [len(near(frame, ORANGE)[0]) for frame in made]
    assert 200 < orange[0] < orange[1]  # the view narrows to the data
    plain = moving_points(data[None, :1] + 100, data)  # a single point out of sight of the data, without a density
    assert len(near(plain[0], ORANGE)[0]) == 0


def test_points_are_drawn_where_they_are():
    data = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    low, high = limits(data)
    for x, y in ((-0.5, 0.5), (0.8, -0.2)):
        frame = moving_points(torch.tensor([[[x, y]]]), data)[0]
        inside = frame[40:344, 70:370].astype(int)  # of the axes, a square of 320 pixels from (58, 32)
        rows, columns = ((inside[..., 0] < 150) & (inside[..., 2] > inside[..., 0] + 20)).nonzero()
        side = float(high[0] - low[0])
        u, v = (70 + columns.mean() - 58) / 320, 1 - (40 + rows.mean() - 32) / 320
        assert abs(float(low[0]) + u * side - x) < 0.03 and abs(float(low[1]) + v * side - y) < 0.03


@pytest.mark.parametrize("D", [1, 2, 3, 7])
def test_plots_of_any_dimension_are_pictures_of_what_they_are_given(D):
    data = torch.randn(300, D)
    curves = torch.randn(4, 5, D)
    pictures = []
    for shift in (0.0, 1.0):
        for save in (
            lambda file, x: save_curves(file, x, data),
            lambda file, x: save_point_panels(file, x, data, titles=list("abcd")),
            lambda file, x: save_pairs(file, x[0], data[:5]),
        ):
            file = io.BytesIO()
            save(file, curves + shift)
            with Image.open(file) as picture:
                assert picture.format == "PNG" and min(picture.size) > 100
                pictures.append(np.asarray(picture).tobytes())
        pictures += [frame.tobytes() for frame in moving_points(curves + shift, data)]
    assert len(set(pictures)) == len(pictures)
