"""The page, built with Gradio: controls on the left, one picture a run on the right.

All text of runs enters through components that show plain text; nothing of a run is interpreted as markup. Fonts are those of
the system, so that the page works offline.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from genzoo.serving.shelf import ANY, MOST, MOST_STEPS, OWN, SAMPLERS, Settings, Shelf

FONTS = ["system-ui", "sans-serif"]


def page(shelf: Shelf) -> gr.Blocks:
    """Build the page of some models."""
    with gr.Blocks(title="genzoo", analytics_enabled=False) as blocks:
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                controls = _controls(shelf)
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=3):
                shown = _pictures(shelf)

        def draw(seed: float, n: float, label: str, sampler: str, steps: float, guidance: float) -> Any:
            settings = Settings(int(seed or 0), int(n), str(label), str(sampler), int(steps), float(guidance))
            found: list[Any] = [gr.skip()] * (2 * len(shelf.runs))
            for index in range(len(shelf.runs)):  # each picture appears as soon as it is there
                drawn = shelf.draw(index, settings)
                found[2 * index : 2 * index + 2] = [drawn.picture, drawn.text]
                yield list(found)

        button.click(draw, controls, shown, concurrency_limit=1, api_visibility="private")
    return blocks


def _controls(shelf: Shelf) -> list[Any]:
    """Lay out the controls, in the order of the fields of ``Settings``."""
    return [
        gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed"),
        gr.Slider(1, MOST, 16, step=1, label="Samples of each model", elem_id="n"),
        gr.Dropdown([ANY, *shelf.all_classes], value=ANY, label="Class", elem_id="class"),
        gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler of diffusion and flow models", elem_id="sampler"),
        gr.Slider(0, min(200, MOST_STEPS), 0, step=1, label="Steps, 0 as in training", elem_id="steps"),
        gr.Slider(0, 10, 1, step=0.1, label="Guidance u + s (c - u), 1 for none", elem_id="guidance"),
    ]


def _pictures(shelf: Shelf) -> list[Any]:
    """Lay out a picture and a line of text for each run, in pairs."""
    shown: list[Any] = []
    for start in range(0, len(shelf.runs), 3):
        with gr.Row():
            for name in shelf.names[start : start + 3]:
                with gr.Column(min_width=240):
                    shown.append(gr.Image(label=name, show_label=True, format="png", interactive=False))
                    shown.append(gr.Textbox(show_label=False, container=False, interactive=False, lines=1))
    return shown
