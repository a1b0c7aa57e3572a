"""``python -m genzoo decompress FILE``: the images of a file written by ``compress``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.cli.output import check_format, check_out, write_samples
from genzoo.cli.trained import open_model
from genzoo.errors import UsageError
from genzoo.jobs.resources import resources
from genzoo.runs import ResourceError, read_file

if TYPE_CHECKING:
    from genzoo.compression import Container
    from genzoo.model import Compressible

MOST_BYTES = 2**32  # of a file


def decompress(config: dict[str, Any]) -> None:
    """Write the images of a compressed file as an .npz, with the classes of a conditional model, a grid, or a folder of PNGs.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    from genzoo import compression

    path, out = Path(config["file"]), Path(config["out"])
    if not path.is_file():
        raise UsageError(f"file={path}: no such file")
    check_out(out)
    data = read_file(path, MOST_BYTES)
    file = compression.Container.from_bytes(data, str(path))
    with resources(out, file.batch_size, "batch_size of compress"):
        model = _find_model(config, file) if config["run"] is None else compression.check(open_model(config))
        check_format(out, model.event)
        found = compression.decompress(model, data, str(path))
        write_samples(out, found.x, model.levels, found.y)
    print(f"{len(found.x)} images of {path}: {out}")


def _find_model(config: dict[str, Any], file: Container) -> Compressible:
    """Find the run by whose model a file was compressed, the newest first.

    Raises:
        UsageError: if there is none.
    """
    from genzoo import compression
    from genzoo.report.records import find

    folders = [Path(folder) for folder in config["runs"] if Path(folder).is_dir()]
    runs = sorted(find(folders), key=lambda run: run.stat().st_mtime, reverse=True) if folders else []
    for run in runs:
        try:
            model = compression.check(open_model({**config, "run": str(run)}))
        except (ValueError, ResourceError):  # another family, or a run without weights
            continue
        if compression.fits(model, file):
            return model
    raise UsageError(
        f"file={config['file']}: no run in {', '.join(config['runs'])} has the model that compressed it: set run=DIR"
    )
