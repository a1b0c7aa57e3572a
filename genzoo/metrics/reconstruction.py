"""How well a codec gives an image back: as bytes, the way they would be stored.

References:
    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004,
    https://doi.org/10.1109/TIP.2003.819861 (SSIM: Gaussian window of 11 pixels, sigma 1.5; computed by torchmetrics,
    which mirrors images beyond their border and takes the mean over all places, where the paper leaves the border out).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from genzoo.metrics.likelihood import Score, mean_with_error

WINDOW = 11  # pixels of SSIM's window


def reconstruction_error(x: Tensor, given: Tensor) -> dict[str, Score]:
    """Compare images with what a codec gave back.

    Args:
        x, given: bytes, (N, C, H, W) uint8.

    Returns:
        Means over the images of ``mse`` on [0, 1]; of ``psnr`` in dB, where every image lost something; and of ``ssim``, where
        its window fits.
    """
    a, b = x.double() / 255, given.double() / 255
    mse = (a - b).square().flatten(1).mean(1)
    scores = {"mse": mean_with_error(mse)}
    if mse.min() > 0:
        scores["psnr"] = mean_with_error(-10 * mse.log10())
    if min(x.shape[-2:]) >= WINDOW:
        parts: list[Any] = [
            structural_similarity_index_measure(p, q, data_range=1.0, reduction="none")
            for p, q in zip(b.split(500), a.split(500), strict=True)
        ]
        scores["ssim"] = mean_with_error(torch.cat([part.reshape(-1) for part in parts]))
    return scores
