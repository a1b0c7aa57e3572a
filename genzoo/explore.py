"""Python interface to latents, sampling paths and compression, equivalent to the commands of the same names.

    import genzoo
    z = genzoo.encode(run, x)                                       # x: images on [-1, 1], or vectors
    x_hat = genzoo.decode(run, z)
    frames = genzoo.interpolate(run, z[:4], z[4:8], steps=9)        # (9, 4, *shape)
    path = genzoo.trajectory(run, 16, frames=10)                    # path.x: (10, 16, *shape)
    file = genzoo.compress(run, x).data                             # bytes; genzoo.decompress(run, file).x has the levels of x

Every function takes a run directory or a model, computes in batches, which do not change the result, and returns tensors on the
CPU. ``genzoo.latents``, ``genzoo.diffusion.trajectory`` and ``genzoo.compression`` define the operations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genzoo import compression, latents
from genzoo.compression import Compressed, Decompressed
from genzoo.diffusion.trajectory import SamplingPath
from genzoo.diffusion.trajectory import trajectory as record_path
from genzoo.errors import UsageError
from genzoo.latents import attribute_direction as attribute_direction
from genzoo.loading import load
from genzoo.model import Discrete, GenerativeModel
from genzoo.numerics.precision import full_float32
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run

Source = Run | str | os.PathLike[str] | GenerativeModel


def encode(
    run: Source, x: Any, y: Any = None, *, batch_size: int = 64, ema: bool = True, device: str = "auto"
) -> Tensor:
    """Encode events.

    Args:
        run: a run directory, or a model: a codec, a flow or a denoiser.
        x: images on [-1, 1], (N, C, H, W), or vectors, (N, D); a tensor or an array of floats.
        y: conditions, (N, *condition.shape), of a conditional model.
        batch_size: events encoded at once.
        ema: whether to use the EMA weights; runs only.
        device: "cpu", "cuda" or "auto"; runs only.

    Returns:
        (N, *latent.shape): float, or int64 codes.

    Raises:
        ValueError: with a one-line message, for a family without an encoder and for invalid arguments.
    """
    model = _model(run, ema, device)
    latents.check_encoder(model)
    x = _events(model, x)
    return _in_batches(model, batch_size, lambda x, y: latents.encode(model, x, y), x, _conditions(y))


def decode(
    run: Source, z: Any, y: Any = None, *, batch_size: int = 64, ema: bool = True, device: str = "auto"
) -> Tensor:
    """Decode latents, (N, *latent.shape) -> (N, *shape); arguments and errors are those of ``encode``."""
    model = _model(run, ema, device)
    z = _latents(model, z)
    return _in_batches(model, batch_size, lambda z, y: latents.decode(model, z, y), z, _conditions(y))


def reconstruct(
    run: Source, x: Any, y: Any = None, *, batch_size: int = 64, ema: bool = True, device: str = "auto"
) -> Tensor:
    """Encode and decode events, (N, *shape) -> (N, *shape); arguments and errors are those of ``encode``."""
    model = _model(run, ema, device)
    latents.check_encoder(model)
    x = _events(model, x)

    def work(x: Tensor, y: Tensor | None) -> Tensor:
        return latents.decode(model, latents.encode(model, x, y), y)

    return _in_batches(model, batch_size, work, x, _conditions(y))


def interpolate(
    run: Source,
    start: Any,
    end: Any,
    steps: int = 9,
    y: Any = None,
    *,
    batch_size: int = 64,
    ema: bool = True,
    device: str = "auto",
) -> Tensor:
    """Decode points between pairs of latents: on great circles under a normal prior, on lines under a learned one.

    Args:
        run: as in ``encode``, or a GAN.
        start, end: latents, (N, *latent.shape).
        steps: number of points, both ends included.
        y: conditions, (N, *condition.shape), of a conditional model.
        batch_size, ema, device: as in ``encode``.

    Returns:
        (steps, N, *shape).

    Raises:
        ValueError: with a one-line message, for codes, a family without latents, and invalid arguments.
    """
    model = _model(run, ema, device)
    latents.check_continuous(model, "interpolation")
    if steps < 2:
        raise UsageError(f"steps={steps}: must be at least 2")
    a, b = _latents(model, start), _latents(model, end)
    if len(a) != len(b):
        raise UsageError(f"start, end: {len(a)} and {len(b)} latents")
    return _decode_points(model, latents.interpolation(model, a, b, steps), y, batch_size)


def traverse(
    run: Source,
    z: Any,
    dimensions: Sequence[int],
    values: Any,
    y: Any = None,
    *,
    batch_size: int = 64,
    ema: bool = True,
    device: str = "auto",
) -> Tensor:
    """Decode latents in which one dimension at a time takes each of some values.

    Args:
        run: as in ``interpolate``.
        z: latents, (N, *latent.shape).
        dimensions: indices of latents, in row-major order.
        values: numbers, (steps,).
        y: conditions, (N, *condition.shape), of a conditional model.
        batch_size, ema, device: as in ``encode``.

    Returns:
        (len(dimensions), steps, N, *shape).

    Raises:
        ValueError: with a one-line message, for codes, a family without latents, and invalid arguments.
    """
    model = _model(run, ema, device)
    latents.check_continuous(model, "traversal")
    z, values = _latents(model, z), torch.as_tensor(values)
    dims = z.flatten(1).shape[1]
    if not len(dimensions) or not all(0 <= dimension < dims for dimension in dimensions):
        raise UsageError(f"dimensions={list(dimensions)}: the latents have the dimensions 0..{dims - 1}")
    points = torch.cat([latents.traversal(z, dimension, values) for dimension in dimensions])
    return _decode_points(model, points, y, batch_size).unflatten(0, (len(dimensions), len(values)))


def add_direction(
    run: Source,
    z: Any,
    direction: Any,
    strengths: Any,
    y: Any = None,
    *,
    batch_size: int = 64,
    ema: bool = True,
    device: str = "auto",
) -> Tensor:
    """Decode latents moved along a direction, such as that of ``attribute_direction``.

    Args:
        run: as in ``interpolate``.
        z: latents, (N, *latent.shape).
        direction: (*latent.shape).
        strengths: multiples of the direction, (steps,).
        y: conditions, (N, *condition.shape), of a conditional model.
        batch_size, ema, device: as in ``encode``.

    Returns:
        (steps, N, *shape).

    Raises:
        ValueError: with a one-line message, for codes, a family without latents, and invalid arguments.
    """
    model = _model(run, ema, device)
    latents.check_continuous(model, "an attribute direction")
    z, (towards,) = _latents(model, z), _latents(model, torch.as_tensor(direction)[None])
    return _decode_points(model, latents.along(z, towards, torch.as_tensor(strengths)), y, batch_size)


def trajectory(
    run: Source,
    n: int = 16,
    y: Any = None,
    *,
    frames: int | None = None,
    estimate: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    sampler: Mapping[str, Any] | None = None,
    ema: bool = True,
    device: str = "auto",
) -> SamplingPath:
    """Draw samples with the states of their sampler; the samples are those of ``genzoo.sample`` for the same seed.

    Args:
        run: a run directory or a model: a denoiser, or a latent model whose prior is one.
        n: number of samples.
        y: conditions, (n, *condition.shape); None to draw them from the training distribution.
        frames: number of states, evenly spaced, with the first and the last; None for all.
        estimate: whether to return the denoiser's estimates of the data too.
        seed: of all noise.
        batch_size: samples drawn at once.
        sampler: configuration of another sampler; runs only.
        ema, device: as in ``encode``.

    Raises:
        ValueError: with a one-line message, for a family that samples in one pass, and for invalid arguments.
    """
    model = _model(run, ema, device, sampler)
    if n < 1 or batch_size < 1 or (frames is not None and frames < 2):
        raise UsageError(f"n={n}, batch_size={batch_size}, frames={frames}: at least 1 sample, 1 at once, and 2 frames")
    y = _conditions(y)
    parts = []
    for start in range(0, n, batch_size):
        rows = range(start, min(start + batch_size, n))
        rng = SampleStreams(seed, rows, device=model.device)
        own = None if y is None else y[rows.start : rows.stop].to(model.device)
        with full_float32():
            parts.append(record_path(model, len(rows), own, frames=frames, estimate=estimate, rng=rng))
    estimates = [part.estimate.cpu() for part in parts if part.estimate is not None]
    return parts[0]._replace(
        x=torch.cat([part.x.cpu() for part in parts], dim=1),
        nfe=max(part.nfe for part in parts),
        estimate=torch.cat(estimates, dim=1) if estimates else None,
    )


def compress(
    run: Source, x: Any, y: Any = None, *, batch_size: int = 64, ema: bool = True, device: str = "auto"
) -> Compressed:
    """Compress images without loss.

    Args:
        run: a run directory, or a model with a lossless code.
        x: images on [-1, 1], (N, C, H, W), of which the levels are kept; a tensor or an array of floats.
        y: classes, (N,), of a conditional model; they are part of the file.
        batch_size: images coded at once, at most; stored in the file.
        ema, device: as in ``encode``.

    Returns:
        ``data``, the content of the file, and its size in ``bits_per_dim``.

    Raises:
        ValueError: with a one-line message, for a family without a lossless code and for invalid arguments.
    """
    model = compression.check(_model(run, ema, device))
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: must be at least 1")
    return compression.compress(model, _events(model, x), _conditions(y), batch_size=batch_size)


def decompress(run: Source, data: bytes, *, ema: bool = True, device: str = "auto") -> Decompressed:
    """Restore the images, at the centres of their bins, and the classes of ``compress`` from its ``data``.

    Raises:
        ValueError: with a one-line message, for another model than that of ``compress``, and damaged data.
    """
    return compression.decompress(compression.check(_model(run, ema, device)), data)


def _model(run: Source, ema: bool, device: str, sampler: Mapping[str, Any] | None = None) -> GenerativeModel:
    if isinstance(run, GenerativeModel):
        if sampler is not None:
            raise UsageError("sampler: for a model, set model.sampler")
        return run.eval()
    return load(run, ema=ema, device=device, sampler=None if sampler is None else dict(sampler))


def _in_batches(
    model: GenerativeModel,
    batch_size: int,
    work: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    y: Tensor | None,
) -> Tensor:
    """Apply a function to batches of events or latents and their conditions, on the device of the model."""
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: must be at least 1")
    if not len(x):
        raise UsageError("there are no examples")
    if y is not None and (not y.ndim or len(y) != len(x)):
        raise UsageError(f"y: {len(y) if y.ndim else 'no'} conditions for {len(x)} examples")
    parts = []
    x = x.clone(memory_format=torch.contiguous_format)  # kernels, and so rounding, depend on the strides
    with torch.no_grad(), full_float32():
        for rows in torch.arange(len(x)).split(batch_size):
            parts.append(work(x[rows].to(model.device), None if y is None else y[rows].to(model.device)).cpu())
    return torch.cat(parts)


def _decode_points(model: GenerativeModel, points: Tensor, y: Any, batch_size: int) -> Tensor:
    """Decode several latents of each event, (steps, N, *latent.shape) -> (steps, N, *shape), with conditions (N, ...)."""
    y = _conditions(y)
    if y is not None:
        if not y.ndim or len(y) != points.shape[1]:
            raise UsageError(f"y: {len(y) if y.ndim else 'no'} conditions for {points.shape[1]} examples")
        y = y.repeat(len(points), *[1] * (y.ndim - 1))
    flat = _in_batches(model, batch_size, lambda z, y: latents.decode(model, z, y), points.flatten(0, 1), y)
    return flat.unflatten(0, points.shape[:2])


def _events(model: GenerativeModel, x: Any) -> Tensor:
    x = torch.as_tensor(x)
    if not x.is_floating_point():
        levels = model.levels or 256
        raise UsageError(
            f"x: {x.dtype} values, not floats; map level k of images to [-1, 1] by 2 (k + 1/2)/{levels} - 1"
        )
    if x.shape[1:] != model.shape:
        raise UsageError(f"x: of shape {tuple(x.shape)}, the model has (N, {', '.join(map(str, model.shape))})")
    return x.to(model.dtype)


def _latents(model: GenerativeModel, z: Any) -> Tensor:
    space, z = latents.latent_space(model), torch.as_tensor(z)
    if z.shape[1:] != space.shape:
        raise UsageError(f"latents: of shape {tuple(z.shape)}, the model has (N, {', '.join(map(str, space.shape))})")
    if not isinstance(space, Discrete):
        if not z.is_floating_point():
            raise UsageError(f"latents: {z.dtype} values, not floats")
        return z.to(model.dtype)
    if z.is_floating_point() or (len(z) and not 0 <= int(z.min()) <= int(z.max()) < space.levels):
        raise UsageError(f"latents: codes are integers in 0..{space.levels - 1}")
    return z.long()


def _conditions(y: Any) -> Tensor | None:
    if y is None:
        return None
    y = torch.as_tensor(y)
    return y if y.is_floating_point() else y.long()
