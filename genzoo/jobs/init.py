"""Beginning a run with the weights of another one: ``init=DIR``, for other data, classes or objectives.

A weight is taken over where the models have one of the same name and shape; the others begin as in any run.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from genzoo.errors import UsageError, one_line
from genzoo.runs import RunError
from genzoo.training.checkpoints import NO_TENSORS, latest, load_tensors, read
from genzoo.training.state_checks import upgraded_weights

INIT = "init"  # folder of a run that was begun with other weights, which are kept there
NAMED = 4  # weights in a message


def fitting_weights(init: str, model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Read the averaged weights of a run that fit a model.

    Args:
        init: directory of the run.
        model: the model.

    Returns:
        The weights that fit, and a line that says what does not.

    Raises:
        UsageError: where none fits.
        RunError: for a directory without weights, or damaged ones.
    """
    from safetensors.torch import load

    own = model.state_dict()
    if not Path(init, "config.yaml").is_file():
        raise RunError(f"init={init}: not a run directory, it has no config.yaml")
    checkpoint = latest(Path(init))
    try:
        found = upgraded_weights(load(read(checkpoint, "ema.safetensors")), own)
    except NO_TENSORS as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{checkpoint / 'ema.safetensors'}: no file of tensors: {one_line(error)[:200]}") from error
    taken = {name: weight for name, weight in found.items() if name in own and own[name].shape == weight.shape}
    parameters = {name for name, _ in model.named_parameters()}
    if not parameters.intersection(taken):
        raise UsageError(
            f"init={init}: none of its weights fits this model: choose a run of the same family and network"
        )
    new, unused = (sorted(some.keys() - taken.keys()) for some in (own, found))
    said = f"init={init}: {len(taken)} of {len(own)} weights"
    for what, names in (("new", new), ("unused", unused)):
        if names:
            said += f"; {what}: {', '.join(names[:NAMED])}" + (f" and {len(names) - NAMED} more" * (len(names) > NAMED))
    return taken, said


def kept_weights(run: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read the weights that a run was begun with; empty for a run without.

    Raises:
        RunError: for damaged weights, or those of another model.
    """
    if not (run / INIT).is_dir():
        return {}
    own = model.state_dict()
    found = load_tensors(run / INIT, "weights", 2 * sum(tensor.nbytes for tensor in own.values()) + 2**20)
    for name, weight in found.items():
        if name not in own or own[name].shape != weight.shape:
            raise RunError(f"{run / INIT}: does not fit the model of config.yaml: {name[:100]}")
    return found
