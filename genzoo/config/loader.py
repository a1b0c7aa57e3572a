"""Hydra's loader on the configuration directory."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from genzoo.config.paths import CONF

# What Hydra and OmegaConf raise for a command line that does not compose.
COMPOSING = (HydraException, OmegaConfBaseException, ValueError, AttributeError, TypeError, LookupError, AssertionError)


@contextlib.contextmanager
def hydra_loader() -> Iterator[ConfigLoader]:
    """Open the configuration directory, to be composed or listed."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="genzoo"):
        yield GlobalHydra.instance().config_loader()


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List all keys of plain sections, and what they hold."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield f"{prefix}{key}", value
        yield from leaves(value, f"{prefix}{key}.")


def is_finite(value: Any) -> bool:
    """Whether a plain value is, or a list of them, no NaN and no infinity."""
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def searching(config_dir: str | None) -> list[str]:
    """Let Hydra look into a directory of the reader's own too."""
    return [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
