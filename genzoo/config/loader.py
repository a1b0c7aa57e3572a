"""Hydra's config loader."""

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

# Exceptions of Hydra and OmegaConf during composition.
COMPOSING = (HydraException, OmegaConfBaseException, ValueError, AttributeError, TypeError, LookupError, AssertionError)


@contextlib.contextmanager
def hydra_loader() -> Iterator[ConfigLoader]:
    """Initialise Hydra on the configuration directory."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="genzoo"):
        yield GlobalHydra.instance().config_loader()


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all full keys of nested mappings with their values, sections included."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield f"{prefix}{key}", value
        yield from leaves(value, f"{prefix}{key}.")


def is_finite(value: Any) -> bool:
    """Whether a plain value, or all items of a list, are neither NaN nor infinite."""
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def searchpath_override(config_dir: str | None) -> list[str]:
    """Override that adds a user's directory to Hydra's search path."""
    return [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
