"""Comparison of runs: a web page, and the leaderboard as Markdown and CSV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from genzoo.errors import UsageError
from genzoo.report import leaderboard, page, records, texts
from genzoo.runs import check_writable, write_atomically
from genzoo.runs.redact import redact


def check_out(out: Path) -> None:
    """Check that a folder is writable or can be created.

    Raises:
        ValueError: naming the cause.
    """
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UsageError(f"out={out}: {there} is not a folder")
    check_writable(there, f"out={out}")


def write_comparison(folders: Sequence[str], out: Path, title: str | None = None) -> Path:
    """Compare all runs in some folders.

    Args:
        folders: run directories, or folders of them.
        out: folder for ``index.html``, ``leaderboard.md`` and ``leaderboard.csv``.
        title: heading of the page.

    Raises:
        RunError: if there is no run.
        UsageError: if the files cannot be written.
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
