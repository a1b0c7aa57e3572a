"""Runs of strangers that would lead what is written into them elsewhere: by links, pipes and hard links, at any depth.

Before anything is written into a run its whole tree is checked; and whatever is put there after that, no file is opened
through a link.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from genzoo.runs import WANDB_LINKS, Run, RunError, check_tree, files, write_atomically
from genzoo.training import checkpoints, loggers
from tests.commands import SMALL, TINY, genzoo, untrained
from tests.commands.test_resume import interrupted
from tests.report import run as reported
from tests.report import scored

HOPE = b"mine"


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """A run that was interrupted, from which all others are copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("halfway"))
        return interrupted(6, *SMALL["vae"], "logger=csv").absolute()


@pytest.fixture
def run(halfway, tmp_path, monkeypatch) -> Path:
    """A copy of it, beside a file of the reader's."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_bytes(HOPE)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def symlink(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere / "secret")


def dangling(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere / "made")


def to_folder(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def to_itself(path: Path, elsewhere: Path) -> None:
    path.symlink_to(path)


def pipe(path: Path, elsewhere: Path) -> None:
    os.mkfifo(path)


def listening(path: Path, elsewhere: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def hard(path: Path, elsewhere: Path) -> None:
    path.hardlink_to(elsewhere / "secret")


Plant = Callable[[Path, Path], None]
PLACES: list[tuple[str, Plant]] = [
    *(
        (f"{folder}/x", symlink)
        for folder in ("samples", "results", "checkpoints", "tensorboard", "csv", "wandb", "own")
    ),
    ("samples/step-11.png", symlink),
    ("samples/step-11.png", dangling),
    ("results/0.json", to_itself),
    ("checkpoints/step-99", to_folder),
    ("checkpoints/.step-left", to_folder),
    ("checkpoints/step-4/manifest.json", symlink),
    ("tensorboard/hparams.yaml", dangling),
    ("csv/metrics.csv", symlink),
    ("wandb/run-1/files", to_folder),
    ("wandb/run-1/latest-run", symlink),
    ("a/b/c/d/e", dangling),
    ("samples/step-11.png", pipe),
    ("tensorboard/events", listening),
    ("metrics.jsonl", hard),
    (".lock", hard),
    ("csv/metrics.csv", hard),
    ("tensorboard/hparams.yaml", hard),
]


def planted(run: Path, name: str, plant: Plant) -> Path:
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    plant(path, run.parent / "elsewhere")
    return path


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Return every name below a folder with what is there."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(("name", "plant"), PLACES, ids=[f"{name}, {plant.__name__}" for name, plant in PLACES])
def test_nothing_is_written_into_a_run_that_would_lead_it_elsewhere(run, tmp_path, name, plant):
    path = planted(run, name, plant)
    before = contents(tmp_path)
    for words in ([f"resume={run}"], ["evaluate", f"run={run}", "metrics.n=0"]):
        code, out, err = genzoo(*words)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"genzoo: {path}: "), err
        with pytest.raises(RunError), Run(run).training():
            raise AssertionError("this run may not be written")
    assert contents(tmp_path) == before


FILES_AND_FOLDERS = [
    *("checkpoints", "samples", "results", "csv", "tensorboard", "wandb"),
    *("metrics.jsonl", "samples.png", "result.json", ".lock", "status.json"),
]


@pytest.mark.parametrize("name", FILES_AND_FOLDERS)
def test_a_file_in_the_place_of_a_folder_is_named_and_a_folder_in_that_of_a_file(run, name):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.mkdir() if "." in name else path.write_bytes(HOPE)
    for words in ([f"resume={run}"], ["evaluate", f"run={run}", "metrics.n=0"]):
        code, out, err = genzoo(*words)
        assert (code, out, err.count("\n")) == (2, "", 1) and str(path) in err, err


def test_a_checkpoint_that_is_a_file_is_passed_over_by_name_and_what_was_left_is_swept(run):
    made = run / "checkpoints"
    for name in ("step-99", ".step-file"):
        (made / name).write_bytes(HOPE)
    (made / ".step-folder" / "deep").mkdir(parents=True)
    code, _, err = genzoo("sample", f"run={run}")
    assert code == 2 and f"{made / 'step-99'}: is no folder" in err
    code, _, err = genzoo(f"resume={run}")
    assert code == 0 and f"genzoo: {made / 'step-99'}: is no folder" in err and "resuming from step 4" in err
    assert [path.name for path in sorted(made.iterdir())] == ["step-12", "step-16"]


def test_a_checkpoint_takes_the_place_of_a_link_and_of_a_file(run, tmp_path):
    model, _ = untrained(tmp_path / "model", *SMALL["vae"])[1:]
    folder = run / "checkpoints"
    planted(run, "checkpoints/step-50", to_folder)
    planted(run, "checkpoints/step-51", dangling)
    (folder / "step-52").write_bytes(HOPE)
    for step in (50, 51, 52):
        assert checkpoints.save(folder, step, model, model, {}, keep=9).is_dir()
    assert list((tmp_path / "elsewhere").iterdir()) == [tmp_path / "elsewhere" / "secret"]


# What is put there after the check


@pytest.mark.parametrize("plant", [symlink, dangling, to_itself, pipe, hard])
def test_no_file_is_opened_through_a_link(run, tmp_path, plant):
    opened = Run(run)  # before anything is wrong
    planted(run, "metrics.jsonl", plant)
    planted(run, ".lock", plant)
    for write in (lambda: opened.log(event="x"), opened.logged):
        with pytest.raises(RunError, match=r"metrics\.jsonl"):
            write()
    (run / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"\.lock"), opened.training():
        raise AssertionError("this run may not be written")
    assert list((tmp_path / "elsewhere").iterdir()) == [tmp_path / "elsewhere" / "secret"]
    assert (tmp_path / "elsewhere" / "secret").read_bytes() == HOPE


@pytest.mark.parametrize("plant", [symlink, dangling, to_folder, pipe])
@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json"])
def test_what_is_exchanged_between_the_look_and_the_opening_is_not_followed(run, tmp_path, monkeypatch, plant, name):
    opened, look = Run(run), files._check_regular

    def exchanged(path: Path, *arguments: object) -> None:
        look(path, *arguments)
        if not path.is_symlink() and path.is_file() and path.stat().st_ino == before:
            planted(run, name, plant)

    before = (run / name).stat().st_ino
    monkeypatch.setattr(files, "_check_regular", exchanged)
    with pytest.raises(RunError, match=name):
        opened.log(event="x") if name == "metrics.jsonl" else opened.status
    assert contents(tmp_path / "elsewhere") == {str(tmp_path / "elsewhere" / "secret"): HOPE}


@pytest.mark.parametrize("plant", [symlink, dangling, to_itself, pipe, hard])
def test_what_is_replaced_is_a_name_and_not_what_it_leads_to(tmp_path, plant):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_bytes(HOPE)
    for durable in (True, False):
        path = planted(tmp_path, f"file-{durable}", lambda path, _: plant(path, tmp_path / "elsewhere"))
        write_atomically(path, b"new", durable=durable)
        assert not path.is_symlink() and path.read_bytes() == b"new"
    assert (tmp_path / "elsewhere" / "secret").read_bytes() == HOPE and len(list(tmp_path.iterdir())) == 3
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="folder: is a directory, not a file"):
        write_atomically(tmp_path / "folder", b"new")


def test_samples_and_comparisons_replace_links_and_do_not_follow_them(run, tmp_path):
    drawn = tmp_path / "drawn"
    links = [drawn / "000000.png", drawn / "000001.png", tmp_path / "page" / "index.html", tmp_path / "grid.png"]
    for path, plant in zip(links, (symlink, dangling, symlink, symlink), strict=True):
        planted(
            tmp_path, str(path.relative_to(tmp_path)), lambda path, _, plant=plant: plant(path, tmp_path / "elsewhere")
        )
    reported(tmp_path / "runs", metrics=scored(1.0))
    for words, expected in (
        (["sample", f"run={run}", "n=2", "out=drawn"], 2),  # a folder of others' files is refused
        (["sample", f"run={run}", "n=2", "out=grid.png"], 0),
        (["compare", "runs=runs", "out=page"], 0),
    ):
        code, _, err = genzoo(*words)
        assert code == expected, err
    assert [path.is_symlink() for path in links] == [True, True, False, False]
    assert contents(tmp_path / "elsewhere") == {str(tmp_path / "elsewhere" / "secret"): HOPE}


# What is none of a stranger's


def test_links_that_wandb_makes_itself_are_allowed_and_removed_before_it_is_opened(run, tmp_path, monkeypatch):
    for name in WANDB_LINKS:
        planted(run, f"wandb/{name}", symlink)
    Run(run).check_writable()

    def opened(**_: object) -> None:
        assert list((run / "wandb").iterdir()) == []
        raise ZeroDivisionError

    monkeypatch.setattr("genzoo.training.wandb_logger.FaultTolerantWandbLogger", opened)
    with pytest.raises(ZeroDivisionError):
        loggers.WandB(mode="offline").open(
            Run(run), {"budget": {}, "data": {"name": "digits"}, "model": {}, "metrics": {}}
        )
    assert (tmp_path / "elsewhere" / "secret").read_bytes() == HOPE


def test_a_run_that_is_whole_may_be_written_and_files_that_are_replaced_may_be_shared(run, tmp_path):
    for path in [*(run / "checkpoints").rglob("*"), *(run / "samples").rglob("*")]:
        if path.is_file():  # as a copy by cp -al has them
            (tmp_path / "elsewhere" / f"{path.parent.name}-{path.name}").hardlink_to(path)
    before = contents(tmp_path / "elsewhere")
    Run(run).check_writable()
    check_tree(tmp_path / "nothing is here")
    code, _, err = genzoo(f"resume={run}")
    assert code == 0, err
    assert contents(tmp_path / "elsewhere") == before
    assert np.asarray(sorted((run / "samples").iterdir())).size == 3


def test_a_picture_that_cannot_be_drawn_leaves_no_half_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def half(file, image):
        file.write(b"\x89PNG half of it")
        raise OSError("the encoder failed")

    monkeypatch.setattr("genzoo.data.pictures.save_png", half)
    with pytest.raises(OSError, match="the encoder failed"):
        genzoo(*TINY, *SMALL["vae"], "outputs=out")
    (folder,) = Path("out").glob("*/*/samples")
    assert list(folder.iterdir()) == []
