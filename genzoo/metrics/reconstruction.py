"""Reconstruction metrics of codecs, on bytes: MSE, PSNR and SSIM.

References:
    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004,
    https://doi.org/10.1109/TIP.2003.819861 (SSIM: Gaussian window of 11 pixels, sigma 1.5; computed by torchmetrics,
    with reflection padding and the mean over all positions, where the paper excludes the border).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from genzoo.metrics.likelihood import Score, mean_and_stderr

WINDOW = 11  # pixels of SSIM's window


def reconstruction_error(x: Tensor, x_hat: Tensor) -> dict[str, Score]:
    """Compute reconstruction errors.

    Args:
        x, x_hat: images and their reconstructions, (N, C, H, W) uint8.

    Returns:
        Means over images of ``mse`` on [0, 1]; of ``psnr`` in dB, unless a reconstruction is exact; and of ``ssim``, unless
        images are smaller than its window.
    """
    a, b = x.double() / 255, x_hat.double() / 255
    mse = (a - b).square().flatten(1).mean(1)
    scores = {"mse": mean_and_stderr(mse)}
    if mse.min() > 0:
        scores["psnr"] = mean_and_stderr(-10 * mse.log10())
    if min(x.shape[-2:]) >= WINDOW:
        parts: list[Any] = [
            structural_similarity_index_measure(p, q, data_range=1.0, reduction="none")
            for p, q in zip(b.split(500), a.split(500), strict=True)
        ]
        scores["ssim"] = mean_and_stderr(torch.cat([part.reshape(-1) for part in parts]))
    return scores
