"""Lightning's loggers, each made for one run directory; ``metrics.jsonl`` is written whichever of them is chosen."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from genzoo.runs import Run


def csv(run: Run, config: dict[str, Any]) -> Logger:
    """Write ``csv/metrics.csv`` into the run directory."""
    return CSVLogger(save_dir=str(run.path), name="", version="csv")


def tensorboard(run: Run, config: dict[str, Any]) -> Logger:
    """Write TensorBoard's event files into ``tensorboard/`` of the run directory.

    Raises:
        ValueError: where TensorBoard is not installed.
    """
    try:
        return TensorBoardLogger(save_dir=str(run.path), name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise ValueError("logger=tensorboard needs TensorBoard: pip install 'genzoo[tensorboard]'") from error


def has_wandb_key() -> bool:
    """Whether wandb could log in without asking: by the environment or by ``~/.netrc``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb(
    run: Run,
    config: dict[str, Any],
    mode: Literal["auto", "online", "offline"] = "auto",
    project: str = "genzoo",
    group: str | None = None,
) -> Logger:
    """Send a run to Weights & Biases, or keep it in ``wandb/`` of the run directory.

    It never waits for a login: "auto" is online where a key is found and offline otherwise.

    Raises:
        ValueError: for mode "online" without a key.
    """
    if mode not in ("auto", "online", "offline"):
        raise ValueError(f"logger.mode must be auto, online or offline, not {mode!r}")
    if mode == "online" and not has_wandb_key():
        raise ValueError("logger.mode=online needs a key: run `wandb login`, or say logger.mode=offline")
    offline = mode == "offline" or not has_wandb_key()
    logger = WandbLogger(
        name=f"{run.path.parent.name}/{run.path.name}",
        save_dir=str(run.path),
        project=project,
        group=group,
        offline=offline,
        tags=[config["model"]["_target_"].rsplit(".", 1)[-1], config["data"]["name"]],
        config=config,
        save_code=False,
        settings={"init_timeout": 20, "x_disable_meta": True, "console": "off", "silent": True},
    )
    logger.experiment.define_metric("*", step_metric="images")
    return logger
