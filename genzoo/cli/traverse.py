"""``python -m genzoo traverse``: an example, with one latent at a time set to each of some values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.cli.examples import PRIOR, open_examples
from genzoo.cli.interpolate import ANIMATED_STEPS, STEPS
from genzoo.cli.sheets import Sheet, check_sheet, is_animated, write_sheet
from genzoo.cli.trained import on_run, open_model, plot_background, prior_latents, source_of_latents
from genzoo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.model import GenerativeModel

DIMENSIONS = 10  # latents by default
EVENTS, ACTIVE = 500, 0.05  # examples for the divergences of latents; the smallest one that is shown, in nats
TRIED = 4096  # latents whose changes are compared


@on_run
def traverse(config: dict[str, Any]) -> None:
    """Traverse latents, a row each.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    import torch

    from genzoo import explore, latents

    out, size = Path(config["out"]), config["batch_size"]
    model = open_model(config)
    check_sheet(out, model.event)
    latents.check_continuous(model, "traversal")
    count = torch.Size(latents.latent_space(model).shape).numel()
    if config["dimensions"] and max(config["dimensions"]) >= count:
        raise UsageError(f"dimensions={config['dimensions']}: the latents have the dimensions 0..{count - 1}")
    source = source_of_latents(config, model)
    if source == PRIOR:
        (z,), y = prior_latents(config, model, 1, 1)
    else:
        found = open_examples({**config, "examples": source}, model, 1)
        z, y = explore.encode(model, found.x, found.y, batch_size=size), found.y
    dimensions, why = _choose(config, model, source, z, y)
    steps = config["steps"] or (ANIMATED_STEPS if is_animated(out) else STEPS)
    values = torch.linspace(-config["reach"], config["reach"], steps)
    x = explore.traverse(model, z, dimensions, values, y, batch_size=size)[:, :, 0]
    data, density = plot_background(config, model, x)
    write_sheet(out, Sheet(x, model.levels, data, density))
    print(
        f"latents {', '.join(map(str, dimensions))} of {count}, {why}, from {-config['reach']:g} to {config['reach']:g}: {out}"
    )


def _choose(
    config: dict[str, Any], model: GenerativeModel, source: str, z: Tensor, y: Tensor | None
) -> tuple[list[int], str]:
    """Return the latents to traverse, and the reason: the most informative ones where that is known, or cheap to find."""
    from genzoo import explore
    from genzoo.diffusion.denoiser import Denoiser
    from genzoo.model import GaussianPosterior

    if config["dimensions"]:
        return config["dimensions"], "as set"
    if source != PRIOR and isinstance(model, GaussianPosterior):
        kl = _divergences(config, model, source)
        order = kl.argsort(descending=True)[: max(1, min(DIMENSIONS, int((kl > ACTIVE).sum())))].tolist()
        return order, f"the largest KL divergences ({', '.join(f'{kl[i]:.2f}' for i in order)} nats)"
    count = z[0].numel()
    if isinstance(model, Denoiser) or count > TRIED:
        return list(range(min(count, DIMENSIONS))), "the first ones"
    ends = explore.traverse(
        model, z, range(count), [-config["reach"], config["reach"]], y, batch_size=config["batch_size"]
    )
    change = (ends[:, 1] - ends[:, 0]).flatten(1).square().mean(1)
    return change.argsort(descending=True)[:DIMENSIONS].tolist(), "the largest changes of this example"


def _divergences(config: dict[str, Any], model: GenerativeModel, source: str) -> Tensor:
    """Return the mean KL divergence of each latent over some examples, (D,)."""
    from genzoo.latents import mean_divergences
    from genzoo.numerics.random import SampleStreams

    found = open_examples({**config, "examples": source}, model, EVENTS)
    rng = SampleStreams(config["seed"], range(len(found.x)), device=model.device)
    y = None if found.y is None else found.y.to(model.device)
    kl = mean_divergences(model, found.x.to(model.device), y, rng=rng)
    assert kl is not None
    return kl.cpu()
