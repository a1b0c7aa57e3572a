r"""Latents of any model that has them: encoding, interpolation, traversal and attribute directions.

    family                               latent of an event                               prior
    codecs (VAE, VQ-VAE, latent models)  ``Codec.encode``                                 normal, or learned
    normalising flows                    ``f(x)``, exactly invertible                     normal
    denoisers (DDPM, score, flow)        noise at the end of the probability-flow ODE     normal
    GANs                                 none: they decode alone                          normal

Under a standard normal prior in D dimensions the norm of a latent is close to ``sqrt(D)``. A straight line between two latents
leaves this shell, so that interpolation follows a great circle, with a norm that changes linearly:

    z_w = ((1 - w) |a| + w |b|) (sin((1 - w) theta) a/|a| + sin(w theta) b/|b|) / sin(theta),    theta = angle(a, b).

Under a learned prior (latent models) the shell has no meaning, and interpolation is linear. Codes are integers and have no
points in between.

References:
    White, "Sampling Generative Networks", 2016, https://arxiv.org/abs/1609.04468 (section 2.1, slerp; 2.3, attribute vectors).
    Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021, https://arxiv.org/abs/2010.02502 (section 5.3:
    interpolation of the noise of a deterministic sampler).
    Higgins et al., "beta-VAE", 2017, https://openreview.net/forum?id=Sy2fzU9gl (section 4: traversals of single latents).
"""

from __future__ import annotations

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.probability_flow import ode_decode, ode_encode
from genzoo.model import (
    AbilityError,
    Bijective,
    Codec,
    Composite,
    Continuous,
    Decoder,
    Discrete,
    GaussianPosterior,
    GenerativeModel,
    LatentVariable,
)

Model = GenerativeModel | Denoiser

TOLERANCE = 1e-5  # relative and absolute, of the probability-flow ODE of denoisers without one of their own


def latent_space(model: Model) -> Continuous | Discrete:
    """Return the latent space of a model.

    Raises:
        AbilityError: for a model without latents.
    """
    if isinstance(model, Decoder):
        return model.latent
    if isinstance(model, Denoiser):
        return Continuous(model.event.shape)
    raise AbilityError(
        f"{type(model).__name__} has no latents: choose a codec (vae, hvae, vqvae, latent), a flow (realnvp, glow, nsf, maf), "
        "a denoiser (ddpm, score_sde, flow_matching), or a GAN to decode alone"
    )


def can_encode(model: Model) -> bool:
    """Whether events have latents: codecs, flows and denoisers, but not GANs and autoregressive models."""
    return isinstance(model, Codec | Denoiser)


def check_encoder(model: Model) -> None:
    """Check that events of a model have latents.

    Raises:
        AbilityError: for a model without an encoder.
    """
    latent_space(model)  # raises for models without latents
    if not can_encode(model):
        raise AbilityError(
            f"{type(model).__name__} has no encoder: choose a codec (vae, hvae, vqvae, latent), a flow "
            "(realnvp, glow, nsf, maf) or a denoiser (ddpm, score_sde, flow_matching)"
        )


def has_normal_prior(model: Model) -> bool:
    """Whether standard normal latents decode to samples of the model."""
    return isinstance(latent_space(model), Continuous) and not isinstance(model, Composite)


def meaning(model: Model) -> str:
    """Describe the latent of a model in one line."""
    space, family = latent_space(model), type(model).__name__
    if isinstance(space, Discrete):
        return f"{family}: index of the nearest of {space.levels} codes at each position of the grid"
    if isinstance(model, Denoiser):
        return f"{family}: noise at the end of the probability-flow ODE, prior N(0, I)"
    if isinstance(model, Composite) and isinstance(model, LatentVariable):
        return f"{family}: mean of the posterior q(z | x), or its flow; its prior is learned"
    if isinstance(model, Composite):
        return f"{family}: latent of the codec, standardised per channel; its prior is learned"
    if isinstance(model, GaussianPosterior):
        return f"{family}: mean of the posterior q(z | x), prior N(0, I)"
    if isinstance(model, LatentVariable):
        return f"{family}: flow of the mean of the posterior, prior N(0, I)"
    if isinstance(model, Bijective):
        return f"{family}: z = f(x) of the invertible map, prior N(0, I)"
    return f"{family}: latent of the decoder, prior N(0, I)"


def encode(model: Model, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Encode events, (B, *shape) -> (B, *latent.shape).

    Args:
        model: a codec, a flow, or a denoiser, whose probability-flow ODE is solved.
        x: images on [-1, 1], or vectors.
        y: conditions, (B, *condition.shape), of a conditional model.

    Raises:
        AbilityError: for a model without an encoder.
        ValueError: for invalid conditions.
    """
    check_encoder(model)
    if isinstance(model, Codec):
        return model.encode(x, y)
    assert isinstance(model, Denoiser)
    _check_conditions(model, y, len(x))
    return ode_encode(model, x, y, TOLERANCE, TOLERANCE)


def decode(model: Model, z: Tensor, y: Tensor | None = None) -> Tensor:
    """Decode latents, (B, *latent.shape) -> (B, *shape); the inverse of ``encode`` for flows and denoisers.

    Raises:
        AbilityError: for a model without latents.
        ValueError: for invalid conditions.
    """
    if isinstance(model, Decoder):
        return model.decode(z, y)
    latent_space(model)  # raises for models without latents
    assert isinstance(model, Denoiser)
    _check_conditions(model, y, len(z))
    return ode_decode(model, z, y, TOLERANCE, TOLERANCE)


def _check_conditions(model: Model, y: Tensor | None, n: int) -> None:
    if isinstance(model, GenerativeModel):
        model.conditioner.check(y, n)


def spherical(a: Tensor, b: Tensor, w: float) -> Tensor:
    """Interpolate on great circles, with linear norms; both ends are exact.

    Args:
        a, b: ends, (B, *shape).
        w: 0 for ``a``, 1 for ``b``.

    Returns:
        (B, *shape). Parallel ends, and opposite ones, whose great circle is not unique, are connected by a line.
    """
    if w in (0, 1):
        return (b if w else a).clone()
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    norm_a, norm_b = (v.norm(dim=1, keepdim=True) for v in (flat_a, flat_b))
    tiny = torch.finfo(a.dtype).tiny
    unit_a, unit_b = flat_a / norm_a.clamp(min=tiny), flat_b / norm_b.clamp(min=tiny)
    # The half angle by its tangent is accurate for all angles; arccos is not for small ones.
    theta = 2 * torch.atan2((unit_a - unit_b).norm(dim=1, keepdim=True), (unit_a + unit_b).norm(dim=1, keepdim=True))
    sine = theta.sin()
    on_line = (sine.abs() < 1e-4) | (norm_a <= tiny) | (norm_b <= tiny)
    sine = torch.where(on_line, 1.0, sine)
    direction = (torch.sin((1 - w) * theta) * unit_a + torch.sin(w * theta) * unit_b) / sine
    arc = torch.lerp(norm_a, norm_b, w) * direction
    return torch.where(on_line, torch.lerp(flat_a, flat_b, w), arc).view_as(a)


def interpolation(model: Model, start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return points between pairs of latents: spherical under a standard normal prior, linear under a learned one.

    Args:
        model: a decoder with real latents, or a denoiser.
        start, end: (B, *latent.shape).
        steps: number of points, both ends included; at least 2.

    Returns:
        (steps, B, *latent.shape).

    Raises:
        AbilityError: for codes, and for a model without latents.
        ValueError: for fewer than 2 steps.
    """
    check_continuous(model, "interpolation")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, not {steps}")
    between = spherical if has_normal_prior(model) else torch.lerp
    return torch.stack([between(start, end, i / (steps - 1)) for i in range(steps)])


def interpolate(model: Model, start: Tensor, end: Tensor, steps: int, y: Tensor | None = None) -> Tensor:
    """Decode the points of ``interpolation``, (steps, B, *shape).

    Args:
        model, start, end, steps: as in ``interpolation``.
        y: conditions, (B, *condition.shape), of a conditional model.

    Raises:
        AbilityError: for codes, and for a model without latents.
        ValueError: for fewer than 2 steps, and invalid conditions.
    """
    return decode_points(model, interpolation(model, start, end, steps), y)


def decode_points(model: Model, points: Tensor, y: Tensor | None = None) -> Tensor:
    """Decode several latents of each event, (steps, B, *latent.shape) -> (steps, B, *shape), with conditions y, (B, ...)."""
    steps, n = points.shape[:2]
    repeated = None if y is None else y.repeat(steps, *[1] * (y.ndim - 1))
    return decode(model, points.flatten(0, 1), repeated).unflatten(0, (steps, n))


def check_continuous(model: Model, what: str) -> None:
    """Check that the latents of a model are real numbers.

    Raises:
        AbilityError: for codes, and for a model without latents.
    """
    if isinstance(latent_space(model), Discrete):
        raise AbilityError(
            f"{what} needs continuous latents, and those of {type(model).__name__} are codes: choose vae, hvae, realnvp, "
            "glow, ddpm, score_sde, flow_matching, or latent with codec=vae"
        )


def traversal(z: Tensor, dimension: int, values: Tensor) -> Tensor:
    """Return latents in which one dimension takes each of some values.

    Args:
        z: continuous latents, (B, *latent.shape).
        dimension: index of the latent in row-major order, 0 to D - 1.
        values: (steps,).

    Returns:
        (steps, B, *latent.shape).

    Raises:
        ValueError: for a dimension out of range.
    """
    dims = z[0].numel()
    if not 0 <= dimension < dims:
        raise ValueError(f"dimension {dimension}: the latents have the dimensions 0..{dims - 1}")
    moved = z.flatten(1).repeat(len(values), 1, 1)
    moved[:, :, dimension] = values.to(moved)[:, None]
    return moved.view(len(values), *z.shape)


def traverse(model: Model, z: Tensor, dimension: int, values: Tensor, y: Tensor | None = None) -> Tensor:
    """Decode the points of ``traversal``, (steps, B, *shape).

    Args:
        model: a decoder with real latents, or a denoiser.
        z, dimension, values: as in ``traversal``.
        y: conditions, (B, *condition.shape), of a conditional model.

    Raises:
        AbilityError: for codes, and for a model without latents.
        ValueError: for a dimension out of range, and invalid conditions.
    """
    check_continuous(model, "traversal")
    return decode_points(model, traversal(z, dimension, values), y)


def attribute_direction(without: Tensor, having: Tensor) -> Tensor:
    """Return the mean latent of examples with an attribute minus that of examples without it.

    Args:
        without, having: latents of two classes, (N, *latent.shape) and (M, *latent.shape).

    Returns:
        (*latent.shape), averaged in float64.

    Raises:
        ValueError: for an empty class, or codes.
    """
    if not len(without) or not len(having):
        raise ValueError(f"a direction needs examples of both classes, not {len(without)} and {len(having)}")
    if not (without.is_floating_point() and having.is_floating_point()):
        raise ValueError("a direction needs continuous latents, and these are integers")
    return (having.double().mean(0) - without.double().mean(0)).to(having.dtype)


def along(z: Tensor, direction: Tensor, strengths: Tensor) -> Tensor:
    """Return latents moved along a direction by each of some strengths.

    Args:
        z: continuous latents, (B, *latent.shape).
        direction: (*latent.shape).
        strengths: multiples of the direction, (steps,).

    Returns:
        (steps, B, *latent.shape).
    """
    return z + strengths.to(z).view(-1, *[1] * z.ndim) * direction


def mean_divergences(
    model: Model, x: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None
) -> Tensor | None:
    """Return the information of each latent, the mean over events of KL(q(z_i | x) || p(z_i)) in nats, (D,).

    None for models without a normal posterior. A latent of zero does not depend on the event (posterior collapse).

    Args:
        model: any model.
        x: events, (B, *shape).
        y: conditions, (B, *condition.shape), of a conditional model.
        rng: source of randomness, of hierarchical posteriors.
    """
    if not isinstance(model, GaussianPosterior):
        return None
    return model.divergences(x, y, rng=rng).flatten(1).double().mean(0)
