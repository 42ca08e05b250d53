"""The HTML report in a real browser: no error, no request, no overflow, both themes, hostile names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report import build
from tests.report.browser import Browser, Page
from tracetool.report import html


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    made = {}
    for name, make in (("handover", build.handover), ("hostile", build.hostile), ("busy", build.busy)):
        data, runs = make(root / name)
        made[name] = root / f"{name}.html"
        made[name].write_text(html.render(data, runs, command="tracetool report data -o report.html"), encoding="utf-8")
    return made


def opened(browser: Browser, path: Path, width: int, theme: str) -> Page:
    page = browser.page()
    page.resize(width)
    page.theme(theme)
    page.load(path)
    return page


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["handover", "hostile", "busy"])
def test_quiet_and_within_bounds(browser: Browser, pages: dict[str, Path], name: str, width: int, theme: str) -> None:
    page = opened(browser, pages[name], width, theme)
    assert page.run("document.querySelectorAll('details').forEach(d => d.open = true)") is None
    assert page.logged() == []
    assert page.requests() == []
    assert page.overflow() == []
    assert page.run("typeof window.pwned") == "undefined"
    drawn, plots = page.run(
        "[document.querySelectorAll('.plot .main-svg').length, document.querySelectorAll('.plot').length]"
    )
    assert plots and drawn >= plots
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (theme == "dark")


def test_the_checks_can_fail(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><title>x</title><div style='width:3000px'>x</div><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('no')</script>"
    )
    page = opened(browser, bad, 1280, "light")
    page.run("new Promise(r => setTimeout(r, 300))")
    assert page.overflow() and page.requests() and page.logged()


def test_the_policy_stops_injected_scripts(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    injected = tmp_path / "injected.html"
    text = pages["handover"].read_text(encoding="utf-8")
    injected.write_text(text.replace("</main>", "<script>window.pwned = 1</script></main>"), encoding="utf-8")
    page = opened(browser, injected, 1280, "light")
    assert page.run("typeof window.pwned") == "undefined"
    assert page.logged()


def test_theme_button_and_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["handover"], 1280, "light")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.run(ground)
    page.run("(b => { b.click(); b.click(); })(document.getElementById('theme'))")
    assert page.run("document.documentElement.dataset.theme") == "dark"
    assert page.run(ground) != before
    extent = "(r => r[1] - r[0])(document.querySelector('.plot').layout.xaxis.range)"
    wide = page.run(extent)
    page.run("document.querySelector('.plot').focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="+", text="+" if kind == "keyDown" else "")
    assert page.run(extent) == pytest.approx(wide / 2)
    page.run("document.querySelector('.tools [data-do=all]').click()")
    assert page.run(extent) == pytest.approx(wide)
    assert page.logged() == []


def test_everything_that_acts_can_be_focused(browser: Browser, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["handover"], 1280, "light")
    assert page.run("[...document.querySelectorAll('.scroll, .plot')].every(e => e.tabIndex === 0)")
    assert page.run("[...document.querySelectorAll('table')].every(t => t.closest('.scroll'))")
    assert page.run(
        "[...document.querySelectorAll('figure')].every(f => f.querySelector('figcaption') && f.querySelector('table'))"
    )


def test_print_is_light_and_does_not_hide_tables(browser: Browser, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["handover"], 1280, "dark")
    page.theme("dark", "print")
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, ground[4:-1].split(","))) > 600
    assert page.run("[...document.querySelectorAll('.scroll')].every(s => getComputedStyle(s).overflowX === 'visible')")
    assert len(page.call("Page.printToPDF", printBackground=True)["data"]) > 20_000
