"""The report as a browser shows and prints it."""

import base64
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from devtools import Tab, browser_tab, find_browser
from PIL import Image
from reporting_runs import LINE_ART, RunBuilder, make_report

pytestmark = pytest.mark.browser

FIRST_TILE = "document.querySelector('#query-0 .tiles .picture')"


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    executable = find_browser()
    if executable is None:
        if os.environ.get("MUCS_REQUIRE_BROWSER") == "1":
            pytest.fail("MUCS_REQUIRE_BROWSER=1, and no Chromium or Chrome is on the PATH")
        pytest.skip("no Chromium or Chrome on the PATH")
    with browser_tab(executable, tmp_path / "profile") as found:
        yield found


@pytest.fixture
def page(finished: RunBuilder) -> Path:
    """A report with everything on it: two variants, an ensemble, an evaluation with a chart."""
    finished.variant("mucs__forget_weight-0.5", finished.score * 2, forget_weight=0.5)
    finished.ensemble(["mucs", "mucs__forget_weight-0.5"], spearman=0.5, overlap=0.25)
    finished.evaluation("overlap", charts={"interval_bars": LINE_ART})
    return make_report(finished.run, k=5)


def pixels(tab: Tab, element: str) -> np.ndarray:
    """What an element looks like, [H, W, 3]."""
    tab.evaluate(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = tab.evaluate(
        f"(r => ({{x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}}))"
        f"({element}.getBoundingClientRect())"
    )
    shot = tab.send("Page.captureScreenshot", clip={**box, "scale": 1})
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))


def press_tab(tab: Tab) -> str:
    """Presses the tabulator key; returns the address of the link that has the focus then, or its element's name."""
    for kind in ("keyDown", "keyUp"):
        tab.send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    return tab.evaluate("document.activeElement.getAttribute('href') || document.activeElement.tagName")


def test_every_image_is_drawn_and_nothing_else_is_asked_for(tab: Tab, page: Path, finished: RunBuilder) -> None:
    tab.open(page.as_uri())
    shown = tab.evaluate(
        "[...document.querySelectorAll('.subject > .picture, .tiles .picture')]"
        ".map(i => [i.clientWidth, i.clientHeight])"
    )
    assert len(shown) == 3 * (1 + 3 * 5)
    assert all(width >= 60 and abs(width - height) <= 2 for width, height in shown), shown
    seen = pixels(tab, FIRST_TILE)
    best = finished.raw[int(finished.score[0].argmax()), 0] * (255 / 16)
    centres = (np.arange(8) + 0.5) * len(seen) / 8  # of the pixels that are enlarged without blur
    drawn = seen[centres.astype(int)][:, centres.astype(int)].astype(float)
    assert np.abs(drawn - best[..., None]).max() <= 8
    assert tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])") == [
        [True, 120, 60]
    ]
    # the chart's own styles count, although the page allows none but its own
    chart = pixels(tab, "document.images[0]")
    assert tuple(chart[30, 60]) == (0x00, 0x72, 0xB2) and chart[0, 60].max() < 140
    assert "Query 0" in tab.evaluate("document.querySelector('#query-0').innerText")
    assert "What it does not prove" in tab.evaluate("document.body.innerText")
    # the style sheet counts only where the content security policy accepts it
    assert tab.evaluate("getComputedStyle(document.querySelector('article.query')).display") == "grid"
    asked = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert [e for e in tab.events if e["method"] == "Log.entryAdded"] == []


@pytest.mark.parametrize("width", [1250, 390])
def test_the_page_is_as_wide_as_the_window(tab: Tab, page: Path, width: int) -> None:
    tab.send("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500)
    tab.open(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth == document.documentElement.clientWidth")


def test_the_keyboard_skips_to_the_report_and_the_focus_is_seen(tab: Tab, page: Path) -> None:
    tab.open(page.as_uri())
    box = "document.activeElement.getBoundingClientRect()"
    assert press_tab(tab) == "#main"
    assert tab.evaluate(f"{box}.top") >= 0  # it comes into view with the focus
    assert press_tab(tab) == "#glance"
    assert tab.evaluate("document.querySelector('.skip').getBoundingClientRect().bottom") < 0
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert tab.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    tab.evaluate("(link => [link.focus(), link.click(), 0])(document.querySelector('.skip'))")
    assert press_tab(tab).startswith(("DIV", "#query-"))  # past the table of contents


def printed(tab: Tab) -> bytes:
    """The page on A4, as a PDF."""
    return base64.b64decode(tab.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])


def printed_pictures(pdf: bytes) -> int:
    return len(re.findall(rb"/Subtype\s*/Image", pdf))


def test_what_is_printed_has_every_picture_and_nothing_is_cut_off(
    tab: Tab, page: Path, make_run: Callable[..., RunBuilder]
) -> None:
    tab.open(page.as_uri())
    different = tab.evaluate(
        "new Set([...document.querySelectorAll('.sheet image')].map(i => i.getAttribute('href'))).size"
    )
    assert different > 10
    assert printed_pictures(printed(tab)) == different
    tab.send("Emulation.setEmulatedMedia", media="print")
    # the width of the paper inside its margins, at 96 pixels an inch
    paper = round((8.27 - 2 * 14 / 25.4) * 96)
    tab.send("Emulation.setDeviceMetricsOverride", width=paper, height=1000, deviceScaleFactor=1, mobile=False)
    too_wide = tab.evaluate(
        f"[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > {paper} + 1)"
        ".map(e => [e.tagName, e.className, e.textContent.slice(0, 40)].join(' '))"
    )
    assert too_wide == []
    assert tab.evaluate("getComputedStyle(document.querySelector('.skip')).display") == "none"


def test_without_images_nothing_that_is_printed_is_a_picture(tab: Tab, finished: RunBuilder) -> None:
    tab.open(make_report(finished.run, k=5, images=False).as_uri())
    assert printed_pictures(printed(tab)) == 0
    assert "id 3" in tab.evaluate("document.querySelector('#query-2').innerText")
