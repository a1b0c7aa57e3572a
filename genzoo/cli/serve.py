"""``python -m genzoo serve runs=DIR[,DIR...]``: a local web page to sample from trained runs side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from genzoo.environment import usable_cores
from genzoo.errors import UsageError

LOCAL = "127.0.0.1"  # never reachable from other machines
MOST_RUNS = 24


def serve(config: dict[str, Any]) -> None:
    """Serve the page by a validated configuration, until interrupted.

    Raises:
        ValueError: with a one-line message, for invalid runs, a missing extra, or a port that is in use.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import
    try:
        import gradio as gr
    except ImportError as error:
        raise UsageError("serve needs Gradio: pip install 'genzoo[serve]'") from error
    import torch

    from genzoo.report.records import find
    from genzoo.serving.page import FONTS, page
    from genzoo.serving.shelf import Shelf

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    runs = find(Path(folder) for folder in config["runs"])
    if len(runs) > MOST_RUNS:
        raise UsageError(f"runs: {len(runs)} runs; a page shows at most {MOST_RUNS}")
    shelf = Shelf(runs, config["device"], config["trust"])
    blocks = page(shelf)
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    try:
        _, address, _ = blocks.launch(
            server_name=LOCAL,
            server_port=config["port"],
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            ssr_mode=False,
            enable_monitoring=False,
            theme=theme,
            footer_links=[],
        )
    except OSError as error:
        raise UsageError(f"port={config['port']}: cannot be used: {' '.join(str(error).split())}") from error
    print(f"serving {len(shelf.runs)} runs at {address} (Ctrl+C ends)", flush=True)
    blocks.block_thread()
