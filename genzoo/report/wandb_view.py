"""A comparison as a wandb run, and a wandb workspace over trained runs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genzoo.report import leaderboard, records, texts
from genzoo.runs import WANDB_LINKS, RunError, check_tree, write_atomically
from genzoo.runs.redact import redact

# Metrics of a dashboard, for all families.
QUALITY = ("test/fid", "test/fd_fashion_mnist", "test/fd_digits", "test/fd_identity")
DENSITY = ("test/bpd", "test/bpd_upper", "test/bpd_estimate", "test/nll", "test/nll_upper", "test/nll_estimate")
COST = ("sampling/nfe", "sampling/samples_per_second", "training/images", "training/seconds", "training/flops")
TERMS = ("(mse|nll|distortion|critic|generator)$", "rate", "(perplexity|usage|dead)", "log_det", ".*grad_norm", "lr")


def log(
    folders: Sequence[str],
    out: Path,
    project: str,
    group: str | None,
    *,
    entity: str | None = None,
    tags: Sequence[str] = (),
    online: bool,
) -> str:
    """Log the tables, their plots and the grids of samples to a wandb run.

    Args:
        folders: of runs, as for the page.
        out: parent of ``wandb/``, the folder of offline runs.
        project: wandb project.
        group: wandb group.
        entity: user or team; None for that of the login.
        tags: in addition to the names of the data.
        online: whether to upload.

    Returns:
        URL or folder of the run.

    Raises:
        RunError: if wandb is unreachable.
    """
    import wandb

    check_tree(out / "wandb", links=WANDB_LINKS)  # wandb follows links
    found, _ = records.read(records.find(folders))
    tables = leaderboard.tables(leaderboard.rows(found))
    try:
        run = wandb.init(
            project=redact(project),
            entity=redact(entity),
            group=redact(group),
            name="comparison",
            job_type="comparison",
            dir=str(out.resolve()),
            mode="online" if online else "offline",
            tags=list(dict.fromkeys(redact([*(table.data for table in tables), *tags]))),
            config=redact({"runs": [record.name for record in found]}),
            settings=wandb.Settings(
                init_timeout=20,
                finish_timeout=120,
                x_disable_meta=True,
                disable_git=True,  # a remote URL may contain a token
                console="off",
                silent=True,
                save_code=False,
            ),
        )
    except Exception as error:
        raise RunError(f"logger.mode: wandb cannot be reached: {' '.join(str(error).split())}") from error
    with tempfile.TemporaryDirectory() as folder:
        for i, table in enumerate(tables, start=1):
            name = f"{table.data}-{i}" if len(tables) > 1 else table.data
            run.log(contents(table, name, Path(folder)))
        run.finish()
    return str(run.url if online else run.settings.sync_dir)


def contents(table: leaderboard.Table, name: str, folder: Path) -> dict[str, Any]:
    """Logged values of one table: scores, protocols, grids, and a bar chart for each headline."""
    import wandb

    metrics = table.metrics
    columns: list[str | int] = ["row", "family", "seeds"]
    columns += [f"{metric} {part}" for metric in metrics for part in ("mean", "stderr", "n")]
    lines: list[list[Any]] = []
    grids: list[Any] = []
    for row in table.rows:
        line: list[Any] = [row.label, row.model, ", ".join(map(str, row.seeds))]
        for metric in metrics:
            cell = row.cells.get(metric)
            line += [cell.mean, cell.stderr, len(cell.values)] if cell else [None, None, 0]
        lines.append(line)
        picture = next((grid for record, _ in row.runs if (grid := record.picture())), None)
        if picture:
            path = folder / f"{name}-{len(grids)}.png"
            path.write_bytes(picture)
            grids.append(wandb.Image(str(path), caption=row.label))
    protocols = [[metric, leaderboard.key(protocol)] for metric, protocol in table.protocols.items()]
    logged: dict[str, Any] = {
        f"{name}/leaderboard": wandb.Table(columns=columns, data=lines),
        f"{name}/protocols": wandb.Table(columns=["metric", "protocol"], data=protocols),
    }
    if grids:
        logged[f"{name}/samples"] = grids
    for metric in table.headlines:
        means = [(row.label, row.cells[metric].mean) for row in table.rows if metric in row.cells]
        bars = wandb.Table(columns=["row", metric], data=[[label, mean] for label, mean in means if mean is not None])
        if len(bars.data) > 1:
            title = texts.heading(table, metric)
            logged[f"{name}/{metric}"] = wandb.plot.bar(bars, "row", metric, title=title)
    return logged


def workspace(entity: str, project: str, out: Path, *, online: bool) -> str:
    """Build a dashboard over runs trained with ``logger=wandb``.

    Args:
        entity, project: of wandb.
        out: folder for ``workspace.json`` without a login.
        online: whether to upload.

    Returns:
        Its URL, or the file.

    Raises:
        RunError: if wandb-workspaces is not installed, or wandb raises.
    """
    try:
        from wandb_workspaces import workspaces as ws
        from wandb_workspaces.reports import v2 as panels
    except ImportError as error:
        raise RunError("workspace needs wandb-workspaces: pip install 'genzoo[workspaces]'") from error

    def bars(metrics: Sequence[str]) -> list[Any]:
        return [panels.BarPlot(metrics=[metric], title=texts.label(metric)) for metric in metrics]

    clouds = [panels.ScatterPlot(x=cost, y=metric, log_x=True) for metric in QUALITY for cost in COST[:2]]
    curves = [panels.LinePlot(x="images", metric_regex=f"^train/{term}", title=term) for term in TERMS]
    sections = {
        "Samples": [panels.MediaBrowser(media_keys=["samples"])],
        "Quality": bars(QUALITY),
        "Density": bars(DENSITY),
        "Quality and cost": clouds,
        "Cost": bars((*COST, "model/parameters")),
        "Training": curves,
    }
    dashboard = ws.Workspace(
        entity=entity,
        project=project,
        name="genzoo: families side by side",
        sections=[ws.Section(name=name, panels=content, is_open=True) for name, content in sections.items()],
    )
    if online:
        try:
            dashboard.save()
        except Exception as error:
            raise RunError(f"workspace={entity}/{project}: wandb failed: {' '.join(str(error).split())}") from error
        return str(dashboard.url)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "workspace.json"
    write_atomically(path, dashboard._to_model().model_dump_json(by_alias=True, indent=2).encode())
    return f"{path} (no login: run `wandb login` and repeat the command to upload it)"
