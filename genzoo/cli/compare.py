"""``python -m genzoo compare runs=DIR[,DIR...]``: compare runs in tables and a web page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genzoo.config.instantiate import build


def compare(config: dict[str, Any]) -> Path:
    """Write the comparison of runs, and print its path.

    Returns:
        The web page.

    Raises:
        ValueError: with a one-line message, for invalid input.
    """
    from genzoo.report.comparison import write_comparison
    from genzoo.training.loggers import project_of, redacted_environment, wandb_mode

    out = Path(config["out"])
    logger: Any = build(config["logger"], "logger") if config.get("logger") else None
    if config["workspace"] is not None:
        from genzoo.report.wandb_view import workspace

        entity, _, project = config["workspace"].partition("/")
        online = wandb_mode("auto") == "online"
        print(f"workspace: {workspace(entity, project, out, online=online)}", flush=True)
    if config["runs"] is None:
        return out
    page = write_comparison(config["runs"], out, config["title"])
    print(f"comparison: {page}", flush=True)
    if logger:
        from genzoo.report.wandb_view import log

        mode = wandb_mode(logger.mode)
        if mode != "disabled":
            with redacted_environment():
                where = log(
                    config["runs"],
                    out,
                    project_of(logger.project),
                    logger.group,
                    entity=logger.entity,
                    tags=logger.tags,
                    online=mode == "online",
                )
            print(f"wandb: {where}", flush=True)
    return page
