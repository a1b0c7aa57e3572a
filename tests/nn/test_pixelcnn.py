"""The gated PixelCNN and the law of all causal networks: each output sees strictly earlier pixels, all of them that it can
reach, and a walk through the pixels says what one look at the whole image says."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels
from genzoo.nn.causal import CausalNetwork
from genzoo.nn.pixelcnn import GatedLayer, PixelCNN
from genzoo.nn.pixelcnnpp import PixelCNNPP
from genzoo.nn.transformer import Transformer

CLASSES = 3
CONDITION = ClassLabels(CLASSES)
NETWORKS = {
    "pixelcnn": functools.partial(PixelCNN, width=6, layers=5, first_kernel=3),
    "pixelcnn-wide": functools.partial(PixelCNN, width=6, layers=2, first_kernel=7, kernel=5),
    "pixelcnn-dilated": functools.partial(PixelCNN, width=6, layers=4, first_kernel=3, dilations=(1, 2, 4)),
    "pixelcnn-one": functools.partial(PixelCNN, width=6, layers=1, first_kernel=5),
    "pixelcnnpp": functools.partial(PixelCNNPP, width=6, resolutions=2, resnets=1, dropout=0.0),
    "pixelcnnpp-flat": functools.partial(PixelCNNPP, width=6, resolutions=1, resnets=2, dropout=0.0),
    "transformer": functools.partial(Transformer, width=8, layers=2, heads=2),
    "transformer-one": functools.partial(Transformer, width=8, layers=1, heads=1),
}
every = pytest.mark.parametrize("name", NETWORKS)
classes = pytest.mark.parametrize("condition", [None, CONDITION], ids=["unconditional", "conditional"])
SHAPE = (2, 4, 6)


def built(
    name: str, condition: ClassLabels | None = None, shape: tuple[int, ...] = SHAPE, outputs: int = 3
) -> CausalNetwork:
    """Build a network in float64 with all weights moved away from where they start."""
    torch.manual_seed(0)
    network = NETWORKS[name](shape, (outputs, *shape[1:]), condition).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return network.eval()


def labels(n: int, condition: ClassLabels | None) -> Tensor | None:
    return torch.arange(n) % condition.n if condition else None


def jacobian(network: CausalNetwork, shape: tuple[int, ...], y: Tensor | None = None) -> Tensor:
    """Largest derivative of any output of pixel i with respect to channel c of pixel j, (pixels, C, pixels).

    The largest at three images, since a rectifier may be shut at one.
    """

    def at(x: Tensor) -> Tensor:
        full = torch.autograd.functional.jacobian(lambda image: network(image, y)[0].flatten(1), x, vectorize=True)
        return full[:, :, 0].flatten(3).abs().amax(0)

    return torch.stack([at(x) for x in torch.randn(3, 1, *shape, dtype=torch.float64)]).amax(0)


def reaches(reach: list[int], shape: tuple[int, ...]) -> Tensor:
    """Which pixels (i, j) see (k, l): above, within a square of layers' reaches, or left in the row; (pixels, pixels)."""
    _, H, W = shape
    i, j, k, m = torch.meshgrid(*map(torch.arange, (H, W, H, W)), indexing="ij")
    total = sum(reach)
    above = (k < i) & (i - k <= total + 1) & ((m - j).abs() <= total)
    left = (k == i) & (m < j) & (j - m <= total + 1)
    return (above | left).reshape(H * W, H * W)


@classes
@every
def test_an_output_sees_every_earlier_pixel_and_no_other(name, condition):
    """All channels of all earlier pixels: small images lie within every network's reach, and no pixel is in a blind spot."""
    derivatives = jacobian(built(name, condition), SHAPE, labels(1, condition))
    pixels = SHAPE[1] * SHAPE[2]
    earlier = torch.ones(pixels, pixels).tril(-1).bool()[:, None].expand(-1, SHAPE[0], -1)
    if name == "pixelcnn-one":  # a kernel of 5 on the image moved by one
        earlier = earlier & reaches([2], SHAPE)[:, None]
    assert torch.equal(derivatives > 0, earlier)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_there_is_no_blind_spot_within_the_reach(layers):
    """On an image larger than the reach, exactly a square above and a line to the left are seen."""
    shape = (1, 9, 9)
    torch.manual_seed(0)
    network = PixelCNN(shape, (1, 9, 9), width=16, layers=layers, first_kernel=3, kernel=3).double()
    assert torch.equal(jacobian(network, shape)[:, 0] > 0, reaches([1] * layers, shape))


@every
def test_a_change_of_a_pixel_however_large_changes_later_outputs_alone(name):
    """Causality of the values themselves, where derivatives could vanish."""
    network = built(name)
    x = torch.randn(1, *SHAPE, dtype=torch.float64)
    for position in (0, 6, 23):
        other = x.clone()
        other.view(1, SHAPE[0], -1)[:, :, position] += 100
        change = (network(other) - network(x)).abs().amax(1).flatten()
        assert bool((change[: position + 1] < 1e-12).all())
        assert bool((change[position + 1 : position + 2] > 1e-4).all())


@classes
@every
def test_a_walk_says_what_a_look_at_the_whole_image_says(name, condition):
    network, y = built(name, condition), labels(3, condition)
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    expected = network(x, y).flatten(2)
    state, pixel = network.incremental(3, y), None
    with torch.no_grad():
        for i in range(expected.shape[2]):
            torch.testing.assert_close(state.step(pixel), expected[..., i], rtol=0, atol=1e-10)
            pixel = x.flatten(2)[..., i]


@every
def test_two_walks_do_not_disturb_each_other(name):
    network = built(name)
    x = torch.randn(2, *SHAPE, dtype=torch.float64).flatten(2)
    with torch.no_grad():
        alone = network.incremental(2)
        expected = [alone.step(x[..., i - 1] if i else None) for i in range(24)]
        first, second = network.incremental(2), network.incremental(2)
        for i in range(24):
            got = first.step(x[..., i - 1] if i else None)
            second.step(x[..., i - 1] + 1 if i else None)
            assert torch.equal(got, expected[i])


@classes
@every
def test_every_weight_works_and_no_example_sees_another(name, condition):
    network, y = built(name, condition), labels(6, condition)
    x = torch.randn(6, *SHAPE, dtype=torch.float64, requires_grad=True)
    out = network(x, y)
    (gradient,) = torch.autograd.grad(out[1].square().sum(), x, retain_graph=True)
    assert (gradient.flatten(1).abs().sum(1) > 0).tolist() == [False, True, False, False, False, False]
    (out * torch.randn_like(out)).sum().backward()
    assert not [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]


@every
def test_the_class_changes_every_output(name):
    network, y = built(name, CONDITION), labels(3, CONDITION)
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    others = torch.stack([network(x, (y + shift) % CLASSES) for shift in range(1, CLASSES)])
    assert (network(x, y) - others).abs().amax((0, 2)).min() > 1e-4


@every
def test_a_row_of_one_pixel_and_a_column_of_one_are_images_too(name):
    for shape in ((1, 6, 1), (1, 1, 6), (1, 1, 1)) if name != "pixelcnnpp" else ((1, 6, 2), (1, 2, 6)):
        network, x = built(name, shape=shape), torch.randn(2, *shape, dtype=torch.float64)
        state = network.incremental(2)
        with torch.no_grad():
            steps = [state.step(x.flatten(2)[..., i - 1] if i else None) for i in range(x[0].numel())]
            torch.testing.assert_close(torch.stack(steps, 2), network(x).flatten(2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("network", [PixelCNN, PixelCNNPP])
def test_the_border_is_no_grey(network):
    """On an image of zeros the border can be told from a pixel: the first output differs from one in the middle."""
    torch.manual_seed(0)
    out = network((1, 8, 8), (4, 8, 8), width=16)(torch.zeros(1, 1, 8, 8))[0]
    for place in ((0, 0), (0, 4), (4, 0)):
        assert (out[:, *place] - out[:, 4, 4]).abs().max() > 1e-4


def test_pixelcnnpp_sees_ones_beside_the_channels_of_the_image():
    network, seen = PixelCNNPP((2, 8, 8), (4, 8, 8), width=4, resnets=1), []
    network.above.register_forward_pre_hook(lambda module, arguments: seen.extend(arguments))
    x = torch.randn(3, 2, 8, 8)
    network(x)
    assert torch.equal(seen[0], torch.cat([x, torch.ones(3, 1, 8, 8)], dim=1))


# The layer against masked convolutions


def masked(weight: Tensor, half: int) -> Tensor:
    """Complete half a kernel to a square one of zeros."""
    side = 2 * half - 1
    full = weight.new_zeros(*weight.shape[:2], side, side)
    rows = slice(0, half) if weight.shape[2] == half and weight.shape[3] == side else slice(half - 1, half)
    full[:, :, rows, : weight.shape[3]] = weight
    return full


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_layer_is_the_paper_s_with_square_masked_kernels(kernel, dilation):
    """Equation 4 with symmetric padding and kernels whose later half is zero, where the layer crops instead."""
    width, half = 4, kernel // 2 + 1
    layer = GatedLayer(width, width, CONDITION, kernel, dilation, dropout=0.0).double()
    v, h = torch.randn(2, 2, width, 7, 6, dtype=torch.float64)
    y = torch.tensor([2, 0])
    reach = dilation * (kernel // 2)

    def conv(x: Tensor, module: nn.Conv2d) -> Tensor:
        return F.conv2d(x, masked(module.weight, half), module.bias, padding=reach, dilation=dilation)

    def gate(x: Tensor) -> Tensor:
        return torch.tanh(x[:, :width]) * torch.sigmoid(x[:, width:])

    e = layer.embed_y.weight[y][:, :, None, None]
    features = conv(v, layer.vertical)
    link = torch.einsum("oc,bchw->bohw", layer.link.weight[..., 0, 0], features) + layer.link.bias.view(-1, 1, 1)
    inner = gate(conv(h, layer.horizontal) + link + e[:, 2 * width :])
    out = torch.einsum("oc,bchw->bohw", layer.out.weight[..., 0, 0], inner) + layer.out.bias.view(-1, 1, 1)

    e_v, e_h = layer.embed(y)
    got_v, got_link = layer.down(F.pad(v, (0, 0, reach, 0)), e_v)
    got_h = layer.right(F.pad(h, (reach, 0)), got_link, e_h)
    torch.testing.assert_close(got_v, gate(features + e[:, : 2 * width]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_h, h + out, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernel": 4}, "must be odd, not 7 and 4"),
        ({"first_kernel": 2}, "must be odd, not 2 and 3"),
        ({"layers": 0}, "must be at least one, not 0"),
        ({"dilations": []}, "must be at least one"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PixelCNN((1, 4, 4), (1, 4, 4), **wrong)


def test_an_image_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="resolutions=3 needs sides divisible by 4, not 6x8"):
        PixelCNNPP((1, 6, 8), (1, 6, 8), width=4)
    with pytest.raises(ValueError, match="must be at least 1, not 3 and 0"):
        PixelCNNPP((1, 8, 8), (1, 8, 8), width=4, resnets=0)


def test_the_network_of_pixelcnnpp_has_the_parameters_that_its_reference_makes():
    """Counted from the layers of the reference, each with the direction and the length of its weights and a bias."""

    def layer(height: int, width: int, inputs: int, outputs: int) -> int:
        return height * width * inputs * outputs + 2 * outputs

    def block(height: int, width: int, beside: int) -> int:
        shortcut = layer(1, 1, 2 * beside, 160) if beside else 0
        return layer(height, width, 320, 160) + shortcut + layer(height, width, 320, 320)

    count = layer(2, 3, 4, 160) + layer(1, 3, 4, 160) + layer(2, 1, 4, 160)  # three colours and a channel of ones
    count += 15 * (block(2, 3, 0) + block(2, 2, 160))  # five at each of three resolutions
    count += 4 * (layer(2, 3, 160, 160) + layer(2, 2, 160, 160))  # two halvings, two doublings
    count += 17 * (block(2, 3, 160) + block(2, 2, 320))  # five, six and six
    count += layer(1, 1, 160, 100)
    with torch.device("meta"):
        network = PixelCNNPP((3, 32, 32), (100, 32, 32))
    assert sum(p.numel() for p in network.parameters()) == count == 53_659_080


def test_dropout_works_in_training_alone():
    network = PixelCNN((1, 4, 4), (1, 4, 4), width=8, layers=2, dropout=0.5)
    x = torch.randn(2, 1, 4, 4)
    assert not torch.equal(network.train()(x), network(x))
    assert torch.equal(network.eval()(x), network(x))
