"""Hydra's compositions of the files in ``conf/``, each made once: the suite composes some thousand configurations.

Which files a configuration consists of depends on the choices of groups alone, and takes 25 times as long to read and merge as
a copy. The values of a command line are applied by Hydra each time. Configurations in other directories are read each time.
"""

from __future__ import annotations

import copy
from dataclasses import astuple
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList
from omegaconf import DictConfig

from genzoo.config.paths import CONF


def places(repo: Any) -> tuple[str, ...] | None:
    """Name the sources of a repository; None if some lie elsewhere than in ``conf/`` and in packages."""
    sources = [(source.scheme(), source.path) for source in repo.get_sources()]
    if any(scheme == "file" and path != str(CONF) for scheme, path in sources):
        return None
    return tuple(f"{scheme}://{path}" for scheme, path in sources)


def remember() -> None:
    """Let Hydra compose the files of the same choices once, for the rest of the process."""
    listed: dict[Any, DefaultsList] = {}
    merged: dict[Any, DictConfig] = {}
    make_list, merge = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list

    def create_defaults_list(
        repo: Any, config_name: Any, overrides_list: list[Any], prepend_hydra: bool, skip_missing: bool
    ) -> DefaultsList:
        where = places(repo)
        words = [word for word in overrides_list if not word.is_sweep_override()]
        values = [word for word in words if isinstance(word.value(), dict) or not repo.group_exists(word.key_or_group)]
        choices = tuple(word.input_line for word in words if word not in values)
        key = where, config_name, choices, prepend_hydra, skip_missing
        if where is not None and key in listed:
            found = copy.deepcopy(listed[key])
            found.config_overrides = values
            return found
        found = make_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        if where is not None and None not in choices:
            listed[key] = copy.deepcopy(DefaultsList(found.defaults, found.defaults_tree, [], found.overrides))
        return found

    def compose_config(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
        where = places(repo)
        key = where, tuple(map(astuple, defaults))
        if where is None:
            return merge(self, defaults, repo)
        if key not in merged:
            merged[key] = merge(self, defaults, repo)
        return copy.deepcopy(merged[key])

    config_loader_impl.create_defaults_list = create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = compose_config  # type: ignore[method-assign]
