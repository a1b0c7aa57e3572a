"""Randomness by name: a draw is a function of its name alone, sample ``i`` of seed and i; streams are independent."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from genzoo.prob.random import SampleStreams, categorical, choose, dither, generator, rand, randint, randn, seed_of


def test_the_seed_of_a_name_never_changes():
    """Pinned: a change would end the reproducibility of every run that was ever made."""
    assert seed_of("noise", 0, 1, 2) == 4389219087741731385
    assert seed_of("samples", 17) == 8041214889936672484
    digest = hashlib.blake2b(b"('order', 3, 4)", digest_size=8).digest()
    assert seed_of("order", 3, 4) == int.from_bytes(digest, "little") // 2


def test_names_that_read_alike_have_seeds_of_their_own():
    names = [("a", 1, 2), ("a", 12), ("a", 2, 1), ("a1", 2), ("a", "1", 2), ("a",), ("a", 1, 2, 0), (1, 2)]
    assert len({seed_of(*name) for name in names}) == len(names)


def test_generators_of_one_name_draw_alike():
    assert torch.equal(torch.randn(9, generator=generator("x", 1)), torch.randn(9, generator=generator("x", 1)))
    assert not torch.equal(torch.randn(9, generator=generator("x", 1)), torch.randn(9, generator=generator("x", 2)))


def mixture(rng: SampleStreams, n: int) -> torch.Tensor:
    """What a family draws: noise of several shapes and laws, among them more numbers than a stream buffers at once."""
    draws = [randn((n, 2), rng=rng), rand((n,), rng=rng), randn((n, 3, 5, 5), rng=rng), randint(10, (n,), rng=rng)]
    draws += [randn((n, 700), rng=rng), randn((n, 700), rng=rng), randn((n, 3000), rng=rng), rand((n, 1500), rng=rng)]
    draws += [randn((n, 1), rng=rng), rand((n, 1), rng=rng), randn((n, 0), rng=rng)]
    return torch.cat([draw.double().reshape(n, -1) for draw in draws], dim=1)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7], [1, 3, 8]], ids=str)
def test_sample_i_is_a_function_of_the_seed_and_i_whatever_the_batches(sizes):
    whole = mixture(SampleStreams(5, range(12)), 12)
    parts, start = [], 0
    for size in sizes:
        parts.append(mixture(SampleStreams(5, range(start, start + size)), size))
        start += size
    assert torch.equal(torch.cat(parts), whole)


def test_samples_may_be_drawn_in_any_order():
    order = [7, 0, 11, 3]
    assert torch.equal(mixture(SampleStreams(5, order), 4), mixture(SampleStreams(5, range(12)), 12)[order])


def test_another_seed_gives_other_samples():
    assert not torch.equal(mixture(SampleStreams(5, [0]), 1)[0, :2], mixture(SampleStreams(6, [0]), 1)[0, :2])


def test_no_number_of_a_stream_is_handed_out_twice():
    rng = SampleStreams(0, range(2))
    drawn = torch.cat([randn((2, n), rng=rng) for n in (1, 1000, 23, 1, 2000, 5)], dim=1)
    assert len(drawn.unique()) >= drawn.numel() - 2


def test_streams_are_standard_normal_and_uncorrelated():
    n, length = 40, 10_000
    rng = SampleStreams(1, range(n))
    z = torch.cat([randn((n, length), rng=rng), rand((n, length), rng=rng) * math.sqrt(12) - math.sqrt(3)]).double()
    gram = z @ z.T / length
    noise = 5 / math.sqrt(length)
    assert z.mean(1).abs().max() < noise
    # The variance of z^2 is 2 for normal noise and 0.8 for uniform noise.
    assert (gram.diag() - 1).abs().max() < math.sqrt(2) * noise
    assert (gram - gram.diag().diag()).abs().max() < noise
    lagged = (z[:, 1:] * z[:, :-1]).mean(1)
    assert lagged.abs().max() < noise


def test_noise_for_another_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="for 3 samples, not 4"):
        randn((4, 2), rng=SampleStreams(0, range(3)))


def test_an_ordinary_generator_draws_what_torch_draws():
    expected = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(randn((3, 2), rng=torch.Generator().manual_seed(1), dtype=torch.float64), expected)
    torch.manual_seed(1)
    expected = torch.rand(3, 2)
    torch.manual_seed(1)
    assert torch.equal(rand((3, 2)), expected)


def test_dither_is_uniform_on_the_middles_of_65536_intervals_and_each_number_is_drawn_for_itself():
    u = dither((3, 400_001), rng=generator("dither"))
    assert u.shape == (3, 400_001)
    assert u.dtype == torch.float32
    places = u.double().flatten() * 2**16 - 0.5
    assert torch.equal(places, places.round())
    assert places.min() >= 0
    assert places.max() <= 2**16 - 1
    n = len(places)
    counts = places.long().bincount(minlength=2**16).double()
    chi_squared = float(((counts - n / 2**16) ** 2 / (n / 2**16)).sum())
    assert abs(chi_squared - 65535) < 5 * math.sqrt(2 * 65535)
    high, low = places.div(256, rounding_mode="floor") - 127.5, places.remainder(256) - 127.5
    for lag in range(1, 9):  # four neighbours come from one draw
        for a, b in ((high, high), (low, low), (high, low), (low, high)):
            correlation = float((a[lag:] * b[:-lag]).mean() / (a.std() * b.std()))
            assert abs(correlation) < 5 / math.sqrt(n)


def test_dither_of_streams_is_their_uniform_noise():
    assert torch.equal(dither((2, 5), rng=SampleStreams(1, range(2))), rand((2, 5), rng=SampleStreams(1, range(2))))


def test_integers_are_uniform_and_stay_below_their_bound():
    counts = randint(7, (70_000,), rng=generator("integers")).bincount(minlength=7)
    assert len(counts) == 7
    assert (counts - 10_000).abs().max() < 5 * math.sqrt(10_000)


def test_integers_of_no_sample_are_those_of_an_ordinary_generator_however_many_samples_there_are():
    assert torch.equal(choose(9, 50, rng=generator("places")), randint(9, (50,), rng=generator("places")))
    places = choose(9, 50, rng=SampleStreams(3, range(4)))
    assert torch.equal(choose(9, 50, rng=SampleStreams(3, range(2))), places), "the first sample names the stream"
    assert not torch.equal(choose(9, 50, rng=SampleStreams(3, range(1, 4))), places)


def test_classes_are_drawn_as_often_as_asked():
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0])
    n = 100_000
    counts = categorical(probs, n, rng=generator("classes")).bincount(minlength=5)
    assert counts[1] == counts[4] == 0
    assert ((counts / n - probs).abs() <= 5 * torch.sqrt(probs * (1 - probs) / n)).all()


def test_frequencies_need_not_sum_to_one():
    probs = torch.tensor([1.0, 3.0])
    assert torch.equal(categorical(probs, 50, rng=generator(1)), categorical(probs / 4, 50, rng=generator(1)))


def test_the_class_of_sample_i_depends_on_i_alone():
    probs = torch.full((10,), 0.1)
    whole = categorical(probs, 8, rng=SampleStreams(2, range(8)))
    assert categorical(probs, 1, rng=SampleStreams(2, [5])) == whole[5]
