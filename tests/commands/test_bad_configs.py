"""Two hundred slips of the hand, drawn by a seed: each is answered by exit code 2 and one line that names the full key.

What is drawn from is what genzoo itself says of its keys: every key of every family can be misspelt, every number be given a
text, NaN or a size beyond any machine, every choice be one letter off. Beside them stand the pairs that cannot be.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import genzoo as package
from genzoo.config.paths import CONF, VERBS
from genzoo.training import fit as fitting
from tests.commands import genzoo
from tests.conftest import composed, suitable

MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
DATA = ("digits", "moons")
# Numbers that may be as large as anybody likes.
BOUNDLESS = {"seed", "images", "seconds", "flops", "events", "warmup", "timeout", "max_width"}


class Bad(NamedTuple):
    """A command line, and what the answer to it must hold."""

    words: tuple[str, ...]
    holds: tuple[str, ...]


@functools.cache
def leaves(model: str, data: str) -> dict[str, Any]:
    """List the numbers and texts of a configuration by their keys."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            elif not isinstance(value, list) and not name.startswith("_"):
                yield f"{prefix}{name}", value

    # What the data say of the model's shape is theirs, and what is at two places is written at one of them.
    config = composed(f"model={model}", f"data={data}")
    found = dict(walk({**config, "data": {}}, ""))
    own = {"codec": "model.codec.", "prior": "model.prior.", "sampler": "model.sampler."}
    copied = (*(prefix for part, prefix in own.items() if part in config), "model.prior.sampler.")
    return {
        key: value
        for key, value in found.items()
        if key not in ("model.shape", "model.levels") and not key.startswith(copied) and not key.endswith(".levels")
    }


def misspelt(word: str, rng: random.Random) -> str:
    """Drop, double, swap or replace a letter, so that the word is another one and its nearest is what it was."""
    while True:
        i = rng.randrange(len(word))
        wrong = rng.choice(
            [word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + rng.choice("qxz") + word[i + 1 :]]
        )
        if wrong != word and wrong.replace("_", "").isalnum() and not wrong[0].isdigit() and len(wrong) > 3:
            return wrong


def start(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    words = suitable(rng.choice(MODELS), rng.choice(DATA))
    model, data = (word.partition("=")[2] for word in words[:2])
    return model, data, tuple(words)


def a_key_misspelt(rng: random.Random) -> Bad:
    model, data, words = start(rng)
    key = rng.choice([key for key in leaves(model, data) if len(key.rpartition(".")[2]) > 4])
    parent, dot, leaf = key.rpartition(".")
    wrong = f"{parent}{dot}{misspelt(leaf, rng)}"
    return Bad((*words, f"{wrong}=1"), (f"'{wrong}'", "did you mean '"))


def a_choice_misspelt(rng: random.Random) -> Bad:
    groups = ("model", "data", "optimizer", "logger", "budget", "experiment", "trainer", "metrics")
    group = rng.choice(groups)
    choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    wrong = choice = rng.choice([name for name in choices if len(name) > 3])
    while wrong in choices:  # adamw without its last letter is adam
        wrong = misspelt(choice, rng)
    return Bad((f"{group}={wrong}",), (f"unknown {group} '{wrong}'", "did you mean '"))


def numbers(rng: random.Random, kinds: tuple[type, ...], but: set[str] = frozenset()) -> tuple[str, tuple[str, ...]]:
    """Draw a key that holds a number, and the words that lead to it; of those that may be large, none with a cap beside it."""
    model, data, words = start(rng)
    found = leaves(model, data)
    capped = {k.replace(".max_width", ".width") for k in found if k.endswith(".max_width")} if but else set()
    keys = [k for k, v in found.items() if type(v) in kinds and k.rpartition(".")[2] not in but and k not in capped]
    return rng.choice(keys), words


def a_wrong_type(rng: random.Random) -> Bad:
    key, words = numbers(rng, (int, float))
    return Bad((*words, f"{key}={rng.choice(['abc', '[1,[2]]', '{a:1}', 'true', '1.2.3', '1e', 'None'])}"), (key,))


def a_number_for_a_text(rng: random.Random) -> Bad:
    model, data, words = start(rng)
    keys = [key for key, v in leaves(model, data).items() if isinstance(v, bool | str) and key not in ("outputs",)]
    key = rng.choice([key for key in keys if not key.startswith("logger")])
    return Bad((*words, f"{key}={rng.choice(['-7', '[x]', '{a:1}'])}"), (key,))


def no_finite_number(rng: random.Random) -> Bad:
    key, words = numbers(rng, (int, float))
    return Bad((*words, f"{key}={rng.choice(['nan', 'inf', '-inf', 'NaN'])}"), (key,))


def a_number_below(rng: random.Random) -> Bad:
    key, words = numbers(rng, (int,))
    return Bad((*words, f"{key}=-{rng.choice([1, 3, 10**6, 10**30])}"), (key.rpartition(".")[2],))


def a_number_far_above(rng: random.Random) -> Bad:
    key, words = numbers(rng, (int,), BOUNDLESS)
    return Bad((*words, f"{key}={rng.choice([2**25, 10**9, 10**12, 10**18, 10**40])}"), (key.partition(".")[0],))


def an_interpolation_of_nothing(rng: random.Random) -> Bad:
    model, data, words = start(rng)
    key = rng.choice([key for key in leaves(model, data) if not key.startswith(("experiment", "timeout", "objective"))])
    nothing = rng.choice(["${nowhere}", "${data.nowhere}", "${oc.env:NOWHERE_AT_ALL}", "${nowhere:1}", f"${{{key}}}"])
    return Bad((*words, f"{key}={nothing}"), (key,))


def a_syntax_that_is_none(rng: random.Random) -> Bad:
    *_, words = start(rng)
    wrong = rng.choice(
        ["=3", "seed==3=", "seed=[1", "seed={a", "seed='x", "seed=\"x", "seed=1]", "model.x=(1", "seed=a b=c", "@=1", "~~seed",
         "++=1", "seed=${", "seed=${a", "seed=${a:${b}", "trainer..seed=1", ".seed=1", "seed.=1", "seed=$", "[seed]=1",
         "seed=\\", "data@=x", "s eed=1", "a=" + "[" * 400]
    )  # fmt: skip
    return Bad((*words, wrong), ("seed" if wrong.startswith("seed") else wrong[:2],))


def a_section_less(rng: random.Random) -> Bad:
    section = rng.choice(["model", "data", "optimizer", "trainer", "budget", "metrics", "trainer.learning_rate", "seed",
                          "outputs", "data.source", "model._target_", "optimizer._target_", "data.shape", "data.levels",
                          "trainer.ema_half_life", "metrics.n", "optimizer._partial_", "trainer.clip"])  # fmt: skip
    return Bad((f"~{section}",), (section.partition(".")[0],))


PAIRS = """
    model=vae sampler=ddim|sampler
    model=gan sampler=heun|sampler
    model=glow sampler=ancestral|sampler
    model=autoregressive sampler=ode|sampler
    model=masked_diffusion sampler=heun|sampler
    model=masked_diffusion data=moons|levels
    model=masked_diffusion model.noise=uniform model.steps=null|noise=uniform
    model=masked_diffusion model.steps=0|steps
    model=latent codec=vae prior=masked_diffusion|prior
    model=ddpm sampler=predictor_corrector sampler.steps=100000|sampler
    model=flow_matching sampler=ancestral|sampler
    model=flow_matching sampler=ddim sampler.eta=-1|sampler
    model=ddpm sampler=jump|sampler=heun
    model=consistency sampler=heun|sampler=jump
    model=consistency sampler.steps=2 sampler.gamma=0.5|gamma
    model=consistency sampler.gamma=2|gamma
    model=consistency model.objective=distillation|teacher=run
    model=consistency model.guidance=2|distillation
    model=consistency model.objective=adversarial|objective
    model=consistency teacher=run|teacher.run
    model=consistency teacher=run teacher.run=/nowhere|/nowhere
    model=consistency model.time_pairs.start=1|start
    model=consistency time_pairs@model.time_pairs=ratio model.time_pairs.doubling=0|doubling
    model=mean_flow model.guidance=2|data.conditional=true
    model=mean_flow data.conditional=true model.condition_dropout=0 model.guidance=2|condition_dropout
    model=mean_flow model.ratio=2|ratio
    model=mean_flow model.mixture=1|mixture
    model=mean_flow sampler=ancestral|sampler
    model=score_sde sampler=ancestral|sampler
    model=ddpm sampler.steps=0|sampler
    model=ddpm sampler.steps=1001|sampler
    model=score_sde sampler.steps=-1|sampler
    model=vae codec=vae|codec
    model=vae prior=ddpm|model=latent
    model=vae prior=dalle|prior
    model=vae prior=vamp posterior@model.posterior=iaf|omit posterior
    model=vae prior=gmm prior.components=0|components
    model=vae prior=gmm prior.covariance=tied|covariance
    model=vae posterior@model.posterior=vamp|posterior
    model=vae model.objective=elba|objective
    model=vae model.objective=geco|model.target
    model=vae model.objective=iwae model.beta=1 model.samples=0|samples
    model=vae model.objective=iwae model.beta=2|model.beta=1
    model=vae model.objective=info model.mmd=0|mmd
    model=latent prior=vamp|vamp
    model=latent codec=vqvae prior=gmm|prior
    model=rae codec.regularizer=none|regularizer
    model=rae codec.latent_dim=0|latent_dim
    model=dalle data=digits|data
    model=dalle data=shapes data.n=20 data.n_test=4 data.conditional=false|data
    model=ddpm codec=vqvae|codec
    model=gan prior=ddpm|prior
    model=vqvae2 codec=vqvae|codec=vqvae2
    model=vqvae2 codec.levels=0|levels
    model=vqvae2 codec.levels=5|halved
    model=vqvae2 prior=flow_matching codec.quantizer.codebook_size=1|codebook
    model=vqvae codec=residual codec.depth=0|depth
    model=vqvae codec=vqgan codec.adversarial_weight=-1|adversarial_weight
    model=vqvae codec=vqgan codec.perceptual.name=cifar|perceptual
    model=vqvae codec=vqgan codec@codec.autoencoder=vae|autoencoder
    model=r3gan model.gamma=-1|gamma
    model=r3gan model.final_gamma=0.1|annealing
    model=r3gan model.critic.group_width=5|group_width
    model=r3gan network@model.critic=gan_critic_image|batch norm
    model=ddpm teacher=run teacher.run=x|teacher
    model=flow_matching teacher=run|teacher.run
    model=flow_matching teacher=run teacher.run=/nowhere|/nowhere
    model=unclip data=digits|data.conditional=true
    model=unclip data=digits data.conditional=true encoder=run|encoder.run
    model=unclip data=digits data.conditional=true encoder=run encoder.run=/nowhere|/nowhere
    model=unclip data=digits data.conditional=true encoder=shipped|encoder.name=clip_digits
    model=unclip data=digits data.conditional=true model.candidates=0|candidates
    model=unclip data=digits data.conditional=true model.decoder.condition_dropout=[0.1]|condition_dropout
    model=ddpm encoder=clip|encoder
    model=clip data=digits data.conditional=false|data.conditional=true
    vary|run
    vary run=.|image
    vary run=. image=x text=x|from_text
    vary run=. image=x from_text=x text=y to=z|to, text
    vary run=. image=x strength=2|strength
    vary run=. image=x steps=1|steps
    vary run=/nowhere image=x|/nowhere
    model=latent codec=run|codec.run
    model=latent codec=run codec.run=/nowhere|/nowhere
    model=latent prior=pixelcnn|prior
    model=latent prior=transformer|prior
    model=latent codec=vqvae prior=ddpm model.codec_share=1|codec_share
    model=latent model.codec_share=0|codec_share
    model=vae network@model.encoder=denoiser_image|model
    model=vae network@model.decoder=encoder_image|model
    model=gan network@model.generator=gan_critic_image|model
    model=ddpm network@model.network=encoder_image|model
    model=ddpm schedule@model.schedule=edm|model
    model=realnvp network@model.network=denoiser_image|model
    model=realnvp model.coupling=cubic|coupling
    model=realnvp model.coupling=additive model.scale_penalty=0.1|scale_penalty
    model=nsf model.bins=0|bins
    model=nsf model.bound=-1|bound
    model=nsf data=moons data.shape=[1]|two dimensions
    model=ebm model.labels=both|model.labels|'condition' or 'joint'
    model=ebm model.labels=joint|data.conditional=true
    model=ebm model.temperature=0|temperature
    model=ebm model.buffer_size=5|buffer_size
    model=ebm sampler=heun|sampler
    model=ebm data=moons network@model.network=critic_image|model
    model=maf model.transform=cubic|transform
    model=maf model.order=sorted|order
    model=maf model.layers=0|layers
    model=maf data=moons network@model.network=coupling_plane|masked network
    model=vae likelihood@model.likelihood=bernoulli|model.likelihood
    data=moons model=vae likelihood@model.likelihood=bernoulli|model.likelihood
    data=moons model=vqvae likelihood@model.likelihood=categorical|model
    data=moons model=autoregressive likelihood@model.likelihood=categorical|model
    data=moons network@model.encoder=encoder_image|model.encoder
    data=moons metrics.features=digits|metrics.features
    data=digits metrics.features=identity|metrics.features
    data=digits kind=plane|kind
    data=moons kind=image|kind
    data=digits data.shape=[1,9,9]|data.shape
    data=digits data.shape=[1,8]|data.shape
    data=digits data.levels=2|data.levels
    data=digits model.num_classes=10|data.conditional=true
    data=checkerboard data.conditional=true|data.conditional=true
    data=digits data.num_classes=9|data.num_classes
    data=folder|data.root
    data=folder data.root=/nowhere|/nowhere
    data=folder data.root=/nowhere data.test_fraction=2|data.test_fraction
    data=folder data.root=/nowhere data.channels=4|data.channels
    data.shape=[2,8,8]|data.shape
    data.shape=[4,8,8]|data.shape
    data.shape=[5,8,8]|data.shape
    data=folder data.root=/nowhere data.test_fraction=-0.1|data.test_fraction
    data.source._target_=genzoo.families.vae.VAE|data
    optimizer._target_=torch.optim.Adan|optimizer
    optimizer._target_=os.getcwd|optimizer
    optimizer._partial_=false|optimizer
    optimizer._partial_=5|optimizer._partial_
    model._target_=torch.nn.Linear|model
    model._target_=genzoo.families.vae|model._target_
    model._target_=.vae.VAE|model._target_
    model._target_=3|model._target_
    model._target_=VAE|model._target_
    model.encoder._target_=genzoo.diffusion.schedules.CondOT|model.encoder
    model.encoder=3|model.encoder
    model.encoder=null|model.encoder
    model.likelihood=gaussian|model.likelihood
    trainer.learning_rate._target_=genzoo.training.budget.Budget|trainer.learning_rate
    trainer.learning_rate.decay=exponential|trainer.learning_rate.decay
    budget.seconds=null|budget.images
    budget.samples=32|metrics.n
    metrics.num_samples=null|metrics.num_samples
    model=ddpm metrics.num_samples=3|num_samples
    trainer.accelerator=gpu|trainer.accelerator
    trainer.precision=16|trainer.precision
    trainer.ema_half_life=0|trainer.ema_half_life
    logger=wandb logger.mode=never|logger.mode
    logger=csv logger.project=x|logger.project
    outputs=/proc/x|outputs
    outputs=/dev/null|outputs
    seed=1,2|-m
    -m model=vae,vea|vea
    -m seed=range(1,x)|seed
    sample|run
    sample run=/nowhere|/nowhere
    sample run=. n=0|n=0
    sample run=. n=-1|n=-1
    sample run=. n=1e9|n
    sample run=. label=-1|label=-1
    sample run=. label=1.5|label=1.5
    sample run=. seed=-1|seed
    sample run=. batch_size=0|batch_size
    sample run=. ema=perhaps|ema
    sample run=. device=tpu|device
    sample run=. trust=os|trust
    sample run=. trust=[os.]|trust
    sample run=. sampler=dimm|ddim
    sample run=. model=vae|model
    sample run=. rum=x|rum
    sample run=. --config-dir /nowhere|/nowhere
    evaluate|run
    evaluate run=. samples=x|run
    evaluate samples=x|data
    evaluate samples=/nowhere data=digits|/nowhere
    evaluate run=. data=digits|data
    evaluate run=. metrics.n=nan|metrics.n
    evaluate run=. metrics.batch_size=0|metrics.batch_size
    evaluate run=. metrics.featurs=x|metrics.featurs
    evaluate run=. device=cpu0|device
    encode|run
    encode run=/nowhere|/nowhere
    encode run=. examples=|examples
    encode run=. n=0|n=0
    encode run=. exampels=x|examples
    compress n=3|run is missing
    compress run=/nowhere|/nowhere
    decompress file=nowhere.gzc|nowhere.gzc
    decompress file=x.gzc rum=3|rum|run
    decode|run
    decode run=/nowhere latents=z.npz|/nowhere
    reconstruct|run
    reconstruct run=. n=0|n=0
    reconstruct run=. label=-1|label=-1
    interpolate run=. steps=1|steps
    interpolate run=. n=0|n=0
    interpolate run=. sampler=heun|sampler
    traverse run=. dimensions=[-1]|dimensions
    traverse run=. dimensions=[]|dimensions
    traverse run=. reach=0|reach
    traverse run=. reach=nan|reach
    attribute run=. plus=dress|minus
    attribute run=. minus=1.5 plus=2|minus
    attribute run=. minus=1 plus=2 strengths=[]|strengths
    attribute run=. minus=1 plus=2 strengths=[inf]|strengths
    trajectory|run
    trajectory run=. frames=1|frames
    trajectory run=. show=path|show
    trajectory run=. sampler=huen|heun
    compare|runs
    compare runs=/nowhere|/nowhere
    compare runs=[]|runs
    compare runs=[1,2]|runs
    compare runs=. out=|out
    compare runs=. logger=csv|logger
    compare runs=. workspace=x|workspace
    compare runs=. titel=x|title
    edit|run
    edit run=.|image
    edit run=. image=x split=test|image
    edit run=. split=train|split
    edit run=. image=x task=inpant|inpaint
    edit run=. image=x task.sigma=-1|task.sigma
    edit run=. image=x task=denoise task.sigma=[1]|task.sigma
    edit run=. image=x method=dsp|dps
    edit run=. image=x n=0|n=0
    edit run=. image=x images=0|images
    edit run=. image=x label=[1,2]|label
    edit run=. image=x mask=|mask
    edit run=. image=x out=x.jpg|out
    edit run=. image=x msak=bottom|mask
    edit run=/nowhere image=x|/nowhere
    serve|runs
    serve runs=/nowhere|/nowhere
    serve runs=. port=80|port
    serve runs=. port=x|port
    serve runs=[]|runs
    serve runs=. share=true|share
    trian model=vae|train
    evalute run=.|evaluate
    --config-nam x|--config-nam
"""


def pair(line: str) -> Bad:
    words, *holds = line.strip().split("|")
    return Bad(tuple(words.split()), tuple(holds))


def a_pair_that_cannot_be(rng: random.Random) -> Bad:
    return pair(rng.choice(PAIRS.strip().splitlines()))


KINDS: list[Callable[[random.Random], Bad]] = [
    a_key_misspelt, a_choice_misspelt, a_wrong_type, a_number_for_a_text, no_finite_number, a_number_below,
    a_number_far_above, an_interpolation_of_nothing, a_syntax_that_is_none, a_section_less, *[a_pair_that_cannot_be] * 5,
]  # fmt: skip


def draw(seed: int, n: int = 200) -> list[Bad]:
    """Draw command lines, no two of them alike, with one of each command at least."""
    rng = random.Random(seed)
    pairs = [pair(line) for line in PAIRS.strip().splitlines()]
    found = {bad.words: bad for verb in VERBS for bad in [next((b for b in pairs if b.words[0] == verb), None)] if bad}
    while len(found) < n:
        bad = KINDS[len(found) % len(KINDS)](rng)
        found.setdefault(bad.words, bad)
    return list(found.values())


LINES = draw(0)


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path, without_a_login) -> Path:
    """An empty directory to type in, where nothing trains and nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def never(*_, **__):
        raise AssertionError("this line was accepted")

    monkeypatch.setattr(fitting, "fit", never)
    for place in ("genzoo.data.images.urlopen", "genzoo.metrics.features.urlopen", "genzoo.jobs.sweep.run_process"):
        monkeypatch.setattr(place, never)
    return tmp_path


def check(bad: Bad, here: Path, code: int, out: str, err: str) -> None:
    assert (code, out) == (2, ""), err
    assert err.startswith("genzoo: ") and err.count("\n") == 1 and err.endswith("\n") and len(err) < 1000
    for word in bad.holds:
        assert word in err
    assert not list(here.iterdir())


@pytest.mark.parametrize("bad", LINES, ids=lambda bad: " ".join(bad.words)[:80])
def test_one_line_names_the_key(empty, bad):
    check(bad, empty, *genzoo(*bad.words))


@pytest.mark.parametrize("bad", random.Random(1).sample(LINES, 4), ids=lambda bad: " ".join(bad.words)[:80])
def test_it_is_said_at_once(empty, bad):
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    command = [sys.executable, "-m", "genzoo", *bad.words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert time.monotonic() - started < 30, "on a busy machine; on a quiet one it is less than 5 seconds"
    check(bad, empty, done.returncode, done.stdout, done.stderr)


def test_every_kind_of_slip_and_every_command_is_among_them():
    assert len({bad.words for bad in LINES}) == 200
    assert {bad.words[0] for bad in LINES} >= set(VERBS) - {"train"}
