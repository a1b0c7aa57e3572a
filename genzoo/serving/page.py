"""The page, built with Gradio: controls on the left, one picture a run on the right.

All text of runs enters through components that show plain text; nothing of a run is interpreted as markup. Fonts are those of
the system, so that the page works offline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from genzoo.errors import UsageError
from genzoo.serving.shelf import ANY, MOST, OWN, SAMPLERS, Drawn, Settings, Shelf

FONTS = ["system-ui", "sans-serif"]
CANVAS = 448  # side of the image to draw on, in pixels
FILLINGS = 9  # of each model
STEPS, SCALE = 200, 10.0  # ends of the sliders
PICTURES = 3  # in a row


def page(shelf: Shelf) -> gr.Blocks:
    """Build the page of some models."""
    with gr.Blocks(title="genzoo", analytics_enabled=False) as blocks:
        with gr.Tab("Sample"):
            _sampling(shelf)
        if shelf.pictures is not None:
            with gr.Tab("Fill"):
                _filling(shelf)
    return blocks


def _sampling(shelf: Shelf) -> None:
    """Lay out the tab that draws samples of all models by one seed and class."""
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            controls = [  # in the order of the fields of ``Settings``
                gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed"),
                gr.Slider(1, MOST, 16, step=1, label="Samples of each model", elem_id="n"),
                gr.Dropdown([ANY, *shelf.all_classes], value=ANY, label="Class", elem_id="class"),
                gr.Dropdown(
                    [OWN, *SAMPLERS], value=OWN, label="Sampler of diffusion and flow models", elem_id="sampler"
                ),
                gr.Slider(0, STEPS, 0, step=1, label="Steps, 0 as in training", elem_id="steps"),
                gr.Slider(0, SCALE, 1, step=0.1, label="Guidance u + s (c - u), s = 1 for none", elem_id="guidance"),
                gr.Textbox("", label="Text of models of captions", visible=shelf.has_captions, elem_id="text"),
            ]
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=3):
            pictures = _pictures(shelf)

    def draw(
        seed: float, n: float, label: str, sampler: str, steps: float, guidance: float, text: str
    ) -> Iterator[list[Any]]:
        settings = _checked(
            lambda: Settings(int(seed or 0), int(n), str(label), str(sampler), int(steps), float(guidance), str(text))
        )
        yield from _one_by_one(shelf, lambda index: shelf.draw(index, settings))

    button.click(draw, controls, pictures, concurrency_limit=1, api_visibility="private")


def _filling(shelf: Shelf) -> None:
    """Lay out the tab that fills a drawn mask of a test image by every model that can."""
    data = shelf.pictures
    assert data is not None
    with gr.Row():
        with gr.Column(scale=1, min_width=CANVAS):
            number = gr.Slider(0, len(data.test.x) - 1, 0, step=1, label="Test image", elem_id="number")
            editor = gr.ImageEditor(
                _canvas(shelf, 0),
                label="Draw over the pixels to fill",
                image_mode="RGBA",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=CANVAS // 8, colors=["#d9541e"], color_mode="fixed"),
                canvas_size=(CANVAS, CANVAS),
                fixed_canvas=True,
                buttons=[],
                elem_id="mask",
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            button = gr.Button("Fill", variant="primary", elem_id="fill")
        with gr.Column(scale=2):
            pictures = _pictures(shelf)

    def fill(image_number: float, drawn: dict[str, Any] | None, seed_: float) -> Iterator[list[Any]]:
        unknown = _checked(lambda: mask_of(drawn, data.shape[1:]))
        chosen, noise = int(image_number), int(seed_ or 0)
        yield from _one_by_one(shelf, lambda index: shelf.fill(index, chosen, unknown, FILLINGS, noise))

    number.release(lambda image_number: _canvas(shelf, int(image_number)), number, editor, api_visibility="private")
    button.click(fill, [number, editor, seed], pictures, concurrency_limit=1, api_visibility="private")


def _pictures(shelf: Shelf) -> list[Any]:
    """Lay out a picture and a line of text for each run, in pairs."""
    shown: list[Any] = []
    for start in range(0, len(shelf.runs), PICTURES):
        with gr.Row():
            for name in shelf.names[start : start + PICTURES]:
                with gr.Column(min_width=240):
                    shown.append(
                        gr.Image(show_label=False, format="png", interactive=False, buttons=["download", "fullscreen"])
                    )
                    shown.append(gr.Textbox(label=name, interactive=False, lines=1))
    return shown


def _one_by_one(shelf: Shelf, work: Callable[[int], Drawn]) -> Iterator[list[Any]]:
    """Yield the pictures and texts of all runs; each appears as soon as it is there."""
    found: list[Any] = [gr.skip()] * (2 * len(shelf.runs))
    for index in range(len(shelf.runs)):
        drawn = work(index)
        found[2 * index : 2 * index + 2] = [drawn.picture, drawn.text]
        yield list(found)


def _checked(make: Callable[[], Any]) -> Any:
    """Show a usage error on the page."""
    try:
        return make()
    except UsageError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _canvas(shelf: Shelf, number: int) -> np.ndarray:
    """Return a test image, enlarged without smoothing to the side of the canvas, (H, W, 4) uint8."""
    image = shelf.image(number)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGBA")
    scale = CANVAS / max(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST))


def mask_of(drawn: dict[str, Any] | None, sides: tuple[int, ...]) -> np.ndarray:
    """Return the pixels that a drawing covers at least by a half, (H, W) bool.

    Args:
        drawn: value of the editor, with its layers, (H', W', 4) uint8.
        sides: (H, W) of the image.

    Raises:
        UsageError: for an empty drawing, and one that covers the whole image.
    """
    layers = [layer for layer in (drawn or {}).get("layers", []) if layer is not None]
    if not layers:
        raise UsageError("draw over the pixels to fill first")
    opaque = np.max([layer[..., 3] for layer in layers], axis=0)
    height, width = sides
    covered = np.asarray(Image.fromarray(opaque).resize((width, height), Image.Resampling.BOX)) >= 128
    if not covered.any():
        raise UsageError("draw over the pixels to fill first: less than half of each pixel is covered")
    if covered.all():
        raise UsageError("the drawing covers the whole image: leave some pixels to continue from")
    return covered
