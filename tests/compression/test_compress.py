"""Every compressible family restores its data to the bit, from files of the size of its negative log-likelihood."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

import genzoo
from genzoo import compression
from genzoo.compression import codes
from genzoo.compression.compress import WHOLE, batch_sizes
from genzoo.compression.container import Container
from genzoo.conditions import ClassLabels, Vector
from genzoo.config.instantiate import build
from genzoo.data import digits
from genzoo.distributions.discretization import bin_center, bits_per_dim, dequantize, quantize
from genzoo.distributions.likelihoods import Categorical, Gaussian
from genzoo.errors import UsageError
from genzoo.families.masked_diffusion import MaskedDiffusion
from genzoo.model import AbilityError, Compressible, GenerativeModel
from genzoo.nn.ladder import Ladder
from genzoo.numerics.random import generator
from tests.commands import described

FILE_BITS = 8 * 40  # of the header, and of the state of a coder


def same(found: compression.Decompressed, x: torch.Tensor, y: torch.Tensor | None, levels: int) -> bool:
    """Whether events and classes are restored to the bit, at the centres of their bins."""
    labels = found.y is None if y is None else torch.equal(found.y, y)
    return labels and torch.equal(found.x, bin_center(quantize(x, levels), levels, x.dtype))


def round_trip(model: Compressible, n: int, batch_size: int = 64) -> compression.Compressed:
    x, y = batch(model, n)
    made = compression.compress(model, x, y, batch_size=batch_size)
    assert same(compression.decompress(model, made.data), x, y, model.levels)
    return made


# Every family


SMALL = {
    "autoregressive": ["model.network.width=8", "model.network.layers=1"],
    "ddpm": ["model.network.channels=8", "model.network.multipliers=[1]", "model.schedule.num_steps=20"],
    "hvae": ["model.network.width=8", "model.network.latent_channels=2", "model.network.up=1", "model.network.down=1"],
    "masked_diffusion": ["model.network.width=16", "model.network.layers=1", "model.network.heads=2"],
    "vae": ["model.encoder.width=8", "model.decoder.width=8", "model.latent_dim=2"],
}
FAMILIES = tuple(SMALL)


@functools.cache
def built(family: str, *words: str) -> GenerativeModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(described(f"model={family}", *SMALL.get(family, []), *words)["model"], "model")
    with torch.no_grad():  # move every weight away from where it starts
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator("moved"))
    return model.eval()


def small(family: str, *words: str, conditional: bool = False) -> GenerativeModel:
    classes = ["data.conditional=true"] if conditional else []
    return copy.deepcopy(built(family, "data=digits", *words, *classes))


def batch(model: GenerativeModel, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Make up images, and classes for a conditional model."""
    x = dequantize(
        torch.randint(model.levels, (n, *model.shape), generator=generator("k")), model.levels, generator("u")
    )
    return x, torch.arange(n) % model.condition.n if model.condition else None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(("n", "batch_size"), [(1, 64), (6, 4)])
def test_grey_images_and_classes_are_restored_to_the_bit(family, conditional, n, batch_size):
    model = small(family, conditional=conditional)
    made = round_trip(model, n, batch_size)
    assert made.n == n and made.bits_per_dim == 8 * len(made.data) / (n * model.dim)
    assert bool(made.label_bits) == conditional
    assert bool(made.initial_bits) == (compression.kind_of_code(model) == "bits back")


@pytest.mark.parametrize("family", FAMILIES)
def test_colour_images_are_restored_to_the_bit(family):
    round_trip(small(family, "data.shape=[3,4,4]", "data.levels=6"), 5, 2)


def test_pixels_in_blocks_are_restored_to_the_bit():
    model = genzoo.Autoregressive((3, 4, 4), levels=5, patch=2)
    round_trip(model, 3)


@pytest.mark.parametrize("family", ["realnvp", "vqvae", "gan", "score_sde"])
def test_other_families_are_refused_in_one_line(family):
    model = small(family)
    assert not isinstance(model, Compressible) and compression.kind_of_code(model) == ""
    with pytest.raises(AbilityError, match=r"^\w+ has no lossless code: choose autoregressive, [^\n]+$"):
        compression.compress(model, *batch(model, 2))


@pytest.mark.parametrize("family", ["autoregressive", "ddpm", "vae"])
def test_vectors_are_refused_in_one_line(family):
    model = build(described(f"model={family}", "data=moons")["model"], "model")
    with pytest.raises(AbilityError, match="real vectors have no lossless code"):
        compression.compress(model, torch.zeros(2, 2))


# The size of a file


@functools.cache
def examples() -> torch.Tensor:
    return bin_center(digits().test.x, 17)


def bound(model: Compressible, x: torch.Tensor, draws: int, num_samples: int) -> float:
    """Return the bits/dim of the bound, averaged over draws, in float64."""
    model, rng = copy.deepcopy(model).double(), generator("bound")
    with torch.no_grad():
        log_p = [model.log_prob(x.double(), num_samples=num_samples, rng=rng).value for _ in range(draws)]
    return float(bits_per_dim(torch.stack(log_p), model.dim, model.levels).mean())


@pytest.mark.parametrize(
    ("family", "n", "draws", "num_samples"),
    [("autoregressive", 40, 1, 1), ("vae", 360, 8, 1), ("hvae", 200, 8, 1), ("masked_diffusion", 60, 3, 20),
     ("ddpm", 40, 3, 40)],
)  # fmt: skip
def test_a_file_has_the_size_of_the_bound(family, n, draws, num_samples):
    """Bits back attain the bound of one sample; of ddpm and masked_diffusion its expectation over all terms."""
    model, x = small(family), examples()[:n]
    made = compression.compress(model, x)
    assert same(compression.decompress(model, made.data), x, None, 17)
    payload = 8 * len(made.data) - made.initial_bits - FILE_BITS / 2
    expected = bound(model, x, draws, num_samples) * n * model.dim
    assert payload == pytest.approx(expected, rel=0.01, abs=FILE_BITS / 2)


def test_the_classes_are_part_of_the_file():
    model = small("vae", conditional=True)
    model.conditioner.fit(torch.tensor([3] * 63 + [4]))
    x, _ = batch(model, 64)
    common, rare = torch.full((64,), 3), torch.full((64,), 4)
    made = [compression.compress(model, x, y) for y in (common, rare)]
    assert made[0].label_bits == pytest.approx(64 * math.log2(64 / 63), rel=1e-3)
    assert made[1].label_bits == pytest.approx(64 * 6, rel=1e-3)
    assert same(compression.decompress(model, made[1].data), x, rare, 17)


def test_a_latent_whose_posterior_is_the_prior_costs_nothing():
    """With zero-initialised posteriors the noise of no layer is drawn, and the stack begins with its two words."""
    model = genzoo.HVAE((1, 8, 8), levels=17, network=functools.partial(Ladder, width=8, latent_channels=2)).eval()
    with torch.no_grad():
        for rung in model.network.rungs:
            for part in (rung.of_posterior, rung.of_prior):
                for p in part[-1].parameters():
                    p.zero_()
    made = compression.compress(model, examples()[:5])
    assert made.initial_bits == 64
    assert same(compression.decompress(model, made.data), examples()[:5], None, 17)


def test_the_lattice_of_a_latent_follows_its_posterior():
    model = small("vae").double()
    with torch.no_grad():
        last = [m for m in model.encoder.modules() if isinstance(m, nn.Linear)][-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.0, 1.0, 2 * math.log(0.3), 2 * math.log(0.01)]))
    assert codes._spacings(model)[0].tolist() == [2**-4, 2**-9]  # a quarter of 0.3 and 0.01 or less


def test_batches_grow_no_faster_than_the_stack():
    assert list(batch_sizes(20, 8, WHOLE)) == [8, 8, 4]
    assert list(batch_sizes(20, 8, 0)) == [1, 1, 2, 4, 8, 4]
    assert list(batch_sizes(12, 8, 2)) == [1] * 8 + [2, 2]
    for n in (1, 7, 100):
        assert sum(batch_sizes(n, 8, 1)) == n
    model, x = small("vae"), examples()
    together = compression.compress(model, x)
    assert together.initial_bits <= 2 * compression.compress(model, x[:1]).initial_bits


# Agreement of encoder and decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_with_other_threads_and_rounding_errors_restores_every_bit(family):
    """Each layer of the decoder's networks errs by 1e-13, a hundred times as much as sums in another order."""
    model, x = small(family), examples()[:24]
    made = compression.compress(model, x)
    other = copy.deepcopy(model)
    rng = generator("errors")

    def err(module: nn.Module, inputs, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=rng, dtype=torch.float64)
        return output * (1 + 1e-13 * noise).to(output.dtype)

    for module in other.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(err)
    torch.set_num_threads(2)
    try:
        assert same(compression.decompress(other, made.data), x, None, 17)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_encoder_and_decoder_use_the_same_number_of_threads():
    model, used = small("vae"), []
    made = compression.compress(model, examples()[:2])
    assert Container.from_bytes(made.data, "file").threads == 1

    torch.set_num_threads(2)
    try:
        other = copy.deepcopy(model)
        other.decoder.register_forward_pre_hook(lambda module, inputs: used.append(torch.get_num_threads()))
        compression.decompress(other, made.data)
    finally:
        torch.set_num_threads(1)
    assert set(used) == {1}


@pytest.mark.parametrize("family", ["autoregressive", "vae", "ddpm"])
def test_a_decoder_that_disagrees_says_so(family):
    model, x = small(family), examples()[:4]
    made = compression.compress(model, x)
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(UsageError, match=r"^here\.gzc: cannot be restored here: [^\n]+$"):
        compression.decompress(other, made.data, "here.gzc")


def test_a_model_keeps_its_precision_and_mode():
    model = small("vae").train()
    compression.compress(model, examples()[:2])
    assert model.training and next(model.parameters()).dtype == torch.float32


# Refusals


def test_another_model_is_refused():
    model, x = small("vae"), examples()[:3]
    made = compression.compress(model, x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(UsageError, match=r"^data: was compressed by another model[^\n]+VAE$"):
        compression.decompress(other, made.data)
    with pytest.raises(UsageError, match="by another model"):
        compression.decompress(small("hvae"), made.data)


def test_damaged_files_are_refused_wherever_the_damage_is():
    model = small("vae")
    made = compression.compress(model, examples()[:2]).data
    for place in range(len(made)):
        damaged = bytearray(made)
        damaged[place] ^= 0x10
        with pytest.raises(UsageError, match=r"^f: (is damaged|is not a file|has version)[^\n]+$"):
            compression.decompress(model, bytes(damaged), "f")
    for broken in (b"", made[:5], made[:-1], made + b"\0", b"PK" + made):
        with pytest.raises(UsageError, match=r"^f: (is damaged|is not a file)"):
            compression.decompress(model, broken, "f")


@pytest.mark.parametrize("change", [{"n": 2**40}, {"shape": ()}, {"shape": (2,)}, {"levels": 0}, {"batch_size": 0},
                                    {"threads": 0}, {"levels": 5}, {"classes": 3}])  # fmt: skip
def test_headers_that_do_not_fit_are_refused(change):
    model = small("vae")
    file = Container.from_bytes(compression.compress(model, examples()[:2]).data, "f")
    with pytest.raises(UsageError, match="f: has an invalid header"):
        compression.decompress(model, file._replace(**change).to_bytes(), "f")


def test_no_examples_and_unsuitable_models_are_refused_in_one_line():
    model = small("vae")
    with pytest.raises(UsageError, match="no examples"):
        compression.compress(model, examples()[:0])
    vector = genzoo.VAE((1, 8, 8), Vector(3), levels=17)
    with pytest.raises(AbilityError, match=r"condition Vector.* are not compressed"):
        compression.compress(vector, examples()[:2], torch.zeros(2, 3))
    density = genzoo.VAE((1, 8, 8), levels=17, likelihood=Gaussian())
    with pytest.raises(AbilityError, match="VAE has no lossless code: Gaussian has no probabilities of levels"):
        compression.compress(density, examples()[:2])
    uniform = MaskedDiffusion((1, 8, 8), levels=17, likelihood=Categorical, noise="uniform")
    with pytest.raises(AbilityError, match=r"no lossless code: noise=uniform .* model\.noise=mask"):
        compression.compress(uniform, examples()[:2])
    classes = genzoo.VAE((1, 8, 8), ClassLabels(10), levels=17)
    with pytest.raises(ValueError, match="y"):
        compression.compress(classes, examples()[:2])
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(math.nan)
    with pytest.raises(UsageError, match=r"VAE cannot compress these examples: the model has .* NaN"):
        compression.compress(model, examples()[:2])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(compression.streams, "constriction", None)
    with pytest.raises(UsageError, match=r"pip install 'genzoo\[compress\]'"):
        compression.compress(small("vae"), examples()[:2])


# From Python


def test_the_python_interface_takes_models_and_arrays():
    model, x = small("autoregressive"), examples()[:5]
    made = genzoo.compress(model, x.numpy(), batch_size=2)
    assert same(genzoo.decompress(model, made.data), x, None, 17)
    with pytest.raises(UsageError, match=r"x: torch\.int64 values, not floats"):
        genzoo.compress(model, digits().test.x.long())
    with pytest.raises(UsageError, match="batch_size=0"):
        genzoo.compress(model, x, batch_size=0)
