"""Lightning's loggers, each opened for one run directory; ``metrics.jsonl`` is written whichever of them is chosen.

What a logger needs is checked when it is configured, before there is a run and before Lightning, which takes seconds, is
imported; ``open`` then makes it for a run.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import shutil
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from genzoo.redact import redact
from genzoo.runs import WANDB_LINKS, Run

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger


class Records(ABC):
    """A kind of logger."""

    @abstractmethod
    def open(self, run: Run, config: dict[str, Any]) -> Logger:
        """Make the logger of a run."""

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
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@dataclass(frozen=True)
class WandB(Records):
    """Sends a run to Weights & Biases, or keeps it in ``wandb/`` of the run directory. It never waits for a login.

    Every run has the metric names of ``metrics.jsonl``, its configuration, its grids as images, its last scores as a summary,
    and as tags its family, data and budget.

    Args:
        mode: "online", "offline", or "auto": online where a key is found. Without the network it goes on offline.
        project: where online runs are listed.
        group: under which they are listed together; None for that of the sweep, if it is one.

    Raises:
        ValueError: for mode "online" without a key.
    """

    mode: Literal["auto", "online", "offline"] = "auto"
    project: str = "genzoo"
    group: str | None = None

    def __post_init__(self) -> None:
        if self.mode == "online" and not has_wandb_key():
            raise ValueError("mode=online needs a key: run `wandb login`, or say logger.mode=offline")

    def open(self, run: Run, config: dict[str, Any]) -> Logger:
        offline = self.mode == "offline" or not has_wandb_key()
        try:
            return self._open(run, config, offline, run.path.name)
        except Exception as error:
            if offline:
                raise
            print(
                f"genzoo: wandb cannot be reached, the run is kept offline: {redact(repr(error))}",
                file=sys.stderr,
                flush=True,
            )
            return self._open(run, config, True, f"{run.path.name}-offline")  # wandb does not give the first name back

    def _open(self, run: Run, config: dict[str, Any], offline: bool, name: str) -> Logger:
        from genzoo.training.steadfast import Steadfast

        for link in WANDB_LINKS:  # which lead where an earlier process, or a stranger, has put them
            if (run.path / "wandb" / link).is_symlink():
                (run.path / "wandb" / link).unlink()
        config, status = redact(config), run.status
        budget = {name: value for name, value in config["budget"].items() if value is not None and name != "samples"}
        logger = Steadfast(
            name=redact(f"{run.path.parent.name}/{run.path.name}"),
            version=name,  # under which a run that is gone on with is found again
            save_dir=str(run.path.resolve()),  # wandb's service may have been started elsewhere
            project=self.project,
            group=redact(self.group or os.environ.get("GENZOO_SWEEP")),
            offline=offline,
            mode="offline" if offline else "online",  # the variable that Lightning sets is read once a process
            tags=[
                str(status["model"]),
                config["data"]["name"],
                *(f"{name}={value:g}" for name, value in budget.items()),
            ],
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
        from genzoo.training.steadfast import Steadfast

        assert isinstance(logger, Steadfast)
        super().close(logger, failed=failed)
        # The next job of a sweep must not write into this run.
        logger.quietly(lambda: logger.experiment.finish(exit_code=int(failed)))
