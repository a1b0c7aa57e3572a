"""Lightning's loggers, each opened for one run directory; ``metrics.jsonl`` is written whichever of them is chosen.

What a logger needs is checked when it is configured, before there is a run and before Lightning, which takes seconds, is
imported; ``open`` then makes it for a run.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import netrc
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from genzoo.console import log_stderr
from genzoo.environment import home
from genzoo.runs import WANDB_LINKS, Run
from genzoo.runs.redact import redact

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger


class Records(ABC):
    """A kind of logger."""

    @abstractmethod
    def open(self, run: Run, config: dict[str, Any]) -> Logger | None:
        """Make the logger of a run; None where it is switched off."""

    def close(self, logger: Logger, *, failed: bool) -> None:
        """Write out what is left."""
        logger.finalize("failed" if failed else "success")


def numbers(event: dict[str, Any]) -> dict[str, Any]:
    """Return what a logger is told of an event of ``metrics.jsonl``."""
    prefix = "interim/" if event["event"] == "interim" else ""
    told = {f"{prefix}{name}": value for name, value in event["values"].items() if value is not None}
    if "images_per_second" in event:
        told["train/images_per_second"] = event["images_per_second"]
    return {**told, "images": event["images"]}


class CSV(Records):
    """Writes ``csv/metrics.csv`` into the run directory."""

    def open(self, run: Run, config: dict[str, Any]) -> Logger:
        from pytorch_lightning.loggers import CSVLogger

        if (run.path / "csv").exists():  # as the logger would do: of a run that is gone on with
            shutil.rmtree(run.path / "csv")
        logger = CSVLogger(save_dir=str(run.path), name="", version="csv")
        for event in run.events():
            if event["event"] in ("train", "interim") and event.get("images") is not None:
                logger.log_metrics(numbers(event), step=event["images"])
        return logger


class TensorBoard(Records):
    """Writes TensorBoard's event files into ``tensorboard/`` of the run directory.

    Raises:
        ValueError: where TensorBoard is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("TensorBoard is not installed: pip install 'genzoo[tensorboard]'")

    def open(self, run: Run, config: dict[str, Any]) -> Logger:
        from pytorch_lightning.loggers import TensorBoardLogger

        return TensorBoardLogger(save_dir=str(run.path), name="tensorboard", version="")


def has_wandb_key() -> bool:
    """Whether wandb could log in without asking: by the environment or by ``~/.netrc``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    user = home()
    file = os.environ.get("NETRC") or (user and user / ".netrc")
    try:
        return bool(file) and netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


MODES = {
    **{"online": "online", "run": "online", "shared": "online"},
    **{"offline": "offline", "dryrun": "offline", "disabled": "disabled"},
}  # of wandb, old names included


# Variables by which wandb describes a run, none of which it needs to log in.
DESCRIPTIONS = tuple(
    f"WANDB_{name}" for name in ("PROJECT", "ENTITY", "TAGS", "RUN_GROUP", "NAME", "NOTES", "JOB_TYPE")
)


def wandb_mode(asked: str) -> str:
    """Decide whether wandb may use the network, as ``logger.mode`` says or wandb's own settings do.

    ``WANDB_MODE`` and what ``wandb offline`` and ``wandb disabled`` have written are followed, with or without a key.

    Args:
        asked: "online", "offline", "disabled", or "auto" for wandb's own settings, and without any for online where a key
            is found.

    Returns:
        "online", "offline" or "disabled".

    Raises:
        ValueError: for "online" without a key, and for a mode that wandb does not have.
    """
    if asked == "online" and not has_wandb_key():
        raise ValueError("mode=online needs a key: run `wandb login`, or say logger.mode=offline")
    if asked != "auto":
        return asked
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    said = (os.environ.get("WANDB_MODE") or _mode_of_files() or "online").lower()
    if said not in MODES:
        raise ValueError(f"WANDB_MODE={said}: choose from online, offline, disabled")
    return MODES[said] if MODES[said] != "online" or has_wandb_key() else "offline"


def _mode_of_files() -> str | None:
    """Read what ``wandb offline`` has written, into the folder where it was typed or for the user."""
    user = home()
    folders = [Path(os.environ.get("WANDB_DIR") or ".", "wandb")]
    if configured := os.environ.get("WANDB_CONFIG_DIR") or (user and user / ".config" / "wandb"):
        folders.append(Path(configured))
    for folder in folders:
        parser = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
            parser.read(folder / "settings")
            if mode := parser.get("default", "mode", fallback=None):
                return mode
    return None


@contextlib.contextmanager
def redacted_environment() -> Iterator[None]:
    """Keep secrets in wandb's variables, such as a token in ``WANDB_PROJECT``, out of the files that wandb writes."""
    before = {name: os.environ[name] for name in DESCRIPTIONS if name in os.environ}
    changed = {name: value for name, value in before.items() if redact(value) != value}
    os.environ.update({name: redact(value) for name, value in changed.items()})
    try:
        yield
    finally:
        os.environ.update(changed)


def project_of(said: str | None) -> str:
    """Return the project of wandb that is meant by ``logger.project``."""
    return said or os.environ.get("WANDB_PROJECT") or "genzoo"


def check_names(project: str | None, tags: Sequence[str]) -> None:
    """Refuse names that wandb would not take.

    Raises:
        ValueError: naming the argument.
    """
    name = project_of(project)
    if len(name) > 128 or any(letter in name for letter in "/\\#?%:"):
        raise ValueError(f"project={name[:130]}: at most 128 characters, none of / \\ # ? % :")
    for tag in tags:
        if not 1 <= len(tag) <= 64:
            raise ValueError(f"tags: '{tag[:70]}': a tag has 1 to 64 characters")


@dataclass(frozen=True)
class WandB(Records):
    """Sends a run to Weights & Biases, or keeps it in ``wandb/`` of the run directory. It never waits for a login.

    Every run has the metric names of ``metrics.jsonl``, its configuration, its grids as images, its last scores as a summary,
    and as tags its family, data and budget.

    Secrets in any of the arguments are blotted out before wandb sees them.

    Args:
        mode: "online", "offline", "disabled", or "auto", see ``wandb_mode``. Without the network it goes on offline.
        project: where online runs are listed; None for ``WANDB_PROJECT``, or "genzoo".
        entity: the user or team that it belongs to; None for the one of the login.
        group: under which they are listed together; None for that of the sweep, if it is one.
        tags: further ones.

    Raises:
        ValueError: for mode "online" without a key, and for what wandb does not take.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        wandb_mode(self.mode)
        check_names(self.project, self.tags)

    def open(self, run: Run, config: dict[str, Any]) -> Logger | None:
        mode = wandb_mode(self.mode)
        if mode == "disabled":
            return None
        offline = mode == "offline"
        try:
            return self._open(run, config, offline, run.path.name)
        except Exception as error:
            if offline:
                raise
            log_stderr(f"wandb cannot be reached, the run is kept offline: {redact(repr(error))}")
            return self._open(run, config, True, f"{run.path.name}-offline")  # wandb does not give the first name back

    def _open(self, run: Run, config: dict[str, Any], offline: bool, name: str) -> Logger:
        config, status, own = redact(config), run.status, os.environ.get("WANDB_TAGS", "").split(",")
        budget = {name: value for name, value in config["budget"].items() if value is not None and name != "samples"}
        tags = [
            str(status["model"]),
            config["data"]["name"],
            *(f"{name}={value:g}" for name, value in budget.items()),
            *(tag for tag in [*self.tags, *own] if tag),
        ]
        with redacted_environment():
            return self._begin(run, config, offline, name, list(dict.fromkeys(redact(tags))))

    def _begin(self, run: Run, config: dict[str, Any], offline: bool, name: str, tags: list[str]) -> Logger:
        from genzoo.training.wandb_logger import FaultTolerantWandbLogger

        for link in WANDB_LINKS:  # which lead where an earlier process, or a stranger, has put them
            if (run.path / "wandb" / link).is_symlink():
                (run.path / "wandb" / link).unlink()
        logger = FaultTolerantWandbLogger(
            name=redact(f"{run.path.parent.name}/{run.path.name}"),
            version=name,  # under which a run that is gone on with is found again
            save_dir=str(run.path.resolve()),  # wandb's service may have been started elsewhere
            project=redact(project_of(self.project)),
            entity=redact(self.entity),
            group=redact(self.group or os.environ.get("GENZOO_SWEEP")),
            offline=offline,
            mode="offline" if offline else "online",  # the variable that Lightning sets is read once a process
            tags=tags,
            config=config,
            save_code=False,
            settings={
                "init_timeout": 20,
                "finish_timeout": 120,
                "x_disable_meta": True,
                "disable_git": True,  # the address of a repository may hold a token
                "console": "off",
                "silent": True,
            },
        )
        logger.experiment.define_metric("*", step_metric="images")
        return logger

    def close(self, logger: Logger, *, failed: bool) -> None:
        from genzoo.training.wandb_logger import FaultTolerantWandbLogger

        assert isinstance(logger, FaultTolerantWandbLogger)
        super().close(logger, failed=failed)
        # The next job of a sweep must not write into this run.
        logger.quietly(lambda: logger.experiment.finish(exit_code=int(failed)))
