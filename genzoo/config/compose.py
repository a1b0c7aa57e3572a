"""Composition and validation of a command line."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from genzoo.config.budgets import LIMITS, clearing_overrides
from genzoo.config.check import check, unknown_key
from genzoo.config.loader import COMPOSING, hydra_loader, is_finite, leaves, searchpath_override
from genzoo.config.names import is_full_name
from genzoo.config.overrides import MOST_JOBS, Options, count, first, parse
from genzoo.config.schema import SCHEMAS
from genzoo.errors import UsageError, nearest, one_line
from genzoo.runs import UNHASHED_KEYS
from genzoo.runs.redact import remember

MAY_CHANGE = (
    "resume",
    "trust",
    "timeout",
    "budget",  # of a finished run, which goes on; see genzoo.jobs.extend
    *(f"budget.{name}" for name in LIMITS),
    *(key for key in UNHASHED_KEYS if "." in key),
)  # with resume=DIR


class Job(NamedTuple):
    """The configuration of a command line."""

    config: dict[str, Any]  # plain types; with resume=DIR the overridden keys under "overridden"
    choices: dict[str, str]  # choice of each group


def _keys(verb: str, overrides: Sequence[str]) -> set[str]:
    """List the keys of a command, including optional ones."""

    config = OmegaConf.to_container(compose(verb, list(overrides)), resolve=False)
    return {*(key for key, _ in leaves(config)), *SCHEMAS[verb].known_keys()}


def preflight(
    verb: str,
    overrides: Sequence[str],
    config_dir: str | None = None,
    *,
    values: bool = True,
    sweep: bool = False,
) -> Job | None:
    """Compose and validate a command line, without importing torch.

    Args:
        verb: the command.
        overrides: the command-line overrides.
        config_dir: a further directory of configurations.
        values: whether to validate values, or keys alone.
        sweep: whether a key may have several values; all choices and the values of the first job are validated.

    Returns:
        The job, if values were validated.

    Raises:
        UsageError: naming the key, the cause and the closest valid choice.
    """
    if config_dir and not Path(config_dir).is_dir():
        raise UsageError(f"--config-dir {config_dir}: no such directory")
    search = searchpath_override(config_dir)
    parsed = [parse(text) for text in overrides]
    with hydra_loader() as loader:
        for override in parsed:
            if override.is_sweep_override() and not sweep:
                raise UsageError(f"{override.input_line}: several values need -m, which runs each in turn")
            _check_choice(verb, loader, override, config_dir)
        if (jobs := math.prod(map(count, parsed))) > MOST_JOBS:
            raise UsageError(f"a sweep of {jobs:,} jobs: at most {MOST_JOBS:,} are allowed")
        _check_resume(verb, parsed, sweep)
        try:
            firsts = list(map(first, parsed))
            cleared = clearing_overrides(verb, firsts, config_dir)
            config = compose(verb, [*search, *firsts, *cleared], return_hydra_config=True)
        except COMPOSING as error:
            raise _explain(verb, parsed, search, error) from error
    choices, named = dict(config.hydra.runtime.choices), names_sampler(config.hydra)
    if sweep:
        _check_sweeper(config.hydra, parsed)
    with open_dict(config):
        del config["hydra"]
    if not values:
        return None
    plain = validate(verb, config, named)
    if config_dir and "trust" in plain:
        from genzoo.config.allow_list import named_in

        plain["trust"] = sorted({*plain["trust"], *named_in(config_dir, plain.get("run") or plain.get("resume"))})
    if plain.get("resume") not in (None, "auto"):
        plain["overridden"] = [override.key_or_group for override in parsed]
    return Job(plain, choices)


def _check_resume(verb: str, overrides: Sequence[Override], sweep: bool) -> None:
    """Reject overrides that would change a resumed run."""
    typed = {override.key_or_group: override for override in overrides}
    resume = typed.get("resume")
    if verb != "train" or resume is None or (not resume.is_sweep_override() and resume.value() in (None, "auto")):
        return
    if sweep:
        raise UsageError(f"{resume.input_line}: resumes one run; in a sweep set resume=auto")
    for key, override in typed.items():
        if key not in MAY_CHANGE:
            raise UsageError(f"{override.input_line}: {resume.input_line} keeps the run's configuration; omit it")


def _check_choice(verb: str, loader: ConfigLoader, override: Override, config_dir: str | None) -> None:
    """Reject unknown choices of a group."""

    group = override.key_or_group
    options = loader.get_group_options(group, results_filter=ObjectType.CONFIG)
    options += [path.stem for path in Path(config_dir, group).glob("*.yaml")] if config_dir else []
    override.config_loader = cast(Any, Options(sorted(set(options))))
    if not options or override.is_delete():
        return
    value = override.value()
    if override.is_interval_sweep():
        raise UsageError(f"{override.input_line}: choose from {', '.join(options)}")
    if isinstance(value, list) and not override.is_sweep_override():
        raise UsageError(f"{override.input_line}: one choice, not a list; with -m several: {group}=a,b")
    if count(override) > MOST_JOBS:  # a range
        raise UsageError(f"{override.input_line}: choose from {', '.join(options)}")
    several = [value]
    if override.is_sweep_override():
        key = override.get_key_element()
        several = [parse(f"{key}={text}").value() for text in override.sweep_string_iterator()]
    for choice in several:
        field = SCHEMAS[verb].model_fields.get(group)
        if choice is None and field is not None and not field.is_required():
            raise UsageError(f"{group}=null: use ~{group} to omit it")
        name = "null" if choice is None else str(choice)
        if name not in options:
            raise UsageError(f"unknown {group} '{name}': {nearest(name, options)}")


def _check_sweeper(hydra: DictConfig, overrides: Sequence[Override]) -> None:
    """Reject overrides that the chosen sweeper does not support.

    Raises:
        UsageError: naming the override.
    """
    target = str(hydra.sweeper.get("_target_") if isinstance(hydra.sweeper, DictConfig) else hydra.sweeper)
    if not is_full_name(target):
        raise UsageError(f"hydra.sweeper={target}: choose one by hydra/sweeper=basic or hydra/sweeper=optuna")
    if target.endswith(".BasicSweeper"):
        for override in overrides:
            if override.is_interval_sweep():
                raise UsageError(
                    f"{override.input_line}: an interval needs a search, hydra/sweeper=optuna; else list the values"
                )
    storage = hydra.sweeper.get("storage")
    if "optuna" in target and storage is not None:
        raise UsageError(
            f"hydra.sweeper.storage={storage}: storing an Optuna search in a file or a database is not supported; omit it"
        )


def _explain(verb: str, overrides: Sequence[Override], search: list[str], error: Exception) -> UsageError:
    """Find the override that fails to compose, and suggest a correction."""
    good = list(search)
    for override in sorted(overrides, key=lambda o: "." in o.key_or_group):  # choices determine the keys
        try:
            compose(verb, [*good, first(override)])
        except COMPOSING as cause:
            key, known = override.key_or_group, _keys(verb, good)
            if key not in known and not override.is_add():
                return unknown_key(key, known)
            nothing = "Could not override" in str(cause)  # a group without files
            return UsageError(
                f"{override.input_line}: {'there is nothing to choose from' if nothing else one_line(cause)}"
            )
        good.append(first(override))
    return UsageError(one_line(error))


def names_sampler(hydra: Any) -> bool:
    """Whether the command line or its experiment sets a sampler or one of its settings.

    Without ``metrics.max_nfe`` on the command line, such a sampler is evaluated without a limit on its NFE.

    Args:
        hydra: Hydra's section of a composed configuration.
    """
    words = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(words, list)
    keys = [parse(str(word)).get_key_element().lstrip("+~") for word in words]
    if "metrics.max_nfe" in keys:
        return False
    if any("sampler" in re.split(r"[/.@]", key) for key in keys):
        return True
    homes = [Path(source.path) for source in hydra.runtime.config_sources if source.provider != "hydra" and source.path]
    left, seen = [str(hydra.runtime.choices.get("experiment"))], set[str]()
    while left:
        name = left.pop()
        for path in (home / "experiment" / f"{name}.yaml" for home in homes):
            if name in seen or not path.is_file():
                continue
            plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
            if any("sampler" in key.split(".") for key, _ in leaves(plain)):
                return True
            for entry in plain.get("defaults") or [] if isinstance(plain, dict) else []:
                groups = entry if isinstance(entry, dict) else {"experiment": entry}  # a file of the same group
                words = {
                    word: str(choice) for group, choice in groups.items() for word in re.split(r"[ /.@]", str(group))
                }
                if "sampler" in words:
                    return True
                left += [words["experiment"].rpartition("/")[2]] if "experiment" in words else []
        seen.add(name)
    return False


def validate(verb: str, config: DictConfig, named: bool = False) -> dict[str, Any]:
    """Validate a composed configuration and convert it to plain types.

    Args:
        verb: the command.
        config: the composed configuration.
        named: whether a sampler was set, which removes the default limit on its NFE in training's evaluation.

    Raises:
        UsageError: naming the full key.
    """
    if named and verb == "train" and "metrics" in config:
        with open_dict(config):
            config.metrics.max_nfe = None
    for key, value in leaves(OmegaConf.to_container(config, resolve=False)):
        if value == "???":
            example = "outputs/vae-digits/20260101-120000-000000-abcdef" if key == "run" else "..."
            raise UsageError(f"{key} is missing: set {key}={example}")
        if not is_finite(value):
            raise UsageError(f"{key}={value}: must be finite")
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"{_interpolated(config, str(error.full_key))}: {str(error).splitlines()[0]}") from error
    remember(plain)  # secrets may be quoted in later messages
    return check(verb, plain)


def _interpolated(config: DictConfig, key: str) -> str:
    """Follow the interpolations of an unresolvable key to the key that was set."""
    raw, seen = dict(leaves(OmegaConf.to_container(config, resolve=False))), set()
    while key not in seen and (named := re.fullmatch(r"\$\{([\w.]+)\}", str(raw.get(key)))) and named[1] in raw:
        seen.add(key)
        key = named[1]
    return key
