"""The trained models of a page: loaded once, sampled side by side by one seed and class."""

from __future__ import annotations

import functools
import io
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from genzoo.conditions import ClassLabels, Tokens
from genzoo.data import DataSet
from genzoo.data.pictures import CHANNELS, as_bytes, grid, save_scatter
from genzoo.devices import pick_device
from genzoo.diffusion.denoiser import path_model
from genzoo.diffusion.guidance import ClassifierFreeGuidance, guide
from genzoo.diffusion.inverse import Inpainting
from genzoo.diffusion.samplers import DDIM, Ancestral, DPMSolver, Euler, Heun, Sampler
from genzoo.distributions.discretization import bin_center
from genzoo.editing.posterior import choose, draw_posterior
from genzoo.errors import UsageError, one_line
from genzoo.jobs.run_data import build_data, data_section
from genzoo.labels import check_trained, class_names
from genzoo.loading import check_sampler, load_trained, with_sampler
from genzoo.model import GenerativeModel
from genzoo.numerics.precision import full_float32
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run
from genzoo.text import encode_texts

OWN = "as in training"
SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIM,
    "dpm_solver": DPMSolver,
    "heun": Heun,
    "euler": Euler,
    "ancestral": Ancestral,
}
ANY = "any"  # class, drawn by its frequency in the training data
MOST = 64  # samples at once
MOST_STEPS = 1000


@dataclass(frozen=True)
class Settings:
    """What is the same for all models.

    Attributes:
        seed: of all noise.
        n: number of samples.
        label: name of a class, or "any".
        sampler: "as in training", or a name of ``SAMPLERS``.
        steps: of the sampler; 0 for its own number.
        guidance: scale of classifier-free guidance, 1 for none.
        text: caption of all samples; "" for captions of the training data.
    """

    seed: int = 0
    n: int = 16
    label: str = ANY
    sampler: str = OWN
    steps: int = 0
    guidance: float = 1.0
    text: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MOST:
            raise UsageError(f"n={self.n}: 1 to {MOST} samples")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed={self.seed}: must be at least 0")
        if not 0 <= self.steps <= MOST_STEPS:
            raise UsageError(f"steps={self.steps}: 0 to {MOST_STEPS}")
        if self.sampler not in (OWN, *SAMPLERS):
            raise UsageError(f"sampler={self.sampler}: one of {', '.join((OWN, *SAMPLERS))}")


class Drawn(NamedTuple):
    """The samples of one model, or the reason why there are none."""

    picture: np.ndarray | None  # (H, W, 3) uint8
    text: str


class Shelf:
    """The generative models of runs; runs of classifiers are left out.

    Args:
        runs: run directories.
        device: "cpu", "cuda" or "auto".
        trust: allowed classes outside genzoo in the configurations of the runs.

    Raises:
        ValueError: with a one-line message, for an invalid run, and for data that a page cannot show.
    """

    def __init__(self, runs: Sequence[Path], device: str = "auto", trust: Sequence[str] = ()):
        self.trust = list(trust)
        self.runs: list[Path] = []
        self.models: list[GenerativeModel] = []
        self._lock = threading.Lock()  # requests may arrive at the same time
        for path in runs:
            model = load_trained(path, device=pick_device(device), trust=trust)
            if not isinstance(model, GenerativeModel):
                continue
            if model.levels is not None and model.shape[0] not in CHANNELS:
                raise UsageError(f"runs={path}: images of {model.shape[0]} channels cannot be shown")
            self.runs.append(path)
            self.models.append(model)
        if not self.models:
            raise UsageError("runs: none of them has samples")
        self.names = _distinct_names(self.runs)

    def classes(self, index: int) -> list[str]:
        """Return the class names of a run that was trained with classes, by number where the names are not stored."""
        condition = self.models[index].condition
        if not isinstance(condition, ClassLabels):
            return []
        names = class_names(str(self.runs[index]))
        return names if len(names) == condition.n else [str(i) for i in range(condition.n)]

    @property
    def all_classes(self) -> list[str]:
        """Class names of all runs, in order."""
        return list(dict.fromkeys(name for index in range(len(self.runs)) for name in self.classes(index)))

    def draw(self, index: int, settings: Settings) -> Drawn:
        """Draw samples of one model, and describe their cost; never raises for a setting that the model lacks."""
        with self._lock:
            try:
                model = configured(self.models[index], settings)
                y = self._conditions(index, settings)
                begun = time.perf_counter()
                with torch.no_grad(), full_float32():
                    streams = SampleStreams(settings.seed, range(settings.n), device=model.device)
                    x, nfe, _ = model.sample(settings.n, y, rng=streams)
                seconds = time.perf_counter() - begun
            except ValueError as error:
                return Drawn(None, one_line(error))
        return Drawn(shown(x, model.levels), f"{seconds / settings.n:.3f} s and {nfe} evaluations an image")

    @functools.cached_property
    def pictures(self) -> DataSet | None:
        """The data of the first run of images, whose test images are offered for filling; None without any."""
        for path, model in zip(self.runs, self.models, strict=True):
            if model.event.is_image:
                run = Run(path)
                return build_data(run, data_section(run), self.trust)
        return None

    def image(self, number: int) -> np.ndarray:
        """Return a test image, (H, W, C) uint8.

        Raises:
            UsageError: for models without images, and a number out of range.
        """
        data = self.pictures
        if data is None or data.levels is None:
            raise UsageError("none of the models is one of images")
        if not 0 <= number < len(data.test.x):
            raise UsageError(f"image {number}: there are {len(data.test.x)} test images")
        return as_bytes(bin_center(data.test.x[number : number + 1], data.levels), data.levels)[0]

    def fill(self, index: int, number: int, unknown: np.ndarray, n: int, seed: int) -> Drawn:
        """Fill the unknown pixels of a test image by one model, with the class of the image if the model has classes.

        Args:
            index: of the run.
            number: of the test image.
            unknown: mask, (H, W) bool.
            n: draws.
            seed: of all noise.
        """
        with self._lock:
            try:
                model, data = self.models[index], self.pictures
                assert data is not None and data.levels is not None
                if model.event != data.event:
                    raise UsageError("this model is one of other images")
                operator = Inpainting(model.shape, torch.from_numpy(unknown)[None])
                x = bin_center(data.test.x[number : number + 1], data.levels)
                y = (
                    data.test.y[number : number + 1]
                    if model.condition is not None and data.test.y is not None
                    else None
                )
                build = choose(model, operator, 0.0, None, None)
                begun = time.perf_counter()
                drawn = draw_posterior(model, build, operator, operator(x), 0.0, n, y=y, seed=seed)
                seconds = time.perf_counter() - begun
            except ValueError as error:
                return Drawn(None, one_line(error))
        text = f"{seconds / n:.3f} s and {drawn.nfe} evaluations a filling"
        return Drawn(shown(drawn.draws[0], model.levels), text)

    @property
    def has_captions(self) -> bool:
        """Whether a model has captions as its condition."""
        return any(isinstance(model.condition, Tokens) for model in self.models)

    def _conditions(self, index: int, settings: Settings) -> torch.Tensor | None:
        if settings.text.strip():
            y = encode_texts(Run(self.runs[index]), self.models[index].condition, [settings.text])
            return y.expand(settings.n, -1).to(self.models[index].device)
        if settings.label == ANY:
            return None
        names = self.classes(index)
        if settings.label not in names:
            what = f"no class {settings.label}" if names else "no classes"
            raise UsageError(f"this model has {what}")
        check_trained([names.index(settings.label)], self.models[index].conditioner.probs.tolist(), names)
        return torch.full((settings.n,), names.index(settings.label), device=self.models[index].device)


def configured(model: GenerativeModel, settings: Settings) -> GenerativeModel:
    """Return a model with the sampler, steps and guidance of the settings; the given one is unchanged.

    Steps and samplers do not apply to models that sample in one pass.

    Raises:
        ValueError: for a sampler or guidance that does not fit the model.
    """
    sampled: Any = path_model(model)
    if sampled is not None and (settings.sampler != OWN or settings.steps):
        sampler = sampled.sampler if settings.sampler == OWN else SAMPLERS[settings.sampler]()
        model = with_sampler(model, sampler, settings.steps or None)
        check_sampler(model)
    if settings.guidance != 1:
        model = guide(model, functools.partial(ClassifierFreeGuidance, scale=settings.guidance))
    return model


def shown(x: torch.Tensor, levels: int | None) -> np.ndarray:
    """Return a picture of samples, (H, W, 3) uint8: a grid of images, or a scatter plot of vectors."""
    if levels is not None:
        return np.broadcast_to(tiled := grid(as_bytes(x.float().cpu(), levels)), (*tiled.shape[:2], 3))
    file = io.BytesIO()
    save_scatter(file, x.cpu())
    return np.asarray(Image.open(file).convert("RGB"))


def _distinct_names(runs: Sequence[Path]) -> list[str]:
    """Return a short name for each run: its model and data, and its folder where these are not distinct."""
    named = []
    for path in runs:
        run = Run(path)
        data = run.config.get("data")
        name = data.get("name") if isinstance(data, dict) else None
        named.append(f"{run.status.get('model') or '?'} on {name or '?'}"[:200])
    return [f"{name}, {path.name}" if named.count(name) > 1 else name for name, path in zip(named, runs, strict=True)]
