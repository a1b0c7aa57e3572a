"""Overrides of the command line, ``key=value``: parsing, counting and first values of sweeps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException

from genzoo.errors import UsageError

MOST_JOBS = 10_000  # of a sweep; Hydra lists all of them before the first


def parse(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_overrides([text])[0]
        if not override.key_or_group:
            raise UsageError(f"cannot parse '{text[:200]}': it has no key")
        return override
    except (HydraException, RecursionError) as error:
        raise UsageError(
            f"cannot parse '{text[:200]}': write key=value, with quotes around special characters"
        ) from error


class Options:
    """Choices of one group for ``glob(...)``, including those of ``--config-dir``.

    Args:
        names: of the choices.
    """

    def __init__(self, names: list[str]):
        self.names = names

    def get_group_options(self, group: str, results_filter: Any = None) -> list[str]:
        return self.names


def count(override: Override) -> int:
    """Count the values of an override, without listing them.

    Raises:
        UsageError: if it has none.
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
            raise UsageError(f"{override.input_line}: glob(...) needs a config group")
        count = len(value.filter(options))
        if not count:
            raise UsageError(f"{override.input_line}: matches none of {', '.join(options)}")
    else:
        count = len(value.list)
    if not count:
        raise UsageError(f"{override.input_line}: has no values")
    return count


def first(override: Override) -> str:
    """Return the first override of a sweep as text: its first choice, or the start of its interval."""
    if not override.is_sweep_override():
        return override.input_line or ""
    if override.is_interval_sweep():
        interval: Any = override.value()
        start = int(interval.start) if "int" in interval.tags or isinstance(interval.start, int) else interval.start
        return f"{override.get_key_element()}={start}"
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def join_runs(verb: str, overrides: Sequence[str]) -> list[str]:
    """Parse ``compare runs=a,b`` and ``serve runs=a,b`` as a list of folders, not as a sweep."""
    pattern = re.compile(r"^runs=([^\[{'\"]*,.*)$")
    verbs = "compare", "serve", "decompress"
    return [pattern.sub(r"runs=[\1]", word) if verb in verbs else word for word in overrides]


def quoted(text: str) -> str:
    """Quote a text for Hydra and OmegaConf, such that its value is the text itself."""
    text = re.sub(r"(\\*)(\"|$)", lambda found: 2 * found[1] + ("\\" if found[2] else "") + found[2], text)
    return '"' + text.replace("${", "\\${") + '"'


EXAMPLES = ("compress", "encode", "reconstruct", "interpolate", "traverse")  # commands with a key ``examples``


def expand_shorthands(verb: str, overrides: Sequence[str]) -> list[str]:
    """Write shorthands in full.

    ``guidance=2.0`` and ``guidance=1,2`` are scales of classifier-free guidance; ``data=test`` of commands on examples, where
    the group ``data`` has no meaning, is ``examples=test``. ``decompress FILE`` is ``file=FILE``. ``text=`` takes the rest of
    the word as it is, without quotes.
    """
    if verb == "decompress" and overrides and "=" not in overrides[0]:
        overrides = [f"file={quoted(overrides[0])}", *overrides[1:]]
    if verb in EXAMPLES:
        overrides = [re.sub(r"^data=", "examples=", word) for word in overrides]
    pattern = re.compile(r"^guidance=([-+]?[\d.][^=]*)$")
    words: list[str] = []
    for word in overrides:
        if key := re.match(r"(text|from_text)=(?!['\"])(?!null$)", word):
            words.append(key[0] + quoted(word[key.end() :]))
            continue
        found = pattern.match(word)
        words += ["guidance=classifier_free", f"guidance.scale={found[1]}"] if found else [word]
    return words
