"""``python -m genzoo compress``: images into a file, without loss, by a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genzoo.cli.examples import open_examples
from genzoo.cli.output import check_out
from genzoo.cli.trained import on_run, open_model
from genzoo.runs import write_atomically


@on_run
def compress(config: dict[str, Any]) -> None:
    """Write the compressed examples, in their order, and print the size of the file in bits/dim.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    from genzoo import compression

    out = Path(config["out"])
    check_out(out, (compression.SUFFIX,))
    model = open_model(config)
    compressible = compression.check(model)
    found = open_examples(config, model, config["n"])
    made = compression.compress(compressible, found.x, found.y, batch_size=config["batch_size"])
    write_atomically(out, made.data)
    of_labels = f", classes included ({made.label_bits / 8:.0f} bytes)" if found.y is not None else ""
    print(f"{made.n} images in {len(made.data)} bytes, {made.bits_per_dim:.4f} bits/dim{of_labels}: {out}")
