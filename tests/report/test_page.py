"""The page in a real browser: it sorts, filters and opens cards, asks nobody for anything, and holds no element of a run's."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genzoo.report import page
from genzoo.report.comparison import write_comparison as write
from tests.report import entry, run, scored

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FD = "test/fd_digits"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """A page that is open, and what went wrong on it."""

    def __init__(self, browser, path: Path, until: str = "load", **how):
        self.troubles: list[str] = []
        how = {"viewport": {"width": 1200, "height": 900}} | how
        self.page = browser.new_page(**how)
        self.page.on("console", lambda message: self.troubles.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", self.asked)
        self.address = path.resolve().as_uri()
        self.page.goto(self.address, wait_until=until)

    def asked(self, request) -> None:
        if request.url != self.address and not request.url.startswith(("data:", "blob:")):
            self.troubles.append(f"request: {request.url}")

    def labels(self, board: int = 0) -> list[str]:
        return self.page.locator(".board").nth(board).locator("tbody tr td:first-child").all_inner_texts()

    def everything(self) -> None:
        """Scroll past all of it, so that every plot is drawn."""
        for y in range(0, self.page.evaluate("document.documentElement.scrollHeight"), 500):
            self.page.evaluate(f"scrollTo(0, {y})")
            self.page.wait_for_timeout(60)


@pytest.fixture
def zoo(tmp_path) -> Path:
    """Three families, three seeds each; one has a bound, one failed once."""
    for seed in range(3):
        bound = entry(3.0 + seed, 0.1, protocol={"unit": "bits/dim", "bound": "LOWER", "levels": 17})
        run(tmp_path / "runs", "vae", seed, scored(30.0 + seed, seed, test__bpd_upper=bound))
        run(tmp_path / "runs", "gan", seed, scored(5.0 + seed, seed))
        run(tmp_path / "runs", "ddpm", seed, scored(100.0 + seed, seed))
    run(tmp_path / "runs", "ddpm", 3, state="failed", why="NonFiniteError: loss is not finite at step 7")
    return write([str(tmp_path / "runs")], tmp_path / "out")


def test_the_table_sorts_by_mouse_and_keyboard(browser, zoo):
    visit = Visit(browser, zoo)
    assert visit.labels() == ["gan", "vae", "ddpm"]
    header = visit.page.locator(f'thead button[data-sort="{FD}"]')
    assert header.locator("xpath=..").get_attribute("aria-sort") == "ascending"
    header.click()
    assert visit.labels() == ["ddpm", "vae", "gan"]
    visit.page.keyboard.press("Enter")  # the focus stayed where it was
    assert visit.labels() == ["gan", "vae", "ddpm"]
    bound = visit.page.locator('thead button[data-sort="test/bpd_upper"]')
    for _ in range(2):
        bound.click()
        assert visit.labels()[0] == "vae"  # what has no number stays at the end
    visit.page.locator('thead button[data-sort=""]').click()
    assert visit.labels() == ["ddpm", "gan", "vae"]
    assert not visit.troubles


def test_the_table_filters_and_shows_other_columns(browser, zoo):
    visit = Visit(browser, zoo)
    visit.page.get_by_role("searchbox").fill("a")
    assert visit.labels() == ["gan", "vae"]
    visit.page.get_by_role("searchbox").fill("nothing like it")
    assert visit.labels() == [] and visit.page.get_by_role("status").inner_text() == "0 of 3 rows"
    visit.page.get_by_role("searchbox").fill("")
    before = visit.page.locator("thead th").count()
    visit.page.locator(".tools summary").click()
    visit.page.locator(".columns input").first.uncheck()
    assert visit.page.locator("thead th").count() == before - 1
    assert not visit.troubles


def test_a_number_opens_its_card(browser, zoo):
    visit = Visit(browser, zoo)
    row = visit.page.locator("tbody tr", has_text="vae")
    assert "n/a" in visit.page.locator("tbody tr", has_text="gan").inner_text()
    row.get_by_text("31.00 ± 0.58").click()
    card = visit.page.locator("dialog[open]")
    text = card.inner_text()
    for words in ("vae · FD (digits) to test", "over 3 seeds", "30, 31, 32", "n_fake", "1000", "weights", "python -m"):
        assert words in text
    visit.page.keyboard.press("Escape")
    assert visit.page.locator("dialog[open]").count() == 0
    assert "NonFiniteError: loss is not finite at step 7" in visit.page.locator("#runs").inner_text()
    assert "1 failed" in visit.page.locator("tbody tr", has_text="ddpm").inner_text()
    assert not visit.troubles


@pytest.mark.parametrize("how", [{}, {"color_scheme": "dark"}, {"viewport": {"width": 360, "height": 740}}])
def test_everything_is_drawn_without_a_request_or_an_error(browser, zoo, how):
    visit = Visit(browser, zoo, **how)
    visit.everything()
    drawn = visit.page.locator(".plot .main-svg").count()
    assert drawn >= 2 * (2 + 3)  # cost, curves, and the perplexity of each family
    assert visit.page.locator("#samples img").evaluate_all("all => all.every((i) => i.naturalWidth === 1)")
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    paper = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (how.get("color_scheme") != "dark")
    visit.page.locator("#theme").click()
    assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    assert not visit.troubles


def test_plots_follow_their_selectors(browser, zoo):
    visit = Visit(browser, zoo)
    visit.everything()

    def drawn(section: str) -> list:
        return visit.page.evaluate(
            f"document.querySelector('{section} .plot').data.map((t) => [t.name, Array.from(t.x), Array.from(t.y)])"
        )

    front = {name: (x, y) for name, x, y in drawn("#cost") if name}
    assert front["Pareto front"] == ([101], [6])  # the gan is as fast as all, and better
    assert front["vae"] == ([101], [31])
    curves = visit.page.locator("#curves select")
    curves.nth(0).select_option("train/loss")
    curves.nth(1).select_option("flops")
    lines = drawn("#curves")
    assert len(lines) == 10 and lines[0][1] == [0, 1e9, 2e9, 3e9, 4e9]
    assert not visit.troubles


def test_tables_that_may_not_be_compared_say_why(browser, tmp_path):
    run(tmp_path / "runs", "vae", 0, scored(3.0))
    other = scored(2.0)
    other[FD]["card"]["protocol"] = {"unit": "squared distance", "n_fake": 50}
    run(tmp_path / "runs", "gan", 0, other)
    visit = Visit(browser, write([str(tmp_path / "runs")], tmp_path / "out"))
    assert visit.page.locator(".board").count() == 2
    assert "n_fake is 1000 here and 50 there" in visit.page.locator(".board").nth(1).inner_text()
    assert visit.page.locator("td.best").count() == 0


# What came with somebody's run


def payloads() -> list[str]:
    """A hundred texts that would be elements, scripts or links where they were not escaped."""
    scripts = ["hacked()", "window.hacked=1", "fetch('//evil.example')", "document.body.remove()", "alert`1`"]
    forms = [
        *("<script>{}</script>", "</script><script>{}</script>", "<img src=x onerror={}>", "<svg onload={}>"),
        *('"><script>{}</script>', "'><img src=x onerror={}>", "<a href=javascript:{}>x</a>", "<b onclick={}>x</b>"),
        *("<iframe srcdoc='<script>{}</script>'>", "<body onload={}>", "javascript:{}", "<!--<script>{}"),
        *("]]><script>{}</script>", "{{{{{}}}}}", "{{% print({}) %}}", "<math href=javascript:{}>x"),
        *("<details open ontoggle={}>", "</style><script>{}</script>", "<base href=//evil.example>{}"),
        "\u2028<script>{}</script>",
    ]
    return [form.format(script) for form in forms for script in scripts]


def test_no_element_of_a_run_is_in_the_page(browser, tmp_path):
    texts = payloads()
    assert len(set(texts)) == 100
    for i, text in enumerate(texts):
        config = {
            "model": {"_target_": text, text: text},
            "data": {"name": text if i % 5 == 0 else "digits"},
            "tags": [text, {text: text}],
            "seed": text,
        }
        metrics = scored(
            float(i), **{f"test__{text}": entry(1.0, protocol={"unit": text, text: text}, setting={text: text})}
        )
        made = run(
            tmp_path / "runs", text, i, metrics, config=config, name="hostile", command=text, machine={"cpu": text}
        )
        made.update_status(diagnostics={"train/perplexity": {"label": text, "unit": text, "better": text}})
        made.log(event="train", step=9, images=9, seconds=9, values={text: 1.0})
        run(tmp_path / "runs", text, i, state="failed", why=text, config=config, name="hostile")
    out = write([str(tmp_path / "runs")], tmp_path / "out", title=texts[0])
    clean = write([str(run(tmp_path / "clean", "vae", 0, scored(1.0)).path)], tmp_path / "clean-out")

    visit, usual = Visit(browser, out), Visit(browser, clean)
    visit.everything()
    usual.everything()
    for button in visit.page.locator("tbody td:first-child button").all()[::7]:
        button.evaluate("node => node.click()")
        visit.page.evaluate("document.querySelectorAll('dialog details').forEach((d) => { d.open = true; })")
        visit.page.evaluate("document.querySelector('dialog').close()")
    kinds = "[...new Set([...document.querySelectorAll('*')].map((node) => node.tagName.toLowerCase()))]"
    ours = {
        "ul",
        "li",
        "small",
        "dl",
        "dt",
        "dd",
        "strong",
        "h3",
        "pre",
        "circle",
        "rect",
        "path",
        "text",
        "tspan",
        "g",
    }
    assert set(visit.page.evaluate(kinds)) - set(usual.page.evaluate(kinds)) <= ours
    attributes = (
        "[...document.querySelectorAll('*')].flatMap((node) => [...node.attributes]).filter((a) =>"
        " a.name.startsWith('on') || /javascript:|evil/i.test(a.value) && ['href', 'src', 'srcdoc', 'action'].includes(a.name))"
        ".map((a) => a.name + '=' + a.value)"
    )
    assert visit.page.evaluate(attributes) == []
    assert visit.page.evaluate("document.querySelectorAll('script:not([type])').length") == 2
    assert visit.page.evaluate("window.hacked") is None and visit.page.title() == texts[0]
    assert visit.troubles == []


def test_labels_are_no_markup_of_plots(browser, tmp_path):
    label = "<b>bold</b> <a href='https://evil.example'>here</a> &lt;"
    for model in (label, "vae"):
        run(tmp_path / "runs", model, 0, scored(1.0), name="hostile")
    visit = Visit(browser, write([str(tmp_path / "runs")], tmp_path / "out"))
    visit.everything()
    for plot in ("#cost", "#curves"):
        assert label in visit.page.locator(f"{plot} .legendtext").all_text_contents()
    assert visit.page.locator(".plot svg a").count() == 0 and not visit.troubles


@pytest.mark.parametrize("content", [b"<svg onload=x>", b"", b"\x89PNG\r\n\x1a\n" + bytes(page.PICTURE)])
def test_what_is_no_picture_of_a_sane_size_is_left_out(tmp_path, content):
    made = run(tmp_path / "runs", metrics=scored(1.0))
    (made.path / "samples.png").write_bytes(content)
    text = write([str(tmp_path / "runs")], tmp_path / "out").read_text()
    assert 'id="picture-' not in text and '"picture":null' in text


def test_the_page_alone_is_the_page(zoo):
    text = zoo.read_text()
    head = text[: text.index("<script type")]
    assert not re.search(r"(src|href)=\"(?!#)", head) and "default-src 'none'" in head
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    assert [row["label"] for row in data["tables"][0]["rows"]] == ["gan", "vae", "ddpm"]


# Many runs


def test_five_hundred_runs_open_within_three_seconds(browser, tmp_path):
    curves: list[bytes] = []
    for i in range(500):
        config = {"trainer": {"batch_size": i // 5}}
        grid = b"\x89PNG\r\n\x1a\n" + os.urandom(20_000)
        first = i < 5  # of its seed, whose curve the others have too
        events = 100 if first else 0
        made = run(tmp_path / "runs", f"family{i % 10}", i % 5, scored(float(i), i % 5), config=config, events=events)
        if first:
            curves.append((made.path / "metrics.jsonl").read_bytes())
        (made.path / "metrics.jsonl").write_bytes(curves[i % 5])
        (made.path / "samples.png").write_bytes(grid)
    started = time.perf_counter()
    out = write([str(tmp_path / "runs")], tmp_path / "out")
    assert time.perf_counter() - started < 60
    times = []
    for _ in range(5):
        started = time.perf_counter()
        visit = Visit(browser, out, until="commit")
        visit.page.locator("tbody tr").first.wait_for()
        times.append(time.perf_counter() - started)
    visit.page.locator("tbody tr").nth(499).wait_for()
    assert min(times) < 3, times
    assert [trouble for trouble in visit.troubles if "Failed to load" not in trouble] == []


def test_long_curves_keep_their_ends():
    assert page.thinned(list(range(5)), 2) == [0, 1, 2, 3, 4]
    kept = page.thinned(list(range(1000)), 20)
    assert (len(kept), kept[0], kept[-1]) == (20, 0, 999) and kept == sorted(kept)
