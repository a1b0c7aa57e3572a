"""Who may import whom, read from the syntax trees of all sources, and what is loaded before anything is asked for."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import genzoo
from tests.planted_faults import FAULTS

PACKAGE = Path(genzoo.__file__).parent
ROOT = PACKAGE.parent
SOURCES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

# Each layer, a module or a folder of the package, and the layers that it may import besides itself.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "catalogue": set(),
    "event": set(),
    "numerics": set(),
    "console": set(),
    "environment": {"console"},
    "devices": {"errors"},
    "conditions": {"numerics"},
    "text": {"conditions", "console", "errors", "runs"},
    "distributions": {"numerics"},
    "nn": {"conditions", "numerics"},
    "model": {"conditions", "event"},
    "diffusion": {"conditions", "event", "model", "numerics"},
    "families": {"conditions", "diffusion", "distributions", "event", "model", "nn", "numerics"},
    "data": {"conditions", "distributions", "environment", "event", "numerics", "text"},
    "runs": {"console"},
    "report": {"catalogue", "errors", "runs"},
    "labels": {"errors", "runs"},
    "metrics": {
        "conditions",
        "console",
        "distributions",
        "environment",
        "model",
        "nn",
        "numerics",
        "runs",
        "text",
    },
    "training": {"console", "data", "distributions", "environment", "model", "numerics", "runs"},
    "evaluation": {
        "catalogue",
        "conditions",
        "console",
        "data",
        "devices",
        "diffusion",
        "distributions",
        "errors",
        "event",
        "metrics",
        "model",
        "numerics",
        "reranking",
        "runs",
        "training",
    },
    "latents": {"diffusion", "model"},
    "variations": {"latents", "model", "numerics"},
    "compression": {"conditions", "distributions", "errors", "model", "numerics"},
    "config": {"errors", "runs"},
    "editing": {"config", "data", "diffusion", "errors", "event", "model", "numerics"},
    "reranking": {"model"},
    "loading": {
        "conditions",
        "config",
        "devices",
        "diffusion",
        "errors",
        "metrics",
        "model",
        "reranking",
        "runs",
        "text",
        "training",
    },
    "abilities": {"compression", "diffusion", "latents", "model"},
    "explore": {"compression", "diffusion", "errors", "latents", "loading", "model", "numerics", "runs"},
}
EVERYTHING = set(LAYERS) - {"families"}  # families are named by configurations alone
LAYERS |= {
    "jobs": EVERYTHING,
    "api": EVERYTHING | {"jobs"},
    "serving": EVERYTHING | {"jobs"},
    "cli": EVERYTHING | {"jobs", "serving"},
    "__main__": {"cli", "config", "console", "environment", "errors", "jobs", "runs", "training"},
    "__init__": {"conditions", "event", "explore", "families", "api", "loading"},  # names, resolved on first use
}
# Packages that only some layers may know of.
CONFINED = {
    "pytorch_lightning": {"training", "data"},
    "lightning": {"training", "data"},
    "hydra": {"config", "__main__"},
    "omegaconf": {"config", "__main__"},
    "wandb": {"report"},
    "constriction": {"compression"},
}


def imports(tree: ast.AST) -> Iterator[str]:
    """List the full names of all modules that a source imports, at its head or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            # ``from genzoo.training import checkpoints`` names a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(path: str) -> str:
    """Name the layer of a source: ``genzoo/nn/mlp.py`` is in ``nn``, ``genzoo/model.py`` is ``model``."""
    return path.split("/")[1].removesuffix(".py")


def of_genzoo(tree: ast.AST) -> set[tuple[str, ...]]:
    """List what a source imports of genzoo itself, as (layer, module)."""
    return {tuple(name.split(".")[1:3]) for name in imports(tree) if name.startswith("genzoo.")}


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_one_way(path):
    here = layer(path)
    assert here in LAYERS, f"a new layer: say in {__file__} what it may import"
    taken = {name[0] for name in of_genzoo(SOURCES[path])}
    assert taken <= LAYERS[here] | {here}


def test_layers_have_no_cycle():
    order: list[str] = []
    while left := set(LAYERS) - set(order):
        free = sorted(name for name in left if LAYERS[name] <= set(order))
        assert free, f"a cycle among {sorted(left)}"
        order += free


def test_files_have_no_cycle():
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree for path, tree in SOURCES.items()
    }
    graph = {}
    for name, tree in modules.items():
        at_head = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        taken = {module for node in at_head for module in imports(ast.Module([node], []))}
        graph[name] = {module for module in taken if module in modules} - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"a cycle: {' -> '.join(error.args[1])}") from error


def test_families_do_not_import_each_other():
    for path, tree in SOURCES.items():
        if layer(path) == "families":
            taken = {name for name in of_genzoo(tree) if name[0] == "families"}
            # The bases of normalising flows and of those with couplings, of GANs, quantised autoencoders and two-stage models.
            bases = {"flow", "coupling_flow", "gan", "vqvae", "latent"}
            assert {name for _, name in taken} <= bases, path


def test_training_knows_of_data_only_the_loader():
    for path, tree in SOURCES.items():
        if layer(path) == "training":
            assert {name[1] for name in of_genzoo(tree) if name[0] == "data"} <= {"loader"}, path


def test_a_run_stands_on_the_standard_library_and_yaml():
    for path, tree in SOURCES.items():
        if layer(path) == "runs":
            tops = {module.partition(".")[0] for module in imports(tree)} - sys.stdlib_module_names
            assert tops <= {"genzoo", "yaml"}, path


@pytest.mark.parametrize("package", CONFINED)
def test_a_framework_stays_in_its_place(package):
    users = {layer(path) for path, tree in SOURCES.items() if package in {n.partition(".")[0] for n in imports(tree)}}
    assert users <= CONFINED[package]


def test_no_source_names_a_configuration_object():
    """The library takes plain arguments: configurations are for the commands and the run's own file."""
    for path, tree in SOURCES.items():
        if layer(path) in ("config", "__main__", "runs", "report"):
            continue
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"cfg", "DictConfig", "OmegaConf", "instantiate"}, path


def test_the_repository_holds_nothing_else():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    tops = {name.partition("/")[0] for name in listed.splitlines()}
    pages = {"README.md", "GUIDE.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"}
    known = {"genzoo", "conf", "tests", "experiments", "pyproject.toml", *pages}
    assert {name for name in tops if not name.startswith(".")} <= known
    assert not [name for name in listed.splitlines() if re.search(r"__pycache__|\.pyc$|\.ckpt$|^outputs/", name)]


# What is loaded before it is needed


def loaded(code: str, *arguments: str) -> set[str]:
    """Run code in a new interpreter and list the packages that are loaded when it ends."""
    epilogue = (
        "import atexit, sys; atexit.register(lambda: print('LOADED', *{n.partition('.')[0] for n in sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{epilogue}\n{code}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


HEAVY = {"torch", "pytorch_lightning", "torchmetrics", "matplotlib", "sklearn"}


@pytest.mark.parametrize("module", ["genzoo", "genzoo.runs", "genzoo.report"])
def test_reading_runs_needs_no_torch(module):
    packages = loaded(f"import {module}")
    assert "genzoo" in packages and not packages & {*HEAVY, "hydra", "wandb"}


@pytest.mark.parametrize("flags", [("--help",), ("--cfg", "job"), ("model=vae", "data=moons", "--cfg", "job")])
def test_help_and_the_configuration_are_shown_without_torch(flags):
    packages = loaded("from genzoo.__main__ import main; main()", *flags)
    assert "hydra" in packages and not packages & HEAVY


def test_a_trained_model_is_loaded_without_lightning():
    packages = loaded("from genzoo import load")
    assert "torch" in packages and not packages & {"pytorch_lightning", "lightning", "torchmetrics", "wandb", "sklearn"}


def test_public_names_are_what_they_say():
    for name in genzoo.__all__:
        assert getattr(genzoo, name).__name__ == name
    assert set(genzoo.__all__) <= set(dir(genzoo))
    with pytest.raises(AttributeError, match="has no attribute 'VEA'"):
        _ = genzoo.VEA


def test_every_planted_fault_has_its_place():
    places = {fault.name: (PACKAGE / fault.path).read_text().count(fault.right) for fault in FAULTS}
    assert {name: count for name, count in places.items() if count != 1} == {}
