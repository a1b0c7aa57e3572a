"""Tables of scores on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any]) -> None:
    """Print the scores as a table, followed by warnings."""
    table = Table("metric", "value", "± stderr", "unit", "how")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for name, measured in result["metrics"].items():
        protocol = measured["card"]["protocol"]
        stderr = "" if measured["stderr"] is None else f"{measured['stderr']:.2g}"
        table.add_row(name, number(measured["value"]), stderr, protocol["unit"], how(measured["card"]))
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    console.print(table)
    for warning in result["warnings"]:
        print(f"warning: {warning}")


def number(value: Any) -> str:
    """Format a number with its significant digits."""
    if value is None:
        return "n/a"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if abs(value) >= 1e-2 or value == 0 else f"{value:.3g}"


def how(card: dict[str, Any]) -> str:
    """Summarise the card of a score."""
    protocol, setting = card["protocol"], card["setting"]
    parts = [
        {"EXACT": "exact", "LOWER": "bound", "ESTIMATE": "estimate"}.get(protocol.get("bound", "")),
        f"n={protocol['n']}" if "n" in protocol else None,
        f"{protocol['n_fake']} samples" if "n_fake" in protocol else None,
        f"{protocol['n_real']} real" if "n_real" in protocol else None,
        f"forced: {protocol['forced']}" if "forced" in protocol else None,
        f"k={setting['num_samples']}" if "num_samples" in setting else None,
        f"nfe={protocol.get('nfe') or setting.get('nfe')}" if "nfe" in protocol or "n_fake" in protocol else None,
        protocol.get("device"),
        setting.get("weights"),
    ]
    return ", ".join(part for part in parts if part and not part.endswith("None"))
