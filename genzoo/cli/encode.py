"""``python -m genzoo encode``: latents of examples into an .npz."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from genzoo.cli.examples import open_examples
from genzoo.cli.output import check_out
from genzoo.cli.trained import on_run, open_model, require_encoder
from genzoo.runs import write_atomically


@on_run
def encode(config: dict[str, Any]) -> None:
    """Write ``z``, ``y`` if the examples have conditions, and the ``meaning`` of z, in the order of the examples.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    import numpy as np

    from genzoo import explore, latents

    out = Path(config["out"])
    check_out(out, (".npz",))
    model = open_model(config)
    require_encoder(model)
    found = open_examples(config, model, config["n"])
    z = explore.encode(model, found.x, found.y, batch_size=config["batch_size"]).numpy()
    labels: dict[str, Any] = {} if found.labels is None else {"y": found.labels.numpy()}
    file = io.BytesIO()
    np.savez(file, z=z, meaning=np.array(latents.meaning(model)), **labels)
    write_atomically(out, file.getvalue())
    print(f"{len(z)} latents of shape {list(z.shape[1:])}, {latents.meaning(model)}: {out}")
