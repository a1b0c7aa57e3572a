"""Python interface: train, sample, evaluate, edit and compare, equivalent to the command line.

    import genzoo
    run = genzoo.train(model="ddpm", data=images, budget="minute")     # images: an array, a tensor, a Dataset or a folder
    x = genzoo.sample(run, 16)
    scores = genzoo.evaluate(run)
    genzoo.compare([run, other], out="comparison")

Runs are directories, interchangeable with those of ``python -m genzoo``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genzoo import variations
from genzoo.conditions import ClassLabels, Tokens
from genzoo.config.check import check_section
from genzoo.config.compose import preflight
from genzoo.config.instantiate import build
from genzoo.data import DataSet
from genzoo.data.from_arrays import as_dataset, as_examples
from genzoo.devices import pick_device
from genzoo.diffusion.denoiser import sampling_denoiser
from genzoo.diffusion.guidance import ClassifierFreeGuidance, GuidedModel
from genzoo.diffusion.inverse import Identity, Inpainting, LinearOperator
from genzoo.editing.posterior import Posterior, choose, draw_posterior
from genzoo.editing.task import build_task, read_mask, read_observation
from genzoo.errors import UsageError
from genzoo.evaluation.density import check_settings
from genzoo.evaluation.scores import Trained, evaluate_model, pick_network
from genzoo.evaluation.settings import EvalData, EvalSettings
from genzoo.event import EventSpec
from genzoo.jobs.building import make_data
from genzoo.jobs.run_data import build_data, data_section, has_changed
from genzoo.jobs.train import train as train_config
from genzoo.labels import check_trained, class_names, class_numbers
from genzoo.loading import guided, guided_by, load, load_trained, reranked, with_augmentation, with_prior_guidance
from genzoo.model import GenerativeModel, TrainableModel
from genzoo.numerics.precision import full_float32
from genzoo.numerics.random import SampleStreams
from genzoo.report.comparison import write_comparison
from genzoo.runs import Run, write_atomically
from genzoo.text import encode_texts

Data = Any  # an array, a tensor, a torch Dataset, a folder, or the name of a file of conf/data


def train(
    model: str = "vae",
    data: Data = "digits",
    *,
    y: Any = None,
    conditional: bool | None = None,
    budget: str | Mapping[str, float] | None = None,
    seed: int = 0,
    outputs: str | os.PathLike[str] = "outputs",
    test_fraction: float = 0.1,
    overrides: Sequence[str] = (),
) -> Run:
    """Train a model in a new run directory and evaluate it.

        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(200, 2)).astype("float32")
        >>> run = train("realnvp", x, budget={"images": 1024}, outputs="runs", overrides=["metrics.n=0"])
        >>> run.status["state"]
        'done'

    Args:
        model: a file of ``conf/model``, such as "ddpm".
        data: images or vectors as an array or tensor, see ``genzoo.data.from_arrays.as_examples``; a torch ``Dataset`` of ``x``
            or ``(x, y)``; a folder of pictures; or a file of ``conf/data``, such as "fashion_mnist".
        y: conditions of an array: classes as integers (N,), other conditions as floats (N, d).
        conditional: whether the model is conditioned on the data's conditions; by default where ``y`` is given.
        budget: a file of ``conf/budget``, or limits: ``{"seconds": 60}``, ``{"images": 1e6}``, ``{"flops": 1e15}``.
        seed: of weights, order and noise.
        outputs: folder of run directories.
        test_fraction: held-out fraction of an array.
        overrides: further overrides, ``["optimizer.lr=1e-4"]``.

    Returns:
        The run.

    Raises:
        ValueError: with a one-line message, for invalid arguments; nothing is written then.
    """
    words = [f"model={model}", *_data_overrides(data, y, Path(outputs), test_fraction), f"seed={seed}"]
    if conditional is None:
        conditional = y is not None
    words += [f"outputs={_quoted(outputs)}", *(["data.conditional=true"] if conditional else [])]
    if isinstance(budget, str):
        words.append(f"budget={budget}")
    elif budget is not None:
        words += _budget_overrides(budget)
    job = preflight("train", [*words, *overrides])
    assert job is not None
    path = train_config(job.config, job.choices)
    assert path is not None, "only rank 0 returns a run"
    return Run(path)


def sample(
    run: Run | str | os.PathLike[str] | GenerativeModel,
    n: int = 64,
    *,
    label: int | str | Sequence[int | str] | None = None,
    text: str | Sequence[str] | None = None,
    y: Any = None,
    seed: int = 0,
    batch_size: int = 64,
    sampler: Mapping[str, Any] | None = None,
    guidance: float | Mapping[str, Any] | None = None,
    augmentation: float | None = None,
    prior_guidance: float | None = None,
    candidates: int = 1,
    ranker: Run | str | os.PathLike[str] | None = None,
    ema: bool = True,
    device: str = "auto",
) -> Tensor:
    """Draw samples of a run or a model; sample i is a function of the seed and i.

        >>> sample("runs-of-the-example", 4).shape        # doctest: +SKIP
        torch.Size([4, 2])

    Args:
        run: a run directory, or a model.
        n: number of samples, of each class or caption where several are listed.
        label: class of all samples, by number or by name; a list of classes, or a range such as "0-9".
        text: caption of all samples, or a list of captions; runs only.
        y: conditions as a tensor or an array, (n, *condition.shape); not with ``label`` and ``text``.
        seed: of all noise.
        batch_size: samples drawn at once; does not change the samples.
        sampler: configuration of another sampler; runs only.
        guidance: scale s of classifier-free guidance, u + s (c - u), or the configuration of another guidance.
        augmentation: noise level of the smaller images of a cascade.
        prior_guidance: scale of the guidance of unclip's prior, as ``guidance`` is of its decoder.
        candidates: samples drawn for each one that is kept, the one that ``ranker`` finds closest to its caption.
        ranker: a run of a contrastive network, or the name of one included in genzoo, such as "clip_shapes".
        ema: whether to use the EMA weights; runs only.
        device: "cpu", "cuda" or "auto"; runs only.

    Returns:
        (n, *shape): images on [-1, 1], or vectors.

    Raises:
        ValueError: with a one-line message, for invalid arguments.
    """
    for name, value in (("n", n), ("seed", seed), ("batch_size", batch_size), ("candidates", candidates)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UsageError(f"{name}={value!r}: must be an integer")
    if candidates < 1:
        raise UsageError(f"candidates={candidates}: must be at least 1")
    if n < 0 or batch_size < 1:
        raise UsageError(f"n={n}, batch_size={batch_size}: there are at least 0 samples, and 1 is drawn at once")
    model = _model(
        run,
        ema=ema,
        device=device,
        sampler=sampler,
        guidance=guidance,
        augmentation=augmentation,
        prior_guidance=prior_guidance,
    )
    opened = None if isinstance(run, GenerativeModel) else run if isinstance(run, Run) else Run(run)
    model = reranked(model, ranker.path if isinstance(ranker, Run) else ranker, candidates, opened)
    if sum(value is not None for value in (label, text, y)) > 1:
        raise UsageError("label, text, y: pass only one of them")
    given = _classes(run, model, label) if label is not None else _texts(run, model, text) if text is not None else None
    if given is not None:
        y = torch.as_tensor(given).repeat_interleave(n, dim=0)
        n *= len(given)
    if y is not None:
        y = torch.as_tensor(y)
        y = y if y.is_floating_point() else y.long()
    if y is not None and (not y.ndim or len(y) != n):
        raise UsageError(f"y: {len(y) if y.ndim else 'no'} conditions for {n} samples")
    parts = []
    for start in range(0, n, batch_size):
        rows = range(start, min(start + batch_size, n))
        own = None if y is None else y[rows.start : rows.stop].to(model.device)
        with full_float32():
            parts.append(model.sample(len(rows), own, rng=SampleStreams(seed, rows, device=model.device)).x.cpu())
    return torch.cat(parts) if parts else torch.empty(0, *model.shape, dtype=model.dtype)


def evaluate(
    run: Run | str | os.PathLike[str] | GenerativeModel,
    data: Data = None,
    *,
    y: Any = None,
    seed: int = 0,
    ema: bool = True,
    device: str = "auto",
    sampler: Mapping[str, Any] | None = None,
    guidance: float | Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate a run on its own data, or a model on given data.

        >>> scores = evaluate("runs-of-the-example", n=500)     # doctest: +SKIP
        >>> scores["test/nll"]["value"]                         # doctest: +SKIP
        2.84

    Args:
        run: a run directory, or a model.
        data: as in ``train``, for a model; None for the data of the run. All examples of an array are scored.
        y: conditions of an array.
        seed: of all noise.
        ema, device, sampler, guidance: as in ``sample``; the scores of guided samples have no density beside them.
        settings: of ``genzoo.evaluation.settings.EvalSettings``, such as ``n=10_000``.

    Returns:
        ``{name: {"value", "stderr", "better", "card"}}``, with protocol and setting in the card. Nothing is written.

    Raises:
        ValueError: with a one-line message, for invalid arguments.
    """
    unknown = settings.keys() - {field.name for field in fields(EvalSettings)}
    if unknown:
        raise UsageError(f"{', '.join(sorted(unknown))}: not a setting of an evaluation")
    model: TrainableModel
    if isinstance(run, GenerativeModel) or sampler is not None or guidance is not None:
        model = _model(run, ema=ema, device=device, sampler=sampler, guidance=guidance)
    else:
        model = load_trained(_path(run), ema=ema, device=pick_device(device))
    trained = None
    if isinstance(run, GenerativeModel):
        if data is None:
            raise UsageError("data: required to evaluate a model")
        eval_data = _dataset(data, y, model.event)
    elif data is not None or y is not None:
        raise UsageError("data, y: a run is scored on its own data; evaluate its model on others, genzoo.load(run)")
    else:
        opened = Run(_path(run))
        trained = Trained.of_run(opened, ema=ema)
        section = data_section(opened)
        found = build_data(opened, section)
        if has_changed(opened, found):
            raise UsageError(f"{opened.path}: the data have changed since training")
        own = opened.config.get("metrics")
        settings = {**(check_section("metrics", own) if own else {}), **settings}
        eval_data = EvalData(found, section["name"], bool(section.get("flip")))
    if not isinstance(model, GenerativeModel):
        settings["n"] = 0
    options = EvalSettings(**settings)
    if model.event != eval_data.data.event:
        raise UsageError(f"data: {eval_data.data.event}, but the model has {model.event}")
    if model.condition and eval_data.data.condition is None:
        raise UsageError(f"y: the model has the condition {model.condition}, and the data have none")
    check_settings(model, options)
    network = pick_network(options, eval_data.name, eval_data.data.event, needed=False)
    network = network and network.to(model.device)
    result = evaluate_model(model, eval_data, options, network, seed=seed, trained=trained, chosen=sampler is not None)
    return result["metrics"]


def edit(
    run: Run | str | os.PathLike[str],
    image: Any,
    task: str = "inpaint",
    *,
    mask: Any = None,
    method: str | None = None,
    n: int = 8,
    label: int | str | None = None,
    text: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    sampler: Mapping[str, Any] | None = None,
    guidance: float | Mapping[str, Any] | None = None,
    ema: bool = True,
    device: str = "auto",
    overrides: Sequence[str] = (),
) -> Posterior:
    """Draw from the posterior of a whole image, given its degraded observation.

        >>> found = edit("runs-of-the-example", "digit.png", mask="bottom")     # doctest: +SKIP
        >>> found.draws.shape, found.mean.shape, found.std.shape                # doctest: +SKIP
        (torch.Size([1, 8, 1, 8, 8]), torch.Size([1, 1, 8, 8]), torch.Size([1, 1, 8, 8]))

    Args:
        run: a run directory.
        image: the observation: a picture, an .npz or .npy; or values on the scale of the data as an array or tensor, one event
            or a batch, for inpainting of the shape of whole events, whose unknown coordinates are ignored.
        task: a file of ``conf/task``: inpaint, denoise, super_resolution, colourise or deblur.
        mask: of inpainting: a file or a region, as for the command, or a bool array or tensor, true where unknown.
        method: a file of ``conf/method``; by default chosen by the family.
        n: draws of each observation.
        label: class of a conditional model, by number or by name.
        text: caption, of a model trained with captions.
        seed: of all noise.
        batch_size: samples drawn at once; does not change the samples.
        sampler: configuration of the sampler of a denoiser's prior.
        guidance: of a denoiser's prior, as in ``sample``.
        ema, device: as in ``sample``.
        overrides: further overrides, ``["task.sigma=0.1", "method.iterations=5"]``.

    Returns:
        ``draws``, (B, n, *shape), with their ``mean`` and ``std``, (B, *shape), and ``nfe``.

    Raises:
        ValueError: with a one-line message, for invalid arguments.
    """
    words = [f"run={_quoted(_path(run))}", f"task={task}", f"n={n}", "image=given", *overrides]
    job = preflight("edit", [*words, *([f"method={method}"] if method else [])])
    assert job is not None
    model = _model(run, ema=ema, device=device, sampler=sampler, guidance=None)
    unknown = read_mask(str(mask), model.event) if isinstance(mask, str | os.PathLike) else mask
    unknown = None if unknown is None else torch.as_tensor(unknown).bool()
    if unknown is not None and model.event.is_image and unknown.ndim == 2:
        unknown = unknown[None]  # of all channels
    operator, sigma = build_task(job.config["task"], model.event, unknown)
    value = _observed(image, operator, model)
    guide_by = None if guidance is None else build(_guidance_config(guidance), "guidance")
    guided_model = model if guide_by is None else guided_by(model, guide_by)
    if label is not None and text is not None:
        raise UsageError("label, text: pass only one of them")
    given = None
    if label is not None:
        given = torch.tensor(_classes(run, guided_model, label))
    elif text is not None:
        given = _texts(run, guided_model, text)
    elif guided_model.condition is not None:
        key = "text" if isinstance(guided_model.condition, Tokens) else "label"
        raise UsageError(f"{key} is missing: the model is conditional")
    if given is not None and len(given) > 1:
        raise UsageError(f"label={label}, text={text}: must be one condition, that of all observations")
    y = None if given is None else given.repeat_interleave(len(value), dim=0)
    node = job.config.get("method")
    denoiser: Any = sampling_denoiser(model) if sampler is not None else None
    build_sampler = choose(
        model,
        operator,
        sigma,
        None if node is None else build(node, "method"),
        denoiser and denoiser.sampler,
        guide_by,
    )
    return draw_posterior(model, build_sampler, operator, value, sigma, n, y=y, seed=seed, batch_size=batch_size)


def vary(
    run: Run | str | os.PathLike[str],
    image: Any,
    *,
    to: Any = None,
    from_text: str | None = None,
    text: str | None = None,
    n: int | None = None,
    steps: int = variations.STEPS,
    strength: float = 0.5,
    invert: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    sampler: Mapping[str, Any] | None = None,
    guidance: float | Mapping[str, Any] | None = None,
    ema: bool = True,
    device: str = "auto",
) -> Tensor:
    """Draw variations of an image, or paths from it, to another image or as two texts describe.

        >>> vary("run-of-unclip", "ring.png", from_text="a red ring", text="a blue ring").shape     # doctest: +SKIP
        torch.Size([3, 8, 3, 32, 32])

    Args:
        run: a run directory of unclip.
        image, to: pictures, or values on the scale of the data, (*shape).
        from_text, text: captions, of a model trained with captions.
        n: number of variations, or of rows of a path; None for 8 variations or 3 rows.
        steps: points of a path.
        strength: part of the great circle towards the difference of the texts, in (0, 1].
        invert: whether the noise is that of the image itself, so that the first point is its reconstruction.
        seed: of the noise; that of row i is a function of the seed and i.
        batch_size, sampler, guidance, ema, device: as in ``sample``.

    Returns:
        (rows, columns, *shape), of variations in one row.

    Raises:
        ValueError: with a one-line message, for invalid arguments.
    """
    opened = _model(run, ema=ema, device=device, sampler=sampler, guidance=guidance)
    model = variations.varied_model(opened.prior if isinstance(opened, GuidedModel) else opened)
    if (from_text is None) != (text is None):
        raise UsageError("from_text, text: a change is from a text to another; set both")
    if invert and opened is not model:
        raise UsageError("invert: the noise of an image is that of the model without guidance; omit guidance")
    ends = [None if x is None else _observed(x, Identity(model.shape), model) for x in (image, to)]
    if any(x is not None and len(x) != 1 for x in ends):
        raise UsageError("image, to: one image each")
    first, second = (None if x is None else x[0].to(model.device, model.dtype) for x in ends)
    if first is None:
        raise UsageError("image is missing")
    texts = None
    if from_text is not None and text is not None:
        before, after = _texts(run, model, [from_text, text]).to(model.device)
        texts = before, after
    with full_float32():
        return variations.vary(
            model,
            first,
            to=second,
            texts=texts,
            n=n,
            steps=steps,
            strength=strength,
            invert=invert,
            seed=seed,
            batch_size=batch_size,
        ).x


def compare(
    runs: Iterable[Run | str | os.PathLike[str]] | Run | str | os.PathLike[str],
    out: str | os.PathLike[str] = "comparison",
    title: str | None = None,
) -> Path:
    """Write the comparison of runs: a web page, and the leaderboard as Markdown and CSV.

    Args:
        runs: run directories, or folders of them; one or several.
        out: folder of the comparison.
        title: heading of the page.

    Returns:
        The page.

    Raises:
        ValueError: with a one-line message, if there is no run, or the files cannot be written.
    """
    if isinstance(runs, Run | str | os.PathLike):
        runs = [runs]
    folders = [str(_path(run)) for run in runs]
    if not folders:
        raise UsageError("runs: there are none to compare")
    return write_comparison(folders, Path(out), title)


def _observed(image: Any, operator: LinearOperator, model: GenerativeModel) -> Tensor:
    """Return observations on the scale of the data, (B, *operator.shape), of a file, an event or a batch."""
    if isinstance(image, str | os.PathLike):
        return read_observation(Path(image), operator, model.event)[0]
    value = torch.as_tensor(image, device="cpu")
    if not value.is_floating_point():
        raise UsageError(
            f"image: is {str(value.dtype).removeprefix('torch.')}; images are floats on [-1, 1], vectors floats"
        )
    value = value.to(model.dtype)
    inpaints = isinstance(operator, Inpainting)
    shape = operator.event_shape if inpaints else operator.shape
    value = value[None] if tuple(value.shape) == shape else value
    if tuple(value.shape[1:]) != shape:
        raise UsageError(f"image: has shape {tuple(value.shape)}, not {shape} or a batch of these")
    known = operator(value) if inpaints else value
    if not len(value) or not bool(known.isfinite().all()):
        raise UsageError("image: holds NaN or infinity" if len(value) else "image: holds no observation")
    return operator(value) if inpaints else value


def _path(run: Run | str | os.PathLike[str]) -> Path:
    if not isinstance(run, Run | str | os.PathLike):
        raise UsageError(f"run: {type(run).__name__} is no run directory")
    return run.path if isinstance(run, Run) else Path(run)


def _model(
    run: Run | str | os.PathLike[str] | GenerativeModel,
    *,
    ema: bool,
    device: str,
    sampler: Mapping[str, Any] | None,
    guidance: float | Mapping[str, Any] | None,
    augmentation: float | None = None,
    prior_guidance: float | None = None,
) -> GenerativeModel:
    config = None if guidance is None else _guidance_config(guidance)
    if isinstance(run, GenerativeModel):
        if sampler is not None:
            raise UsageError("sampler: for a model, set model.sampler")
        model = run.eval() if augmentation is None else with_augmentation(run.eval(), augmentation)
        model = model if prior_guidance is None else with_prior_guidance(model, prior_guidance)
        return model if config is None else guided(model, config)
    if sampler is not None and not isinstance(sampler, Mapping):
        raise UsageError(f"sampler={sampler}: a configuration such as {{'_target_': 'genzoo.diffusion.samplers.Heun'}}")
    own = None if sampler is None else dict(sampler)
    return load(
        _path(run),
        ema=ema,
        device=pick_device(device),
        sampler=own,
        guidance=config,
        augmentation=augmentation,
        prior_guidance=prior_guidance,
    )


def _classes(run: Run | str | os.PathLike[str] | GenerativeModel, model: GenerativeModel, label: Any) -> list[int]:
    """Return the classes of ``label`` of a run or a model, each with training examples."""
    n = model.condition.n if isinstance(model.condition, ClassLabels) else 0
    names = [] if isinstance(run, GenerativeModel) else class_names(str(_path(run)))
    found = class_numbers(label.tolist() if isinstance(label, np.ndarray | np.generic | Tensor) else label, n, names)
    check_trained(found, model.conditioner.probs.tolist(), names)
    return found


def _texts(
    run: Run | str | os.PathLike[str] | GenerativeModel, model: GenerativeModel, text: str | Sequence[str]
) -> Tensor:
    """Encode captions by the tokenizer of a run, (k, L)."""
    if isinstance(run, GenerativeModel):
        raise UsageError("text: the tokenizer belongs to a run; for a model pass its tokens, y=...")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(item, str) for item in texts):
        raise UsageError(f"text={texts!r}: must be a caption or a list of captions")
    return encode_texts(Run(_path(run)), model.condition, texts)


def _guidance_config(guidance: float | Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of classifier-free guidance with a scale, or a given one."""
    if isinstance(guidance, Mapping):
        if "_target_" not in guidance:
            raise UsageError(
                f"guidance={dict(guidance)}: has no _target_; classifier-free guidance is a scale, guidance=2.0"
            )
        return dict(guidance)
    if isinstance(guidance, bool) or not isinstance(guidance, Real):
        raise UsageError(f"guidance={guidance!r}: a scale such as 2.0, or a configuration")
    name = f"{ClassifierFreeGuidance.__module__}.{ClassifierFreeGuidance.__qualname__}"
    return {"_target_": name, "_partial_": True, "scale": float(guidance)}


def _quoted(value: object) -> str:
    """Quote a value for Hydra's grammar."""
    return json.dumps(str(value), ensure_ascii=False)


def _budget_overrides(budget: Mapping[str, float]) -> list[str]:
    """Return the overrides that set the limits of a budget."""
    if not isinstance(budget, Mapping):
        raise UsageError(f"budget={budget}: the name of a budget, or limits such as {{'seconds': 60}}")
    for name, limit in budget.items():
        if isinstance(limit, bool) or not isinstance(limit, Real):
            raise UsageError(f"budget.{name}={limit!r}: a limit is a number")
    limits = {name: float(limit) for name, limit in budget.items()}
    return [f"budget.{name}={int(limit) if limit.is_integer() else limit}" for name, limit in limits.items()]


def _data_overrides(data: Data, y: Any, outputs: Path, test_fraction: float) -> list[str]:
    """Return the overrides that name some data; arrays are written beside the runs first, by their hash."""
    if isinstance(data, str | os.PathLike):
        if y is not None:
            raise UsageError("y: requires an array; a folder and a named data set have their own conditions")
        if isinstance(data, os.PathLike) or os.sep in data or Path(data).is_dir():
            return ["data=folder", f"data.root={_quoted(Path(data).absolute())}"]
        return [f"data={data}"]
    examples = as_examples(data, y)
    as_dataset(examples, test_fraction)  # raises before anything is written
    file = io.BytesIO()
    np.savez(file, x=examples.x) if examples.y is None else np.savez(file, x=examples.x, y=examples.y)
    digest = hashlib.sha256(examples.x.tobytes() + (b"" if examples.y is None else examples.y.tobytes())).hexdigest()
    path = (outputs / "data" / f"{digest[:16]}.npz").absolute()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, file.getvalue())
    kind: Literal["array", "vectors"] = "array" if examples.x.ndim == 4 else "vectors"
    shape = ",".join(map(str, examples.x.shape[1:]))
    return [
        f"data={kind}",
        f"data.root={_quoted(path)}",
        f"data.shape=[{shape}]",
        f"data.test_fraction={test_fraction}",
    ]


def _dataset(data: Data, y: Any, event: EventSpec) -> EvalData:
    """Make the data that a model of an event is evaluated on; a folder's pictures get the model's size and channels."""
    if isinstance(data, DataSet):
        return EvalData(data, "data", False)
    if isinstance(data, str | os.PathLike):
        words = _data_overrides(data, y, Path(), 0.1)
        if words[0] == "data=folder":
            words.append("data.test_fraction=0")
        if words[0] == "data=folder" and event.is_image:
            words += [f"data.size={event.shape[-1]}", f"data.channels={event.shape[0]}"]
        job = preflight("train", words)
        assert job is not None
        section = job.config["data"]
        return EvalData(make_data(section, build), section["name"], bool(section["flip"]))
    found = as_dataset(as_examples(data, y), test_fraction=0)
    EventSpec(found.shape, found.levels)
    return EvalData(found, "data", False)
