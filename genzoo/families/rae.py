r"""Regularised autoencoders: deterministic codecs, whose prior is fitted afterwards.

An encoder E and a decoder D without noise minimise, per event,

    L = |x - D(z)|^2 + beta |z|^2/2 + gamma R(D),      z = E(x).

The penalty on codes keeps them from growing, and that on the decoder keeps it smooth, so that points near codes decode to
events near the data, as the noise of a variational autoencoder does:

    l2                 R = |theta|^2, of the decoder's weights
    gradient_penalty   R = |dD/dz|_F^2, here with one random projection, E_v |v' dD/dz|^2 with v ~ N(0, I)

For a linear autoencoder of data with covariance eigenvalues l_i the ``l2`` optimum shrinks each component by the factor
``1 - sqrt(beta gamma / (2 l_i))``, or to 0.

A prior over the codes makes it a generative model (``genzoo.families.latent``): a mixture of normal distributions, diffusion,
or a flow. It has no likelihood of events.

References:
    Ghosh, Sajjadi, Vergari, Black, Scholkopf, "From Variational to Deterministic Autoencoders", 2020,
    https://arxiv.org/abs/1903.12436 (eq. 11, section 3.1 for the penalties, section 4 for the prior).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.discretization import to_bin_centers
from genzoo.event import EventSpec
from genzoo.model import Codec, Continuous, Diagnostic, Loss, Samples
from genzoo.nn import defaults
from genzoo.numerics.random import randn


class RAE(Codec):
    """A regularised autoencoder.

    Args:
        event, condition: as in ``GenerativeModel``.
        encoder: factory of the encoder, called as ``encoder(in_shape, out_shape, condition)``, for ``(x, y)``.
        decoder: factory of the decoder, called in the same way, for ``(z, y)``.
        latent_dim: dimension of z, or its shape, (C, h, w), for networks with a latent grid.
        code_penalty: beta, of the squared norm of codes.
        regularizer: of the decoder, "l2" or "gradient_penalty".
        decoder_penalty: gamma; 0 for none.

    Raises:
        ValueError: for invalid sizes, penalties or regularisers.
    """

    diagnostics: Mapping[str, Diagnostic] = {
        "squared_error": Diagnostic("squared error of reconstructions", "on [-1, 1], per dimension", "lower"),
        "code_norm": Diagnostic("squared norm of codes", "per latent"),
        "smoothness": Diagnostic("penalty of the decoder", "unweighted"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        encoder: Callable[..., nn.Module] = defaults.encoder,
        decoder: Callable[..., nn.Module] = defaults.decoder,
        latent_dim: int | Sequence[int] = 16,
        code_penalty: float = 1e-2,
        regularizer: Literal["l2", "gradient_penalty"] = "l2",
        decoder_penalty: float = 1e-3,
    ):
        super().__init__(event, condition)
        latent = (latent_dim,) if isinstance(latent_dim, int) else tuple(latent_dim)
        if not latent or min(latent) < 1:
            raise ValueError(f"latent_dim must be at least 1, not {latent_dim}")
        if code_penalty < 0 or decoder_penalty < 0:
            raise ValueError(
                f"code_penalty and decoder_penalty must not be negative, not {code_penalty} and {decoder_penalty}"
            )
        if regularizer not in ("l2", "gradient_penalty"):
            raise ValueError(f"regularizer must be l2 or gradient_penalty, not {regularizer!r}")
        self.latent = Continuous(latent)
        self.encoder = encoder(self.shape, latent, condition)
        self.decoder = decoder(latent, self.shape, condition)
        self.code_penalty, self.decoder_penalty = code_penalty, decoder_penalty
        self.regularizer = regularizer

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        z = self._encode(x, y)
        target = x if self.levels is None else to_bin_centers(x, self.levels)
        decoded = self.decoder(z, y).to(x.dtype)
        error = (decoded - target).square().flatten(1).sum(1).mean()
        norm = z.square().flatten(1).sum(1).mean()
        total, terms = error + 0.5 * self.code_penalty * norm, {}
        if self.decoder_penalty:
            penalty = self._decoder_penalty(z, y, rng)
            total, terms = total + self.decoder_penalty * penalty, {"smoothness": penalty.detach()}
        terms |= {"squared_error": error.detach() / self.dim, "code_norm": norm.detach() / z[0].numel()}
        # Per dimension, so that one learning rate suits images of any size.
        return Loss(total / self.dim, terms)

    def _decoder_penalty(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        """Return R(D), (): of the weights, or a mean over the batch."""
        if self.regularizer == "l2":
            return torch.stack([p.square().sum() for p in self.decoder.parameters()]).sum()
        with torch.enable_grad():  # also where a loss is only evaluated
            code = z if z.requires_grad else z.detach().requires_grad_()
            decoded = self.decoder(code, y).to(z.dtype)
            v = randn(decoded.shape, rng=rng, device=z.device, dtype=z.dtype)
            (gradient,) = torch.autograd.grad((v * decoded).sum(), code, create_graph=self.training)
        return gradient.square().flatten(1).sum(1).mean()

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        x = x if self.levels is None else to_bin_centers(x, self.levels)
        return self.encoder(x, y).to(x.dtype)

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        x = self._decode_smooth(z, y)
        return x if self.levels is None else to_bin_centers(x, self.levels)

    def _decode_smooth(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self.decoder(z, y).to(z.dtype)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Decode draws from N(0, I), for want of a prior: the penalty on codes bounds their scale, but does not fix it."""
        z = randn((n, *self.latent.shape), rng=rng, device=self.device, dtype=self.dtype)
        return Samples(self._decode(z, y), nfe=1)
