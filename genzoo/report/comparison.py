"""The comparison of runs as files: a web page, and the leaderboard as Markdown and CSV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from genzoo.errors import UsageError
from genzoo.report import leaderboard, page, records, texts
from genzoo.runs import check_writable, write_atomically
from genzoo.runs.redact import redact


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be written to, before any run is read; it is not made yet.

    Raises:
        ValueError: saying what is wrong with it.
    """
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UsageError(f"out={out}: {there} is no folder")
    check_writable(there, f"out={out}")


def write_comparison(folders: Sequence[str], out: Path, title: str | None = None) -> Path:
    """Compare all runs in some folders.

    Args:
        folders: run directories, or folders of them.
        out: the folder that ``index.html``, ``leaderboard.md`` and ``leaderboard.csv`` go into.
        title: heading of the page.

    Raises:
        RunError: where there is no run.
        UsageError: where nothing can be written.
    """
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
    return out / "index.html"
