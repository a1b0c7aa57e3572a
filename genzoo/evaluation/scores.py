"""What is measured of a model: density, samples, reconstructions and cost, each number with how it was made.

A number carries a card of two parts. The protocol says what must be alike for two numbers to be ranked together; the setting
says what made this one: weights, step, sampler, evaluations, budget, seeds.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from genzoo.console import log_stderr, stderr
from genzoo.devices import device_name
from genzoo.errors import REFUSALS, UsageError, misfit
from genzoo.runs import ResourceError

EVALUATIONS = 50  # of the network that a sample may take where a configuration does not say metrics.max_nfe
HEUN_STEPS = 25  # two evaluations each but the last


class EvalData(NamedTuple):
    """The data that a model is scored on."""

    data: Any  # a DataSet
    name: str
    flip: bool  # whether training saw mirror images


def score(
    model: Any,
    subject: EvalData,
    run: Any,
    settings: dict[str, Any],
    network: Any,
    *,
    seed: int,
    ema: bool,
    chosen: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what the model's abilities allow, and write it into the run.

    Args:
        model: what is scored.
        subject: its data.
        run: where the scores go.
        settings: of the configuration's section ``metrics``.
        network: what features are made of; None for none.
        seed: of all noise.
        ema: whether the weights are the averaged ones.
        chosen: whether the user asked for this sampler, however many evaluations it takes.
        note: called with a sentence where another sampler is used than the model's own.

    Raises:
        NotKept: where they cannot be written; they are in the error.
    """
    from genzoo.numerics.precision import full_float32

    with full_float32():
        return _score(model, subject, run, settings, network, seed, ema, chosen, note)


def _score(
    model: Any,
    subject: EvalData,
    run: Any,
    settings: dict[str, Any],
    network: Any,
    seed: int,
    ema: bool,
    chosen: bool,
    note: Callable[[str], None],
) -> dict[str, Any]:
    from genzoo.model import Codec, Density
    from genzoo.runs import now

    model.eval()
    status = run.status
    setting = {
        "weights": "ema" if ema else "trained",
        "step": status.get("step"),
        "images_seen": status.get("images"),
        "budget": run.config.get("budget"),
        **({"ended_by": status["ended_by"]} if status.get("ended_by") else {}),
        "train_seed": run.config.get("seed"),
        "seed": seed,
    }
    with within_evaluations(model, chosen):
        announce(estimate(model, subject.data, settings), settings, status.get("train_seconds"))
    metrics = likelihood(model, subject.data, settings, setting) if isinstance(model, Density) else {}
    if isinstance(model, Codec):
        metrics |= reconstruction(model, subject.data, settings, setting)
    with within_evaluations(model, None if chosen else settings.get("max_nfe", EVALUATIONS)) as replaced:
        sampler, warnings = sampler_card(model), list[str]()
        if sampler and replaced:
            sampler["instead_of"] = replaced
            warnings.append(
                f"samples are scored with {_brief(sampler)} in the place of {_brief(replaced)}, which takes more than "
                f"metrics.max_nfe={settings.get('max_nfe', EVALUATIONS)} evaluations"
            )
            note(warnings[0])
        setting |= {"sampler": sampler}
        costs = cost(model, settings, setting, status)
        metrics |= costs
        if settings["n"]:
            setting |= {"nfe": costs["sampling/nfe"]["value"]}
            found, of_samples = quality(model, subject, settings, setting, network)
            metrics |= found
            warnings += of_samples
    status_line("")
    result = {"scored": now(), "metrics": metrics, "warnings": warnings}
    values = {name: m["value"] for name, m in metrics.items()}
    with kept(result, run.path):
        run.write_result(result)
        run.log(event="scores", step=status.get("step"), values=values)
    return result


class NotKept(ResourceError):
    """Scores were computed and could not be written down; the message is one line.

    Attributes:
        result: the scores, to be shown at least.
    """

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


@contextlib.contextmanager
def kept(result: dict[str, Any], place: Any) -> Iterator[None]:
    """Keep hold of scores that cannot be written down.

    Args:
        result: the scores.
        place: where they are written.

    Raises:
        NotKept: where the place is read-only or full.
    """
    try:
        yield
    except ResourceError as error:
        raise NotKept(f"the scores were not kept: {error}", result) from error
    except OSError as error:
        raise NotKept(f"{place}: the scores were not kept: {error.strerror}", result) from error


class Estimate(NamedTuple):
    """Seconds that scoring is expected to take, without features and distances."""

    density: float
    samples: float
    shorter: str  # what would shorten it


def estimate(model: Any, data: Any, settings: dict[str, Any]) -> Estimate:
    """Measure a few events and samples, and say what scoring all of them will take.

    Args:
        model: in evaluation mode, with the sampler that will be used.
        data: whose test split is scored.
        settings: of the configuration's section ``metrics``.
    """
    import torch

    from genzoo.diffusion.denoiser import Denoiser
    from genzoo.distributions.discretization import bin_center
    from genzoo.loading import sampling_denoiser
    from genzoo.model import Density
    from genzoo.numerics.random import SampleStreams

    def measured(work: Callable[[int], object], n: int) -> float:
        """Return the seconds of ``n`` pieces in batches, by what a batch of 2 and one of 8 take."""
        if n == 0:
            return 0.0
        seconds = []
        for size in (2, 8) if n >= 8 else (n,):
            start = time.perf_counter()
            work(size)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            return seconds[0]
        each = max((seconds[1] - seconds[0]) / 6, 0.0)
        batches = -(-n // settings["batch_size"])
        return n * each + batches * max(seconds[1] - 8 * each, 0.0)

    def score_events(n: int) -> None:
        x = data.test.x[:n].to(model.device)
        x = (x if model.levels is None else bin_center(x, model.levels)).to(model.dtype)
        y = data.test.y[:n].to(model.device) if model.condition else None
        model.log_prob(x, y, num_samples=settings["num_samples"], rng=torch.Generator(model.device).manual_seed(0))

    def draw_samples(n: int) -> None:
        rng = SampleStreams(0, range(n), device=model.device)
        model.sample(n, rng=rng)

    density, words = 0.0, []
    with torch.no_grad():
        samples = measured(draw_samples, settings["n"] + settings["throughput"])
        if isinstance(model, Density):
            density = measured(score_events, min(settings["events"] or len(data.test.x), len(data.test.x)))
            words.append("metrics.events=")
    words += ["metrics.n="] if settings["n"] else []
    words += ["sampler.steps="] if isinstance(sampling_denoiser(model), Denoiser) else []
    return Estimate(density, samples, ", ".join(words))


def announce(expected: Estimate, settings: dict[str, Any], train_seconds: Any) -> None:
    """Say how long scoring will take where that is more than a minute, or more than training took."""
    whole = expected.density + expected.samples
    trained = train_seconds if type(train_seconds) in (int, float) else 0.0
    if whole > min(60, max(trained, 10)):
        parts = [f"{settings['n'] + settings['throughput']:,} samples {expected.samples:.0f} s"]
        parts += [f"density {expected.density:.0f} s"] if expected.density else []
        log_stderr(
            f"scoring will take about {whole:.0f} s ({', '.join(parts)}), after {trained:.0f} s of training; "
            f"less with lower {expected.shorter or 'metrics.throughput='}"
        )


def check_settings(model: Any, settings: dict[str, Any]) -> None:
    """Score one made-up event, so that what a density does not accept is said before anything takes long.

    Raises:
        UsageError: in the model's own words.
    """
    import torch

    from genzoo.model import Density

    if not isinstance(model, Density):
        return
    x = torch.zeros(1, *model.shape, device=model.device, dtype=model.dtype)
    y = None if model.condition is None else model.condition.empty(1, model.device, model.dtype).zero_()
    try:
        with torch.no_grad():
            rng = torch.Generator(model.device)
            copy.deepcopy(model).eval().log_prob(x, y, num_samples=settings["num_samples"], rng=rng)
    except REFUSALS as error:
        raise misfit("metrics", error) from error


def pick_network(settings: dict[str, Any], data: dict[str, Any], *, needed: bool) -> Any:
    """Make the network that features are made of, before anything takes long.

    Args:
        settings: of the configuration's section ``metrics``.
        data: of its section ``data``.
        needed: whether to go on without, where the network was not asked for by name and cannot be had.

    Raises:
        FeatureError: for a network that cannot be had.
        TooFew: for fewer samples than it has features.
    """
    from genzoo.metrics.features import FeatureError, check_cache, default_feature_network, feature_network
    from genzoo.metrics.sample_size import check_enough

    name, n = settings["features"], settings["n"]
    if n == 0:
        return None
    check_enough(n, None, settings["force"])
    check_cache()
    if name is None:
        return None
    automatic = name == "auto"
    if automatic:
        name = default_feature_network(data["name"], tuple(data["shape"]), data["levels"])
    if (name == "identity") != (data["levels"] is None):
        raise UsageError(f"metrics.features={name}: " + ("is for points" if name == "identity" else "is for images"))
    try:
        network = feature_network(name, settings["inception_weights"], settings["dinov2_weights"], data["shape"][0])
    except FeatureError as error:
        if needed or not automatic:
            raise
        log_stderr(f"no FID at the end of this run: {error}")
        return None
    check_enough(n, network, settings["force"])
    return network


def likelihood(model: Any, data: Any, settings: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """Score the log density of the test split, beside that of the law that made the data where it is known."""
    from genzoo.evaluation.samples import subset
    from genzoo.metrics.likelihood import mean_with_error, score_log_prob
    from genzoo.model import Bound

    chosen = subset(len(data.test.x), settings["events"])
    x, y = data.test.x[chosen], None if data.test.y is None else data.test.y[chosen]
    name, result = score_log_prob(
        model,
        x,
        y,
        num_samples=settings["num_samples"],
        batch_size=settings["batch_size"],
        seed=setting["seed"],
        progress=lambda done: status_line(f"scoring {done}/{len(x)}"),
    )
    protocol = {
        "unit": "nats" if model.levels is None else "bits/dim",
        "bound": str(model.bound.name or model.bound),
        "split": "test",
        "split_sha256": split_sha256(x),
        "n": result.n,
        "levels": model.levels,
        "dequantization": None if model.levels is None else "uniform, one draw",
    }
    draws = {"num_samples": settings["num_samples"]} if model.bound else {}
    # A lower bound rises with the draws that it is made of; an estimate without bias does not.
    of_bound = draws if Bound.LOWER in model.bound else {}
    metrics = {
        f"test/{name}": to_record(result.value, result.stderr, "lower", {**protocol, **of_bound}, {**setting, **draws})
    }
    if data.density is not None:
        truth = mean_with_error(-data.density.log_prob(x))
        protocol = {**protocol, "bound": "EXACT", "model": "the law that made the data"}
        metrics["test/nll_truth"] = to_record(truth.value, truth.stderr, "lower", protocol, {})
    return metrics


def split_sha256(x: Any) -> str:
    """Name the events of a split, as the data have them, by the SHA-256 of their bytes."""
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


def reconstruction(model: Any, data: Any, settings: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """Score what a codec gives back of test images; a bijection loses nothing, and is not asked."""
    import torch

    from genzoo.distributions.discretization import bin_center, to_bytes
    from genzoo.evaluation.samples import stored, subset
    from genzoo.metrics.reconstruction import reconstruction_error
    from genzoo.model import Bijective, reconstruct

    if isinstance(model, Bijective) or model.levels is None:
        return {}
    chosen = subset(len(data.test.x), settings["events"])
    x, y = data.test.x[chosen], data.test.y[chosen] if model.condition else None
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(settings["batch_size"]):
            batch = bin_center(x[rows].to(model.device), model.levels).to(model.dtype)
            labels = None if y is None else y[rows].to(model.device)
            parts.append(to_bytes(reconstruct(model, batch, labels), model.levels).cpu())
    errors = reconstruction_error(stored(x, model.levels), torch.cat(parts))
    units = {"mse": "on [0, 1]", "psnr": "dB", "ssim": "1 is alike"}
    better = {"mse": "lower", "psnr": "higher", "ssim": "higher"}
    protocol = {"split": "test", "split_sha256": split_sha256(x)}
    return {
        f"reconstruction/{name}": to_record(
            error.value, error.stderr, better[name], {"unit": units[name], **protocol, "n": error.n}, setting
        )
        for name, error in errors.items()
    }


def interim(
    model: Any, subject: EvalData, settings: dict[str, Any], n: int, network: Any, seed: int
) -> dict[str, float | None]:
    """Score a few samples in the middle of training: values alone, since few samples make no number to be quoted."""
    from genzoo.numerics.precision import full_float32

    model.eval()
    settings = {**settings, "n": n, "force": True}
    with full_float32(), within_evaluations(model, settings.get("max_nfe", EVALUATIONS)):
        found, _ = quality(model, subject, settings, {"seed": seed}, network and network.to(model.device))
    status_line("")
    return {name: measured["value"] for name, measured in found.items()}


def quality(
    model: Any, subject: EvalData, settings: dict[str, Any], setting: dict[str, Any], network: Any
) -> tuple[dict[str, Any], list[str]]:
    """Draw samples and compare them with both splits."""
    from genzoo.metrics.finite import NotFinite

    x, y, broken = draw(model, settings["n"], settings["batch_size"], setting["seed"])
    if broken:
        return {}, [f"{broken} of {len(x)} samples are not finite: they are compared with nothing"]
    try:
        return compare(x, y, subject, settings, setting, network, model.device)
    except NotFinite as error:  # features of samples that are finite
        return {}, [str(error)]


def compare(
    x: Any,
    y: Any,
    subject: EvalData,
    settings: dict[str, Any],
    setting: dict[str, Any],
    network: Any,
    device: Any = "cpu",
) -> tuple[dict[str, Any], list[str]]:
    """Compare samples, bytes or points, with the splits of some data.

    Args:
        x: (N, *shape).
        y: the classes that were asked for, (N,), or None.
        subject: the data.
        settings: of the configuration's section ``metrics``.
        setting: what made the samples.
        network: what features are made of; None for none.
        device: where to compute.

    Returns:
        The scores, and warnings.
    """
    from genzoo.evaluation import samples as evaluator
    from genzoo.metrics.features import cache_folder
    from genzoo.metrics.reference import reference
    from genzoo.metrics.sample_size import too_small

    data, cache = subject.data, cache_folder() / "references"
    splits = {name: evaluator.stored(split.x, data.levels) for name, split in data.splits.items()}
    warnings: list[str] = []
    found: dict[str, Any] = {}
    if network is not None:
        status_line(f"features of {len(x)} samples")
        small = too_small({name: len(images) for name, images in splits.items()}, network)
        if small and not settings["force"]:
            warnings.append(f"{small}: no such distance was computed; metrics.force=true gives it, marked")
        fake = network.extract(x, settings["batch_size"])
        for split, images in splits.items():
            real = reference(
                f"{subject.name}/{split}",
                images,
                data.splits[split].y,
                network,
                cache,
                settings["batch_size"],
                functools.partial(_progress, split, len(images)),
                data.levels,
            )
            scores = evaluator.feature_scores(fake, real, network, settings["force"], device)
            if split != "test":
                scores |= evaluator.class_scores(fake, y, real, network, data.classes, device)
            found |= {f"{split}/{name}": measured for name, measured in scores.items()}
    if data.levels is None:
        for split, points in splits.items():
            scores = evaluator.point_scores(x, points, f"{subject.name}/{split}")
            found |= {f"{split}/{name}": measured for name, measured in scores.items()}
    if "test" in splits:  # whose images nobody can have copied
        copies, warning = evaluator.memorization_scores(
            x, splits["train"], splits["test"], subject.flip, subject.name, cache, device, status_line
        )
        found |= {f"memorisation/{name}": measured for name, measured in copies.items()}
        warnings += [warning] if warning else []
    return (
        {name: to_record(m.value, m.stderr, m.better, m.protocol, setting, m.detail) for name, m in found.items()},
        warnings,
    )


def _progress(split: str, n: int, done: int) -> None:
    status_line(f"features of {split}: {done}/{n}")


def draw(model: Any, n: int, batch_size: int, seed: int) -> tuple[Any, Any, int]:
    """Draw samples as they are stored, bytes or points; sample i is f(seed, i).

    Returns:
        The samples, the classes of a conditional model, and how many samples are not finite.
    """
    import torch

    from genzoo.distributions.discretization import to_bytes
    from genzoo.numerics.random import SampleStreams

    parts, labels, broken = [], list[Any](), 0
    for start in range(0, n, batch_size):
        rows = range(start, min(start + batch_size, n))
        rng = SampleStreams(seed, rows, device=model.device)
        y = model.conditioner.draw(len(rows), None, rng)
        x = model.sample(len(rows), y, rng=rng).x.float().cpu()
        broken += int((~x.isfinite().flatten(1).all(1)).sum())
        parts.append(x if model.levels is None else to_bytes(x, model.levels))
        labels.append(None if y is None else y.cpu())
        status_line(f"sampling {rows.stop}/{n}")
    return torch.cat(parts), None if labels[0] is None else torch.cat(labels), broken


@contextlib.contextmanager
def within_evaluations(model: Any, limit: int | None) -> Iterator[dict[str, Any] | None]:
    """Exchange a denoiser's sampler for Heun's method in 25 steps where a sample takes more than ``limit`` evaluations.

    Args:
        model: whose sampler.
        limit: evaluations that a sample may take; None for no limit, where this very sampler was asked for.

    Yields:
        The card of the sampler that was exchanged, None where it was not.
    """
    from genzoo.diffusion.denoiser import Denoiser
    from genzoo.diffusion.samplers import Heun
    from genzoo.loading import sampling_denoiser
    from genzoo.numerics.random import SampleStreams

    part: Any = sampling_denoiser(model)
    denoises = isinstance(part, Denoiser)
    if not denoises or limit is None:
        yield None
        return
    own: Any = part.sampler
    replaced = None
    long = (own.steps or 0) > limit  # and need not be tried
    if long or model.sample(2, rng=SampleStreams(0, range(2), device=model.device)).nfe > limit:
        replaced = sampler_card(model)
        part.sampler = Heun(steps=HEUN_STEPS)
    try:
        yield replaced
    finally:
        part.sampler = own


def sampler_card(model: Any) -> dict[str, Any] | None:
    """Describe the sampler of a denoiser: its name, its settings, and likewise all that it is made of."""
    from genzoo.diffusion.denoiser import Denoiser
    from genzoo.evaluation.describe import describe
    from genzoo.loading import sampling_denoiser

    part = sampling_denoiser(model)
    return describe(part.sampler) if isinstance(part, Denoiser) else None


def _brief(card: dict[str, Any]) -> str:
    steps = card.get("steps")
    return f"{card['name']}" if steps is None else f"{card['name']} in {steps} steps"


def cost(model: Any, settings: dict[str, Any], setting: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    """Measure what samples cost, and say what training took."""
    import torch

    from genzoo.training.flops import COUNTED

    status_line("measuring the speed of sampling")
    speed, nfe = throughput(model, settings["throughput"])
    threads = None if model.device.type == "cuda" else torch.get_num_threads()
    machine = {"device": device_name(model.device), "threads": threads}
    protocol = {"unit": "samples/s", "batch": settings["throughput"], **machine}
    metrics = {
        "sampling/samples_per_second": to_record(speed, None, "higher", protocol, {**setting, "nfe": nfe}),
        "sampling/nfe": to_record(nfe, None, "lower", {"unit": "evaluations"}, setting),
        "model/parameters": to_record(
            sum(p.numel() for p in model.parameters()), None, "lower", {"unit": "weights"}, {}
        ),
    }
    # What was computed before the clock started, such as the pairs of a teacher.
    before = {name: status[name] for name in ("precompute_seconds",) if name in status}
    spent: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "images": (status.get("images"), "images", {}),
        "seconds": (status.get("train_seconds"), "s", {"threads": status.get("threads"), **before}),
        "flops": (status.get("train_flops"), "FLOPs", {"counted": COUNTED}),
    }
    for name, (value, unit, how) in spent.items():
        if value and type(value) in (int, float):
            metrics[f"training/{name}"] = to_record(value, None, "lower", {"unit": unit, **how}, {})
    return metrics


def to_record(
    value: Any,
    stderr: float | None,
    better: str,
    protocol: dict[str, Any],
    setting: dict[str, Any],
    detail: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put a number together with how it was made."""
    return {
        "value": value,
        "stderr": stderr,
        "better": better,
        "card": {"protocol": dict(protocol), "setting": dict(setting)},
        **({"detail": detail} if detail else {}),
    }


def throughput(model: Any, n: int) -> tuple[float, int]:
    """Return samples a second and evaluations a sample, after one warm-up where that costs less than a second."""
    import torch

    from genzoo.numerics.random import SampleStreams

    def once() -> tuple[float, int]:
        rng = SampleStreams(0, range(n), device=model.device)
        start = time.perf_counter()
        nfe = model.sample(n, rng=rng).nfe
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, nfe

    seconds, nfe = once()
    if seconds < 1:
        seconds, nfe = min(once() for _ in range(3))
    return n / seconds, nfe


def status_line(text: str) -> None:
    """Show on the terminal what is being done; write nothing where there is no terminal."""
    stream = stderr()
    if stream.isatty():
        print(f"\r\x1b[K{text}", end="", file=stream, flush=True)
