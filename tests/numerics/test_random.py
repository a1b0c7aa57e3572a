"""Randomness by name: a draw is a function of its name alone, sample ``i`` of seed and i; streams are independent."""

from __future__ import annotations

import copy
import hashlib
import math

import numpy as np
import pytest
import scipy.stats
import torch

from genzoo.distributions.discretization import dequantize
from genzoo.numerics import distributed, random
from genzoo.numerics.random import (
    SampleStreams,
    _fill_normal,
    _fill_uniform,
    batch_generator,
    categorical,
    dither,
    generator,
    philox,
    rand,
    rand_systematic,
    randint,
    randint_shared,
    randn,
    reseed,
    seed_of,
)

# Whose seeds agree in their lower 32 bits.
PAIRS = [("noise", (18836, 25917)), ("layers", (116796, 153204)), ("order", (3601, 88048))]


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


@pytest.mark.parametrize(("kind", "pair"), PAIRS)
def test_streams_depend_on_all_bits_of_a_seed(kind, pair):
    """torch takes the lower 32 bits of a CPU generator's seed, in which these names agree."""
    names = [(kind, 0, i) for i in pair]
    assert len({seed_of(*name) % 2**32 for name in names}) == 1
    draws = [torch.rand(1000, generator=generator(*name)).double() for name in names]
    assert (draws[0] != draws[1]).double().mean() > 0.99
    for name, expected in zip(names, draws, strict=True):
        with torch.random.fork_rng(devices=[]):
            reseed(torch.default_generator, *name)
            assert torch.equal(torch.rand(1000).double(), expected)


@pytest.mark.parametrize(
    ("name", "hashed", "counter"),
    [
        (("noise", 3, 4), b"('noise', 3, 0)", 4),
        (("noise", 3, 5 * 2**32 + 9), b"('noise', 3, 5)", 9),
        (("weights", 2**63 - 1), b"('weights', 2147483647)", 2**32 - 1),
        (("gallery", "moons"), b"('gallery', 'moons')", 0),
        ((7,), b"(0,)", 7),
    ],
)
def test_a_stream_is_the_mersenne_twister_with_its_state_hashed_from_the_name(name, hashed, counter):
    """Pinned, by numpy's twister: a change would end the reproducibility of runs."""
    words = [counter]
    for i in range(1, 624):  # init_genrand of mt19937ar.c
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + i) % 2**32)
    drawn = np.frombuffer(hashlib.shake_128(hashed).digest(4 * 624), "<u4")
    twister = np.random.MT19937(0)
    key = ((drawn.astype(np.uint64) + np.array(words, dtype=np.uint64)) % 2**32).astype(np.uint32)
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    raw = torch.from_numpy(twister.random_raw(2000).astype(np.int64))
    assert torch.equal(torch.rand(2000, generator=generator(*name)), (raw % 2**24).float() * 2.0**-24)


def test_names_that_read_alike_have_streams_of_their_own():
    names = [("a",), ("a", 0), ("a", "0"), ("a", 0, 0), (0, "a"), ("a", 2**32), ("a", 1), ("a", -1), (0,), (1,)]
    first = [tuple(torch.rand(4, generator=generator(*name)).tolist()) for name in names]
    assert len(set(first)) == len(names)


def test_reseeding_forgets_what_was_drawn_before():
    rng = generator("a")
    for shape in ((), (3,), (17,), (1000,)):  # among them half of a pair of normal numbers
        torch.randn(shape, generator=rng)
        reseed(rng, "b")
        assert torch.equal(torch.randn((), generator=rng), torch.randn((), generator=generator("b")))
        torch.randn((), generator=rng, dtype=torch.float64)
        reseed(rng, "b")
        again = torch.randn((), generator=rng, dtype=torch.float64)
        assert torch.equal(again, torch.randn((), generator=generator("b"), dtype=torch.float64))


# Batches that several processes share


DRAWS = {
    "normal": lambda rng, n: randn((n, 3, 5), rng=rng),
    "normal of a few": lambda rng, n: randn((n,), rng=rng),
    "normal in double precision": lambda rng, n: randn((n, 7), rng=rng, dtype=torch.float64),
    "uniform": lambda rng, n: rand((n, 2), rng=rng),
    "integers": lambda rng, n: randint(1000, (n, 3), rng=rng),
    "dither": lambda rng, n: dither((n, 3, 7), rng=rng),
    "classes": lambda rng, n: categorical(torch.tensor([0.3, 0.2, 0.5]), n, rng=rng),
    "nothing": lambda rng, n: randn((n, 0), rng=rng),
    "levels": lambda rng, n: dequantize(torch.full((n, 5), 3), 17, rng),
}


@pytest.mark.parametrize("share", [1, 5])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_that_share_a_batch_draw_the_rows_of_their_examples(monkeypatch, world, share):
    n = world * share
    alone = batch_generator("noise", 1, 2)
    assert type(alone) is torch.Generator
    whole = {name: draw(alone, n) for name, draw in DRAWS.items()}
    places = randint_shared(9, 50, rng=alone)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rng = batch_generator("noise", 1, 2)
        assert isinstance(rng, torch.Generator)
        parts.append({name: draw(rng, share) for name, draw in DRAWS.items()})
        assert torch.equal(randint_shared(9, 50, rng=rng), places), "what belongs to no example is the same for all"
    for name, expected in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), expected), name


# Streams of samples


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 with Python's integers, as section 3.3 and figure 2 of Salmon et al. define it."""
    left, right = [counter[0], counter[2]], [counter[1], counter[3]]
    for number in range(10):
        keys = [(k + number * weyl) % 2**32 for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        high, low = zip(
            *(divmod(m * c, 2**32) for m, c in zip((0xD2511F53, 0xCD9E8D57), left, strict=True)), strict=True
        )
        left = [high[1] ^ right[0] ^ keys[0], high[0] ^ right[1] ^ keys[1]]
        right = [low[1], low[0]]
    return [left[0], right[0], left[1], right[1]]


# Of the authors' Random123, kat_vectors.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(kind, counter, key, expected):
    words, k, answer = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    given = [kind([word]) for word in words]
    assert [word.item() for word in philox(given, (k[0], k[1]))] == answer == philox_by_hand(words, k)
    assert [word.item() for word in given] == words, "the counter is the caller's"


@pytest.mark.parametrize("axes", range(16))
def test_philox_broadcasts_its_words_whichever_vary(axes):
    rng = np.random.default_rng(axes)
    sizes = [(5, 1) if axes >> lane & 1 else (1, 3) if lane % 2 else (1, 1) for lane in range(4)]
    words = [rng.integers(2**32, size=size, dtype=np.int64) for size in sizes]
    key = (int(rng.integers(2**32)), int(rng.integers(2**32)))
    full = np.broadcast_arrays(*words)
    expected = [philox_by_hand([int(word[place]) for word in full], list(key)) for place in np.ndindex(full[0].shape)]
    for answer in (philox(words, key), [word.numpy() for word in philox([torch.from_numpy(w) for w in words], key)]):
        assert np.stack(np.broadcast_arrays(*answer), -1).reshape(-1, 4).tolist() == expected


@pytest.mark.parametrize("index", [0, 17, 2**32 + 5, 2**63 - 1])
def test_number_p_of_sample_i_is_word_p_mod_4_of_its_counter(index):
    key = int.from_bytes(hashlib.blake2b(b"('uniform', -3)", digest_size=8).digest(), "little")
    rng = SampleStreams(-3, [5, index])
    u = torch.cat([rand((2, n), rng=rng) for n in (1, 2, 7, 3)], dim=1)[1]
    words = [
        philox_by_hand([p // 4, 0, index % 2**32, index // 2**32], [key % 2**32, key // 2**32])[p % 4]
        for p in range(13)
    ]
    assert u.tolist() == [(word >> 8) / 2**24 for word in words]


def test_normal_numbers_are_those_of_box_and_muller():
    key = int.from_bytes(hashlib.blake2b(b"('normal', 4)", digest_size=8).digest(), "little")
    z = randn((1, 400), rng=SampleStreams(4, [9]))[0].double()
    for p in range(0, 400, 4):
        words = philox_by_hand([p // 4, 0, 9, 0], [key % 2**32, key // 2**32])
        for lane in (0, 2):
            radius = math.sqrt(-2 * math.log((words[lane] + 1) / 2**32))
            angle = 2 * math.pi * words[lane + 1] / 2**32
            expected = [radius * math.cos(angle), radius * math.sin(angle)]
            assert z[p + lane : p + lane + 2].tolist() == pytest.approx(expected, abs=2e-5)


def test_the_ends_of_the_words_give_finite_numbers():
    ends = [torch.tensor([0, 1, 2**31, 2**32 - 1])] * 4
    normal, uniform = torch.empty(4, 4), torch.empty(4, 4)
    _fill_normal(ends, normal)
    _fill_uniform(ends, uniform)
    assert normal.isfinite().all() and normal.abs().max() < 6.7
    assert uniform.min() == 0 and uniform.max() == 1 - 2.0**-24


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_two_streams_are_alike(seed):
    n = 2**17
    for draw in (randn, rand):
        first = draw((n, 3), rng=SampleStreams(seed, range(n)))
        assert len(torch.unique(first, dim=0)) == n
    # Whose streams were once seeded with the same 32 bits.
    a, b = randn((2, 100), rng=SampleStreams(1, [26707, 31847]))
    assert (a != b).all()


def test_streams_pass_the_tests_of_kolmogorov_and_smirnov():
    n, length = 1000, 500
    rng = SampleStreams(8, range(n))
    z, u = randn((n, length), rng=rng).double(), rand((n, length), rng=rng).double()
    # Along streams, across them, and of what neighbours have in common.
    for part in (z.flatten(), z[:, 0], z[3], (z[1:] - z[:-1]).flatten()[:: n // 2] / math.sqrt(2)):
        assert scipy.stats.kstest(part, "norm").pvalue > 1e-3
    for part in (u.flatten(), u[:, 0], u[3], (u[1:] + u[:-1]).flatten()[:: n // 2] % 1):
        assert scipy.stats.kstest(part, "uniform").pvalue > 1e-3
    moments = [float((z**k).mean()) for k in (1, 2, 3, 4)]
    # Of k-th powers of N(0, 1), variances 1, 2, 15, 96.
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(moment - expected) < 4 * math.sqrt(variance / z.numel())
    assert float((z.abs() > 3).double().mean()) == pytest.approx(math.erfc(3 / math.sqrt(2)), rel=0.1)
    for part in (z, z**2 - 1, u - 0.5):  # of neighbours at one place, and of two places
        spread = float(part.square().mean())
        for a, b in ((part[1:], part[:-1]), (part[:, 1:], part[:, :-1]), (part[:, 2:], part[:, :-2])):
            assert abs(float((a * b).mean())) < 4 * spread / math.sqrt(a.numel())


def test_a_copy_of_a_generator_goes_on_as_the_generator_does(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    for rng in (SampleStreams(3, [4, 9]), batch_generator("noise", 5)):
        randn((2, 5), rng=rng), rand((2, 3), rng=rng), randint_shared(9, 5, rng=rng)
        twin = copy.deepcopy(rng)
        for draw in (randn, rand, randn):
            assert torch.equal(draw((2, 7), rng=rng), draw((2, 7), rng=twin))
        assert torch.equal(randint_shared(99, 5, rng=rng), randint_shared(99, 5, rng=twin))


def test_how_much_is_drawn_at_once_does_not_matter():
    def drawn(*sizes: int) -> torch.Tensor:
        rng = SampleStreams(3, range(5))
        return torch.cat([draw((5, n), rng=rng) for draw in (randn, rand) for n in sizes], dim=1)

    expected = drawn(6000)
    for sizes in ([1, 2, 3, 4, 5990], [3000, 3000], [5999, 1], [2] * 3000, [0, 6000]):
        assert torch.equal(drawn(*sizes), expected)


def test_batches_of_any_size_are_cut_into_the_same_numbers(monkeypatch):
    expected = mixture(SampleStreams(5, range(12)), 12)
    for tile, ahead, held in ((97, 8, 2**21), (700, 1024, 2**21), (2**20, 64, 100)):
        for name, value in (("TILE", tile), ("PREFETCH", ahead), ("MAX_PREFETCH", held)):
            monkeypatch.setattr(SampleStreams, name, value)
        assert torch.equal(mixture(SampleStreams(5, range(12)), 12), expected)


def test_more_samples_take_no_more_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(random, "philox", lambda *words: calls.append(len(words[0][2])) or philox(*words))
    for n in (2, 50):
        rng = SampleStreams(0, range(n))
        for _ in range(50):
            randn((n, 8), rng=rng)
    assert calls == [2] * (len(calls) // 2) + [50] * (len(calls) // 2)
    assert len(calls) // 2 < 10


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
    with pytest.raises(ValueError, match="of 3 samples, not 4"):
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
    assert torch.equal(randint_shared(9, 50, rng=generator("places")), randint(9, (50,), rng=generator("places")))
    places = randint_shared(9, 50, rng=SampleStreams(3, range(4)))
    assert torch.equal(randint_shared(9, 50, rng=SampleStreams(3, range(2))), places), (
        "the first sample names the stream"
    )
    assert not torch.equal(randint_shared(9, 50, rng=SampleStreams(3, range(1, 4))), places)


def test_systematic_numbers_are_equidistant_and_each_is_uniform():
    rng = generator("times")
    drawn = torch.stack([rand_systematic(6, rng=rng) for _ in range(3000)])
    assert drawn.dtype == torch.float64 and bool(((drawn > 0) & (drawn < 1)).all())
    gaps = drawn.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 6), rtol=0, atol=1e-12)
    for i in range(6):
        assert scipy.stats.kstest(drawn[:, i].numpy(), "uniform").pvalue > 1e-4
    assert rand_systematic(0, rng=rng).shape == (0,)
    streams = rand_systematic(4, rng=SampleStreams(3, range(4)))
    assert torch.equal(rand_systematic(2, rng=SampleStreams(3, [2, 3])), streams[2:])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_systematic_numbers(monkeypatch, world):
    alone = rand_systematic(6, rng=batch_generator("times", 1))
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    rows = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rows.append(rand_systematic(6 // world, rng=batch_generator("times", 1)))
    assert torch.equal(torch.cat(rows), alone)


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
