r"""A contrastive network: events and their conditions, such as images and captions, on one unit sphere.

Two encoders map images x to f and texts c to g, of norm 1, and a learned scale kappa gives the logit of a pair, kappa f.g. In a
batch of N pairs each image must be assigned to its text among all N, and each text to its image,

    L = -1/(2N) sum_i [log softmax_j(kappa f_i . g_j)_i + log softmax_j(kappa f_j . g_i)_i],

which bounds the mutual information of images and texts, ``I >= log N - L``; equality needs the logits
``log p(c | x)/p(c)`` up to a constant, and N to infinity. kappa is at most 100.

Equal texts in a batch, which are right for each other's images, need no treatment. Their embeddings are equal, so that an image
gives the same probability to each of m equal texts, and the cross-entropy with weights 1/m on all of them is that of one. For a
text, the rows of its m copies are equal, and their mean is the cross-entropy with weights 1/m. Loss and gradient are therefore
those with 1/m on every pair whose texts are equal.

**Noisy events.** For guidance of diffusion models the encoder of events sees x_u at a noise level u, uniform in [0, 1]
(``genzoo.diffusion.noisy``), and the logits are ``kappa cos(pi u / 2) f.g``: noisy data say less of their texts the weaker the
signal is, and so do the logits, so that the error of their gradient vanishes with it. The noise level is independent of the
text, so that the best logits are still ``log p(c | x_u)/p(c)``, whose gradient in x_u is that of Bayes' rule.

Several processes compute the loss of the global batch: each compares its own embeddings with those of all.

References:
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
    https://arxiv.org/abs/2103.00020 (figure 3; section 2.5: the scale).
    van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
    https://arxiv.org/abs/1807.03748 (eq. 4, appendix A.1: the bound).
    Nichol et al., "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models", 2022,
    https://arxiv.org/abs/2112.10741 (section 2.4: a contrastive network of noisy images for guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.diffusion.guidance import NoisyEmbedding
from genzoo.diffusion.noisy import at_angle, with_noise
from genzoo.distributions.discretization import to_bin_centers
from genzoo.event import EventSpec
from genzoo.model import Diagnostic, Loss, SharedEmbedding
from genzoo.nn import defaults
from genzoo.nn.contrastive import DualEncoder
from genzoo.numerics import distributed

MAX_SCALE = 100.0


def cross_entropies(f: Tensor, g: Tensor, scale: Tensor, gathered: bool = False) -> tuple[Tensor, Tensor]:
    """Return -log of the probability of the own text for each image, and of the own image for each text, (B,) each.

    Args:
        f: embeddings of images, (B, d).
        g: embeddings of their texts, (B, d).
        scale: kappa.
        gathered: whether the candidates are those of all processes.
    """
    with torch.autocast(f.device.type, enabled=False):  # logits of up to 100
        every_f, every_g = (distributed.all_gather(h).flatten(0, 1) for h in (f, g)) if gathered else (f, g)
        first = distributed.rank() * len(f) if gathered else 0
        own = torch.arange(first, first + len(f), device=f.device)
        of_images = F.cross_entropy(scale * f @ every_g.T, own, reduction="none")
        of_texts = F.cross_entropy(scale * g @ every_f.T, own, reduction="none")
    return of_images, of_texts


class Contrastive(SharedEmbedding):
    """A contrastive network of events and conditions.

    Args:
        event: as in ``TrainableModel``.
        condition: of the texts; classes or vectors are possible, too.
        network: factory of the encoder of events, called as ``network(in_shape, (dim,), None)``, for ``(x, None)``.
        text: factory of the encoder of conditions, called as ``text(condition, text_width)``.
        dim: d, of the embeddings.
        text_width: features of the encoder of conditions, which are projected to d.

    Raises:
        ValueError: for data without conditions.
    """

    diagnostics: Mapping[str, Diagnostic] = {
        "mutual_information": Diagnostic("lower bound of the mutual information", "nats", "higher"),
        "scale": Diagnostic("scale of the cosines", "nats"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.encoder,
        text: Callable[..., nn.Module] = defaults.text_encoder,
        dim: int = 128,
        text_width: int = 128,
    ):
        super().__init__(event, condition)
        if condition is None:
            raise ValueError("a contrastive network needs data with captions or classes; set data.conditional=true")
        self.embedding_dim = dim
        self.encoders = DualEncoder(network(self.shape, (dim,), None), text(condition, text_width), text_width, dim)

    @property
    def scale(self) -> Tensor:
        return self.encoders.log_scale.exp()

    def _embed_image(self, x: Tensor) -> Tensor:
        return self.encoders.embed_image(x, None)

    def _embed_text(self, y: Tensor) -> Tensor:
        return self.encoders.embed_text(y)

    def _images(self, x: Tensor, rng: torch.Generator | None) -> Tensor:
        """Embed the images of a training batch, without the noise of dequantisation."""
        return self._embed_image(x if self.levels is None else to_bin_centers(x, self.levels))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        assert y is not None
        f, g = self._images(x, rng), self._embed_text(y)
        losses = cross_entropies(f, g, self.scale, gathered=self.training)
        of_images, of_texts = (loss.mean() for loss in losses)
        total = 0.5 * (of_images + of_texts)
        n = len(x) * (distributed.world_size() if self.training else 1)
        terms = {
            "loss_of_images": of_images,
            "loss_of_texts": of_texts,
            "mutual_information": math.log(n) - total,
            "scale": self.scale,
        }
        return Loss(total, {name: term.detach() for name, term in terms.items()})

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Clip the scale, section 2.5."""
        self.encoders.log_scale.clamp_(max=math.log(MAX_SCALE))
        return {}


class NoiseConditionalContrastive(Contrastive, NoisyEmbedding):
    """A contrastive network of noisy events, for guidance by the gradient of their logits.

    Args:
        event, condition, text, dim, text_width: as in ``Contrastive``.
        network: factory of the encoder of events, called as ``network(in_shape, (dim,), None)``, for ``(x_u, u, None)``.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., nn.Module] = defaults.noisy_classifier,
        text: Callable[..., nn.Module] = defaults.text_encoder,
        dim: int = 128,
        text_width: int = 128,
    ):
        super().__init__(event, condition, network=network, text=text, dim=dim, text_width=text_width)

    def _embed_noisy(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        x_u, u, signal = at_angle(x_t, alpha, sigma)
        return signal[:, None] * self.encoders.embed_image(x_u, u, None)

    def _embed_image(self, x: Tensor) -> Tensor:
        one = torch.ones(len(x), dtype=torch.float64, device=x.device)
        return self._embed_noisy(x, one, 0 * one)

    def _images(self, x: Tensor, rng: torch.Generator | None) -> Tensor:
        """Embed the images of a training batch at random noise levels."""
        return self._embed_noisy(*with_noise(x if self.levels is None else to_bin_centers(x, self.levels), rng))
