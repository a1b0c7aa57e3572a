"""Animations: GIF by Pillow, and MP4 (H.264) by PyAV, an optional dependency."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from genzoo.data.dataset import DataError

FPS = 30  # of an MP4
SUFFIXES = (".gif", ".mp4")


def check_animation(suffix: str) -> None:
    """Check that an animation can be written.

    Args:
        suffix: of the file, ".gif" or ".mp4".

    Raises:
        DataError: for an MP4 without PyAV, naming the command that installs it.
    """
    if suffix == ".mp4" and importlib.util.find_spec("av") is None:
        raise DataError("an .mp4 needs PyAV: pip install 'genzoo[video]', or write a .gif")


def save_gif(file: BinaryIO, frames: Sequence[np.ndarray], milliseconds: Sequence[int]) -> None:
    """Write an endless GIF; grey frames are exact, colours are reduced to 256 per frame.

    Args:
        file: opened for writing.
        frames: (H, W, C) uint8 each, C = 1 or 3.
        milliseconds: of each frame; players round them to hundredths of a second.
    """
    from PIL import Image

    pictures = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    pictures = [p if p.mode == "L" else p.quantize(256, dither=Image.Dither.NONE) for p in pictures]
    pictures[0].save(
        file, "GIF", save_all=True, append_images=pictures[1:], duration=list(milliseconds), loop=0, optimize=False
    )


def save_mp4(file: BinaryIO, frames: Sequence[np.ndarray], milliseconds: Sequence[int]) -> None:
    """Write an MP4 of the same frames at ``FPS`` frames per second, padded with white to even sides.

    Args:
        file, frames, milliseconds: as in ``save_gif``; a frame is repeated to fill its time.

    Raises:
        DataError: without PyAV.
    """
    check_animation(".mp4")
    import av

    height, width = (side + side % 2 for side in frames[0].shape[:2])
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        shown, elapsed = 0, 0
        for frame, duration in zip(frames, milliseconds, strict=True):
            canvas = np.full((height, width, 3), 255, dtype=np.uint8)
            canvas[: frame.shape[0], : frame.shape[1]] = frame
            elapsed += duration
            until = max(shown + 1, math.floor(elapsed * FPS / 1000 + 0.5))
            for _ in range(until - shown):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(canvas, format="rgb24")))
            shown = until
        container.mux(stream.encode())


def forward(frames: int, seconds: float = 4.0, hold: int = 1500) -> tuple[list[int], list[int]]:
    """Return the order of frames of a path, and their milliseconds: about ``seconds`` in all, and a hold at the end."""
    each = max(20, 10 * round(100 * seconds / frames))
    return list(range(frames)), [*[each] * (frames - 1), hold]


def there_and_back(frames: int, seconds: float = 2.5, hold: int = 500) -> tuple[list[int], list[int]]:
    """Return the order of frames of a loop, and their milliseconds, with a hold at both ends."""
    order = [*range(frames), *range(frames - 2, 0, -1)]
    each = max(20, 10 * round(100 * seconds / frames))
    return order, [hold if i in (0, frames - 1) else each for i in order]
