r"""VQ-VAE-2: an autoencoder with a hierarchy of codes, and a prior for each level given the one above.

The finest of L levels has the grid of a VQ-VAE, and every further one half the sides of the one below. Features are encoded
bottom-up, ``h_1 = E(x)``, ``h_(l+1) = E_l(h_l)``, and quantised top-down, each level given the ones above,

    z_L = W_L h_L,      e_l = q_l(z_l),      u_l = U_l(e_(l+1), u_(l+1)),      z_l = W_l (h_l, u_l)

so that a level describes what the coarser ones have left open: the top level global structure, the bottom level texture. The
decoder maps ``(e_1, u_1)`` to the parameters of ``p(x | k)``. Training minimises the loss of ``genzoo.families.vqvae`` with the
commitment losses of all levels. One level is a VQ-VAE.

The codes of an event are one sequence, those of the top level first. The prior has a factor for each level,

    log P(k) = log P(k_L) + sum_{l<L} log P(k_l | k_(l+1))        and        log p(x) >= log P(k(x)) + log p(x | k(x))

(with two levels this is the chain rule), each an autoregressive model by default. Their parameters are disjoint, so that they
are trained at once, on the same codes.

Differences to the paper: ``u_l`` serves as the input of ``W_l`` and of the decoder, which have upsampling layers of their own
there, and priors are transformers that add features of the codes above at each position, in place of PixelSNAILs.

References:
    Razavi, van den Oord, Vinyals, "Generating Diverse High-Fidelity Images with VQ-VAE-2", 2019,
    https://arxiv.org/abs/1906.00446 (sections 3.1 and 3.2; algorithms 1 and 2).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from genzoo.conditions import Codes, Condition, Joint
from genzoo.diffusion.denoiser import replaced
from genzoo.distributions.discretization import quantize
from genzoo.distributions.likelihoods import Likelihood
from genzoo.event import EventSpec
from genzoo.families.latent import LatentDensity, LatentModel, latent
from genzoo.families.vqvae import QuantizedAutoencoder
from genzoo.model import Bound, Density, GenerativeModel, LogitGuided, LogProb, Loss, Samples
from genzoo.nn import defaults
from genzoo.nn.grid import latent_grid
from genzoo.nn.quantize import Quantization, Quantizer, VectorQuantizer

Grid = tuple[int, int]
CODEBOOK = functools.partial(VectorQuantizer, 512, 64)


def level_grids(sides: Sequence[int], downsampling: int, tokens: int, levels: int) -> list[Grid]:
    """Return the grid of each level, the finest first.

    Args:
        sides, downsampling, tokens: as in ``latent_grid``, of the finest level.
        levels: their number; every further one has half the sides, or of vectors half as many tokens, rounded up.

    Raises:
        ValueError: for less than one level, and grids of images that cannot be halved.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, not {levels}")
    grids = [latent_grid(sides, downsampling, tokens)]
    for _ in range(levels - 1):
        height, width = grids[-1]
        if any(side % 2 and side > 1 for side in grids[-1] if sides):
            raise ValueError(
                f"levels={levels}: {height}x{width} codes cannot be halved; choose fewer levels or downsampling"
            )
        grids.append((max(height // 2, 1), max(width // 2, 1)) if sides else (-(-height // 2), 1))
    return grids


class HierarchicalQuantizer(Quantizer):
    """The levels of codes between an encoder and a decoder, with the networks that join them.

    Its vectors are the features of the finest grid, (B, D, H, W); its codes are a sequence, (B, N, 1), the coarsest level
    first; a sequence is looked up as ``(e_1, u_1)``, the input of the decoder.

    Args:
        quantizers: of each level, the finest first, with equally many codes.
        grids: of each level, the finest first.
        features: D.
        reduce: factory of the networks between the features of two levels, called as ``reduce(in_shape, out_shape)``.
        expand: factory of the networks between the codes of two levels, called in the same way.
    """

    def __init__(
        self,
        quantizers: Sequence[Quantizer],
        grids: Sequence[Grid],
        features: int,
        reduce: Callable[..., nn.Module],
        expand: Callable[..., nn.Module],
    ):
        in_dim = features if len(grids) > 1 else quantizers[0].in_dim
        super().__init__(quantizers[0].codebook_size, in_dim, sum(quantizer.depth for quantizer in quantizers))
        self.learned = quantizers[0].learned
        self.quantizers: Sequence[Quantizer] = nn.ModuleList(quantizers)  # type: ignore[assignment]
        self.grids = [quantizer.grid(grid) for quantizer, grid in zip(quantizers, grids, strict=True)]
        self.sizes = [height * width for height, width in self.grids]
        above = [features] * (len(grids) - 1)  # channels of u_l
        dims = [quantizer.out_dim for quantizer in quantizers]
        self.out_dim = dims[0] + sum(above[:1])
        pairs = list(itertools.pairwise(grids))
        self.reduce = nn.ModuleList(reduce((features, *fine), (features, *coarse)) for fine, coarse in pairs)
        self.expand = nn.ModuleList(
            expand((dims[i + 1] + sum(above[i + 1 : i + 2]), *coarse), (features, *fine))
            for i, (fine, coarse) in enumerate(pairs)
        )
        self.merge = nn.ModuleList(
            # A single level quantises the encoder's vectors as they are.
            nn.Conv2d(features + sum(above[i : i + 1]), quantizer.in_dim, 1) if pairs else nn.Identity()
            for i, quantizer in enumerate(quantizers)
        )

    def grid(self, grid: Grid) -> Grid:
        return sum(self.sizes), 1

    @property
    def marginals(self) -> Tensor:
        return torch.cat([quantizer.marginals for quantizer in reversed(self.quantizers)])

    def levels(self, k_BN1: Tensor) -> list[Tensor]:
        """Split a sequence into the grids of its levels, the finest first, (B, N, 1) -> (B, h_l, w_l) each."""
        pieces = k_BN1[..., 0].split(self.sizes[::-1], dim=1)[::-1]
        return [piece.reshape(-1, *grid) for piece, grid in zip(pieces, self.grids, strict=True)]

    def split(self, k_BHW: Tensor) -> tuple[Tensor, ...]:
        pieces = zip(reversed(self.quantizers), reversed(self.levels(k_BHW)), strict=True)
        return tuple(column for quantizer, piece in pieces for column in quantizer.split(piece))

    def join(self, columns: Sequence[Tensor]) -> Tensor:
        pieces: list[Tensor] = []
        for quantizer in reversed(self.quantizers):
            own, columns = columns[: quantizer.depth], columns[quantizer.depth :]
            pieces.append(quantizer.join(own).flatten(1))
        return torch.cat(pieces, dim=1).unsqueeze(2)

    def _pass(self, h: Tensor, quantize: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Encode bottom-up and quantise top-down, with ``quantize`` from the vectors of a level to their codes' vectors."""
        features = [h]
        for network in self.reduce:
            features.append(network(features[-1]).to(h.dtype))
        joined: Tensor | None = None
        for i in reversed(range(len(self.quantizers))):
            u = [] if joined is None else [self.expand[i](joined).to(h.dtype)]
            z = self.merge[i](torch.cat([features[i], *u], dim=1)).to(h.dtype)
            joined = torch.cat([quantize(i, z), *u], dim=1)
        assert joined is not None
        return joined

    def forward(self, z_BDHW: Tensor) -> Quantization:
        found: dict[int, Quantization] = {}

        def quantize(i: int, z: Tensor) -> Tensor:
            found[i] = self.quantizers[i](z)
            return found[i].e

        e = self._pass(z_BDHW, quantize)
        top_down = [found[i] for i in reversed(range(len(found)))]
        commitment = top_down[0].commitment
        for one in top_down[1:]:
            commitment = commitment + one.commitment
        k = torch.cat([one.k.flatten(1) for one in top_down], dim=1).unsqueeze(2)
        z = torch.cat([one.z.flatten(2) for one in top_down], dim=2).unsqueeze(3)
        return Quantization(e, k, commitment, z)

    @torch.no_grad()
    def nearest(self, z_BDHW: Tensor) -> Tensor:
        found: list[Tensor] = []

        def quantize(i: int, z: Tensor) -> Tensor:
            k = self.quantizers[i].nearest(z)
            found.append(k.flatten(1))
            return self.quantizers[i].lookup(k)

        self._pass(z_BDHW, quantize)
        return torch.cat(found, dim=1).unsqueeze(2)

    def lookup(self, k_BHW: Tensor) -> Tensor:
        joined: Tensor | None = None
        for i, k in reversed(list(enumerate(self.levels(k_BHW)))):
            e = self.quantizers[i].lookup(k)
            joined = e if joined is None else torch.cat([e, self.expand[i](joined).to(e.dtype)], dim=1)
        assert joined is not None
        return joined

    @torch.no_grad()
    def update(self, z_BDHW: Tensor, k_BHW: Tensor, rng: torch.Generator | None = None) -> Tensor:
        replaced_codes = k_BHW.new_zeros(())
        positions = [size // quantizer.depth for size, quantizer in zip(self.sizes, self.quantizers, strict=True)]
        vectors = z_BDHW[..., 0].split(positions[::-1], dim=2)[::-1]
        for quantizer, z, k in zip(self.quantizers, vectors, self.levels(k_BHW), strict=True):
            z_grid = z.unflatten(2, (k.shape[1], -1))
            replaced_codes = replaced_codes + quantizer.update(z_grid, k, rng)
        return replaced_codes


class VQVAE2(QuantizedAutoencoder):
    """An autoencoder with a hierarchy of codes.

    Args:
        event, condition, encoder, decoder, likelihood: as in ``QuantizedAutoencoder``.
        reduce, expand: factories of the networks between levels, see ``HierarchicalQuantizer``.
        quantizer: factory of the quantiser of a level, by default a codebook of 512 codes of 64 numbers.
        features: channels between the networks, of more than one level.
        levels: number of levels.
        downsampling, tokens: of the finest level, as in ``QuantizedAutoencoder``; every further level has half the sides.
        commitment, sample_likelihood: as in ``QuantizedAutoencoder``.

    Raises:
        ValueError: for images whose sides ``downsampling`` does not divide, and grids that cannot be halved.
    """

    quantizer: HierarchicalQuantizer

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        encoder: Callable[..., nn.Module] = defaults.grid_encoder,
        decoder: Callable[..., nn.Module] = defaults.grid_decoder,
        reduce: Callable[..., nn.Module] = defaults.grid_reducer,
        expand: Callable[..., nn.Module] = defaults.grid_expander,
        likelihood: Likelihood | None = None,
        quantizer: Callable[[], Quantizer] = CODEBOOK,
        features: int = 64,
        levels: int = 2,
        downsampling: int = 2,
        tokens: int = 2,
        commitment: float = 0.25,
        sample_likelihood: bool = False,
    ):
        grids = level_grids(event.shape[1:], downsampling, tokens, levels)
        quantizers = [quantizer() for _ in grids]
        hierarchy = HierarchicalQuantizer(quantizers, grids, features, reduce, expand)
        parts = encoder, decoder, likelihood
        super().__init__(event, condition, hierarchy, *parts, downsampling, tokens, sample_likelihood, commitment)

    @property
    def grids(self) -> list[Grid]:
        """Grids of the codes of each level, the coarsest first."""
        return self.quantizer.grids[::-1]


class LevelPriors(Density, LogitGuided):
    """A prior over a hierarchy of codes, with a factor for each level given the one above.

    Args:
        event: of the sequence of codes, the coarsest level first.
        condition: as in ``GenerativeModel``.
        prior: factory of the prior of a level, called as ``prior(event, condition)``; below the top level its condition is
            the codes above, joined with ``condition``.
        grids: of the levels, the coarsest first.

    Raises:
        ValueError: for priors without a density, and grids of another number of codes.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        prior: Callable[..., GenerativeModel],
        grids: Sequence[Grid],
    ):
        super().__init__(event, condition)
        self.sizes = [height * width for height, width in grids]
        if event.levels is None or sum(self.sizes) != self.dim:
            raise ValueError(f"needs {sum(self.sizes)} codes, not {event}")
        given: list[Condition | None] = [condition]
        for grid in grids[:-1]:
            above = Codes(tuple(grid), event.levels)
            given.append(Joint((above, *([condition] if condition else [])), fixed=1))
        self.grids = [tuple(grid) for grid in grids]
        parts = [prior(EventSpec((1, *grid), event.levels), y) for grid, y in zip(grids, given, strict=True)]
        for part in parts:
            if not isinstance(part, Density):
                raise ValueError(f"prior: {type(part).__name__} has no density; choose transformer or pixelcnn")
        self.priors: Sequence[Density] = nn.ModuleList(parts)  # type: ignore[assignment]
        self.bound, self.num_samples = Bound.EXACT, max(part.num_samples for part in self.priors)
        for part in self.priors:
            self.bound |= part.bound

    def _levels(self, x: Tensor) -> list[Tensor]:
        """Split events into the grids of the levels, (B, 1, N, 1) -> (B, 1, h_l, w_l) each."""
        pieces = x.flatten(1).split(self.sizes, dim=1)
        return [piece.reshape(-1, 1, *grid) for piece, grid in zip(pieces, self.grids, strict=True)]

    def _given(self, i: int, above: Tensor | None, y: Tensor | None) -> Tensor | None:
        """Return the condition of a level: the codes above, (B, 1, h, w), joined with y."""
        if above is None:
            return y
        condition = self.priors[i].condition
        assert isinstance(condition, Joint) and self.levels is not None
        codes = quantize(above[:, 0], self.levels)
        return condition.join(codes, *([] if y is None else [y])).to(above.dtype)

    def _pairs(self, x: Tensor, y: Tensor | None) -> list[tuple[Density, Tensor, Tensor | None]]:
        """Return the prior of each level, its event and its condition."""
        levels = self._levels(x)
        above: list[Tensor | None] = [None, *levels[:-1]]
        return [
            (part, x, self._given(i, up, y))
            for i, (part, x, up) in enumerate(zip(self.priors, levels, above, strict=True))
        ]

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        for part, event, given in self._pairs(x, y):
            part._initialize(event, given, rng)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        total = x.new_zeros(())
        terms: dict[str, Tensor] = {}
        for i, (part, event, given) in enumerate(self._pairs(x, y)):
            loss = part._loss(event, given, rng)
            total = total + loss.total * (part.dim / self.dim)  # a mean over all codes
            terms |= {f"{name}_{i}": term for name, term in loss.terms.items()}
        return Loss(total, terms)

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        values = [part._log_prob(event, given, num_samples, rng).value for part, event, given in self._pairs(x, y)]
        return LogProb(torch.stack(values).sum(0))

    def check_guidance(self) -> None:
        if self.condition is None:
            raise ValueError("guidance: the model is unconditional")
        for part in self.priors:
            if not isinstance(part, LogitGuided):
                raise ValueError(f"guidance: {type(part).__name__} has no logits")
            part.check_guidance()

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Draw the levels in turn, each given the one above."""
        drawn: list[Tensor] = []
        nfe = 0
        for i, part in enumerate(self.priors):
            guided = part if self.guidance_scale == 1 else replaced(part, guidance_scale=self.guidance_scale)
            x, evaluations, _ = guided._sample(n, self._given(i, drawn[-1] if drawn else None, y), rng)
            drawn.append(x)
            nfe += evaluations
        return Samples(torch.cat([x.flatten(1) for x in drawn], dim=1).view(n, *self.shape), nfe)


def vqvae2(
    event: EventSpec,
    condition: Condition | None = None,
    *,
    codec: Callable[..., VQVAE2] = VQVAE2,
    prior: Callable[..., GenerativeModel],
    codec_share: float = 0.5,
) -> LatentModel | LatentDensity:
    """Build a VQ-VAE-2: a codec with a hierarchy of codes, and a prior for each level.

    Args:
        event, condition: as in ``GenerativeModel``.
        codec: factory of the codec, called as ``codec(event, condition)``.
        prior: factory of the prior of a level, as in ``LevelPriors``.
        codec_share: fraction of the training budget for the codec; the rest is for the priors.

    Raises:
        ValueError: for another codec, and an incompatible prior.
    """
    built = codec(event, condition)
    if not isinstance(built, VQVAE2):
        raise ValueError(f"codec: {type(built).__name__} has one level of codes; use model=vqvae, or codec=vqvae2")
    priors = lambda *spec: LevelPriors(*spec, prior=prior, grids=built.grids)  # noqa: E731
    return latent(event, condition, codec=built, prior=priors, codec_share=codec_share)
