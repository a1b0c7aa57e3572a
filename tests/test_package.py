"""The wheel and the source distribution: what is in them, and that an installed genzoo is the one of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from genzoo.config.paths import CONF
from tests.commands import SMALL, TINY, genzoo

REPOSITORY = Path(__file__).parents[1]

pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Build both distributions as ``python -m build --no-isolation`` does."""
    out = tmp_path_factory.mktemp("dist")
    program = "import sys, hatchling.build as b; print(b.build_wheel(sys.argv[1])); print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(out)], cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def configurations() -> set[str]:
    return {path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}


def sources() -> set[str]:
    package = REPOSITORY / "genzoo"
    beside = [package / "metrics" / "networks", package / "report" / "assets"]
    files = [*package.rglob("*.py"), *(path for folder in beside for path in folder.iterdir())]
    return {path.relative_to(REPOSITORY).as_posix() for path in files}


def test_the_wheel_holds_the_sources_and_every_configuration_and_nothing_else(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources() | {f"genzoo/conf/{name}" for name in configurations()}


def test_the_source_distribution_holds_what_is_needed_to_build_and_to_test(built):
    with tarfile.open(built["sdist"]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    tests = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "tests").rglob("*.py")}
    assert names >= sources() | {f"conf/{name}" for name in configurations()} | tests | {
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert not {name for name in names if name.startswith(("outputs", "data/", "dist", "wandb"))}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """Install the wheel alone, without its dependencies, which are here already."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([*command, str(built["wheel"])], check=True)
    return target


def run_installed(installed: Path, cwd: Path, command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_genzoo_has_the_same_configuration_and_the_same_console_script(installed, tmp_path):
    of_module = run_installed(installed, tmp_path, [sys.executable, "-m", "genzoo", "--cfg", "job", "model=ddpm"])
    assert yaml.safe_load(of_module) == yaml.safe_load(genzoo("--cfg", "job", "model=ddpm").out)
    of_script = run_installed(installed, tmp_path, [sys.executable, str(installed / "bin" / "genzoo"), "--help"])
    assert of_script == genzoo("--help").out


def test_an_installed_genzoo_trains_from_anywhere(installed, tmp_path):
    words = [*TINY, *SMALL["vae"], "trainer.grids=0"]
    out = run_installed(installed, tmp_path, [sys.executable, "-m", "genzoo", *words])
    run = tmp_path / out.splitlines()[-1].removeprefix("run: ")
    assert (run / "result.json").is_file()
    where = run_installed(installed, tmp_path, [sys.executable, "-c", "import genzoo; print(genzoo.__file__)"])
    assert Path(where.strip()).is_relative_to(installed)
