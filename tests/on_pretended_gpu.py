"""Trains, samples and scores on a pretended GPU: ``python -m tests.on_pretended_gpu FILE``, run by test_pretended_gpu.

Every scenario ends in a text: empty, or what went wrong. All of them are written into FILE as JSON.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genzoo.config.paths import CONF

# Forward-mode derivatives of pretended tensors crash torch.
FAMILIES = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "mean_flow")
STEADY = 2  # steps of a kind after which nothing is made for the first time
SIZES = {
    "width": 8, "max_width": 8, "channels": 8, "depth": 1, "blocks": 1, "couplings": 1, "latent_dim": 2, "num_steps": 20,
    "steps": 4, "layers": 1, "num_layers": 1, "embedding_dim": 8, "codebook_size": 8, "heads": 1, "pool": 32,
    "components": 2, "latent_channels": 2, "tolerance": 1.0, "bottleneck": 1, "up": 1, "down": 1, "n_critic": 1,
    "head_channels": 8, "text_width": 8, "text_layers": 1, "sampling_steps": 10,
}  # fmt: skip


PARTS = ("model", "sampler", "codec", "prior", "encoder")  # of a configuration, which others refer to
CAPTIONED = ("dalle", "glide")  # families whose data must have captions
CONDITIONED = ("unclip",)  # families that need conditions
SHAPES = ("data=shapes", "data.size=16", "data.n=64", "data.n_test=16")
SHORT = [
    "budget.images=384", "trainer.batch_size=32", "trainer.threads=1", "trainer.accelerator=cuda",
    "trainer.precision=32-true", "trainer.grids=1", "trainer.saves=1", "metrics.n=16", "metrics.events=4", "metrics.force=true",
    "metrics.num_samples=4", "metrics.throughput=2",
]  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Some steps of training in memory."""

    words: tuple[str, ...]
    ranks: int = 1
    waits: int = 0  # in a steady step
    used: bool = False  # whether all abilities of the model are tried too
    teacher: str = ""  # family of the teacher, if any


def steps() -> dict[str, Steps]:
    """Name the trainings: every family, with and without classes, and what changes the steps of some."""
    found = {}
    classes = "data.conditional=true"
    for family in FAMILIES:
        if family in CAPTIONED:
            found[f"{family}-captions"] = Steps((f"model={family}", *SHAPES), used=True)
            continue
        if family not in CONDITIONED:
            found[family] = Steps((f"model={family}",))
        found[f"{family}-conditional"] = Steps((f"model={family}", classes), used=True)
        found[f"{family}-ranks"] = Steps((f"model={family}", classes), ranks=2)
    ddpm = {
        "hybrid": ("model.variance=learned", "model.objective=hybrid"),
        "vlb": ("model.objective=vlb",),
        "importance": ("model.objective=vlb", "model.importance=true"),
        "importance-hybrid": ("model.variance=learned", "model.objective=hybrid", "model.importance=true"),
        "cosine": ("schedule@model.schedule=cosine", "model.prediction=v"),
    }
    for name, words in ddpm.items():
        found[f"ddpm-{name}"] = Steps(("model=ddpm", *words))
    found["ddpm-importance-ranks"] = Steps(("model=ddpm", *ddpm["importance"]), ranks=2)
    for optimizer in sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml")):
        found[f"optimizer-{optimizer}"] = Steps(("model=vae", f"optimizer={optimizer}"))
    for schedule in ("vp", "sub_vp", "ve", "edm"):
        found[f"score_sde-{schedule}"] = Steps(("model=score_sde", f"schedule@model.schedule={schedule}"))
    for levels in ("logit_normal", "log_normal"):
        found[f"flow_matching-{levels}"] = Steps(("model=flow_matching", f"noise_levels@model.noise_levels={levels}"))
    found["consistency-ratio"] = Steps(("model=consistency", "time_pairs@model.time_pairs=ratio", classes))
    found["consistency-teacher"] = Steps(
        ("model=consistency", "model.objective=distillation", "model.guidance=2.0", classes), teacher="score_sde"
    )
    for likelihood in ("bernoulli", "categorical", "gaussian", "logistic_mixture"):
        binary = ("data.levels=2",) if likelihood == "bernoulli" else ()
        found[f"vae-{likelihood}"] = Steps(("model=vae", f"likelihood@model.likelihood={likelihood}", *binary))
    found["vae-warmup"] = Steps(("model=vae", "model.warmup=400", "model.free_bits=0.1", "model.beta=0.5"))
    for prior in ("vamp", "gmm", "maf", "autoregressive"):
        found[f"vae-{prior}"] = Steps(("model=vae", f"prior={prior}", classes), used=True)
    found["vae-iaf"] = Steps(("model=vae", "posterior@model.posterior=iaf"), used=True)
    for name, words in {"iwae": ("model.beta=1",), "info": (), "geco": ("model.target=1.0",)}.items():
        found[f"vae-{name}-ranks"] = Steps(("model=vae", f"model.objective={name}", *words), ranks=2)
    found["hvae-warmup-ranks"] = Steps(("model=hvae", "model.warmup=400", "model.free_bits=0.1"), ranks=2)
    for prior in sorted(path.stem for path in (CONF / "prior").glob("*.yaml")):
        if prior in ("dalle", "vamp"):  # over captions, and of a VAE's own encoder
            continue
        # A sequence of classes needs codes, which a VAE does not have, and a mixture of Gaussians real numbers.
        of_prior = {"pixelcnn": ("vqvae",), "transformer": ("vqvae",), "autoregressive": ("vae",)}
        of_prior["gmm"] = ("vae", "rae")
        of_prior["masked_diffusion"] = ("vqvae",)
        for codec in of_prior.get(prior, ("vae", "vqvae")):
            found[f"latent-{codec}-{prior}"] = Steps(("model=latent", f"codec={codec}", f"prior={prior}", classes))
    found["ebm-joint"] = Steps(("model=ebm", "model.labels=joint", "model.metropolis=true", classes), used=True)
    found["ebm-joint-ranks"] = Steps(("model=ebm", "model.labels=joint", "model.metropolis=true", classes), ranks=2)
    for codec in ("residual", "vqgan"):
        found[f"vqvae-{codec}"] = Steps(("model=vqvae", f"codec={codec}", classes))
    found["r3gan-annealed"] = Steps(("model=r3gan", "model.final_gamma=0.01", "model.annealing=400"))
    found["gan-hinge"] = Steps(("model=gan", "model.loss=hinge"))
    found["realnvp-batch_norm-ranks"] = Steps(("model=realnvp", "model.batch_norm=true"), ranks=2)
    found["clip-none"] = Steps(("model=vae", "trainer.clip=null"))
    # The assignment is scipy's, on the host: noise and data go there, and the order comes back.
    found["flow_matching-optimal_transport"] = Steps(
        ("model=flow_matching", "model.pairing=optimal_transport"), waits=2
    )
    found["flow_matching-reflow"] = Steps(("model=flow_matching", classes), teacher="flow_matching")
    return found


def small(config: Any) -> Any:
    """Cut the sizes of a model's configuration down."""
    if not isinstance(config, dict):
        return config
    cut = {name: small(value) for name, value in config.items()}
    for name, size in SIZES.items():
        if isinstance(cut.get(name), int | float) and not isinstance(cut[name], bool):
            cut[name] = max(cut[name], size) if name == "tolerance" else min(cut[name], size)
    for name in ("multipliers", "up", "down"):
        if isinstance(cut.get(name), list):
            cut[name] = [1] * len(cut[name])
    return cut


def train(scenario: Steps) -> str:
    """Do steps of every turn and stage, sample and score, and report what waited."""
    import torch

    from genzoo.conditions import Tokens
    from genzoo.config.instantiate import build
    from genzoo.data.dataset import Split
    from genzoo.data.loader import Batches
    from genzoo.jobs.building import describe_model
    from genzoo.numerics.random import SampleStreams
    from genzoo.training.budget import Budget
    from genzoo.training.module import GenerativeModule
    from tests import pretended_gpu
    from tests.conftest import composed

    config = composed(*scenario.words)
    describe_model(config, build)
    torch.manual_seed(0)
    made = small(config["model"])
    if scenario.teacher:
        other = composed(f"model={scenario.teacher}", "data.conditional=true")
        describe_model(other, build)
        made["teacher"] = build(small(other["model"]), "model")
    model: Any = build(made, "model")
    for name, buffer in model.named_buffers():
        if name.endswith("frequencies"):  # so that an untrained drift is smooth, and its solution short
            buffer *= 0.02
    n, batch_size = 1024, 16
    x = torch.randn(n, *model.shape) if model.levels is None else torch.randint(model.levels, (n, *model.shape))
    y = torch.arange(n) % config["data"]["num_classes"] if config["data"]["num_classes"] else None
    if isinstance(model.condition, Tokens):
        y = torch.randint(model.condition.vocabulary, (n, model.condition.length))
    optimizer, budget = build(config["optimizer"], "optimizer"), Budget(images=30 * batch_size)
    batches = Batches(Split(x.to(torch.uint8) if model.levels else x, y), batch_size, seed=0)
    module = GenerativeModule(model, optimizer, batches, budget, clip=config["trainer"]["clip"])
    module.cost = lambda *_: 1  # type: ignore[method-assign]  # which is not counted on the device
    batches.to(pretended_gpu.CUDA)
    module.ema.model.to(pretended_gpu.CUDA)
    module.to(pretended_gpu.CUDA)
    module.make_plan()
    with pretended_gpu.ranks_of(scenario.ranks):
        module.on_fit_start()
        seen: collections.Counter[Any] = collections.Counter()
        found: collections.Counter[Any] = collections.Counter()
        while module.steps < 30:
            stage, number, _ = module.stage_at(module.steps)
            kind = stage.name, stage.module.turn(number) if hasattr(stage.module, "turn") else None
            pretended_gpu.WAITS.clear()
            module.step()
            seen[kind] += 1
            if seen[kind] > STEADY:
                if sum(pretended_gpu.WAITS.values()) > scenario.waits:
                    found.update({(*kind, *key): count for key, count in pretended_gpu.WAITS.items()})
                if seen[kind] > STEADY + 2:  # the rest of a stage teaches nothing more
                    ends = [*module.plan.boundaries, 30]
                    if all(seen[stage.name, turn] > STEADY for turn in turns(stage.module)):
                        module.progress.steps = next(end for end in ends if end > module.steps - 1)
        module.finite.read()
        module.progress.window.flush()
    if found:
        return "waits: " + "; ".join(f"{count}x {key}" for key, count in found.items())
    if scenario.used:
        use(module.ema.model, *batches(0), SampleStreams(0, range(4), device=pretended_gpu.CUDA))
    return ""


def turns(module: Any) -> list[str | None]:
    from genzoo.model import Adversarial

    return list(module.networks()) if isinstance(module, Adversarial) else [None]


def use(model: Any, x: Any, y: Any, rng: Any) -> None:
    """Call every ability of a model on the device."""
    import torch

    from genzoo.conditions import ClassLabels, Tokens
    from genzoo.diffusion.denoiser import Denoiser
    from genzoo.diffusion.guidance import (
        AutoGuidance,
        ClassifierFreeGuidance,
        ClassifierGuidance,
        NoisyClassifier,
        guide,
    )
    from genzoo.diffusion.probability_flow import ProbabilityFlow
    from genzoo.distributions.discretization import bin_center
    from genzoo.families.noisy_classifier import NoiseConditionalClassifier
    from genzoo.model import Bijective, Codec, Density, GenerativeModel, LatentVariable, LogitGuided, reconstruct

    x, y = x[:4], y[:4] if model.condition else None
    x = (x if model.levels is None else bin_center(x, model.levels)).to(model.dtype)
    t = torch.full((4,), 0.5, device=x.device, dtype=torch.float64)
    with torch.no_grad():
        results = []
        if isinstance(model, GenerativeModel):
            results += [model.sample(4, y, rng=rng).x, model.sample(4, rng=torch.Generator(x.device)).x]
        if isinstance(model, NoisyClassifier):
            results.append(model.log_probs(x, t, t))
        if model.condition and isinstance(model, Denoiser | LogitGuided):
            guided = guide(model, functools.partial(ClassifierFreeGuidance, scale=2.0))
            results += [guided.sample(2, y[:2], rng=torch.Generator(x.device)).x]
        if isinstance(model, Denoiser) and model.path.independent:
            classifier = NoiseConditionalClassifier(model.event, ClassLabels(3)).eval()
            if not isinstance(model.condition, Tokens):
                results.append(ClassifierGuidance(model, classifier, 2.0, (0.1, 10.0)).predict(x, t, y % 3).mean)
            results.append(AutoGuidance(model, copy.deepcopy(model).cpu(), 2.0).predict(x, t, y).mean)
        if isinstance(model, ProbabilityFlow):
            model.rtol = model.atol = 1.0
        if isinstance(model, Density):
            results.append(model.log_prob(x, y, num_samples=4, rng=rng).value)
        if isinstance(model, Codec) and not isinstance(model, Denoiser):  # whose latents take a solver
            results.append(reconstruct(model, x, y))
        if isinstance(model, LatentVariable):
            z, log_q = model.infer(x, y, rng=rng)
            results += [log_q, model.log_likelihood(x, z, y), model.generate(z, y, rng=rng)]
        if isinstance(model, Bijective) and not isinstance(model, Denoiser):
            results.append(model.forward_and_log_det(x, y)[1])
        if isinstance(model, Denoiser):
            results += [model.denoise(x, t, y), model.eps(x, t, y)]
    for result in results:
        assert result.device == x.device, f"a result lies on {result.device}"
        assert bool(result.isfinite().all())


def words_of(family: str) -> list[str]:
    """Type a small model of a family, with classes, and a short training of it on the device."""
    from tests.conftest import composed

    def smaller(section: Any, name: str) -> Iterator[str]:
        for key, value in section.items():
            if isinstance(value, dict) and key not in PARTS:
                yield from smaller(value, f"{name}.{key}")
            elif value != (size := small({key: value})[key]) and not isinstance(value, dict):
                yield f"{name}.{key}={size}"

    words = [f"model={family}", *(SHAPES if family in CAPTIONED else ("data=digits",)), "data.conditional=true"]
    config = composed(*words)
    sizes = [word for name in PARTS if isinstance(config.get(name), dict) for word in smaller(config[name], name)]
    probes = ["metrics.num_samples=2"] if any(".tolerance=" in word for word in sizes) else []  # each a derivative
    return [*words, *sizes, *SHORT, *probes]


def command(*words: str) -> int:
    """Run a command in this process, and return its exit code."""
    from genzoo.__main__ import main

    sys.argv = ["genzoo", *words]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def interrupted(family: str) -> str:
    """Train by the command, be stopped, go on, and score, and report what waited."""
    from genzoo.training import callbacks
    from genzoo.training.module import GenerativeModule
    from tests import pretended_gpu

    step, found, stop = GenerativeModule.step, collections.Counter[Any](), 0
    seen: collections.Counter[Any] = collections.Counter()

    def watched(module: Any) -> None:
        stage, number, _ = module.stage_at(module.steps)
        kind = stage.name, stage.module.turn(number) if hasattr(stage.module, "turn") else None
        on_step, module.on_step = module.on_step, lambda: None  # which records, and waits for what it writes
        pretended_gpu.WAITS.clear()
        step(module)
        seen[kind] += 1
        if seen[kind] > STEADY:
            found.update({(*kind, *key): count for key, count in pretended_gpu.WAITS.items()})
        module.on_step = on_step
        on_step()
        if module.steps == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    callbacks.RECORDS = 3
    GenerativeModule.step, cost = watched, GenerativeModule.cost  # type: ignore[method-assign]
    GenerativeModule.cost = lambda *_: 1  # type: ignore[method-assign]  # which is not counted on the device
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            for stop in (6, 0):  # between two records, so that the terms of a loss are saved and restored
                seen.clear()
                words = words_of(family) if stop else [f"resume={next(Path('outputs').glob('*/*'))}"]
                err = io.StringIO()
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                    code = command(*words)
                if code != (143 if stop else 0):
                    return f"{words} exits with {code}: {err.getvalue()[-2000:]}"
            scores = json.loads(next(Path("outputs").glob("*/*/results/*.json")).read_text())["metrics"]
        finally:
            GenerativeModule.step, GenerativeModule.cost = step, cost  # type: ignore[method-assign]
    if any(entry["value"] is None for entry in scores.values()):
        return f"not scored: {[name for name, entry in scores.items() if entry['value'] is None]}"
    return "waits: " + "; ".join(f"{count}x {key}" for key, count in found.items()) if found else ""


def scenarios() -> dict[str, Callable[[], str]]:
    """Name everything that is tried."""
    return {
        **{name: functools.partial(train, scenario) for name, scenario in steps().items()},
        **{f"{family}-command": functools.partial(interrupted, family) for family in FAMILIES},
    }


def attempt(work: Callable[[], str]) -> str:
    try:
        return work()
    except BaseException as error:  # which is the result
        lines = traceback.format_exception(error)
        return "".join(lines[-8:])


def main(out: Path, names: list[str]) -> None:
    """Play the scenarios, or some of them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from tests import pretended_gpu

    pretended_gpu.install()
    pretended_gpu.install_in_lightning()
    found = {}
    with pretended_gpu.pretended():
        for name, work in scenarios().items():
            if not names or name in names:
                found[name] = attempt(work)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
