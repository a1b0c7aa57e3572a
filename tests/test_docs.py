"""The pages for readers: links, the path through the code, and the example of a new family."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import genzoo
from genzoo.families.ddpm import DDPM
from genzoo.jobs import train
from tests import children
from tests.conftest import composed

ROOT = Path(genzoo.__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("experiments/*/*.md"))]
README = (ROOT / "README.md").read_text()
PATH = README.partition("## From a command line to the loss")[2].partition("\n## ")[0]


def anchors(page: Path) -> set[str]:
    """List the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_path_to_the_loss_is_short_and_names_what_is_there():
    rows = re.findall(r"^\| \[[^]]+\]\(([^)]+)\) \| (.*) \|$", PATH, re.MULTILINE)
    configurations = [name for name, _ in rows if name.endswith(".yaml")]
    sources = [(name, text) for name, text in rows if name.endswith(".py")]
    assert 3 <= len(configurations) <= 5
    assert 6 <= len(sources) <= 8
    assert len(rows) == len(configurations) + len(sources)
    for name, text in sources:
        tree = ast.parse((ROOT / name).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        named = re.findall(r"`(\w+)`", text)
        assert named and set(named) <= defined, name


def test_the_path_to_the_loss_is_the_one_that_a_training_step_takes(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def loss(*_):
        frames = [frame.filename for frame in traceback.extract_stack()]
        raise Reached(
            {Path(name).relative_to(ROOT).as_posix() for name in frames if name.startswith(f"{ROOT}/genzoo/")}
        )

    monkeypatch.setattr(DDPM, "_loss", loss)
    monkeypatch.chdir(tmp_path)
    words = ["model=ddpm", "data=digits", "budget.images=64", "trainer.threads=1", "metrics.n=0"]
    with pytest.raises(Reached) as reached:
        train.train(composed(*words), {"model": "ddpm"})
    passed = reached.value.args[0] | {"genzoo/families/ddpm.py"}
    listed = set(re.findall(r"\((genzoo/[^)]+)\)", PATH))
    assert listed == passed | {"genzoo/__main__.py", "genzoo/config/compose.py"}  # which come before


def test_the_readme_lists_every_choice():
    families = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", README.partition("## Families")[2], re.MULTILINE)
    choices = {"model": set(re.findall(r"`(\w+)`", " ".join(families)))}
    for group in ("sampler", "data", "budget"):
        row = re.search(rf"^\| `{group}=` \| (.*) \|$", README, re.MULTILINE)
        choices[group] = set(re.findall(r"`(\w+)`", row[1]))
    for group, named in choices.items():
        assert named == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}, group


def test_the_example_of_a_family_works_as_it_stands(tmp_path):
    source, configuration = re.findall(
        r"```(?:python|yaml)\n(.*?)```", README.partition("## Adding a family")[2], re.DOTALL
    )
    (tmp_path / "gaussian.py").write_text(source)
    (tmp_path / "my_conf" / "model").mkdir(parents=True)
    (tmp_path / "my_conf" / "model" / "gaussian.yaml").write_text(configuration)
    command = re.search(r"`python (-m genzoo --config-dir my_conf [^`]*)`", README)[1].split()
    small = ["budget.images=64", "trainer.threads=1", "metrics.n=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (small, [*small, "data.conditional=true"]):
        start = subprocess.run if words == small else children.run  # as a user does, and with the libraries loaded
        done = start([sys.executable, *command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "test/nll" in done.stdout
