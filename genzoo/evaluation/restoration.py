"""Scores of posterior draws against the truth: error of the mean and of one draw, and coverage of central intervals."""

from __future__ import annotations

from torch import Tensor

from genzoo.distributions.discretization import quantize, to_bytes
from genzoo.evaluation.calibration import LEVELS, central_coverage
from genzoo.metrics.likelihood import Score, mean_and_stderr
from genzoo.metrics.reconstruction import reconstruction_error


def restoration_scores(truth: Tensor, draws: Tensor, levels: int | None, unknown: Tensor | None) -> dict[str, Score]:
    """Score draws of the posterior.

    Args:
        truth: levels of images, int (B, C, H, W), or vectors, (B, D).
        draws: (B, n, *shape), images on [-1, 1].
        levels: of images; None for vectors.
        unknown: coordinates that count in the coverage, bool (*shape); None for all.

    Returns:
        Means over events, with standard errors: ``coverage_50``, ``coverage_80`` and ``coverage_90``, the fraction of
        coordinates inside central intervals, on integer levels for images, where truth and draws are not all equal, such as
        in a constant background: a condition symmetric in truth and draws, which leaves the nominal levels. Of images
        ``psnr_mean`` and ``ssim_mean``, of the mean of all draws, and ``psnr_draw`` and ``ssim_draw``, of the first draw, on
        bytes with peak 255, SSIM where its window fits; of vectors ``rmse_mean`` and ``rmse_draw``.
    """
    numbers = draws if levels is None else quantize(draws, levels)
    covered = central_coverage(truth, numbers.transpose(0, 1)).flatten(2)
    counts = (numbers != truth[:, None]).any(1)
    counts = (counts if unknown is None else counts & unknown).flatten(1).double()
    some = counts.sum(1) > 0
    scores = {}
    for p, inside in zip(LEVELS, covered, strict=True):
        if bool(some.any()):
            of_each = (inside * counts).sum(1)[some] / counts.sum(1)[some]
            scores[f"coverage_{round(100 * p)}"] = mean_and_stderr(of_each)
    for name, x in (("mean", draws.mean(1)), ("draw", draws[:, 0])):
        if levels is None:
            scores[f"rmse_{name}"] = mean_and_stderr((x - truth).square().flatten(1).mean(1).sqrt())
            continue
        shown = to_bytes((truth.double() + 0.5) * (2 / levels) - 1, levels)
        errors = reconstruction_error(shown, to_bytes(x, levels))
        scores |= {f"{metric}_{name}": errors[metric] for metric in ("psnr", "ssim") if metric in errors}
    return scores
