"""Text of ``--help``, with the comments of keys, and of ``genzoo explain``, with the files that set them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml
from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from genzoo.config.budgets import clearing_overrides
from genzoo.config.loader import hydra_loader, leaves, searchpath_override
from genzoo.config.origins import Origin, origins, shown
from genzoo.config.overrides import parse
from genzoo.config.paths import CONF
from genzoo.errors import UsageError, nearest

INTERNAL = ("_target_", "_partial_", "kind", "source")  # keys that users never set
INTERNAL_GROUPS = ("hydra", "kind", "recipe")  # determined by the data and the model
COLUMN = 44  # of comments


def help_text(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Help of a command: groups with their choices, and keys with values and comments."""
    homes = [CONF, *([Path(config_dir)] if config_dir else [])]
    choices: dict[str, set[str]] = {}
    for home in homes:
        for path in home.glob("*/**/*.yaml"):
            choices.setdefault(path.parent.relative_to(home).as_posix(), set()).add(path.stem)
    groups = (
        f"{group}: {', '.join(sorted(names))}"
        for group, names in sorted(choices.items())
        if group.partition("/")[0] not in INTERNAL_GROUPS
    )
    config = _composed(verb, overrides, config_dir)
    template = Template(config.hydra.help.template)
    with open_dict(config):
        del config["hydra"]
    comments = {key: lines[-1].comment or next((o.comment for o in reversed(lines) if o.comment), "")
                for key, lines in origins(verb, overrides, config_dir).items()}  # fmt: skip
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return template.substitute(
        APP_CONFIG_GROUPS="\n".join(groups) + "\n", CONFIG="\n".join(_commented(plain, comments)) + "\n"
    )


def _composed(verb: str, overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    with hydra_loader():
        cleared = clearing_overrides(verb, overrides, config_dir)
        return compose(verb, [*searchpath_override(config_dir), *overrides, *cleared], return_hydra_config=True)


def _commented(node: dict[Any, Any], comments: dict[str, str], prefix: str = "", indent: int = 0) -> Iterator[str]:
    """Yield the lines of a configuration, with comments."""
    for key, value in node.items():
        if key in INTERNAL:
            continue
        full = f"{prefix}{key}"
        comment = comments.get(full, "")
        nested = isinstance(value, dict)
        if nested and not any(name not in INTERNAL for name in value):
            continue
        line = f"{' ' * indent}{key}:" + ("" if nested else f" {_scalar(value)}")
        yield f"{line:<{COLUMN}}  # {comment}" if comment else line
        if nested:
            yield from _commented(value, comments, f"{full}.", indent + 2)


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    return yaml.safe_dump(value).split("\n")[0] if value is None or isinstance(value, bool) else str(value)


def explain_text(verb: str, words: Sequence[str], config_dir: str | None = None) -> str:
    """List the lines that set some keys of a composition, the effective one first.

    Args:
        verb: the command.
        words: overrides, ``model=ddpm``, and keys, ``optimizer.lr``.
        config_dir: a further directory of configurations.

    Raises:
        UsageError: without a key, or for an unknown key.
    """
    overrides = [word for word in words if "=" in word]
    keys = [word for word in words if "=" not in word]
    if not keys:
        raise UsageError("explain: no key given; example: explain model=ddpm data=digits optimizer.lr")
    config = _composed(verb, overrides, config_dir)
    with open_dict(config):
        del config["hydra"]
    raw = dict(leaves(OmegaConf.to_container(config, resolve=False)))
    typed = {override.key_or_group: override for override in map(parse, overrides)}
    found = origins(verb, overrides, config_dir)
    return "\n".join(line for key in keys for line in _explained(key, config, raw, typed, found))


def _explained(
    key: str, config: DictConfig, raw: dict[str, Any], typed: dict[str, Any], found: dict[str, list[Origin]]
) -> Iterator[str]:
    if key not in raw:
        raise UsageError(f"unknown key '{key}': {nearest(key, raw)}")
    value = OmegaConf.select(config, key)
    yield f"{key} = {_scalar(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)}"
    if key in typed:
        yield f"  command line: {typed[key].input_line}"
    lines = found.get(key, [])
    cleared = key.startswith("budget.") and value is None and key not in typed and lines and lines[-1].text != "null"
    if cleared:
        yield "  cleared: another limit of the budget was set"
    for i, origin in enumerate(reversed(lines)):
        comment = f"  # {origin.comment}" if origin.comment else ""
        overridden = " (overridden)" if i or key in typed or cleared else ""
        yield f"  {shown(origin.file)}:{origin.line}: {origin.text or 'a section'}{overridden}{comment}"
