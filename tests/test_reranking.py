"""Re-ranking: the law of the best of several candidates in closed form, and its place in the commands."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import genzoo as package
from genzoo.conditions import ClassLabels, Tokens
from genzoo.distributions.discretization import bin_center, quantize
from genzoo.errors import UsageError
from genzoo.event import EventSpec
from genzoo.families.clip import Contrastive
from genzoo.families.dalle import DALLE
from genzoo.model import Density, GenerativeModel, Loss, Samples, SharedEmbedding
from genzoo.nn.mlp import MLP
from genzoo.nn.text_image_transformer import TextImageTransformer
from genzoo.numerics.random import SampleStreams, generator, randn
from genzoo.reranking import Reranked
from genzoo.runs import Run
from genzoo.text import run_tokenizer
from tests.commands import TINY, genzoo, untrained

EVENT, CONDITION = EventSpec((2,)), ClassLabels(2)


class Normal(GenerativeModel):
    """Points N(0, I) for either class."""

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        return Loss(x.square().mean(), {})

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return Samples(randn((n, 2), rng=rng, dtype=self.dtype), nfe=3)


class Axes(SharedEmbedding):
    """The angle of a point, and an axis for each class."""

    embedding_dim = 2

    @property
    def scale(self) -> Tensor:
        return torch.ones(())

    def _embed_image(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True)

    def _embed_text(self, y: Tensor) -> Tensor:
        return torch.eye(2)[y].to(self.dtype)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        return Loss(x.square().mean(), {})


def best_of(candidates: int) -> Reranked:
    return Reranked(Normal(EVENT, CONDITION), Axes(EVENT, CONDITION), candidates).double().eval()


@pytest.mark.parametrize("candidates", [1, 2, 8])
def test_the_largest_of_m_angles_has_the_law_of_a_maximum(candidates):
    """cos of a uniform angle has the distribution function F(c) = 1 - arccos(c)/pi, its maximum F^m."""
    n, model = 20_000, best_of(candidates)
    for label in (0, 1):
        x, nfe, _ = model.sample(n, torch.full((n,), label), rng=generator("best", label))
        assert nfe == 3 * candidates
        cosine = x[:, label] / x.norm(dim=1)
        u = ((1 - torch.arccos(cosine) / torch.pi) ** candidates).sort().values
        steps = torch.arange(n).double() / n
        distance = max(float((u - steps).max()), float((steps + 1 / n - u).max()))
        assert distance < 1.95 / n**0.5, "a chance of one in a thousand"


def test_a_candidate_is_a_function_of_seed_sample_and_number():
    y = torch.arange(7) % 2
    whole = best_of(5).sample(7, y, rng=SampleStreams(2, range(7))).x
    assert torch.equal(best_of(5).sample(3, y[4:], rng=SampleStreams(2, [4, 5, 6])).x, whole[4:])
    first = Normal(EVENT, CONDITION).double().sample(7, y, rng=SampleStreams(2, range(7))).x
    assert torch.equal(best_of(1).sample(7, y, rng=SampleStreams(2, range(7))).x, first)
    rng = SampleStreams(2, range(7))
    candidates = [Normal(EVENT, CONDITION).double().sample(7, y, rng=rng).x for _ in range(5)]
    cosines = torch.stack([Axes(EVENT, CONDITION).double().similarity(x, y) for x in candidates])
    assert torch.equal(whole, torch.stack(candidates)[cosines.argmax(0), torch.arange(7)])


def test_of_equal_candidates_the_first_is_kept_and_nothing_has_a_density():
    class Same(Axes):
        def _embed_image(self, x: Tensor) -> Tensor:
            return torch.ones_like(x) / 2**0.5

    model = Reranked(Normal(EVENT, CONDITION), Same(EVENT, CONDITION), 4).double()
    y = torch.zeros(5, dtype=torch.int64)
    expected = Normal(EVENT, CONDITION).double().sample(5, y, rng=SampleStreams(0, range(5))).x
    assert torch.equal(model.sample(5, y, rng=SampleStreams(0, range(5))).x, expected)
    assert not isinstance(model, Density)


def test_conditions_are_translated_for_the_ranker():
    swapped = Reranked(Normal(EVENT, CONDITION), Axes(EVENT, ClassLabels(2)), 8, lambda y: 1 - y).double()
    y = torch.zeros(2000, dtype=torch.int64)
    x = swapped.sample(2000, y, rng=generator(0)).x
    assert float(x[:, 1].mean()) > 0.8 and abs(float(x[:, 0].mean())) < 0.1


@pytest.mark.parametrize(
    ("model", "ranker", "candidates", "message"),
    [
        (Normal(EVENT), Axes(EVENT, CONDITION), 2, "the model is unconditional"),
        (Normal(EVENT, CONDITION), Axes(EventSpec((3,)), CONDITION), 2, "ranker: embeds"),
        (Normal(EVENT, CONDITION), Axes(EVENT, ClassLabels(3)), 2, "ranker: embeds"),
        (Normal(EVENT, CONDITION), Axes(EVENT, CONDITION), 0, "candidates must be at least 1, not 0"),
    ],
)
def test_what_does_not_fit_is_refused(model, ranker, candidates, message):
    with pytest.raises(ValueError, match=message):
        Reranked(model, ranker, candidates)


def test_a_trained_contrastive_network_raises_the_share_of_right_images():
    """Four captions of four images of codes: a model that draws at random, and a network that knows the pairs."""
    torch.manual_seed(0)
    event, condition = EventSpec((1, 2, 2), 4), Tokens(2, 6)
    y = torch.tensor([[k, 1] for k in (2, 3, 4, 5)])
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    ranker = Contrastive(event, condition, network=functools.partial(MLP, width=32, depth=1), dim=8, text_width=16)
    optimizer = torch.optim.Adam(ranker.parameters(), lr=1e-2)
    for step in range(60):
        rows = torch.randint(4, (32,), generator=generator("pairs", step))
        noise = torch.randint(4, (32, 1, 2, 2), generator=generator("noise", step))
        x = torch.where(torch.rand(32, 1, 2, 2, generator=generator("mask", step)) < 0.3, noise, images[rows])
        optimizer.zero_grad()
        ranker.loss(bin_center(x, 4), y[rows]).total.backward()
        optimizer.step()
    network = functools.partial(TextImageTransformer, width=8, layers=1, heads=2)
    model = DALLE(event, condition, network=network).eval()
    asked = y.repeat(50, 1)
    shares = []
    for candidates in (1, 30):
        x = Reranked(model, ranker.eval(), candidates).sample(200, asked, rng=generator("rerank")).x
        shares.append(float((quantize(x, 4) == images.repeat(50, 1, 1, 1)).double().mean()))
    assert shares[0] < 0.35 and shares[1] > shares[0] + 0.2, shares


# Commands

SHAPES = ["data=shapes", "data.size=16", "data.n=40", "data.n_test=8"]
DALLE_RUN = [
    "model=dalle", *SHAPES, "codec.encoder.width=8", "codec.decoder.width=8", "codec.codebook_size=8",
    "prior.network.width=8", "prior.network.layers=1",
]  # fmt: skip
CLIP_RUN = ["model=clip", "model.network.width=8", "model.network.max_width=8", "model.dim=8", "model.text_width=8"]
TEXT = "a small red ring on the left"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A model of captions, a contrastive network with its tokenizer, and one with another tokenizer."""
    folder, found = tmp_path_factory.mktemp("reranking"), {}
    for name, words in {
        "dalle": DALLE_RUN, "clip": [*CLIP_RUN, *SHAPES], "other": [*CLIP_RUN, *SHAPES, "data.vocabulary=280"],
    }.items():  # fmt: skip
        code, out, err = genzoo(*words, *TINY, f"outputs={folder}", "trainer.grids=0", "metrics.features=null")
        assert code == 0, err
        found[name] = Path(out.rpartition("run: ")[2].strip())
    return found


@pytest.mark.parametrize("ranker", ["clip", "other"])
def test_the_command_and_the_library_keep_the_same_candidates(runs, ranker):
    words = [f"run={runs['dalle']}", f"text={TEXT}", "n=3", "out=x.npz", "batch_size=2"]
    code, out, err = genzoo("sample", *words, "candidates=4", f"ranker={runs[ranker]}")
    assert code == 0, err
    with np.load("x.npz") as file:
        drawn = file[file.files[0]]
    x = package.sample(runs["dalle"], 3, text=TEXT, candidates=4, ranker=runs[ranker], batch_size=3)
    assert f"3 samples, {4 * 17} evaluations each" in out
    plain = package.sample(runs["dalle"], 3, text=TEXT)
    assert not torch.equal(x, plain)
    model, network = package.load(runs["dalle"]), package.loading.load_trained(runs[ranker])
    tokenizers = [run_tokenizer(Run(runs[name])) for name in ("dalle", ranker)]
    y, c = (tokenizer.encode([TEXT]).expand(3, -1) for tokenizer in tokenizers)
    rng = SampleStreams(0, range(3))
    candidates = torch.stack([model.sample(3, y, rng=rng).x for _ in range(4)])
    best = torch.stack([network.similarity(each, c) for each in candidates]).argmax(0)
    assert torch.equal(x, candidates[best, torch.arange(3)])
    again = torch.from_numpy(np.asarray(drawn))
    expected = x if again.is_floating_point() else quantize(x, 256).to(again.dtype)
    assert torch.equal(again.view(-1), (expected if again.shape[1] == 3 else expected.permute(0, 2, 3, 1)).reshape(-1))


def test_scores_of_reranked_samples_say_so(runs):
    words = [
        f"run={runs['dalle']}",
        "metrics.n=24",
        "metrics.events=2",
        "metrics.features=null",
        "metrics.throughput=2",
    ]
    ranked = ["candidates=4", f"ranker={runs['clip']}"]
    found = []
    for more in (["guidance=3.0"], [*ranked, "guidance=3.0"], [*ranked, "guidance=2.0"]):
        code, _, err = genzoo("evaluate", *words, *more)
        assert code == 0, err
        record = Run(runs["dalle"]).result["metrics"]["sampling/nfe"]
        found.append((record["value"], record["card"]["setting"]))
    (alone, plain), (four, best), (_, other) = found
    assert four == 4 * alone and "reranked" not in plain
    assert best["reranked"] == other["reranked"] == {"candidates": 4, "ranker": str(runs["clip"])}
    assert [setting["guidance"]["scale"] for setting in (plain, best, other)] == [3.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["candidates=4"], "candidates=4: set ranker=DIR"),
        (["ranker=nowhere"], "ranker=nowhere: ranks several samples: set candidates=8"),
        (["candidates=4", "ranker=nowhere"], "nowhere"),
        (["candidates=4", "ranker={dalle}"], "is no contrastive network: train model=clip"),
        (["candidates=0", "ranker={clip}"], "candidates"),
    ],
)
def test_a_ranker_that_is_none_is_refused_in_one_line(runs, words, key):
    words = [word.format(**runs) for word in words]
    code, _, err = genzoo("sample", f"run={runs['dalle']}", f"text={TEXT}", *words)
    assert code == 2 and key in err and len(err.strip().splitlines()) == 1
    assert not Path("samples.png").exists()


def test_a_model_without_conditions_is_not_ranked(runs, tmp_path):
    vae = untrained(tmp_path / "vae", "model=vae", "data=digits")[0]
    with pytest.raises(UsageError, match="the model is unconditional"):
        package.sample(vae, 2, candidates=2, ranker=runs["clip"])
    with pytest.raises(UsageError, match="candidates=0"):
        package.sample(vae, 2, candidates=0)
