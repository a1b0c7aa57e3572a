"""Configurations: where they lie, what is wrong with them, and how they become objects.

What a user may get wrong is answered in one line that names the key, what is wrong and the nearest valid choice, before
any directory is made. What came with somebody's run is trusted with less than what the user typed:
``build(..., trusted=False)`` makes nothing but what ``genzoo.commands.trust`` lists.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from genzoo.runs import UNHASHED_KEYS
from genzoo.runs.redact import remember
from genzoo.runs.upgrade import RENAMED

if TYPE_CHECKING:
    from pydantic import ValidationError

    from genzoo.commands.schema import Section

MAY_CHANGE = (
    "resume",
    "trust",
    "timeout",
    *(key for key in UNHASHED_KEYS if "." in key),
)  # where a run is gone on with

LIMITS = ("images", "seconds", "flops")  # of a budget
VERBS = ("train", "sample", "evaluate", "compare")
PACKAGE = Path(__file__).resolve().parent.parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"

# What Hydra and OmegaConf raise for a command line that does not compose.
COMPOSING = (HydraException, OmegaConfBaseException, ValueError, AttributeError, TypeError, LookupError, AssertionError)
MOST_JOBS = 10_000  # of a sweep; Hydra lists all of them before the first

# How a constructor says that its arguments do not do, or stumbles over them, as over a network of another kind;
# RuntimeError is torch's word for negative and for giant sizes.
_STUMBLES = (TypeError, AttributeError, LookupError, AssertionError)
REFUSALS = (ValueError, RuntimeError, ArithmeticError, MemoryError, *_STUMBLES)


class UsageError(ValueError):
    """Something that the user can mend; the message is one line."""

    exit_code = 2


class Job(NamedTuple):
    """What a command line asks for."""

    config: dict[str, Any]  # plain types; with resume=DIR under "said" the keys that were typed
    choices: dict[str, str]  # what was chosen of each group


def one_line(error: BaseException | str) -> str:
    """Squeeze a message into one line; of errors that say little without it, with their kind."""
    text = " ".join(str(error).partition("\nException raised from")[0].split())  # torch's own frames
    return (
        f"{type(error).__name__}: {text}" if isinstance(error, (AttributeError, LookupError, AssertionError)) else text
    )


def nearest(word: str, choices: Iterable[str]) -> str:
    """Say which of the choices was probably meant, or list them where none is near."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"choose from {', '.join(choices)}" if 0 < len(choices) <= 20 else "see --help"


def is_full_name(value: Any) -> bool:
    """Whether a value is the full name of something in a module."""
    return isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))


def unknown_key(key: str, known: Iterable[str]) -> UsageError:
    """Say which of the known keys, ``trainer.batch_size``, was probably meant: one beside it, or one anywhere."""
    known = set(known)
    if renamed := _renamed(key, known):
        return UsageError(f"unknown key '{key}': {renamed}")
    parent, dot, leaf = key.rpartition(".")
    beside = {k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent}
    if not beside:
        return UsageError(f"unknown key '{key}': {nearest(key, known)}")
    hint = nearest(leaf, beside - {"_target_", "_partial_"}).replace("mean '", f"mean '{parent}{dot}")
    if "_target_" in beside and hint.startswith("choose"):
        hint += f"; an argument that the configuration leaves out is added by +{key}=..."
    return UsageError(f"unknown key '{key}': {hint}")


def _renamed(key: str, known: Iterable[str]) -> str | None:
    """Say what a key of an earlier release is called now; None for one that there never was."""
    parent, dot, leaf = key.rpartition(".")
    if leaf == "num_classes" and parent.partition(".")[0] in ("model", "codec"):
        return "say data.conditional=true for a model that is conditioned on the classes of the data"
    now = f"{parent}{dot}{RENAMED[leaf]}" if leaf in RENAMED else "label" if key == "y" else None
    return f"did you mean '{now}'?" if now and now in known else None


@contextlib.contextmanager
def _hydra() -> Iterator[ConfigLoader]:
    """Open the configuration directory, to be composed or listed."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="genzoo"):
        yield GlobalHydra.instance().config_loader()


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List all keys of plain sections, and what they hold."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield f"{prefix}{key}", value
        yield from _leaves(value, f"{prefix}{key}.")


def _is_finite(value: Any) -> bool:
    """Whether a plain value is, or a list of them, no NaN and no infinity."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _known(verb: str, overrides: Sequence[str]) -> set[str]:
    """List the keys of a command, those included that its configuration may leave out."""
    from genzoo.commands.schema import SCHEMAS

    config = OmegaConf.to_container(compose(verb, list(overrides)), resolve=False)
    return {*(key for key, _ in _leaves(config)), *SCHEMAS[verb].known_keys()}


def _parse(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_overrides([text])[0]
        if not override.key_or_group:
            raise UsageError(f"cannot read '{text[:200]}': it names no key")
        return override
    except (HydraException, RecursionError) as error:
        raise UsageError(
            f"cannot read '{text[:200]}': write key=value, with quotes around special characters"
        ) from error


class _Options:
    """The choices of groups, as ``glob(...)`` looks for them: those of ``--config-dir`` are known to Hydra later.

    Args:
        names: of the choices of one group.
    """

    def __init__(self, names: list[str]):
        self.names = names

    def get_group_options(self, group: str, results_filter: Any = None) -> list[str]:
        return self.names


def _count(override: Override) -> int:
    """Return how many values an override has, without listing them.

    Raises:
        UsageError: where it has none.
    """
    if not override.is_sweep_override() or override.is_interval_sweep():
        return 1
    value: Any = override.value()
    if isinstance(value, RangeSweep):
        start, stop, step = (Decimal(str(number)) for number in (value.start, value.stop, value.step))
        count = max(0, math.ceil((stop - start) / step)) if step and (stop - start).is_finite() else 0
    elif isinstance(value, Glob):
        options = override.config_loader.get_group_options(override.key_or_group) if override.config_loader else []
        if not options:
            raise UsageError(f"{override.input_line}: glob(...) chooses among the files of a group, which this is not")
        count = len(value.filter(options))
        if not count:
            raise UsageError(f"{override.input_line}: matches none of {', '.join(options)}")
    else:
        count = len(value.list)
    if not count:
        raise UsageError(f"{override.input_line}: has no values")
    return count


def _first(override: Override) -> str:
    """Return one override of a sweep, as text: the first of its choices, or where an interval begins."""
    if not override.is_sweep_override():
        return override.input_line or ""
    if override.is_interval_sweep():
        interval: Any = override.value()
        start = int(interval.start) if "int" in interval.tags or isinstance(interval.start, int) else interval.start
        return f"{override.get_key_element()}={start}"
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def one_comparison(verb: str, overrides: Sequence[str]) -> list[str]:
    """Take ``compare runs=a,b`` for one list of folders, not for a sweep."""
    pattern = re.compile(r"^runs=([^\[{'\"]*,.*)$")
    return [pattern.sub(r"runs=[\1]", word) if verb == "compare" else word for word in overrides]


def one_budget(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """List the overrides by which limits of the budget that were named clear those that were not.

    What is typed comes before what files say, an experiment or a recipe before the preset, the later file before the
    earlier one: the last of them that names a limit names all that there are. A limit that is null is not named.

    Args:
        verb: the command.
        overrides: the rest of the command line; of several values of a key one.
        config_dir: a further directory of configurations.

    Returns:
        ``budget.seconds=null`` and the like, for what would be in force otherwise.
    """
    if verb != "train":
        return []
    try:
        said = {override.key_or_group: override.value() for override in map(_parse, overrides)}
    except (UsageError, HydraException):  # which composing refuses in better words
        return []
    named = {name for name, value in _limits_of(said).items() if value is not None}
    if named:
        return [f"budget.{name}=null" for name in LIMITS if name not in named]
    if not config_dir and not said.keys() & {"experiment", "hydra.searchpath"}:
        return []  # the project's own recipes name no limit
    levels = [*_budgets_of_files(verb, overrides, config_dir), _limits_of(said)]
    merged = dict(itertools.chain.from_iterable(limits.items() for limits in levels))
    while levels and not named:  # what a later level makes null, no earlier one names
        named = {name for name, value in levels.pop().items() if value is not None and merged[name] is not None}
    return [f"budget.{name}=null" for name in LIMITS if merged.get(name) is not None and name not in named]


def _limits_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {name: keys[f"budget.{name}"] for name in LIMITS if f"budget.{name}" in keys}


def _budgets_of_files(verb: str, overrides: Sequence[str], config_dir: str | None) -> list[dict[str, Any]]:
    """Read what each file of a composition says of the budget's limits, in the order in which they are merged."""
    typed: list[Any] = [o.value() for o in map(_parse, overrides) if o.key_or_group == "hydra.searchpath"]
    places = [str(place).removeprefix("file://") for value in typed for place in (value or [])]
    homes = [CONF, *map(Path, [*([config_dir] if config_dir else []), *places])]
    try:
        with _open_loader() as loader:
            words = [*_searching(config_dir), *overrides]
            files = loader.compute_defaults_list(verb, words, RunMode.RUN).defaults
    except COMPOSING:
        return []
    found = []
    for file in files:
        path = next((path for home in homes if (path := home / f"{file.config_path}.yaml").is_file()), None)
        package = [part for part in (file.package or "").split(".") if part not in ("", "_global_")]
        if path is None or "budget" not in (package or [path.read_text(errors="replace")])[0]:
            continue
        with contextlib.suppress(yaml.YAMLError, OSError):  # which Hydra refuses
            content = yaml.safe_load(path.read_bytes())
            for part in reversed(package):
                content = {part: content}
            found.append(_limits_of(dict(_leaves(content))))
    return found


@contextlib.contextmanager
def _open_loader() -> Iterator[ConfigLoader]:
    """Return the loader of configurations that Hydra has at work, or open one."""
    if GlobalHydra.instance().is_initialized():
        yield GlobalHydra.instance().config_loader()
        return
    with _hydra() as loader:
        yield loader


def preflight(
    verb: str,
    overrides: Sequence[str],
    config_dir: str | None = None,
    *,
    values: bool = True,
    sweep: bool = False,
) -> Job | None:
    """Compose a command line and check it, without importing torch.

    Args:
        verb: the command.
        overrides: the rest of the command line.
        config_dir: a further directory of configurations.
        values: whether the values are checked too, or the keys alone.
        sweep: whether a key may have several values; all choices are checked then, and the values of the first job.

    Returns:
        What is to be done, if the values were checked.

    Raises:
        UsageError: naming the key, what is wrong and the nearest valid choice.
    """
    if config_dir and not Path(config_dir).is_dir():
        raise UsageError(f"--config-dir {config_dir}: no such directory")
    search = _searching(config_dir)
    parsed = [_parse(text) for text in overrides]
    with _hydra() as loader:
        for override in parsed:
            if override.is_sweep_override() and not sweep:
                raise UsageError(f"{override.input_line}: several values need -m, which trains one run for each")
            _check_choice(verb, loader, override, config_dir)
        if (jobs := math.prod(map(_count, parsed))) > MOST_JOBS:
            raise UsageError(f"a sweep of {jobs:,} jobs: at most {MOST_JOBS:,} are started at a time")
        _check_resume(verb, parsed, sweep)
        try:
            firsts = list(map(_first, parsed))
            cleared = one_budget(verb, firsts, config_dir)
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
        from genzoo.commands.trust import named_in

        plain["trust"] = sorted({*plain["trust"], *named_in(config_dir, plain.get("run") or plain.get("resume"))})
    if plain.get("resume") not in (None, "auto"):
        plain["said"] = [override.key_or_group for override in parsed]
    return Job(plain, choices)


def help_text(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Say what a command is, what there is to choose from, and its configuration: what Hydra would say, sooner.

    Hydra copies the whole composition for each group that it lists.
    """
    homes = [CONF, *([Path(config_dir)] if config_dir else [])]
    choices: dict[str, set[str]] = {}
    for home in homes:
        for path in home.glob("*/**/*.yaml"):
            choices.setdefault(path.parent.relative_to(home).as_posix(), set()).add(path.stem)
    groups = [f"{group}: {', '.join(sorted(names))}" for group, names in sorted(choices.items())]
    with _hydra():
        cleared = one_budget(verb, overrides, config_dir)
        config = compose(verb, [*_searching(config_dir), *overrides, *cleared], return_hydra_config=True)
    template = Template(config.hydra.help.template)
    with open_dict(config):
        del config["hydra"]
    listed = "\n".join(line for line in groups if not line.startswith("hydra"))
    return template.substitute(APP_CONFIG_GROUPS=f"{listed}\n", CONFIG=OmegaConf.to_yaml(config))


def _searching(config_dir: str | None) -> list[str]:
    """Let Hydra look into a directory of the reader's own too."""
    return [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []


def _check_resume(verb: str, overrides: Sequence[Override], sweep: bool) -> None:
    """Refuse what would change a run that is gone on with."""
    said = {override.key_or_group: override for override in overrides}
    asked = said.get("resume")
    if verb != "train" or asked is None or (not asked.is_sweep_override() and asked.value() in (None, "auto")):
        return
    if sweep:
        raise UsageError(f"{asked.input_line}: goes on with one run; in a sweep say resume=auto")
    for key, override in said.items():
        if key not in MAY_CHANGE:
            raise UsageError(f"{override.input_line}: {asked.input_line} goes on as the run began; leave it out")


def _check_choice(verb: str, loader: ConfigLoader, override: Override, config_dir: str | None) -> None:
    """Refuse a choice that its group does not have."""
    from genzoo.commands.schema import SCHEMAS

    group = override.key_or_group
    options = loader.get_group_options(group, results_filter=ObjectType.CONFIG)
    options += [path.stem for path in Path(config_dir, group).glob("*.yaml")] if config_dir else []
    override.config_loader = cast(Any, _Options(sorted(set(options))))
    if not options or override.is_delete():
        return
    value = override.value()
    if override.is_interval_sweep():
        raise UsageError(f"{override.input_line}: choose from {', '.join(options)}")
    if isinstance(value, list) and not override.is_sweep_override():
        raise UsageError(f"{override.input_line}: one choice, not a list; with -m several, {group}=a,b")
    if _count(override) > MOST_JOBS:  # of a range, which is no choice
        raise UsageError(f"{override.input_line}: choose from {', '.join(options)}")
    several = [value]
    if override.is_sweep_override():
        key = override.get_key_element()
        several = [_parse(f"{key}={text}").value() for text in override.sweep_string_iterator()]
    for choice in several:
        field = SCHEMAS[verb].model_fields.get(group)
        if choice is None and field is not None and not field.is_required():
            raise UsageError(f"{group}=null: say ~{group} to leave it out")
        name = "null" if choice is None else str(choice)
        if name not in options:
            raise UsageError(f"unknown {group} '{name}': {nearest(name, options)}")


def _check_sweeper(hydra: DictConfig, overrides: Sequence[Override]) -> None:
    """Refuse what the chosen sweeper cannot do, before Hydra or a library below it raises.

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
                    f"{override.input_line}: an interval is for a search, hydra/sweeper=optuna; else say several values"
                )
    storage = hydra.sweeper.get("storage")
    if "optuna" in target and storage is not None:
        raise UsageError(
            f"hydra.sweeper.storage={storage}: the sweeper for Optuna keeps no search in a file or a data base; leave it out"
        )


def _explain(verb: str, overrides: Sequence[Override], search: list[str], error: Exception) -> UsageError:
    """Find the override that does not compose, and say what was probably meant."""
    good = list(search)
    for override in sorted(overrides, key=lambda o: "." in o.key_or_group):  # choices decide which keys there are
        try:
            compose(verb, [*good, _first(override)])
        except COMPOSING as cause:
            key, known = override.key_or_group, _known(verb, good)
            if key not in known and not override.is_add():
                return unknown_key(key, known)
            nothing = "Could not override" in str(cause)  # a group that the configuration names, and that has no files
            return UsageError(
                f"{override.input_line}: {'there is nothing to choose from' if nothing else one_line(cause)}"
            )
        good.append(_first(override))
    return UsageError(one_line(error))


def names_sampler(hydra: Any) -> bool:
    """Whether the command line, or the experiment that it chooses, names a sampler or a setting of one.

    Such a sampler scores the run, however many evaluations it takes, where ``metrics.max_nfe`` is not said too.

    Args:
        hydra: its section of a composed configuration.
    """
    words = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # "seed=${nothing}" is a word like any other
    assert isinstance(words, list)
    keys = [_parse(str(word)).get_key_element().lstrip("+~") for word in words]
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
            if any("sampler" in key.split(".") for key, _ in _leaves(plain)):
                return True
            for entry in plain.get("defaults") or [] if isinstance(plain, dict) else []:
                groups = entry if isinstance(entry, dict) else {"experiment": entry}  # the group of the file itself
                words = {
                    word: str(choice) for group, choice in groups.items() for word in re.split(r"[ /.@]", str(group))
                }
                if "sampler" in words:
                    return True
                left += [words["experiment"].rpartition("/")[2]] if "experiment" in words else []
        seen.add(name)
    return False


def validate(verb: str, config: DictConfig, named: bool = False) -> dict[str, Any]:
    """Check the values of a composed configuration and return it as plain types.

    Args:
        verb: the command.
        config: composed.
        named: whether a sampler was named, which then scores a training's run without a limit on its evaluations.

    Raises:
        UsageError: naming the full key.
    """
    if named and verb == "train" and "metrics" in config:
        with open_dict(config):
            config.metrics.max_nfe = None
    for key, value in _leaves(OmegaConf.to_container(config, resolve=False)):
        if value == "???":
            example = "outputs/vae-digits/20260101-120000-000000-abcdef" if key == "run" else "..."
            raise UsageError(f"{key} is missing: say {key}={example}")
        if not _is_finite(value):
            raise UsageError(f"{key}={value}: must be finite")
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"{_culprit(config, str(error.full_key))}: {str(error).splitlines()[0]}") from error
    remember(plain)  # for the messages that quote them
    return check(verb, plain)


def _culprit(config: DictConfig, key: str) -> str:
    """Follow a key that cannot be resolved, and only names another, to the one where it was said."""
    raw, seen = dict(_leaves(OmegaConf.to_container(config, resolve=False))), set()
    while key not in seen and (named := re.fullmatch(r"\$\{([\w.]+)\}", str(raw.get(key)))) and named[1] in raw:
        seen.add(key)
        key = named[1]
    return key


def check(verb: str, plain: Any) -> dict[str, Any]:
    """Check the values of a configuration of plain types.

    Raises:
        UsageError: naming the full key.
    """
    from genzoo.commands.schema import SCHEMAS

    return _checked(SCHEMAS[verb], plain)


def targets(node: Any) -> Iterator[str]:
    """List the classes that a configuration names."""
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        yield node["_target_"]
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(item)


def check_section(name: str, section: Any) -> dict[str, Any]:
    """Check one section of a run's configuration like one that was typed, and return it.

    Raises:
        UsageError: naming the full key.
    """
    from genzoo.commands.schema import SECTIONS

    return _checked(SECTIONS[name], section, name)


def _checked(schema: type[Section], plain: Any, name: str = "") -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        return schema.model_validate(plain).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise _refusal(error, name, schema.known_keys(f"{name}." if name else "")) from error


def _refusal(error: ValidationError, section: str, known: Iterable[str]) -> UsageError:
    """Say in one line what pydantic found, with the full key."""
    first = error.errors()[0]
    key, given, message = ".".join(filter(None, [section, *map(str, first["loc"])])), first["input"], first["msg"]
    if first["type"] == "extra_forbidden":
        return unknown_key(key, known)
    if first["type"] == "missing":
        return UsageError(f"{key} is missing: say {key}=...")
    if first["type"] == "value_error":  # raised by a check of ours, which names the keys itself
        return UsageError(str(first["ctx"]["error"]))
    shown = "null" if given is None else str(given)[:100]
    return UsageError(f"{key}={shown}: {message[0].lower()}{message[1:]}")


def _resolve(target: Any, key: str) -> Any:
    if not is_full_name(target):
        raise UsageError(f"{key}._target_={target}: must be the full name of a class, package.module.Class")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        if not callable(found):
            raise AttributeError(f"it is a {type(found).__name__}")
        return found
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{key}._target_={target}: no such class: {error}") from error


def build(node: Any, key: str, *, trusted: bool = True, trust: Sequence[str] = (), **extra: Any) -> Any:
    """Turn a configuration into the object that it describes; the one place that does.

    Args:
        node: plain types, with ``_target_`` where an object is wanted.
        key: where the node stands, for messages; its first word is the section, of which an untrusted node may name
            what ``genzoo.commands.trust.allowed`` lists.
        trusted: whether the user wrote it; otherwise all names are looked up before anything is imported.
        trust: full names that it may name besides.
        extra: further arguments of the outermost object.

    Raises:
        UsageError: for an unknown class or argument, an argument of the wrong type, or one that its class refuses.
    """
    from genzoo.commands.memory import within_memory

    if not trusted:
        from genzoo.commands.trust import check_names

        check_names(node, key, trust)
    with within_memory():
        # Whatever a stranger's arguments make a constructor stumble over, it is no bug of ours.
        return _build(node, key, REFUSALS if trusted else (Exception,), extra)


def misfit(key: str, error: BaseException) -> UsageError:
    """Blame a key for a trial that failed, or the model where one of its parts stumbled over another."""
    if isinstance(error, _STUMBLES):
        return UsageError(f"model: its parts do not fit together: {one_line(error)}")
    return UsageError(f"{key}: {one_line(error)}")


class _Part(functools.partial):
    """What a constructor makes its own parts with; one that cannot be made is named by its key."""

    key: str

    def __call__(self, /, *arguments: Any, **keywords: Any) -> Any:
        try:
            return super().__call__(*arguments, **keywords)
        except UsageError:
            raise
        except REFUSALS as error:
            raise UsageError(f"{self.key}: {_told(self.func, arguments, self.keywords | keywords, error)}") from error


def _told(function: Any, arguments: Sequence[Any], keywords: dict[str, Any], error: BaseException) -> str:
    """Say how a constructor refused; where it names no argument, beside those that it was given."""
    text = one_line(error) or type(error).__name__
    if isinstance(error, ValueError):  # by which constructors say what they do not take
        return text
    if not isinstance(error, _STUMBLES) and any(re.search(rf"\b{name}\b", text) for name in keywords):
        return text
    plain = (f"{name}={value}" for name, value in keywords.items() if isinstance(value, int | float | str | None))
    return f"{function.__name__}({', '.join([*map(str, arguments), *plain])[:200]}): {text}"


def _build(node: Any, key: str, refusals: tuple[type[Exception], ...], extra: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(item, f"{key}[{i}]", refusals, {}) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    arguments = {
        name: _build(value, f"{key}.{name}", refusals, {})
        for name, value in node.items()
        if name not in ("_target_", "_partial_")
    }
    if "_target_" not in node:
        return arguments
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool):
        raise UsageError(f"{key}._partial_={partial}: say true or false")
    function = _resolve(node["_target_"], key)
    arguments |= extra
    _check_arguments(function, arguments, key, partial)
    try:
        if not partial:
            return function(**arguments)
        if "." not in key:  # an optimiser, which is made later and by others
            return functools.partial(function, **arguments)
        part = _Part(function, **arguments)
        part.key = key
        return part
    except UsageError:
        raise
    except refusals as error:
        raise UsageError(f"{key}: {_told(function, (), arguments, error)}") from error


def _check_arguments(function: Any, arguments: dict[str, Any], key: str, partial: bool) -> None:
    """Compare arguments with a signature: their names, and their types where these can be checked."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return
    try:
        hints = inspect.get_annotations(function.__init__ if inspect.isclass(function) else function, eval_str=True)
    except (TypeError, NameError):  # of what is imported for the type checker alone
        hints = {}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not open_ended:
            said = _renamed(f"{key}.{name}", (f"{key}.{other}" for other in parameters)) or nearest(name, parameters)
            raise UsageError(f"unknown key '{key}.{name}': {said}")
        hint = hints.get(name)
        problem = _wrong_type(value, hint)
        if not problem and hint in (int, int | None) and value is not None and value < 0 and _is_ours(function):
            problem = "a size or a count, which cannot be negative"
        if problem:
            raise UsageError(f"{key}.{name}={_shown(value)}: {problem}")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind in kinds]
    lacking = [name for name in needed if name not in arguments]
    if lacking and not partial:
        raise UsageError(f"{key}.{lacking[0]} is missing: say {key}.{lacking[0]}=...")


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("genzoo.")


def _shown(value: Any) -> str:
    if not isinstance(value, int | float | str | list | dict | None):
        return f"({type(value).__name__})"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _wrong_type(value: Any, hint: Any) -> str | None:
    """Say what a value should have been, None where it fits or the hint cannot be checked."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if hint is None:
        return None
    if not _is_finite(value):
        return "must be finite"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "must be less than 2**63"
    errors = []
    for candidate in (value, _tuples(value)):  # YAML has no tuples
        try:
            TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(candidate, strict=True)
        except ValidationError as error:
            errors.append(error.errors(include_context=False)[0])
        except Exception:  # pydantic raises many kinds for annotations that it cannot read
            return None
        else:
            return None
    message = max(errors, key=lambda error: len(error["loc"]))["msg"]
    return f"{message[0].lower()}{message[1:]}"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def pick_precision(name: str, device: str) -> str:
    """Turn "auto" into bf16 autocast where the processor computes in it, else float32; older GPUs (V100, T4) emulate it."""
    import torch

    if name != "auto":
        return name
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16-mixed" if native else "32-true"


def pick_device(name: str, key: str = "device") -> str:
    """Turn "auto" into what this machine has.

    Args:
        name: "auto", "cpu" or "cuda".
        key: where the name stands, for messages.

    Raises:
        UsageError: for a device that is not there.
    """
    import torch

    if name.partition(":")[0] == "mps":
        raise UsageError(f"{key}={name}: the GPUs of Apple's machines are not supported; say {key}=cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{key}=cuda: torch finds no CUDA device here; say {key}=cpu")
    return name
