r"""VQGAN: a quantised autoencoder sharpened by a critic and a perceptual loss.

The likelihood of an autoencoder is a sum over pixels, which rewards blur where details are uncertain. Here the autoencoder also
has to deceive a critic ``D`` of events and reconstructions, and to match features of a classifier ``phi``,

    L_autoencoder = L_VQ + w d_phi(x, x_hat) - lambda E D(x_hat)
    L_critic      = E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat))

with ``L_VQ`` the loss of the autoencoder (``genzoo.families.vqvae``), ``d_phi`` a perceptual distance and ``x_hat`` the
location of ``p(x | k)``. The weight of the adversarial term balances its gradient in the last weights ``W`` of the decoder with
that of the reconstruction,

    lambda = a |grad_W (distortion/D + w d_phi)| / (|grad_W E D(x_hat)| + 1e-6),    at most 1e4,

and is 0 for the first ``start`` images. Both networks take turns. The autoencoder is any one of ``genzoo.families.vqvae``; its
codes, likelihood and bound with a prior keep their meaning, so that ``model=latent`` and ``model=vqvae`` use it as a codec.

Differences to the paper: the pixel term is the likelihood of the codec and not an absolute difference, the critic judges whole
events and not patches, and classifiers embedded in genzoo take the place of VGG.

References:
    Esser, Rombach, Ommer, "Taming Transformers for High-Resolution Image Synthesis", 2021, https://arxiv.org/abs/2012.09841
    (section 3.1, eq. 5 to 7).
    Lim, Ye, "Geometric GAN", 2017, https://arxiv.org/abs/1705.02894 (the hinge loss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.discretization import to_bin_centers
from genzoo.event import EventSpec
from genzoo.families.vqvae import VQVAE, QuantizedAutoencoder
from genzoo.model import Adversarial, Diagnostic, LatentVariable, Loss, PosteriorSample, Samples
from genzoo.nn import defaults
from genzoo.numerics import distributed


class VQGAN(LatentVariable, Adversarial):
    """A quantised autoencoder with an adversarial and a perceptual loss.

    Args:
        event, condition: as in ``GenerativeModel``.
        autoencoder: factory of the autoencoder, called as ``autoencoder(event, condition)``.
        critic: factory of the critic, called as ``critic(in_shape, out_shape, condition)``, for ``(x, y)``.
        perceptual: distance of two batches of events, (B, *shape) each -> (B,), with frozen weights; None for none.
        perceptual_weight: w.
        adversarial_weight: a.
        start: training images, of both turns, before the adversarial term.

    Raises:
        ValueError: for negative weights, and another autoencoder.
    """

    MAX_WEIGHT = 1e4  # of lambda

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        autoencoder: Callable[..., QuantizedAutoencoder] = VQVAE,
        critic: Callable[..., nn.Module] = defaults.critic_without_norm,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.8,
        start: int = 0,
    ):
        super().__init__(event, condition)
        weights = {"perceptual_weight": perceptual_weight, "adversarial_weight": adversarial_weight, "start": start}
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        self.autoencoder = autoencoder(event, condition)
        if not isinstance(self.autoencoder, QuantizedAutoencoder):
            raise ValueError(
                f"autoencoder: {type(self.autoencoder).__name__} has no codes; choose vqvae, residual or fsq"
            )
        self.critic = critic(self.shape, (1,), condition)
        self.perceptual = perceptual
        self.perceptual_weight, self.adversarial_weight, self.start = perceptual_weight, adversarial_weight, start
        self.latent = self.autoencoder.latent
        self.diagnostics: Mapping[str, Diagnostic] = {
            **self.autoencoder.diagnostics,
            "perceptual": Diagnostic("perceptual distance", "squared distance of features", "lower"),
            "adversarial": Diagnostic("-E D(x_hat)", ""),
            "weight": Diagnostic("weight of the adversarial term", ""),
            "critic": Diagnostic("loss of the critic", ""),
        }
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    seen: Tensor

    def networks(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.autoencoder, "critic": self.critic}

    def turn(self, step: int) -> str:
        return "critic" if step % 2 else "autoencoder"

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None, turn: str = "") -> Loss:
        real = x if self.levels is None else to_bin_centers(x, self.levels)
        if turn == "critic":
            with torch.no_grad():
                fake = self.autoencoder.likelihood.location(self.autoencoder.quantize(x, y)[1])
            on_data, on_fake = self.critic(real, y).to(x.dtype), self.critic(fake, y).to(x.dtype)
            loss = F.relu(1 - on_data).mean() + F.relu(1 + on_fake).mean()
            return Loss(loss, {"critic": loss.detach()})
        # The weight needs gradients even in a validation.
        with torch.inference_mode(False), torch.enable_grad():
            # A graph may hold no tensor of an inference mode.
            x, real = (v.clone() if v.is_inference() else v for v in (x, real))
            y = y.clone() if y is not None and y.is_inference() else y
            return self._autoencoder_loss(x, real, y)

    def _autoencoder_loss(self, x: Tensor, real: Tensor, y: Tensor | None) -> Loss:
        quantization, params = self.autoencoder.quantize(x, y)
        reconstruction, (total, terms, aux) = self.autoencoder.loss_terms(x, quantization, params)
        fake = self.autoencoder.likelihood.location(params)
        if self.perceptual is not None:
            perceptual = self.perceptual(real, fake).mean().to(x.dtype)
            reconstruction = reconstruction + self.perceptual_weight * perceptual
            total = total + self.perceptual_weight * perceptual
            terms["perceptual"] = perceptual.detach()
        adversarial = -self.critic(fake, y).to(x.dtype).mean()
        weight = self._weight(reconstruction, adversarial)
        total = total + weight * adversarial
        return Loss(total, {**terms, "adversarial": adversarial.detach(), "weight": weight}, aux)

    def _weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """Return lambda, (), from the gradients of both terms in the last weights of the decoder; 0 for a frozen decoder."""
        last = [p for p in self.autoencoder.decoder.parameters() if p.ndim > 1][-1]
        if not last.requires_grad:
            return adversarial.new_zeros(())
        slopes = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (reconstruction, adversarial)]
        if self.training:
            slopes = [distributed.all_reduce_mean(slope) for slope in slopes]
        ratio = slopes[0].norm() / (slopes[1].norm() + 1e-6)
        begun = (self.seen >= self.start).to(ratio.dtype)
        return self.adversarial_weight * begun * ratio.clamp(max=self.MAX_WEIGHT)

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        self.seen += batch_size
        return self.autoencoder.after_step(aux, batch_size, rng=rng) if aux else {}

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        self.autoencoder._initialize(x, y, rng)

    def _infer(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> PosteriorSample:
        return self.autoencoder._infer(x, y, rng)

    def _log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        return self.autoencoder._log_likelihood(x, z, y)

    def _generate(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        return self.autoencoder._generate(z, y, rng)

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        return self.autoencoder._encode(x, y)

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self.autoencoder._decode(z, y)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return self.autoencoder._sample(n, y, rng)
