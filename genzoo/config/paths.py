"""Paths of the configuration files."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
VERBS = tuple(sorted(path.stem for path in CONF.glob("*.yaml")))  # commands with a configuration of their own
