"""``python -m genzoo edit``: inpaint, denoise, enlarge, colourise or deblur with a run, and score it on whole images."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.cli.output import check_format, check_out
from genzoo.cli.trained import chosen_conditions, open_model
from genzoo.errors import UsageError
from genzoo.jobs.resources import resources

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.diffusion.inverse import LinearOperator
    from genzoo.editing.posterior import Posterior
    from genzoo.evaluation.restoration import Score
    from genzoo.model import GenerativeModel

ROWS = 16  # images shown in a picture


@dataclass(frozen=True)
class Subject:
    """Observations to restore, and what is known of them.

    Attributes:
        value: (B, *operator.shape).
        kept: bytes of the pictures, uint8 (B, C, H, W), whose known pixels are copied into the output; None otherwise.
        truth: levels of images, (B, C, H, W), or vectors, (B, D); None for observations.
        y: conditions, (B, *condition.shape); None without.
    """

    value: Tensor
    kept: Tensor | None = None
    truth: Tensor | None = None
    y: Tensor | None = None


def edit(config: dict[str, Any]) -> None:
    """Draw posterior samples by a validated configuration.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    with resources(Path(config["out"]), config["batch_size"], "batch_size"):
        _edit(config)


def _edit(config: dict[str, Any]) -> None:
    from genzoo.config.instantiate import build
    from genzoo.diffusion.denoiser import Denoiser
    from genzoo.editing.posterior import choose, draw_posterior
    from genzoo.editing.task import build_task, read_mask
    from genzoo.loading import guided_by

    out = Path(config["out"])
    check_out(out, (".png", ".npz"))
    scores_path = out.with_suffix(".json")
    if scores_path.is_dir():
        raise UsageError(f"out={out}: the scores go to {scores_path}, which is a folder")
    model = open_model({**config, "guidance": None})
    check_format(out, model.event)
    guidance = build(config["guidance"], "guidance") if config.get("guidance") else None
    guided = model if guidance is None else guided_by(model, guidance)  # whose condition may be that of a classifier
    mask = None if config["mask"] is None else read_mask(config["mask"], model.event)
    operator, sigma = build_task(config["task"], model.event, mask)
    node = config.get("method")
    method = None if node is None else build(node, "method")
    sampler: Any = model.sampler if isinstance(model, Denoiser) and config.get("sampler") else None
    chosen = choose(model, operator, sigma, method, sampler, guidance)
    subject = find_subject(config, guided, operator, sigma)
    drawn = draw_posterior(
        model,
        chosen,
        operator,
        subject.value,
        sigma,
        config["n"],
        y=subject.y,
        seed=config["seed"],
        batch_size=config["batch_size"],
    )
    write(out, model, operator, subject, drawn)
    count = f"{len(subject.value)} image{'s' if len(subject.value) > 1 else ''}, " if len(subject.value) > 1 else ""
    if subject.truth is not None:
        score(scores_path, config, model, operator, sigma, subject, drawn)
    print(
        f"{count}{config['n']} draws each, {drawn.nfe} evaluations per draw, mean spread {drawn.std.mean():.3f}: {out}"
    )


def find_subject(config: dict[str, Any], model: GenerativeModel, operator: LinearOperator, sigma: float) -> Subject:
    """Read the observations, or read whole images and degrade them.

    Raises:
        UsageError: naming the file and the cause.
    """
    from genzoo.conditions import Tokens
    from genzoo.editing.posterior import degrade
    from genzoo.editing.task import read_observation

    asked = chosen_conditions(config, model)
    if model.condition is not None and asked is None and config["split"] is None:
        if isinstance(model.condition, Tokens):
            raise UsageError("text is missing: the model is conditional; set text=..., the caption of the image")
        raise UsageError("label is missing: the model is conditional; set label=..., the class of the image")
    if config["split"] is not None or Path(config["image"]).is_dir():
        x, truth, y = whole_events(config, model)
        subject = Subject(degrade(x, operator, sigma, config["seed"]), None, truth, y)
    else:
        value, kept = read_observation(Path(config["image"]), operator, model.event)
        subject = Subject(value, None if sigma else kept)
    return subject if asked is None else replace(subject, y=asked.y[:1].repeat_interleave(len(subject.value), dim=0))


def whole_events(config: dict[str, Any], model: GenerativeModel) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read whole events of a folder or of the test split.

    Returns:
        Events on the scale of the data, (B, *shape), dequantised if images; their levels if images; their conditions.
    """
    from genzoo.data.pictures import read_samples
    from genzoo.distributions.discretization import dequantize
    from genzoo.editing.task import to_levels
    from genzoo.jobs.notes import note
    from genzoo.numerics.random import SampleStreams, seed_of

    y: Tensor | None = None
    if config["split"] is not None:
        split = test_split(config)
        x, y = split.x, (split.y if model.condition is not None else None)
        if tuple(x.shape[1:]) != model.shape:
            raise UsageError(f"split=test: its events have the shape {tuple(x.shape[1:])}, the model {model.shape}")
    else:
        stored = read_samples(Path(config["image"]), model.shape, model.levels, note)
        x = stored if model.levels is None else to_levels(stored, model.levels)
    x = x[: config["images"]]
    if y is not None:
        y = y[: config["images"]]
    if model.levels is None:
        return x, x, y
    return dequantize(x, model.levels, SampleStreams(seed_of("truth", config["seed"]), range(len(x)))), x.long(), y


def test_split(config: dict[str, Any]) -> Any:
    """Load the test split of the run.

    Raises:
        UsageError: for a run without data, and data without a test split.
    """
    from genzoo.jobs.run_data import build_data, data_section
    from genzoo.runs import Run

    run = Run(config["run"])
    data = build_data(run, data_section(run), config["trust"])
    if not len(data.test.x):
        raise UsageError(f"split=test: the data of {run.path} have no test split")
    return data.test


def write(out: Path, model: GenerativeModel, operator: LinearOperator, subject: Subject, drawn: Posterior) -> None:
    """Write a picture of observations, draws, means and spreads, a row for each image, or an .npz of all of them.

    Known pixels of a picture that was read are those of its file.
    """
    import numpy as np

    from genzoo.data.pictures import grid, save_png, save_scatter
    from genzoo.runs import write_atomically

    file = io.BytesIO()
    if model.levels is None:
        if out.suffix == ".npz":
            arrays = {"samples": drawn.draws, "mean": drawn.mean, "std": drawn.std, "observed": subject.value}
            np.savez(file, **{name: x.numpy() for name, x in arrays.items()})  # type: ignore[arg-type]
        else:
            save_scatter(file, drawn.draws.flatten(0, 1))
        write_atomically(out, file.getvalue())
        return
    observed, draws, mean = picture_bytes(model.levels, operator, subject, drawn)
    if out.suffix == ".npz":
        np.savez(file, samples=draws, mean=mean, std=drawn.std.numpy(), observed=subject.value.numpy())
    else:
        spread = drawn.std / drawn.std.amax().clamp(min=1e-6)
        shown = (255 * spread).round().byte().permute(0, 2, 3, 1).numpy()
        rows = np.concatenate([observed[:, None], draws, mean[:, None], shown[:, None]], axis=1)[:ROWS]
        save_png(file, grid(rows.reshape(-1, *rows.shape[2:]), rows.shape[1]))
    write_atomically(out, file.getvalue())


def picture_bytes(levels: int, operator: LinearOperator, subject: Subject, drawn: Posterior) -> tuple[Any, Any, Any]:
    """Convert observations, (B, H, W, C), draws, (B, n, H, W, C), and means to bytes, with the known pixels of the files."""
    import numpy as np

    from genzoo.data.pictures import as_bytes
    from genzoo.diffusion.inverse import Downsampling, Grey, Inpainting

    B, n = drawn.draws.shape[:2]
    draws = as_bytes(drawn.draws.flatten(0, 1), levels)
    draws, mean = draws.reshape(B, n, *draws.shape[1:]), as_bytes(drawn.mean, levels)
    value = subject.value
    if isinstance(operator, Inpainting):
        unknown = operator.unknown.permute(1, 2, 0).numpy()
        observed = np.where(unknown, np.uint8(128), as_bytes(operator.adjoint(value), levels))
        if subject.kept is not None:
            kept = subject.kept.permute(0, 2, 3, 1).numpy()
            observed, mean = np.where(unknown, observed, kept), np.where(unknown, mean, kept)
            draws = np.where(unknown, draws, kept[:, None])
        return observed, draws, mean
    if isinstance(operator, Downsampling):
        value = value.repeat_interleave(operator.factor, -1).repeat_interleave(operator.factor, -2)
    elif isinstance(operator, Grey):
        value = value.expand(-1, 3, -1, -1)
    return as_bytes(value, levels), draws, mean


def score(
    path: Path,
    config: dict[str, Any],
    model: GenerativeModel,
    operator: LinearOperator,
    sigma: float,
    subject: Subject,
    drawn: Posterior,
) -> None:
    """Score the draws against the truth, write the scores, and print them."""
    from genzoo.diffusion.inverse import Inpainting
    from genzoo.evaluation.restoration import restoration_scores
    from genzoo.runs import now, to_json, write_atomically

    assert subject.truth is not None
    unknown = operator.unknown if isinstance(operator, Inpainting) else None
    scores = restoration_scores(subject.truth, drawn.draws, model.levels, unknown)
    result = {
        "scored": now(),
        "setting": {
            "run": str(config["run"]),
            "subject": config["image"] or f"split={config['split']}",
            "images": len(subject.truth),
            "n": config["n"],
            "nfe": drawn.nfe,
            "task": {**config["task"], "mask": config["mask"], "sigma": sigma},
            "method": config.get("method"),
            "sampler": config.get("sampler"),
            "guidance": config.get("guidance"),
            "label": config["label"],
            "text": config.get("text"),
            "seed": config["seed"],
            "weights": "ema" if config["ema"] else "raw",
        },
        "scores": {name: value._asdict() for name, value in scores.items()},
    }
    write_atomically(path, to_json(result))
    show(scores, config["n"])
    print(f"scores: {path}")


MEANINGS: dict[str, Callable[[int], str]] = {
    "coverage": lambda n: f"fraction of unknown pixels inside central intervals of {n} draws",
    "psnr_mean": lambda n: f"dB, of the mean of {n} draws; bytes, peak 255",
    "psnr_draw": lambda n: "dB, of one draw; bytes, peak 255",
    "ssim_mean": lambda n: f"of the mean of {n} draws",
    "ssim_draw": lambda n: "of one draw",
    "rmse_mean": lambda n: f"of the mean of {n} draws",
    "rmse_draw": lambda n: "of one draw",
}


def show(scores: dict[str, Score], n: int) -> None:
    """Print the scores; a calibrated posterior has the nominal coverage."""
    for name, (value, stderr, _) in scores.items():
        kind, _, level = name.partition("_")
        text = MEANINGS[kind if kind == "coverage" else name](n)
        nominal = f" (calibrated: 0.{level})" if kind == "coverage" else ""
        print(f"{name:<12}{value:>9.4f} ± {0.0 if stderr is None else stderr:<8.2g}{text}{nominal}")
