"""``python -m genzoo compare runs=DIR[,DIR...]``: put runs side by side, as tables and as one web page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genzoo.commands.config import UsageError


def compare(config: dict[str, Any]) -> Path:
    """Read runs, write the comparison, and print its headlines.

    Returns:
        The web page.

    Raises:
        ValueError: in one line, for what the user can mend.
    """
    return write(config["runs"], Path(config["out"]), config["title"])


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
    from genzoo.report import leaderboard, page, records
    from genzoo.runs import write_atomically

    found, broken = records.read(records.find(folders))
    tables = leaderboard.tables(leaderboard.rows(found))
    unfinished = [f"{record.name}: {why}" for record in found if (why := unscored(record))] + broken
    if title is None:
        title = "Families compared on " + ", ".join(dict.fromkeys(table.data for table in tables)) if tables else "Runs"
    files = {
        "leaderboard.csv": leaderboard.to_csv(tables),
        "leaderboard.md": leaderboard.to_markdown(tables, unfinished),
        "index.html": page.build(title, found, tables, unfinished),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(out / name, text.encode(errors="replace"))
    except OSError as error:
        raise UsageError(f"out={out}: {error.filename}: {error.strerror}") from error
    print(f"comparison: {out / 'index.html'}", flush=True)
    return out / "index.html"


def unscored(record: Any) -> str | None:
    """Say why a run is in no table, None where it is in one."""
    if record.state != "done":
        why = record.status.get("why")
        return f"{record.state}: {why}" if why else record.state
    return None if record.results else "finished, and not scored"
