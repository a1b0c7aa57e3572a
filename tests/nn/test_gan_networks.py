"""The networks of DCGAN, WGAN-GP and SNGAN: what they compute, their sizes, and the norm of their weights.

Sizes are held against sums over the layers that the papers list, spectral norms against singular values from LAPACK,
conditional batch norm and the projection against their formulas.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels
from genzoo.nn.dcgan import DCGANCritic, DCGANGenerator
from genzoo.nn.resgan import ConditionalBatchNorm, ResNetCritic, ResNetGenerator
from genzoo.training.ema import EMA

CLASSES = 3
IMAGE = (2, 16, 16)
GENERATORS: dict[str, Callable[..., nn.Module]] = {
    "dcgan": functools.partial(DCGANGenerator, width=4),
    "resnet": functools.partial(ResNetGenerator, width=6),
}
CRITICS: dict[str, Callable[..., nn.Module]] = {
    "dcgan": functools.partial(DCGANCritic, width=4),
    "dcgan-plain": functools.partial(DCGANCritic, width=4, norm=False),
    "dcgan-refined": functools.partial(DCGANCritic, width=4, refine=True, norm=False),
    "dcgan-spectral": functools.partial(DCGANCritic, width=4, refine=True, norm=False, spectral_norm=True),
    "resnet": functools.partial(ResNetCritic, width=6),
    "resnet-spectral": functools.partial(ResNetCritic, width=6, spectral_norm=True, pool="sum"),
}
each = pytest.mark.parametrize("name", [*GENERATORS, *(f"critic-{name}" for name in CRITICS)])
CONDITION = ClassLabels(CLASSES)
classes = pytest.mark.parametrize("condition", [None, CONDITION], ids=["unconditional", "conditional"])
spectral = pytest.mark.parametrize("name", [name for name in CRITICS if "spectral" in name])


def built(name: str, condition: ClassLabels | None = None) -> tuple[nn.Module, Tensor]:
    """Build a network in float64 with its weights moved, and an input of 5."""
    torch.manual_seed(0)
    if name in GENERATORS:
        network, x = GENERATORS[name]((7,), IMAGE, condition), torch.randn(5, 7)
    else:
        network, x = CRITICS[name.removeprefix("critic-")](IMAGE, (1,), condition), torch.randn(5, *IMAGE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network.double(), x.double()


def labels(condition: ClassLabels | None, n: int = 5) -> tuple[Tensor, ...]:
    return (torch.arange(n) % condition.n,) if condition else ()


@classes
@each
def test_every_weight_works(name, condition):
    network, x = built(name, condition)
    out = network(x, *labels(condition))
    assert out.shape == ((5, *IMAGE) if name in GENERATORS else (5, 1))
    (out * torch.randn_like(out)).sum().backward()
    assert not [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]


@each
def test_the_class_changes_the_output(name):
    network, x = built(name, CONDITION)
    (y,) = labels(CONDITION)
    network.eval()
    change = (network(x, y) - network(x, (y + 1) % CLASSES)).flatten(1).abs().amax(1)
    assert change.min() > 1e-3


@classes
@each
def test_no_example_sees_another_but_through_batch_norm(name, condition):
    """A generator in use has its running statistics; a critic has none, so that one with batch norm always sees a batch."""
    network, x = built(name, condition)
    if name in GENERATORS:
        network.eval()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, *labels(condition))[1].square().sum(), x)
    reached = (gradient.flatten(1).abs().sum(1) > 0).tolist()
    assert reached == ([True] * 5 if name == "critic-dcgan" else [False, True, False, False, False])


@classes
@pytest.mark.parametrize("side", [1, 2, 7, 8, 28, 33])
def test_networks_fit_any_side(side, condition):
    shape = (3, side, side)
    for build in GENERATORS.values():
        network = build((5,), shape, condition)
        out = network(torch.randn(4, 5), *labels(condition, 4))
        assert out.shape == (4, *shape)
        out.square().sum().backward()
        assert not [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        assert bool(condition) == any(p.shape[0] == CLASSES for p in network.parameters() if p.ndim == 2), "no classes"
    for build in CRITICS.values():
        x = torch.randn(4, *shape, requires_grad=True)
        out = build(shape, (1,), condition)(x, *labels(condition, 4))
        assert out.shape == (4, 1)
        out.square().sum().backward()
        assert bool((x.grad != 0).any(0).all()), "some pixel does not count"


# Sizes


def conv(before: int, after: int, kernel: int, bias: bool = True) -> int:
    return before * after * kernel**2 + after * bias


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("width", [128, 256])
def test_the_residual_generator_has_the_layers_of_its_papers(width):
    """Dense to 4x4; three doubling blocks of two 3x3 convolutions, a 1x1 one and two batch norms; batch norm; 3x3 to RGB."""
    block = 2 * conv(width, width, 3) + conv(width, width, 1) + 2 * 2 * width
    expected = 129 * 16 * width + 3 * block + 2 * width + conv(width, 3, 3)
    with torch.device("meta"):
        assert count(ResNetGenerator((128,), (3, 32, 32), width=width)) == expected


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_the_residual_critic_has_the_layers_of_its_papers(spectral_norm):
    """A block at the image, one more that halves, two that do not and so keep their input as it is; dense."""
    expected = conv(3, 128, 3) + conv(128, 128, 3) + conv(3, 128, 1)
    expected += 2 * conv(128, 128, 3) + conv(128, 128, 1) + 2 * 2 * conv(128, 128, 3) + 129
    assert count(ResNetCritic((3, 32, 32), (1,), spectral_norm=spectral_norm)) == expected


def test_the_convolutional_networks_have_the_layers_of_their_papers():
    with torch.device("meta"):
        generator = DCGANGenerator((100,), (3, 32, 32), width=64)
        strided = DCGANCritic((3, 64, 64), (1,), width=64)
        refined = DCGANCritic((3, 32, 32), (1,), width=64, refine=True, norm=False)
    widths = [512, 256, 128, 64]
    transposed = sum(conv(a, b, 4, bias=False) for a, b in itertools.pairwise(widths))
    assert count(generator) == 101 * 512 * 16 + transposed + 2 * sum(widths) + conv(64, 3, 3)
    # Radford's: 64x64 to 4x4 in four strided convolutions, all but the first with batch norm instead of a bias.
    expected = conv(3, 64, 4) + sum(conv(w, 2 * w, 4, bias=False) + 2 * 2 * w for w in (64, 128, 256)) + 512 * 16 + 1
    assert count(strided) == expected
    # Miyato's, table 3: 3x3 at full resolution, then 4x4 with stride 2 and 3x3, down to 4x4.
    expected = conv(3, 64, 3) + sum(conv(w, 2 * w, 4) + conv(2 * w, 2 * w, 3) for w in (64, 128, 256)) + 512 * 16 + 1
    assert count(refined) == expected


def test_weights_of_dcgan_start_with_its_standard_deviation():
    for network in (DCGANGenerator((100,), (3, 32, 32)), DCGANCritic((3, 32, 32), (1,))):
        for name, weight in network.named_parameters():
            if name.endswith("weight") and weight.ndim > 1 and weight.numel() > 5000:
                assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: ResNetCritic(IMAGE, (1,), pool="max"), "pool must be 'mean' or 'sum', not 'max'"),
        (lambda: ResNetCritic(IMAGE, (1,), blocks=0), "blocks must be at least 1, not 0"),
    ],
)
def test_impossible_networks_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# Classes


def test_conditional_batch_norm_is_a_gain_and_a_shift_for_each_class():
    layer = ConditionalBatchNorm(4, CONDITION).double()
    nn.init.normal_(layer.gain.weight)
    nn.init.normal_(layer.shift.weight)
    h, y = 3 * torch.randn(6, 4, 5, 5, dtype=torch.float64) + 1, torch.tensor([0, 1, 2, 2, 1, 0])
    mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), unbiased=False, keepdim=True)
    normed = (h - mean) / (variance + 1e-5).sqrt()
    expected = torch.stack(
        [
            layer.gain.weight[c][:, None, None] * normed[i] + layer.shift.weight[c][:, None, None]
            for i, c in enumerate(y)
        ]
    )
    torch.testing.assert_close(layer(h, y), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_the_class_enters_the_residual_critic_by_a_projection(pool):
    """Miyato, Koyama 2018, eq. 3: D(x, y) = y^T V phi(x) + psi(phi(x))."""
    critic = ResNetCritic(IMAGE, (1,), CONDITION, width=6, pool=pool).double()
    x, y = torch.randn(4, *IMAGE, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    phi = critic.blocks(x).relu().flatten(2)
    phi = phi.sum(2) if pool == "sum" else phi.mean(2)
    onehot = nn.functional.one_hot(y, CLASSES).double()
    expected = torch.einsum("bk,kc,bc->b", onehot, critic.embed_y.weight, phi) + phi @ critic.head.weight[0]
    torch.testing.assert_close(critic(x, y)[:, 0], expected + critic.head.bias, rtol=1e-10, atol=1e-10)


# Spectral norm


def matrices(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights in use, each as a matrix with a row for each output."""
    layers = {name: m for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))}
    return {name: layer.weight.detach().flatten(1) for name, layer in layers.items()}


@spectral
def test_power_iteration_brings_every_largest_singular_value_to_one(name):
    network, x = built(f"critic-{name}", CONDITION)
    before = {layer: float(torch.linalg.svdvals(w)[0]) for layer, w in matrices(network).items()}
    for _ in range(300):
        network(x, *labels(CONDITION))
    network.eval()
    for layer, weight in matrices(network).items():
        assert float(torch.linalg.svdvals(weight)[0]) == pytest.approx(1, abs=1e-3), layer
    assert max(abs(value - 1) for value in before.values()) > 1e-2, "there was nothing to do"


@spectral
def test_without_it_weights_are_what_they_are(name):
    network, _ = built(f"critic-{name.split('-')[0]}")
    assert not [m for m in network.modules() if nn.utils.parametrize.is_parametrized(m)]


@spectral
def test_only_training_iterates(name):
    network, x = built(f"critic-{name}", CONDITION)
    state = copy.deepcopy(network.state_dict())
    network.eval()
    out = network(x, *labels(CONDITION))
    assert torch.equal(network(x, *labels(CONDITION)), out)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    network.train()(x, *labels(CONDITION))
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, state[key])}
    # The embedding and the head have rank one or few rows, and may have been found already.
    assert changed and all(key.endswith(("._u", "._v")) for key in changed)


@spectral
def test_the_state_of_a_spectral_norm_is_saved_copied_and_averaged(name):
    network, x = built(f"critic-{name}", CONDITION)
    other, _ = built(f"critic-{name}", CONDITION)
    ema = EMA(network, 0.9)
    ema.watch("critic", network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter)
    network(x, *labels(CONDITION))
    ema.update("critic")  # the first update copies
    network.eval(), other.eval()
    out = network(x, *labels(CONDITION))
    assert torch.equal(ema.model(x, *labels(CONDITION)), out)
    assert torch.equal(copy.deepcopy(network)(x, *labels(CONDITION)), out)
    assert not torch.equal(other(x, *labels(CONDITION)), out)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x, *labels(CONDITION)), out)
    assert "parametrizations.weight.original" in " ".join(network.state_dict())


@spectral
def test_half_precision_keeps_the_norm_well_enough(name):
    network, x = built(f"critic-{name}", CONDITION)
    network, x = network.float(), x.float()
    for _ in range(100):
        network(x, *labels(CONDITION))
    exact = network.eval()(x, *labels(CONDITION))
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):
            half = network(x, *labels(CONDITION))
    half.float().sum().backward()
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.05 * float(exact.detach().abs().max()))
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())
