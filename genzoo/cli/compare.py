"""``python -m genzoo compare runs=DIR[,DIR...]``: put runs side by side, as tables and as one web page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genzoo.config.instantiate import build
from genzoo.errors import UsageError


def compare(config: dict[str, Any]) -> Path:
    """Read runs, write the comparison, and print its headlines.

    Returns:
        The web page.

    Raises:
        ValueError: in one line, for what the user can mend.
    """
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
    page = write(config["runs"], out, config["title"])
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


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be written to, before any run is read; it is not made yet.

    Raises:
        ValueError: saying what is wrong with it.
    """
    from genzoo.runs import check_writable

    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UsageError(f"out={out}: {there} is no folder")
    check_writable(there, f"out={out}")


def write(folders: Sequence[str], out: Path, title: str | None = None) -> Path:
    """Compare all runs in some folders.

    Args:
        folders: run directories, or folders of them.
        out: the folder that ``index.html``, ``leaderboard.md`` and ``leaderboard.csv`` go into.
        title: heading of the page.

    Raises:
        RunError: where there is no run.
        UsageError: where nothing can be written.
    """
    from genzoo.report import leaderboard, page, records, texts
    from genzoo.runs import write_atomically
    from genzoo.runs.redact import redact

    check_out(out)
    found, broken = records.read(records.find(folders))
    tables = leaderboard.tables(leaderboard.rows(found))
    unfinished = [f"{record.name}: {why}" for record in found if (why := record.unscored)] + broken
    if title is None:
        title = "Families compared on " + ", ".join(dict.fromkeys(table.data for table in tables)) if tables else "Runs"
    files = {
        "leaderboard.csv": texts.to_csv(tables),
        "leaderboard.md": texts.to_markdown(tables, unfinished),
        "index.html": page.build(redact(title), found, tables, unfinished),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(out / name, text.encode(errors="replace"))
    except OSError as error:
        raise UsageError(f"out={out}: {error.filename}: {error.strerror}") from error
    print(f"comparison: {out / 'index.html'}", flush=True)
    return out / "index.html"
