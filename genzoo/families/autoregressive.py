r"""Autoregressive models: the chain rule over pixels in raster order,

    p(x) = prod_i p(x_i | x_1, ..., x_{i-1})

Each factor is a ``likelihood`` whose parameters are the output of a causal network of the preceding pixels. One evaluation of
the network gives all factors of a given event, so that the density is exact and training is by maximum likelihood; sampling
takes one evaluation per pixel. The channels of a pixel are chained within the likelihood.

The network is a gated PixelCNN or a transformer. A vector of D numbers is a raster of D pixels with a continuous
likelihood, ``p(x_1) p(x_2 | x_1) ...``. Categorical data, such as the codes of a codec, are one-hot encoded. With ``patch`` a
block of pixels is one pixel of many channels, which reduces the number of sampling steps.

References:
    van den Oord, Kalchbrenner, Kavukcuoglu, "Pixel Recurrent Neural Networks", 2016, https://arxiv.org/abs/1601.06759
    (eq. 1 and 2).
    van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016, https://arxiv.org/abs/1606.05328.
    Salimans, Karpathy, Chen, Kingma, "PixelCNN++", 2017, https://arxiv.org/abs/1701.05517.
    Chen et al., "Generative Pretraining from Pixels", 2020, https://proceedings.mlr.press/v119/chen20s.html.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genzoo.conditions import Condition, DropRate
from genzoo.distributions.discretization import bin_center, quantize, to_bin_centers
from genzoo.distributions.likelihoods import Likelihood, default_pixel_likelihood
from genzoo.event import EventSpec
from genzoo.model import Bound, Causal, Factorized, LogitGuided, LogProb, Loss, Samples
from genzoo.nn import defaults
from genzoo.nn.causal import CausalNetwork


class Autoregressive(Factorized, Causal, LogitGuided):
    """An autoregressive model in raster order.

    Args:
        network: factory of the causal network, called as ``network(in_shape, out_shape, condition)``, for ``(x, y)``.
        likelihood: factory of the likelihood of a pixel, called as ``likelihood(levels=levels)``.
        event, condition: as in ``GenerativeModel``.
        inputs: encoding of the network's inputs: the "values" of the pixels, or their "classes", one-hot levels.
        patch: side of the blocks of an image that are modelled as one pixel.
        condition_dropout: probability of replacing a condition by the null value in training, for classifier-free guidance.

    Raises:
        ValueError: for one-hot inputs of data without levels, and blocks that do not tile the image.
    """

    bound = Bound.EXACT

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., CausalNetwork] = defaults.causal,
        likelihood: Callable[..., Likelihood] = default_pixel_likelihood,
        inputs: Literal["values", "classes"] = "values",
        patch: int = 1,
        condition_dropout: DropRate = 0.0,
    ):
        super().__init__(event, condition, condition_dropout)
        if inputs not in ("values", "classes"):
            raise ValueError(f"inputs must be values or classes, not {inputs!r}")
        if inputs == "classes" and event.levels is None:
            raise ValueError("inputs=classes needs data with levels")
        C, H, W = self.shape if len(self.shape) == 3 else (1, self.dim, 1)
        if patch < 1 or (patch > 1 and (len(self.shape) != 3 or H % patch or W % patch)):
            raise ValueError(f"patch={patch} does not tile an event of shape {self.shape}")
        self.inputs, self.patch = inputs, patch
        self.unpatched = C, H, W
        self.raster = C * patch**2, H // patch, W // patch
        self.likelihood = likelihood(levels=event.levels)
        channels, *sides = self.raster
        in_channels = channels * event.levels if inputs == "classes" and event.levels is not None else channels
        self.network = network((in_channels, *sides), (self.likelihood.num_params(channels), *sides), condition)

    def _network_input(self, pixels: Tensor) -> Tensor:
        """Encode pixels as network inputs, (B, C, ...) -> (B, C or C * levels, ...)."""
        if self.inputs == "values" or self.levels is None:
            return pixels
        return F.one_hot(quantize(pixels, self.levels), self.levels).movedim(-1, 2).flatten(1, 2).to(pixels.dtype)

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        x = x if self.levels is None else to_bin_centers(x, self.levels)
        pixels = F.pixel_unshuffle(x.view(-1, *self.unpatched), self.patch)
        params = self.network(self._network_input(pixels), y).to(x.dtype)
        return LogProb(self.likelihood.log_prob(params, pixels))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        nll = -self._log_prob(x, self.conditioner.drop(y, rng), 1, rng).value.mean()
        # In nats per dimension, so that one learning rate suits images of any size.
        return Loss(nll / self.dim, {"nll": nll.detach()})

    def check_guidance(self) -> None:
        if self.condition is None:
            raise ValueError("guidance: the model is unconditional")
        if not self.conditioner.learns_null:
            raise ValueError(
                "guidance: the model was trained with model.condition_dropout=0 and has no unconditional part"
            )
        if self.likelihood.levels is None:
            raise ValueError(f"guidance: {type(self.likelihood).__name__} has no logits, which need integer levels")

    def order(self) -> Tensor:
        _, H, W = self.raster
        places = torch.arange(H * W).view(1, H, W).expand(self.raster)
        return F.pixel_shuffle(places, self.patch).reshape(self.shape)

    def check_compressible(self) -> None:
        self.likelihood.check_discrete()

    def _factorize(
        self, n: int, y: Tensor | None, draw: Callable[[Tensor, Tensor], Tensor], rng: torch.Generator | None
    ) -> None:
        assert self.levels is not None
        places = torch.arange(self.dim, device=self.device).view(1, *self.unpatched)
        index = F.pixel_unshuffle(places, self.patch)[0].flatten(1)
        state, inputs = self.network.incremental(n, y), None
        for places in index.unbind(1):
            params = state.step(inputs).to(self.dtype)
            pixel = params[:, :0]
            for place in places:
                k = draw(self.likelihood.next_log_probs(params, pixel), place.expand(n))
                pixel = torch.cat([pixel, bin_center(k, self.levels, self.dtype)[:, None]], dim=1)
            inputs = self._network_input(pixel)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return Samples(*self._continue([], n, y, rng))

    def _complete(self, x: Tensor, known: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        centers = x if self.levels is None else to_bin_centers(x, self.levels)
        pixels = F.pixel_unshuffle(centers.view(-1, *self.unpatched), self.patch).flatten(2)
        sampled, nfe = self._continue(list(pixels[..., :known].unbind(2)), len(x), y, rng)
        return Samples(torch.where(self.order().to(x.device) < known, x, sampled), nfe)

    def _continue(
        self, pixels: list[Tensor], n: int, y: Tensor | None, rng: torch.Generator | None
    ) -> tuple[Tensor, int]:
        """Draw the pixels after the first ones, (n, C) each; return all, (n, *shape), and the network evaluations.

        With guidance, a second half of the batch has the null value.
        """
        guided = self.guidance_scale != 1
        if guided:
            self.check_guidance()
            assert self.condition is not None and y is not None
            y = torch.cat([y, self.condition.null(y)])
        passes = 2 if guided else 1
        state = self.network.incremental(passes * n, y)
        _, H, W = self.raster
        known = len(pixels)
        for i in range(H * W):
            with torch.inference_mode():  # reduces the overhead of many small steps
                inputs = self._network_input(pixels[i - 1]) if i else None
                params = state.step(inputs if inputs is None else inputs.repeat(passes, 1)).to(self.dtype)
            if i < known:
                continue
            if guided:
                conditional, unconditional = params.chunk(2)
                pixels.append(self.likelihood.sample_guided(conditional, unconditional, self.guidance_scale, rng))
            else:
                pixels.append(self.likelihood.sample(params, rng))
        x = torch.stack(pixels, dim=2).view(n, *self.raster)
        return F.pixel_shuffle(x, self.patch).view(n, *self.shape), passes * H * W
