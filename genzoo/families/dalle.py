r"""Autoregressive models of texts and images (DALL-E): a prior over the codes of an image, given its caption.

A caption t_1, ..., t_n, whose last token is the end, and the codes x_1, ..., x_N of an image in raster order are one sequence,

    p(t, x) = prod_i p(t_i | t_<i) prod_j p(x_j | t, x_<j)

of which a causal transformer predicts all factors (``genzoo.nn.text_image_transformer``). Training minimises the
cross-entropies of both parts, in nats per token of each kind in a batch,

    L = w CE_text + (1 - w) CE_image,      w = 1/8.

The density is that of the image given its caption, log p(x | t); ``text_log_prob`` is log p(t). A fraction of the captions is
replaced by the null value, so that the logits of images without a caption are learned too, for classifier-free guidance; their
text has no cross-entropy.

As a prior over the codes of a codec (``genzoo.families.latent``) it bounds the density of images, by eq. 1 of the paper with a
codec that is trained first.

References:
    Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, https://arxiv.org/abs/2102.12092 (eq. 1, section 2.2).
    Gafni et al., "Make-A-Scene", 2022, https://arxiv.org/abs/2203.13131 (section 3.4: guidance of logits).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from genzoo.conditions import Condition, Tokens
from genzoo.distributions.discretization import quantize
from genzoo.distributions.likelihoods import Categorical
from genzoo.event import EventSpec
from genzoo.model import Bound, Density, Diagnostic, LogitGuided, LogProb, Loss, Samples
from genzoo.nn.text_image_transformer import TextImageTransformer, after_end
from genzoo.numerics import distributed


class DALLE(Density, LogitGuided):
    """An autoregressive model of captions and images with one channel, such as codes.

    Args:
        network: factory of the transformer, called as ``network(in_shape, out_shape, condition)``.
        event: of the images.
        condition: captions, whose end is token 1.
        text_weight: w, of the cross-entropy of the captions in the loss.
        condition_dropout: probability of replacing a caption by the null value in training, for classifier-free guidance.

    Raises:
        ValueError: without captions, and for images of several channels or without levels.
    """

    bound = Bound.EXACT
    condition: Tokens

    diagnostics: Mapping[str, Diagnostic] = {
        "image_nll": Diagnostic("negative log-likelihood of images", "nats per code", "lower"),
        "text_nll": Diagnostic("negative log-likelihood of captions", "nats per token", "lower"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., TextImageTransformer] = TextImageTransformer,
        text_weight: float = 0.125,
        condition_dropout: float = 0.1,
    ):
        if not isinstance(condition, Tokens) or condition.vocabulary < 3:
            raise ValueError("data without captions: choose data with captions, such as data=shapes")
        super().__init__(event, condition, condition_dropout)
        if event.levels is None or len(self.shape) != 3 or self.shape[0] != 1:
            raise ValueError(f"needs integers of one channel, such as codes, not {event}")
        if not 0 <= text_weight < 1:
            raise ValueError(f"text_weight must be in [0, 1), not {text_weight}")
        self.text_weight = text_weight
        self.likelihood = Categorical(event.levels)
        self.network = network(self.shape, (event.levels, *self.shape[1:]), condition)

    def _logits(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of captions, (B, L, V - 1), and of images, (B, K, h, w)."""
        assert self.levels is not None
        text, image = self.network(y, quantize(x[:, 0], self.levels))
        return text.to(x.dtype), image.to(x.dtype)

    def _text_log_probs(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log probability of each token of captions, 0 after their ends and for the null value, and a mask."""
        missing = after_end(y) | (y == self.condition.vocabulary)
        target = torch.where(missing, 0, y - 1)  # padding has no logit
        log_p = -F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        return torch.where(missing, 0.0, log_p), ~missing

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        assert y is not None
        return LogProb(self.likelihood.log_prob(self._logits(x, y)[1], x))

    def text_log_prob(self, y: Tensor) -> Tensor:
        """Compute the log probability of captions, ends included, (B, L) -> (B,)."""
        self.conditioner.check(y, len(y))
        x = torch.zeros(len(y), *self.shape, device=y.device, dtype=self.dtype)  # no text token depends on the image
        return self._text_log_probs(self._logits(x, y)[0], y)[0].sum(1)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        assert self.levels is not None and y is not None
        y = self.conditioner.drop(y, rng)
        assert y is not None
        text, image = self._logits(x, y)
        image_nll = F.cross_entropy(image, quantize(x[:, 0], self.levels))
        log_p, present = self._text_log_probs(text, y)
        count = present.sum().to(x.dtype)
        if self.training:  # a mean over the tokens of all processes
            count = distributed.all_reduce_mean(count)
        text_nll = -log_p.sum() / count.clamp(min=1)
        total = self.text_weight * text_nll + (1 - self.text_weight) * image_nll
        return Loss(total, {"image_nll": image_nll.detach(), "text_nll": text_nll.detach()})

    def check_guidance(self) -> None:
        if not self.conditioner.dropout:
            raise ValueError(
                "guidance: the model was trained with model.condition_dropout=0 and has no unconditional part"
            )

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Draw the codes one by one, after one evaluation of the captions.

        With guidance, a second half of the batch has the null value.
        """
        assert y is not None
        guided = self.guidance_scale != 1
        if guided:
            self.check_guidance()
            y = torch.cat([y, self.condition.null(y)])
        passes = 2 if guided else 1
        state = self.network.incremental(y)
        values: list[Tensor] = []
        codes: Tensor | None = None
        for _ in range(self.dim):
            with torch.inference_mode():  # reduces the overhead of many small steps
                logits = state.step(codes).to(self.dtype)
            if guided:
                conditional, unconditional = logits.chunk(2)
                value = self.likelihood.sample_guided(conditional, unconditional, self.guidance_scale, rng)
            else:
                value = self.likelihood.sample(logits, rng)
            values.append(value)
            codes = quantize(value, self.likelihood.levels).repeat(passes, 1)
        return Samples(torch.stack(values, dim=2).view(n, *self.shape), passes * self.dim)
