"""The page of ``serve``: the samples of the command ``sample``, by the same seed and class, in a browser and without one."""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genzoo.errors import UsageError
from genzoo.runs import Run
from genzoo.serving.shelf import SAMPLERS, Settings, Shelf
from tests.commands import SMALL, genzoo, untrained

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {
        "ddpm": [*SMALL["ddpm"], "data.conditional=true", "sampler=ddim", "sampler.steps=4"],
        "vae": SMALL["vae"],
        "autoregressive": ["model=autoregressive", "model.network.width=8", "model.network.layers=2"],
        "classifier": ["model=noisy_classifier", "data=digits", "model.network.channels=8"],
        "moons": ["model=realnvp", "data=moons", "model.couplings=2"],
    }
    found = {name: untrained(root, *words)[0] for name, words in made.items()}
    for name, path in found.items():
        Run(path).update_status(model=name)
    Run(found["ddpm"]).update_status(classes=[HOSTILE, *"123456789"])
    return found


@pytest.fixture
def shelf(runs) -> Shelf:
    return Shelf(list(runs.values()), "cpu")


def command(run: Path, here: Path, *words: str) -> np.ndarray:
    code, _, err = genzoo("sample", f"run={run}", f"out={here / 'grid.png'}", *words)
    assert code == 0, err
    return np.asarray(Image.open(here / "grid.png"))


def test_a_page_shows_the_generative_models_and_their_classes(shelf, runs):
    assert shelf.names == ["ddpm on digits", "vae on digits", "autoregressive on digits", "moons on moons"]
    assert shelf.all_classes == [HOSTILE, *"123456789"]
    with pytest.raises(UsageError, match="none of them has samples"):
        Shelf([runs["classifier"]], "cpu")


@pytest.mark.parametrize("name", ["ddpm", "vae", "autoregressive"])
def test_pictures_are_those_of_the_command(shelf, runs, tmp_path, name):
    index = shelf.runs.index(runs[name])
    drawn = shelf.draw(index, Settings(seed=5, n=6))
    np.testing.assert_array_equal(drawn.picture[..., 0], command(runs[name], tmp_path, "n=6", "seed=5"))
    assert re.fullmatch(r"\d+\.\d{3} s and \d+ evaluations an image", drawn.text)


def test_settings_are_those_of_the_command_and_end_with_the_picture(shelf, runs, tmp_path):
    before = shelf.draw(0, Settings(n=4)).picture
    settings = Settings(seed=1, n=4, label="3", sampler="heun", steps=3, guidance=2.5)
    words = ["n=4", "seed=1", "label=3", "sampler=heun", "sampler.steps=3", "guidance=2.5"]
    np.testing.assert_array_equal(shelf.draw(0, settings).picture[..., 0], command(runs["ddpm"], tmp_path, *words))
    assert "10 evaluations" in shelf.draw(0, settings).text
    np.testing.assert_array_equal(shelf.draw(0, Settings(n=4)).picture, before)
    for sampler in SAMPLERS:
        assert shelf.draw(0, Settings(n=2, sampler=sampler, steps=3)).picture is not None, sampler


def test_what_a_model_lacks_is_said_beside_the_pictures_of_the_others(shelf):
    found = [shelf.draw(index, Settings(n=2, label="3")) for index in range(4)]
    assert [drawn.picture is None for drawn in found] == [False, True, True, True]
    assert found[1].text == "this model has no classes"
    assert "takes no guidance" in shelf.draw(1, Settings(n=2, guidance=2.0)).text
    assert shelf.draw(1, Settings(n=2, sampler="heun")).picture is not None  # of other models
    assert shelf.draw(3, Settings(n=2)).picture.shape[-1] == 3  # points, as a plot


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"n": 1000}, {"seed": -1}, {"steps": 10**6}, {"sampler": "genzoo.loading.load"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        Settings(**wrong)


def test_a_mask_is_filled_by_every_model_that_can(shelf):
    unknown = np.zeros((8, 8), dtype=bool)
    unknown[5:] = True
    image = shelf.image(3)
    for index, can in enumerate([True, True, True, False]):
        drawn = shelf.fill(index, 3, unknown, 4, seed=0)
        assert (drawn.picture is not None) == can, drawn.text
        if can:  # the known pixels of each of four fillings, 8x8 enlarged to 56 with gaps of 2
            tiles = [drawn.picture[2 + 58 * i : 58 + 58 * i : 7, 2 + 58 * j : 58 + 58 * j : 7, :1]
                     for i in range(2) for j in range(2)]  # fmt: skip
            assert all(np.array_equal(tile[:5], image[:5]) for tile in tiles)
            assert any(not np.array_equal(tile, image) for tile in tiles)
    hole = np.zeros((8, 8), dtype=bool)
    hole[2:4, 2:4] = True
    assert "raster order" in shelf.fill(2, 3, hole, 4, seed=0).text
    with pytest.raises(UsageError, match="test images"):
        shelf.image(10**6)


def test_a_drawing_becomes_the_pixels_that_it_covers_by_half():
    page = pytest.importorskip("genzoo.serving.page")
    layer = np.zeros((64, 64, 4), dtype=np.uint8)
    layer[40:64, :, 3] = 255
    layer[37:40, :, 3] = 255  # 3 of 8 rows of the fifth row of pixels
    mask = page.mask_of({"layers": [layer]}, (8, 8))
    assert mask.shape == (8, 8) and mask[5:].all() and not mask[:5].any()
    for wrong in (None, {"layers": []}, {"layers": [layer * 0]}, {"layers": [layer * 0 + 255]}):
        with pytest.raises(UsageError):
            page.mask_of(wrong, (8, 8))


# In a browser


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def address(runs) -> Iterator[str]:
    pytest.importorskip("gradio")
    port = free_port()
    listed = ",".join(map(str, runs.values()))
    command = [sys.executable, "-m", "genzoo", "serve", f"runs={listed}", f"port={port}", "device=cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as child:
        try:
            assert select.select([child.stdout], [], [], 300)[0], "the page is not served after five minutes"
            line = child.stdout.readline()
            assert line == f"serving 4 runs at http://127.0.0.1:{port}/ (Ctrl+C ends)\n", child.stderr.read()
            yield f"http://127.0.0.1:{port}"
        finally:
            child.terminate()


def test_only_this_machine_reaches_the_page(address):
    port = int(address.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {"127.0.0.1"}
    for other in others:
        with pytest.raises(OSError):
            socket.create_connection((other, port), timeout=2).close()
    code, _, err = genzoo("serve", "runs=.", f"port={port}")
    assert code == 2 and err.count("\n") == 1


def test_the_page_draws_offline_and_shows_text_as_text(address, runs, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        elsewhere: list[str] = []
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(address)
        page.wait_for_selector("#draw", timeout=180_000)
        page.click("#class input")
        page.get_by_text(HOSTILE).first.wait_for(timeout=60_000)  # as an option, in full
        page.get_by_role("option", name="3", exact=True).click()
        page.fill("#n input[type=number]", "4")
        page.click("#draw")
        page.get_by_label("ddpm on digits").wait_for()
        page.wait_for_function(
            "document.querySelectorAll('textarea')[0].value.includes('evaluations')", timeout=180_000
        )
        page.wait_for_function("document.querySelectorAll('textarea')[1].value.includes('no classes')", timeout=180_000)
        source = page.locator("img").first.get_attribute("src")
        picture = page.request.get(source).body()
        assert page.title() == "genzoo" and page.locator("img[src=x]").count() == 0
        own = [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))]
        browser.close()
    assert own == [], "the page loads from elsewhere"
    (tmp_path / "shown.png").write_bytes(picture)
    shown = np.asarray(Image.open(tmp_path / "shown.png").convert("L"))
    expected = Shelf([runs["ddpm"]], "cpu").draw(0, Settings(n=4, label="3")).picture
    np.testing.assert_array_equal(shown, expected[..., 0])
